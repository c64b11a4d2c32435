"""Forecasting: intervals follow the errors of late, by what is known alone, and alike however the forecasts are asked for."""

import numpy as np
import pytest
import torch

from exlstm import Forecaster
from exlstm.data.series import panel_of
from exlstm.forecast import combine, drift, engine, fitting, ridges, training
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")
SETTINGS = FitConfig(members=("linear",), lookback=8)
H, SEASON, LEARNT = 4, 4, 900


def table(after: float, n=2, steps=2400, seed=0):
    """Series with a memory whose noise is `after` times as wide from the last step that is learnt from."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(steps, n)) * np.where(np.arange(steps) < LEARNT, 1.0, after)[:, None]
    y = np.zeros((steps, n))
    for t in range(1, steps):
        y[t] = 0.5 * y[t - 1] + noise[t]
    return pd.DataFrame(y, index=pd.date_range("2024-01-01", periods=steps), columns=[f"s{k}" for k in range(n)])


def fitted(data, **more):
    return Forecaster(H, season=SEASON, config=SETTINGS, **more).fit(data.iloc[:LEARNT])


def coverage(model, data, cuts, follow=True):
    """Shares of the true values within 80 and 95 % from origins `cuts` of every series."""
    one = model.engine
    if not follow:
        one = engine.replace(one, drift=None)
    w = one.windows(panel_of(data))
    n = len(w.panel)
    series, at = torch.arange(n).repeat_interleave(len(cuts)), torch.as_tensor(cuts).repeat(n)
    parts = [(out["blend"], batch.target) for _, out, batch in one.forecast(w, series, at)]
    q, y = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])
    return [float(((y >= q[..., k]) & (y <= q[..., -1 - k])).float().mean()) for k in (2, 0)]


@pytest.mark.parametrize("after", [2.0, 0.5, 1.0])
def test_coverage_comes_back_when_the_noise_grows_or_falls(after):
    """Noise twice or half as wide behind what was learnt from: sixteen horizons later coverage is within 3 points again, in the
    mean of two draws."""
    found, still = [], []
    for seed in (0, 1):
        data = table(after, seed=seed)
        model = fitted(data)
        cuts = np.arange(LEARNT + 16 * H, len(data) - H)
        found.append(coverage(model, data, cuts))
        still.append(coverage(model, data, cuts, follow=False)[0])
    assert np.abs(np.mean(found, 0) - (0.8, 0.95)).max() < 0.03
    for before in still:
        assert (abs(before - 0.8) > 0.1) == (after != 1)


def test_what_is_not_known_yet_changes_nothing():
    """Whatever stands behind an origin: its intervals stay, bit for bit."""
    data = table(2.0)
    model = fitted(data)
    at = torch.tensor([1100, 1101, 1150])
    other = data.copy()
    other.iloc[1150:] *= 30
    other.iloc[1160:1170] = np.nan

    def found(frame):
        w = model.engine.windows(panel_of(frame))
        return drift.factors(model.engine, w, torch.arange(2).repeat_interleave(3), at.repeat(2))

    assert torch.equal(found(data), found(other))
    assert (found(data) > 1.1).all()
    changed = data.copy()
    changed.iloc[1140:1149] *= 30
    after = found(changed)
    assert torch.equal(after[:2], found(data)[:2])
    assert after[2] > found(data)[2]


def test_one_origin_many_origins_and_a_stream_agree():
    data = table(2.0)
    model = fitted(data)
    one, cuts = model.engine, torch.arange(1000, 1400, 7)
    w = one.windows(panel_of(data))
    many = drift.factors(one, w, torch.zeros_like(cuts), cuts)
    alone = torch.cat([drift.factors(one, w, torch.zeros(1, dtype=torch.int64), cut[None]) for cut in cuts])
    assert torch.allclose(many, alone, rtol=1e-6)
    stream = model.on(data.iloc[:LEARNT])
    for start in range(LEARNT, 1400, 100):
        stream.update(data.iloc[start : start + 100])
    pd.testing.assert_frame_equal(stream.predict(), model.predict(data.iloc[:1400]))
    assert stream.panel.lengths.max() == one.kept
    assert one.kept == one.longest + H + one.drift.reach(SEASON)


def test_the_point_forecast_and_the_other_members_stay():
    data = table(2.0)
    model = fitted(data)
    before = model.predict(data.iloc[:1400])
    still = model.on(data.iloc[:1400])
    still.engine = engine.replace(model.engine, drift=None)
    after = still.predict()
    moved = [c for c in after.columns if not after[c].equals(before[c])]
    assert moved == [c for c in after.columns if c.startswith("xLSTM-")]


def test_a_panel_of_short_series_has_the_intervals_of_validation():
    """Less than two spans behind what was learnt from: nothing recent is there, and nothing changes."""
    data = table(1.0, n=5, steps=250)
    model = Forecaster(H, season=SEASON, config=SETTINGS).fit(data)
    one, followed = model.engine, model.predict(data)
    assert max(data.shape[0] - begin for _, begin in one.drift.begins.values()) < drift.LEAST * one.drift.span(SEASON)
    model.engine = engine.replace(one, drift=None)
    pd.testing.assert_frame_equal(model.predict(data), followed)


@pytest.mark.parametrize("refit", [True, False])
def test_a_saved_forecaster_follows_as_before(refit, tmp_path):
    data = table(2.0)
    settings = engine.replace(SETTINGS, refit=refit)
    model = Forecaster(H, season=SEASON, config=settings).fit(data.iloc[:LEARNT])
    assert (model.engine.drift.judges["linear"] is model.engine.linear) != refit
    model.update(data.iloc[LEARNT:1400])
    model.save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.predict(), model.predict())
    pd.testing.assert_frame_equal(loaded.predict(data), model.predict(data))
    later = data.iloc[1400:1450]
    pd.testing.assert_frame_equal(loaded.update(later).predict(), model.update(later).predict())


def test_gaps_say_nothing_of_the_errors():
    data = table(2.0)
    model = fitted(data)
    hole = data.copy()
    hole.iloc[LEARNT:1400] = np.nan
    w = model.engine.windows(panel_of(hole))
    found = drift.factors(model.engine, w, torch.arange(2), torch.tensor([1400, 1400]))
    assert torch.isfinite(found).all()
    assert torch.allclose(found, torch.ones(2), atol=0.35)


@pytest.mark.parametrize(
    "weights", [{"linear": 1.0}, {"arcsinh": 1.0}, {"naive": 0.25, "linear": 0.25, "arcsinh": 0.5}]
)
def test_the_errors_that_intervals_follow_are_those_of_the_blend(weights):
    """In half widths of its own interval, from the members as validation saw them; not those of one member."""
    draw, z = np.random.default_rng(0), np.zeros(1500)
    for t in range(1, len(z)):
        z[t] = 0.9 * z[t - 1] + 0.6 * draw.normal()
    data = pd.DataFrame({"s": np.sinh(2 * z)}, index=pd.date_range("2024-01-01", periods=len(z)))
    settings = FitConfig(members=("naive", "linear", "arcsinh"), lookback=8, refit=False)
    one = Forecaster(H, season=SEASON, config=settings).fit(data.iloc[:1200]).engine
    one.weights, one.factors = weights, one.plain
    one.drift = engine.replace(one.drift, shares=drift.shares(weights, one.drift.judges))
    w = one.windows(panel_of(data))
    cuts = torch.arange(1300, 1310)
    first = torch.tensor([1200])
    rows = drift._Backtest(one, w, first, torch.zeros_like(cuts), cuts)
    z = rows._errors(torch.arange(len(rows.cuts)))
    still = engine.replace(one, drift=None)
    ((_, out, batch),) = still.forecast(w, rows.series, rows.cuts)
    q = out["blend"]
    wanted = (batch.target - q[..., 6]).abs() / ((q[..., 10] - q[..., 2]) / 2)
    assert torch.allclose(z, wanted, rtol=1e-4, atol=1e-5)


def with_network(data, monkeypatch, refit=False):
    """A forecaster that is a network alone, whose spread is that of the window's deviation: it follows the noise by itself."""
    settings = engine.replace(SETTINGS, d_model=8, n_layers=1, n_heads=2, dropout=0.0, refit=False)
    model = Forecaster(H, season=SEASON, config=settings).fit(data.iloc[:LEARNT])
    one = model.engine
    found = fitting.split(one.windows(panel_of(data.iloc[:LEARNT])), one.config)
    one.config = engine.replace(one.config, members=("linear", "network"))
    one.network = training.build_network(found, one.linear, one.config).eval()
    # All of the weight is the network's, whatever validation finds.
    monkeypatch.setattr(combine, "blend", lambda *_: [0.0, 1.0])
    engine._combine(one, found)
    if refit:
        part = ridges.Part(one.linear.config.lookback, 1.0, 1.0)
        engine._refit(one, found, ridges.Recipe(one.linear.config, (part,), part), {"best_step": 50})
    return model


