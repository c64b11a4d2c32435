"""Python source for `exlstm compare code`, out of a folder of wheels: a text to learn from, and whole packages held out.

    pip download --no-deps --only-binary :all: -d wheels django sympy scipy scrapy tornado networkx   # and any others
    python examples/code_corpus.py wheels code scrapy tornado networkx

writes `code` and, of the packages named, `code.val`: a document a file, each ended by a NUL byte. What stands there twice is
taken once; files of less than 200 or more than 200,000 bytes, and those with lines of more than 1,000 (data), are left out.
"""

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

SIZES, LONGEST = range(200, 200_001), 1000


def sources(wheel: Path) -> Iterator[bytes]:
    """The Python files of a wheel that are worth reading."""
    with zipfile.ZipFile(wheel) as packed:
        for file in packed.infolist():
            if file.filename.endswith(".py") and file.file_size in SIZES:
                text = packed.read(file)
                if max(map(len, text.split(b"\n"))) <= LONGEST:
                    yield text


def main(wheels: str, out: str, *held_out: str) -> dict[str, int]:
    """Bytes of both parts; the names of packages are as in the names of their wheels, upper case or lower."""
    found = sorted(Path(wheels).glob("*.whl"))
    named = {name.lower() for name in held_out}
    packages = {wheel: wheel.name.split("-")[0].lower() for wheel in found}
    if lost := named - {*packages.values()}:
        raise SystemExit(f"no wheel in {wheels} is of {', '.join(sorted(lost))}")
    seen, sizes = set(), {"learnt from": 0, "held out": 0}
    with open(out, "wb") as train, open(f"{out}.val", "wb") as held:
        # First what is held out, so that nothing of it is learnt from.
        for wheel in sorted(found, key=lambda w: packages[w] not in named):
            part, file = ("held out", held) if packages[wheel] in named else ("learnt from", train)
            for text in sources(wheel):
                if (digest := hashlib.sha256(text).digest()) not in seen:
                    seen.add(digest)
                    sizes[part] += file.write(text + b"\0")
    print(
        f"{len(seen)} files of {len(found)} packages: " + ", ".join(f"{n:,} bytes {part}" for part, n in sizes.items())
    )
    return sizes


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/code_corpus.py WHEELS OUT [HELD_OUT_PACKAGE ...]")
    main(*sys.argv[1:])
