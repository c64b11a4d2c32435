"""Fitting: windows to learn from and to choose by, the linear path chosen on validation, the network trained beside it."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exlstm.data.windows import Windows
from exlstm.forecast.combine import residual_spread, stretch, stretched
from exlstm.forecast.config import FitConfig
from exlstm.models.config import ForecasterConfig, LinearConfig
from exlstm.models.forecaster import ForecasterNetwork, pinball, set_spread
from exlstm.models.linear import Gram, LinearPath, level_and_scale
from exlstm.models.xlstmtime import XLSTMTime
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, lr_at

ALPHAS = tuple(10 ** (k / 2) for k in range(-12, 2))
# Windows that a choice is made by, and that it learns from while it chooses.
CHOOSE_BY, CHOOSE_FROM = 4096, 24576
# What a choice has to gain on validation; less may well be chance.
GAIN, SCALE_GAIN = 0.01, 0.03
# Numbers that the linear path sees at most.
WIDEST = 1500
EVALUATIONS = 20
# Share of the training that is seen through in any case.
PATIENT = 0.4
EMA = 0.99
DESIGNS = {"patches": ForecasterNetwork, "xlstmtime": XLSTMTime}


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


def patch_of(lookback: int, horizon: int, season: int) -> int:
    """Steps a token, so that window and forecast make some forty tokens: in step with the season where that is near."""
    wanted = max(1, (lookback + horizon) / 40)
    near = [p for p in range(math.ceil(wanted), int(2 * wanted) + 1) if season % p == 0 or p % season == 0]
    return near[0] if near and season > 1 else math.ceil(wanted)


def build_network(found: Split, linear: LinearPath, config: FitConfig) -> ForecasterNetwork:
    """The network over a fitted linear path, with the spread that its residuals have on validation."""
    w, h = found.windows, config.horizon
    patch = patch_of(linear.config.lookback, h, w.season)
    lookback = -(-linear.config.lookback // patch) * patch
    settings = ForecasterConfig(
        d_model=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads, blocks=config.blocks, dropout=config.dropout,
        horizon=h, lookback=lookback, patch=patch, n_past=w.hist.shape[1] + w.futr.shape[1], n_future=w.futr.shape[1],
        n_dates=w.n_dates, n_static=w.static.shape[1], variates=config.variates, design=config.design,
    )  # fmt: skip
    aligned = len(set(w.panel.first)) == len(set(w.panel.lengths.tolist())) == 1
    if settings.grouped and not aligned:
        told = "variates and design xlstmtime let series see each other"
        raise ValueError(f"{told}, which wants series of one length and begin; these have others")
    torch.manual_seed(config.seed)
    network = DESIGNS[settings.design](settings, linear.config, device=w.device)
    network.linear.weight.copy_(linear.weight)
    val, residuals = found.val(h), []
    for batch, _ in batches(w, val, val.some(CHOOSE_BY), seen(network), h):
        _, deviation = level_and_scale(batch, lookback, "mean", "window")
        residuals.append((batch.target - network.linear.predict(batch)) / deviation)
    set_spread(network, residual_spread(torch.cat(residuals), network.levels))
    return network


def seen(network: ForecasterNetwork) -> int:
    """Steps of the past that the network and its linear path need."""
    linear = network.linear.config
    return max(network.config.lookback, linear.lookback, linear.past)


def draw(cuts: Cuts, windows: Windows, size: int, grouped: bool, generator) -> tuple[Tensor, Tensor, int]:
    """Random windows: (series, cuts, series a group)."""
    n = len(windows.panel) if grouped else 1
    if not grouped:
        return *cuts.at(torch.randint(cuts.total, (size,), generator=generator, device=windows.device)), 1
    groups = max(1, size // n)
    at = cuts.first[0] + torch.randint(int(cuts.counts[0]), (groups,), generator=generator, device=windows.device)
    return torch.arange(n, device=windows.device).repeat(groups), at.repeat_interleave(n), n


def train_network(network: ForecasterNetwork, found: Split, config: FitConfig, report=None) -> dict:
    """Trains the network to its least validation loss, by an average of its weights; returns what happened."""
    w, h, longest = found.windows, config.horizon, seen(network)
    cuts, val = found.train(network.config.lookback, h), found.val(h)
    steps = config.steps or min(config.max_steps, max(200, 30 * cuts.total // config.batch_size))
    grouped = network.config.grouped
    held = _held(w, val, longest, h, grouped)
    average = copy.deepcopy(network)
    start = time.perf_counter()
    losses = [held(average)]
    evaluations = EVALUATIONS
    if config.minutes:
        # The first call is the slowest; the budget goes by the second.
        steps, evaluations = _affordable(network, cuts, w, config, steps, held, start)
    every, patience = max(1, steps // evaluations), max(2, config.patience * evaluations // EVALUATIONS)
    best, kept, waited = losses[0], copy.deepcopy(average.state_dict()), 0
    best_step, step = 0, 0
    for step in _updates(network, average, cuts, w, config, steps, longest):
        if step % every and step != steps:
            continue
        losses.append(held(average))
        if report:
            report(step, steps, losses[-1], time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            break
        waited = 0 if losses[-1] < best * (1 - 1e-4) else waited + 1
        if losses[-1] < best:
            best, best_step, kept = losses[-1], step, copy.deepcopy(average.state_dict())
        # The first updates often cost what the later ones gain.
        if waited >= patience and step >= PATIENT * steps:
            break
    network.load_state_dict(kept)
    network.eval()
    return {"steps": step, "best_step": best_step, "losses": losses, "seconds": time.perf_counter() - start}


def _affordable(network, cuts: Cuts, windows: Windows, config: FitConfig, steps: int, held, begun: float):
    """Updates and evaluations that the wall-clock budget since `begun` allows, the refit counted, by the time of a few."""
    trial = [copy.deepcopy(network), copy.deepcopy(network)]
    for _ in _updates(*trial, cuts, windows, config, 2, seen(network)):
        pass
    start = time.perf_counter()
    for _ in _updates(*trial, cuts, windows, config, 3, seen(network)):
        pass
    update, start = (time.perf_counter() - start) / 3, time.perf_counter()
    held(network)
    evaluation = time.perf_counter() - start
    budget = 60 * config.minutes - (time.perf_counter() - begun)
    # A fifth of the time at most goes into looking whether it helps.
    evaluations = int(max(5, min(EVALUATIONS, 0.2 * budget / evaluation)))
    left = (budget - evaluations * evaluation) / update / (1.2 if config.refit else 1)
    return min(steps, max(EVALUATIONS, int(left))), evaluations


def _updates(network, average, cuts: Cuts, windows: Windows, config: FitConfig, steps: int, longest: int):
    """Yields after each update; nothing of it waits for the device."""
    schedule = TrainConfig(
        steps=steps, lr=config.lr, final_lr=0.05, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    optimizer = Optimizer(network, schedule)
    generator = torch.Generator(windows.device).manual_seed(config.seed)
    grouped = network.config.grouped
    ours, theirs = (list(m.parameters()) for m in (average, network))
    for step in range(1, steps + 1):
        network.train()
        series, at, n = draw(cuts, windows, config.batch_size, grouped, generator)
        loss = network.loss(windows.batch(series, at, longest, config.horizon), n)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step(lr_at(step - 1, steps, schedule))
        with torch.no_grad():
            # Short at the beginning, so that the average does not hang on the first weights.
            torch._foreach_lerp_(ours, theirs, 1 - min(EMA, step / (step + 10)))
        yield step


def _held(windows: Windows, val: Cuts, longest: int, horizon: int, grouped: bool):
    """A function network -> mean loss over validation windows, its spread stretched as the calibration will."""
    n, most = len(windows.panel) if grouped else 1, max(64, min(2048, 2**17 // horizon))
    if grouped:
        every = max(1, int(val.counts[0]) * n // most)
        at = val.first[0] + val.stride[0] * torch.arange(int(val.counts[0]), device=windows.device)[::every]
        parts = at.split(max(1, 512 // n))
        pairs = [(torch.arange(n, device=windows.device).repeat(len(a)), a.repeat_interleave(n)) for a in parts]
    else:
        pairs = [val.at(part) for part in val.some(most).split(512)]

    @torch.no_grad()
    def held(network) -> float:
        network.eval()
        found = []
        for series, cuts in pairs:
            batch = windows.batch(series, cuts, longest, horizon)
            found.append((network(batch, n), batch.target, network.linear.units(batch)[1]))
        quantiles, target, scale = (torch.cat(column) for column in zip(*found))
        factors = stretch(quantiles, target, network.levels)
        return float(pinball(stretched(quantiles, factors), target, network.levels, scale))

    return held


def continue_network(network: ForecasterNetwork, found: Split, config: FitConfig, steps: int, lr: float):
    """Some more updates from all windows, the validation part included; ends with the average of the weights."""
    if steps < 1:
        return
    average = copy.deepcopy(network)
    cuts = found.train(network.config.lookback, config.horizon, whole=True)
    for _ in _updates(network, average, cuts, found.windows, replace(config, lr=lr), steps, seen(network)):
        pass
    network.load_state_dict(average.state_dict())
    network.eval()