@pytest.mark.parametrize("after", [2.0, 0.5])
def test_a_network_is_judged_by_its_own_errors(after, monkeypatch):
    """Its intervals grow and shrink with the window; the factor that the linear path needs would do it a second time."""
    data = table(after)
    model = with_network(data, monkeypatch)
    assert model.engine.drift.shares == {"network": 1.0}
    cuts = np.arange(LEARNT + 16 * H, len(data) - H)
    for share, wanted in zip(coverage(model, data, cuts), (0.8, 0.95)):
        assert abs(share - wanted) < 0.03
    model.engine.drift = engine.replace(model.engine.drift, shares={"linear": 1.0})
    assert abs(coverage(model, data, cuts)[0] - 0.8) > 0.05


def test_the_network_that_validation_saw_judges_on_and_is_saved(tmp_path, monkeypatch):
    data = table(2.0)
    model = with_network(data, monkeypatch, refit=True)
    judge, now = model.engine.drift.judges["network"], model.engine.network
    assert judge is not now and not torch.equal(judge.head.weight, now.head.weight)
    model.update(data.iloc[LEARNT:1100])
    model.save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.predict(), model.predict())
    later = data.iloc[1100:1150]
    pd.testing.assert_frame_equal(loaded.update(later).predict(), model.update(later).predict())


