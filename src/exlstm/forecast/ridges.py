"""The linear path of a fitted forecaster: a mean of ridges over many look-backs, and what single series add of their own.

No look-back is chosen: validation is too short to tell them apart. Each has the strength that validation gives it and counts
by its length and by exp(-(its error over the least - 1) / SOFT). Every look-back is there twice, drawn to the level of
the window and to the pattern of its season. The mean is one linear map (models/linear.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exlstm.forecast.arcsinh import bent_split, straight
from exlstm.forecast.combine import backed
from exlstm.forecast.config import FitConfig
from exlstm.forecast.fitting import CHOOSE_BY, Split, batches, lookbacks, spans, window_errors
from exlstm.models.config import LinearConfig
from exlstm.models.linear import Gram, LinearPath
from exlstm.train.progress import Pace

ALPHAS = tuple(10.0**k for k in range(-6, 2))
# Windows that a choice learns from, and numbers of targets that it is judged by; windows that a fit learns from at most, those of
# long series without a gap apart, of which it takes all.
CHOOSE_FROM, JUDGED, EVERY = 24576, 2**20, 10**7
# Products of numbers from which on sums over a stretch are quicker without windows.
WORTH = 10**7
# What a choice has to gain on validation; less may well be chance.
GAIN, SCALE_GAIN = 0.01, 0.03
# What the scale of arcsinh has to gain: spikes give far more, and up to 9 % have turned into losses later.
BEND_GAIN = 0.1
# Excess of the error over the least one at which a look-back counts a third of what it would.
SOFT = 0.1
# Numbers that the linear path sees at most.
WIDEST = 1500
# Share of windows with whole targets below which others teach too, their gaps filled; windows that it is counted by.
WHOLE, COUNTED = 0.5, 4096
# Windows at least for every number seen, where less than all are to teach something; numbers of own weights at most.
ENOUGH, MOST = 16, 2**24
# Blocks in time that are left out in turn, for forecasts of what was not learnt from; windows for every number seen at least.
BLOCKS, FEW = 5, 8
# Shares of them that are tried. Validation, which chose them too, speaks too well of them: half of its share is taken.
SHARES, HALF = (0.25, 0.5, 0.75, 1.0), 0.5


@dataclass(frozen=True)
class Part:
    """One ridge of a mean: steps it sees, its strength, its share."""

    lookback: int
    alpha: float
    share: float
    season: int = 0
    """of the pattern that it is drawn to, counted from the last value; 0: to the level of the path"""
    constant: bool = True
    """whether it adds a number that is the same for all windows: the mean move of what was learnt from"""


@dataclass(frozen=True)
class Recipe:
    """Everything about a linear path but its weights."""

    settings: LinearConfig
    parts: tuple[Part, ...]
    single: Part
    """the one ridge that stands beside it as a baseline: the longest look-back within GAIN of the least error"""
    own: tuple[tuple[Part, ...], ...] = ()
    share: float = 0.0
    """of every series' own mean of ridges, the rest is that of all"""


@dataclass
class Held:
    """Validation windows as a linear path sees them."""

    x: Tensor  # (W, features)
    level: Tensor  # (W, 1)
    scale: Tensor  # (W, 1)
    target: Tensor  # (W, H)
    unit: Tensor  # (W, 1)
    series: Tensor  # (W,)
    group: Tensor  # (W,) windows that say one thing (fitting.spans)
    metric: str
    bend: float = 0.0

    def error(self, mapped: Tensor) -> float:
        """The error by the metric of forecasts (W, H) in units of the windows."""
        total, count = (x.sum() for x in self.errors(mapped))
        return float((total / count).nan_to_num(math.inf))

    def errors(self, mapped: Tensor) -> tuple[Tensor, Tensor]:
        """(W,) twice: the error of every window, and the number of its targets."""
        point, target = (straight(x, self.bend) for x in (self.level + self.scale * mapped, self.target))
        return window_errors(point, target, self.unit, self.metric)

    def of(self, series: int) -> Held:
        """The windows of one series."""
        at = self.series == series
        columns = (self.x, self.level, self.scale, self.target, self.unit, self.series, self.group)
        return Held(*(column[at] for column in columns), self.metric, self.bend)


