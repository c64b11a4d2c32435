"""A panel: many series one after the other on regular clocks, with their covariates. pandas is loaded on first use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from exlstm.data import clock

ID, TIME, TARGET = "unique_id", "ds", "y"


@dataclass(frozen=True)
class Columns:
    """Which columns of a frame mean what; empty names are guessed."""

    id: str = ""
    time: str = ""
    target: str = ""
    futr: tuple[str, ...] = ()
    """covariates known for the future"""
    hist: tuple[str, ...] = ()
    """covariates known for the past only"""
    static: tuple[str, ...] = ()
    """one value a series"""


@dataclass
class Panel:
    """N series, R rows in all; row r of series n stands at step r - offsets[n] of its clock, gaps are NaN."""

    ids: list
    y: np.ndarray  # (R,) float64, NaN where missing
    offsets: np.ndarray  # (N + 1,)
    first: list  # the first time of every series
    freq: str | int
    futr: np.ndarray  # (R, F)
    hist: np.ndarray  # (R, P)
    static: np.ndarray  # (N, S)
    columns: Columns
    zone: str | None = None
    levels: dict = field(default_factory=dict)  # static column of text -> its values
    told: list = field(default_factory=list)  # what was guessed, a sentence each
    wide: bool = False
    wall: str | None = None  # the zone whose days these are, where steps are whole days of one
    dayfirst: bool | None = None  # whether 01/02/2024 is in February, where times are written so
    ahead: np.ndarray | None = None  # (N, H, F): covariates of the next steps, where the data held them

    def __len__(self):
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def lacking(self) -> np.ndarray:
        """(N,): how many rows stand behind the last target of every series; all of them where it has none."""
        last = np.maximum.reduceat(np.where(np.isnan(self.y), -1, np.arange(len(self.y))), self.offsets[:-1])
        return self.offsets[1:] - 1 - np.maximum(last, self.offsets[:-1] - 1)

    @property
    def reading(self) -> dict:
        """How `frequency.parse_times` reads more times of this panel."""
        return {"dates": not isinstance(self.freq, int), "dayfirst": self.dayfirst}

    def times(self, n: int, start: int, stop: int):
        """Times of the steps start to stop of series n, in UTC where there is a zone; steps after the end are fine."""
        return clock.between(self.first[n], self.freq, start, stop)

    def cut(self, drop) -> Panel:
        """The panel without the last `drop` rows of every series (a number, or one a series); empty series go."""
        ends = self.offsets[1:] - drop
        keep = np.flatnonzero(ends > self.offsets[:-1])
        if not len(keep):
            raise ValueError(f"no series has more than {np.max(drop)} rows, so nothing is left to learn from")
        rows = np.zeros(len(self.y), bool)
        for n in keep:
            rows[self.offsets[n] : ends[n]] = True
        lengths = ends[keep] - self.offsets[keep]
        return replace(
            self,
            ids=[self.ids[n] for n in keep],
            y=self.y[rows],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            first=[self.first[n] for n in keep],
            futr=self.futr[rows],
            hist=self.hist[rows],
            static=self.static[keep],
            ahead=None,
        )

    def begun(self) -> Panel:
        """The panel without the gaps before the first value of every series; series without a value stay."""
        if not np.isnan(self.y[self.offsets[:-1]]).any():
            return self
        seen, number = ~np.isnan(self.y), np.repeat(np.arange(len(self)), self.lengths)
        place = np.arange(len(self.y)) - self.offsets[number]
        lead = np.full(len(self), len(self.y))
        np.minimum.at(lead, number[seen], place[seen])
        lead = np.where(lead < self.lengths, lead, 0)
        if not lead.any():
            return self
        rows = place >= lead[number]
        firsts = [self.times(n, int(k), int(k) + 1)[0] if k else self.first[n] for n, k in enumerate(lead)]
        return replace(
            self,
            y=self.y[rows],
            offsets=np.concatenate([[0], np.cumsum(self.lengths - lead)]),
            first=[int(first) for first in firsts] if isinstance(self.freq, int) else firsts,
            futr=self.futr[rows],
            hist=self.hist[rows],
        )


def require_pandas():
    """pandas, or a ValueError in one sentence when the extra is not installed."""
    try:
        import pandas
    except ImportError:
        raise ValueError("forecasting needs pandas, install it with: pip install 'exlstm[forecast]'") from None
    return pandas


def to_pandas(data, wanted: str = "a pandas or polars frame"):
    """A pandas frame out of pandas, or of anything that narwhals knows (polars, pyarrow, ...)."""
    pd = require_pandas()
    if isinstance(data, pd.DataFrame):
        return data
    try:
        import narwhals as nw

        frame = nw.from_native(data)
        frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
    except (ImportError, TypeError):
        kind = type(data).__name__
        raise TypeError(f"the data is {kind}, wanted {wanted}") from None
    try:
        return frame.to_pandas()
    except ImportError:
        # polars goes through pyarrow, which is not always there.
        return pd.DataFrame({c: frame[c].to_list() for c in frame.columns})


def bare(ids):
    """A column of ids as they are told apart: text without spaces around it, as the names of columns are."""
    if getattr(ids.dtype, "kind", "O") in "iufbmM":
        return ids
    names = ids.unique()
    plain = [name.strip() if isinstance(name, str) else name for name in names]
    return ids if all(a is b or a == b for a, b in zip(plain, names)) else ids.map(dict(zip(names, plain)))


def numbers(frame, column: str) -> np.ndarray:
    """A column as float64; the first text that is no number, or an infinity, is a ValueError."""
    pd = require_pandas()
    values = frame[column]
    kind = getattr(values.dtype, "kind", "O")
    if kind in "mMc" or isinstance(values.dtype, pd.CategoricalDtype | pd.DatetimeTZDtype):
        raise ValueError(f"column {column!r} holds {values.dtype}, wanted numbers")
    if not pd.api.types.is_numeric_dtype(values):
        try:
            coerced = pd.to_numeric(values, errors="coerce")
        except OverflowError:
            raise ValueError(
                f"column {column!r} holds a whole number of more than 1e308, wanted less than 1e30"
            ) from None
        text = values.astype(str).str.strip().str.lower()
        numeral = coerced.notna() & (coerced.dtype.kind != "c")
        bad = np.flatnonzero(~numeral & values.notna() & ~text.isin(("", "nan", "na", "null", "none", "?")))
        if len(bad):
            raise ValueError(f"column {column!r} holds {values.iloc[bad[0]]!r} in row {bad[0] + 1}, wanted a number")
        values = coerced
    values = values.to_numpy(dtype=np.float64, na_value=np.nan)
    refuse_infinite(values, column)
    return values


def refuse_infinite(values, column: str):
    if np.fmax.reduce(values, initial=0.0) <= 1e30 and np.fmin.reduce(values, initial=0.0) >= -1e30:
        return
    if (bad := np.flatnonzero(np.isinf(values))).size:
        raise ValueError(f"column {column!r} holds an infinity in row {bad[0] + 1}, wanted a number or nothing")
    if (bad := np.flatnonzero(np.abs(values) > 1e30)).size:
        raise ValueError(f"column {column!r} holds {values[bad[0]]:g} in row {bad[0] + 1}, more than 1e30")
