"""Which columns of a frame mean what: those that are named are looked for, the others guessed, and what was guessed is said."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np

from exlstm.data import frequency
from exlstm.data.panel import TIME, Columns, require_pandas

ID_NAMES = ("unique_id", "id", "series_id", "item_id", "series", "item", "series_name", "store", "sku")
TIME_NAMES = ("ds", "date", "time", "timestamp", "datetime", "period")
# Parts of a time, which may as well stand beside one.
PART_NAMES = ("month", "day", "week", "year", "quarter", "hour")
MORE_PARTS = (*PART_NAMES, "time", "minute", "second")
# What says something of the time of a row and is hardly forecast.
_OF_TIME = (
    r"(?:is_?)?(?:day_?of_?(?:week|month|year)|week_?(?:day|end|of_?year)|dow|holiday|(?:school|state|public)_?holiday)"
)
TARGET_NAMES = ("y", "target", "value", "values")


def columns_of(frame, columns: Columns):
    """The frame with what its index holds of ids and times as columns, whose names are text and each there once."""
    frame = _without_index(frame, columns)
    frame = frame.set_axis([str(name).strip() for name in frame.columns], axis=1)
    if len(twice := frame.columns[frame.columns.duplicated()]):
        raise ValueError(f"column {twice[0]!r} stands twice in the data")
    return frame


def _without_index(frame, columns: Columns):
    pd = require_pandas()
    by_time = isinstance(frame.index, pd.DatetimeIndex | pd.PeriodIndex)
    if by_time and frame.index.name is None and columns.time and columns.time not in frame.columns:
        return frame.rename_axis(columns.time).reset_index()
    wanted = {columns.id, columns.time, *ID_NAMES, *TIME_NAMES, *PART_NAMES} - {""}
    named = [name for name in frame.index.names if name is not None]
    if len(named) > 1 or any(name in wanted or str(name).lower() in wanted for name in named):
        twice = [name for name in named if name in frame.columns]
        return frame.drop(columns=twice).reset_index() if len(named) == frame.index.nlevels else frame
    return frame


def with_time(frame, columns: Columns):
    """The frame with its time as a column, and the column's name."""
    pd = require_pandas()
    names = list(frame.columns)
    if columns.time:
        present(names, columns.time, "time")
        return frame, columns.time
    name = frame.index.name or TIME
    if isinstance(frame.index, pd.DatetimeIndex | pd.PeriodIndex) and name not in names:
        return frame.rename_axis(name).reset_index(), name
    named = [c for name in TIME_NAMES for c in names if c.lower() == name]
    told = (c for c in names if _holds_times(frame[c]))
    parts = (c for name in PART_NAMES for c in names if c.lower() == name)
    if name := next(itertools.chain(named, told, parts), None):
        return frame, name
    raise ValueError(f"no column looks like a time; the columns are {_some(names)}; name one with --time (time_col)")


def refuse_parts(frame, columns: Columns):
    """ValueError where a time stands in several columns, as date and hour, so that the one taken for it repeats."""
    keys = [columns.id, columns.time] if columns.id else [columns.time]
    parts = [c for c in frame.columns if c.lower() in MORE_PARTS and c not in (*keys, columns.target)]
    if not parts or not frame.duplicated(keys).any():
        return
    # A month wants its year though the rows of this table may do without.
    for more in (*([] if columns.time.lower() in MORE_PARTS else [[part] for part in parts]), parts):
        if not frame.duplicated([*keys, *more]).any():
            told = f"column {columns.time!r} alone does not tell the times apart, together with {_some(more)} it does"
            raise ValueError(f"{told}; join them into one column, as 2024-01-31 05:00 or 2024-01")


def _holds_times(column) -> bool:
    """Whether a column is of times, or of text that reads as such."""
    pd = require_pandas()
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column):
        return False
    try:
        frequency.parse_times(column.head(50), str(column.name))
    except (ValueError, TypeError):
        return False
    return True


def present(names, name: str, what: str):
    import difflib

    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else f"; the columns are {_some(names)}"
        raise ValueError(f"there is no column {name!r} ({what}){hint}")


