"""Spiky series on a scale that is straight near their mean and logarithmic far from it: b arcsinh(y / b).

The standard for electricity prices, which have spikes and no sign (Uniejewski, Weron and Ziel, 2018). A linear path learns on
that scale and its forecasts go back; it is a member of its own beside the plain one, made where a ridge gains from the scale
on validation, judged in the series' own units.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

# A normal deviation in median absolute values.
NORMAL = 1.4826
# Beyond so many bends nothing is told apart; keeps the way back finite.
MOST = 12.0


def bent(y: Tensor, bend: float) -> Tensor:
    return bend * torch.asinh(y / bend) if bend else y


def straight(y: Tensor, bend: float) -> Tensor:
    return bend * torch.sinh((y / bend).clamp(-MOST, MOST)) if bend else y


def bent_windows(windows, bend: float):
    """The windows with their target on the scale."""
    found = copy.copy(windows)
    found.around, found.bend = (bent(windows.around[0], bend), windows.around[1]), bend
    return found


def predict(path, batch, bend: float) -> Tensor:
    """(B, H): what a path of the scale makes of plain windows, in units of the series."""
    return straight(path.predict(batch._replace(y=bent(batch.y, bend))), bend)


def bent_split(found):
    """The split on the scale whose bend is where half of what is learnt from lies, had it a normal's tails."""
    w = found.windows
    parts = [w.y[a : a + n] for a, n in zip(w.starts.tolist(), found.begins.tolist())]
    y = torch.cat(parts).abs()
    bend = NORMAL * float(y[:: max(1, len(y) // 10**6)].median())
    return replace(found, windows=bent_windows(w, max(bend, 0.05)))
