"""Forecasting: the laws of clocks, windows, linear path, network and calibration, and the interface from frame to frame."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from exlstm import BatchForecaster, Forecaster, cli
from exlstm.data import frequency
from exlstm.data.series import panel_of
from exlstm.data.windows import Windows, filled
from exlstm.forecast import baselines, batch, combine, engine, files, fitting, frames, ridges
from exlstm.forecast.config import MEMBERS, FitConfig
from exlstm.models.config import ForecasterConfig, LinearConfig
from exlstm.models.forecaster import ForecasterNetwork, pinball
from exlstm.models.linear import Gram, LinearPath

pd = pytest.importorskip("pandas")
SMALL = FitConfig(steps=4, d_model=8, n_layers=1, n_heads=2, max_lookback=21, batch_size=16)


def frame(n=3, days=80, seed=0):
    """Daily series with a week in them, a trend and noise."""
    draw, parts = np.random.default_rng(seed), []
    for k in range(n):
        t = np.arange(days - 3 * k)
        y = 10 * (k + 1) + 3 * np.sin(2 * np.pi * t / 7) + 0.05 * t + draw.normal(0, 0.3, len(t))
        dates = pd.date_range("2024-01-01", periods=len(t))
        parts.append(pd.DataFrame({"unique_id": f"s{k}", "ds": dates, "y": y, "x": np.cos(t)}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def fitted():
    return Forecaster(7, config=SMALL).fit(frame())


def network(**more):
    torch.manual_seed(0)
    config = ForecasterConfig(d_model=8, n_layers=1, n_heads=2, horizon=7, lookback=14, patch=7, n_dates=6, **more)
    n_past, n_future = config.n_past, config.n_future
    return ForecasterNetwork(config, LinearConfig(7, 14, 7 * bool(n_past), n_past, n_future)).eval()


def windows(data=None, columns=None, season=7):
    return Windows(panel_of(frame() if data is None else data, columns), season).with_calendar(7)


# Gaps that leave no window of a month whole, and hardly one of a week.
GAPS = {
    "closed on Sundays": lambda t, draw: t % 7 == 6,
    "a fifth at random": lambda t, draw: draw.random(len(t)) < 0.2,
    "every third day": lambda t, draw: t % 3 == 2,
}


@pytest.mark.parametrize("gaps", GAPS)
def test_the_linear_path_learns_where_no_target_is_whole(gaps):
    draw, t = np.random.default_rng(0), np.arange(400)
    y = 10 + 3 * np.sin(2 * np.pi * t / 7) + draw.normal(0, 0.7, len(t))
    y[GAPS[gaps](t, draw)] = np.nan
    data = pd.DataFrame({"ds": pd.date_range("2023-01-02", periods=len(t)), "y": y})
    tested = Forecaster(28, config=FitConfig(members=("naive", "linear"))).fit(data[:344]).cross_validation(data, 2)
    error = tested[["Linear", "SeasonalNaive", "xLSTM"]].sub(tested["y"], axis=0).abs().mean()
    assert error["Linear"] < 0.9 * error["SeasonalNaive"] and error["xLSTM"] < 0.9 * error["SeasonalNaive"]


# Clocks: an alias, and what is guessed from its times (itself unless named).
CLOCKS = {
    "s": "s", "5min": "5min", "15min": "15min", "h": "h", "6h": "6h", "D": "D", "B": "B", "W-SUN": "W-SUN", "14D": "14D",
    "MS": "MS", "ME": "ME", "QS-JAN": "QS-JAN", "QE-DEC": "QE-DEC", "YS-JAN": "YS-JAN", "YE-DEC": "YE-DEC", "2MS": "2MS",
}  # fmt: skip


@pytest.mark.parametrize("alias", CLOCKS)
def test_the_clock_is_guessed_and_goes_on_over_gaps(alias):
    times = pd.date_range("2020-01-01", periods=40, freq=alias)
    kept = np.delete(np.arange(40), [7, 8, 21])
    panel = panel_of(pd.DataFrame({"ds": times[kept], "y": np.arange(40.0)[kept]}))
    assert panel.freq == CLOCKS[alias]
    assert panel.lengths.tolist() == [40]
    assert np.flatnonzero(np.isnan(panel.y)).tolist() == [7, 8, 21]
    assert list(panel.times(0, 0, 40)) == list(times)
    later = pd.date_range(times[-1], periods=4, freq=alias)[1:]
    assert list(frames.ahead(panel, 0, 3)) == list(later)
    table, names = frequency.calendar(times, panel.freq)
    assert table.shape == (40, len(names))
    assert np.abs(table).max(initial=0) <= 1
    assert all(season >= 1 for season in frequency.seasons(panel.freq))


def test_time_zones_and_daylight_saving():
    """Hours are counted in UTC and shown in the zone, days by the local date: neither sees a gap or a step twice."""
    hours = pd.date_range("2024-03-30", periods=72, freq="h", tz="Europe/Berlin")
    panel = panel_of(pd.DataFrame({"ds": hours, "y": 1.0}))
    assert (panel.freq, panel.lengths.tolist(), panel.zone) == ("h", [72], "Europe/Berlin")
    shown = frames.history(panel)["ds"]
    assert list(shown) == list(hours)
    days = pd.date_range("2024-03-25", periods=14, freq="D", tz="Europe/Berlin")
    panel = panel_of(pd.DataFrame({"ds": days, "y": 1.0}))
    assert (panel.freq, panel.lengths.tolist(), panel.zone) == ("D", [14], None)


def test_forms_of_data_are_one_panel():
    long = frame(2, 40).drop(columns="x")
    long = long[long.ds < long.ds.iloc[-1]]
    wide = long.pivot(index="ds", columns="unique_id", values="y")
    shuffled = long.sample(frac=1, random_state=0)
    polars = pytest.importorskip("polars")
    as_polars = polars.DataFrame({c: long[c].tolist() for c in long.columns})
    truth = panel_of(long)
    for data in (shuffled, wide, wide.reset_index(), as_polars):
        panel = panel_of(data)
        order = [panel.ids.index(i) for i in truth.ids]
        for n, m in enumerate(order):
            got = panel.y[panel.offsets[m] : panel.offsets[m + 1]]
            want = truth.y[truth.offsets[n] : truth.offsets[n + 1]]
            assert np.array_equal(got[: len(want)], want)
    arrays = panel_of([wide["s0"].to_numpy(), wide["s1"].to_numpy()])
    assert arrays.ids == [0, 1]
    assert panel_of(wide["s0"]).ids == ["s0"]
    assert panel_of(long.rename(columns={"unique_id": "shop", "ds": "Date", "y": "sold"})).columns.id == "shop"


def test_gaps_are_filled_from_before_them():
    y = np.array([np.nan, 1, 2, 3, np.nan, 5, np.nan, np.nan, np.nan])
    assert filled(y, 3).tolist() == [1, 1, 2, 3, 1, 5, 3, 1, 5]
    t = 5
    changed = np.concatenate([y[:t], y[t:] + 100])
    assert np.array_equal(filled(y, 3)[:t], filled(changed, 3)[:t])


@pytest.mark.parametrize("shape", [(70, 33), (3, 5), (1, 1)])
def test_series_of_one_length_are_counted_as_those_of_many(shape):
    """Together, where they are a table, as one by one."""
    values = np.random.default_rng(0).normal(1e4, 3.0, shape)
    values[-1] = 7.0
    alone = Windows(panel_of(values), 7)
    mixed = Windows(panel_of([*values, np.array([np.nan, 1.0, 2.0, np.nan])]), 7)
    assert np.array_equal(alone.norms, mixed.norms[:-1])
    assert torch.equal(alone.y, mixed.y[: values.size])
    assert mixed.y[-4:].tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0])
    assert alone.statistics["series"] == {n: mixed.statistics["series"][n] for n in range(len(values))}


def test_a_window_sees_nothing_of_its_future():
    """Whatever stands behind the cut, input and forecast stay; and what stands behind it is the target."""
    data = frame()
    later = data.copy()
    later.loc[later.ds >= "2024-02-20", ["y"]] += 50.0
    a, b = windows(data), None
    b = Windows(panel_of(later), 7, a.statistics).with_calendar(7)
    series, cuts = torch.arange(3), torch.full((3,), 50)
    one, two = a.batch(series, cuts, 14, 7), b.batch(series, cuts, 14, 7)
    for name, x, y in zip(one._fields, one, two):
        assert torch.equal(x, y) == (name != "target"), name
    model = network()
    assert torch.equal(model(one), model(two))
    truth = data[data.unique_id == "s1"].y.to_numpy()[50:57]
    mean, scale = a.norms[1]
    assert np.allclose(one.target[1] * scale + mean, truth, atol=1e-4)


def test_steps_before_the_first_row_are_zero_and_marked():
    batch = windows().batch(torch.tensor([0]), torch.tensor([5]), 14, 7)
    assert not batch.inside[0, :9].any()
    assert batch.inside[0, 9:].all()
    assert not batch.y[0, :9].any()


def test_the_linear_path_is_ridge_regression_and_sums_over_pieces():
    torch.manual_seed(0)
    config = LinearConfig(horizon=7, lookback=14, scale="series", n_dates=6)
    w, path = windows(), LinearPath(config)
    series = torch.arange(3).repeat_interleave(20)
    cuts = torch.arange(20, 40).repeat(3)
    whole, pieces = Gram(path), Gram(path)
    whole.add(w.batch(series, cuts, 14, 7))
    for part in range(0, 60, 7):
        pieces.add(w.batch(series[part : part + 7], cuts[part : part + 7], 14, 7))
    batch = w.batch(series, cuts, 14, 7)
    level, scale = path.units(batch)
    x = path.features(batch, level, scale).double()
    y = (batch.target - level).double()
    penalty = 0.1 * (x.T @ x).diagonal().mean()
    rows = torch.cat([x, penalty.sqrt() * torch.eye(x.shape[1])])
    wanted = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(x.shape[1], 7)])).solution
    for gram in (whole, pieces):
        (weight,) = gram.solve([0.1])
        assert torch.allclose(weight.double(), wanted, atol=1e-4)
        assert int(gram.windows) == 60


@pytest.mark.parametrize("center, season", [("mean", 0), ("last", 0), ("mean", 3), ("last", 3)])
def test_a_ridge_of_fewer_steps_is_a_map_of_the_whole_window(center, season):
    """From the sums over 14 steps: the ridge of the last 5, counted from their own level, forecast by forecast."""
    torch.manual_seed(0)
    w = windows()
    series, cuts = torch.arange(3).repeat_interleave(20), torch.arange(20, 40).repeat(3)
    whole = LinearPath(LinearConfig(7, 14, n_dates=6, center=center, scale="series"))
    short = LinearPath(LinearConfig(7, 5, n_dates=6, center=center, scale="series"))
    batch = w.batch(series, cuts, 14, 7)
    for path, lookback in ((whole, 5), (short, None)):
        gram = Gram(path)
        gram.add(batch)
        path.weight.copy_(gram.solve([0.1], lookback, season)[0])
    assert short.weight.abs().max() > 0.01
    assert torch.allclose(whole.predict(batch), short.predict(batch), atol=1e-4)
    # The steps before the last 5 have no say.
    other = batch._replace(y=torch.cat([batch.y[:, :9] + torch.randn(60, 9), batch.y[:, 9:]], 1))
    assert torch.allclose(whole.predict(other), short.predict(other), atol=1e-4)


def test_a_ridge_drawn_to_the_season_is_what_its_penalty_says():
    """Least squares with rows for the penalty: away from the fitted share of the pattern, the dearer the older the step."""
    torch.manual_seed(0)
    w, season, n = windows(), 3, 14
    batch = w.batch(torch.arange(3).repeat_interleave(20), torch.arange(20, 40).repeat(3), n, 7)
    path = LinearPath(LinearConfig(7, n, scale="series"))
    gram = Gram(path)
    gram.add(batch)
    path.weight.copy_(gram.solve([0.1], season=season)[0])
    last = batch.y[:, -1:].double()
    x = torch.cat([batch.y.double() - last, torch.ones(60, 1)], 1)
    y = batch.target.double() - last
    # Step k of the forecast: the mean of the steps of its phase in the four whole seasons of the window.
    pattern = torch.zeros(n + 1, 7, dtype=torch.float64)
    for k in range(7):
        pattern[[2 + k % 3, 5 + k % 3, 8 + k % 3, 11 + k % 3], k] = 1 / 4
    drawn = x @ pattern
    pattern = pattern * ((drawn * y).sum() / drawn.square().sum()).clamp(0, 1)
    cost = torch.cat([1 + torch.arange(n - 1, -1, -1) / season, torch.ones(1)]).double()
    penalty = 0.1 * ((x.T @ x).diagonal() / cost).mean()
    rows = torch.cat([x, torch.diag((penalty * cost).sqrt())])
    wanted = torch.linalg.lstsq(rows, torch.cat([y - x @ pattern, torch.zeros(n + 1, 7)])).solution + pattern
    assert torch.allclose(path.predict(batch).double(), last + x @ wanted, atol=1e-4)


@pytest.mark.parametrize("lookback, season", [(None, 0), (9, 0), (None, 3), (9, 3)])
@pytest.mark.parametrize("center", ["mean", "last"])
@pytest.mark.parametrize("alphas", [[0.1], [0.1, 2.0]])
def test_a_ridge_without_the_constant_is_that_of_the_other_numbers(center, lookback, season, alphas):
    torch.manual_seed(0)
    w = windows()
    batch = w.batch(torch.arange(3).repeat_interleave(20), torch.arange(20, 40).repeat(3), 14, 7)
    gram = Gram(LinearPath(LinearConfig(7, 14, center=center, scale="series")))
    gram.add(batch)
    bare = Gram(gram.path)
    bare.xx, bare.xy = gram.xx.clone(), gram.xy.clone()
    # A number that goes with nothing has no weight.
    bare.xx[-1, :-1], bare.xx[:-1, -1], bare.xy[-1] = 0.0, 0.0, 0.0
    both = gram.solve(alphas, lookback, season, (True, False))
    assert len(both) == 2 * len(alphas)
    usual, without = both[: len(alphas)], both[len(alphas) :]
    for weight, wanted in zip(usual, gram.solve(alphas, lookback, season), strict=True):
        assert torch.equal(weight, wanted) and weight[-1].abs().max() > 1e-3
    for weight, wanted in zip(without, bare.solve(alphas, lookback, season), strict=True):
        assert torch.allclose(weight, wanted, atol=1e-5) and weight[-1].abs().max() < 1e-12


@pytest.mark.parametrize("season", [0, 3])
def test_a_strength_alone_gives_what_it_gives_among_others(season):
    w = windows()
    batch = w.batch(torch.arange(3).repeat_interleave(20), torch.arange(20, 40).repeat(3), 14, 7)
    gram = Gram(LinearPath(LinearConfig(7, 14, n_dates=6, scale="series")))
    gram.add(batch)
    # A number that is never seen, and one that is another's twin.
    gram.xx[-2], gram.xx[:, -2], gram.xy[-2] = 0.0, 0.0, 0.0
    gram.xx[-3], gram.xy[-3] = gram.xx[-4], gram.xy[-4]
    gram.xx[:, -3] = gram.xx[:, -4]
    for alpha, weight in zip(ridges.ALPHAS, gram.solve(ridges.ALPHAS, 10, season)):
        assert torch.allclose(gram.solve([alpha], 10, season)[0], weight, atol=1e-5)
        assert weight[-2].abs().max() < 1e-20


def test_at_any_strength_a_ridge_drawn_to_the_season_goes_on_with_what_repeats_itself():
    t = pd.date_range("2024-01-01", periods=200, freq="h")
    found = windows(pd.DataFrame({"a": np.tile([1.0, 5.0, 2.0, -3.0], 50)}, index=t), season=4)
    batch = found.batch(torch.zeros(60, dtype=torch.int64), torch.arange(40, 100), 14, 7)
    path = LinearPath(LinearConfig(7, 14, scale="series"))
    gram = Gram(path)
    gram.add(batch)
    for weight in gram.solve([1e-3, 10.0, 1e6], 10, season=4):
        path.weight.copy_(weight)
        assert torch.allclose(path.predict(batch), batch.target, atol=1e-4)


def test_ridges_are_drawn_to_the_season_where_validation_likes_it_and_every_window_is_whole():
    draw, config = np.random.default_rng(0), FitConfig(horizon=7, max_lookback=35)
    week = np.tile([3.0, 1.0, 0.0, -2.0, 4.0, 0.0, -1.0], 40)[:, None] + draw.normal(size=(280, 2))
    table = pd.DataFrame(week, columns=["a", "b"], index=pd.date_range("2024-01-01", periods=280))
    found = fitting.split(windows(table), config)
    path, _, recipe, _ = ridges.choose(found, config)
    assert {part.season for part in recipe.parts} == {0, 7}
    assert recipe.single.season == 0
    plain = [part for part in recipe.parts if not part.season]
    plain = tuple(replace(part, share=part.share / sum(p.share for p in plain)) for part in plain)
    other = ridges.fit(found, replace(recipe, parts=plain), config, whole=False)[0]
    assert fitting.linear_error(found, path, config) <= fitting.linear_error(found, other, config) * 1.001
    # One short series among long ones.
    pieces = [(f"s{k}", table["a"]) for k in range(3)] + [("short", table["b"].iloc[-30:])]
    parts = [pd.DataFrame({"unique_id": name, "ds": y.index, "y": y.to_numpy()}) for name, y in pieces]
    long = pd.concat(parts, ignore_index=True)
    recipe = ridges.choose(fitting.split(windows(long), config), config)[2]
    assert {part.season for part in recipe.parts} == {0}


def test_a_mean_of_ridges_is_the_mean_of_their_forecasts_and_no_look_back_is_left_out():
    w = windows()
    found = fitting.split(w, FitConfig(horizon=7))
    path, ridge, recipe, _ = ridges.choose(found, FitConfig(horizon=7, max_lookback=21))
    assert sum(part.share for part in recipe.parts) == pytest.approx(1)
    assert all(part.share > 0 for part in recipe.parts)
    assert recipe.single.lookback in [part.lookback for part in recipe.parts]
    batch = w.batch(torch.arange(3), torch.full((3,), 60), 21, 7)
    alone = []
    for part in recipe.parts:
        one = ridges.Recipe(recipe.settings, (replace(part, share=1.0),), part)
        alone.append(part.share * ridges.fit(found, one, FitConfig(horizon=7), whole=False)[0].predict(batch))
    assert torch.allclose(sum(alone), path.predict(batch), atol=1e-4)
    single = ridges.Recipe(recipe.settings, (recipe.single,), recipe.single)
    single = ridges.fit(found, single, FitConfig(horizon=7), whole=False)[1]
    assert torch.allclose(single.predict(batch), ridge.predict(batch))


def test_long_series_of_unlike_laws_have_weights_of_their_own_and_a_stranger_those_of_all():
    """One series keeps its sign from step to step, the other turns it: what both have in common is nothing."""
    draw, t = np.random.default_rng(0), 900
    rows = {"keeps": 0.9, "turns": -0.9}
    data = {}
    for name, share in rows.items():
        y = np.zeros(t)
        for k in range(1, t):
            y[k] = share * y[k - 1] + draw.normal()
        data[name] = y
    table = pd.DataFrame(data, index=pd.date_range("2024-01-01", periods=t))
    settings = FitConfig(lookback=8, members=("linear",))
    model = Forecaster(2, config=settings).fit(table)
    assert model.engine.linear.own.shape[0] == 2
    scores = model.engine.scores
    assert scores["linear"]["mae"] < 0.97 * scores["ridge"]["mae"]
    batch = model.engine.windows(panel_of(table)).batch(torch.tensor([0, 1]), torch.tensor([800, 800]), 8, 2)
    assert batch.series.tolist() == [0, 1]
    path = model.engine.linear
    x = path.features(batch, *path.units(batch))
    assert torch.allclose(path.map(x, torch.tensor([-1, -1])), x @ path.weight)
    assert torch.allclose(
        path.map(x, torch.tensor([1, 0])), x @ path.weight + torch.einsum("bf,bfh->bh", x, path.own[[1, 0]])
    )
    # Short ones have none: their weights would be chance.
    assert Forecaster(2, config=settings).fit(table.iloc[:140]).engine.linear.own is None


@pytest.mark.parametrize("variates", ["none", "attention", "slstm"])
def test_before_training_the_network_is_the_linear_path(variates):
    model = network(variates=variates)
    torch.nn.init.normal_(model.linear.weight, std=0.2)
    batch = windows().batch(torch.arange(3), torch.full((3,), 60), 14, 7)
    found = model(batch, 3)
    assert torch.allclose(found[..., 6], model.linear.predict(batch), atol=1e-5)
    assert found.shape == (3, 7, 13)
    assert (found.diff(dim=-1) > 0).all()


def test_quantiles_never_cross_and_the_loss_is_the_pinball_loss():
    model = network()
    for head in (model.head, model.step_head):
        torch.nn.init.normal_(head.weight, std=30.0)
    batch = windows().batch(torch.arange(3), torch.full((3,), 60), 14, 7)
    found = model(batch)
    assert (found.diff(dim=-1) >= 0).all()
    _, scale = model.linear.units(batch)
    error = (batch.target[..., None] - found) / scale[..., None]
    wanted = 2 * torch.where(error > 0, model.levels * error, (model.levels - 1) * error).mean()
    assert torch.allclose(model.loss(batch), wanted)
    model.loss(batch).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "linear.weight")


def test_missing_targets_do_not_count():
    target = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
    quantiles = torch.zeros(2, 2, 3)
    loss = pinball(quantiles, target, torch.tensor([0.1, 0.5, 0.9]), torch.ones(2, 1))
    assert torch.allclose(loss, 2 * torch.tensor([0.1, 0.5, 0.9]).mean())


def test_series_see_each_other_only_through_the_variate_mixer():
    batch = windows().batch(torch.arange(3), torch.full((3,), 60), 14, 7)
    other = batch._replace(y=batch.y + torch.tensor([[0.0], [0.0], [1.0]]) * torch.randn(3, 14))
    for variates in ("none", "attention", "slstm"):
        model = network(variates=variates)
        for head in (model.head, model.step_head, *([model.mixer.out] if model.mixer else [])):
            torch.nn.init.normal_(head.weight)
        moved = (model(batch, 3) - model(other, 3))[0].abs().max() > 1e-6
        assert moved == (variates != "none")


def test_baselines_continue_what_they_are_made_for():
    t = torch.arange(48.0)
    season = 10 + 3 * torch.sin(2 * torch.pi * t / 12)
    batch = windows().batch(torch.tensor([0]), torch.tensor([60]), 48, 7)
    whole = batch._replace(y=season[None], inside=torch.ones(1, 48, dtype=torch.bool))
    after = (10 + 3 * torch.sin(2 * torch.pi * torch.arange(48.0, 66.0) / 12))[None]
    assert torch.allclose(baselines.seasonal_naive(whole, 12, 18), after, atol=1e-4)
    assert torch.allclose(baselines.theta(whole, 12, 18, torch.zeros(1, 1)), after, atol=0.15)
    line = whole._replace(y=(2 + 0.5 * t)[None])
    # Far from zero a factor is a difference, and all digits are left.
    far, below = (baselines.theta(whole, 12, 18, torch.full((1, 1), zero)) for zero in (-1e6, 1e3))
    assert torch.equal(far, below)
    ahead = baselines.theta(line, 1, 4, torch.full((1, 1), -5.0))
    # Theta halves the trend: the mean of the line and of the last level.
    assert torch.allclose(ahead, ((2 + 0.5 * torch.arange(48.0, 52.0) + 25.5) / 2)[None], atol=0.05)


def judged_windows(windows=200):
    """Levels, truth, and two members: one near it, one far from it."""
    torch.manual_seed(0)
    levels, unit = torch.tensor([0.1, 0.5, 0.9]), torch.ones(windows, 1)
    target, spread = torch.randn(windows, 5), torch.tensor([-1.3, 0.0, 1.3])
    good, bad = target[..., None] + 0.1 * torch.randn(windows, 5, 1), torch.full((windows, 5, 3), 3.0)
    return (target, unit, levels), good + spread, bad + spread


def test_the_blend_finds_the_good_member_and_averages_two_halves():
    given, good, bad = judged_windows()
    target, spread, every = given[0], torch.tensor([-1.3, 0.0, 1.3]), torch.arange(200)
    noise = torch.randn(200, 5, 1)
    halves = torch.stack([target[..., None] + noise + spread, target[..., None] - noise + spread])
    for metric in ("mae", "mse"):
        assert combine.blend(torch.stack([bad, good]), (*given, metric), every, ["theta", "linear"]) == [0, 1]
        found = combine.blend(halves, (*given, metric), every, ["naive", "linear"])
        assert found == pytest.approx([0.5, 0.5], abs=0.051)


def test_members_that_validation_cannot_tell_apart_share_the_weight():
    """Of two that are alike each has about half; of two that are not the worse has nothing, with as many groups."""
    given, _, _ = judged_windows(400)
    groups, spread = torch.arange(400) // 10, torch.tensor([-1.3, 0.0, 1.3])
    off = torch.randn(400, 5, 1)
    # One member's errors are the other's with the sign turned in half of the windows, or a fifth larger everywhere.
    alike = torch.where(torch.rand(400, 1, 1) < 0.5, -off, off)
    shares = [
        combine.blend(
            given[0][..., None] + torch.stack([off, other]) + spread, (*given, "mse"), groups, ["naive", "theta"]
        )
        for other in (alike, 1.2 * off)
    ]
    assert 0.2 < shares[0][0] < 0.8
    assert shares[1] == [1, 0]


def test_calibration_covers_what_it_says():
    """A spread half as wide as it should be, and lopsided, is stretched until later windows fall inside as often as told."""
    torch.manual_seed(0)
    levels = torch.tensor(engine.LEVELS)
    truth = torch.distributions.Gamma(2.0, 1.0).sample((3000, 4))
    z = torch.distributions.Normal(0.0, 0.5).icdf(levels).expand(3000, 4, -1) + truth.median()
    factors = combine.stretch(z[:1000], truth[:1000], levels)
    found = combine.stretched(z[1000:], factors)
    below = (truth[1000:, :, None] < found).float().mean((0, 1))
    assert (below - levels).abs().max() < 0.03
    assert (found.diff(dim=-1) >= 0).all()
    assert torch.equal(combine.at_levels(found, levels, [0.1, 0.9])[..., 0], found[..., 2])
    between = combine.at_levels(found, levels, [0.01, 0.15, 0.99])
    assert (between[..., 0] < found[..., 0]).all()
    assert ((between[..., 1] > found[..., 2]) & (between[..., 1] < found[..., 3])).all()


def test_the_network_gets_three_quarters_of_what_validation_gives_it():
    given, good, bad = judged_windows()
    given, every = (*given, "mae"), torch.arange(200)
    assert combine.blend(torch.stack([bad, good]), given, every, ["linear", "network"]) == [0.25, 0.75]
    assert combine.blend(torch.stack([good, bad]), given, every, ["linear", "network"]) == [1, 0]
    assert combine.blend(torch.stack([bad, good]), given, every, ["naive", "linear"]) == [0, 1]
    assert combine.blend(good[None], given, every, ["network"]) == [1]


@pytest.mark.parametrize("spans", [6, 40, 126])
def test_a_gain_of_the_network_that_could_be_chance_gives_it_no_weight(spans):
    """Better by a tenth in one half of the spans, worse by nearly as much in the other: the least loss, and no reason."""
    side = torch.tensor([1.0, -1.0]).repeat(spans // 2).repeat_interleave(4)  # (W,)
    away = torch.where(side > 0, 1.0, 0.99)
    q = torch.stack([torch.zeros_like(side), away])[..., None, None].expand(-1, -1, 5, len(engine.LEVELS))
    target, group = 10 * side[:, None].expand(-1, 5), torch.arange(spans).repeat_interleave(4)
    judged = (target, torch.ones(len(target), 1), torch.tensor(engine.LEVELS), "mae")
    assert combine.blend(q, judged, group, ["naive", "linear"]) == [0, 1]
    assert combine.blend(q, judged, group, ["linear", "network"]) == [1, 0]
    # Where it is better in every span its weight is what it was.
    sure = q * torch.where(side > 0, 1.0, -1.0)[:, None, None]
    assert combine.blend(sure, judged, group, ["linear", "network"]) == pytest.approx([0.25, 0.75], abs=0.01)


def test_a_gain_counts_as_far_as_it_is_more_than_chance():
    torch.manual_seed(0)
    one, group = torch.ones(400), torch.arange(400) // 10
    assert combine.backed(one, one, group) == 1
    assert combine.backed(-one, one, group) == 0
    assert combine.backed(one, one, group * 0) == 0.5
    noisy = [combine.backed(one + size * torch.randn(400), one, group) for size in (1.0, 5.0)]
    assert 0.7 < noisy[0] < 1
    assert noisy[1] < noisy[0]
    # Windows of one group say one thing, however many they are.
    chance = torch.randn(40).repeat_interleave(10) * 8 + 1
    assert combine.backed(chance, one, group) <= combine.backed(chance, one, torch.arange(400))


@pytest.mark.parametrize(
    "degrees, t90, t95", [(1, 3.0777, 6.3138), (2, 1.8856, 2.9200), (7, 1.4149, 1.8946), (60, 1.2958, 1.6706)]
)
def test_quantiles_of_student_are_those_of_the_tables(degrees, t90, t95):
    assert combine.student(0.9, degrees) == pytest.approx(t90, abs=2e-4)
    assert combine.student(0.95, degrees) == pytest.approx(t95, abs=2e-4)
    # Less than one degree of freedom counts as one, and between two tables lies what lies between them.
    assert combine.student(0.95, 0.1) == combine.student(0.95, 1)
    assert combine.student(0.95, 2) < combine.student(0.95, 1.5) < combine.student(0.95, 1)


def test_of_few_groups_the_error_of_a_gain_is_hardly_known():
    """Three groups that gain 3, 2 and 1 are 3.5 standard errors away from none; two and a sliver of a third, hardly one."""
    gain, count = torch.tensor([3.0, 2.0, 1.0]), torch.ones(3)
    assert combine.backed(gain, count, torch.arange(3)) == pytest.approx(1 - 2.92 / 12**0.5, abs=1e-3)
    # As many groups, of which two are next to nothing, are no more than one.
    few = torch.tensor([3.0, 2e-3, 1e-3])
    assert combine.backed(few, torch.tensor([1.0, 1e-3, 1e-3]), torch.arange(3)) <= 0.5


def test_weights_that_few_spans_chose_are_judged_by_other_spans():
    """Three rivals differ from the best member by chance alone in each of three spans: some mix gains in all of them."""
    draw, names, moved = np.random.default_rng(0), ["linear", "naive", "theta", "network"], []
    group, levels = torch.arange(3).repeat_interleave(2), torch.tensor(engine.LEVELS)
    for _ in range(60):
        first = 1 + 0.1 * draw.normal(size=(1, 3))
        rest = first + np.abs(draw.normal(size=(3, 3))) * np.where(draw.random((3, 3)) < 0.5, -1, 1)
        errors = torch.tensor(np.concatenate([first, rest])).float().repeat_interleave(2, 1)  # (M, W)
        q = errors[..., None, None].expand(-1, -1, 1, len(levels))
        weights = combine.blend(q, (torch.zeros(6, 1), torch.ones(6, 1), levels, "mse"), group, names)
        moved.append(max(weights) < 1)
    # Judged by the spans that chose the weights it is one in seven.
    assert np.mean(moved) < 0.05


def test_members_share_by_their_errors_where_spans_are_few():
    """One span moves little, sixty-four next to nothing; neither the naive forecast nor the network has a part in it."""
    levels, w, h = torch.tensor(engine.LEVELS), 12, 3
    target = torch.randn(w, h, generator=torch.Generator().manual_seed(0))
    off = {"naive": 1.0, "theta": 2.0, "linear": 1.0, "network": 0.5}
    members = torch.stack([(target + x)[..., None].expand(-1, -1, len(levels)) for x in off.values()])
    for metric in ("mae", "mse"):
        judged, names = (target, torch.ones(w, 1), levels, metric), list(off)
        found = {n: combine.steadied([0, 0, 0, 1.0], members, judged, n, names) for n in (1, 4, 64)}
        share = 1 / (1 + combine.DOUBTED**3)
        assert found[1] == pytest.approx([0, 0.2 * (1 - share), 0.8 * (1 - share), 0], abs=0.02)
        assert found[4] == pytest.approx([0, 0.1, 0.4, 0.5]) and found[64] == [0, 0, 0, 1]
        assert combine.steadied([1.0, 0.0], members[[0, 3]], judged, 1, ["naive", "network"]) == [1, 0]
        assert combine.steadied([1.0], members[[2]], judged, 1, ["linear"]) == [1]


def test_short_walks_are_forecast_near_their_last_value():
    """Ten years of months that are walks: what two spans of validation found best would be a third worse than the last value."""
    errors = []
    for seed in range(24):
        y = np.random.default_rng(seed).standard_normal(126).cumsum()
        frame = pd.DataFrame({"ds": pd.date_range("2010-01-01", periods=126, freq="MS"), "y": y})
        config = FitConfig(members=("naive", "theta", "linear"))
        told = Forecaster(6, config=config).fit(frame[:-6]).predict()
        inside = (y[-6:] >= told["xLSTM-lo-80"]) & (y[-6:] <= told["xLSTM-hi-80"])
        errors.append([np.abs(told["xLSTM"] - y[-6:]).mean(), np.abs(y[-7] - y[-6:]).mean(), inside.mean()])
    found, last, inside = np.mean(errors, 0)
    # With what validation alone has seen of errors 72 of a hundred lie in the interval of 80 %.
    assert found / last < 1.28 and inside > 0.74


@pytest.mark.parametrize("spans", [1, 2])
def test_where_no_span_is_apart_from_another_the_network_has_no_weight(spans):
    given, good, bad = judged_windows()
    group = torch.arange(200) * spans // 200
    weights = combine.blend(torch.stack([bad, bad, good]), (*given, "mae"), group, ["naive", "linear", "network"])
    assert weights[2] == 0
    # Of the step to the others half is taken: at most half of the weight moves.
    assert max(weights) >= 0.5


def test_the_spread_goes_by_what_the_window_moved_by():
    """Windows of two kinds, one ten times as wild: of later ones either kind is covered nearly as often as told."""
    torch.manual_seed(0)
    levels = torch.tensor(engine.LEVELS)
    wild = 10 ** torch.randint(2, (2000, 1)).float()
    y, truth = torch.randn(2000, 60) * wild, torch.randn(2000, 4) * wild
    seen = torch.ones(2000, 60, dtype=torch.bool)
    batch = windows().batch(torch.tensor([0]), torch.tensor([60]), 48, 4)._replace(y=y, seen=seen)
    moved = combine.moves(batch, 12, 40)
    assert torch.allclose(
        moved[wild[:, 0] > 1].mean(0) - moved[wild[:, 0] == 1].mean(0), torch.tensor(10.0).log(), atol=0.02
    )
    fitted = combine.fit_width(truth[:1000], moved[:1000])
    spread = combine.residual_spread(truth[:1000] / combine.width(moved[:1000], fitted), levels)
    later = combine.width(moved[1000:], fitted)[..., None] * spread
    inside = ((truth[1000:] > later[..., 2]) & (truth[1000:] < later[..., -3])).float().mean(1, keepdim=True)
    # The slope is shrunk by a fifth; a spread that is the same for all is off by .2 and .16.
    for kind in (1, 10):
        assert abs(float(inside[wild[1000:] == kind].mean()) - 0.8) < 0.1
    # One window teaches nothing of the slopes, and nothing known is no error.
    assert combine.fit_width(truth[:1], moved[:1])[1].abs().max() == 0
    assert combine.fit_width(truth[:1] * torch.nan, moved[:1]).abs().max() == 0


def test_a_panel_is_split_where_it_should_be():
    w = windows()
    found = fitting.split(w, FitConfig(horizon=7))
    assert found.begins.tolist() == [80 - 12, 77 - 11, 74 - 11]
    train, val = found.train(14, 7), found.val(7)
    for cuts in (train, val):
        series, at = cuts.at(torch.arange(cuts.total))
        assert (at + 7 <= (found.begins if cuts is train else w.lengths)[series]).all()
        assert (at >= (7 if cuts is train else found.begins[series])).all()
        assert len(set(zip(series.tolist(), at.tolist()))) == cuts.total


# Interface


def test_predict_gives_the_columns_of_neuralforecast(fitted):
    found = fitted.predict(level=[80])
    assert list(found.columns)[:5] == ["unique_id", "ds", "xLSTM", "xLSTM-lo-80", "xLSTM-hi-80"]
    assert {"SeasonalNaive", "Linear-hi-80"} <= set(found.columns)
    assert len(found) == 21
    assert found.ds.iloc[0] == pd.Timestamp("2024-01-01") + pd.Timedelta(days=80)
    assert (found["xLSTM-lo-80"] <= found["xLSTM"]).all()
    assert (found["xLSTM"] <= found["xLSTM-hi-80"]).all()
    quantiles = fitted.predict(quantiles=[0.25, 0.5], h=2, baselines=False)
    assert list(quantiles.columns) == ["unique_id", "ds", "xLSTM", "xLSTM_ql0.25", "xLSTM_ql0.5"]
    assert quantiles["xLSTM_ql0.5"].equals(quantiles["xLSTM"].rename("xLSTM_ql0.5"))
    assert len(quantiles) == 6


def test_it_forecasts_what_is_there_to_be_seen(fitted):
    """Better than the seasonal naive forecast on a week with a trend, and the weights add up to one."""
    whole = frame(days=87)
    truth = whole.groupby("unique_id").tail(7)
    found = fitted.predict().merge(truth, on=["unique_id", "ds"])
    assert len(found) == 21
    assert (found.xLSTM - found.y).abs().mean() < (found.SeasonalNaive - found.y).abs().mean()
    assert sum(fitted.engine.weights.values()) == pytest.approx(1)
    skill = fitted.skill().set_index("model")
    assert skill.loc["SeasonalNaive", "mae"] == 1
    assert skill.loc["xLSTM", "pinball"] <= skill["pinball"].min() + 0.05


def test_the_same_seed_gives_the_same_forecast(fitted):
    again = Forecaster(7, config=SMALL).fit(frame())
    pd.testing.assert_frame_equal(again.predict(), fitted.predict())


def test_a_saved_forecaster_is_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.predict(), fitted.predict())
    new = frame(seed=5)
    pd.testing.assert_frame_equal(loaded.predict(new), fitted.predict(new))
    assert {f.suffix for f in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    fitted.save(tmp_path / "model")
    settings = tmp_path / "model" / "tensors.safetensors"
    data = bytearray(settings.read_bytes())
    data[-3] ^= 1
    settings.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensors\.safetensors"):
        Forecaster.load(tmp_path / "model")


def test_a_folder_of_the_version_before_is_read(fitted, tmp_path):
    """It knew one ridge, which was the linear path."""
    from safetensors.torch import load_file, save_file

    fitted.save(tmp_path / "model")
    tensors = tmp_path / "model" / files.TENSORS
    values = json.loads((tmp_path / "model" / files.SETTINGS).read_text())
    values["version"] = 1
    del values["ridge"], values["linear"]["own"]
    held = {k: v for k, v in load_file(tensors).items() if "ridge" not in k}

    def write(aside):
        (aside / files.SETTINGS).write_text(json.dumps(values))
        save_file(held, aside / files.TENSORS)

    files.write_folder(tmp_path / "old", write)
    old = Forecaster.load(tmp_path / "old")
    wanted = fitted.predict(baselines=False)
    pd.testing.assert_frame_equal(old.predict(baselines=False), wanted)
    path = old.engine.linear
    assert torch.equal(old.engine.ridge.weight, path.weight)
    assert old.engine.lookback == path.config.lookback


def test_the_linear_column_is_one_ridge_of_a_look_back_chosen_on_validation(fitted):
    one = fitted.engine
    assert one.lookback in fitting.lookbacks(one.config, one.season, torch.tensor([65, 66, 68]))
    w = one.windows(fitted.panel)
    point = one.ridge.predict(w.batch(*w.ends(), one.longest, 7)).double().numpy()
    mean, scale = w.norms.T[:, :, None]
    assert np.allclose(fitted.predict()["Linear"].to_numpy(), (point * scale + mean).ravel(), rtol=1e-4)
    assert {"Linear", "LinearPath"} <= set(fitted.skill().model)


def test_update_is_the_same_as_predicting_from_the_whole_history(fitted):
    whole = frame(days=87)
    series = [g for _, g in whole.groupby("unique_id")]
    model = fitted.on(pd.concat([g.iloc[:-7] for g in series]))
    for day in range(7):
        model.update(pd.concat([g.iloc[[len(g) - 7 + day]] for g in series]))
    pd.testing.assert_frame_equal(model.predict(), fitted.predict(whole))
    assert model.panel.lengths.max() <= fitted.engine.longest + 7
    # Days that never came are gaps, as they are in a history.
    late = [g.iloc[[len(g) - 1]] for g in series[1:]]
    model = fitted.on(pd.concat([g.iloc[:-4] for g in series])).update(pd.concat(late))
    gapped = pd.concat([series[0].iloc[:-4], *(g.iloc[[*range(len(g) - 4), len(g) - 1]] for g in series[1:])])
    pd.testing.assert_frame_equal(model.predict(), fitted.predict(gapped))


def test_cross_validation_forecasts_from_before_the_cutoff(fitted):
    data = frame()
    cv = fitted.cross_validation(data, n_windows=2, step_size=7)
    assert list(cv.columns[:4]) == ["unique_id", "ds", "cutoff", "y"]
    assert len(cv) == 42
    assert ((cv.ds - cv.cutoff).dt.days.between(1, 7)).all()
    before = pd.concat([g.iloc[:-14] for _, g in data.groupby("unique_id")])
    alone = Forecaster(7, config=SMALL).fit(before).predict()
    first = cv[cv.groupby("unique_id").cutoff.transform("min") == cv.cutoff].reset_index(drop=True)
    pd.testing.assert_frame_equal(first[alone.columns], alone, rtol=1e-4)
    table = fitted.evaluate(cv).set_index("model")
    error = (cv.y - cv.xLSTM).abs().groupby(cv.unique_id).mean().mean()
    assert table.loc["xLSTM", "mae"] == pytest.approx(error)
    assert {"mase", "wql", "coverage 80", "coverage 95"} <= set(table.columns)


def test_cross_validation_gives_the_quantiles_that_predict_gives(fitted):
    levels, found = fitted.cross_validation(level=[80]), fitted.cross_validation(quantiles=[0.1, 0.9, 0.95])
    for name in ("xLSTM", "SeasonalNaive", "Linear"):
        for q, end in ((0.1, "lo"), (0.9, "hi")):
            assert np.array_equal(found[f"{name}_ql{q}"], levels[f"{name}-{end}-80"])
        assert (found[f"{name}_ql0.95"] >= found[f"{name}_ql0.9"]).all()
    assert not [name for name in found if "-lo-" in name]
    assert fitted.evaluate(found, metrics="mae").mae.equals(fitted.evaluate(levels, metrics="mae").mae)


def test_polars_in_polars_out(fitted):
    polars = pytest.importorskip("polars")
    data = frame()
    found = fitted.predict(polars.DataFrame({c: data[c].tolist() for c in data.columns}))
    assert isinstance(found, polars.DataFrame)
    assert np.allclose(found["xLSTM"].to_numpy(), fitted.predict().xLSTM)


def test_covariates_of_the_future_are_used():
    """The target follows a covariate that cannot be foreseen: with it the error nearly vanishes."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=207)
    data = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=207), "y": 3 * x + 5, "x": x, "place": "a"})
    known, future = data.iloc[:200], data.iloc[200:][["ds", "x"]]
    with_it = Forecaster(7, futr_exog="x", target_col="y", config=SMALL).fit(known)
    found = with_it.predict(futr_df=future)
    assert np.abs(found.xLSTM - data.y[200:].to_numpy()).mean() < 0.5
    without = Forecaster(7, hist_exog="x", target_col="y", stat_exog="place", config=SMALL).fit(known)
    assert np.abs(without.predict().xLSTM - data.y[200:].to_numpy()).mean() > 1


