"""A forecast of bad data: one sentence that says what came and what was wanted, exit code 2, and nothing written."""

import json
from datetime import timedelta, timezone

import numpy as np
import pytest

from exlstm import Forecaster, cli
from exlstm.forecast.config import FitConfig

pd = pytest.importorskip("pandas")
DAYS = pd.date_range("2024-01-01", periods=40)
GOOD = pd.DataFrame({"ds": DAYS, "y": np.arange(40.0) % 7, "x": np.arange(40.0)})
HOURS = pd.DataFrame(
    {"ds": pd.date_range("2024-03-01", periods=80, freq="h", tz="Europe/Berlin"), "y": np.arange(80.0) % 7}
)
UNALIGNED = FitConfig(variates="attention", lookback=7, steps=1)
LINEAR = FitConfig(members=("naive", "linear"), max_lookback=14)
FAST = "--fit.members naive linear --fit.max-lookback 14"


def changed(row, column, value):
    frame = GOOD.astype({column: object})
    frame.loc[row, column] = value
    return frame


# file: its content
FILES = {
    "good.csv": GOOD,
    "header.csv": GOOD.iloc[:0],
    "single.csv": GOOD[["y"]],
    "row.csv": GOOD.iloc[:1],
    "short.csv": GOOD.iloc[:9],
    "notime.csv": GOOD[["y", "x"]],
    "text.csv": changed(4, "y", "seven"),
    "inf.csv": changed(4, "y", np.inf),
    "huge.csv": changed(4, "y", 1e40),
    "vast.csv": f"ds,y\n2024-01-01,{'9' * 400}\n2024-01-02,3\n",
    "missing.csv": GOOD.assign(y=np.nan),
    "tail.csv": GOOD.assign(y=GOOD.y.where(GOOD.index < 33)),
    "date.csv": changed(4, "ds", "the fifth"),
    "hole.csv": changed(4, "ds", None),
    "twice.csv": pd.concat([GOOD, GOOD.iloc[[3]]]),
    "mixed.csv": changed(5, "ds", "2024-01-06 07:13:00"),
    "zones.csv": changed(5, "ds", "2024-01-06T00:00:00+02:00"),
    "autumn.csv": pd.DataFrame(
        {"ds": pd.to_datetime(["2024-10-27 01:00", "2024-10-27 02:00", "2024-10-27 02:00"]), "y": 1.0}
    ),
    "months.csv": pd.DataFrame({"ds": ["2024-01-31", "2024-02-29", "2024-03-15", "2024-04-30"], "y": 1.0}),
    "fifteenth.csv": pd.DataFrame({"ds": [f"2024-{month:02}-15" for month in range(1, 13)], "y": 1.0}),
    "column_twice.csv": "ds,y,y\n2024-01-01,1,2\n2024-01-02,1,2\n",
    "empty.csv": "",
    "blank.csv": "ds;y\n;\n;\n",
    "ragged.csv": "ds,y\n2024-01-01,1\n2024-01-02,1,3,4\n",
    "words.csv": pd.DataFrame({"ds": DAYS, "name": [f"n{i}" for i in range(40)], "place": "x"}),
    "two.csv": pd.DataFrame({"id": ["a", "b"] * 20, "ds": np.repeat(DAYS[:20], 2), "p": 1.0, "q": 2.0}),
    "noid.csv": pd.DataFrame({"id": ["a", None] * 20, "ds": np.repeat(DAYS[:20], 2), "y": 1.0}),
    "future.csv": pd.DataFrame({"ds": pd.date_range("2024-02-10", periods=7), "x": 1.0}),
    "future_short.csv": pd.DataFrame({"ds": pd.date_range("2024-02-10", periods=5), "x": 1.0}),
    "future_hole.csv": pd.DataFrame({"ds": pd.date_range("2024-02-10", periods=7), "x": [1.0, np.nan, *[1.0] * 5]}),
    "future_other.csv": pd.DataFrame({"ds": pd.date_range("2024-02-10", periods=7), "z": 1.0}),
    "future_twice.csv": pd.DataFrame({"ds": [pd.Timestamp("2024-02-10")] * 7, "x": 1.0}),
    "weekly.csv": pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=40, freq="7D"), "y": 1.0, "x": 1.0}),
    "other_columns.csv": GOOD.rename(columns={"y": "sales"}),
    "noheader.csv": "2024-01-01,1\n2024-01-02,2\n2024-01-03,3\n",
    "far.csv": pd.DataFrame({"ds": [f"{year}-01-01" for year in range(2990, 3030)], "y": 1.0}),
    "fake.csv.gz": "ds,y\n",
    "fake.zip": "ds,y\n",
    "book.xlsx": "PK",
    "shops.csv": pd.DataFrame({"ds": [*DAYS[:20], *DAYS[:20]], "filiale": [1] * 20 + [2] * 20, "sold": 1.0}),
    "keys.csv": pd.DataFrame({"ds": [*DAYS[:20]] * 2, "store": "a", "product": ["x"] * 20 + ["y"] * 20, "sold": 1.0}),
    "parts.csv": pd.DataFrame(
        {"date": np.repeat(DAYS[:5].strftime("%Y-%m-%d"), 24), "hour": [*range(24)] * 5, "load": 1.0}
    ),
    "year.csv": pd.DataFrame({"year": np.repeat([2022, 2023, 2024], 12), "month": [*range(1, 13)] * 3, "v": 1.0}),
    "calendar.csv": pd.DataFrame({"year": DAYS.year, "month": DAYS.month, "day": DAYS.day, "v": 1.0}),
    "days.csv": pd.DataFrame({"day": DAYS.strftime("%b-%d"), "v": 1.0}),
    "nomonth.csv": pd.DataFrame({"date": ["Jan-12", "Feb-12", "Fab-12"], "v": 1.0}),
    "x.json": '[{"ds": "2024-01-01", "y": 1}]',
    "x.feather": "ARROW1",
    "bad.tsf": "@relation x\n@frequency daily\n@data\nT1:1,2,three\n",
    "none.tsf": "hello\n",
}
# command: what its sentence must say
COMMANDS = {
    "forecast nothing.csv": "there is no file nothing.csv",
    "forecast .": ". is a folder",
    "forecast empty.csv": "empty.csv is empty",
    "forecast header.csv": "has a header and no rows",
    "forecast single.csv": "single column 'y'",
    "forecast ragged.csv": "ragged.csv cannot be read as a table",
    "forecast notime.csv": "no column looks like a time",
    "forecast good.csv --time when": "there is no column 'when' (time)",
    "forecast good.csv --target yy": "there is no column 'yy' (target), did you mean 'y'?",
    "forecast good.csv --id shop": "there is no column 'shop' (id)",
    "forecast good.csv --exog price": "there is no column 'price' (covariate)",
    "forecast good.csv --target y --exog y": "column 'y' is asked for twice",
    "forecast words.csv --id place": "column 'name' holds 'n0' in row 1, wanted a number",
    "forecast two.csv": "'p', 'q' could all be forecast; name one with --target (target_col)",
    "forecast noid.csv": "column 'id' has no id in row 2",
    "forecast row.csv --target y": "a single row",
    "forecast short.csv --target y --horizon 7": "the longest series has 9 rows, a horizon of 7 wants at least 21",
    "forecast text.csv --target y": "column 'y' holds 'seven' in row 5, wanted a number",
    "forecast inf.csv --target y": "column 'y' holds an infinity in row 5",
    "forecast huge.csv --target y": "more than 1e30",
    "forecast vast.csv --target y": "column 'y' holds a whole number of more than 1e308",
    "forecast missing.csv --target y": "every value of the target is missing in series 'y'",
    "forecast date.csv --target y": "column 'ds' holds 'the fifth' in row 5, which is no time",
    "forecast hole.csv --target y": "column 'ds' has no time in row 5",
    "forecast twice.csv --target y": "2024-01-04 00:00:00 stands twice in column 'ds'",
    "forecast mixed.csv --target y": "2024-01-06 07:13:00 is no step of frequency 'D'",
    "forecast zones.csv --target y": "mixes times with and without a zone",
    "forecast autumn.csv": "if clocks went back then, give times with their zone",
    "forecast months.csv": "is no step of frequency",
    "forecast fifteenth.csv": "the times are months apart and all on day 15 of one, wanted months by their first or last day",
    "forecast good.csv --model plain --future future.csv": "plain holds a model without covariates known for the future",
    "forecast good.csv --target y --freq fortnight": "freq is 'fortnight', wanted a pandas alias",
    "forecast good.csv --target y --freq W-SUN": "is no step of frequency 'W-SUN'",
    "forecast good.csv --target y --horizon -1": "horizon is -1",
    "forecast good.csv --target y --horizon seven": "--horizon is 'seven', wanted a number",
    "forecast good.csv --target y --level .8": "level holds 0.8, wanted percent, as 80 or 95",
    "forecast good.csv --target y --level 120": "level holds 120.0, wanted numbers between 0 and 100",
    "forecast good.csv --target y --level 80 ninety": "--level is 'ninety', wanted a number",
    "forecast good.csv --target y --horizon 1000000": "the longest series has 40 rows, a horizon of 1000000 wants",
    "forecast good.csv --target y --horizon 7 --fit.val-size 50": "a horizon of 7 with a val_size of 50 wants at least 64",
    "forecast good.csv --target y --horizon 7 --cv 5": "5 rows before the last 35, which are the test, a horizon of 7",
    "forecast good.csv --target y --horizon 7 --cv 9": "0 rows before the last 63, which are the test, a horizon of 7",
    "forecast blank.csv": "blank.csv has a header and no rows",
    "forecast good.csv --target y --cv -2": "cv is -2",
    "forecast good.csv --target y --fit.members oracle": "unknown member 'oracle'",
    "forecast good.csv --target y --fit.blocks slst": "unknown block 'slst'",
    "forecast good.csv --target y --fit.lr 0": "lr is 0.0, wanted a number above 0",
    "forecast good.csv --target y --fit.variates atention": "variates is 'atention', did you mean 'attention'?",
    "forecast good.csv --target y --fit.design patch": "design is 'patch', did you mean 'patches'?",
    "forecast good.csv --target y --fit.dropout 1": "dropout is 1.0, wanted 0 ≤ dropout < 1",
    "forecast good.csv --target y --fit.n-heads 0": "n_heads is 0, wanted a whole number of at least 1",
    "forecast tail.csv --target y --horizon 7": "the last 7 steps, which choices and intervals go by, hold no value",
    "forecast good.csv --target y --device gpu9": "device 'gpu9' cannot be used here",
    "forecast good.csv --target y --horizn 3": "unknown field --horizn, did you mean --horizon?",
    "forecast good.csv --target y --out nowhere/fc.csv": "there is no folder",
    "forecast good.csv --target y --out fc.csv --fit.val-size 3": "val_size is 3, wanted at least the horizon",
    "forecast good.csv --target y --model thesis": "thesis holds no forecaster and is not empty",
    "forecast good.csv --target y --future future.csv": "--future holds covariates, but no --exog names them",
    "forecast good.csv --target y --exog x --future future_short.csv": "lack 2 of 7 rows: 2024-02-15 00:00:00, 2024-02-16",
    "forecast good.csv --target y --exog x --future future_hole.csv": "'x' is missing at 2024-02-11",
    "forecast good.csv --target y --exog x --future future_other.csv": "the future covariates lack column 'x'",
    "forecast good.csv --target y --exog x --future future_twice.csv": "hold 2024-02-10 00:00:00 twice",
    "forecast good.csv --model kept": "the model was fitted with x known for the future",
    "forecast other_columns.csv --model kept --future future.csv": "there is no column 'y' (target)",
    "forecast weekly.csv --model kept --future future.csv": "only 40 of 274 steps of frequency 'D' have a row",
    "forecast good.csv --model kept --horizon 9": "holds a model for a horizon of 7, --horizon is 9",
    "forecast good.csv --model damaged": "tensors.safetensors",
    "forecast good.csv --target y --workers 2": "--workers wants a table, a fitted model in --model",
    "forecast good.csv --model kept --out parts --workers 2 --cv 1": "neither --exog, --future, --cv nor --plot",
    "forecast good.csv --model kept --out parts --workers 2": "so it has no parts",
    "forecast noheader.csv": "the first line of noheader.csv holds '2024-01-01', wanted the names of the columns",
    "forecast far.csv": "column 'ds' holds times from 2990-01-01 00:00:00 to 3029-01-01 00:00:00, wanted years from",
    "forecast good.csv --target y --out good.csv": "good.csv is to be read and written",
    "forecast good.csv --target y --exog x --future future.csv --out future.csv": "future.csv is to be read and written",
    "forecast good.csv --target y --out thesis": "thesis is a folder, wanted a file",
    "forecast good.csv --target y --out fc.xlsx": "fc.xlsx is to be a .xlsx file, wanted CSV",
    "forecast good.csv --target y --plot figure.png": "figure.png is a folder, wanted a file for the picture",
    "forecast good.csv --target y --out new.csv --model new.csv": "new.csv is to hold the model and the forecast",
    "forecast good.csv --target y --plot fc.doc": "fc.doc names no kind of picture by its ending",
    "forecast good.csv --model kept --target x --future future.csv": "holds a model with target 'y', --target is 'x'",
    "forecast good.csv --model kept --exog z --future future.csv": "a model with covariates x, --exog is z",
    "forecast good.csv --model kept --freq W --future future.csv": "a model of frequency 'D', --freq is 'W'",
    "forecast good.csv --model kept --static x --future future.csv": "with static columns none, --static is x",
    "forecast good.csv --model kept --fit.lookback 5 --future future.csv": "with lookback 0, --fit.lookback is 5",
    "forecast fake.csv.gz": "fake.csv.gz cannot be read as a table: Not a gzipped file",
    "forecast fake.zip": "fake.zip cannot be read as a table: File is not a zip file",
    "forecast book.xlsx": "book.xlsx is a spreadsheet, wanted CSV or Parquet",
    "forecast shops.csv": "stands twice in column 'ds' of series 'filiale'; if a column tells series apart, name it with --id",
    "forecast keys.csv": "twice in column 'ds' of series 'a'; if several columns joined in one tell series apart",
    "forecast parts.csv": "column 'date' alone does not tell the times apart, together with 'hour' it does; join them into one",
    "forecast year.csv": "column 'month' alone does not tell the times apart, together with 'year' it does; join them",
    "forecast calendar.csv": "column 'month' alone does not tell the times apart, together with 'year', 'day' it does; join",
    "forecast days.csv": "column 'day' holds 'Jan-01' in row 1, which is a day without its year",
    "forecast nomonth.csv": "column 'date' holds 'Fab-12' in row 3, which is no time",
    "forecast x.json": "x.json is a .json file, wanted CSV, Parquet or .tsf",
    "forecast x.feather": "x.feather is a .feather file, wanted CSV, Parquet or .tsf",
    "forecast https://localhost/a.csv": "https://localhost/a.csv is an address, wanted a file: download it",
    "forecast good.csv --target y --exog x --future s3://b/a.csv": "s3://b/a.csv is an address, wanted a file",
    "forecast good.csv --target y --season -2": "season is -2, wanted at least 0",
    "forecast good.csv --model plain --season 5": "a model of season 7, --season is 5",
    "forecast bad.tsf": "bad.tsf has 2 fields in line 4, wanted 1",
    "forecast none.tsf": "not a .tsf file",
    "bench forecast good.csv": "good.csv has 40 rows, 4 to choose by and 8 to test on, too few for a horizon of 60",
    "forecast column_twice.csv --target y --level 80 --freq 3": "freq is '3'",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every kind of bad data, a saved model and a damaged one."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            content.to_csv(folder / name, index=False)
    (folder / "thesis").mkdir()
    (folder / "figure.png").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("x")
    model = Forecaster(7, target_col="y", futr_exog="x", config=LINEAR).fit(GOOD)
    for name in ("kept", "damaged"):
        model.save(folder / name)
    Forecaster(7, target_col="y", config=LINEAR).fit(GOOD).save(folder / "plain")
    tensors = folder / "damaged" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_forecast_is_one_sentence(command, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = contents(place)
    words = command.split() + (FAST.split() if "--fit.members" not in command else [])
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("exlstm: ")
    assert told.count("\n") == 1, told
    assert COMMANDS[command] in told
    assert contents(place) == before


@pytest.fixture(scope="module")
def model():
    return Forecaster(7, target_col="y", config=LINEAR).fit(GOOD[["ds", "y"]])


# what is wrong, and what the sentence must say
CALLS = {
    "not fitted": (lambda m: Forecaster(3).predict(), "has not been fitted"),
    "a dictionary": (lambda m: Forecaster(3).fit({"y": [1]}), "the data is dict, wanted a pandas or polars frame"),
    "three axes": (lambda m: Forecaster(3).fit(np.zeros((2, 2, 2))), "shape (2, 2, 2)"),
    "times in an array": (lambda m: Forecaster(3).fit(DAYS), "no number"),
    "complex objects": (
        lambda m: Forecaster(3).fit(GOOD[["ds", "y"]].assign(y=(GOOD.y + 1j).astype(object))),
        "column 'y' holds 1j in row 1, wanted a number",
    ),
    "text in an array": (lambda m: Forecaster(3).fit(["a", "b"]), "no number"),
    "an empty frame": (lambda m: Forecaster(3).fit(GOOD.iloc[:0]), "the data has no rows"),
    "horizon 0": (lambda m: Forecaster(0), "horizon is 0"),
    "a season of truth": (lambda m: Forecaster(3, season=True), "season is True, wanted a whole number"),
    "a look-back beyond memory": (
        lambda m: Forecaster(3, input_size=10**5),
        "lookback is 100000, wanted at most 16384",
    ),
    "a horizon of truth": (lambda m: m.predict(h=True), "h is True, wanted 1 to 7"),
    "an array without its covariate": (
        lambda m: Forecaster(3, futr_exog="x").fit(np.arange(40.0)),
        "the data is an array without columns, so there is no column 'x' (covariate)",
    ),
    "a Series without its covariate": (
        lambda m: Forecaster(3, hist_exog="x").fit(GOOD.set_index("ds").y),
        "there is no column 'x' (covariate)",
    ),
    "a Series of nothing": (lambda m: Forecaster(3).fit(GOOD.y[:0]), "the data has no rows"),
    "a Series without zone after a zone": (
        lambda m: (
            Forecaster(3, config=LINEAR)
            .fit(HOURS.set_index("ds").y)
            .predict(HOURS.set_index(DAYS[0] + np.arange(80) * pd.Timedelta("1h")).y)
        ),
        "have no zone, the model was fitted on times in Europe/Berlin",
    ),
    "a season of none": (lambda m: Forecaster(3, season=0), "season is 0"),
    "further than fitted": (lambda m: m.predict(h=9), "h is 9, wanted 1 to 7"),
    "level and quantiles": (lambda m: m.predict(level=[80], quantiles=[0.1]), "are both given"),
    "settings in a dict": (lambda m: Forecaster(3, config={"seed": 1}), "config is dict, wanted a FitConfig"),
    "a level that is a share": (lambda m: m.predict(level=0.9), "level holds 0.9, wanted percent, as 80 or 95"),
    "an evaluation without history": (
        lambda m: Forecaster(3, config=LINEAR).evaluate(m.cross_validation()),
        "has not been fitted; call fit(df) first, or give the whole data as df",
    ),
    "a quantile of 2": (lambda m: m.predict(quantiles=[2]), "quantiles hold 2"),
    "a quantile of 2 in a test": (lambda m: m.cross_validation(quantiles=[2]), "quantiles hold 2"),
    "level and quantiles of a test": (lambda m: m.cross_validation(level=[80], quantiles=[0.1]), "are both given"),
    "no windows": (lambda m: m.cross_validation(n_windows=0), "n_windows is 0"),
    "more windows than rows": (
        lambda m: m.cross_validation(n_windows=9),
        "has 0 rows before the last 63, which are the test",
    ),
    "a gap before the update": (lambda m: m.update(GOOD.iloc[[20]][["ds", "y"]]), "wanted 2024-02-10 00:00:00"),
    "an unknown metric": (
        lambda m: m.evaluate(m.cross_validation(), metrics=["mase", "luck"]),
        "unknown metric 'luck'",
    ),
    "forecasts without truth": (lambda m: m.evaluate(m.predict()), "give the true values as df"),
    "column twice": (lambda m: Forecaster(3).fit(GOOD.set_axis(["ds", "y", "y"], axis=1)), "stands twice in the data"),
    "truth and number": (lambda m: Forecaster(3).fit(GOOD.assign(ds=DAYS[3] < DAYS)), "wanted timestamps"),
    "no folder": (lambda m: Forecaster.load("nowhere"), "nowhere is no folder"),
    "unaligned variates": (
        lambda m: Forecaster(3, config=FitConfig(variates="attention", lookback=7, steps=1)).fit(
            [np.arange(40.0), np.arange(41.0)]
        ),
        "wants series of one length and begin",
    ),
    "an array after a frame": (lambda m: m.predict(np.arange(40.0)), "is an array without times, the model was fitted"),
    "zones in rows of any index": (
        lambda m: Forecaster(3).fit(HOURS.astype({"ds": str}).replace({"ds": {str(HOURS.ds[7]): "2024-03-01"}})[::-1]),
        "mixes times with and without a zone, row 73 is '2024-03-01'",
    ),
    "a zone without a name": (
        lambda m: Forecaster(3).fit(HOURS.assign(ds=HOURS.ds.dt.tz_convert(timezone(timedelta(hours=1), "here")))),
        "the times of column 'ds' are in the zone here, wanted one with a name",
    ),
    "no zone after a zone": (
        lambda m: Forecaster(3, config=LINEAR).fit(HOURS).predict(HOURS.assign(ds=HOURS.ds.dt.tz_localize(None))),
        "have no zone, the model was fitted on times in Europe/Berlin",
    ),
    "a future without zone": (
        lambda m: (
            Forecaster(3, futr_exog="x", target_col="y", config=LINEAR)
            .fit(HOURS.assign(x=1.0))
            .predict(futr_df=HOURS.assign(x=1.0, ds=HOURS.ds.dt.tz_localize(None)))
        ),
        "the times of the future covariates have no zone, those of the data are in Europe/Berlin",
    ),
    "id and time in one": (
        lambda m: Forecaster(3, id_col="ds").fit(GOOD),
        "'ds' is asked for twice among id, time and",
    ),
    "a covariate twice": (
        lambda m: Forecaster(3, futr_exog="x", hist_exog="x", target_col="y").fit(GOOD),
        "column 'x' is asked for twice as a covariate",
    ),
    "a static one that changes": (
        lambda m: Forecaster(3, stat_exog="x", target_col="y").fit(GOOD),
        "column 'x' changes within a series",
    ),
    "complex numbers": (lambda m: Forecaster(3).fit(np.ones(40, complex)), "no number"),
    "column twice but for a space": (
        lambda m: Forecaster(3).fit(GOOD.assign(**{" y": 1.0})),
        "column 'y' stands twice",
    ),
    "a future with a column twice": (
        lambda m: (
            Forecaster(7, target_col="y", futr_exog="x", config=LINEAR)
            .fit(GOOD)
            .predict(futr_df=GOOD[["ds", "x", "x"]].set_axis(["ds", "x", "x"], axis=1))
        ),
        "column 'x' stands twice",
    ),
    "a target named as the forecast": (
        lambda m: Forecaster(3, target_col="xLSTM").cross_validation(GOOD.rename(columns={"y": "xLSTM"})),
        "column 'xLSTM' has the name of a column of forecasts",
    ),
    "steps of nothing": (lambda m: Forecaster(3, freq="0D").fit(GOOD[["ds", "y"]]), "freq is '0D', wanted"),
    "steps backwards": (lambda m: Forecaster(3, freq="-1D").fit(GOOD[["ds", "y"]]), "freq is '-1D', wanted"),
    "a time of the name of an interval": (
        lambda m: Forecaster(3).fit(GOOD[["ds", "y"]].rename(columns={"ds": "xLSTM-hi-95"})),
        "column 'xLSTM-hi-95' has the name of a column of forecasts",
    ),
    "a target of the name of the ids": (
        lambda m: Forecaster(3, target_col="unique_id").fit(GOOD[["ds", "y"]].rename(columns={"y": "unique_id"})),
        "column 'unique_id' has the name of a column of forecasts",
    ),
    "an array of the future": (
        lambda m: Forecaster(3, target_col="y", futr_exog="x", config=LINEAR).fit(GOOD).predict(futr_df=np.ones(3)),
        "the data is ndarray, wanted a pandas or polars frame",
    ),
    "a wide frame over y": (
        lambda m: Forecaster(3, time_col="y").fit(GOOD.assign(z=1.0)[["ds", "x", "z"]].rename(columns={"ds": "y"})),
        "column 'y' has a name that a table with a column a series keeps free",
    ),
    "a duration": (lambda m: Forecaster(3).fit(GOOD.assign(y=pd.to_timedelta(GOOD.y, "s"))), "holds timedelta64"),
    "a complex column": (lambda m: Forecaster(3).fit(GOOD.assign(y=GOOD.y + 0j)), "holds complex128, wanted numbers"),
    "times without days": (
        lambda m: Forecaster(3).fit(GOOD.assign(ds=[f"{h % 24}:00" for h in range(40)])),
        "a time without its day",
    ),
    "an infinite static one": (
        lambda m: Forecaster(3, stat_exog="x", target_col="y").fit(GOOD.assign(x=np.inf)),
        "column 'x' holds an infinity",
    ),
    "a level that was not forecast": (
        lambda m: m.evaluate(m.cross_validation(), level=90),
        "the forecasts lack column 'xLSTM-lo-90'",
    ),
    "forecasts without times": (
        lambda m: m.evaluate(m.cross_validation().drop(columns="ds")),
        "the forecasts lack column 'ds'",
    ),
    "truth of other times": (
        lambda m: m.evaluate(m.predict(), df=GOOD[["ds", "y"]]),
        "there is no true value at any time of the forecasts",
    ),
    "a picture of nothing": (lambda m: m.plot(max_series=0), "there is nothing to draw: max_series is 0"),
    "a picture of no kind": (lambda m: m.plot(path="fc.doc"), "fc.doc names no kind of picture"),
    "covariates of text": (
        lambda m: Forecaster(3, futr_exog="x", target_col="y").fit(GOOD.assign(x="a")),
        "column 'x' holds 'a'",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_call_is_one_sentence(call, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempt, sentence = CALLS[call]
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        attempt(model)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"version": 99}, {"format": "other"}, {"fit": {"horizons": 3}}, {"linear": None}])
def test_a_model_that_is_not_ours_is_refused(change, model, tmp_path):
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "forecaster.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Forecaster.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_folder_of_somebody_else_is_not_replaced(model, place):
    with pytest.raises(ValueError, match=r"chapter\.tex"):
        model.save(place / "thesis")
    assert (place / "thesis" / "chapter.tex").read_text() == "x"
