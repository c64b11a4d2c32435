"""Panels from frames and arrays: rows put on their clock, gaps as NaN, frequency guessed and said."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral

import numpy as np

from exlstm.data import clock, frequency
from exlstm.data.columns import columns_of, guess_columns, present, refuse_parts, with_time
from exlstm.data.panel import (
    ID,
    TARGET,
    TIME,
    Columns,
    Panel,
    bare,
    numbers,
    refuse_infinite,
    require_pandas,
    to_pandas,
)


def panel_of(data, columns: Columns | None = None, freq=None, known: Panel | None = None) -> Panel:
    """The panel of a long or wide frame, a Series, an array (T,) or (N, T), or a list of arrays.

    `known` is the panel a model was fitted on: its columns, frequency and text levels are wanted again.
    """
    pd = require_pandas()
    if isinstance(data, Panel):
        return data
    columns = columns or Columns()
    if known is not None:
        columns, freq = known.columns, known.freq
    if isinstance(data, pd.Series) and data.index.nlevels == 1:
        data, columns = _framed(data, columns, known)
    if without_times(data):
        if known is not None and not isinstance(known.freq, int):
            wanted = f"the model was fitted on a frame with times in column {known.columns.time!r}"
            raise ValueError(f"the data is an array without times, {wanted}")
        return _of_arrays(data, columns, freq)
    if isinstance(data, pd.Series):
        data = data.to_frame(TARGET if data.name is None else data.name)
    frame = columns_of(to_pandas(data, "a pandas or polars frame, a Series, or an array of numbers"), columns)
    if frame.empty or not len(frame.columns):
        raise ValueError("the data has no rows")
    frame, time = with_time(frame, columns)
    told = []
    columns, wide = guess_columns(frame, replace(columns, time=time), told, known)
    refuse_parts(frame, columns)
    panel = _of_wide(frame, columns, wide, freq, known) if wide else _of_long(frame, columns, freq, known)
    panel.told[:0], panel.wide = told, bool(wide)
    return panel


def without_times(data) -> bool:
    """Whether the data is an array of numbers, or a list of those."""
    if isinstance(data, list | tuple | np.ndarray):
        return True
    if not hasattr(data, "__array__") or isinstance(data, require_pandas().Series):
        return False
    return not (hasattr(data, "columns") or hasattr(data, "column_names"))


def _framed(series, columns: Columns, known):
    """A Series over its times as a frame, and the columns in it: of one series of its name, or of a wide frame's."""
    name, wide = TARGET if series.name is None else str(series.name), known is not None and known.wide
    columns = _named(columns) if known is None else columns
    frame = series.rename(name if wide else columns.target).rename_axis(columns.time).reset_index()
    if columns.id and not wide:
        frame.insert(0, columns.id, name)
    return frame, columns


def _named(columns: Columns) -> Columns:
    """The columns with the usual names for id, time and target where none are given."""
    return replace(columns, id=columns.id or ID, time=columns.time or TIME, target=columns.target or TARGET)


def _of_arrays(data, columns: Columns, freq) -> Panel:
    """Each array a series, its times 0, 1, 2, ...; named 0, 1, 2, ..."""
    if covariates := (*columns.futr, *columns.hist, *columns.static):
        raise ValueError(f"the data is an array without columns, so there is no column {covariates[0]!r} (covariate)")
    data = data if isinstance(data, list | tuple) else _unmasked(data)
    nested = isinstance(data, np.ndarray) and data.ndim == 2
    if not nested:
        nested = not isinstance(data, np.ndarray) and len(data) and bool(np.ndim(data[0]))
    rows = list(data) if nested else [data]
    try:
        rows = [_unmasked(row) for row in rows]
        if any(row.dtype.kind in "cmMV" for row in rows):
            raise TypeError
        rows = [row.astype(np.float64) for row in rows]
    except (TypeError, ValueError):
        raise ValueError("the array holds something that is no number") from None
    bad = next((row for row in rows if row.ndim != 1 or not len(row)), None)
    if bad is not None or not rows:
        shape = "nothing" if bad is None else f"shape {bad.shape}"
        raise ValueError(f"a series of the arrays has {shape}, wanted (T,) with T at least 1")
    y, lengths = np.concatenate(rows), [len(row) for row in rows]
    refuse_infinite(y, TARGET)
    total, n = sum(lengths), len(rows)
    if freq is not None and (not isinstance(freq, Integral) or freq < 1):
        raise ValueError(f"freq is {freq!r}, wanted a whole number or None: arrays have no timestamps")
    return Panel(
        list(range(n)), y, np.concatenate([[0], np.cumsum(lengths)]), [0] * n, int(freq or 1),
        np.zeros((total, 0)), np.zeros((total, 0)), np.zeros((n, 0)), _named(columns),
    )  # fmt: skip


