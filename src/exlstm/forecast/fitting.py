"""Fitting: windows to learn from and to choose by, look-backs to try, and the error that choices go by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exlstm.data.windows import Windows
from exlstm.forecast.config import FitConfig
from exlstm.models.linear import LinearPath

# Windows that a choice is made by.
CHOOSE_BY = 4096
# Share of the median series' naive error that the error of a series is counted in at least.
STILL = 0.1


class Cuts:
    """Windows by number: those of series n are cut at first[n], first[n] + stride[n], ... up to last[n]."""

    def __init__(self, first: Tensor, last: Tensor, most: int = 0):
        self.first, self.last, counts = first, last, (last - first + 1).clamp_min(0)
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


def begins(lengths: Tensor, season: int, config: FitConfig) -> Tensor:
    """(N,): the last 15 % of every series, at least a horizon, are for validation, where as much is left to learn from."""
    h = config.horizon
    size = (0.15 * lengths).long().clamp_min(h) if not config.val_size else torch.full_like(lengths, config.val_size)
    return torch.where(lengths - size >= h + _least(season, h), lengths - size, lengths)


def _least(season: int, horizon: int) -> int:
    """Steps beside the horizons that a series needs to be learnt from and to be checked by."""
    return min(max(4, season), 3 * horizon + 4)


def split(windows: Windows, config: FitConfig) -> Split:
    """Every series parted at `begins`; ValueError where none is long enough."""
    check_lengths(windows.lengths, windows.season, config)
    first = begins(windows.lengths.cpu(), windows.season, config).to(windows.device)
    _check_values(windows, first)
    return Split(windows, first, _naive_error(windows, first))


def _check_values(windows: Windows, first: Tensor):
    """ValueError where the validation parts hold no value at all."""
    seen = ~torch.from_numpy(windows.panel.y).isnan()
    parts = [
        (a + cut, a + length) for a, cut, length in zip(*(x.tolist() for x in (windows.starts, first, windows.lengths)))
    ]
    if not any(bool(seen[a:b].any()) for a, b in parts):
        rows = max(b - a for a, b in parts)
        told = "which choices and intervals go by, hold no value; leave out what lies behind the last value"
        raise ValueError(f"the last {rows} steps, {told}")


def check_lengths(lengths, season: int, config: FitConfig, tested: int = 0):
    """ValueError where no series is long enough to be learnt from and to be checked by, its last `tested` rows apart; costs
    nothing, whatever the horizon."""
    h, size, longest = config.horizon, config.val_size, max(0, int(lengths.max()) - tested)
    if size and size < h:
        raise ValueError(f"val_size is {size}, wanted at least the horizon, {h}")
    least = h + max(h, size) + _least(season, h)
    if longest < least:
        wants = f"a horizon of {h}" + (f" with a val_size of {size}" if size else "")
        rows = f"{longest} rows" + (f" before the last {tested}, which are the test" if tested else "")
        raise ValueError(f"the longest series has {rows}, {wants} wants at least {least} to learn and to check")


def _naive_error(windows: Windows, begins: Tensor) -> Tensor:
    """(N, 1): mean |y[t] - y[t - season]| before the validation part, at least a hundredth of a deviation and STILL of the
    panel's median: by a series that repeats itself to the last digit alone nothing is chosen."""
    found = []
    for start, length in zip(windows.starts.tolist(), begins.tolist()):
        y = windows.y[start : start + length]
        lag = windows.season if length > windows.season else 1
        found.append(
            (y[lag:] - y[:-lag]).abs().mean().nan_to_num(1.0) if length > 1 else torch.ones((), device=y.device)
        )
    sizes = torch.stack(found).clamp_min(0.01)
    return sizes.clamp_min(STILL * float(sizes.median()))[:, None]


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


def _one_clock(panel) -> bool:
    return len(set(panel.first)) == len(set(panel.lengths.tolist())) == 1


def learnt_spans(found: Split, horizon: int) -> int:
    """Spans before the validation part, counted as `spans` numbers those in it."""
    counts = found.begins // horizon
    return int(counts.max() if _one_clock(found.windows.panel) else counts.sum())


def spans(found: Split, series: Tensor, at: Tensor, horizon: int) -> Tensor:
    """(B,): windows with one number lie within a horizon of each other, and in one series where the series' clocks differ."""
    span = (at - found.begins[series]) // horizon
    return span if _one_clock(found.windows.panel) else span + series * (1 + int(found.windows.lengths.max()))


def batches(windows: Windows, cuts: Cuts, numbers: Tensor, lookback: int, horizon: int, size=2048, filled=False):
    for part in numbers.split(size):
        series, at = cuts.at(part)
        yield windows.batch(series, at, lookback, horizon, dates=False, filled=filled), series


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
    total, count = window_errors(point, target, unit, metric)
    return total.sum(), count.sum()


def window_errors(point: Tensor, target: Tensor, unit: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(W,) twice: the sum of the errors of every window over known targets by the metric, and their number."""
    known = ~target.isnan()
    error = torch.where(known, point - target, 0.0)
    return (error.square() if metric == "mse" else error.abs() / unit).sum(1), known.sum(1)
