"""Large CPU memory that is used again: to fault fresh pages in costs as much as the arithmetic that fills them.

A tensor's memory comes back when its storage dies, however long a graph has kept it. Until it is lent again the system may
take its pages (MADV_FREE), so that it weighs on nobody; what is idle beyond `IDLE_BYTES`, or for `IDLE_SECONDS`, is given up.
"""

import math
import mmap
import time
import weakref

import numpy as np
import torch

# Below this torch's allocator has warm memory of its own.
LARGE = 1 << 20
# Linux lays whole multiples of a huge page where huge pages can stand.
HUGE = 2 << 20
IDLE_BYTES, IDLE_SECONDS = 128 << 20, 10.0
# Where the system cannot take pages back nothing is kept.
KEEPS = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_ANONYMOUS")

# (since when, pages), the longest idle first. Threads and a collection in the middle of a call meet here without a lock:
# what one of them has removed the others pass over, and nothing else is done to the list than to append and to remove.
_idle: list[tuple[float, mmap.mmap]] = []


def room(shape, dtype) -> torch.Tensor:
    """An uninitialised CPU tensor."""
    size = math.prod(shape) * dtype.itemsize
    if not KEEPS or size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = _take(size) or _fresh(size)
    lent = np.frombuffer(pages, np.uint8, size)
    weakref.finalize(lent, _give, pages).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _fresh(size):
    pages = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(pages, mmap.MADV_HUGEPAGE)
    return pages


def _take(size):
    """Idle pages for `size` bytes, the latest that fit, or None."""
    for entry in reversed(_idle.copy()):
        if size <= len(entry[1]) <= 2 * size and _remove(entry):
            return entry[1]
    return None


def _give(pages):
    """Takes pages back whose tensor has died."""
    if not _advise(pages, mmap.MADV_FREE):
        return
    now = time.monotonic()
    _idle.append((now, pages))
    entries = _idle.copy()
    total = sum(len(pages) for _, pages in entries)
    for entry in entries:
        if total <= IDLE_BYTES and now - entry[0] <= IDLE_SECONDS:
            break
        _remove(entry)
        total -= len(entry[1])


def _remove(entry):
    """Whether this call has taken it out of the idle ones."""
    try:
        _idle.remove(entry)
    except ValueError:
        return False
    return True


def _advise(pages, advice):
    """Whether the system follows."""
    try:
        pages.madvise(advice)
    except OSError:
        return False
    return True
