"""The floor of a series: what all of its values lie on or above, so that no quantile of a forecast lies below it.

A tenth of all values at the least one is no chance: nights without sun, days without rain or a sale, a line not yet switched
on. And where no value of any series is below zero, zero is the floor of all of them. A window that has seen less than the
floor has the least that it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from exlstm.data.panel import Panel

# Share of the values at the least one, and their number, from which on that is a floor.
OFTEN, FEW = 0.1, 8


@dataclass(frozen=True)
class Floors:
    """Floors in units of the data; None: there is none."""

    known: dict = field(default_factory=dict)  # series -> its floor, where it is not that of the others
    others: float | None = None

    def among(self, panel: Panel) -> np.ndarray:
        """(N,): the floors of all series of a panel in units of the data; where there is none, minus infinity."""
        low = np.array([self.known.get(name, self.others) for name in panel.ids], dtype=np.float64)
        return np.where(np.isnan(low), -np.inf, low)

    def of(self, windows) -> Tensor:
        """(N,): the floors of all series of `windows` in their units."""
        mean, scale = windows.norms.T
        low = (self.among(windows.panel) - mean) / scale
        return torch.from_numpy(low.astype(np.float32)).to(windows.device)


def learnt(panel: Panel) -> Floors:
    """The floors that the values of a panel speak for."""
    parts = (panel.y[a:b] for a, b in zip(panel.offsets[:-1], panel.offsets[1:]))
    values = {name: y[~np.isnan(y)] for name, y in zip(panel.ids, parts)}
    least = {name: float(y.min()) for name, y in values.items() if len(y)}
    if least and min(least.values()) >= 0:
        return Floors(others=0.0)
    often = {name for name, low in least.items() if (values[name] == low).sum() >= max(FEW, OFTEN * len(values[name]))}
    return Floors({name: low for name, low in least.items() if name in often})


def told(floors: Floors) -> str:
    """What is to be said of them; empty where there is none."""
    if floors.others is not None:
        return "nothing is forecast below zero, for no value is negative"
    if not floors.known:
        return ""
    return f"{len(floors.known)} series are not forecast below their least value, at which they often stand"


def under(batch, floor: Tensor) -> Tensor:
    """(B, 1): the floors (B,) of windows, none above what they have seen."""
    return torch.minimum(floor, torch.where(batch.seen, batch.y, torch.inf).amin(1))[:, None]
