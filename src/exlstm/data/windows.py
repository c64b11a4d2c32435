"""Windows over a panel as tensors on any device: the past, what is known of the future, and the target, by series and cut.

A window (series n, cut t) sees the steps before t and is asked for the h steps from t on. Gaps are filled causally
(the value one season before, else the last one), and a mask keeps what was really seen. Every series is counted in its
own deviations from its own mean, so that float32 is enough for any of them.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exlstm.data import clock, frequency
from exlstm.data.panel import Panel

# Years of data from which the calendar of the year is learnt.
YEARS = 3.0
# Share of its largest value that a covariate moves by at least; what is less is rounding.
STILL = 1e-12


class Batch(NamedTuple):
    """B windows of L past and H future steps; steps before the first row are 0 with seen and inside False."""

    y: Tensor  # (B, L)
    seen: Tensor  # (B, L) bool: a number was there
    inside: Tensor  # (B, L) bool: not before the first row
    past: Tensor  # (B, L, P + F) covariates
    future: Tensor  # (B, H, F)
    dates: Tensor  # (B, L + H, C) the calendar; (B, 0, C) where it was not asked for
    origin: Tensor  # (B, C) the calendar at the first step of the future
    static: Tensor  # (B, S)
    target: Tensor  # (B, H), NaN where unknown
    series: Tensor  # (B,) int64: the number of the series among those a model was fitted on, -1 for any other


def last(batch: Batch, steps: int) -> Batch:
    """The windows' last steps of the target, all else as it is."""
    return batch._replace(**{name: getattr(batch, name)[:, -steps:] for name in ("y", "seen", "inside")})


def filled(y: np.ndarray, season: int) -> np.ndarray:
    """y (T,) without gaps, each filled from before it; a gap at the beginning takes the first value."""
    known = np.flatnonzero(~np.isnan(y))
    if len(known) in (0, len(y)):
        return np.nan_to_num(y)
    y = y.copy()
    y[: known[0]] = y[known[0]]
    for t in np.flatnonzero(np.isnan(y)):
        y[t] = y[t - season] if t >= season + known[0] else y[t - 1]
    return y


