"""Forecasting: on panels of every kind the blend stays by the best of its members, whichever that is, on steps not seen."""

import functools

import numpy as np
import pytest
import torch

from exlstm.forecast import engine
from exlstm.forecast.config import FitConfig
from forecast_panels import PANELS, panel

pytest.importorskip("pandas")
MEMBERS = ("naive", "theta", "linear")
# Panels of long series take seconds each.
SHORT = [name for name in PANELS if not name.endswith(("daily", "hourly", "weekly"))]
# What a member's luck in one seed may make of it.
LUCK = 0.1


@functools.cache
def errors(name: str, seed: int = 0) -> dict[str, float]:
    """MASE of the blend and of its members on the last horizon, which none has seen."""
    whole, season, horizon = panel(name, seed)
    config = FitConfig(horizon=horizon, members=MEMBERS)
    fitted = engine.fit(whole.cut(horizon), config, season)
    assert sum(fitted.weights.values()) == pytest.approx(1)
    series, ends = torch.arange(len(whole)), torch.from_numpy(whole.lengths - horizon)
    found, truth, windows = {}, [], fitted.windows(whole)
    for _, out, batch in fitted.forecast(windows, series, ends, MEMBERS):
        truth.append(batch.target)
        for member, q in out.items():
            found.setdefault(member, []).append(q[..., len(engine.LEVELS) // 2])
    parts = [whole.y[a : b - horizon] for a, b in zip(whole.offsets[:-1], whole.offsets[1:])]
    moved = np.array([np.abs(y[season:] - y[:-season]).mean() for y in parts]) / windows.norms[:, 1]
    off = {member: (torch.cat(q) - torch.cat(truth)).abs().mean(1).numpy() for member, q in found.items()}
    return {member: float((x[moved > 1e-6] / moved[moved > 1e-6]).mean()) for member, x in off.items()}


@pytest.mark.parametrize("name", [name for name in SHORT if name != "season without noise, monthly"])
def test_the_blend_stays_by_its_best_member(name):
    found = errors(name)
    best = min(found[member] for member in MEMBERS)
    assert found["blend"] < (1 + LUCK) * best
    # Better than naive where there is something to learn; next to it on walks, where there is nothing.
    assert found["blend"] < (1.03 if "walks, yearly" in name else 0.95) * found["naive"]


def test_over_all_panels_the_blend_is_as_good_as_the_best_member_of_each():
    rows = [errors(name) for name in SHORT if name != "season without noise, monthly"]
    ratios = [row["blend"] / min(row[member] for member in MEMBERS) for row in rows]
    assert np.exp(np.log(ratios).mean()) < 1.02


def test_a_member_that_is_exact_is_taken():
    """Seasons without noise: the value one season before is the truth."""
    whole, season, horizon = panel("season without noise, monthly")
    fitted = engine.fit(whole.cut(horizon), FitConfig(horizon=horizon, members=MEMBERS), season)
    assert fitted.weights["naive"] == 1
