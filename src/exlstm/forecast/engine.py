"""A fitted forecaster without frames: the members over tensors of windows, their blend, and its calibration."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from exlstm.data.panel import Panel
from exlstm.data.windows import Batch, Windows, last, statistics_of
from exlstm.forecast import arcsinh, baselines, combine, drift, fitting, floors, judged, ridges, training
from exlstm.forecast.config import FitConfig
from exlstm.forecast.judged import offsets
from exlstm.models.config import ForecasterConfig
from exlstm.models.forecaster import ForecasterNetwork, pinball
from exlstm.models.linear import LinearPath

LEVELS = ForecasterConfig().quantiles
FINETUNE_ALPHA = 1e-3
EVALUATIONS = training.EVALUATIONS
# Steps at least that the spread of a window goes by.
MOVED = 32
# What climatology has to gain over the best of the other members on validation.
PAST_GAIN = 0.05


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
    floors: floors.Floors = field(default_factory=floors.Floors)

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
        """The members that are there to be mixed; the linear path always is. Climatology has to show its worth first."""
        lacking = [m for m, part in (("network", self.network), ("arcsinh", self.bent)) if part is None]
        lacking.append("climatology")
        return [m for m in self.config.members if m not in lacking] or ["linear"]

    @property
    def theta_steps(self) -> int:
        """Steps of the past that the theta method is fitted to, and whose values climatology counts."""
        return min(512, max(96, 8 * self.season))

    @property
    def longest(self) -> int:
        """Steps of history that a forecast looks at."""
        theta = self.theta_steps if {"theta", "climatology"} & {*self.config.members} else 1
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
            if name == "climatology":
                past = last(batch, self.theta_steps)
                found[name] = baselines.climatology(past, h, self.levels)[..., at]
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
        used = [*dict.fromkeys((*(m for m, w in self.weights.items() if w > 0), *self.stretched_shares))]
        n = self._group(windows)
        wide = drift.factors(self, windows, series, cuts)[:, None, None]
        floor = self.floors.of(windows)
        for rows in torch.arange(len(series), device=windows.device).split(max(n, size // n * n)):
            s = series[rows]
            batch = windows.batch(s, cuts[rows], self.longest, self.config.horizon, dates="network" in (*used, *also))
            offset = offsets(windows, s)
            found = self.members(batch, offset, used, n)
            # The others are not mixed, so that of their levels only those wanted are made.
            rest = [m for m in also if m not in used]
            alone = self.members(batch, offset, rest, n, at) if rest else {}
            out = {"blend": self.blended(found, self.factors * wide[rows])[..., at]}
            out |= {m: found[m][..., at] if m in found else alone[m] for m in also}
            low = floors.under(batch, floor[s])[..., None]
            yield rows, {m: torch.maximum(q, low) for m, q in out.items()}, batch

    def blended(self, found: dict[str, Tensor], factors: Tensor) -> Tensor:
        """(B, H, Q): the members by their weights, stretched, but for climatology: its quantiles are of what was seen."""
        mixed = combine.stretched(sum(w * found[m] for m, w in self.stretched_shares.items()), factors)
        share = self.weights.get("climatology", 0.0)
        return (1 - share) * mixed + share * found["climatology"] if share else mixed

    @property
    def stretched_shares(self) -> dict[str, float]:
        """The shares of the members that calibration stretches; they add up to 1."""
        rest = {m: w for m, w in self.weights.items() if w > 0 and m != "climatology"}
        if "climatology" in self.weights:
            rest = {m: w / sum(rest.values()) for m, w in rest.items()}
        return rest or {"linear": 1.0}

    def _group(self, windows: Windows) -> int:
        grouped = self.network is not None and self.network.config.grouped
        return len(windows.panel) if grouped and self.weights.get("network", 0) > 0 else 1


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
    engine.floors = floors.learnt(panel) if config.floors else floors.Floors()
    say(f"{engine.notes[0]} ({time.perf_counter() - start:.1f} s)")
    if told := floors.told(engine.floors):
        engine.notes.append(told)
        say(told)
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
        shape = _shape(engine.network)
        losses = f"validation loss {story['losses'][0]:.4f} -> {min(story['losses']):.4f}"
        engine.notes.append(f"network of {shape}: {story['steps']} updates, best at {story['best_step']}, {losses}")
        say(f"{engine.notes[-1]} ({story['seconds']:.1f} s)")
        if not story["best_step"]:
            engine.network = None
            engine.notes.append("the network found nothing that the linear path misses, and is left out")
            say(engine.notes[-1])
    _combine(engine, found, recipe, bent)
    if config.refit:
        if bent:
            engine.bent = ridges.fit(*bent, config, whole=True)[0]
        _refit(engine, found, recipe, story)
    return engine


def _shape(network: ForecasterNetwork) -> str:
    c, parts = network.config, []
    used = network.recent if c.design == "recent" else network
    if c.recent and c.design != "xlstmtime":
        parts.append(f"the latest {c.recent} steps at once")
    if c.design != "recent":
        parts.append(f"{c.n_layers} x {'+'.join(c.blocks)}, patches of {c.patch}")
    size = sum(p.numel() for p in used.parameters() if p.requires_grad)
    return f"{size:,} parameters ({', and '.join(parts)})"


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
def _combine(engine: Engine, found: fitting.Split, recipe: ridges.Recipe | None = None, bent: tuple | None = None):
    """Spreads, weights, calibration and scores from the validation windows; with `recipe`, and `bent`, split and recipe on the
    scale of arcsinh, times before validation have a say."""
    engine.spreads, levels = {}, engine.levels
    # The simplest are measured even where they may not enter the blend.
    # Squared errors go by the mean, which the quantiles of the past do not know.
    past_values = ["climatology"] if "climatology" in engine.config.members and engine.config.metric == "mae" else []
    names = list(dict.fromkeys((*engine.made, "naive", "ridge", "linear")))
    val = judged.validation(engine, found, [*names, *past_values])
    recipes = {"linear": (found, recipe)} if recipe else {}
    recipes |= {"arcsinh": bent} if recipe and engine.bent is not None else {}
    past = judged.earlier(engine, found, recipes, val) if recipes else None
    even = combine.evenness(val.spans + (past.spans if past else 0.0))
    for name in names:
        _spread(engine, name, [part for part in (val, past) if part and name in part.quantiles], even)
    made = _made(engine, val)
    engine.weights = dict(zip(made, _weights(engine, made, val, past)))
    mixed = val.mixed(engine.stretched_shares)
    engine.factors = combine.stretch(mixed, val.target, levels, even=even)
    other, more = _other_times(engine, found, val, past, even) if recipe else (engine.plain, 0)
    spans = val.spans + max(more / 2, min(drift.MEMORIES[-1], 2 * len(found.windows.panel)))
    engine.factors = engine.factors * other * combine.unsure(levels, spans)
    engine.drift = drift.fit(engine, found, val.quantiles, val.target, other)
    for name, quantiles in {**val.quantiles, "blend": engine.blended(val.quantiles, engine.factors)}.items():
        engine.scores[name] = _score(quantiles, val.target, val.unit, levels)


def _made(engine: Engine, val: judged.Judged) -> list[str]:
    """The members to be mixed: climatology among them where alone it gains PAST_GAIN over every other one but the network,
    of which validation, which chose its last update, speaks too well."""
    losses = {m: float(pinball(q, val.target, engine.levels, val.unit)) for m, q in val.quantiles.items()}
    best = min((losses[m] for m in engine.made if m != "network"), default=math.inf)
    sure = losses.get("climatology", math.inf) < best * (1 - PAST_GAIN)
    return [*engine.made, "climatology"] if sure else engine.made


def _spread(engine: Engine, name: str, parts: list[judged.Judged], even: float):
    """Finds the spread of a member by its residuals in all parts, and gives it to their quantiles."""
    val, levels = parts[0], engine.levels
    if name == "network":
        engine.spreads[name] = combine.stretch(val.quantiles[name], val.target, levels)
        val.quantiles[name] = combine.stretched(val.quantiles[name], engine.spreads[name])
        return
    residuals = [part.residual(name) for part in parts]
    fitted = combine.fit_width(torch.cat(residuals), torch.cat([part.moved for part in parts]))
    engine.spreads[f"{name}.width"] = fitted
    wide = [residual / combine.width(part.moved, fitted) for residual, part in zip(residuals, parts)]
    worth = torch.cat([part.worth for part in parts])
    engine.spreads[name] = combine.residual_spread(torch.cat(wide), levels, worth, even)
    for part in parts:
        part.spread(name, engine.spreads)


def _weights(engine: Engine, names: list[str], val: judged.Judged, past: judged.Judged | None) -> list[float]:
    """Weights of the members named by validation and, where its spans are few, but for the network's, by times before it."""

    def chosen(names: list[str], held: judged.Judged, worth: Tensor | None) -> list[float]:
        given, members = (held.target, held.unit, engine.levels, engine.config.metric), held.stacked(names)
        apart = torch.stack([held.group, held.series]).unique(dim=1).shape[1]
        weights = combine.blend(members, given, held.group, names, *([] if worth is None else [worth]))
        return combine.steadied(weights, members, given, apart, names, worth)

    closed = [name for name in names if name != "network"]
    if past is None or not closed or val.spans >= combine.SPANS:
        return chosen(names, val, None)
    both = judged.together([val, past], closed)
    weights = dict(zip(closed, chosen(closed, both, both.worth)))
    network = chosen(names, val, None)[names.index("network")] if closed != names else 0.0
    return [network if name == "network" else (1 - network) * weights[name] for name in names]


