"""The clock of a series: read its times, guess their step, and what the calendar says of a time (steps are counted in clock.py).

A frequency is a pandas offset alias ("h", "15min", "D", "B", "W-SUN", "MS", "ME", "QS", "YE"), or a whole number for
times that are whole numbers. pandas is loaded on first use.
"""

from __future__ import annotations

import warnings
from numbers import Integral

import numpy as np

from exlstm.data import clock

# Seasons in steps, the first one is the season of the naive forecast; by the seconds of a step, or by a calendar step.
_DAY = 86400
_CALENDAR = {
    **dict.fromkeys(("B", "C"), (5,)),
    **dict.fromkeys(("MS", "ME", "BMS", "BME", "CBMS", "CBME", "WOM", "LWOM"), (12,)),
    **dict.fromkeys(("SMS", "SME"), (24,)),
    **dict.fromkeys(("QS", "QE", "BQS", "BQE"), (4,)),
}
_MONTHLY = {1: ("MS", "ME"), 3: ("QS", "QE"), 12: ("YS", "YE")}
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_WEEKDAYS = ["MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"]
_OFFSET = r"\s*(?:[+-]\d\d:?\d\d|Z)$"
# Day or month first: only the whole column tells.
_NUMERALS = r"\s*\d{1,2}([./-])\d{1,2}\1\d{2,4}(?:\D.*)?$"
# pandas would take the year 1.
_MONTH_YEAR = r"\s*[A-Za-z]{3,9}\.?[-/ ']{1,2}\d\d\s*"
# pandas would take today's date.
_NO_DATE = r"\s*\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?\s*(?:[AaPp][Mm])?\s*$"


def parse_times(values, column: str, dates: bool = True, dayfirst: bool | None = None):
    """A column of timestamps as a DatetimeIndex (time zones: in UTC), or as int64 where the times are whole numbers.

    Returns (times, zone); ValueError names the first value that is no time. With `dates` whole numbers as 20240131 and 202401
    are such; `dayfirst` says how 01/02/2024 is read, None: as the column tells.
    """
    import pandas as pd

    series = pd.Series(values)
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    series = series.infer_objects()
    if isinstance(series.dtype, pd.ArrowDtype) and pd.api.types.is_datetime64_any_dtype(series):
        series = pd.Series(pd.DatetimeIndex(series))
    if pd.api.types.is_bool_dtype(series) or pd.api.types.is_float_dtype(series):
        whole = series.notna().all() and not pd.api.types.is_bool_dtype(series) and (series % 1 == 0).all()
        if not whole:
            raise ValueError(f"column {column!r} holds {series.dtype} values, wanted timestamps or whole numbers")
        series = series.astype("int64")
    if series.isna().any():
        row = int(np.flatnonzero(series.isna())[0])
        raise ValueError(f"column {column!r} has no time in row {row + 1}")
    if pd.api.types.is_integer_dtype(series):
        whole = series.to_numpy(np.int64)
        read = _dates_of(whole) if dates else None
        return (whole if read is None else read), None
    if isinstance(series.dtype, pd.PeriodDtype):
        series = series.dt.to_timestamp()
    if isinstance(series.dtype, pd.DatetimeTZDtype):
        return pd.DatetimeIndex(series.dt.tz_convert("UTC").dt.tz_localize(None)), _zone(series, column)
    if not pd.api.types.is_datetime64_any_dtype(series):
        series = _from_text(series, column, dayfirst)
        if isinstance(series.dtype, pd.DatetimeTZDtype):
            return pd.DatetimeIndex(series.dt.tz_localize(None)), "UTC"
    times = pd.DatetimeIndex(series)
    try:
        times.as_unit("ns")
    except pd.errors.OutOfBoundsDatetime:
        wanted = "wanted years from 1678 to 2261, or whole numbers"
        raise ValueError(f"column {column!r} holds times from {times.min()} to {times.max()}, {wanted}") from None
    return times, None


def _zone(series, column: str) -> str:
    """The name of the zone that times stand in; ValueError where nothing finds it again by its name."""
    import pandas as pd

    name = str(series.dt.tz)
    try:
        pd.Timestamp(0, tz=name)
    except (KeyError, ValueError):
        wanted = "wanted one with a name, as 'Europe/Berlin' or 'UTC+02:00'"
        raise ValueError(f"the times of column {column!r} are in the zone {name}, {wanted}") from None
    return name