@pytest.mark.parametrize("kind", [{"variates": "attention"}, {"variates": "slstm"}, {"design": "xlstmtime"}], ids=str)
def test_series_that_see_each_other_can_be_fitted(kind, tmp_path):
    data = frame(days=60)
    data = data[data.ds < "2024-02-20"]
    settings = FitConfig(steps=30, d_model=8, n_layers=1, n_heads=2, lookback=14, members=("network",), **kind)
    model = Forecaster(7, config=settings).fit(data)
    found = model.predict()
    assert np.isfinite(found.xLSTM).all()
    model.save(tmp_path / "model")
    pd.testing.assert_frame_equal(Forecaster.load(tmp_path / "model").predict(), found)


@pytest.mark.parametrize("blocks", [("mlstm",), ("attention",), ("lstm",), ("mamba2",), ("slstm", "mlstm")])
def test_any_block_mixes_time(blocks):
    settings = FitConfig(steps=2, d_model=16, n_layers=len(blocks), n_heads=2, lookback=14, blocks=blocks)
    assert np.isfinite(Forecaster(7, config=settings).fit(frame(2)).predict().xLSTM).all()


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_alone(member):
    settings = FitConfig(steps=2, d_model=8, n_layers=1, n_heads=2, lookback=14, members=(member, member))
    assert settings.members == (member,)
    model = Forecaster(7, config=settings).fit(frame(2))
    assert np.isfinite(model.predict().xLSTM).all()
    assert model.skill()["mae"].notna().all()


