"""Intervals that follow drift: the spread goes by the errors of the forecasts that earlier origins would have made.

At an origin t the step j of a forecast made at s is known where s + j <= t. The blend of the members as they were
before they learnt from validation forecasts again from origins t - g, t - 2g, ..., where neither they nor the calibration have
learnt anything. Counted in half widths of the 80 % interval, z = |y - forecast| / width, what is known by t is averaged as
clamp(z - 1/2, 0, 1) with weights exp(-age / m); the factor that validation's errors would have to be multiplied by for the same
average is e^s. Of s the share n / (n + doubt) is believed, n the independent spans that the average holds. First with a memory
m of one span; then what is left of s once the windows have that factor, with a memory of eight: a feedback on the intervals as
they came out, as in adaptive conformal inference (Gibbs and Candès, 2021, arXiv 2106.00170), but of a scale, and delayed by
what is not known yet.

A forecast depends on the last `reach` steps before its windows and on nothing else, so that a stream, a rolling evaluation and
a single forecast agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from exlstm.data import clock
from exlstm.data.windows import Windows
from exlstm.models.forecaster import ForecasterNetwork
from exlstm.models.linear import LinearPath

# Spans that an average remembers, how often them it goes back, and the spans that the factor 1 counts as much as.
MEMORIES, BACK, DOUBTS = (1.0, 8.0), (3, 2), (1.0, 0.5)
# Steps of a span at least: fewer tell little of a scale.
FEW = 24
# Origins a span, and with a network, which is a hundred times as slow; spans that must lie between the beginning of what was not
# learnt from and an origin.
ORIGINS, FEWER, LEAST = 4, 2, 2
# Logarithm of the factor at most, and where the curve of averages is known.
FURTHEST, GRID = 1.0, torch.linspace(-2, 2, 81)
# Errors held at once.
HELD = 2**25
# Windows that are forecast at once, on a CPU and on a GPU, where launching a pass takes longer than working it out.
TOGETHER = (2048, 16384)


def excess(z: Tensor) -> Tensor:
    """What an error of z half widths counts: 0 well inside the interval, 1 well outside; little of it is said by the tails."""
    return (z - 0.5).clamp(0, 1)


def curve(z: Tensor) -> Tensor:
    """(len(GRID),): the mean excess of errors z (any shape, NaN where unknown), times e^GRID."""
    known = z[~z.isnan()]
    known = known[:: max(1, len(known) // 2**17)].float()
    if not len(known):
        return torch.zeros(len(GRID), device=z.device)
    return torch.stack([excess(known * math.exp(x)).mean() for x in GRID.tolist()])


@dataclass
class Drift:
    """What an engine needs to follow drift."""

    judges: dict[str, LinearPath | ForecasterNetwork]  # the members that learn, as validation saw them
    shares: dict[str, float]  # of the members that forecast again
    curve: Tensor  # of validation's errors
    offset: float  # logarithm of what validation alone would multiply the calibrated spread by
    begins: dict  # series -> its first time, and the step behind what the judge learnt from

    def span(self, season: int) -> int:
        """Steps of an independent span: a horizon or a season, and as many as tell a scale."""
        return max(self.judges["linear"].config.horizon, season, FEW)

    def stride(self, season: int) -> int:
        return -(-self.span(season) // (FEWER if "network" in self.judges else ORIGINS))

    def counts(self, season: int) -> list[int]:
        """Origins that each of the averages goes back."""
        return [max(1, int(m * b * self.span(season)) // self.stride(season)) for m, b in zip(MEMORIES, BACK)]

    def reach(self, season: int) -> int:
        """Steps before an origin at which the earliest of the others lies."""
        return sum(self.counts(season)) * self.stride(season)

    def first(self, windows: Windows, named: Tensor) -> Tensor:
        """(N,): the first origin that counts of the series `named`, of a stranger where a span is behind it; others' lengths."""
        panel, found = windows.panel, windows.lengths.clone()
        for n in named.tolist():
            time, step = self.begins.get(panel.ids[n], (None, 0))
            if time is None:
                step = max(4, self.span(windows.season))
            elif time != panel.first[n]:
                learnt = clock.span(time, panel.freq, step + 1)[-1]
                step = int(np.searchsorted(panel.times(n, 0, int(panel.lengths[n])), learnt))
            found[n] = step
        return found