def day_first(values) -> bool | None:
    """Whether 01/02/2024 is the first of February in this column of text; None where no time is written so."""
    import pandas as pd

    series = pd.Series(pd.Series(values).unique())
    text = series.astype(str)
    # The year of 01-02-2024 is no offset.
    text = text.mask(text.str.contains(":"), text.str.replace(_OFFSET, "", regex=True))
    if pd.api.types.is_numeric_dtype(series) or not text.str.match(_NUMERALS).all():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = min((pd.to_datetime(text, errors="coerce", dayfirst=first) for first in (False, True)), key=_unevenness)
    # pandas takes its argument for a hint, so that what it read has to say.
    return bool((times.dt.day == text.str.extract(r"(\d+)")[0].astype(int)).all())


def wall_times(values, times, zone: str, column: str, dayfirst: bool | None = None):
    """`times` (of `parse_times`, in UTC) as clocks on the wall showed them: in their zone, text without its offset."""
    import pandas as pd

    series = pd.Series(values)
    if isinstance(series.dtype, pd.DatetimeTZDtype):
        return times.tz_localize("UTC").tz_convert(zone).tz_localize(None)
    text = series.astype(str).str.replace(_OFFSET, "", regex=True)
    return pd.DatetimeIndex(_from_text(text, column, dayfirst))


def _dates_of(numbers: np.ndarray):
    """Whole numbers as dates where all of them are written so: 20240131, or 202401."""
    import pandas as pd

    low, high = (int(end) for end in (numbers.min(), numbers.max())) if len(numbers) else (0, 0)
    for form, ends in (("%Y%m%d", (19000101, 21001231)), ("%Y%m", (190001, 210012))):
        if ends[0] <= low <= high <= ends[1]:
            dates = pd.to_datetime(pd.Series(numbers).astype(str), format=form, errors="coerce")
            return None if dates.isna().any() else pd.DatetimeIndex(dates)
    return None


def said(freq, times, more: str) -> str:
    """A guessed frequency in words; whole numbers that may be dates have neither season nor calendar, which is said, too."""
    told, what = f"frequency {freq!r}{more}", None
    if isinstance(times, np.ndarray):
        low, high = int(times.min()), int(times.max())
        kinds = {"a spreadsheet's days": (25e3, 75e3), "seconds since 1970": (3e8, 42e8)}
        kinds["milliseconds since 1970"] = (3e11, 42e11)
        what = next((kind for kind, (least, most) in kinds.items() if least <= low and high <= most), None)
    hint = f"; if the times are {what}, write them as dates, which have seasons, or give one with --season (season)"
    return told + hint if what else told


def said_of_offsets(column) -> list[str]:
    """A sentence on text with offsets of other clocks than UTC's, in which its times are counted and forecast."""
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(column) or isinstance(column.dtype, pd.CategoricalDtype):
        return []
    ends = column.astype(str).str.extract(rf"({_OFFSET[:-1]})$")[0].str.strip()
    found = sorted(set(ends.dropna()) - {"Z", "+00:00", "+0000", "-00:00", "-0000"})
    few = f"{found[0]} and others" if len(set(ends)) > 1 else "".join(found)
    told = f"the times of column {column.name!r} have the offset {few} and no zone, and are counted and forecast in UTC"
    return [told] if found else []


def _from_text(series, column: str, dayfirst: bool | None):
    """Text as times; what stands in many rows, as the times of many series do, is read once."""
    import pandas as pd

    codes, values = pd.factorize(series)
    if 2 * len(values) <= len(series):
        try:
            return _read_text(pd.Series(values), column, dayfirst).take(codes).reset_index(drop=True)
        except ValueError:
            # In which row, the whole column says.
            pass
    return _read_text(series, column, dayfirst)


def _read_text(series, column: str, dayfirst: bool | None):
    import pandas as pd

    text = series.astype(str)
    if text.str.fullmatch(_MONTH_YEAR).all():
        return _months_of(text, column)
    zoned = text.str.contains(_OFFSET, regex=True) & text.str.contains(":")
    if zoned.any() and not zoned.all():
        row = int(np.flatnonzero(~zoned)[0])
        raise ValueError(f"column {column!r} mixes times with and without a zone, row {row + 1} is {text.iloc[row]!r}")
    if text.str.match(_NO_DATE).all():
        raise ValueError(f"column {column!r} holds {series.iloc[0]!r} in row 1, which is a time without its day")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"errors": "coerce", "utc": bool(zoned.any())}
        told = day_first(text) if dayfirst is None else dayfirst
        times = pd.to_datetime(series, **options, dayfirst=bool(told))
        if times.isna().any() and dayfirst is not None:
            times = pd.to_datetime(series, **options, dayfirst=bool(day_first(text)))
        if told is None and times.isna().any():
            times = pd.to_datetime(series, **options, format="mixed")
    if times.isna().any():
        row = int(np.flatnonzero(times.isna())[0])
        raise ValueError(f"column {column!r} holds {series.iloc[row]!r} in row {row + 1}, which is no time")
    return times


