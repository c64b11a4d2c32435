"""What members are judged by: their forecasts of the validation windows, and of windows before them that they did not learn from.

Validation is the end of the history, a horizon or a few; what is learnt from holds more of them. There a linear path that learnt
without a block of time forecasts that block, and what learns from its window alone forecasts anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exlstm.data.windows import Windows
from exlstm.forecast import arcsinh, combine, fitting, ridges

# Numbers of validation quantiles that weights and calibration are chosen by, windows at most and at least.
HELD, MOST, FEWEST = 8 * 10**6, 4096, 64
# What a span before validation counts beside one of validation, for it is of older times; all of them count as validation at
# most, or as so many spans where that has less.
EARLIER, LEAST = 0.5, 8.0
# Members that learn from their window alone.
ALONE = ("naive", "theta", "climatology")


def offsets(windows: Windows, series: Tensor) -> Tensor:
    """(B, 1): where the zero of each series lies in its units."""
    norms = torch.from_numpy(windows.norms).to(windows.device, torch.float32)
    return (-norms[:, 0] / norms[:, 1])[series][:, None]


@dataclass
class Judged:
    """W windows and what members forecast there."""

    quantiles: dict[str, Tensor]  # (W, H, Q) of every member
    target: Tensor  # (W, H)
    unit: Tensor  # (W, 1)
    scale: Tensor  # (W, 1) of the linear path
    moved: Tensor  # (W, 2)
    group: Tensor  # (W,) windows of one number say one thing
    series: Tensor  # (W,)
    worth: Tensor  # (W,) what a window counts
    spans: float = 0.0  # of validation, that they count as

    def residual(self, name: str) -> Tensor:
        """(W, H) in units of the window."""
        point = self.quantiles[name][..., self.quantiles[name].shape[-1] // 2]
        return (self.target - point) / self.scale

    def spread(self, name: str, spreads: dict[str, Tensor]):
        """Gives a member the spread of its residuals."""
        wide = self.scale * combine.width(self.moved, spreads[f"{name}.width"])
        self.quantiles[name] = self.quantiles[name] + wide[..., None] * spreads[name]

    def stacked(self, names: list[str]) -> Tensor:
        return torch.stack([self.quantiles[name] for name in names])

    def mixed(self, shares: dict[str, float]) -> Tensor:
        """(W, H, Q): the mean of members by their shares."""
        return torch.einsum("m,mwhq->whq", torch.tensor([*shares.values()]).to(self.target), self.stacked([*shares]))


def together(parts: list[Judged], names: list[str]) -> Judged:
    """The windows of all parts, with the members named."""
    columns = ("target", "unit", "scale", "moved", "group", "series", "worth")
    joined = {column: torch.cat([getattr(part, column) for part in parts]) for column in columns}
    return Judged({m: torch.cat([part.quantiles[m] for part in parts]) for m in names}, **joined)


def validation(engine, found: fitting.Split, names: list[str]) -> Judged:
    """The validation windows."""
    w, config = found.windows, engine.config
    val = found.val(config.horizon)
    made = len({*config.members} - {"climatology"})
    most = min(MOST, max(FEWEST, HELD // (config.horizon * len(engine.levels) * max(1, made))))
    numbers = val.some(most)
    n = engine.network is not None and engine.network.config.grouped and len(w.panel)
    if n:
        cuts = val.some(max(1, most // n) * n)[::n] // n
        numbers = (torch.arange(n, device=w.device) * int(val.counts[0]) + cuts[:, None] % int(val.counts[0])).flatten()
    held = _held(engine, found, *val.at(numbers), names, n or 0)
    held.spans = float(len(held.group.unique()))
    return held


def earlier(engine, found: fitting.Split, recipes: dict, val: Judged) -> Judged | None:
    """Windows before validation, without spreads; `recipes`: member -> (split, recipe) of the linear paths, which forecast
    blocks of time that they did not learn from. None where windows are too few to leave a block out."""
    points, most = {}, len(val.target)
    for name, recipe in recipes.items():
        if (out := ridges.out_of_fold(*recipe, engine.config, most)) is None:
            return None
        series, at, points[name] = out
    held = _held(
        engine, found, series, at, [m for m in val.quantiles if m in (*engine.made, "climatology") and m in ALONE], 0
    )
    if "arcsinh" in points:
        points["arcsinh"] = arcsinh.straight(points["arcsinh"], engine.bend)
    for name, point in points.items():
        held.quantiles[name] = point[..., None].expand(-1, -1, len(engine.levels))
    held.spans = min(EARLIER * fitting.learnt_spans(found, engine.config.horizon), max(val.spans, LEAST))
    known, here = ((~part.target.isnan()).sum().clamp_min(1) for part in (held, val))
    held.worth = held.worth * (held.spans / val.spans * here / known)
    return held


def _held(engine, found: fitting.Split, series: Tensor, at: Tensor, names: list[str], n: int) -> Judged:
    """The windows (series, at), forecast by every member named; `n` series at a time where they see each other."""
    w, h, gathered, rest = found.windows, engine.config.horizon, {m: [] for m in names}, []
    for part in torch.arange(len(at), device=w.device).split(max(n, 512 // n * n) if n else 512):
        s, cuts = series[part], at[part]
        batch = w.batch(s, cuts, engine.longest, h, dates="network" in names)
        for name, q in engine.members(batch, offsets(w, s), names, n or 1).items():
            gathered[name].append(q)
        scale = engine.linear.units(batch)[1]
        told = engine.moves(batch, scale), fitting.spans(found, s, cuts, h), s, torch.ones_like(scale[:, 0])
        rest.append((batch.target, found.unit[s], scale, *told))
    return Judged({m: torch.cat(q) for m, q in gathered.items()}, *(torch.cat(column) for column in zip(*rest)))
