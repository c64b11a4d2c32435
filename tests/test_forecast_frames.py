"""Frames as people have them: dates written anyhow, zones, index and library, odd steps; and what comes back fits to them."""

import numpy as np
import pytest
import torch

from exlstm import Forecaster
from exlstm.cli import main
from exlstm.data import frequency
from exlstm.data.panel import Columns
from exlstm.data.series import panel_of
from exlstm.forecast import frames
from exlstm.forecast.command import verdict
from exlstm.forecast.config import FitConfig
from exlstm.forecast.tables import read_table, write_table

pd = pytest.importorskip("pandas")
LINEAR = FitConfig(members=("naive", "linear"), max_lookback=14)
N, H = 120, 7
Y = np.arange(N) % 7 + np.random.default_rng(0).normal(0, 0.1, N)


def forecaster(h=H, **settings):
    return Forecaster(h, config=LINEAR, **settings)


def series(freq="D", zone=None, start="2024-02-20"):
    return pd.DataFrame({"ds": pd.date_range(start, periods=N, freq=freq, tz=zone), "y": Y})


# Dates of consecutive days, or of months, as text
WRITTEN = [
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%d/%m/%y",
    "%d/%m/%Y %H:%M",
    "%Y/%m/%d",
    "%d %b %Y",
    "%Y%m%d",
]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(("freq", "count"), [("D", 80), ("D", 9), ("MS", 80), ("h", 200)])
def test_day_and_month_are_told_by_the_whole_column(written, freq, count):
    """Steps as even as they can be: 01/02/2024 is the second of January or the first of February."""
    if freq == "h":
        written = written + ("" if "%H" in written else " %H:%M")
    times = pd.date_range("2024-01-01", periods=count, freq=freq)
    panel = panel_of(pd.DataFrame({"ds": times.strftime(written), "y": 1.0}))
    assert (panel.freq, panel.first[0], panel.lengths.tolist()) == (freq, times[0], [count])


@pytest.mark.parametrize(("written", "freq"), [("%Y%m%d", "D"), ("%Y%m%d", "W-MON"), ("%Y%m", "MS")])
def test_whole_numbers_that_are_dates_are_dates(written, freq):
    times = pd.date_range("2023-11-01", periods=40, freq=freq)
    panel = panel_of(pd.DataFrame({"ds": times.strftime(written).astype(int), "y": 1.0}))
    assert (panel.freq, panel.first[0], panel.lengths.tolist()) == (freq, times[0], [40])
    # A date that there is not makes them numbers again.
    numbers = [20240228, 20240229, 20240230, 20240231]
    assert panel_of(pd.DataFrame({"ds": numbers, "y": 1.0})).freq == 1


@pytest.mark.parametrize(
    "freq", ["28D", "30D", "100ms", "250us", "90min", "BMS", "BME", "BQS-FEB", "BQE-NOV", "BYE-MAR", "2BME", "10YS-JAN"]
)
def test_odd_steps_are_guessed_and_gone_on_with(freq):
    times = pd.date_range("1801-01-01" if "Y" in freq else "2001-01-01", periods=30, freq=freq)
    panel = panel_of(pd.DataFrame({"ds": times, "y": 1.0}))
    assert panel.lengths.tolist() == [30]
    assert list(frames.ahead(panel, 0, 5)) == list(pd.date_range(times[-1], periods=6, freq=freq)[1:])


SEASONS = {
    "D": 7,
    "B": 5,
    "C": 5,
    "W-SUN": 52,
    "SMS-15": 24,
    "BME": 12,
    "2ME": 6,
    "BQE-DEC": 4,
    "QS-JAN": 4,
    "BYE-DEC": 1,
    "12h": 2,
}


@pytest.mark.parametrize("freq", SEASONS)
def test_a_frequency_has_its_season(freq):
    assert frequency.seasons(freq)[0] == SEASONS[freq]


