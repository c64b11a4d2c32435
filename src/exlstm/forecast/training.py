"""Training of the network beside a fitted linear path: built from it, trained to its least validation loss, continued."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from exlstm.data.windows import Windows
from exlstm.forecast.combine import residual_spread, stretch, stretched
from exlstm.forecast.config import FitConfig
from exlstm.forecast.fitting import CHOOSE_BY, Cuts, Split, batches
from exlstm.models.config import ForecasterConfig
from exlstm.models.forecaster import ForecasterNetwork, pinball, set_spread
from exlstm.models.linear import LinearPath, level_and_scale
from exlstm.models.xlstmtime import XLSTMTime
from exlstm.train.capture import Captured
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, lr_at

EVALUATIONS = 20
# Share of the training that is seen through in any case.
PATIENT = 0.4
EMA = 0.99
# Whether a step on a GPU is recorded once and replayed. No: this network's recorded step has not run on a card yet.
CAPTURE = False
DESIGNS = {"patches": ForecasterNetwork, "recent": ForecasterNetwork, "xlstmtime": XLSTMTime}
# Horizons and seasons, the longer of both, that are read at once where there are covariates.
RECENT_HORIZONS, RECENT_SEASONS = 3, 2


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
    n_past = w.hist.shape[1] + w.futr.shape[1]
    recent = min(lookback, max(RECENT_HORIZONS * h, RECENT_SEASONS * w.season)) if n_past else 0
    settings = ForecasterConfig(
        d_model=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads, blocks=config.blocks, dropout=config.dropout,
        horizon=h, lookback=lookback, patch=patch, n_past=n_past, n_future=w.futr.shape[1], n_dates=w.n_dates,
        n_static=w.static.shape[1], recent=recent, variates=config.variates, design=config.design,
    )  # fmt: skip
    aligned = len(set(w.panel.first)) == len(set(w.panel.lengths.tolist())) == 1
    if settings.grouped and not aligned:
        told = "variates and design xlstmtime let series see each other"
        raise ValueError(f"{told}, which wants series of one length and begin; these have others")
    torch.manual_seed(config.seed)
    network = DESIGNS[settings.design](settings, linear.config, device=w.device)
    network.linear.load_state_dict(linear.state_dict())
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
    """Trains the network to its least validation loss; returns what happened.

    What reads the latest steps learns first, alone; the patches then, beside it as it is: together the patches, which learn
    windows by heart, would end both early. Where they gain nothing they are left out.
    """
    whole = network.config
    if not whole.recent or whole.design != "patches":
        return _train(network, found, config, report)
    config = replace(config, minutes=config.minutes / 2)
    network.config = replace(whole, design="recent")
    first = _train(network, found, config, report)
    network.config = whole
    network.recent.requires_grad_(False)
    second = _train(network, found, config, report)
    network.recent.requires_grad_(True)
    if not second["best_step"]:
        network.config = replace(whole, design="recent")
    told = {name: first[name] + second[name] for name in ("steps", "losses", "seconds")}
    return {**told, "best_step": second["best_step"] or first["best_step"]}


def _train(network: ForecasterNetwork, found: Split, config: FitConfig, report=None) -> dict:
    """Trains what may learn of the network, by an average of its weights."""
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
    learn = _learner(network, len(windows.panel) if grouped else 1)
    for step in range(1, steps + 1):
        network.train()
        series, at, _ = draw(cuts, windows, config.batch_size, grouped, generator)
        learn(windows.batch(series, at, longest, config.horizon))
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step(lr_at(step - 1, steps, schedule))
        with torch.no_grad():
            # Short at the beginning, so that the average does not hang on the first weights.
            torch._foreach_lerp_(ours, theirs, 1 - min(EMA, step / (step + 10)))
        yield step


def _learner(network, n_series: int):
    """A function batch -> gradients in place of the old ones; on a GPU out of a graph, for such small steps wait for launches."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if CAPTURE and parameters[0].is_cuda:
        return Captured(lambda batch: network.loss(batch, n_series), parameters)

    def learn(batch):
        for parameter in parameters:
            parameter.grad = None
        network.loss(batch, n_series).backward()

    return learn


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
