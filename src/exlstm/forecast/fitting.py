"""Fitting: windows to learn from and to choose by, and the linear path chosen on validation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exlstm.data.windows import Windows
from exlstm.forecast.config import FitConfig
from exlstm.models.config import LinearConfig
from exlstm.models.linear import Gram, LinearPath

ALPHAS = tuple(10 ** (k / 2) for k in range(-12, 2))
# Windows that a choice is made by, and that it learns from while it chooses.
CHOOSE_BY, CHOOSE_FROM = 4096, 24576
# What a choice has to gain on validation; less may well be chance.
GAIN, SCALE_GAIN = 0.01, 0.03
# Numbers that the linear path sees at most.
WIDEST = 1500


class Cuts:
    """Windows by number: those of series n are cut at first[n], first[n] + stride[n], ... up to last[n]."""

    def __init__(self, first: Tensor, last: Tensor, most: int = 0):
        self.first, counts = first, (last - first + 1).clamp_min(0)
        # With `most`, a long series has no more windows than that, so that every series counts alike.
        self.stride = (
            (counts + most - 1).div(most, rounding_mode="floor").clamp_min(1) if most else torch.ones_like(counts)
        )
        self.counts = (counts + self.stride - 1).div(self.stride, rounding_mode="floor")
        self.ends = self.counts.cumsum(0)
        self.total = int(self.ends[-1])

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(series, cuts) of the windows numbered `index`."""
        series = torch.searchsorted(self.ends, index, right=True)
        return series, self.first[series] + self.stride[series] * (index - self.ends[series] + self.counts[series])

    def some(self, most: int) -> Tensor:
        """The numbers of at most `most` windows, evenly spread."""
        device = self.ends.device
        if self.total <= most:
            return torch.arange(self.total, device=device)
        return (torch.arange(most, device=device, dtype=torch.float64) * (self.total / most)).long()


