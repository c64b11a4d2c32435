"""The .tsf files of the Monash archive as panels: a header, then a line a series with its begin and its values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exlstm.data import frequency
from exlstm.data.panel import ID, TARGET, TIME, Columns, Panel, refuse_infinite, require_pandas

# The frequencies of the Monash archive as pandas writes them.
TSF_FREQUENCIES = {
    "yearly": "YS", "quarterly": "QS", "monthly": "MS", "weekly": "7D", "daily": "D", "hourly": "h", "half_hourly": "30min",
    "10_minutes": "10min", "15_minutes": "15min", "minutely": "min", "4_seconds": "4s",
}  # fmt: skip
# Steps of a calendar, in months.
MONTHS = {"MS": 1, "QS": 3, "YS": 12}
# The last year that nanoseconds reach as a whole.
LAST = 2261


def read_tsf(path: Path) -> tuple[Panel, dict]:
    """The panel of a .tsf file, and what its header says: frequency (an alias), horizon if there is one.

    Without begins or a frequency, and where a series would outlast the years that pandas knows, times are whole numbers.
    """
    header, attributes, told, values = {}, [], [], []
    try:
        with open(path, encoding="cp1252", errors="replace") as lines:
            inside = False
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                if inside:
                    names, y = _series(line, attributes, path, number)
                    told.append({"series_name": f"T{number}", **names})
                    values.append(y)
                elif line.lower() == "@data":
                    inside = True
                elif line.startswith("@attribute"):
                    attributes.append(line.split()[1])
                elif line.startswith("@"):
                    header[line.split()[0][1:]] = line.split(maxsplit=1)[-1].strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    if not values:
        raise ValueError(f"{path} holds no @data with a series: not a .tsf file")
    freq = TSF_FREQUENCIES.get(header.get("frequency", ""))
    horizon = int(header["horizon"]) if header.get("horizon", "").isdigit() else None
    return _panel(path, told, values, freq), {"freq": freq, "horizon": horizon}


def _series(line: str, attributes: list, path: Path, number: int) -> tuple[dict, np.ndarray]:
    fields = line.split(":")
    if len(fields) != len(attributes) + 1:
        raise ValueError(f"{path} has {len(fields)} fields in line {number}, wanted {len(attributes) + 1}")
    try:
        y = np.array([float(v) for v in fields[-1].replace("?", "nan").split(",")])
    except ValueError:
        raise ValueError(f"{path} holds a value in line {number} that is no number") from None
    return dict(zip(attributes, fields)), y


def _panel(path: Path, told: list[dict], values: list, freq: str | None) -> Panel:
    names = [series["series_name"] for series in told]
    if twice := len(names) - len(set(names)):
        raise ValueError(f"{path} holds {twice} series of a name that another one has")
    lengths, begins = np.array([len(y) for y in values]), [series.get("start_timestamp") for series in told]
    first, clock = [0] * len(names), 1
    if freq is not None and None not in begins:
        first, clock = _clock(begins, lengths, freq) or (first, clock)
    y, n = np.concatenate(values), len(names)
    refuse_infinite(y, TARGET)
    none, columns = np.zeros((len(y), 0)), Columns(ID, TIME, TARGET)
    return Panel(names, y, np.r_[0, lengths.cumsum()], first, clock, none, none, np.zeros((n, 0)), columns)


def _clock(begins: list[str], lengths: np.ndarray, freq: str):
    """The first times of all series and their frequency; None where a series outlasts the calendar."""
    pd = require_pandas()
    times = pd.DatetimeIndex(pd.to_datetime(pd.Series(begins), format="%Y-%m-%d %H-%M-%S"))
    step = MONTHS.get(freq)
    if step is None:
        seconds = pd.Timedelta(pd.tseries.frequencies.to_offset(freq)).total_seconds()
        years = 1 + times.year + lengths * seconds / (365.25 * 86400)
    else:
        # The archive's days within months carry nothing. Quarters and years of one file that begin in unlike months are
        # those of the calendar.
        month = times.to_numpy().astype("datetime64[M]").astype(np.int64)  # since January 1970
        phase = month % step
        phase = phase[0] if len(set(phase.tolist())) == 1 else 0
        month = month - (month - phase) % step
        years = 1971 + (month + lengths * step) / 12
        times = pd.DatetimeIndex(month.astype("datetime64[M]").astype("datetime64[s]"))
        freq = freq if step == 1 else f"{freq}-{frequency.MONTHS[phase]}"
    return None if years.max() > LAST else (list(times), freq)