def test_parts_of_a_time_stand_back_behind_a_time():
    times = pd.date_range("2024-01-01", periods=72, freq="h")
    data = pd.DataFrame({"hour": times.hour, "month": times.month, "Stamp (UTC)": times.astype(str), "y": 1.0})
    assert panel_of(data).columns.time == "Stamp (UTC)"
    assert panel_of(pd.DataFrame({"region": "north", "year": range(1950, 2020), "y": 1.0})).columns.time == "year"


ALIASES = [pd.offsets.MonthEnd(), "M", "ME", pd.offsets.Day(), pd.Timedelta("1D"), np.int64(3)]


@pytest.mark.parametrize("freq", ALIASES, ids=str)
def test_a_frequency_may_be_an_object(freq):
    numbers = isinstance(freq, np.integer)
    monthly = not numbers and "M" in str(freq)
    times = 3 * np.arange(30) if numbers else pd.date_range("2020-01-31", periods=30, freq="ME" if monthly else "D")
    wanted = 3 if numbers else "ME" if monthly else "D"
    assert panel_of(pd.DataFrame({"ds": times, "y": 1.0}), freq=freq).freq == wanted


ZONES = [("h", "Europe/Berlin"), ("D", "Europe/Berlin"), ("MS", "US/Eastern"), ("ME", "Europe/Berlin")]
ZONES += [("15min", "Australia/Lord_Howe"), ("B", "Europe/London"), ("D", "UTC")]


@pytest.mark.parametrize(("freq", "zone"), ZONES)
def test_forecasts_stand_in_the_zone_of_the_data(freq, zone, tmp_path):
    """So they join to it; and a new row of its own, a saved model and the rows of the future are read the same way."""
    data = series(freq, zone).assign(x=np.cos(np.arange(N)))
    model = forecaster(futr_exog="x", target_col="y").fit(data[:-H])
    found = model.predict(futr_df=data[-H:])
    assert list(found.ds) == list(data.ds[-H:]) and len(found.merge(data, on="ds")) == H
    other = data[-H:].assign(ds=data.ds.dt.tz_convert("Asia/Tokyo"))
    assert list(model.predict(futr_df=other).ds) == list(data.ds[-H:])
    tested = model.cross_validation(n_windows=2)
    assert tested.cutoff.dtype.tz is not None and len(model.evaluate(tested)) == 3
    model.save(tmp_path / "model")
    loaded = Forecaster.load(tmp_path / "model")
    assert loaded.predict(futr_df=data[-H:]).equals(found)
    loaded.update(data[-H : 1 - H])
    assert list(loaded.predict(futr_df=data[1 - H :], h=H - 1).ds) == list(data.ds[1 - H :])


@pytest.mark.parametrize(("freq", "zone"), ZONES)
def test_zones_survive_a_file_of_text(freq, zone, tmp_path):
    """Text has offsets only: steps of a day and more go by the clock that it shows."""
    data = series(freq, zone)
    write_table(data, tmp_path / "table.csv")
    panel = panel_of(read_table(tmp_path / "table.csv"))
    alias = panel_of(data).freq
    assert (panel.freq, panel.lengths.tolist()) == (alias, [N])
    assert panel.zone == ("UTC" if freq in ("h", "15min") else None)


def test_a_midnight_that_there_is_not_begins_its_day():
    days = pd.date_range("2018-09-01", "2018-11-01", tz="America/Sao_Paulo")
    found = forecaster().fit(pd.DataFrame({"ds": days, "y": Y[: len(days)]})).predict()
    assert found.ds[2] == pd.Timestamp("2018-11-04 01:00", tz="America/Sao_Paulo")
    assert [t.day for t in found.ds] == list(range(2, 9))


def panel_frame():
    return pd.concat([series().assign(unique_id=name) for name in "ab"], ignore_index=True)


KINDS = ["as it is", "date", "ms", "ns", "text", "category"]


