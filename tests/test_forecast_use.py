"""What an analyst relies on: nothing behind a cutoff is seen, times and columns are read as they were at the fit, and metrics
are those of utilsforecast."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch

from exlstm import Forecaster
from exlstm.data.panel import Columns
from exlstm.data.series import panel_of
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")
LINEAR = FitConfig(members=("naive", "linear"), max_lookback=14)


def long(n=3, steps=80, freq="D", start="2024-01-01", seed=0, tz=None):
    noise = np.random.default_rng(seed).normal(size=(n, steps)) / 10
    times = pd.date_range(start, periods=steps, freq=freq, tz=tz)
    values = 10 * np.arange(1, n + 1)[:, None] + np.sin(np.arange(steps) * 2 * np.pi / 7) + noise
    ids = np.repeat([f"s{k}" for k in range(n)], steps)
    return pd.DataFrame({"unique_id": ids, "ds": np.tile(times, n), "y": values.ravel()}).assign(ds=list(times) * n)


def wide(frame):
    return frame.pivot(index="ds", columns="unique_id", values="y")


def model(h=7, **more):
    return Forecaster(h, config=LINEAR, **more)


@pytest.fixture(scope="module")
def fitted():
    return model().fit(long())


# Cutoffs

STARTS = {
    "as long as the others": lambda f: f,
    "later than the first cutoff": lambda f: f[(f.unique_id != "s2") | (f.ds >= f.ds.max() - pd.Timedelta("15D"))],
    "gaps before its first value": lambda f: f.assign(
        y=f.y.where((f.unique_id != "s2") | (f.ds >= f.ds.max() - pd.Timedelta("10D")))
    ),
}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_cross_validation_is_what_predict_gives_at_its_cutoff(start, refit):
    frame = STARTS[start](long())
    found, past = model().cross_validation(frame, n_windows=3, step_size=5, refit=refit), None
    assert found.cutoff.nunique() == 3
    for cutoff, rows in found.groupby("cutoff"):
        before = frame[frame.ds <= cutoff]
        if refit or past is None:
            past = model().fit(before)
        wanted = past.predict(before)
        columns = list(wanted.columns)
        pd.testing.assert_frame_equal(rows[columns].reset_index(drop=True), wanted, rtol=1e-5)
        truth = rows.merge(frame, on=["unique_id", "ds"], how="left")
        assert np.allclose(truth.y_x, truth.y_y, equal_nan=True)


def test_gaps_before_the_first_value_are_no_rows():
    """Nothing that stands before them could fill them, and what comes after them is what is asked for."""
    frame = long()
    late = frame[(frame.unique_id != "s2") | (frame.ds >= "2024-02-01")]
    gaps = frame.assign(y=frame.y.where(frame.index.isin(late.index)))
    wanted = model().fit(late).predict()
    pd.testing.assert_frame_equal(model().fit(gaps).predict(), wanted)
    pd.testing.assert_frame_equal(model().fit(wide(gaps)).predict(), wanted)


# Covariates


def covered():
    frame = long()
    frame["x"] = np.sin(np.arange(len(frame)))
    frame["y"] += frame.x
    after = frame.groupby("unique_id").tail(7)
    return frame, after[["unique_id", "ds", "x"]].assign(ds=after.ds + pd.Timedelta("7D"))


def test_a_shorter_horizon_is_the_beginning_of_the_whole_one():
    frame, future = covered()
    fitted = model(futr_exog="x", target_col="y").fit(frame)
    wanted = fitted.predict(futr_df=future)
    pd.testing.assert_frame_equal(
        fitted.predict(futr_df=future, h=3), wanted.groupby("unique_id").head(3).reset_index(drop=True)
    )
    more = pd.concat([future.assign(ds=future.ds + pd.Timedelta("7D")), frame, future]).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(fitted.predict(futr_df=more[["x", "y", "ds", "unique_id"]]), wanted)
    # Where only three steps are known, the rest is as the third.
    three = future.groupby("unique_id").head(3)
    held = future.assign(
        x=three.set_index(["unique_id", "ds"]).x.reindex(future.set_index(["unique_id", "ds"]).index).to_numpy()
    )
    held["x"] = held.groupby("unique_id").x.ffill()
    short = fitted.predict(futr_df=three, h=3)
    assert np.array_equal(short.xLSTM, fitted.predict(futr_df=held).groupby("unique_id").head(3).xLSTM)


@pytest.mark.parametrize("value", [0.0, 0.1, 123456789.123])
def test_a_covariate_that_stood_still_says_nothing_when_it_moves(value):
    """Not even where its mean is rounded; and a small one that moves is as good as a large one."""
    frame, future = covered()
    fitted = model(futr_exog="x", target_col="y").fit(frame.assign(x=value))
    still, moved = (fitted.predict(futr_df=future.assign(x=x)) for x in (value, 1.01 * value + 1))
    assert np.allclose(still.xLSTM, moved.xLSTM)
    small, whole = (model(futr_exog="x", target_col="y").fit(frame.assign(x=a * frame.x)) for a in (1e-20, 1))
    found = small.predict(futr_df=future.assign(x=1e-20 * future.x))
    assert np.allclose(found.xLSTM, whole.predict(futr_df=future).xLSTM)


def test_a_missing_static_number_is_as_the_mean():
    frame = long(4).assign(area=np.repeat([1000.0, np.nan, 2000.0, 1500.0], 80))
    engine = model(stat_exog="area", target_col="y").fit(frame)
    assert engine.engine.windows(engine.panel).static[1] == 0
    assert engine.engine.statistics["static"][0] == 1500


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), ("a", "b", "a"), (True, False, True)], ids=str)
def test_a_static_value_may_begin_behind_the_first_row(values):
    frame = long().assign(kind=np.repeat(values, 80))
    wanted = panel_of(frame, Columns(target="y", static=("kind",)))
    late = frame.assign(kind=frame.kind.astype(object).where(np.arange(240) % 80 > 2))
    assert np.array_equal(panel_of(late, Columns(target="y", static=("kind",))).static, wanted.static)


def test_static_columns_are_read_as_at_the_fit():
    frame = long().assign(kind=np.repeat(["1", "2", "1"], 80), area=np.repeat([1.0, 2.0, 3.0], 80))
    fitted = model(stat_exog=["kind", "area"], target_col="y").fit(frame)
    again = panel_of(frame.assign(kind=frame.kind.astype(int), area=frame.area.astype(object)), known=fitted.panel)
    assert np.array_equal(again.static, fitted.panel.static)
    with pytest.raises(ValueError, match="column 'area' holds 'x' in row 1, wanted a number"):
        fitted.predict(frame.assign(area="x"))


# Times


def test_more_times_are_read_as_those_of_the_fit(tmp_path):
    """01/03/2024 is in March where the fitted column says so, also where a row stands alone."""
    times = pd.date_range("2024-01-01", periods=60)
    frame = pd.DataFrame({"ds": times.strftime("%d/%m/%Y"), "y": np.arange(60) % 7.0, "x": np.arange(60) % 3.0})
    model(2, futr_exog="x", target_col="y").fit(frame).save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    loaded.update(pd.DataFrame({"ds": ["01/03/2024"], "y": [4.0], "x": [0.0]}))
    found = loaded.predict(futr_df=pd.DataFrame({"ds": ["02/03/2024", "03/03/2024"], "x": [1.0, 2.0]}))
    assert list(found.ds) == list(pd.to_datetime(["2024-03-02", "2024-03-03"]))
    hours = pd.DataFrame(
        {"ds": pd.date_range("2024-01-20", periods=500, freq="h").strftime("%d/%m/%Y %H:%M"), "y": 1.0}
    )
    day = hours[hours.ds.str.startswith("05/02/2024")]
    assert model(3).fit(hours).predict(day).ds[0] == pd.Timestamp("2024-02-06")


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d.%m.%y %H:%M", "%d/%m/%Y %H:%M+01:00"])
def test_days_and_months_are_told_apart_with_and_without_a_zone(form):
    times = pd.date_range("2024-01-01", periods=600, freq="h")
    fitted = model(3).fit(pd.DataFrame({"ds": times.strftime(form), "y": np.arange(600) % 5.0}))
    assert fitted.panel.dayfirst == form.startswith("%d")
    last = times[-1] + pd.Timedelta("1h")
    assert fitted.predict().ds[0] == (last.tz_localize("+01:00") if "+" in form else last)


def test_a_counter_stays_a_counter():
    """1900-01 is written 190001 too."""
    frame = pd.DataFrame({"ds": np.arange(189901, 190001), "y": np.arange(100) % 7.0})
    found = model(3).fit(frame).update(pd.DataFrame({"ds": [190001], "y": [2.0]})).predict()
    assert list(found.ds) == [190002, 190003, 190004]


@pytest.mark.parametrize("kind", ["category", "object"])
@pytest.mark.parametrize(
    "times", [np.arange(80), long(n=1, tz="Europe/Berlin", freq="h").ds, long(n=1).ds], ids=["numbers", "zone", "days"]
)
def test_times_that_are_kept_as_objects_are_what_they_are(times, kind):
    frame = pd.DataFrame({"ds": times, "y": np.arange(80) % 7.0})
    found = model(3).fit(frame.astype({"ds": kind})).predict()
    pd.testing.assert_frame_equal(found, model(3).fit(frame).predict())


@pytest.mark.parametrize(
    "freq", ["2ME", "2MS", "2QS-FEB", "2QE-MAR", "2QE-DEC", "2YS-APR", "QE-NOV", "YE-JUN", "YE-FEB"]
)
def test_steps_of_many_months_go_on(freq):
    times = pd.date_range("1990-01-01", periods=44, freq=freq)
    frame = pd.DataFrame({"ds": times[:40], "y": np.arange(40) % 5.0})
    assert list(model(4).fit(frame).predict().ds) == list(times[40:])


# Frames


def test_series_may_come_with_both_keys_as_their_index(fitted):
    series = long().set_index(["unique_id", "ds"]).y
    pd.testing.assert_frame_equal(model().fit(series).predict(), fitted.predict())


@pytest.mark.parametrize("kind", ["timestamp[us][pyarrow]", "date32[pyarrow]", "timestamp[ns, Europe/Berlin][pyarrow]"])
def test_times_of_arrow_are_times(kind, fitted):
    pytest.importorskip("pyarrow")
    frame = long(tz="Europe/Berlin") if "Berlin" in kind else long()
    stamps = frame.ds.dt.date if "date32" in kind else frame.ds
    found = model().fit(frame.assign(ds=stamps.astype(kind))).predict()
    pd.testing.assert_frame_equal(found, model().fit(frame).predict())


def test_a_wide_frame_may_hold_fewer_series_or_more():
    frame = wide(long())
    fitted = model().fit(frame)
    whole = fitted.predict()
    pd.testing.assert_frame_equal(fitted.predict(frame[["s1"]]), whole[whole.unique_id == "s1"].reset_index(drop=True))
    more = fitted.predict(frame.assign(s3=100 * frame.s1, name="a"))
    assert more.unique_id.unique().tolist() == ["s0", "s1", "s2", "s3"]
    assert more[more.unique_id == "s3"].xLSTM.between(1500, 2500).all()
    day = pd.DataFrame({"ds": [frame.index[-1] + pd.Timedelta("1D")], "s0": [10.0]})
    assert fitted.update(day).panel.lengths.tolist() == [81, 80, 80]


def test_ids_may_be_of_several_parts(fitted):
    frame = long()
    found = model().fit(frame.assign(unique_id=[(i[0], i[1]) for i in frame.unique_id])).predict()
    assert found.unique_id.unique().tolist() == [("s", "0"), ("s", "1"), ("s", "2")]
    assert found.xLSTM.equals(fitted.predict().xLSTM)


def test_copies_stand_alone(fitted):
    before = fitted.predict()
    rows = long(steps=81).groupby("unique_id").tail(1)
    for other in (copy.copy(fitted), copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)), fitted.on(long())):
        pd.testing.assert_frame_equal(other.predict(), before)
        other.update(rows)
        pd.testing.assert_frame_equal(fitted.predict(), before)


# The process


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "float64 by default": default_dtype,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "another device": lambda: torch.device("meta"),
}


def made(folder):
    """A forecast of every call that learns, reads or writes."""
    frame, config = (
        long(n=1, steps=60),
        FitConfig(members=("linear", "network"), lookback=14, steps=2, d_model=4, n_heads=1),
    )
    fitted = Forecaster(7, config=config).fit(frame)
    fitted.save(folder)
    loaded = Forecaster.load(folder)
    return [fitted.predict(), loaded.predict(), fitted.cross_validation(), loaded.finetune(frame, 1).predict()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_caller_has_set_for_torch_changes_nothing_and_stays(setting, plain, tmp_path):
    before = torch.get_rng_state()
    with SETTINGS[setting]():
        found = made(tmp_path / "model")
        assert torch.get_default_dtype() == (torch.float64 if "64" in setting else torch.float32)
        assert torch.is_grad_enabled() == (setting not in ("no gradients", "inference"))
    for one, other in zip(found, plain):
        pd.testing.assert_frame_equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


# Metrics


def test_metrics_are_those_of_utilsforecast(fitted):
    losses = pytest.importorskip("utilsforecast.losses")
    tested = fitted.cross_validation(n_windows=3)
    rows, names = tested.drop(columns="cutoff"), ["xLSTM", "SeasonalNaive", "Linear"]
    found = fitted.evaluate(tested).set_index("model").loc[names]
    for name in ("mae", "rmse", "smape"):
        assert np.allclose(found[name], getattr(losses, name)(rows, models=names)[names].mean())
    past = long()[lambda f: f.ds <= tested.cutoff.min()]
    wanted = losses.mase(rows, models=names, seasonality=7, train_df=past)[names].mean()
    assert np.allclose(found["mase"], wanted)
    for level in (80, 95):
        assert np.allclose(found[f"coverage {level}"], losses.coverage(rows, models=names, level=level)[names].mean())
    pd.testing.assert_frame_equal(model().evaluate(tested, df=long()), fitted.evaluate(tested))
    truth = long(steps=87)
    assert fitted.evaluate(fitted.predict(quantiles=[0.3]), df=truth, metrics="mae").columns.tolist() == [
        "model",
        "mae",
    ]


@pytest.mark.parametrize("tz", [None, "Europe/Berlin"])
@pytest.mark.parametrize("freq", ["D", "h"])
def test_forecasts_may_come_out_of_a_file(freq, tz, tmp_path):
    """Their times are text there, and their keys may be an index."""
    pytest.importorskip("matplotlib")
    whole = long(steps=87, freq=freq, tz=tz, start="2024-01-15")
    fitted = model().fit(whole[whole.ds < whole.ds[80]])
    forecasts = fitted.predict()
    wanted = fitted.evaluate(forecasts, df=whole)
    forecasts.to_csv(tmp_path / "fc.csv", index=False)
    read = pd.read_csv(tmp_path / "fc.csv")
    for form in (read, read.set_index(["unique_id", "ds"]), forecasts.set_index("ds")):
        pd.testing.assert_frame_equal(fitted.evaluate(form, df=whole), wanted)
        assert len(fitted.plot(form).axes) == 3


def test_a_figure_shows_the_series_that_were_forecast(fitted):
    pytest.importorskip("matplotlib")
    figure = fitted.plot(fitted.predict(long()[160:]))
    assert len(figure.axes) == 1