@dataclass
class Trial:
    """A recipe and its error on validation, in all and by window."""

    recipe: Recipe
    error: float
    errors: Tensor  # (W,) of the validation windows
    count: Tensor  # (W,) targets of each
    rows: list[tuple[float, Part, Tensor]]
    """every ridge of it: error, the ridge, its map"""
    gram: Gram
    held: Held


def choose(found: Split, config: FitConfig, say=None) -> tuple[LinearPath, LinearPath, Recipe, int]:
    """(linear path, single ridge, recipe, settings tried), chosen by validation error and fitted to what is learnt from; `say`
    (a function of a text) hears how far it is.

    A window's own scale has to gain SCALE_GAIN over the series', other additions GAIN: choices that gain less do not carry
    over to later data. The last value as the level also has to gain more than chance. Ridges drawn to the season come in where
    they do no harm.
    """
    w, h = found.windows, config.horizon
    n_past, n_future = w.hist.shape[1] + w.futr.shape[1], w.futr.shape[1]
    ahead = n_future if h * n_future <= WIDEST else 0
    looks = lookbacks(config, w.season, found.begins)
    longest = looks[-1]
    # Steps of the past covariates that fit in beside everything else.
    room = max(1, (WIDEST - longest - h * ahead) // n_past) if n_past else 0
    past = min(longest, 2 * max(h, w.season), room)
    plain = LinearConfig(h, longest, past, n_past, ahead, 0, "mean", "series")
    # A window's own scale is that of all its steps, or of the root of shortest times longest: what it is like now.
    late = (round((looks[0] * longest) ** 0.5), 0)
    # The fit at the end, of all windows, is taken for two.
    tries = 3 + 1 + bool(w.n_dates) + 3 * bool(n_past) + 1
    pace = Pace("linear path, settings", tries + 2, say)
    best = _attempt(found, plain, looks, config)
    pace.add()
    others = (_attempt(found, replace(plain, scale="window", lately=steps), looks, config) for steps in late)
    other = min(others, key=lambda trial: trial.error)
    pace.add(2)
    best = other if other.error < best.error * (1 - SCALE_GAIN) else best
    changes = [({"center": "last"}, GAIN)]
    if w.n_dates:
        changes.append(({"n_dates": w.n_dates}, GAIN))
    if n_past:
        changes += [({"past": min(longest, room)}, GAIN), ({"past": max(1, past // 4)}, 0.0)]
        changes += [({"past": 0, "n_past": 0, "n_future": 0}, 0.0)]
    for change, gain in changes:
        row = _attempt(found, replace(best.recipe.settings, **change), looks, config)
        pace.add()
        # Windows are counted from another level only where that is more than chance.
        sure = "center" not in change or backed(best.errors - row.errors, row.count, row.held.group) > 0
        best = row if sure and row.error < best.error * (1 - gain) else best
    # The pattern of a season wants whole windows.
    best = _with_season(best, looks, w.season) if int(found.begins.min()) >= longest else best
    pace.add()
    recipe = _with_own(found, best.recipe, looks, config, say)
    return *fit(found, recipe, config, whole=False), recipe, tries


def choose_bent(found: Split, recipe: Recipe, config: FitConfig) -> tuple[Split, Recipe] | None:
    """The split on the scale of arcsinh and a recipe with the settings of the plain one, where a ridge of the longest look-back
    gains BEND_GAIN from it and more than chance."""
    other, settings = bent_split(found), replace(recipe.settings, own=0)
    plain, bent = (_attempt(split, settings, [settings.lookback], config) for split in (found, other))
    sure = backed(plain.errors - bent.errors, plain.count, plain.held.group)
    if bent.error > plain.error * (1 - BEND_GAIN) or not sure:
        return None
    looks = sorted({part.lookback for part in recipe.parts})
    return other, _attempt(other, settings, looks, config).recipe


def fit(
    found: Split, recipe: Recipe, config: FitConfig, whole: bool, without: tuple[int, int] | None = None
) -> tuple[LinearPath, LinearPath]:
    """The linear path of a recipe and its single ridge, from all windows to learn from, or from some of them
    `without` the block k of n in time."""
    path, ridge = LinearPath(recipe.settings, found.windows.device), LinearPath(recipe.settings, found.windows.device)
    most = CHOOSE_FROM if without else EVERY
    grams = _grams(found, path, config, most, whole, bool(recipe.own), without)
    gram = grams[0].plus(grams[1:])
    path.weight.copy_(_mean(gram, recipe.parts))
    ridge.weight.copy_(_mean(gram, (recipe.single,)))
    for n, parts in enumerate(recipe.own):
        path.own[n] = recipe.share * (_mean(grams[n], parts) - path.weight)
    if ridge.own is not None:
        ridge = _without_own(ridge)
    return path, ridge


def _without_own(path: LinearPath) -> LinearPath:
    plain = LinearPath(replace(path.config, own=0), path.weight.device)
    plain.weight.copy_(path.weight)
    return plain


def _mean(gram: Gram, parts: tuple[Part, ...]) -> Tensor:
    maps = (gram.solve([p.alpha], p.lookback, p.season, [p.constant])[0] for p in parts)
    return sum(part.share * map for part, map in zip(parts, maps))


def out_of_fold(found: Split, recipe: Recipe, config: FitConfig, most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(series, cuts, forecast (W, H)) of windows to learn from, forecast by a path that learnt without their block in time,
    as many for their time as validation has, twice as many at most: as honest as those of validation, of other times.

    None where windows are few: a block less would make a worse path.
    """
    h, longest = config.horizon, max(recipe.settings.lookback, recipe.settings.past)
    cuts = found.train(longest, h)
    if cuts.total < FEW * recipe.settings.features:
        return None
    span = (found.windows.lengths - found.begins).sum().clamp_min(1)
    numbers = cuts.some(max(1, int(min(2 * most, most * (found.begins.sum() / span)))))
    # Own weights stand only where half of the windows is plenty.
    blocks = 2 if recipe.own else BLOCKS
    block, points = _block(cuts, numbers, blocks), torch.empty(len(numbers), h, device=found.windows.device)
    for k in range(blocks):
        path, _ = fit(found, recipe, config, whole=False, without=(k, blocks))
        mine = numbers[block == k]
        made = [path.predict(batch) for batch, _ in batches(found.windows, cuts, mine, longest, h)]
        points[block == k] = torch.cat([points[:0], *made])
    return *cuts.at(numbers), points


def _block(cuts, numbers: Tensor, blocks: int) -> Tensor:
    """(W,): which of as many blocks in time of their series the windows lie in."""
    series, at = cuts.at(numbers)
    return (at - cuts.first[series]) * blocks // (cuts.stride[series] * cuts.counts[series])


def _grams(
    found: Split, path: LinearPath, config: FitConfig, most: int, whole=False, apart=False, without=None
) -> list[Gram]:
    """The sums of at most `most` windows to learn from, without block k of n if it says so, of every series or of all."""
    w, longest = found.windows, max(path.config.lookback, path.config.past)
    cuts = found.train(longest, config.horizon, whole)
    numbers = cuts.some(most)
    if without:
        numbers = numbers[_block(cuts, numbers, without[1]) != without[0]]
    some = numbers[:: max(1, len(numbers) // COUNTED)].contiguous()
    filled = bool(w.whole(*cuts.at(some), config.horizon).float().mean() < WHOLE)
    grams = [Gram(path) for _ in range(len(w.panel) if apart else 1)]
    stretches = ([], [], [])
    if most >= EVERY and grams[0].takes_stretches:
        # Of long stretches without a gap all windows are summed at once.
        seen = longest + config.horizon
        stretches = w.stretches(cuts, longest, config.horizon, max(seen // 4, WORTH // (longest * seen)))
        covered = torch.zeros(cuts.total, dtype=torch.bool)
        for n, first, count in zip(*stretches):
            begin = int(cuts.ends[n] - cuts.counts[n]) + first - int(cuts.first[n])
            covered[begin : begin + count] = True
        numbers = numbers[~covered.to(w.device)[numbers]]
    owner = cuts.at(numbers)[0]
    for k, gram in enumerate(grams):
        own = [piece for piece in zip(*stretches) if piece[0] == k or not apart]
        gram.add_stretches(w.stretch(*piece, longest, config.horizon) for piece in own)
        mine = numbers[owner == k] if apart else numbers
        for batch, _ in batches(w, cuts, mine, longest, config.horizon, filled=filled):
            gram.add(batch)
    return grams


def _held(found: Split, path: LinearPath, config: FitConfig) -> Held:
    h, longest = config.horizon, max(path.config.lookback, path.config.past)
    val, columns = found.val(h), []
    for part in val.some(min(CHOOSE_BY, max(256, JUDGED // h))).split(2048):
        series, at = val.at(part)
        batch = found.windows.batch(series, at, longest, h, dates=False)
        level, scale = path.units(batch)
        x = path.features(batch, level, scale)
        columns.append((x, level, scale, batch.target, found.unit[series], series, spans(found, series, at, h)))
    return Held(*(torch.cat(column) for column in zip(*columns)), config.metric, found.windows.bend)


def _rows(gram: Gram, held: Held, looks: list[int], season: int = 0) -> list[tuple[float, Part, Tensor]]:
    """Of every look-back the ridge with its best strength, with and without the constant: its error, itself, and its map."""
    rows, n = [], len(ALPHAS)
    for look in looks:
        solved = gram.solve(ALPHAS, look, season, (True, False))
        for constant, maps in zip((True, False), (solved[:n], solved[n:])):
            error, k = min((held.error(held.x @ weight), k) for k, weight in enumerate(maps))
            rows.append((error, Part(look, ALPHAS[k], 1.0, season, constant), maps[k]))
    return rows


def _mixed(rows: list[tuple[float, Part, Tensor]]) -> tuple[tuple[Part, ...], Tensor]:
    """The mean of ridges and its map."""
    least = max(min(error for error, _, _ in rows), 1e-12)
    shares = [part.lookback * math.exp(-(min(error / least, 1e3) - 1) / SOFT) for error, part, _ in rows]
    total = sum(shares)
    parts = tuple(replace(part, share=share / total) for share, (_, part, _) in zip(shares, rows))
    return parts, sum(part.share * weight for part, (_, _, weight) in zip(parts, rows))


def _attempt(found: Split, settings: LinearConfig, looks: list[int], config: FitConfig) -> Trial:
    path = LinearPath(settings, found.windows.device)
    held = _held(found, path, config)
    gram = _grams(found, path, config, CHOOSE_FROM)[0]
    rows = _rows(gram, held, looks)
    usual = [(error, part) for error, part, _ in rows if part.constant]
    least = min(error for error, _ in usual)
    near = [part for error, part in usual if error <= least * (1 + GAIN)] or [usual[0][1]]
    return _trial(settings, near[-1], rows, gram, held)


def _trial(settings: LinearConfig, single: Part, rows: list, gram: Gram, held: Held) -> Trial:
    parts, weight = _mixed(rows)
    mapped = held.x @ weight
    return Trial(Recipe(settings, parts, single), held.error(mapped), *held.errors(mapped), rows, gram, held)


def _with_season(trial: Trial, looks: list[int], season: int) -> Trial:
    """A trial with as many ridges again that are drawn to the pattern of the season, where that is no worse."""
    rows = trial.rows + _rows(trial.gram, trial.held, looks, season)
    both = _trial(trial.recipe.settings, trial.recipe.single, rows, trial.gram, trial.held)
    return both if both.error <= trial.error else trial


def _with_own(found: Split, recipe: Recipe, looks: list[int], config: FitConfig, say=None) -> Recipe:
    """The recipe with a share of every series' own weights, where all are long, few, and the share gains GAIN."""
    w, settings = found.windows, recipe.settings
    n, features = len(w.panel), settings.features
    counts = found.train(max(settings.lookback, settings.past), config.horizon).counts
    if n < 2 or n * features * max(features, settings.horizon) > MOST or int(counts.min()) < ENOUGH * features:
        return recipe
    path = LinearPath(settings, w.device)
    held, grams = _held(found, path, config), _grams(found, path, config, EVERY, apart=True)
    pieces = [held.of(k) for k in range(n)]
    if not all(len(piece.x) for piece in pieces):
        return recipe
    pooled = _mean(grams[0].plus(grams[1:]), recipe.parts)
    own, pace = [], Pace("own weights, series", n, say)
    for gram, piece in zip(grams, pieces):
        own.append(_mixed(_rows(gram, piece, looks)))
        pace.add()
    base = held.x @ pooled
    away = torch.zeros_like(base)
    for k, (_, weight) in enumerate(own):
        at = held.series == k
        away[at] = held.x[at] @ (weight - pooled)
    before = held.error(base)
    error, share = min((held.error(base + share * away), share) for share in SHARES)
    if error > before * (1 - GAIN):
        return recipe
    settings = replace(settings, own=n)
    return replace(recipe, settings=settings, own=tuple(parts for parts, _ in own), share=HALF * share)