def test_finetuning_takes_what_new_data_teach(fitted):
    other = frame(seed=9)
    tuned = fitted.on(frame()).finetune(other, steps=2)
    assert "finetuned" in tuned.engine.notes[-1]
    assert len(tuned.predict()) == 21
    assert "finetuned" not in fitted.engine.notes[-1]


def test_gaps_constants_and_short_series_are_forecast():
    data = frame()
    data.loc[data.index[5:9], "y"] = np.nan
    still = pd.DataFrame({"unique_id": "still", "ds": pd.date_range("2024-01-01", periods=60), "y": 4.0})
    short = pd.DataFrame({"unique_id": "short", "ds": pd.date_range("2024-02-01", periods=3), "y": [1.0, 2.0, 3.0]})
    empty = still.assign(unique_id="empty", y=np.nan)
    told = []
    whole = pd.concat([data, still, short, empty])
    found = Forecaster(7, config=SMALL, report=told.append).fit(whole).predict()
    assert set(found.unique_id) == {"s0", "s1", "s2", "still", "short"}
    assert np.isfinite(found.select_dtypes("number")).all(axis=None)
    assert np.allclose(found[found.unique_id == "still"].xLSTM, 4, atol=0.5)
    assert any("empty" in sentence for sentence in told)


def test_a_series_of_one_row_stands_beside_others():
    """It has no past that its spread before validation could be judged by."""
    walks = np.random.default_rng(0).normal(size=44)
    settings = FitConfig(members=("naive", "theta", "linear"), max_lookback=30)
    found = Forecaster(1, season=12, config=settings).fit([walks, walks[:28], walks[:1], walks[:10]]).predict()
    assert np.isfinite(found).all(axis=None) and len(found) == 4