@pytest.mark.parametrize("kind", KINDS)
def test_polars_gets_back_the_types_that_it_gave(kind):
    polars = pytest.importorskip("polars")
    casts = {
        "date": {"ds": polars.Date},
        "ms": {"ds": polars.Datetime("ms")},
        "ns": {"ds": polars.Datetime("ns")},
        "text": {"ds": polars.String},
        "category": {"unique_id": polars.Categorical},
    }.get(kind, {})

    def given(frame):
        made = polars.DataFrame({c: frame[c].tolist() for c in ("unique_id", "ds", "y")})
        return made.with_columns(**{name: polars.col(name).cast(to) for name, to in casts.items()})

    data = panel_frame()
    past, truth = given(data[data.ds < data.ds.iloc[N - H]]), given(data[data.ds >= data.ds.iloc[N - H]])
    model = forecaster().fit(past)
    found = model.predict()
    assert isinstance(found, polars.DataFrame) and found.equals(model.predict(past)) and len(found) == 2 * H
    tested = model.cross_validation(n_windows=2)
    assert isinstance(tested, polars.DataFrame) and len(model.evaluate(tested)) == 3
    if kind != "text":
        assert found.schema["ds"] == tested.schema["cutoff"] == truth.schema["ds"]
        assert len(found.join(truth, on=["unique_id", "ds"])) == 2 * H
    assert forecaster().fit(past.lazy()).predict().shape == found.shape


@pytest.mark.parametrize("index", ["unique_id", ["unique_id", "ds"], ["ds"]])
def test_ids_and_times_may_be_the_index(index):
    data = panel_frame() if "unique_id" in index else series()
    model = forecaster().fit(data)
    indexed = data.set_index(index)
    assert forecaster().fit(indexed).predict().equals(model.predict())
    assert model.predict(indexed).equals(model.predict())


INDICES = {
    "one label": np.zeros(2 * N),
    "text": [f"row {n}" for n in range(2 * N)],
    "backwards": np.arange(2 * N)[::-1],
    "numbers twice": pd.MultiIndex.from_arrays([np.arange(2 * N) % 3, np.arange(2 * N)]),
    "other times": pd.date_range("1990-01-01", periods=2 * N),
}


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_holds_no_key_says_nothing(index):
    data = panel_frame()
    for made in (data, data.assign(ds=data.ds.dt.strftime("%d/%m/%Y"))):
        assert forecaster().fit(made.set_axis(INDICES[index])).predict().equals(forecaster().fit(made).predict())


@pytest.mark.parametrize("name", ["ds", None])
def test_covariates_of_the_future_may_have_their_times_as_the_index(name):
    data = series().assign(x=np.cos(np.arange(N))).set_index("ds").rename_axis(name)
    model = forecaster(futr_exog="x", target_col="y").fit(data[:-H])
    assert list(model.predict(futr_df=data[["x"]][-H:]).ds) == list(data.index[-H:])


def test_a_wide_frame_is_forecast_and_updated_by_its_index():
    wide = series().set_index("ds").rename_axis(None).assign(b=Y + 1)
    model = forecaster().fit(wide[:-H])
    last = model.predict(wide)
    assert last.ds.min() == wide.index[-1] + pd.Timedelta("1D")
    assert model.update(wide[-H:]).predict().equals(last)


INDEXES = {
    "days": series().ds,
    "days of a zone": series(zone="Europe/Berlin").ds,
    "hours of a zone": series("h", "Europe/Berlin", "2024-03-28").ds,
    "text": series().ds.dt.strftime("%d/%m/%Y"),
    "numbers": pd.Series(np.arange(N)),
}