def _months_of(text, column: str):
    """Jan-12 as a spreadsheet writes January 2012; ValueError where it is far more evenly the twelfth of January."""
    import pandas as pd

    plain = text.str.strip().str.replace(r"\W+", "-", regex=True)
    months, days = (
        pd.to_datetime(plain + year, format=f"%b-{form}", errors="coerce").fillna(
            pd.to_datetime(plain + year, format=f"%B-{form}", errors="coerce")
        )
        for year, form in (("", "%y"), ("-2001", "%d-%Y"))
    )
    if months.isna().any():
        row = int(np.flatnonzero(months.isna())[0])
        raise ValueError(f"column {column!r} holds {text.iloc[row]!r} in row {row + 1}, which is no time")
    (lost, by_day), (_, by_month) = _unevenness(days), _unevenness(months)
    if not lost and by_day < by_month / 2:
        raise ValueError(f"column {column!r} holds {text.iloc[0]!r} in row 1, which is a day without its year")
    return months


def _unevenness(times) -> tuple[int, float]:
    """How many of the times are none, and how unlike their steps are: what is right is rarely the less even one."""
    steps = np.diff(np.unique(times.dropna().astype("int64"))).astype(np.float64)
    return int(times.isna().sum()), float(steps.std() / steps.mean()) if len(steps) else 0.0


def guess(times, starts: np.ndarray):
    """The frequency of sorted `times`, whose series begin at rows `starts`; ValueError when there is none."""
    first = np.zeros(len(times), bool)
    first[starts] = True
    steps = np.diff(times if isinstance(times, np.ndarray) else times.as_unit("ns").asi8)[~first[1:]]
    if not len(steps):
        raise ValueError("every series has a single row, so its frequency cannot be told; give it, as in freq='D'")
    values, counts = np.unique(steps, return_counts=True)
    usual = int(values[counts.argmax()])
    if isinstance(times, np.ndarray):
        return usual
    day = _DAY * 10**9
    if usual >= 28 * day:
        by_month = len(np.unique(times.day)) == 1 or bool(times.is_month_end.all())
        if not (steps % usual).any() and not usual % day and not by_month:
            return f"{usual // day}D"
        return _guess_months(times, round(float(np.median(steps)) / (30.44 * day)))
    if usual == 7 * day:
        weekdays = np.unique(times.day_of_week)
        midnight = bool((times.normalize() == times).all())
        return f"W-{_WEEKDAYS[weekdays[0]]}" if len(weekdays) == 1 and midnight else "7D"
    if usual == day:
        working = bool((times.day_of_week < 5).all()) and len(times) > 5 and 3 * day in values
        return "B" if working else "D"
    return _alias_of(usual)