def test_a_member_without_a_judge_counts_as_the_linear_path():
    weights = {"naive": 0.25, "theta": 0.25, "linear": 0.25, "network": 0.25}
    assert drift.shares(weights, ["linear", "network"]) == {"naive": 0.25, "linear": 0.5, "network": 0.25}
    assert drift.shares(weights, ["linear"]) == {"naive": 0.25, "linear": 0.75}
    assert drift.shares({"arcsinh": 1.0}, ["linear", "arcsinh"]) == {"arcsinh": 1.0}
    assert drift.shares({"naive": 0.0, "theta": 1.0}, ["linear"]) == {"linear": 1.0}


@pytest.mark.parametrize("spans, t90, t975", [(9, 1.3830, 2.2622), (12, 1.3562, 2.1788), (40, 1.3031, 2.0211)])
def test_a_width_known_from_few_spans_is_wider_as_student_says(spans, t90, t975):
    factors = combine.unsure(torch.tensor(engine.LEVELS), spans)
    z = torch.tensor([1.2816, 1.9600])
    assert torch.allclose(factors[[10, 12]] * z, torch.tensor([t90, t975]), rtol=1e-3)
    assert torch.allclose(factors, factors.flip(0))
    assert (combine.unsure(torch.tensor(engine.LEVELS), 1e4) < 1.001).all()


def test_one_series_with_few_spans_is_wider_than_many_of_their_own_clocks():
    """Seven spans in validation say less of how wide errors are than two hundred."""
    data = table(1.0, n=1, steps=200)
    few = Forecaster(H, season=SEASON, config=SETTINGS).fit(data).engine
    starts = pd.date_range("2024-01-01", periods=30)
    rows = [
        pd.DataFrame({"unique_id": f"s{k}", "ds": pd.date_range(day, periods=200), "y": data["s0"].to_numpy()})
        for k, day in enumerate(starts)
    ]
    many = Forecaster(H, season=SEASON, config=SETTINGS).fit(pd.concat(rows)).engine
    assert (few.factors[[0, -1]] > 1.05 * many.factors[[0, -1]]).all()


@pytest.mark.parametrize("steps, told", [(80, False), (140, True)])
def test_times_before_validation_have_a_say_from_eight_windows_a_number_on(steps, told):
    """A path of 8 steps: a series of 80 has some 5 windows for every number that it sees, one of 140 has 11."""
    panel = panel_of(table(1.0, n=1, steps=steps))
    config = FitConfig(H, members=("linear",), lookback=8)
    found = fitting.split(engine.Windows(panel, SEASON).with_calendar(H), config)
    recipe = ridges.choose(found, config)[2]
    ratio = found.train(recipe.settings.lookback, H).total / recipe.settings.features
    assert (ratio >= ridges.FEW) == told and 4 < ratio < ridges.ENOUGH, ratio
    out = ridges.out_of_fold(found, recipe, config, 50)
    assert (out is not None) == told
    if told:
        # Windows in their order, the last of them a horizon before validation at the latest.
        series, at, point = out
        assert len(series) == len(at) == len(point) > 50 and (at.diff() > 0).all()
        assert int(at.max()) <= int(found.begins) - H and not point.isnan().any()
