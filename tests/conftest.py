"""The garbage collector of a test run: seldom, and not through what tests import, which was an eighth of their time."""

import gc


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
