"""The network of a forecast where there are covariates: the latest steps read at once, beside the patches."""

import numpy as np
import pytest

from exlstm import Forecaster
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")


def products(steps=3000):
    """What two covariates do together, which no linear path can tell."""
    draw = np.random.default_rng(0)
    a, b = draw.choice([-1.0, 1.0], (2, steps))
    dates = pd.date_range("2024-01-01", periods=steps)
    return pd.DataFrame({"ds": dates, "y": 10 + 3 * a * b + draw.normal(0, 0.1, steps), "a": a, "b": b})


@pytest.mark.parametrize("known", ["future", "past"])
def test_a_network_reads_what_covariates_do_together(known, tmp_path):
    data = products()
    if known == "past":
        # The product of today is the value of the day after tomorrow.
        data["y"] = data.y.shift(2).bfill()
    h = 3 if known == "future" else 2
    role = {"futr_exog": ["a", "b"]} if known == "future" else {"hist_exog": ["a", "b"]}
    config = FitConfig(
        steps=250, lr=3e-3, d_model=8, n_layers=1, n_heads=2, max_lookback=14, members=("linear", "network")
    )
    model = Forecaster(h, config=config, **role).fit(data.iloc[:-h])
    skill = model.skill().set_index("model")
    assert skill.mae["Network"] < 0.3 * skill.mae["LinearPath"] and skill.weight["Network"] > 0.7
    network = model.engine.network
    assert network.config.recent == 14 and network.recent.out.weight.abs().sum() > 0
    alone = network.config.design == "recent"
    assert alone == (not network.head.weight.any()), "patches that gain nothing are left out, and only they"
    future = data.iloc[-h:].drop(columns="y") if known == "future" else None
    forecast = model.predict(futr_df=future)
    assert (np.sign(forecast.xLSTM - 10) == np.sign(data.y.iloc[-h:].to_numpy() - 10)).all()
    model.save(tmp_path / "kept")
    again = Forecaster.load(tmp_path / "kept")
    assert again.engine.network.config == network.config
    assert np.array_equal(again.predict(futr_df=future).xLSTM, forecast.xLSTM)


def test_without_covariates_a_network_reads_patches_alone():
    config = FitConfig(steps=20, d_model=8, n_layers=1, n_heads=2, max_lookback=14)
    network = Forecaster(3, config=config).fit(products(200)[["ds", "y"]]).engine.network
    assert network is None or network.recent is None