@pytest.mark.parametrize("index", INDEXES)
def test_a_series_is_the_frame_of_it_also_row_by_row(index):
    data = pd.Series(Y, INDEXES[index], name="sold")
    frame = data.rename_axis("day").reset_index().assign(shop="sold")
    names = {"id_col": "shop", "time_col": "day", "target_col": "units"}
    wanted = forecaster(**names).fit(frame[:-3].rename(columns={"sold": "units"}))
    model = forecaster(**names).fit(data[:-3])
    assert model.predict().equals(wanted.predict())
    for row in range(N - 3, N):
        model.update(data[row : row + 1])
    assert model.predict().equals(wanted.predict(frame.rename(columns={"sold": "units"})))
    assert model.predict().equals(wanted.predict(data))
    # One without ids takes the name for none, and a column of a wide frame for itself.
    alone = forecaster(time_col="day", target_col="sold").fit(frame[["day", "sold"]])
    assert alone.predict(data).xLSTM.equals(alone.predict().xLSTM)
    wide = forecaster().fit(frame.set_index("day")[["sold"]].assign(b=Y))
    assert wide.predict(data).equals(wide.predict()[:H])


def test_what_a_mask_hides_is_missing():
    hidden = np.arange(N) % 11 == 3
    wanted = forecaster().fit(np.where(hidden, np.nan, Y)).predict()
    for form in (np.ma.array(Y, mask=hidden), np.ma.array([Y], mask=[hidden]), [np.ma.array(Y, mask=hidden)]):
        assert forecaster().fit(form).predict().equals(wanted)


def test_names_of_columns_may_be_numbers_or_none():
    data = series().assign(x=np.cos(np.arange(N)), shop="a")
    wanted = forecaster(id_col="shop", time_col="ds", target_col="y", futr_exog="x").fit(data[:-H])
    numbered = data.set_axis(range(4), axis=1)
    model = forecaster(id_col=3, time_col=0, target_col=1, futr_exog=[2], hist_exog=None, stat_exog=()).fit(
        numbered[:-H]
    )
    found = model.predict(futr_df=numbered[-H:])
    assert list(found.columns[:2]) == ["3", "0"]
    assert found.xLSTM.equals(wanted.predict(futr_df=data[-H:]).xLSTM)
    columns = forecaster(id_col=None, futr_exog=pd.Index([" x"]), target_col="y ").fit(data).panel.columns
    assert columns == Columns("", "ds", "y", futr=("x",))


