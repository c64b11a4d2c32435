"""Forecasting: spiky series have a linear path on the scale of arcsinh among their members, and tame ones have not."""

import numpy as np
import pytest
import torch

from exlstm import Forecaster
from exlstm.forecast import arcsinh
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")
SETTINGS = FitConfig(members=("naive", "linear", "arcsinh"), lookback=8)


def table(spiky: bool, seed=0):
    """A memory on a plain scale, or that memory blown up far from its mean."""
    draw, y = np.random.default_rng(seed), np.zeros(1500)
    for t in range(1, len(y)):
        y[t] = 0.9 * y[t - 1] + 0.6 * draw.normal()
    y = np.sinh(2 * y) if spiky else y
    return pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=len(y)), "y": y})


def test_there_and_back():
    y = torch.linspace(-50, 50, 101)
    assert torch.allclose(arcsinh.straight(arcsinh.bent(y, 0.3), 0.3), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(arcsinh.bent(y, 0.0), y)
    assert torch.equal(arcsinh.straight(y, 0.0), y)
    assert arcsinh.straight(torch.tensor([1e6]), 0.3).isfinite().all()


@pytest.mark.parametrize("spiky", [True, False])
def test_spiky_series_alone_have_it_and_are_saved_with_it(spiky, tmp_path):
    data = table(spiky)
    model = Forecaster(4, season=4, config=SETTINGS).fit(data.iloc[:1200])
    one = model.engine
    assert (one.bent is not None) == spiky
    assert ("arcsinh" in one.weights) == spiky
    if spiky:
        assert one.weights["arcsinh"] > 0.5
        assert one.scores["arcsinh"]["mae"] < 0.9 * one.scores["linear"]["mae"]
    else:
        # What is not made changes nothing.
        settings = FitConfig(members=("naive", "linear"), lookback=8)
        other = Forecaster(4, season=4, config=settings).fit(data.iloc[:1200])
        pd.testing.assert_frame_equal(other.predict(data), model.predict(data))
    model.save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    assert loaded.engine.bend == one.bend
    found = model.predict(data)
    pd.testing.assert_frame_equal(loaded.predict(data), found)
    columns = ["xLSTM-lo-95", "xLSTM-lo-80", "xLSTM", "xLSTM-hi-80", "xLSTM-hi-95"]
    assert (found[columns].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)


def test_a_stream_agrees():
    data = table(True)
    model = Forecaster(4, season=4, config=SETTINGS).fit(data.iloc[:1200])
    stream = model.on(data.iloc[:1200]).update(data.iloc[1200:1350])
    pd.testing.assert_frame_equal(stream.predict(), model.predict(data.iloc[:1350]))