def _alias_of(nanoseconds: int) -> str:
    """The alias of a step of fixed length."""
    units = {"D": _DAY * 10**9, "h": 3600 * 10**9, "min": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
    name, unit = next((name, unit) for name, unit in units.items() if nanoseconds % unit == 0)
    return f"{nanoseconds // unit}{name}" if nanoseconds > unit else name


def _guess_months(times, months: int):
    """The alias of a step of `months` months, by the days the times fall on."""
    import pandas as pd

    # Half a year is two quarters.
    unit = max(m for m in _MONTHLY if months % m == 0)
    start, end = _MONTHLY[unit]
    many = str(months // unit) if months > unit else ""
    month = int(times.month[0])
    # Quarters that fall on the same months have one name.
    first, last = (month, month) if unit == 12 else ((month - 1) % 3 + 1, (month - 1) % 3 + 10)
    at_start, at_end = bool((times.day == 1).all()), bool(times.is_month_end.all())
    name, month = (end, last) if at_end and not at_start else (start, first)
    if not at_start and not at_end:
        # Working days: the first or the last of the month.
        days = times.normalize()
        if (days + pd.offsets.BMonthEnd(0) == days).all():
            name, month = "B" + end, last
        elif (days + pd.offsets.BMonthBegin(0) == days).all():
            name, month = "B" + start, first
    if name in (start, end) and not at_start and not at_end and len(np.unique(times.day)) == 1:
        told = "wanted months by their first or last day, or by name, as 2024-01"
        raise ValueError(f"the times are months apart and all on day {times.day[0]} of one, {told}")
    return many + (name if unit == 1 else f"{name}-{MONTHS[month - 1]}")


def checked(freq, times):
    """A frequency given by the user (an alias, an offset or a Timedelta of pandas) as an alias; old names as 'M' and 'H' are
    taken as the new ones."""
    import datetime

    import pandas as pd
    from pandas.tseries.frequencies import to_offset

    if isinstance(times, np.ndarray):
        if isinstance(freq, str) and freq.isdigit():
            freq = int(freq)
        if not isinstance(freq, Integral) or isinstance(freq, bool) or freq < 1:
            raise ValueError(f"freq is {freq!r}, wanted a whole number: the times are whole numbers")
        return int(freq)
    if isinstance(freq, datetime.timedelta) and freq > datetime.timedelta(0):
        freq = _alias_of(pd.Timedelta(freq).as_unit("ns").value)
    elif isinstance(freq, pd.offsets.BaseOffset):
        freq = freq.freqstr
    old = {"M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "H": "h", "T": "min", "S": "s"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            name = freq.strip()
            offset = to_offset(old.get(name, name))
        except (ValueError, AttributeError):
            offset = None
        if offset is None or offset.n < 1:
            raise ValueError(f"freq is {freq!r}, wanted a pandas alias as 'h', '15min', 'D', 'W-SUN', 'MS' or 'ME'")
    return offset.freqstr


def seasons(freq) -> tuple[int, ...]:
    """Lengths in steps of the seasons that data of this frequency usually has, shortest first; (1,) for none."""
    if isinstance(freq, int):
        return (1,)
    tick = clock.tick(freq)
    if tick is None:
        from pandas.tseries.frequencies import to_offset

        base = to_offset(freq)
        lengths = _CALENDAR.get(base.freqstr.split("-")[0].lstrip("0123456789"), (1,))
        return tuple(max(1, length // base.n) for length in lengths)
    seconds = tick / 1e9
    if seconds >= 7 * _DAY:
        return (max(1, round(365.25 * _DAY / seconds)),) if seconds == 7 * _DAY else (1,)
    if seconds >= _DAY:
        return (7,) if seconds == _DAY else (1,)
    found = [n for n in (3600, _DAY, 7 * _DAY) if n % seconds == 0 and n > seconds]
    # Within the hour nothing repeats, unless the step is so short that a day is out of reach.
    found = [n for n in found if n > 3600 or seconds < 60]
    return tuple(int(n // seconds) for n in found) or (1,)


def years(first, freq, steps: int) -> float:
    """How long `steps` steps from `first` on are, in years; 0 for whole numbers."""
    if isinstance(freq, int):
        return 0.0
    return (clock.span(first, freq, steps)[-1] - first).total_seconds() / (365.25 * _DAY)


def calendar(times, freq, year: bool = True) -> tuple[np.ndarray, list[str]]:
    """What the calendar says of the times: (T, C) in -1 to 1, and the names; nothing for whole numbers.

    Sine and cosine of the place in the day, the week and (with `year`) the year, each where the step is shorter than it.
    """
    if isinstance(times, np.ndarray):
        return np.zeros((len(times), 0), np.float32), []
    tick = clock.tick(freq)
    seconds = tick / 1e9 if tick else (_DAY if str(freq).split("-")[0] in ("B", "C") else 28 * _DAY)
    day = (times.hour * 3600 + times.minute * 60 + times.second) / _DAY
    columns, names = [], []

    def wave(name, phase, harmonics):
        for k in range(1, harmonics + 1):
            turned = 2 * np.pi * k * np.asarray(phase)
            columns.extend((np.sin(turned).astype(np.float32), np.cos(turned).astype(np.float32)))
            names.extend((f"{name} sin {k}", f"{name} cos {k}"))

    if seconds < _DAY:
        wave("day", day, 4)
    if seconds < 7 * _DAY:
        week = times.day_of_week.to_numpy() + (day if seconds < _DAY else 0)
        wave("week", np.asarray(week) / 7, 3)
    if seconds < 360 * _DAY and year:
        wave("year", (times.day_of_year - 1 + (day if seconds < _DAY else 0)) / 365.25, 6 if seconds <= _DAY else 2)
    if not columns:
        return np.zeros((len(times), 0), np.float32), []
    return np.stack(columns, 1), names
