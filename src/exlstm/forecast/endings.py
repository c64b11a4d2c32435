"""How the series of a panel end: rows of the future among their rows, last values that lack, and who ended before the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from exlstm.data import clock
from exlstm.data.panel import Panel
from exlstm.forecast import frames


def known(panel: Panel, values: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """(N,): of the last `drop` (N,) rows of every series so many, from the first of them on, hold all `values` (R, F)."""
    number = np.repeat(np.arange(len(panel)), panel.lengths)
    behind = np.arange(len(panel.y)) - (panel.offsets[1:] - drop)[number]
    first, lacking = np.array(drop), (behind >= 0) & np.isnan(values).any(1)
    np.minimum.at(first, number[lacking], behind[lacking])
    return first


def held_ahead(panel: Panel, horizon: int) -> tuple[tuple[str, ...], list[str]]:
    """Those of the covariates for the past that every series holds for a horizon behind its last target; and a sentence on
    those that are known for some of it."""
    names, told = panel.columns.hist, []
    alive, lacking = panel.lacking < panel.lengths, panel.lacking
    counts = {name: known(panel, panel.hist[:, [k]], lacking)[alive] for k, name in enumerate(names)}
    ahead = tuple(name for name in names if len(counts[name]) and counts[name].min() >= horizon)
    for name in names:
        if name not in ahead and counts[name].any():
            least = int(counts[name].argmin())
            whose = "" if len(panel) == 1 else f" of series {panel.ids[np.flatnonzero(alive)[least]]!r}"
            steps = f"{counts[name][least]} of the {horizon} steps of the horizon behind the last value{whose}"
            told.append(f"{name!r} is known for {steps}, which is too few, and is taken as known for the past only")
    return ahead, told


def parted(panel: Panel, horizon: int, most: int, together: bool) -> tuple[Panel, list[str]]:
    """The panel without rows of the future, and what is to be said of how its series end.

    Where every series has, behind its last target, a horizon of rows with all covariates known for the future, these are
    rows of the future: they leave the panel, which holds their covariates as `ahead` (N, most, F), the last one on and on.
    `together`: all series end at one time.
    """
    drop = panel.lacking
    if together or panel.wide:
        drop = np.full(len(panel), drop.min())
    counts, told = known(panel, panel.futr, drop), []
    if panel.columns.futr and counts.min() >= horizon:
        begin = panel.offsets[1:] - drop
        ahead = panel.futr[begin[:, None] + np.minimum(np.arange(most), counts[:, None] - 1)]
        panel = replace(panel.cut(drop), ahead=ahead)
        names, target = (
            ", ".join(map(repr, panel.columns.futr)),
            "a target" if panel.wide else repr(panel.columns.target),
        )
        rows = f"the last {drop[0]} rows, with {names} and without {target}," if len(panel) == 1 else ""
        rows = rows or f"the last rows of every series, with {names} and without {target},"
        told.append(f"{rows} are taken as the future: {_begins(panel, 0)}")
    if (lacking := panel.lacking).any():
        n = int(lacking.argmax())
        whose = f"{lacking[n]} values" if len(panel) == 1 else f"values of {(lacking > 0).sum()} series"
        more = "" if len(panel) == 1 else f", {lacking[n]} of series {panel.ids[n]!r}"
        told.append(f"the last {whose} are missing{more}: {_begins(panel, n)}, behind the last row")
    return panel, told + _ended(panel, horizon)


def _begins(panel: Panel, n: int) -> str:
    time = frames.shown(frames.ahead(panel, n, 1), panel)[0]
    return f"the forecast begins at {time}" if len(panel) == 1 else f"that of series {panel.ids[n]!r} begins at {time}"


def _ended(panel: Panel, horizon: int) -> list[str]:
    """A sentence on series whose whole forecast lies before the last row of another."""
    keys = list(zip(panel.first, panel.lengths.tolist()))
    ends = {key: clock.between(key[0], panel.freq, key[1] - 1, key[1])[0] for key in set(keys)}
    last = max(ends.values())
    early = {
        key for key in ends if clock.between(key[0], panel.freq, key[1] + horizon - 1, key[1] + horizon)[0] <= last
    }
    if not (found := [n for n, key in enumerate(keys) if key in early]):
        return []
    n = found[0]
    what = f"{len(found)} of {len(panel)} series ended more than a horizon before the others"
    return [f"{what}, and are forecast from their own ends on: {_begins(panel, n)}"]