FORMS = {
    "a tensor": lambda: torch.tensor(Y),
    "an array of 32 bits": lambda: Y.astype(np.float32),
    "a list": lambda: Y.tolist(),
    "a list of Series": lambda: [pd.Series(Y)],
    "a list of tensors": lambda: [torch.tensor(Y)],
    "a tensor of 16 bits with gradients": lambda: torch.tensor(Y.round(), requires_grad=True).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_numbers(form):
    found = forecaster().fit(FORMS[form]()).predict()
    wanted = forecaster().fit(Y.round() if "16" in form else Y).predict()
    assert np.allclose(found.xLSTM, wanted.xLSTM, atol=1e-4)


def test_arrays_go_on_where_the_series_end():
    model = forecaster().fit([Y[:100], Y[:90]])
    whole = model.predict([Y[:105], Y[:93]])
    assert model.update([Y[100:105], Y[90:93]]).predict().equals(whole)


@pytest.mark.parametrize("level", [80, [80], (80.0,), np.array([80]), [80, 80], np.int64(80)], ids=str)
def test_levels_and_sizes_may_be_numbers_of_any_kind(level):
    model = Forecaster(np.int64(5), config=LINEAR, level=level, season=np.int32(7)).fit(series())
    names = ["unique_id", "ds", "xLSTM", "xLSTM-lo-80", "xLSTM-hi-80"]
    assert list(model.predict(h=np.int64(3), baselines=False).columns) == names
    assert list(model.predict(level=level, baselines=False).columns) == names
    assert list(model.predict(quantiles=0.1, baselines=False).columns) == [*names[:3], "xLSTM_ql0.1"]
    assert len(model.cross_validation(n_windows=np.int64(2))) == 10


def excel(data, path):
    """As a spreadsheet of central Europe writes it."""
    text = data.to_csv(index=False, sep=";", decimal=",")
    path.write_text("sep=;\n" + text, encoding="utf-8-sig")


MAKES = {
    "table.csv": lambda data, path: write_table(data, path),
    "table.tsv": lambda data, path: write_table(data, path),
    "table.csv.gz": lambda data, path: data.to_csv(path, index=False),
    "table.zip": lambda data, path: data.to_csv(path, index=False, sep=";"),
    "semicolon.csv": lambda data, path: data.to_csv(path, index=False, sep=";", decimal=","),
    "utf16.csv": lambda data, path: data.to_csv(path, index=False, sep="\t", encoding="utf-16"),
    "excel.csv": excel,
    "indexed.csv": lambda data, path: data.to_csv(path),
    "empty column.csv": lambda data, path: data.assign(**{"": np.nan}).to_csv(path, index=False),
    "blank lines.csv": lambda data, path: path.write_text("\n\n" + data.to_csv(index=False, sep=";", decimal=",")),
    "longer lines.csv": lambda data, path: path.write_text(
        "ds,y\n" + ",\n".join(data.to_csv(index=False).split("\n")[1:])
    ),
    "empty rows.csv": lambda data, path: path.write_text(data.to_csv(index=False) + ",\n,\n"),
}


@pytest.mark.parametrize("name", MAKES)
def test_tables_of_many_makes_are_read(name, tmp_path):
    path = tmp_path / name
    MAKES[name](series(), path)
    found = panel_of(read_table(path))
    found = Forecaster(H, config=LINEAR).fit(found).panel if name == "empty column.csv" else found
    assert np.allclose(found.y, Y) and found.freq == "D"


@pytest.mark.parametrize("index", [["ds"], [None], ["unique_id", "ds"]], ids=str)
def test_keys_in_the_index_of_a_file_are_columns(index, tmp_path, monkeypatch):
    data = panel_frame() if "unique_id" in index else series()
    held = data.set_index([name or "ds" for name in index]).rename_axis(index)
    monkeypatch.setattr(pd, "read_parquet", lambda path: held)
    found = panel_of(read_table(tmp_path / "table.parquet"))
    assert np.array_equal(found.y, panel_of(data).y) and found.freq == "D"


def test_a_baseline_without_an_error_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    series().assign(y=np.arange(N) % 7).to_csv("table.csv", index=False)
    command = "forecast table.csv --horizon 7 --fit.members linear --fit.max-lookback 14"
    assert main(command.split()) == 0
    assert "SeasonalNaive was better there and without an error" in capsys.readouterr().out


# mae, pinball, coverage 80 of xLSTM, SeasonalNaive and Linear, all over the naive forecast; the beginning of what is said.
VERDICTS = {
    ((0.9, 0.9, 0.8), (1.0, 1.0, 0.8), (0.95, 0.95, 0.8)): "",
    ((1.0, 1.0, 0.8), (1.0, 1.0, 0.8), (1.2, 1.2, 0.8)): "",
    ((0.225, 0.392, 1.0), (1.0, 1.0, 0.8), (0.247, 0.313, 0.8)): "no baseline was better there in mean absolute error; "
    "xLSTM's intervals cost 25.2 % more pinball loss than Linear's: they are widened for what comes after it",
    ((0.9, 0.99, 0.7), (1.0, 1.0, 0.8), (0.95, 0.9, 0.8)): "no baseline was better there in mean absolute error; "
    "xLSTM's intervals cost 10.0 % more pinball loss than Linear's",
    (
        (1.1, 0.9, 0.8),
        (1.0, 1.0, 0.8),
        (1.2, 0.95, 0.8),
    ): "SeasonalNaive was better there by 10.0 % in mean absolute error",
    (
        (1.1, 1.1, 1.0),
        (1.0, 1.0, 0.8),
        (0.88, 0.9, 0.8),
    ): "Linear, a single ridge beside the blend, was better there by 25.0 % in mean absolute error",
}


@pytest.mark.parametrize("scores", VERDICTS, ids=str)
def test_the_verdict_compares_medians_and_tells_intervals_apart(scores):
    names = ("xLSTM", "SeasonalNaive", "Linear")
    skill = pd.DataFrame(
        [{"model": name, **dict(zip(("mae", "pinball", "coverage 80"), row))} for name, row in zip(names, scores)]
    )
    told, wanted = verdict(skill), VERDICTS[scores]
    assert told.startswith(wanted) and ("widened" in told) == ("widened" in wanted) and bool(told) == bool(wanted)


@pytest.mark.parametrize(
    ("first", "step", "said"),
    [
        (44_600, 1, "a spreadsheet's days"),
        (1_700_000_000, 3600, "are seconds"),
        (1_700_000_000_000, 60_000, "milliseconds"),
    ],
)
def test_whole_numbers_that_may_be_dates_are_told(first, step, said):
    for start in (first, 1):
        told = panel_of(series().assign(ds=start + step * np.arange(N))).told
        assert any(said in line and "write them as dates" in line for line in told) == (start > 1)


def test_times_that_are_numbers_may_have_a_season(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    y = np.arange(N) % 6 + np.sin(np.arange(N))
    pd.DataFrame({"t": 1_700_000_000 + 3600 * np.arange(N), "y": y}).to_csv("table.csv", index=False)
    command = [
        "forecast",
        "table.csv",
        "--time",
        "t",
        "--fit.members",
        "naive",
        "--out",
        "fc.csv",
        "--model",
        "kept",
        "--season",
        "6",
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"1 series, {N} steps, season 6" in told and "horizon 6: no --horizon was given" in told
    assert "or give one with --season (season)" in told
    assert read_table(tmp_path / "fc.csv").SeasonalNaive.to_numpy() == pytest.approx(y[-6:], abs=1e-4)
    assert main(command) == 0 and main([*command[:-1], "5"]) == 2
    assert "a model of season 6, --season is 5" in capsys.readouterr().err


# Month and year as spreadsheets write them.
@pytest.mark.parametrize("form", ["%b-%y", "%B-%y", "%b %y", "%b/%y", "%b '%y"])
@pytest.mark.parametrize("freq", ["MS", "QS-MAR", "YS-JAN"])
@pytest.mark.parametrize("first", ["2012-01-01", "2013-01-01", "1969-03-01"])
def test_a_month_and_two_digits_are_a_month_of_a_year(first, freq, form):
    times = pd.date_range(first, periods=40, freq=freq)
    read, zone = frequency.parse_times(pd.Series(times.strftime(form)), "Month")
    assert zone is None and list(read) == list(times)


def test_spaces_around_ids_are_no_part_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = panel_frame().assign(x=1.0)
    fitted = forecaster(futr_exog="x", target_col="y").fit(plain)
    future = plain.groupby("unique_id").tail(H).assign(ds=lambda f: f.ds + pd.Timedelta(f"{H}D"))
    spaced = (f.assign(unique_id=[i + " " * (n % 2) for n, i in enumerate(f.unique_id)]) for f in (plain, future))
    frame, ahead = spaced
    said = []
    found = forecaster(futr_exog="x", target_col="y", report=said.append).fit(frame)
    assert "the ids of column 'unique_id' are read without the spaces around them" in said
    pd.testing.assert_frame_equal(found.predict(futr_df=ahead), fitted.predict(futr_df=future))
    forecaster(target_col="y").fit(plain.drop(columns="x")).save("model")
    whole = forecaster(target_col="y").fit(plain.drop(columns="x")).predict(baselines=False)
    frame.drop(columns="x").to_csv("table.csv", index=False)
    assert main(["forecast", "table.csv", "--model", "model", "--out", "parts", "--workers", "1"]) == 0
    assert len(read_table(tmp_path / "parts" / "part-00000.csv")) == len(whole)


HELPERS = {
    (
        "sales",
        "open",
        "week",
    ): "; if 'open', 'week' only help, name them with --exog (futr_exog), and what is forecast with "
    "--target (target_col)",
    ("sales", "returns", "IsHoliday"): "; if 'IsHoliday' only helps, name it with --exog",
    ("sales", "returns"): "",
    ("open", "shut"): "",
}


@pytest.mark.parametrize("names", HELPERS, ids=str)
def test_columns_that_may_help_are_told_among_series(names):
    values = {
        "sales": Y,
        "returns": Y / 2,
        "open": 1,
        "shut": 0,
        "week": np.arange(N) // 7,
        "IsHoliday": np.arange(N) % 3,
    }
    (told,) = (
        t for t in panel_of(series().drop(columns="y").assign(**{n: values[n] for n in names})).told if "every" in t
    )
    start = f"every column of numbers is a series: {', '.join(map(repr, names))}"
    assert told.startswith(start + HELPERS[names]) and ("help" in told) == bool(HELPERS[names])


# Endings of times in text: the offset that is told.
@pytest.mark.parametrize(
    ("ends", "offset"), [("Z", ""), ("+00:00", ""), ("+01:00", "+01:00"), (None, "+01:00 and others")]
)
def test_offsets_without_a_zone_are_told(ends, offset):
    times = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")
    text = [t.isoformat() if ends is None else t.isoformat()[:-6] + ends for t in times[:20] if ends] or [
        t.isoformat() for t in times
    ]
    told = panel_of(pd.DataFrame({"ds": text, "y": 1.0})).told
    wanted = f"the times of column 'ds' have the offset {offset} and no zone, and are counted and forecast in UTC"
    assert (wanted in told) == bool(offset) and any("offset" in t for t in told) == bool(offset)
    assert not any("offset" in t for t in panel_of(pd.DataFrame({"ds": times, "y": 1.0})).told)


def test_what_holds_no_numbers_is_left_out_and_told():
    told = panel_of(series().rename(columns={"y": "sold"}).assign(price="$3", note=None)).told
    assert "left out, as not all that they hold are numbers: 'price', 'note'" in told


def test_a_column_of_lists_tells_no_series_apart():
    data = panel_frame().rename(columns={"unique_id": "branch"}).assign(tags=[["a", "b"]] * (2 * N))
    assert panel_of(data[["tags", "branch", "ds", "y"]]).columns.id == "branch"


def test_a_column_that_is_to_be_forecast_tells_no_series_apart():
    found = Forecaster(H, target_col="sku", config=LINEAR).fit(series().rename(columns={"y": "sku"}))
    assert found.panel.columns.id == "" and len(found.predict()) == H


def test_a_text_that_is_no_utf8_is_read_and_told(tmp_path):
    path = tmp_path / "table.csv"
    series().rename(columns={"y": "Größe"}).to_csv(path, index=False, encoding="cp1252")
    with pytest.warns(UserWarning, match="is no UTF-8 and is read as Windows-1252"):
        assert "Größe" in read_table(path).columns
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="cannot be read as a table: it is no text"):
        read_table(path)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (["1.050,5", "999,25", "1.234.567"], [1050.5, 999.25, 1234567]),
        (["1.050", "999", "12.300"], [1050, 999, 12300]),
        # Nothing says that these are not fractions.
        (["1.050", "0.999", "12.300"], [1.05, 0.999, 12.3]),
        (["1.125", "999", "12.375"], [1.125, 999, 12.375]),
        (["1.050", "2.999", "12.300"], [1.05, 2.999, 12.3]),
    ],
    ids=str,
)
def test_points_between_thousands_are_no_fractions(written, wanted, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("ds;y\n" + "".join(f"0{i + 1}.02.2024;{y}\n" for i, y in enumerate(written)))
    assert read_table(path).y.tolist() == wanted
    # A comma in another column says it for all.
    path.write_text("ds;x;y\n" + "".join(f"0{i + 1}.02.2024;1,5;{y}\n" for i, y in enumerate(["1.050", "2.999"])))
    assert read_table(path).y.tolist() == [1050, 2999]


@pytest.mark.parametrize(
    ("sep", "written", "wanted"),
    [
        (",", ["1,050.5", "", "1,234,567"], [1050.5, np.nan, 1234567]),
        (",", ["-1,050", "12,345"], [-1050, 12345]),
        ("\t", ["1,050", "999"], [1050, 999]),
        # Fractions whose point is a comma, or that may be.
        (",", ["1,050", "12,5"], None),
        (",", ["1,050", "0,125"], None),
        ("\t", ["1,050", "12,345"], None),
    ],
    ids=str,
)
def test_commas_between_thousands_are_read_and_told(sep, written, wanted, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("".join(f'{ds}{sep}"{y}"\n' for ds, y in [("ds", "y"), *zip("abc", written, strict=False)]))
    if wanted is None:
        assert read_table(path).y.tolist() == written
    else:
        with pytest.warns(UserWarning, match="the commas in column 'y' are read as those between thousands"):
            assert read_table(path).y.tolist() == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(
    "shops", [["007", "010"], ["1.100", "1.200"], ["1.1", "1.10"], ["NA", "8"], ["NA", "null"]], ids=str
)
@pytest.mark.parametrize(("column", "sep", "decimal"), [("store", ",", "."), ("Kunde", ";", ",")])
def test_ids_stay_what_they_are(shops, column, sep, decimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pd.concat([series().assign(**{column: shop}) for shop in shops])
    data.to_csv("table.csv", index=False, sep=sep, decimal=decimal)
    fit = "--fit.members naive linear --fit.max-lookback 14 --horizon 7 --model kept --out fc.csv"
    assert main(f"forecast table.csv --target y --id {column} {fit}".split()) == 0
    for _ in range(2):
        # The second time the saved model says which column holds ids.
        assert read_table(tmp_path / "fc.csv", column)[column].unique().tolist() == shops
        assert main(["forecast", "table.csv", "--model", "kept", "--out", "fc.csv"]) == 0
    data[data[column] == shops[0]].replace(shops[0], "117").to_csv("whole.csv", index=False)
    # Nothing says there that an id is a text, but the table that it belongs to.
    assert read_table(tmp_path / "whole.csv", column)[column].unique().tolist() == [117]
    assert read_table(tmp_path / "whole.csv", column, data)[column].unique().tolist() == ["117"]


def test_a_zero_has_no_sign():
    """Sales now and then: what is nothing is shown as 0, not as -0."""
    found = forecaster().fit(series().assign(y=[3.0 * (i % 10 == 0) for i in range(N)])).predict()
    values = found.select_dtypes("number").to_numpy()
    assert (values == 0).any() and not np.signbit(values[values == 0]).any()


def test_what_the_future_holds_is_known_and_the_rest_is_past(tmp_path, monkeypatch, capsys):
    """Of the columns that help, each on its own."""
    monkeypatch.chdir(tmp_path)
    data = series().assign(x=np.cos(np.arange(N)), z=np.sin(np.arange(N)))
    data[:-H].to_csv("past.csv", index=False)
    data[-H:][["ds", "x"]].to_csv("future.csv", index=False)
    command = "forecast past.csv --target y --exog x z --future future.csv --horizon 7 --out fc.csv --model kept"
    assert main([*command.split(), "--fit.members", "naive", "linear", "--fit.max-lookback", "14"]) == 0
    assert "known for the future: x; for the past only: z" in capsys.readouterr().out
    columns = Forecaster.load("kept").panel.columns
    assert (columns.futr, columns.hist) == (("x",), ("z",))
    assert len(read_table(tmp_path / "fc.csv")) == H