def _unmasked(values) -> np.ndarray:
    """An array of NumPy, out of a tensor too, wherever it is; what a mask hides is missing."""
    values = values.detach().cpu().double() if hasattr(values, "detach") else values
    return values.astype(object).filled(np.nan) if np.ma.isMA(values) else np.asarray(values)


def _of_wide(frame, columns: Columns, names: list, freq, known) -> Panel:
    """Every column of `names` a series on one clock, which is read once: from rows that are numbered in place of a target."""
    rows = frame[[columns.time, *columns.futr, *columns.hist]]
    if ours := {ID, TARGET} & set(rows.columns):
        raise ValueError(f"column {min(ours)!r} has a name that a table with a column a series keeps free; rename it")
    rows.insert(0, TARGET, np.arange(len(rows)))
    columns = replace(columns, id=ID, target=TARGET)
    clock = _of_long(rows, replace(columns, id=""), freq, known, names[0])
    steps, n, seen = len(clock.y), len(names), ~np.isnan(clock.y)
    at = clock.y[seen].astype(np.int64)
    y = np.full((n, steps), np.nan)
    for k, name in enumerate(names):
        y[k, seen] = numbers(frame, name)[at]
    more = {kind: np.tile(getattr(clock, kind), (n, 1)) for kind in ("futr", "hist", "static")}
    offsets = np.arange(n + 1) * steps
    return replace(
        clock, ids=list(names), y=y.reshape(-1), offsets=offsets, first=clock.first * n, columns=columns, **more
    )


def _of_long(frame, columns: Columns, freq, known, wide: str = "") -> Panel:
    pd = require_pandas()
    reading = {"dayfirst": frequency.day_first(frame[columns.time])} if known is None else known.reading
    times, zone = frequency.parse_times(frame[columns.time], columns.time, **reading)
    told = []
    codes, names = pd.factorize(_ids(frame, columns.id, told), sort=False)
    y = numbers(frame, columns.target)
    order, sorted_already = clock.order(codes, np.asarray(times))
    codes, times, y = codes[order], times[order], y[order]
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
    rows = np.diff(np.r_[starts, len(codes)])
    _refuse_twice(codes, times, names, columns.time, zone, wide)
    if not sorted_already:
        told.append("rows were not sorted by series and time, and were sorted")
    was, (times, zone, wall) = zone, _clock(frame[columns.time], times, zone, order, starts, known)
    if freq is None:
        freq = frequency.guess(times, starts)
        told.append(frequency.said(freq, times, " (whole days of the time zone)" if zone != was else ""))
        told += frequency.said_of_offsets(frame[columns.time]) if zone else []
    else:
        freq = frequency.checked(freq, times)
    place, off = clock.positions(times, starts, rows, freq)
    if len(off):
        raise ValueError(_mixed(off[0], codes, times, names, freq))
    steps = np.array([place[s + r - 1] + 1 for s, r in zip(starts, rows)], dtype=np.int64)
    if steps.sum() > 5 * len(y) + 5:
        hint = "the series begin and end at odd times, or the step between rows is another one"
        raise ValueError(f"only {len(y)} of {steps.sum()} steps of frequency {freq!r} have a row: {hint}")
    offsets = np.concatenate([[0], np.cumsum(steps)])
    target = np.repeat(offsets[:-1], rows) + place
    if gaps := int(steps.sum() - len(y)):
        told.append(f"{gaps} missing steps between the rows count as gaps")

    def spread(values):
        full = np.full((offsets[-1], *values.shape[1:]), np.nan)
        full[target] = values
        return full

    futr = spread(np.stack([numbers(frame, c)[order] for c in columns.futr], 1)) if columns.futr else None
    hist = spread(np.stack([numbers(frame, c)[order] for c in columns.hist], 1)) if columns.hist else None
    static, levels = _static(frame, columns, order, starts, known)
    none = np.zeros((offsets[-1], 0))
    firsts = [times[s] for s in starts] if not isinstance(times, np.ndarray) else [int(times[s]) for s in starts]
    return Panel(
        list(names), spread(y), offsets, firsts, freq, none if futr is None else futr, none if hist is None else hist,
        static, columns, zone, levels, told, wall=wall, dayfirst=reading["dayfirst"],
    )  # fmt: skip