class Windows:
    """The panel on `device`, with h steps of known future behind each series where `future` (N, h, F) gives them.

    `statistics` are those of the windows a model was fitted on; a series that they know keeps its mean and scale.
    """

    def __init__(self, panel: Panel, season: int, statistics: dict | None = None, future=None, device="cpu"):
        self.panel, self.season, self.device = panel, season, torch.device(device)
        # Of the scale that y stands on (forecast/arcsinh.py); 0: the plain one.
        self.bend = 0.0
        lengths, offsets = panel.lengths, panel.offsets
        known, own = (statistics or {}).get("series", {}), _norms(panel)
        self.norms = np.array([known.get(i) or norm for i, norm in zip(panel.ids, own)])  # (N, 2)
        gaps = np.logical_or.reduceat(np.isnan(panel.y), offsets[:-1])
        flat = np.empty(len(panel.y), np.float32)
        for a, b, gap, (mean, scale) in zip(offsets[:-1], offsets[1:], gaps, self.norms.tolist()):
            part = filled(panel.y[a:b], season) if gap else panel.y[a:b]
            flat[a:b] = (part - mean) / scale
        self.statistics = statistics or statistics_of(panel)
        self.more = 0 if future is None else future.shape[1]
        futr = panel.futr
        if future is not None:
            futr = np.concatenate(
                [p for n in range(len(panel)) for p in (futr[offsets[n] : offsets[n + 1]], future[n])]
            )
        futr = _standard(futr, *self.statistics["futr"], offsets + self.more * np.arange(len(offsets)))
        hist = _standard(panel.hist, *self.statistics["hist"], offsets)
        # What is missing of a series is as in the mean of all.
        static = np.nan_to_num((panel.static - self.statistics["static"][0]) / self.statistics["static"][1])
        place = {name: n for n, name in enumerate(self.statistics["series"])}
        self.numbers = torch.tensor([place.get(name, -1) for name in panel.ids], device=self.device)
        # Steps of room around the rows, grown as windows ask for them.
        self.around, self.room = (self._tensor(flat), torch.from_numpy(~np.isnan(panel.y)).to(self.device)), 0
        self.futr, self.hist, self.static = self._tensor(futr), self._tensor(hist), self._tensor(static)
        self.starts = torch.from_numpy(offsets[:-1].astype(np.int64)).to(self.device)
        self.lengths = torch.from_numpy(lengths.astype(np.int64)).to(self.device)
        self.dates = None

    def _tensor(self, values) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.device)

    def with_calendar(self, horizon: int) -> Windows:
        """Adds the calendar, `horizon` steps beyond the end of every series; series on one clock share one table."""
        panel, rows, place = self.panel, [], {}
        starts = np.zeros(len(panel), np.int64)
        longest = {}
        for n, first in enumerate(panel.first):
            longest[first] = max(longest.get(first, 0), int(panel.lengths[n]) + horizon)
        total = 0
        for first, steps in longest.items():
            place[first], total = total, total + steps
            times = clock.span(first, panel.freq, steps)
            if panel.zone:
                times = times.tz_localize("UTC").tz_convert(panel.zone).tz_localize(None)
            rows.append(frequency.calendar(times, panel.freq, self.statistics["year"])[0])
        for n, first in enumerate(panel.first):
            starts[n] = place[first]
        self.dates, self.date_starts = self._tensor(np.concatenate(rows)), torch.from_numpy(starts).to(self.device)
        return self

    @property
    def y(self) -> Tensor:
        """(R,): all rows, gaps filled, in units of their series."""
        return self.around[0][self.room : self.room + len(self.panel.y)]

    def stretches(self, cuts, lookback: int, horizon: int, least: int) -> tuple[list[int], list[int], list[int]]:
        """(series, first cut, number of cuts) of the runs of at least `least` cuts whose windows see no gap."""
        seen = self.around[1][self.room : self.room + len(self.panel.y)]
        edge = torch.zeros(len(seen) + 1, dtype=torch.bool, device=self.device).index_fill_(0, self.starts, True)
        edge[-1] = True
        before, behind = torch.nn.functional.pad(seen, (1, 0))[:-1], torch.nn.functional.pad(seen, (0, 1))[1:]
        begin = (seen & (edge[:-1] | ~before)).nonzero()[:, 0]
        end = (seen & (edge[1:] | ~behind)).nonzero()[:, 0] + 1
        series = torch.searchsorted(self.starts, begin, right=True) - 1
        start = self.starts[series]
        first = torch.maximum(cuts.first[series], begin - start + lookback)
        count = torch.minimum(cuts.last[series], end - start - horizon) - first + 1
        keep = count >= max(1, least)
        return series[keep].tolist(), first[keep].tolist(), count[keep].tolist()

    def stretch(self, series: int, first: int, count: int, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
        """The rows that the windows of `count` cuts from `first` on see, and the calendar at the first step of their futures."""
        start, date = int(self.starts[series]) + first, int(self.date_starts[series]) + first
        return self.y[start - lookback : start + count - 1 + horizon], self.dates[date : date + count]

    @property
    def n_dates(self) -> int:
        return self.dates.shape[1]

    def whole(self, series: Tensor, cuts: Tensor, horizon: int) -> Tensor:
        """(B,): whether nothing lacks in the steps behind each cut."""
        lacking = (~self.around[1][self.room : self.room + len(self.panel.y)]).cumsum(0)
        lacking, first = torch.nn.functional.pad(lacking, (1, 0)), self.starts[series] + cuts
        return lacking[first + horizon] == lacking[first]

    def batch(self, series, cuts, lookback: int, horizon: int, dates: bool = True, filled: bool = False) -> Batch:
        """The windows (series[b], cuts[b]), both (B,) int64 on the device; the whole calendar only with `dates`; `filled`: gaps
        of targets of which half is known as they were filled."""
        steps = torch.arange(-lookback, horizon, device=self.device)
        start, length, cut = self.starts[series], self.lengths[series], cuts[:, None]
        inside, known = steps[:lookback] >= -cut, steps[lookback:] < length[:, None] - cut
        y, seen = (rows.index_select(0, start + cuts) for rows in self._unfolded(lookback, horizon))  # (B, L + H)
        there = seen[:, lookback:]
        if filled:
            there = there | (2 * there.sum(1, keepdim=True) >= horizon)
        target = torch.where(known & there, y[:, lookback:], torch.nan)
        past, future = self._covariates(series, cut + steps, lookback, inside)
        place = self.date_starts[series]
        calendar = self.dates[place[:, None] + (cut + (steps if dates else steps[:0])).clamp_min(0)]
        return Batch(
            y[:, :lookback] * inside, seen[:, :lookback] & inside, inside, past, future, calendar, self.dates[place + cuts],
            self.static[series], target, self.numbers[series],
        )  # fmt: skip

    def _unfolded(self, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
        """Views (R, L + H) of y and seen, row r what stands around row r of the panel: a window is a copy of one piece."""
        if max(lookback, horizon) > self.room:
            rows, old = len(self.panel.y), self.room
            self.room = max(lookback, horizon)
            around = [torch.nn.functional.pad(v[old : old + rows], (self.room, self.room)) for v in self.around]
            self.around = tuple(around)
        return tuple(v[self.room - lookback :].unfold(0, lookback + horizon, 1) for v in self.around)

    def _covariates(self, series: Tensor, step: Tensor, lookback: int, inside: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, P + F) of the past and (B, H, F) of the future, for steps (B, L + H)."""
        if not self.futr.shape[1] + self.hist.shape[1]:
            return self.futr.new_zeros(*inside.shape, 0), self.futr.new_zeros(len(step), step.shape[1] - lookback, 0)
        start, length = self.starts[series][:, None], self.lengths[series][:, None]
        own = start + self.more * series[:, None]
        futr = self.futr[own + torch.minimum(step.clamp_min(0), length + self.more - 1)]
        hist = self.hist[start + step[:, :lookback].clamp_min(0)]
        return torch.cat([hist, futr[:, :lookback]], -1) * inside[..., None], futr[:, lookback:]

    def ends(self) -> tuple[Tensor, Tensor]:
        """The windows that ask for what follows every series."""
        return torch.arange(len(self.panel), device=self.device), self.lengths.clone()


def _knows_the_year(panel: Panel) -> bool:
    """Whether the longest series has seen every day of the year three times: from fewer, what a day is like is guesswork."""
    n = int(panel.lengths.argmax())
    return frequency.years(panel.first[n], panel.freq, int(panel.lengths[n])) >= YEARS


def _norms(panel: Panel) -> list[tuple[float, float]]:
    """Mean and standard deviation of every series; deviation 1 for one that never moves."""
    y, lengths = panel.y, panel.lengths
    if (lengths == lengths[0]).all() and not np.isnan(y).any():
        # Some series at a time, which a cache holds.
        blocks = np.split(y.reshape(len(lengths), -1), range(64, len(lengths), 64))
        found = [x for rows in blocks for x in zip(rows.mean(1), rows.std(1), np.maximum(rows.max(1), -rows.min(1)))]
    else:
        parts = (y[a:b][~np.isnan(y[a:b])] for a, b in itertools.pairwise(panel.offsets))
        found = ((k.mean(), k.std(), np.abs(k).max()) if len(k) else (0.0, 0.0, 0.0) for k in parts)
    return [(float(mean), float(s) if s > 1e-9 * largest else 1.0) for mean, s, largest in found]


def statistics_of(panel: Panel) -> dict:
    """Mean and deviation of every covariate, over all rows, and of every series, and whether the year is known."""
    found = {"series": dict(zip(panel.ids, _norms(panel))), "year": _knows_the_year(panel)}
    for kind in ("futr", "hist", "static"):
        values = getattr(panel, kind)
        known = np.ma.masked_invalid(values)
        mean, deviation, most = (
            np.asarray(np.ma.filled(value, 0.0), np.float64)
            for value in (np.ma.mean(known, 0), np.ma.std(known, 0), np.ma.max(np.ma.abs(known), 0))
        )
        found[kind] = (mean, np.where(deviation > STILL * most, deviation, 1.0))
    return found


def _standard(values: np.ndarray, mean, deviation, offsets) -> np.ndarray:
    """Standardised covariates; a gap keeps the value before it, 0 (the mean) at the beginning of a series."""
    values = (values - mean) / deviation
    if np.isnan(values).any():
        rows = np.arange(len(values))[:, None]
        last = np.maximum.accumulate(np.where(np.isnan(values), 0, rows), 0)
        start = np.repeat(offsets[:-1], np.diff(offsets))[:, None]
        values = np.where(last >= start, np.take_along_axis(values, last, 0), 0.0)
    return np.nan_to_num(values)
