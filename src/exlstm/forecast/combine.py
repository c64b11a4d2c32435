"""From members to one forecast: the spread of their residuals, weights by validation, and conformal calibration.

Quantiles are averaged level by level (Vincent), so that the blend is as sharp as its members. The spread of a member that
has none of its own is counted in what the window moves by (normalised conformal prediction: Papadopoulos et al., 2008).
The calibration stretches each level's distance to the median by one factor, the conformal quantile of what validation
needed (Romano et al., 2019).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

STRETCH = (0.25, 6.0)
# Steps of a weight from 0 to 1 (half as many among more than four members), draws of the groups, numbers of quantiles that
# weights are judged by, and windows at least.
STEPS, DRAWS, NUMBERS, FEWEST = 8, 200, 2**20, 64
# Share of the weights that validation gives with the network; the rest is what it gives without. Weights below LEAST are none.
TRUST, LEAST = 0.75, 0.02
# Groups from which on the draws know how far validation is by chance; with fewer a step from the best member has to be sure.
SPANS = 128
# What a step from the best member has to gain more than, where paths judge it that learnt from less.
MARGIN = 0.02
# Groups from which on those that chose the weights may judge them.
OTHERS = 32
# Spans, of every series by itself, whose weights have half of the say; the other half have shares by the members' errors.
DOUBTED = 4.0
# Share of errors with either sign that is none.
EVEN = 1e-4
# Cases of all in which a gain lies above its bound.
SURE = 0.95
# Pieces of the angle that Student's t is summed over.
ANGLES = 2**14
# Logarithm of the factor that a window's moves may make of the spread.
WIDEST = 3.0
# Variance of the logarithm of a window's moves, and windows of such, that the spread's dependence on them is held against.
DOUBT, FEW = 0.3, 20.0


def evenness(spans: float) -> float:
    """The share, 0 to 1, of errors that count with either sign where so many spans are known: to which side a few went
    says little of the next one."""
    return DOUBTED**3 / (DOUBTED**3 + spans**3)


def quantiles_of(pool: Tensor, weight: Tensor, levels: list[float], even: float = 0.0) -> Tensor:
    """(len(levels),): quantiles of numbers (N,) by their weights (N,), the share `even` of them with either sign."""
    step = max(1, len(pool) // 10**6)
    pool, weight = pool[::step].float(), weight[::step].double()
    if even > EVEN:
        pool, weight = torch.cat([pool, -pool]), torch.cat([(1 - even / 2) * weight, even / 2 * weight])
    order = pool.argsort()
    pool, weight = pool[order], weight[order]
    # Every number stands in the middle of its weight, the first at 0 and the last at 1.
    place = weight.cumsum(0) - weight / 2
    place = (place - place[0]) / (place[-1] - place[0]).clamp_min(1e-30)
    wanted = torch.tensor(levels, dtype=place.dtype, device=place.device)
    right = torch.searchsorted(place, wanted).clamp(min(1, len(pool) - 1), len(pool) - 1)
    left = (right - 1).clamp_min(0)
    share = ((wanted - place[left]) / (place[right] - place[left]).clamp_min(1e-30)).clamp(0, 1)
    return pool[left] + share.to(pool) * (pool[right] - pool[left])


def residual_spread(residual: Tensor, levels: Tensor, worth: Tensor | None = None, even: float = 0.0) -> Tensor:
    """(H, Q): quantiles of residuals (W, H, NaN where unknown), the shape shared by all steps, the size smoothed over them;
    windows count by their `worth` (W,), the share `even` of residuals with either sign."""
    known = ~residual.isnan()
    weight = known * (torch.ones_like(residual[:, :1]) if worth is None else worth[:, None])
    size = (torch.where(known, residual.abs(), 0.0) * weight).sum(0) / weight.sum(0).clamp_min(1e-9)  # (H,)
    h = len(size)
    reach = max(1, h // 8)
    near = (torch.arange(h)[:, None] - torch.arange(h)).abs().le(reach).to(size)
    size = (near @ size / near.sum(1)).clamp_min(1e-9)
    pool, weight = (residual / size)[known], weight[known]
    if not len(pool):
        pool, weight = residual.new_zeros(1), residual.new_ones(1)
    shape = quantiles_of(pool, weight, levels.tolist(), even)
    half = len(levels) // 2
    sides = torch.cat([shape[:half].clamp_max(0), torch.zeros_like(shape[:1]), shape[half + 1 :].clamp_min(0)])
    return size[:, None] * sides


def moves(batch, season: int, steps: int) -> Tensor:
    """(B, 2): logarithms of the mean move of the last `steps` steps from one to the next, and over a season; a series that
    stands still moves by a thousandth of its deviation."""
    found = []
    for lag in (1, season):
        y, seen = batch.y[:, -steps - lag :], batch.seen[:, -steps - lag :]
        known = seen[:, lag:] & seen[:, :-lag] if lag < y.shape[1] else seen[:, :0]
        size = torch.where(known, (y[:, lag:] - y[:, :-lag]).abs(), 0.0) if known.shape[1] else y[:, :0]
        count = known.sum(1)
        mean = size.sum(1) / count.clamp_min(1)
        # Without a season to compare, the steps say it.
        found.append(
            torch.where(count > 0, mean, found[0].exp() if found else torch.ones_like(mean)).clamp_min(1e-3).log()
        )
    return torch.stack(found, 1)


def fit_width(residual: Tensor, moved: Tensor) -> Tensor:
    """(2, 2): mean and slope of the moves (W, 2) by which the logarithm of a window's mean error (W, H) goes; slopes shrunk."""
    known = ~residual.isnan()
    size = torch.where(known, residual.abs(), 0.0).sum(1) / known.sum(1).clamp_min(1)
    keep = known.any(1)
    if not keep.any():
        return torch.zeros(2, 2, device=residual.device)
    x, y = moved[keep].double(), size[keep].double().clamp_min(1e-4).log()
    mean = x.mean(0)
    x, y = x - mean, y - y.mean()
    held = (DOUBT * len(x) + DOUBT * FEW) * torch.eye(2, dtype=x.dtype, device=x.device)
    slope = torch.linalg.solve(x.T @ x + held, x.T @ y)
    return torch.stack([mean, slope]).float()