def _some(names) -> str:
    names = [repr(n) for n in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def guess_columns(frame, columns: Columns, told: list, known):
    """Columns with id and target named, and the value columns of a wide frame (or nothing)."""
    pd = require_pandas()
    names = list(frame.columns)
    covariates = (*columns.futr, *columns.hist, *columns.static)
    named = [name for name in (columns.id, columns.time, columns.target) if name]
    if twice := [name for n, name in enumerate(named) if name in named[:n]]:
        raise ValueError(f"column {twice[0]!r} is asked for twice among id, time and target")
    if twice := [name for n, name in enumerate(covariates) if name in covariates[:n]]:
        raise ValueError(f"column {twice[0]!r} is asked for twice as a covariate")
    for name in covariates:
        if name in named:
            raise ValueError(f"column {name!r} is asked for twice, as a covariate and as id, time or target")
        if not known or name in columns.futr or name in columns.hist:
            present(names, name, "covariate")
    rest = [c for c in names if c not in (columns.time, *covariates)]
    if known is not None and known.wide:
        if not (fitted := set(known.ids) & set(rest)):
            raise ValueError(f"the data lacks the column {known.ids[0]!r} that the model was fitted on")
        return columns, [c for c in rest if c in {*fitted, *_of_numbers(frame, rest, told)}]
    if columns.id:
        present(names, columns.id, "id")
    else:
        free = [c for c in rest if c != columns.target]
        found = [c for n in ID_NAMES for c in free if c.lower() == n]
        found += [c for c in free if not pd.api.types.is_numeric_dtype(frame[c]) and _repeats(frame, c, columns.time)]
        if found:
            told.append(f"series are told apart by column {found[0]!r}")
        columns = replace(columns, id=found[0] if found else "")
    values = [c for c in rest if c != columns.id]
    if columns.target:
        present(names, columns.target, "target")
        return columns, []
    named = [c for n in TARGET_NAMES for c in values if c.lower() == n]
    numeric = _of_numbers(frame, [] if named else values, told)
    if not named and not numeric and len(values) == 1:
        named = values
    if not named and not numeric:
        raise ValueError(
            f"no column of numbers is left to forecast; the columns are {_some(names)}; name one with --target (target_col)"
        )
    if named or len(numeric) == 1:
        target = (named or numeric)[0]
        told.append(f"forecasts column {target!r} over {columns.time!r}")
        return replace(columns, target=target), []
    if columns.id:
        raise ValueError(f"{_some(numeric)} could all be forecast; name one with --target (target_col)")
    told.append(f"every column of numbers is a series: {_some(numeric)}{_hint(frame, numeric)}")
    return columns, numeric


def _hint(frame, names: list) -> str:
    """What to do if columns that look as if they helped others do that; "" where there are none, or no others."""
    helps = [c for c in names if c.lower() in PART_NAMES or re.fullmatch(_OF_TIME, c.lower()) or frame[c].nunique() < 3]
    if not 0 < len(helps) < len(names):
        return ""
    verb = "only helps, name it" if len(helps) == 1 else "only help, name them"
    return f"; if {_some(helps)} {verb} with --exog (futr_exog), and what is forecast with --target (target_col)"


def _repeats(frame, column: str, time: str) -> bool:
    """Whether times come again between the values of this column, as those of an id do."""
    try:
        return bool(frame[time].duplicated().any()) and not frame.duplicated([column, time]).any()
    except TypeError:
        # Lists and the like tell nothing apart.
        return False


def _of_numbers(frame, names: list, told: list) -> list:
    """Of the columns with these names those that hold numbers, a counter of the rows apart; tells which do not."""
    types = require_pandas().api.types
    numeric = [c for c in names if types.is_numeric_dtype(frame[c]) and not types.is_bool_dtype(frame[c])]
    if numeric and (others := [c for c in names if c not in numeric]):
        told.append(f"left out, as not all that they hold are numbers: {_some(others)}")
    if counters := [c for c in numeric if len(numeric) > 1 and _counts_rows(frame[c])]:
        told.append(f"column {counters[0]!r} counts the rows and is left out")
    return [c for c in numeric if c not in counters]


def _counts_rows(column) -> bool:
    """Whether a column without a name holds 0, 1, 2, ...: the index of the frame that was written."""
    unnamed = re.fullmatch(r"(?:Unnamed: \d+)?", column.name)
    return bool(unnamed) and column.dtype.kind in "iu" and bool((column == np.arange(len(column))).all())