def shares(weights: dict[str, float], judges) -> dict[str, float]:
    """The blend as it forecasts again: what has no judge, as theta, which takes its time, counts as the linear path."""
    found = {name: weights.get(name, 0.0) for name in ("naive", *judges)}
    found["linear"] += 1 - sum(found.values())
    return {name: share for name, share in found.items() if share > 1e-6}


def fit(engine, found, held: dict[str, Tensor], target: Tensor, other: Tensor) -> Drift:
    """From the members' quantiles `held` (W, H, Q) for `target` (W, H) on validation; `other` (Q,): by what other times
    than validation stretched the calibration."""
    judges = {"linear": engine.linear, "arcsinh": engine.bent}
    # The spread of a network follows the window by itself: what the linear path misses says little of what it misses. One whose
    # series see each other wants all of them at every origin, and has no judge.
    if engine.weights.get("network", 0) > 0 and not engine.network.config.grouped:
        judges["network"] = engine.network
    judges = {name: judge for name, judge in judges.items() if judge is not None}
    given = shares(engine.weights, judges)
    mixed = sum(share * held[name] for name, share in given.items())
    low, high = sides(mixed.shape[-1])
    panel = found.windows.panel
    begins = dict(zip(panel.ids, zip(panel.first, found.begins.tolist())))
    offset = -float(other[[low, high]].log().mean())
    z = half_widths(mixed[..., [low, mixed.shape[-1] // 2, high]], target)
    return Drift(judges, given, curve(z), offset, begins)


def half_widths(quantiles: Tensor, target: Tensor) -> Tensor:
    """|y - median| in half widths of the interval, of quantiles (..., 3)."""
    low, median, high = quantiles.unbind(-1)
    return (target - median).abs() / ((high - low) / 2).clamp_min(1e-9)


def sides(n: int) -> tuple[int, int]:
    """Places of the 10 and the 90 % quantile among n."""
    return 2, n - 3


@torch.no_grad()
def factors(engine, windows: Windows, series: Tensor, cuts: Tensor) -> Tensor:
    """(B,): what the spread of the windows (series[b], cuts[b]) is multiplied by; 1 where too little is known."""
    drift, found = engine.drift, torch.ones(len(series), device=windows.device)
    if drift is None:
        return found
    least = LEAST * drift.span(windows.season)
    first = drift.first(windows, series[cuts >= least].unique())
    enough = cuts - first[series] >= least
    back = sum(drift.counts(windows.season))
    rows = torch.nonzero(enough)[:, 0]
    rows = rows[torch.argsort(series[rows], stable=True)]
    # Series by series, as many at a time as fit.
    most, parts, taken = max(1, HELD // (engine.config.horizon * back)), [], 0
    numbers = series[rows].unique_consecutive(return_counts=True)[1]
    for count in numbers.tolist():
        if parts and parts[-1][1] - parts[-1][0] + count <= most:
            parts[-1][1] += count
        else:
            parts.append([taken, taken + count])
        taken += count
    for a, b in parts:
        part = rows[a:b]
        found[part] = _Backtest(engine, windows, first, series[part], cuts[part]).log_factor().exp()
    return found


class _Backtest:
    """Origins of some series in their order, what was forecast from them, and averages of what is known of it."""

    def __init__(self, engine, windows: Windows, first: Tensor, series: Tensor, cuts: Tensor):
        self.engine, self.drift, self.windows = engine, engine.drift, windows
        judges = self.drift.judges
        learnt = {"linear": judges["linear"], "bent": judges.get("arcsinh"), "network": judges.get("network")}
        self.before = replace(engine, **learnt)
        self.step = self.drift.stride(windows.season)
        self.span = self.drift.span(windows.season)
        counts = self.drift.counts(windows.season)
        # A step at which a window may be cut has a place of its own: one more than the series has rows.
        room = torch.zeros(len(windows.lengths), dtype=torch.int64, device=windows.device)
        named = series.unique()
        room[named] = windows.lengths[named] + 1
        self.begin = room.cumsum(0) - room
        self.first = first
        wanted = torch.zeros(int(room.sum()), dtype=torch.bool, device=windows.device)
        at = self.begin[series] + cuts
        wanted[at] = True
        for k in range(1, sum(counts) + 1):
            wanted[at[cuts - k * self.step >= first[series]] - k * self.step] = True
        self.place = wanted.cumsum(0) - 1  # (room,) number of an origin
        spots = torch.nonzero(wanted)[:, 0]
        self.series = named[torch.searchsorted(self.begin[named], spots, right=True) - 1]  # (U,)
        self.cuts = spots - self.begin[self.series]
        self.asked = self.place[at]

    def log_factor(self) -> Tensor:
        """(B,) of the windows asked for."""
        windows = torch.arange(len(self.cuts), device=self.cuts.device)
        z = torch.cat([self._errors(part) for part in windows.split(TOGETHER[self.cuts.device.type == "cuda"])])
        found, everywhere = torch.zeros(len(z), device=z.device), torch.arange(len(z), device=z.device)
        for k, (memory, count, doubt) in enumerate(zip(MEMORIES, self.drift.counts(self.windows.season), DOUBTS)):
            # What follows the last average is asked for alone.
            wanted = self.asked if k == len(MEMORIES) - 1 else everywhere
            off, spans = self._surprise(z / found.exp()[:, None], memory * self.span, count, wanted)
            found = found[wanted] + off * spans / (spans + doubt)
        return found.clamp(-FURTHEST, FURTHEST)

    def _errors(self, part: Tensor) -> Tensor:
        """(U, H) in half widths of the 80 % interval."""
        longest, horizon = self.engine.longest, self.engine.config.horizon
        dates = "network" in self.drift.shares
        batch = self.windows.batch(self.series[part], self.cuts[part], longest, horizon, dates)
        low, high = sides(self.engine.spreads["linear"].shape[-1])
        found = self.before.members(batch, None, self.drift.shares, at=[low, (low + high) // 2, high])
        return half_widths(sum(share * found[name] for name, share in self.drift.shares.items()), batch.target)

    def _surprise(self, z: Tensor, memory: float, count: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) twice: the logarithm of the scale as it is known at the origins numbered `wanted`, and the spans that say so."""
        known, g, h = ~z.isnan(), self.step, z.shape[1]
        pieces = -(-h // g)
        pad = (0, pieces * g - h)
        sums, numbers = (
            torch.nn.functional.pad(x, pad).unflatten(1, (pieces, g)).sum(2)
            for x in (torch.where(known, excess(z), 0.0), known.to(z.dtype))
        )  # (U, pieces)
        back, piece = torch.arange(1, count + 1, device=z.device), torch.arange(pieces, device=z.device)[:, None]
        # Of the window k strides back the first k pieces are known; the last of them for no time.
        weight = torch.where(piece < back, torch.exp(-(back - piece - 1) * g / memory), 0.0).to(z.dtype)  # (pieces, K)
        fresh = torch.exp(-(back - 1) * g / memory).to(z.dtype)
        series, cuts = self.series[wanted], self.cuts[wanted]
        total, held, spans = (torch.zeros(len(wanted), device=z.device) for _ in range(3))
        for k in range(1, count + 1):
            past = cuts - k * g
            real = past >= self.first[series]
            at = self.place[self.begin[series] + past.clamp_min(0)].clamp_min(0)
            here = (numbers[at] * weight[:, k - 1]).sum(1)
            total += torch.where(real, (sums[at] * weight[:, k - 1]).sum(1), 0.0)
            held += torch.where(real, here, 0.0)
            spans += torch.where(real & (here > 0), fresh[k - 1] * g / self.span, 0.0)
        off = _across(total / held.clamp_min(1e-9), self.drift.curve) + self.drift.offset
        return torch.where(held > 0, off, 0.0), spans


def _across(mean: Tensor, curve: Tensor) -> Tensor:
    """The logarithm of the factor at which the curve has such means, on straight lines."""
    grid = GRID.to(curve)
    right = torch.searchsorted(curve, mean.contiguous()).clamp(1, len(curve) - 1)
    low, high = curve[right - 1], curve[right]
    share = ((mean - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return grid[right - 1] + share * (grid[right] - grid[right - 1])