@dataclass
class Split:
    """Where learning ends and validation begins, by series (steps)."""

    windows: Windows
    begins: Tensor  # (N,) first step of the validation part; the length of the series where it has none
    unit: Tensor  # (N, 1) mean error of the seasonal naive forecast before it, in units of the series

    def train(self, lookback: int, horizon: int, whole: bool = False) -> Cuts:
        """Windows to learn from; `whole`: the validation part too."""
        length = self.windows.lengths if whole else self.begins
        short = min(lookback, max(4, self.windows.season))
        first = torch.where(length >= 4 * (lookback + horizon), lookback, torch.full_like(length, short))
        return Cuts(first, length - horizon)

    def val(self, horizon: int) -> Cuts:
        """Windows to choose by, at most as many of a series as make 2 * CHOOSE_BY in all."""
        most = max(1, 2 * CHOOSE_BY // len(self.begins))
        return Cuts(self.begins, self.windows.lengths - horizon, most)


def split(windows: Windows, config: FitConfig) -> Split:
    """The last 15 % of every series, at least a horizon, are for validation, where as much is left to learn from."""
    h, lengths = config.horizon, windows.lengths
    size = (0.15 * lengths).long().clamp_min(h) if not config.val_size else torch.full_like(lengths, config.val_size)
    least = min(max(4, windows.season), 3 * h + 4)
    begins = torch.where(lengths - size >= h + least, lengths - size, lengths)
    found = Split(windows, begins, _naive_error(windows, begins))
    if config.val_size and config.val_size < h:
        raise ValueError(f"val_size is {config.val_size}, wanted at least the horizon, {h}")
    if not found.val(h).total or not found.train(4, h).total:
        longest = int(lengths.max())
        raise ValueError(
            f"the longest series has {longest} rows, a horizon of {h} wants at least {2 * h + least} to learn and to check"
        )
    return found


def _naive_error(windows: Windows, begins: Tensor) -> Tensor:
    """(N, 1): mean |y[t] - y[t - season]| before the validation part, at least a hundredth of a deviation."""
    found = []
    for start, length in zip(windows.starts.tolist(), begins.tolist()):
        y = windows.y[start : start + length]
        lag = windows.season if length > windows.season else 1
        found.append(
            (y[lag:] - y[:-lag]).abs().mean().nan_to_num(1.0) if length > 1 else torch.ones((), device=y.device)
        )
    return torch.stack(found).clamp_min(0.01)[:, None]


def lookbacks(config: FitConfig, season: int, lengths: Tensor) -> list[int]:
    """The look-backs that are tried: from about a season on, each longer than the last by a half."""
    if config.lookback:
        return [config.lookback]
    h = config.horizon
    longest = int(min(config.max_lookback, max(4, (lengths.double().quantile(0.75) - h) * 0.6)))
    found, length = [], max(4, min(season, h))
    while True:
        near = round(length / season) * season if length >= season else int(length)
        found.append(max(4, min(near, longest)))
        if length >= longest:
            return sorted(set(found))
        length *= 1.5


def batches(windows: Windows, cuts: Cuts, numbers: Tensor, lookback: int, horizon: int, size: int = 2048):
    for part in numbers.split(size):
        series, at = cuts.at(part)
        yield windows.batch(series, at, lookback, horizon, dates=False), series


def choose_linear(found: Split, config: FitConfig) -> tuple[LinearPath, float, list[dict]]:
    """The linear path by validation error: look-back and scale first, then the level, the calendar and the covariates.

    A window's own scale has to gain SCALE_GAIN over the series', other additions GAIN; of look-backs within GAIN of the best the
    longest is taken, for the ridge shrinks what it does not need. Choices that gain less do not carry over to later data.
    """
    w, h, tried = found.windows, config.horizon, []
    n_past, n_future = w.hist.shape[1] + w.futr.shape[1], w.futr.shape[1]
    ahead = n_future if h * n_future <= WIDEST else 0

    def room(lookback: int) -> int:
        """Steps of the past covariates that fit in beside everything else."""
        return max(1, (WIDEST - lookback - h * ahead) // n_past)

    def attempt(settings: LinearConfig) -> dict:
        error, alpha = _fit_and_score(found, settings, config)
        tried.append({"error": error, "alpha": alpha, "settings": settings})
        return tried[-1]

    def longest(scale: str) -> tuple[float, dict]:
        rows = []
        for lookback in lookbacks(config, w.season, found.begins):
            past = min(lookback, 2 * max(h, w.season), room(lookback)) if n_past else 0
            rows.append(attempt(LinearConfig(h, lookback, past, n_past, ahead, 0, "mean", scale)))
        least = min(row["error"] for row in rows)
        near = [row for row in rows if row["error"] <= least * (1 + GAIN)] or rows[:1]
        return least, max(near, key=lambda row: row["settings"].lookback)

    by_series, by_window = longest("series"), longest("window")
    best = by_window[1] if by_window[0] < by_series[0] * (1 - SCALE_GAIN) else by_series[1]
    changes = [({"center": "last"}, GAIN)]
    if w.n_dates:
        changes.append(({"n_dates": w.n_dates}, GAIN))
    if n_past:
        lookback = best["settings"].lookback
        changes += [
            ({"past": min(lookback, room(lookback))}, GAIN),
            ({"past": max(1, best["settings"].past // 4)}, 0.0),
        ]
        changes += [({"past": 0, "n_past": 0, "n_future": 0}, 0.0)]
    for change, gain in changes:
        row = attempt(replace(best["settings"], **change))
        best = row if row["error"] < best["error"] * (1 - gain) else best
    return fit_linear(found, best["settings"], best["alpha"], config, whole=False), best["alpha"], tried


def _fit_and_score(found: Split, settings: LinearConfig, config: FitConfig) -> tuple[float, float]:
    w, h, longest = found.windows, config.horizon, max(settings.lookback, settings.past)
    path = LinearPath(settings, device=w.device)
    gram, cuts = Gram(path), found.train(longest, h)
    for batch, _ in batches(w, cuts, cuts.some(CHOOSE_FROM), longest, h):
        gram.add(batch)
    val, held = found.val(h), []
    for batch, series in batches(w, val, val.some(CHOOSE_BY), longest, h):
        level, scale = path.units(batch)
        held.append((path.features(batch, level, scale), level, scale, batch.target, found.unit[series]))
    scores = []
    for alpha, weight in zip(ALPHAS, gram.solve(ALPHAS)):
        sums = [error_sum(level + scale * (x @ weight), y, unit, config.metric) for x, level, scale, y, unit in held]
        total, count = (torch.stack(column).sum() for column in zip(*sums))
        scores.append((float((total / count).nan_to_num(math.inf)), alpha))
    return min(scores)


@torch.no_grad()
def linear_error(found: Split, path: LinearPath, config: FitConfig) -> float:
    """The error of a linear path on validation, by the metric."""
    longest, val = max(path.config.lookback, path.config.past), found.val(config.horizon)
    sums = [
        torch.stack(error_sum(path.predict(batch), batch.target, found.unit[series], config.metric))
        for batch, series in batches(found.windows, val, val.some(CHOOSE_BY), longest, config.horizon)
    ]
    total, count = torch.stack(sums).sum(0)
    return float(total / count)


def error_sum(point: Tensor, target: Tensor, unit: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Sum of the errors over known targets by the metric, and their number."""
    known = ~target.isnan()
    error = torch.where(known, point - target, 0.0)
    return (error.square() if metric == "mse" else error.abs() / unit).sum(), known.sum()


def fit_linear(found: Split, settings: LinearConfig, alpha: float, config: FitConfig, whole: bool) -> LinearPath:
    """The linear path of these settings, from all windows to learn from."""
    longest = max(settings.lookback, settings.past)
    path = LinearPath(settings, device=found.windows.device)
    gram, cuts = Gram(path), found.train(longest, config.horizon, whole)
    for batch, _ in batches(found.windows, cuts, cuts.some(10**7), longest, config.horizon):
        gram.add(batch)
    path.weight.copy_(gram.solve([alpha])[0])
    return path