def test_the_figure_is_drawn(fitted, tmp_path):
    pytest.importorskip("matplotlib")
    fitted.plot(path=tmp_path / "fc.png")
    assert (tmp_path / "fc.png").read_bytes().startswith(b"\x89PNG")


# Very many series


def test_a_batch_forecaster_travels_and_agrees(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    traveller = pickle.loads(pickle.dumps(BatchForecaster(tmp_path / "model", level=[80])))
    wanted = fitted.predict(frame(), level=[80], baselines=False)
    pd.testing.assert_frame_equal(traveller(frame()), wanted)
    assert pickle.loads(pickle.dumps(traveller)).model is None
    assert traveller.__name__ == "BatchForecaster"
    parts = [group for _, group in frame().groupby("unique_id")]
    (mapped,) = BatchForecaster(tmp_path / "model", level=[80]).map(iter(parts))
    pd.testing.assert_frame_equal(mapped, wanted)


@pytest.mark.filterwarnings("ignore")
def test_ray_maps_it_over_groups(fitted, tmp_path):
    ray = pytest.importorskip("ray")
    fitted.save(tmp_path / "model")
    data = ray.data.from_pandas(frame()).groupby("unique_id")
    found = data.map_groups(BatchForecaster(tmp_path / "model"), batch_format="pandas").to_pandas()
    wanted = fitted.predict(baselines=False)
    found = found.sort_values(["unique_id", "ds"], ignore_index=True)
    assert np.allclose(found.xLSTM, wanted.xLSTM, rtol=1e-4)


def test_parts_are_written_once_and_the_rest_goes_on(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "PART", 2)
    monkeypatch.chdir(tmp_path)
    fitted.save("model")
    frame().to_csv("data.csv", index=False)
    command = ["forecast", "data.csv", "--model", "model", "--out", "parts", "--workers", "1"]
    assert cli.main(command) == 0
    files = sorted((tmp_path / "parts").glob("part*"))
    assert [f.name for f in files] == ["part-00000.csv", "part-00001.csv"]
    whole = pd.concat([pd.read_csv(f) for f in files], ignore_index=True)
    assert np.allclose(whole.xLSTM, fitted.predict().xLSTM)
    files[1].unlink()
    files[0].write_text("kept")
    # What is wrong with a row, one sentence says, and what is mended may go where nothing was written.
    frame().astype({"y": object}).replace({"y": {frame().y[10]: "much"}}).to_csv("bad.csv", index=False)
    bad = ["forecast", "bad.csv", "--model", "model", "--out", "third", "--workers", "1"]
    assert cli.main(bad) == 2
    assert capsys.readouterr().err == "exlstm: part-00000: column 'y' holds 'much' in row 11, wanted a number\n"
    # Spaces around names are no part of them.
    frame().rename(columns=" {} ".format).to_csv("spaces.csv", index=False)
    assert cli.main(["forecast", "spaces.csv", "--model", "model", "--out", "third", "--workers", "1"]) == 0
    assert cli.main(command) == 0
    assert "3 series in 2 parts, 1 of them done before" in capsys.readouterr().out
    assert files[0].read_text() == "kept"
    assert files[1].exists()
    # Parts of other levels, rows or another model are not taken for these.
    assert cli.main([*command, "--level", "50"]) == 2
    assert "parts holds parts of another level; choose another folder" in capsys.readouterr().err
    frame(seed=1).to_csv("data.csv", index=False)
    assert cli.main(command) == 2
    assert "parts holds parts of another table" in capsys.readouterr().err


def test_parquet_goes_in_and_out(fitted, tmp_path, monkeypatch, capsys):
    """Written and read by pyarrow: the same forecasts as from the frame, in one file or in parts."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(batch, "PART", 2)
    monkeypatch.chdir(tmp_path)
    fitted.save("model")
    data, wanted = frame(), fitted.predict()
    data.to_parquet("many.parquet", index=False)
    data.set_index(["unique_id", "ds"]).to_parquet("keyed.parquet")
    for name in ("many", "keyed"):
        assert cli.main(f"forecast {name}.parquet --model model --out {name}-fc.parquet".split()) == 0
        pd.testing.assert_frame_equal(pd.read_parquet(f"{name}-fc.parquet"), wanted, check_dtype=False, rtol=1e-5)
    command = ["forecast", "many.parquet", "--model", "model", "--workers", "1", "--out", "parts"]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert "3 series in 2 parts, 2 of them done before" in capsys.readouterr().out
    # Read as one table; what the command keeps there is hidden.
    parts = pd.read_parquet("parts").reset_index(drop=True)
    assert sorted(f.name for f in (tmp_path / "parts").glob("part*")) == ["part-00000.parquet", "part-00001.parquet"]
    pd.testing.assert_frame_equal(parts, wanted[parts.columns], check_dtype=False, rtol=1e-4)


# The command

FAST = [
    "--fit.steps",
    "3",
    "--fit.d-model",
    "8",
    "--fit.n-layers",
    "1",
    "--fit.n-heads",
    "2",
    "--fit.max-lookback",
    "21",
]


def test_the_command_from_csv_to_csv_and_again_with_the_saved_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    frame().to_csv("data.csv", index=False)
    command = ["forecast", "data.csv", "--horizon", "7", "--target", "y", "--out", "fc.csv", "--model", "kept"]
    assert cli.main([*command, "--cv", "1", "--plot", "fc.png", *FAST]) == 0
    out = capsys.readouterr().out
    for told in (
        "frequency 'D'",
        "linear path",
        "test on the last 1 windows",
        "SeasonalNaive",
        "forecast: fc.csv, 21 rows",
    ):
        assert told in out
    first = pd.read_csv("fc.csv")
    assert len(first) == 21
    assert (tmp_path / "fc.png").stat().st_size > 1000
    assert cli.main(["forecast", "data.csv", "--model", "kept", "--out", "again.csv"]) == 0
    assert "uses the model in kept" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv("again.csv"), first)


def test_the_command_without_a_file_has_a_series(capsys):
    pytest.importorskip("vega_datasets")
    assert cli.main(["forecast", *FAST, "--fit.lookback", "24", "--fit.members", "naive", "linear"]) == 0
    out = capsys.readouterr().out
    assert "seattle-temps.csv" in out
    assert "horizon 24" in out