def _ids(frame, name: str, told: list):
    """The id of every row, text without spaces around it; tells where there were some."""
    if not name:
        return require_pandas().Series([TARGET] * len(frame))
    ids = frame[name].reset_index(drop=True)
    if ids.isna().any():
        raise ValueError(f"column {name!r} has no id in row {int(np.flatnonzero(ids.isna())[0]) + 1}")
    if (plain := bare(ids)) is not ids:
        told.append(f"the ids of column {name!r} are read without the spaces around them")
    return plain


def _refuse_twice(codes, times, names, column: str, zone, wide: str):
    twice = np.flatnonzero((codes[1:] == codes[:-1]) & np.asarray(times[1:] == times[:-1]))
    if len(twice):
        alone = len(names) == 1 and names[0] == TARGET
        name = wide or names[codes[twice[0]]]
        series = "" if alone and not wide else f" of series {name!r}"
        keys = "a column tells" if alone or wide else "several columns joined in one tell"
        hint = f"if {keys} series apart, name it with --id (id_col)"
        if _autumn(times, twice[0]) and not zone:
            hint = "if clocks went back then, give times with their zone"
        raise ValueError(f"{times[twice[0]]} stands twice in column {column!r}{series}; {hint}")


def _autumn(times, row) -> bool:
    return not isinstance(times, np.ndarray) and times[row].month in (10, 11) and times[row].hour in (1, 2)


def _clock(column, times, zone, order, starts, known):
    """Sorted times as steps are counted in them, the zone they are shown in if that is UTC here, and the zone of whole days."""
    if zone is None:
        if known is not None and known.zone is not None:
            fitted = f"the model was fitted on times in {known.zone}"
            raise ValueError(f"the times of column {column.name!r} have no zone, {fitted}")
        return times, None, None
    if not _are_days(times, starts, known):
        return times, zone, None
    zone = known.wall if known is not None and known.wall is not None else zone
    read = None if known is None else known.dayfirst
    wall = frequency.wall_times(column, times[np.argsort(order)], zone, column.name, read)[order]
    return wall, None, zone if require_pandas().api.types.is_datetime64_any_dtype(column) else None


def _are_days(times, starts, known) -> bool:
    """Steps of a day and more are counted on the local clock, shorter ones in UTC: no step is 23 or 25 hours long."""
    if known is not None:
        return known.zone is None
    inside = np.ones(len(times), bool)
    inside[starts] = False
    steps = np.diff(times.as_unit("s").asi8)[inside[1:]]
    return bool(len(steps) and np.median(steps) >= 23 * 3600)


def _mixed(row, codes, times, names, freq) -> str:
    series = "" if len(names) == 1 else f" of series {names[codes[row]]!r}"
    return f"{times[row]}{series} is no step of frequency {freq!r}: the steps are mixed, or freq is another one"


def _value_each(whole, starts, name: str):
    """What a static column holds of every series, from its first row with a value; ValueError where it changes."""
    grouped = whole.groupby(np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(whole)])))
    if (grouped.nunique() > 1).any():
        raise ValueError(f"column {name!r} changes within a series, wanted one value a series of a static one")
    return grouped.first().infer_objects()


def _static(frame, columns: Columns, order, starts, known):
    """One row a series: numbers as they are, text as one column a value."""
    parts, levels = [np.zeros((len(starts), 0))], {}
    pd = require_pandas()
    for name in columns.static:
        present(list(frame.columns), name, "static")
        whole = frame[name].iloc[order].reset_index(drop=True)
        values = _value_each(whole, starts, name)
        counted = pd.api.types.is_numeric_dtype(values) if known is None else name not in known.levels
        if counted:
            parts.append(numbers(values.to_frame(), name)[:, None])
            continue
        seen = known.levels[name] if known is not None else sorted(values.dropna().astype(str).unique())
        if len(seen) > 100:
            raise ValueError(f"column {name!r} has {len(seen)} values, too many for a static one (at most 100)")
        parts.append((values.astype(str).to_numpy()[:, None] == np.array(seen)[None]).astype(np.float64))
        levels[name] = list(seen)
    return np.concatenate(parts, 1), levels