def _other_times(engine: Engine, found: fitting.Split, val: judged.Judged, past: judged.Judged | None, even: float):
    """(Q,): what the spread of validation is stretched by so that it holds before validation too; and the number of spans that
    say so.

    By the blend's errors, the linear path's in place of the network's; with too little data to leave a block of time out, by
    those of the theta method, which learns from its window alone, over the later half of what is learnt from.
    """
    h, levels = engine.config.horizon, engine.levels
    more = fitting.learnt_spans(found, h)
    if past is not None:
        given = engine.stretched_shares
        shares = {name: share for name, share in given.items() if name != "network"}
        shares["linear"] = shares.get("linear", 0.0) + given.get("network", 0.0)
        now, before = (combine.stretch(p.mixed(shares), p.target, levels, even=even) for p in (val, past))
        return (before / now) ** (past.spans / (val.spans + past.spans)), more
    if "theta" not in val.quantiles:
        return engine.plain, 0
    # Of few windows the next one is beyond all more often: for both alike.
    n, cuts = len(val.target), fitting.Cuts((found.begins // 2).clamp_min(1), found.begins - h)
    quantiles, targets = [val.quantiles["theta"]], [val.target]
    for batch, series in fitting.batches(found.windows, cuts, cuts.some(2 * n), engine.longest, h):
        quantiles += engine.members(batch, offsets(found.windows, series), ["theta"]).values()
        targets.append(batch.target)
    if len(targets) == 1:
        return engine.plain, 0
    whole = combine.stretch(torch.cat(quantiles), torch.cat(targets), levels, n, even)
    # Of late counts as much as ever.
    return (whole / combine.stretch(val.quantiles["theta"], val.target, levels, n, even)).sqrt(), more / 2


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
    new.floors = floors.learnt(panel) if new.config.floors else floors.Floors()
    new.notes.append(f"finetuned: linear path {told}")
    if report:
        report(new.notes[-1])
    _combine(new, found)
    return new
