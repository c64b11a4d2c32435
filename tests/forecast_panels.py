"""Panels out of a seed, of the kinds that benchmarks of forecasts hold: what each can and cannot be learnt from is known."""

from __future__ import annotations

import numpy as np

from exlstm.data.series import panel_of


def _walk(draw, steps, drift=0.0, start=100.0):
    return start + (drift + draw.normal(size=steps)).cumsum()


def _wave(draw, steps, season, size=3.0):
    """A season of three harmonics of random size and phase."""
    t, k = np.arange(steps)[:, None], np.arange(1, 4)
    waves = np.sin(2 * np.pi * k * t / season + draw.uniform(0, 2 * np.pi, 3)) * draw.uniform(0.3, 1, 3) / k
    return size * waves.sum(1)


def _memory(draw, steps, share=0.7):
    y, noise = np.zeros(steps), draw.normal(size=steps)
    for t in range(1, steps):
        y[t] = share * y[t - 1] + noise[t]
    return y


def _counts(draw, steps, rate=0.4):
    return np.where(draw.random(steps) < rate, draw.poisson(3, steps), 0).astype(float)


def _shifts(draw, steps):
    return (draw.normal(size=steps) * 6 * (draw.random(steps) < 0.03)).cumsum() + draw.normal(size=steps) + 50


def _growing(draw, steps, season):
    """Season and noise grow with the level."""
    level = 50 * np.exp(draw.uniform(0.2, 1.2) * np.arange(steps) / steps)
    return level * (1 + 0.1 * _wave(draw, steps, season, 2.0)) * np.exp(0.03 * draw.normal(size=steps))


def _trend(draw, steps, size=1.0):
    return 20 + draw.normal() * np.arange(steps) + size * 3 * _memory(draw, steps, 0.3)


def _scaled(draw, steps):
    return 10.0 ** draw.uniform(-3, 9) * (10 + _wave(draw, steps, 12) + _memory(draw, steps))


def _many(n, low, high, make):
    """n series of low to high steps, each of a draw of its own."""

    def made(draw):
        return [make(np.random.default_rng(draw.integers(2**32)), int(draw.integers(low, high + 1))) for _ in range(n)]

    return made


def _drowned(draw):
    """Counts, and one series of 1e12 that is its season to the last digit."""
    return [*_many(60, 72, 72, _counts)(draw), 1e12 * (2 + np.sin(2 * np.pi * np.arange(72) / 12))]


# name -> (season, horizon, series out of a generator)
PANELS = {
    "walks, yearly": (1, 6, _many(181, 15, 52, _walk)),
    "walks with drift, yearly": (1, 6, _many(181, 15, 52, lambda d, n: _walk(d, n, 0.5 * d.normal() + 0.3))),
    "few walks, yearly": (1, 4, _many(20, 30, 30, _walk)),
    "walks, monthly": (12, 12, _many(60, 60, 140, _walk)),
    "walks with a week, daily": (7, 30, _many(8, 900, 900, lambda d, n: _walk(d, n) + _wave(d, n, 7))),
    "walks, daily": (7, 30, _many(8, 1500, 1500, _walk)),
    "walks, one clock, quarterly": (4, 8, _many(50, 48, 48, _walk)),
    "season, monthly": (12, 12, _many(80, 72, 140, lambda d, n: 20 + _wave(d, n, 12) + _memory(d, n))),
    "growing season, quarterly": (4, 8, _many(100, 30, 80, lambda d, n: _growing(d, n, 4))),
    "growing season, monthly": (12, 12, _many(60, 60, 140, lambda d, n: _growing(d, n, 12))),
    "season, weekly": (52, 13, _many(20, 260, 400, lambda d, n: 30 + _wave(d, n, 52, 5) + _walk(d, n, 0, 0) * 0.3)),
    "season, daily": (7, 30, _many(15, 500, 700, lambda d, n: 30 + _wave(d, n, 7) + _memory(d, n))),
    "season, hourly": (24, 48, _many(4, 1500, 1500, lambda d, n: _wave(d, n, 24, 5) + _memory(d, n, 0.9))),
    "season without noise, monthly": (12, 12, _many(30, 72, 72, lambda d, n: 30 + _wave(d, n, 12))),
    "one season, monthly": (12, 12, _many(1, 144, 144, lambda d, n: _growing(d, n, 12))),
    "counts, monthly": (12, 12, _many(150, 51, 51, _counts)),
    "counts, daily": (7, 28, _many(40, 300, 500, _counts)),
    "shifts, monthly": (12, 12, _many(60, 80, 140, _shifts)),
    "shifts, daily": (7, 14, _many(20, 400, 400, _shifts)),
    "trends, yearly": (1, 6, _many(150, 18, 45, _trend)),
    "trends, quarterly": (4, 8, _many(80, 30, 60, _trend)),
    "noise, monthly": (12, 12, _many(60, 60, 120, lambda d, n: 10 + d.normal(size=n))),
    "memory, daily": (7, 14, _many(20, 400, 600, lambda d, n: 10 + _memory(d, n, 0.9))),
    "scales, monthly": (12, 12, _many(60, 72, 140, _scaled)),
    "counts and one of 1e12, monthly": (12, 12, _drowned),
}


def panel(name: str, seed: int = 0):
    """(panel, season, horizon) of a row of PANELS."""
    season, horizon, make = PANELS[name]
    return panel_of(make(np.random.default_rng([seed, *map(ord, name)]))), season, horizon