def width(moved: Tensor, fitted: Tensor) -> Tensor:
    """(B, 1): the factor of the spread of windows that moved by `moved` (B, 2)."""
    return ((moved - fitted[0]) @ fitted[1]).clamp(-WIDEST, WIDEST).exp()[:, None]


def losses(mixed: Tensor, target: Tensor, unit: Tensor, levels: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(W,) twice: the loss of quantiles (W, H, Q) summed over the known steps of every window, and their number."""
    known = ~target.isnan()
    if metric == "mse":
        each = torch.where(known, mixed[..., mixed.shape[-1] // 2] - target, 0.0).square()
    else:
        off = (torch.where(known, target, 0.0)[..., None] - mixed) / unit[..., None]
        each = 2 * torch.maximum(levels * off, (levels - 1) * off).mean(-1) * known
    return each.sum(1), known.sum(1)


def blend(members: Tensor, judged: tuple, group: Tensor, names: list[str], worth: Tensor | None = None) -> list[float]:
    """Weights of the members (M, W, H, Q), which add up to 1: the mean of those with the least loss on DRAWS draws of the groups.

    `judged` is what `losses` takes behind the quantiles. Windows of one group (W,) say one thing, so that groups are drawn, not
    windows (bagged stacking: Breiman, 1996; the draws: Rubin, 1981). Members that validation cannot tell apart share the
    weight, and what it rejects has none. Of the network's weight TRUST is kept: the same windows chose its last update, so
    that they speak too well of it. Among few groups the step from the best member alone has to be sure where it was not chosen.
    With `worth` (W,), what windows count of which some are of times before validation, MARGIN of what it gains is not believed:
    a path that learnt without those times leaves more to be gained from others than the one that learnt from them.
    """
    target, unit, levels, metric = judged
    if metric == "mse":
        # The median is all that squared errors go by.
        members = members[..., members.shape[-1] // 2, None]
    most = max(FEWEST, NUMBERS // members[0, 0].numel())
    some = torch.arange(min(most, len(target)), device=members.device) * len(target) // min(most, len(target))
    part, given = members[:, some], (target[some], unit[some], levels, metric)
    counts = torch.ones_like(unit[some, 0]) if worth is None else worth[some]
    steps = STEPS if len(names) <= 4 else STEPS // 2
    shares = torch.tensor([c for c in itertools.product(range(steps + 1), repeat=len(names)) if sum(c) == steps])
    shares = shares.double() / steps  # (C, M)
    total = [losses(torch.einsum("m,mwhq->whq", c.to(part), part), *given) for c in shares]
    known = total[0][1] * counts
    loss = (torch.stack([x for x, _ in total], 1) * counts[:, None]).double().cpu()  # (W, C)
    count = known.double().cpu()  # (W,)
    ids, place = group[some].cpu().unique(return_inverse=True)
    loss = torch.zeros(len(ids), loss.shape[1], dtype=torch.float64).index_add_(0, place, loss)
    count = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, count)
    learnt = "network" in names and len(names) > 1
    plain = shares[:, names.index("network")] == 0 if learnt else torch.ones(len(shares), dtype=torch.bool)
    found = _chosen(loss, count, shares, plain)
    # The step never begins at the network: among few spans the least loss may be its by chance.
    single = plain & (shares == 1).any(1)
    alone = shares[single][loss[:, single].sum(0).argmin()]

    def lost(mix: Tensor, at=slice(None)) -> Tensor:
        mixed = torch.einsum("m,mwhq->whq", mix.to(part), part[:, at])
        return losses(mixed, target[some][at], unit[some][at], levels, metric)[0] * counts[at]

    share = 1.0
    if worth is not None:
        before = lost(alone).sum().clamp_min(1e-12)
        share = max(0.0, 1 - MARGIN / max(1e-12, float((before - lost(found).sum()) / before)))
    elif len(ids) < SPANS:
        apart = (ids[:, None] - ids).abs() > 1  # (G, G)
        if apart.any():
            gain = lost(alone)
            # Weights of windows that share no target with a group's; among many groups one more or less is no matter.
            for k in range(len(ids)) if len(ids) < OTHERS else ():
                mine, others = (place == k).to(part.device), apart[k]
                mix = _chosen(loss[others], count[others], shares, plain) if others.any() else alone
                gain[mine] -= lost(mix, mine)
            gain = gain - lost(found) if len(ids) >= OTHERS else gain
            share = backed(gain, known, group[some])
        else:
            found, share = _drawn(loss[:, plain], count, shares[plain]), 0.5
    found = share * found + (1 - share) * alone
    found = torch.where(found < LEAST, 0.0, found)
    return (found / found.sum()).tolist()


def steadied(
    weights: list[float], members: Tensor, judged: tuple, spans: int, names: list[str], worth: Tensor | None = None
) -> list[float]:
    """Weights that `spans`, counted in every series by itself, have found, drawn to those of the inverse squared error where
    spans are few: one or two of a single short series find a winner, and it is seldom the next one's.

    Neither the seasonal naive forecast nor climatology nor the network shares in that: what speaks for them has to be found.
    """
    some = torch.tensor([name not in ("naive", "climatology", "network") for name in names])
    if not some.any():
        return weights
    counts = torch.ones_like(judged[1][:, 0]) if worth is None else worth
    total = [(torch.stack(losses(member, *judged)) * counts).sum(1) for member in members]
    error = torch.stack([a / b.clamp_min(1) for a, b in total]).double().cpu().clamp_min(1e-12)
    prior = torch.where(some, error.pow(-1 if judged[3] == "mse" else -2), 0.0)
    share = spans**3 / (spans**3 + DOUBTED**3)
    found = share * torch.tensor(weights, dtype=prior.dtype) + (1 - share) * prior / prior.sum()
    found = torch.where(found < LEAST, 0.0, found)
    return (found / found.sum()).tolist()


def _chosen(loss: Tensor, count: Tensor, shares: Tensor, plain: Tensor) -> Tensor:
    """(M,): the mean of the best of shares (C, M) over draws: TRUST of it from all, the rest from those without the network,
    `plain` (C,)."""
    found = _drawn(loss, count, shares)
    return found if plain.all() else TRUST * found + (1 - TRUST) * _drawn(loss[:, plain], count, shares[plain])


def _drawn(loss: Tensor, count: Tensor, shares: Tensor) -> Tensor:
    """(M,): the mean of the best of shares (C, M) over draws, by loss (G, C) summed over count (G,) known numbers."""
    weights = torch.rand(DRAWS, len(count), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log().neg()
    return shares[((weights @ loss) / (weights @ count)[:, None].clamp_min(1e-9)).argmin(1)].mean(0)


def backed(gain: Tensor, count: Tensor, group: Tensor) -> float:
    """The share, 0 to 1, of a step that gains `gain` (W,) over `count` (W,) known numbers in windows of some group (W,).

    What the gain is at least, in SURE of cases, over its mean over the groups, for windows of one group say one thing. Groups
    count by their numbers, so that they are worth as many equal ones as Kish has it (1965), and of so few the error is known
    by Student's t. A single group, which knows no error, backs half; what is worth less than two never more.
    """
    ids, place = group.unique(return_inverse=True)
    sums = torch.zeros(2, len(ids), dtype=torch.float64, device=gain.device)
    sums = sums.index_add(1, place, torch.stack([gain, count.to(gain)]).double())
    gains, weights = sums[0] / sums[1].clamp_min(1), sums[1] / sums[1].sum().clamp_min(1)
    mean, square = float((gains * weights).sum()), float(weights.square().sum())
    if mean <= 0:
        return 0.0
    if square > 1 - 1e-6:
        return 0.5
    error = (float(((gains - mean) * weights).square().sum()) / (1 - square)) ** 0.5
    share = max(0.0, 1 - student(SURE, 1 / square - 1) * error / mean)
    return share if square <= 0.5 else min(0.5, share)


def student(level: float, degrees: float) -> float:
    """The quantile of Student's t, of one degree of freedom at least; `level` above one half."""
    # With t = tan(x) * degrees**.5 the density goes as cos(x)**(degrees - 1).
    edges = torch.linspace(0, math.pi / 2, ANGLES + 1, dtype=torch.float64)
    degrees = max(1.0, degrees)
    mass = ((edges[1:] + edges[:-1]) / 2).cos().pow(degrees - 1).cumsum(0)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])
    wanted = 2 * level - 1
    k = int(torch.searchsorted(mass, wanted).clamp(1, ANGLES))
    part = (wanted - float(mass[k - 1])) / float(mass[k] - mass[k - 1])
    return math.tan((k - 1 + part) * math.pi / 2 / ANGLES) * degrees**0.5


