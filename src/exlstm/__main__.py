"""`python -m exlstm ...` is the command `exlstm ...`, where scripts are not on the path."""

import sys

from exlstm.cli import main

if __name__ == "__main__":
    sys.exit(main())
