"""How series end: rows without a target whose covariates are known are of the future, and what else lacks there is said."""

import numpy as np
import pytest

from exlstm import Forecaster, cli
from exlstm.data.series import panel_of
from exlstm.forecast import endings
from exlstm.forecast.config import FitConfig
from exlstm.forecast.tables import read_table

pd = pytest.importorskip("pandas")
LINEAR = FitConfig(members=("naive", "linear"), max_lookback=14)
FAST = ["--horizon", "7", "--fit.members", "naive", "linear", "--fit.max-lookback", "14"]
H = 7


def table(n=1, more=H, steps=60):
    """n series with a covariate, and `more` rows each behind the last value."""
    draw, parts = np.random.default_rng(0), []
    for k in range(n):
        rows = steps - 5 * k + more
        x = draw.normal(size=rows)
        y = 20.0 + np.arange(rows) % 7 + 3 * x + draw.normal(size=rows) / 10
        ds = pd.date_range("2024-01-01", periods=rows)
        parts.append(pd.DataFrame({"unique_id": f"s{k}", "ds": ds, "y": y, "x": x}))
        parts[-1].loc[rows - more :, "y"] = np.nan
    return pd.concat(parts, ignore_index=True)


def wide(frame):
    return frame[["ds", "x", "y"]].assign(z=frame.y + 1)[["ds", "x", "y", "z"]]


FORMS = {
    "one series": lambda: table()[["ds", "y", "x"]],
    "series of unlike ends": lambda: table(3),
    "more rows than wanted": lambda: table(2, more=12),
    "a column a series": lambda: wide(table()),
}


def forecaster(frame, **more):
    target = "" if "z" in frame else "y"
    return Forecaster(H, futr_exog="x", target_col=target, config=LINEAR, **more)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_the_future_are_those_of_a_table_of_their_own(form, tmp_path):
    frame, said = FORMS[form](), []
    past, future = frame[frame.y.notna()], frame[frame.y.isna()].drop(columns=["y", "z"], errors="ignore")
    plain = forecaster(frame).fit(past)
    wanted = plain.predict(futr_df=future)
    fitted = forecaster(frame, report=said.append).fit(frame)
    assert sum("taken as the future" in sentence for sentence in said) == 1
    fitted.save(tmp_path / "kept")
    for found in (
        fitted.predict(),
        fitted.predict(futr_df=frame),
        fitted.predict(futr_df=future),
        plain.predict(frame),
        plain.on(frame).predict(),
        Forecaster.load(tmp_path / "kept").predict(),
    ):
        pd.testing.assert_frame_equal(found, wanted)
    pd.testing.assert_frame_equal(fitted.predict(h=3), plain.predict(futr_df=future, h=3))
    pd.testing.assert_frame_equal(fitted.cross_validation(), plain.cross_validation())
    # Behind new rows these are past.
    days = past.groupby("unique_id").tail(1) if "unique_id" in past else past.tail(1)
    with pytest.raises(ValueError, match="give their next 7 steps"):
        fitted.update(days.assign(ds=days.ds + pd.Timedelta("1D"))).predict()


def test_rows_given_stand_before_those_that_the_table_held():
    frame = table(2)
    future = frame[frame.y.isna()].assign(x=5.0)
    fitted = forecaster(frame).fit(frame)
    wanted = forecaster(frame).fit(frame[frame.y.notna()]).predict(futr_df=future)
    pd.testing.assert_frame_equal(fitted.predict(futr_df=future), wanted)


# Changes after which the rows behind the last value are no future: what is said of them.
OTHERS = {
    "too few": (
        lambda f: f[f.ds < f.ds.max()],
        "'x' is known for 6 of the 7 steps of the horizon behind the last value",
    ),
    "no covariate": (lambda f: f.assign(x=f.x.where(f.y.notna())), ""),
    "a covariate with a gap": (
        lambda f: f.assign(x=f.x.mask(f.index == 64)),
        "'x' is known for 4 of the 7 steps of the horizon behind the last value",
    ),
}


@pytest.mark.parametrize("change", OTHERS)
def test_rows_that_are_no_horizon_are_past_and_it_is_said(change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, sentence = OTHERS[change]
    frame = make(table()[["ds", "y", "x"]])
    frame.to_csv("table.csv", index=False)
    assert cli.main([*["forecast", "table.csv", "--target", "y", "--exog", "x", "--out", "fc.csv"], *FAST]) == 0
    told, last = capsys.readouterr().out, frame.ds.max()
    assert sentence in told and ("too few" in told) == bool(sentence)
    assert (
        f"the last {frame.y.isna().sum()} values are missing: the forecast begins at {last + pd.Timedelta('1D')}"
        in told
    )
    assert read_table(tmp_path / "fc.csv").ds[0] == str((last + pd.Timedelta("1D")).date())


@pytest.mark.parametrize("more", ["", "--future table.csv", "--future table.csv --plot fc.png --cv 1 --model new"])
def test_the_command_finds_the_future_in_the_table(more, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    frame = table(2)
    frame.to_csv("table.csv", index=False)
    assert cli.main([*f"forecast table.csv --target y --exog x --out fc.csv {more}".split(), *FAST]) == 0
    told = capsys.readouterr().out
    assert "the last rows of every series, with 'x' and without 'y', are taken as the future" in told
    assert "missing" not in told and "gaps" not in told
    wanted = forecaster(frame).fit(frame[frame.y.notna()]).predict(futr_df=frame)
    found = read_table(tmp_path / "fc.csv").assign(ds=lambda f: pd.to_datetime(f.ds))
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)


def test_a_future_behind_rows_without_a_target_says_which_rows_lack():
    frame = table(more=5)
    with pytest.raises(ValueError, match=r"lack 7 of 7 rows: .*; the data has 5 rows without a target before them"):
        forecaster(frame).fit(frame).predict(futr_df=frame)


# How many values lack at the end of each series, and how many rows the series have less: what is said.
ENDS = {
    ((0, 0), (0, 0)): "",
    (
        (0, 3),
        (0, 0),
    ): "the last values of 1 series are missing, 3 of series 's1': that of series 's1' begins at 2024-02-10",
    (
        (2, 3),
        (0, 0),
    ): "the last values of 2 series are missing, 3 of series 's1': that of series 's1' begins at 2024-02-10",
    (
        (0, 0),
        (0, 7),
    ): "1 of 2 series ended more than a horizon before the others, and are forecast from their own ends on: "
    "that of series 's1' begins at 2024-02-03",
    ((0, 0), (0, 6)): "",
}


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_what_lacks_at_the_end_is_said(ends):
    parts = []
    for k, (lost, less) in enumerate(zip(*ends)):
        rows = pd.DataFrame({"unique_id": f"s{k}", "ds": pd.date_range("2024-01-01", periods=40 - less), "y": 1.0})
        rows.loc[len(rows) - lost :, "y"] = np.nan
        parts.append(rows)
    panel = panel_of(pd.concat(parts))
    assert panel.lacking.tolist() == list(ends[0])
    same, told = endings.parted(panel, 7, 7, False)
    assert same is panel
    assert len(told) == bool(ENDS[ends]) and "".join(told).startswith(ENDS[ends])