def stretch(quantiles: Tensor, target: Tensor, levels: Tensor, windows: int = 0, even: float = 0.0) -> Tensor:
    """(Q,): the factor by which each level's distance to the median grows, so that validation (W, H) lies below it as often;
    for the next one as if there were so many `windows`, where not 0; the share `even` of errors counts with either sign."""
    half, n = quantiles.shape[-1] // 2, windows or len(target)
    away = target - quantiles[..., half]
    known = ~away.isnan()
    factors = []
    for k, level in enumerate(levels.tolist()):
        if k == half:
            factors.append(1.0)
            continue
        distance = quantiles[..., k] - quantiles[..., half]
        ratio = (away / torch.where(distance.abs() > 1e-12, distance, torch.full_like(distance, 1e-12)))[known]
        share = level if k > half else 1 - level
        # With n windows the next one lies outside with probability 1 / (n + 1) even beyond the furthest.
        share = min(1.0, share * (1 + 1 / n))
        found = quantiles_of(ratio, torch.ones_like(ratio), [share], even) if len(ratio) else ratio.new_ones(1)
        factors.append(float(found.clamp(*STRETCH)))
    return torch.tensor(factors, dtype=quantiles.dtype, device=quantiles.device)


def unsure(levels: Tensor, spans: float) -> Tensor:
    """(Q,): what each level's distance to the median grows by because its size is known from so many independent spans alone:
    quantiles of Student's t over those of the normal (Hill's expansion), 1 from many spans."""
    z = torch.distributions.Normal(0.0, 1.0).icdf(levels.double())
    square, n = z.square(), 1 / spans
    grown = 1 + n * (square + 1) / 4 + n**2 * (5 * square**2 + 16 * square + 3) / 96
    return (grown + n**3 * (3 * square**3 + 19 * square**2 + 17 * square - 15) / 384).to(levels)


