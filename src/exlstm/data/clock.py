"""Steps of a clock: which one a time stands on, and the times of steps. pandas is loaded on first use.

A frequency is a pandas offset alias, or a whole number for times that are whole numbers (frequency.py).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_DAY = 86400


@lru_cache(256)
def tick(freq):
    """Nanoseconds of a step of fixed length, None where the step depends on the calendar."""
    import pandas as pd
    from pandas.tseries.frequencies import to_offset

    offset = to_offset(freq)
    if isinstance(offset, pd.offsets.Week):
        return offset.n * 7 * _DAY * 10**9
    if isinstance(offset, pd.offsets.Day):
        return offset.n * _DAY * 10**9
    return offset.nanos if isinstance(offset, pd.offsets.Tick) else None


def order(codes: np.ndarray, clock: np.ndarray) -> tuple[np.ndarray, bool]:
    """The order of rows by series and time, and whether they stood so: millions of rows take as long to sort as to forecast."""
    stood = (codes[1:] > codes[:-1]) | (codes[1:] == codes[:-1]) & (clock[1:] >= clock[:-1])
    return (np.arange(len(codes)), True) if stood.all() else (np.lexsort((clock, codes)), False)


def positions(times, starts: np.ndarray, lengths: np.ndarray, freq):
    """Steps since the first row of its series for every row, and the rows that stand on no step of the clock."""
    import pandas as pd

    if isinstance(times, np.ndarray):
        whole, rest = np.divmod(times - np.repeat(times[starts], lengths), freq)
        return whole, np.flatnonzero(rest)
    step = tick(freq)
    stamps = times.as_unit("ns").asi8
    if step:
        whole, rest = np.divmod(stamps - np.repeat(stamps[starts], lengths), step)
        return whole, np.flatnonzero(rest)
    # Days are compared, so that month ends at noon are month ends; the clock within the day is the first row's.
    days = times.normalize()
    grid = pd.date_range(days.min(), days.max(), freq=freq)
    place = grid.get_indexer(days)
    return place - np.repeat(place[starts], lengths), np.flatnonzero(place < 0)


def steps_after(last, freq, n: int):
    """The n times that follow `last` (a timestamp or a whole number)."""
    import pandas as pd

    if not isinstance(last, pd.Timestamp):
        return np.asarray(last + freq * np.arange(1, n + 1))
    step = tick(freq)
    if step:
        return pd.DatetimeIndex(last.as_unit("ns").asm8 + step * np.arange(1, n + 1).astype("timedelta64[ns]"))
    clock = last - last.normalize()
    return pd.date_range(last.normalize(), periods=n + 1, freq=freq)[1:] + clock


def span(first, freq, n: int):
    """n times from `first` on, `first` included."""
    if n == 0:
        return steps_after(first, freq, 0)
    rest = steps_after(first, freq, n - 1)
    return np.concatenate([[first], rest]) if isinstance(rest, np.ndarray) else rest.insert(0, first)


def between(first, freq, start: int, stop: int):
    """The times of the steps `start` to `stop` of a clock that begins at `first`: span(first, freq, stop)[start:], without
    counting up to them where all steps are of one length."""
    import pandas as pd

    if isinstance(freq, int):
        return np.asarray(first + freq * np.arange(start, max(start, stop)))
    if step := tick(freq):
        steps = np.arange(start, max(start, stop)).astype("timedelta64[ns]")
        return pd.DatetimeIndex(first.as_unit("ns").asm8 + step * steps)
    try:
        # Many series begin at one time: their clock is counted once, to a length that serves most of them.
        return _counted(first, freq, -(-stop // 64) * 64)[start:stop]
    except (pd.errors.OutOfBoundsDatetime, OverflowError):
        return span(first, freq, stop)[start:]


_counted = lru_cache(4096)(span)


def spread(firsts: list, freq, starts: np.ndarray, n: int) -> np.ndarray:
    """(B, n): times of the n steps from `starts` (B,) on, each of the clock that begins at its own of `firsts` (B,)."""
    import pandas as pd

    steps = np.asarray(starts)[:, None] + np.arange(n)
    if isinstance(freq, int):
        return np.asarray(firsts)[:, None] + freq * steps
    if step := tick(freq):
        begun = pd.DatetimeIndex(firsts).as_unit("ns").to_numpy()
        return begun[:, None] + step * steps.astype("timedelta64[ns]")
    return np.stack([between(first, freq, int(at), int(at) + n) for first, at in zip(firsts, starts)])
