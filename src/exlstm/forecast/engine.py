"""A fitted forecaster without frames: the members over tensors of windows, their blend, and its calibration."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from exlstm.data.panel import Panel
from exlstm.data.windows import Batch, Windows, last, statistics_of
from exlstm.forecast import arcsinh, baselines, combine, drift, fitting, ridges, training
from exlstm.forecast.config import FitConfig
from exlstm.models.config import ForecasterConfig
from exlstm.models.forecaster import ForecasterNetwork, pinball
from exlstm.models.linear import LinearPath

LEVELS = ForecasterConfig().quantiles
FINETUNE_ALPHA = 1e-3
EVALUATIONS = training.EVALUATIONS
# Numbers of validation quantiles that weights and calibration are chosen by.
HELD = 8 * 10**6
# Steps at least that the spread of a window goes by.
MOVED = 32


@dataclass
class Engine:
    """Everything that a forecast needs besides the history."""

    config: FitConfig
    season: int
    statistics: dict
    linear: LinearPath | None = None
    ridge: LinearPath | None = None  # one look-back, chosen on validation: the baseline
    lookback: int = 0  # of the ridge
    network: ForecasterNetwork | None = None
    weights: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(
        default_factory=dict
    )  # (H, Q) in units of the window; the network's (Q,) stretch
    factors: Tensor | None = None  # (Q,)
    scores: dict[str, dict] = field(default_factory=dict)  # member -> its losses on validation
    notes: list[str] = field(default_factory=list)
    drift: drift.Drift | None = None
    bent: LinearPath | None = None  # on the scale of arcsinh with this bend
    bend: float = 0.0

    @property
    def device(self):
        return self.linear.weight.device

    @property
    def levels(self) -> Tensor:
        return torch.tensor(LEVELS, device=self.device)

    @property
    def plain(self) -> Tensor:
        return torch.ones(len(LEVELS), device=self.device)

    @property
    def made(self) -> list[str]:
        """The members that are there to be mixed; the linear path always is."""
        lacking = [m for m, part in (("network", self.network), ("arcsinh", self.bent)) if part is None]
        return [m for m in self.config.members if m not in lacking] or ["linear"]

    @property
    def theta_steps(self) -> int:
        """Steps of the past that the theta method is fitted to."""
        return min(512, max(96, 8 * self.season))

    @property
    def longest(self) -> int:
        """Steps of history that a forecast looks at."""
        theta = self.theta_steps if "theta" in self.config.members else 1
        linear = self.linear.config
        network = training.seen(self.network) if self.network is not None else 1
        return max(theta, self.season, linear.lookback, linear.past, network)

    @property
    def kept(self) -> int:
        """Steps of history that a forecast, its intervals included, depends on."""
        behind = self.drift.reach(self.season) if self.drift is not None else 0
        return self.longest + self.config.horizon + behind

    def windows(self, panel: Panel, future=None) -> Windows:
        """The panel as this engine sees it; `future` (N, H, F) or None."""
        return Windows(panel, self.season, self.statistics, future, self.device).with_calendar(self.config.horizon)

    def moves(self, batch: Batch, scale: Tensor) -> Tensor:
        """(B, 2): what the windows moved by lately, in units of the linear path, as logarithms."""
        return combine.moves(batch, self.season, max(MOVED, 2 * self.season, 2 * self.config.horizon)) - scale.log()

    @torch.no_grad()
    def members(
        self, batch: Batch, offset: Tensor | None, names, n_series: int = 1, at=slice(None)
    ) -> dict[str, Tensor]:
        """Quantiles (B, H, Q) of every member named, in units of the series; `offset` (B, 1) its zero in them, which theta
        alone wants. Of the levels those numbered `at`."""
        h, found = self.config.horizon, {}
        level, scale = self.linear.units(batch)
        moved = self.moves(batch, scale)
        for name in names:
            if name == "network":
                found[name] = combine.stretched(self.network(batch, n_series), self.spreads.get(name, self.plain))[
                    ..., at
                ]
                continue
            point = {
                "naive": lambda: baselines.seasonal_naive(batch, self.season, h),
                "theta": lambda: baselines.theta(last(batch, self.theta_steps), self.season, h, offset),
                "linear": lambda: self.linear.predict(batch, (level, scale)),
                "ridge": lambda: self.ridge.predict(batch),
                "arcsinh": lambda: arcsinh.predict(self.bent, batch, self.bend),
            }[name]()
            spread = self.spreads.get(name)
            point = point[..., None].expand(-1, -1, len(LEVELS))[..., at]
            if spread is not None:
                wide = scale * combine.width(moved, self.spreads[f"{name}.width"])
                point = point + wide[..., None] * spread[..., at]
            found[name] = point
        return found

    def forecast(self, windows: Windows, series: Tensor, cuts: Tensor, also=(), size: int = 512, at=slice(None)):
        """Yields (rows, {"blend": (B, H, Q), and every name in `also`: ...}, batch) in units of the series; of the levels those
        numbered `at`."""
        used = [m for m, w in self.weights.items() if w > 0]
        n = self._group(windows)
        wide = drift.factors(self, windows, series, cuts)[:, None, None]
        for rows in torch.arange(len(series), device=windows.device).split(max(n, size // n * n)):
            s = series[rows]
            batch = windows.batch(s, cuts[rows], self.longest, self.config.horizon, dates="network" in (*used, *also))
            offset = offsets(windows, s)
            found = self.members(batch, offset, used, n)
            mixed = sum(self.weights[m] * found[m] for m in used)
            # The others are not mixed, so that of their levels only those wanted are made.
            rest = [m for m in also if m not in used]
            alone = self.members(batch, offset, rest, n, at) if rest else {}
            out = {m: found[m][..., at] if m in found else alone[m] for m in also}
            yield rows, {"blend": combine.stretched(mixed, self.factors * wide[rows])[..., at], **out}, batch

    def _group(self, windows: Windows) -> int:
        grouped = self.network is not None and self.network.config.grouped
        return len(windows.panel) if grouped and self.weights.get("network", 0) > 0 else 1


def offsets(windows: Windows, series: Tensor) -> Tensor:
    """(B, 1): where the zero of each series lies in its units."""
    norms = torch.from_numpy(windows.norms).to(windows.device, torch.float32)
    return (-norms[:, 0] / norms[:, 1])[series][:, None]


def fit(panel: Panel, config: FitConfig, season: int, device="cpu", report=None) -> Engine:
    """The whole procedure: split, linear path, network, blend, calibration, refit. `report(text)` hears of it."""
    say = report or (lambda text: None)
    # Before anything of the horizon's length is made.
    fitting.check_lengths(panel.lengths, season, config)
    # Scales and means come from what is learnt from, not from the validation part.
    begins = fitting.begins(torch.from_numpy(panel.lengths), season, config)
    statistics = statistics_of(panel.cut(panel.lengths - begins.numpy()))
    windows = Windows(panel, season, statistics, device=device).with_calendar(config.horizon)
    found = fitting.split(windows, config)
    start = time.perf_counter()
    linear, ridge, recipe, tried = ridges.choose(found, config, say)
    engine = Engine(config, season, statistics, linear, ridge, recipe.single.lookback, notes=[_told(recipe, tried)])
    say(f"{engine.notes[0]} ({time.perf_counter() - start:.1f} s)")
    bent = ridges.choose_bent(found, recipe, config) if "arcsinh" in config.members else None
    if bent:
        engine.bend, engine.bent = bent[0].windows.bend, ridges.fit(*bent, config, whole=False)[0]
        engine.notes.append(
            f"spikes: a linear path on the scale of arcsinh, straight within {engine.bend:.2g} deviations"
        )
        say(engine.notes[-1])
    story = None
    if "network" in config.members:
        engine.network = training.build_network(found, linear, config)
        story = training.train_network(engine.network, found, config, report=getattr(report, "step", None))
        size = sum(p.numel() for p in engine.network.parameters() if p.requires_grad)
        shape = f"{size:,} parameters ({config.n_layers} x {'+'.join(config.blocks)}, patches of {engine.network.config.patch})"
        losses = f"validation loss {story['losses'][0]:.4f} -> {min(story['losses']):.4f}"
        engine.notes.append(f"network of {shape}: {story['steps']} updates, best at {story['best_step']}, {losses}")
        say(f"{engine.notes[-1]} ({story['seconds']:.1f} s)")
        if not story["best_step"]:
            engine.network = None
            engine.notes.append("the network found nothing that the linear path misses, and is left out")
            say(engine.notes[-1])
    _combine(engine, found, recipe)
    if config.refit:
        if bent:
            engine.bent = ridges.fit(*bent, config, whole=True)[0]
        _refit(engine, found, recipe, story)
    return engine


def _told(recipe: ridges.Recipe, tried: int) -> str:
    c, parts = recipe.settings, recipe.parts
    looks = f"look-backs {parts[0].lookback} to {c.lookback}" if len(parts) > 1 else f"look-back {c.lookback}"
    more = f", {c.n_past} covariates" if c.n_past else ""
    more += ", calendar" if c.n_dates else ""
    more += f", {recipe.share:.2g} of every series' own weights" if recipe.own else ""
    more += ", drawn also to the season" if any(part.season for part in parts) else ""
    said = f"linear path of {tried} tried: {looks}, {c.center} of the window, scale of the {c.scale}{more}"
    return f"{said}; single ridge: look-back {recipe.single.lookback}, alpha {recipe.single.alpha:.1g}"


@torch.no_grad()
def _combine(engine: Engine, found: fitting.Split, recipe: ridges.Recipe | None = None):
    """Spreads, weights, calibration and scores from the validation windows; `recipe`: other times have a say in the spread."""
    w, config = found.windows, engine.config
    val = found.val(config.horizon)
    most = max(64, HELD // (config.horizon * len(LEVELS) * len(config.members)))
    numbers = val.some(min(4096, most))
    n = engine.network is not None and engine.network.config.grouped and len(w.panel)
    if n:
        cuts = val.some(max(1, min(4096, most) // n) * n)[::n] // n
        numbers = (torch.arange(n, device=w.device) * int(val.counts[0]) + cuts[:, None] % int(val.counts[0])).flatten()
    engine.spreads = {}
    mixed_in = engine.made
    # The simplest are measured even where they may not enter the blend.
    names = list(dict.fromkeys((*mixed_in, "naive", "ridge", "linear")))
    stacked, batches = _held(engine, found, numbers, names, n)
    target, unit, scale, moved, group, series = (torch.cat(column) for column in zip(*batches))
    levels = engine.levels
    for name, quantiles in stacked.items():
        if name == "network":
            engine.spreads[name] = combine.stretch(quantiles, target, levels)
            stacked[name] = combine.stretched(quantiles, engine.spreads[name])
        else:
            point = quantiles[..., len(LEVELS) // 2]
            residual = (target - point) / scale
            fitted = combine.fit_width(residual, moved)
            wide = combine.width(moved, fitted)
            engine.spreads[f"{name}.width"] = fitted
            engine.spreads[name] = combine.residual_spread(residual / wide, levels)
            stacked[name] = quantiles + (scale * wide)[..., None] * engine.spreads[name]
    whole = torch.stack([stacked[m] for m in mixed_in])
    judged = target, unit, levels, config.metric
    weights = combine.blend(whole, judged, group, mixed_in)
    apart = torch.stack([group, series]).unique(dim=1).shape[1]
    weights = combine.steadied(weights, whole, judged, apart, mixed_in)
    engine.weights = dict(zip(mixed_in, weights))
    mixed = torch.einsum("m,mwhq->whq", torch.tensor(weights, device=w.device), whole)
    engine.factors = combine.stretch(mixed, target, levels)
    other, more = _other_times(engine, found, recipe, stacked, target)
    spans = len(group.unique()) + max(more / 2, min(drift.MEMORIES[-1], 2 * len(w.panel)))
    engine.factors = engine.factors * other * combine.unsure(levels, spans)
    engine.drift = drift.fit(engine, found, stacked, target, other)
    for name, quantiles in {**stacked, "blend": combine.stretched(mixed, engine.factors)}.items():
        engine.scores[name] = _score(quantiles, target, unit, levels)


def _held(engine: Engine, found: fitting.Split, numbers: Tensor, names: list[str], n: int):
    """Quantiles (W, H, Q) of every member named of the validation windows numbered, and of parts of them the targets, units,
    scales, moves, spans and series; `n` series at a time where they see each other."""
    w, h, gathered, rest = found.windows, engine.config.horizon, {m: [] for m in names}, []
    val = found.val(h)
    for part in numbers.split(max(n, 512 // n * n) if n else 512):
        series, at = val.at(part)
        batch = w.batch(series, at, engine.longest, h, dates="network" in names)
        for name, q in engine.members(batch, offsets(w, series), names, n or 1).items():
            gathered[name].append(q)
        scale = engine.linear.units(batch)[1]
        told = fitting.spans(found, series, at, h), series
        rest.append((batch.target, found.unit[series], scale, engine.moves(batch, scale), *told))
    return {m: torch.cat(q) for m, q in gathered.items()}, rest


def _other_times(engine: Engine, found: fitting.Split, recipe: ridges.Recipe | None, held: dict, target: Tensor):
    """(Q,): what the spread of validation is stretched by so that it holds before validation too, by quantiles `held` (W, H, Q)
    for `target` (W, H) and by forecasts of windows that they did not learn from; and the number of spans that say so.

    The linear path's, where a block of time may be left out; with too little data for that, the theta method's, which learns
    from its window alone, over the later half of what is learnt from.
    """
    w, h, levels, name = found.windows, engine.config.horizon, engine.levels, "linear"
    quantiles, targets, more, n = [held[name]], [target], fitting.learnt_spans(found, h), 0
    for batch, point in ridges.out_of_fold(found, recipe, engine.config, len(target), engine.longest) if recipe else ():
        _, scale = engine.linear.units(batch)
        wide = scale * combine.width(engine.moves(batch, scale), engine.spreads["linear.width"])
        quantiles.append(point[..., None] + wide[..., None] * engine.spreads["linear"])
        targets.append(batch.target)
    if recipe and len(targets) == 1 and "theta" in held:
        # Of few windows the next one is beyond all more often: for both alike.
        name, more, n = "theta", more / 2, len(target)
        cuts = fitting.Cuts((found.begins // 2).clamp_min(1), found.begins - h)
        quantiles = [held[name]]
        for batch, series in fitting.batches(w, cuts, cuts.some(2 * n), engine.longest, h):
            quantiles += engine.members(batch, offsets(w, series), [name]).values()
            targets.append(batch.target)
    if len(targets) == 1:
        return engine.plain, 0
    whole = combine.stretch(torch.cat(quantiles), torch.cat(targets), levels, n)
    # Of late counts as much as ever.
    return (whole / combine.stretch(held[name], target, levels, n)).sqrt(), more


def _score(quantiles: Tensor, target: Tensor, unit: Tensor, levels: Tensor) -> dict:
    half = len(LEVELS) // 2
    known = ~target.isnan()
    error = torch.where(known, quantiles[..., half] - target, 0.0)
    count = known.sum().clamp_min(1)
    inside = {}
    for level in (80, 95):
        low = LEVELS.index(round(0.5 - level / 200, 4))
        high = len(LEVELS) - 1 - low
        within = (target >= quantiles[..., low]) & (target <= quantiles[..., high])
        inside[f"coverage {level}"] = float((within & known).sum() / count)
    return {
        "mae": float((error.abs() / unit).sum() / count),
        "mse": float(error.square().sum() / count),
        "pinball": float(pinball(quantiles, target, levels, unit)),
        **inside,
    }


def _refit(engine: Engine, found: fitting.Split, recipe: ridges.Recipe, story: dict | None):
    """Learns from the validation part too: the linear path anew, the network for a fifth of its updates more."""
    engine.linear, engine.ridge = ridges.fit(found, recipe, engine.config, whole=True)
    if engine.network is not None and engine.weights.get("network", 0) > 0:
        # The one that validation saw goes on judging.
        engine.network = copy.deepcopy(engine.network)
        with torch.no_grad():
            engine.network.linear.load_state_dict(engine.linear.state_dict())
        training.continue_network(engine.network, found, engine.config, story["best_step"] // 5, engine.config.lr / 3)


def finetune(engine: Engine, panel: Panel, steps: int, report=None) -> Engine:
    """A new engine that has learnt from `panel` too: the better linear path of the old one and one fitted to it, the network
    trained on for `steps` updates, blend and calibration chosen on its validation part."""
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is {steps!r}, wanted a whole number of at least 0")
    new = copy.deepcopy(engine)
    windows = new.windows(panel)
    found = fitting.split(windows, new.config)
    part = ridges.Part(new.linear.config.lookback, FINETUNE_ALPHA, 1.0)
    fresh, ridge = ridges.fit(found, ridges.Recipe(new.linear.config, (part,), part), new.config, whole=False)
    new.linear = min((new.linear, fresh), key=lambda path: fitting.linear_error(found, path, new.config))
    told = "kept"
    if new.linear is fresh:
        told, new.ridge, new.lookback = "fitted anew", ridge, part.lookback
    if new.network is not None:
        with torch.no_grad():
            new.network.linear.load_state_dict(new.linear.state_dict())
        config = replace(new.config, steps=max(1, steps), patience=EVALUATIONS, lr=new.config.lr / 3)
        story = training.train_network(new.network, found, config) if steps else {"best_step": 0}
        told += f", network trained on for {story['best_step']} updates"
    new.notes.append(f"finetuned: linear path {told}")
    if report:
        report(new.notes[-1])
    _combine(new, found)
    return new