def stretched(quantiles: Tensor, factors: Tensor) -> Tensor:
    """The quantiles (..., Q) with their distances to the median stretched; none crosses another."""
    half = quantiles.shape[-1] // 2
    median = quantiles[..., half : half + 1]
    away = (quantiles - median) * factors
    below = away[..., :half].flip(-1).cummin(-1).values.flip(-1).clamp_max(0)
    above = away[..., half + 1 :].cummax(-1).values.clamp_min(0)
    return torch.cat([median + below, median, median + above], -1)


def at_levels(quantiles: Tensor, levels: Tensor, wanted: list[float]) -> Tensor:
    """(..., len(wanted)): the quantiles at other levels, on straight lines over the normal's quantiles, also beyond the ends."""
    normal = torch.distributions.Normal(0.0, 1.0)
    have = normal.icdf(levels.double()).cpu()
    found = []
    for level in wanted:
        if (exact := (levels.cpu() - level).abs() < 1e-6).any():
            found.append(quantiles[..., int(exact.nonzero()[0])])
            continue
        z = float(normal.icdf(torch.tensor(level, dtype=torch.float64)))
        right = int(torch.searchsorted(have, z).clamp(1, len(have) - 1))
        share = (z - float(have[right - 1])) / float(have[right] - have[right - 1])
        found.append(quantiles[..., right - 1] + share * (quantiles[..., right] - quantiles[..., right - 1]))
    return torch.stack(found, -1)
