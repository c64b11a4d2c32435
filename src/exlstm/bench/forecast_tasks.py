"""The tasks of the public forecasting benchmarks, each by its own protocol; only the split depends on which data it is.

long    (Informer, arXiv 2012.07436): the ETT files 12/4/4 months, others 70/10/20 %; every column a series, in deviations of its
        training part; all windows of the test part at stride 1, the look-back reaching into the part before.
prices  (TimeXer, arXiv 2402.19072): 70/10/20 %, 24 hours of the last column; the others are day-ahead forecasts.
archive (Monash, GIFT-Eval arXiv 2410.10393): the last windows of every series, one behind the other, a tenth of the shortest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlstm.data import frequency
from exlstm.data.panel import Columns, Panel
from exlstm.data.series import panel_of
from exlstm.forecast.tables import read_table
from exlstm.forecast.tsf import read_tsf

# Steps of a month of thirty days, which ETT files count in.
ETT_MONTHS = (12, 16, 20)
ARCHIVE_HORIZONS = {"YS": 6, "QS": 8, "MS": 12, "W": 8, "7D": 8, "D": 30, "h": 48, "min": 48, "s": 60}
# The seasons that GluonTS counts MASE in.
ARCHIVE_SEASONS = {"MS": 12, "QS": 4, "YS": 1, "W": 1, "7D": 1, "D": 1, "h": 24}


@dataclass(frozen=True)
class Task:
    """One forecast to be judged: fit on the first `seen` steps, test windows cut at `cuts`."""

    name: str
    protocol: str
    panel: Panel
    horizon: int
    seen: np.ndarray  # (N,) steps of training and validation part
    cuts: list[np.ndarray]  # by series
    season: int
    mase_season: int
    val_size: int = 0
    metric: str = "mae"
    refit: bool = True

    @property
    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """(series, cuts) of all test windows."""
        series = np.repeat(np.arange(len(self.cuts)), [len(c) for c in self.cuts])
        return series, np.concatenate(self.cuts)

    def told(self) -> str:
        """What is to be forecast, in a line."""
        count = f"{len(self.panel):,} series, {len(self.panel.y):,} steps of {self.panel.freq}, season {self.season}"
        return (
            f"{self.name} ({self.protocol}): {count}, horizon {self.horizon}, {sum(map(len, self.cuts)):,} test windows"
        )

    @property
    def learnt(self) -> Panel:
        """The panel up to the test part."""
        return self.panel.cut(self.panel.lengths - self.seen)


def tasks_of(path: Path, config) -> list[Task]:
    """The tasks that a file holds."""
    kind = config.protocol
    if kind == "auto":
        kind = "archive" if path.suffix == ".tsf" else _kind(path)
    return {"long": _long, "prices": _prices, "archive": _archive}[kind](path, config)


def _kind(path: Path) -> str:
    names = [str(c).strip().lower() for c in read_table(path).columns]
    # The price files have a date, two forecasts (one of them a foecast) and the price.
    return "prices" if len(names) == 4 and names[-1] == "ot" and all(n.endswith("cast") for n in names[1:3]) else "long"


def _borders(path: Path, rows: int, steps_a_day: int) -> tuple[int, int, int]:
    if path.stem.startswith("ETT"):
        train, val, test = (30 * steps_a_day * months for months in ETT_MONTHS)
        return train, val, min(test, rows)
    train, test = int(0.7 * rows), int(0.2 * rows)
    return train, rows - test, rows


def _long(path: Path, config) -> list[Task]:
    panel = panel_of(read_table(path))
    rows = int(panel.lengths.min())
    season = frequency.seasons(panel.freq)[0]
    train, val, end = _borders(path, rows, season)
    panel = _scaled(panel, train).cut(panel.lengths - end)
    horizons = config.horizons or ((24, 36, 48, 60) if rows < 2000 else (96, 192, 336, 720))
    if min(val - train, end - val) < max(horizons):
        parts = f"{val - train} to choose by and {end - val} to test on"
        raise ValueError(
            f"{path} has {rows} rows, {parts}, too few for a horizon of {max(horizons)}; choose less in horizons"
        )
    found = []
    for h in horizons:
        cuts = np.arange(val, end - h + 1, config.stride)
        each = [cuts] * len(panel)
        seen = np.full(len(panel), val)
        found.append(Task(path.stem, "long", panel, h, seen, each, season, season, val - train, "mse", False))
    return found


def _scaled(panel: Panel, train: int) -> Panel:
    """Every series in deviations of its first `train` steps."""
    panel.y = panel.y.copy()
    for a, b in zip(panel.offsets[:-1], panel.offsets[1:]):
        part = panel.y[a : a + train]
        deviation = np.nanstd(part)
        # A series that has not moved yet is counted as it is.
        panel.y[a:b] = (panel.y[a:b] - np.nanmean(part)) / (deviation if deviation > 0 else 1.0)
    return panel


def _prices(path: Path, config) -> list[Task]:
    frame = read_table(path)
    frame = frame.set_axis([str(c).strip() for c in frame.columns], axis=1)
    time, *covariates, target = frame.columns
    found = []
    h = (config.horizons or (24,))[0]
    for name, futr, hist in (("future covariates", covariates, []), ("past covariates", [], covariates)):
        panel = panel_of(frame, Columns(time=time, target=target, futr=tuple(futr), hist=tuple(hist)))
        rows = int(panel.lengths[0])
        train, val, end = _borders(path, rows, 24)
        panel = _scaled(panel, train)
        cuts, season = [np.arange(val, end - h + 1, config.stride)], frequency.seasons(panel.freq)[0]
        task = Task(
            f"{path.stem}, {name}", "prices", panel, h, np.array([val]), cuts, season, season, val - train, "mse", False
        )
        found.append(task)
    return found


def _horizon(freq: str) -> int:
    """The archive's horizon of a frequency; ten minutes have that of minutes."""
    return ARCHIVE_HORIZONS.get(freq) or ARCHIVE_HORIZONS.get(freq.lstrip("0123456789"), 24)


def _archive(path: Path, config) -> list[Task]:
    none = {"freq": None, "horizon": None}
    panel, header = read_tsf(path) if path.suffix == ".tsf" else (panel_of(read_table(path)), none)
    known = str(header["freq"] or panel.freq).split("-")[0]
    h = config.horizons[0] if config.horizons else header["horizon"] or _horizon(known)
    # m4's series are of unlike ages: one window each.
    windows = 1 if path.stem.startswith("m4") else min(max(1, math.ceil(0.1 * panel.lengths.min() / h)), 20)
    if short := int((panel.lengths <= h * windows).sum()):
        if short == len(panel):
            raise ValueError(
                f"{path} has no series of more than the {h * windows} steps that are tested; choose less in horizons"
            )
        print(
            f"{path.stem}: {short} series of at most {h * windows} steps, all of them tested, have no past and are left out"
        )
        panel = panel.cut(np.where(panel.lengths > h * windows, 0, panel.lengths))
    seen = panel.lengths - h * windows
    cuts = [np.arange(s, s + h * windows, h) for s in seen]
    season = frequency.seasons(header["freq"] or panel.freq)[0]
    return [Task(path.stem, "archive", panel, h, seen, cuts, season, ARCHIVE_SEASONS.get(known, season))]
