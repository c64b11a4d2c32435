"""Forecasting: nothing is forecast below the floor of a series, and series of mostly zeros have the quantiles of their past."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from exlstm import Forecaster
from exlstm.data.series import panel_of
from exlstm.data.windows import Windows
from exlstm.forecast import baselines, floors
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")
CLOSED = ("naive", "theta", "linear", "arcsinh", "climatology")
SETTINGS = FitConfig(members=CLOSED, max_lookback=28)


def counts(draw, t):
    return draw.poisson(1 + np.sin(2 * np.pi * t / 7)).astype(float)


def sold(draw, t):
    return draw.poisson(0.3 * draw.gamma(0.5, 2, len(t))).astype(float)


def nights(draw, t):
    return np.clip(5 * np.sin(2 * np.pi * t / 7 + 0.3) + draw.normal(0, 1, len(t)), 0, None)


def tame(draw, t):
    return 3 * np.sin(2 * np.pi * t / 7) + draw.normal(0, 1, len(t))


def fallen(draw, t):
    return np.where(t < 100, 10000 + tame(draw, t), 0)


def gaps(draw, t):
    return np.where(draw.random(len(t)) < 0.2, np.nan, sold(draw, t))


def never(draw, t):
    return np.zeros(len(t))


# What the series are -> how they are made, and the least that may be forecast. The nights of the fourth are as those of a panel
# in deviations, whose zero is elsewhere.
KINDS = {
    "counts": (counts, 0.0),
    "intermittent": (sold, 0.0),
    "gaps": (gaps, 0.0),
    "nights": (lambda draw, t: (nights(draw, t) - 2) / 3, -2 / 3),
    "far above zero": (lambda draw, t: 1000 + tame(draw, t), 0.0),
    "fallen to zero": (fallen, 0.0),
    "tame": (tame, None),
    "never sold": (never, 0.0),
}


def table(kind: str, seed=0, n=12, days=150):
    """`n` daily series of one kind."""
    draw, t = np.random.default_rng(seed), np.arange(days)
    columns = {f"s{k}": KINDS[kind][0](draw, t) for k in range(n)}
    return pd.DataFrame(columns, index=pd.date_range("2024-01-01", periods=days))


def wide(frame):
    return frame.drop(columns=["unique_id", "ds", "cutoff", "y"], errors="ignore")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_forecast_below_the_floor(kind, tmp_path):
    data, low = table(kind), KINDS[kind][1]
    model = Forecaster(14, config=SETTINGS).fit(data.iloc[:-14])
    floor = [model.engine.floors.known.get(name, model.engine.floors.others) for name in model.panel.ids]
    assert floor == [low] * 12
    found = model.predict(level=[50, 80, 95, 99])
    assert np.isfinite(wide(found)).all(axis=None)
    if low is None:
        assert (wide(found) < data.min().min()).any(axis=None)
    else:
        assert wide(found).min(axis=None) >= low
        assert wide(model.cross_validation(data, n_windows=2)).min(axis=None) >= low
    model.save(tmp_path / "model")
    pd.testing.assert_frame_equal(Forecaster.load(tmp_path / "model").predict(level=[50, 80, 95, 99]), found)
    stream = model.on(data.iloc[:-14]).update(data.iloc[-14:])
    pd.testing.assert_frame_equal(stream.predict(), model.predict(data))


def test_one_negative_value_leaves_no_floor_but_what_stands_there_often():
    data = table("counts")
    data.iloc[3, 0] = -1.0
    found = floors.learnt(panel_of(data))
    assert found.others is None and found.known["s1"] == 0.0 and "s0" not in found.known
    data.iloc[3, :] = -1.0
    assert floors.learnt(panel_of(data)) == floors.Floors()


def test_a_window_below_the_floor_has_its_own_least():
    data = table("counts")
    model = Forecaster(14, config=SETTINGS).fit(data)
    later = data.copy()
    later.iloc[-3:] -= 4.0
    lowest = wide(model.predict(later)).min(axis=None)
    assert -4.0 <= lowest < -1.0


def test_a_floor_is_said_and_may_be_left_out():
    data = table("counts")
    model = Forecaster(14, config=SETTINGS).fit(data)
    assert "nothing is forecast below zero, for no value is negative" in model.engine.notes
    free = Forecaster(14, config=replace(SETTINGS, floors=False)).fit(data)
    assert free.engine.floors == floors.Floors() and not [note for note in free.engine.notes if "below" in note]
    assert wide(free.predict(level=[95])).min(axis=None) < 0
    data.iloc[3, 0] = -1.0
    told = Forecaster(14, config=SETTINGS).fit(data).engine.notes
    assert "11 series are not forecast below their least value, at which they often stand" in told


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["intermittent", "gaps"])
def test_mostly_zeros_have_the_quantiles_of_their_past(kind, seed):
    """On the old members the median of such series is about their mean, and worse than no sale at all."""
    data = table(kind, seed, n=60)
    model = Forecaster(14, config=SETTINGS).fit(data.iloc[:-14])
    assert model.engine.weights["climatology"] > 0.5
    found = model.predict()
    true = data.iloc[-14:].T.to_numpy().ravel()
    order = found.assign(n=found["unique_id"].str[1:].astype(int)).sort_values(["n", "ds"])
    known = ~np.isnan(true)
    error = np.abs(order["xLSTM"].to_numpy() - true)[known].mean()
    assert error <= 1.02 * np.abs(true[known]).mean()
    # At least, for many values are equal.
    assert (true[known] <= order["xLSTM-hi-80"].to_numpy()[known]).mean() > 0.85


@pytest.mark.parametrize("kind", ["tame", "far above zero"])
def test_others_have_not_and_are_what_they_were(kind):
    data = table(kind)
    model = Forecaster(14, config=SETTINGS).fit(data)
    assert "climatology" not in model.engine.weights
    plain = FitConfig(members=CLOSED[:-1], max_lookback=28)
    pd.testing.assert_frame_equal(model.predict(), Forecaster(14, config=plain).fit(data).predict())


def test_squared_errors_go_by_no_quantiles():
    model = Forecaster(14, config=FitConfig(members=CLOSED, max_lookback=28, metric="mse")).fit(table("intermittent"))
    assert "climatology" not in model.engine.weights


def test_climatology_is_the_quantiles_of_what_was_seen():
    data = table("gaps", n=3)
    data.iloc[-40:, 2] = np.nan
    w = Windows(panel_of(data), 7).with_calendar(5)
    batch, levels = w.batch(*w.ends(), 40, 5), torch.tensor([0.1, 0.5, 0.9])
    found = baselines.climatology(batch, 5, levels)
    assert found.shape == (3, 5, 3)
    assert torch.equal(found, found[:, :1].expand_as(found))
    for n in range(2):
        seen = batch.y[n][batch.seen[n]]
        assert torch.allclose(found[n, 0], seen.quantile(levels))
    assert torch.equal(found[2, 0], batch.y[2, -1].expand(3))
