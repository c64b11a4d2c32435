"""Forecasting, files of the public benchmarks: each is read as what it is, its clock once, however many series stand on it."""

import numpy as np
import pytest
import torch

from exlstm.bench import forecast_tasks, forecasting
from exlstm.bench.config import ForecastingConfig
from exlstm.data import clock, frequency
from exlstm.data import windows as windows_module
from exlstm.data.panel import Columns
from exlstm.data.series import panel_of
from exlstm.data.windows import Batch, Windows
from exlstm.forecast import engine, fitting, ridges
from exlstm.forecast.config import FitConfig
from exlstm.forecast.tables import read_table
from exlstm.forecast.tsf import read_tsf
from exlstm.models import linear
from exlstm.models.config import LinearConfig
from exlstm.models.linear import Gram, LinearPath

pd = pytest.importorskip("pandas")
CLOCKS = ("4s", "30min", "h", "D", "B", "W-SUN", "7D", "MS", "ME", "BME", "QS-FEB", "YS-JAN", "2MS", 3)


@pytest.mark.parametrize("freq", CLOCKS)
def test_times_in_the_middle_of_a_clock_are_those_of_the_whole(freq):
    first = 5 if isinstance(freq, int) else pd.date_range("1999-12-30 12:00", periods=1, freq=freq)[0]
    for start, stop in ((0, 1), (0, 200), (63, 65), (130, 131), (40, 40)):
        assert list(clock.between(first, freq, start, stop)) == list(clock.span(first, freq, stop)[start:])


@pytest.mark.parametrize("freq", CLOCKS)
def test_many_clocks_at_once_are_each_by_itself(freq):
    firsts = [5, 17] if isinstance(freq, int) else list(pd.date_range("1999-12-30 12:00", periods=2, freq=freq))
    starts = np.array([0, 40])
    times = clock.spread(firsts, freq, starts, 3)
    for row, first, start in zip(times, firsts, starts):
        assert list(pd.Index(row)) == list(pd.Index(clock.between(first, freq, int(start), int(start) + 3)))
    assert clock.spread(firsts, freq, starts, 0).shape == (2, 0)


def test_a_clock_at_the_end_of_the_calendar_is_counted_as_far_as_it_goes():
    first = pd.Timestamp("2255-01-01").as_unit("ns")
    assert list(clock.between(first, "YS-JAN", 1, 5)) == list(clock.span(first, "YS-JAN", 5)[1:])


def wide(rows=30, series=5, seed=0):
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({f"c{k}": draw.normal(size=rows) for k in range(series)})
    frame.loc[3:5, "c1"] = np.nan
    frame.insert(0, "date", pd.date_range("2024-03-01", periods=rows, freq="h").strftime("%Y-%m-%d %H:%M:%S"))
    return frame.assign(help=draw.normal(size=rows))


@pytest.mark.parametrize("change", (lambda f: f, lambda f: f.drop([7, 8]), lambda f: f.sample(frac=1, random_state=0)))
@pytest.mark.parametrize("exog", ({}, {"futr": ("help",)}, {"hist": ("help",)}))
def test_a_wide_frame_is_the_long_one_and_its_clock_is_read_once(change, exog, monkeypatch):
    frame = change(wide())
    names = [c for c in frame.columns if c.startswith("c")]
    long = frame.melt(["date", "help"], names, "unique_id", "y")
    wanted = panel_of(long, Columns("unique_id", "date", "y", **exog))
    read, parse = [], frequency.parse_times
    monkeypatch.setattr(frequency, "parse_times", lambda v, c, **how: read.append(len(v)) or parse(v, c, **how))
    panel = panel_of(frame if exog else frame.drop(columns="help"), Columns(**exog))
    assert read[-1] == len(frame)
    assert (panel.ids, panel.freq, panel.first) == (wanted.ids, wanted.freq, wanted.first)
    for name in ("y", "offsets", "futr", "hist", "static"):
        np.testing.assert_array_equal(getattr(panel, name), getattr(wanted, name))


def test_texts_that_many_series_share_are_read_once(monkeypatch):
    texts = pd.Series(["13/01/2024", "14/01/2024", "01/02/2024"] * 50)
    read, plain = [], frequency._read_text
    monkeypatch.setattr(frequency, "_read_text", lambda v, *a: read.append(len(v)) or plain(v, *a))
    times, _ = frequency.parse_times(texts, "ds")
    assert read == [3]
    assert list(times[:4]) == [*pd.to_datetime(["2024-01-13", "2024-01-14", "2024-02-01", "2024-01-13"])]
    with pytest.raises(ValueError, match="in row 8, which is no time"):
        frequency.parse_times(pd.Series(["2024-01-01"] * 7 + ["soon"] + ["2024-01-02"] * 50), "ds")


def test_every_series_has_the_calendar_of_its_own_clock():
    begins = pd.date_range("2020-01-01", periods=20, freq="5D")
    parts = [
        pd.DataFrame({"unique_id": k, "ds": pd.date_range(begins[k % 7], periods=30 + k), "y": 1.0 * k})
        for k in range(20)
    ]
    windows = Windows(panel_of(pd.concat(parts)), 7).with_calendar(3)
    for k in range(20):
        own = frequency.calendar(pd.date_range(begins[k % 7], periods=33 + k), "D", windows.statistics["year"])[0]
        start = int(windows.date_starts[k])
        np.testing.assert_array_equal(windows.dates[start : start + len(own)].numpy(), own)


def tsf(path, lines, frequency="monthly", more=("start_timestamp date",)):
    head = ["# of somebody", "@relation x", "@attribute series_name string", *(f"@attribute {m}" for m in more)]
    head += [f"@frequency {frequency}"] if frequency else []
    path.write_text("\n".join([*head, "@missing true", "@data", *lines, ""]))
    return path


BEGIN = "{}-{:02}-01 00-00-00"
# Frequency of the file, months that its series begin in: the alias, and the months that they are taken to begin in.
BEGINS = {
    ("monthly", (3, 7)): ("MS", (3, 7)),
    ("quarterly", (1, 10)): ("QS-JAN", (1, 10)),
    ("quarterly", (2, 5)): ("QS-FEB", (2, 5)),
    ("quarterly", (2, 6)): ("QS-JAN", (1, 4)),
    ("yearly", (7, 7)): ("YS-JUL", (7, 7)),
    ("yearly", (3, 7)): ("YS-JAN", (1, 1)),
}


@pytest.mark.parametrize("case", BEGINS)
def test_an_archive_begins_where_its_clock_has_a_step(case, tmp_path):
    (kind, months), (alias, begins) = case, BEGINS[case]
    path = tsf(
        tmp_path / "a.tsf", [f"T{m}{k}:{BEGIN.format(1990 + k, m)}:1,?,3.5,4" for k, m in enumerate(months)], kind
    )
    panel, header = read_tsf(path)
    assert (panel.freq, header["horizon"]) == (alias, None)
    assert [(t.year, t.month, t.day) for t in panel.first] == [(1990 + k, m, 1) for k, m in enumerate(begins)]
    np.testing.assert_array_equal(panel.y, [1, np.nan, 3.5, 4] * 2)
    # The frame of the file is the same panel again.
    again = panel_of(read_table(path))
    assert (again.ids, again.first) == (panel.ids, panel.first)
    np.testing.assert_array_equal(again.y, panel.y)


def test_an_archive_beyond_the_calendar_counts_in_whole_numbers(tmp_path):
    lines = ["a:1750-01-01 00-00-00:" + ",".join(["1"] * 600), "b:1990-01-01 00-00-00:1,2,3"]
    panel, _ = read_tsf(tsf(tmp_path / "a.tsf", lines, "yearly"))
    assert (panel.freq, panel.first, list(panel.lengths)) == (1, [0, 0], [600, 3])


def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 series of a name that another one has"):
        read_tsf(tsf(tmp_path / "a.tsf", ["a:1,2", "a:3,4"], None, ()))


HORIZONS = {
    "yearly": 6, "quarterly": 8, "monthly": 12, "weekly": 8, "daily": 30, "hourly": 48,
    "half_hourly": 48, "10_minutes": 48, "minutely": 48, "4_seconds": 60,
}  # fmt: skip


@pytest.mark.parametrize("kind", HORIZONS)
def test_an_archive_without_a_horizon_has_that_of_its_frequency(kind, tmp_path):
    path = tsf(tmp_path / "a.tsf", ["a:1990-01-01 00-00-00:" + ",".join(map(str, range(200)))], kind)
    (task,) = forecast_tasks.tasks_of(path, ForecastingConfig())
    assert task.horizon == HORIZONS[kind]


# Columns of the price files as they are published.
MARKETS = {
    "NP": " Grid load forecast, Wind power forecast", "PJM": " System load forecast, Zonal COMED load foecast",
    "BE": " Generation forecast, System load forecast", "FR": " Generation forecast, System load forecast",
    "DE": " Ampirion Load Forecast, PV+Wind Forecast",
}  # fmt: skip


@pytest.mark.parametrize("market", MARKETS)
def test_the_price_files_of_all_markets_are_known(market, tmp_path):
    path, times = tmp_path / f"{market}.csv", pd.date_range("2013-01-01", periods=400, freq="h")
    rows = [f"{t.year}/{t.month}/{t.day} {t.hour}:00,{k % 24},{k % 7},{k % 5}" for k, t in enumerate(times)]
    path.write_text("\n".join([f"date,{MARKETS[market]},OT", *rows]))
    tasks = forecast_tasks.tasks_of(path, ForecastingConfig())
    assert [(t.protocol, t.horizon, len(t.panel)) for t in tasks] == [("prices", 24, 1)] * 2
    assert tasks[0].panel.futr.shape == (400, 2)


def test_a_series_that_stands_still_in_the_training_part_stays_finite(tmp_path):
    frame = wide(400, 3).drop(columns="help").bfill()
    frame["c2"] = np.where(np.arange(400) < 300, 0.0, 5.0)
    frame.to_csv(tmp_path / "long.csv", index=False)
    tasks = forecast_tasks.tasks_of(tmp_path / "long.csv", ForecastingConfig(horizons=(24,)))
    assert np.isfinite(tasks[0].panel.y).all()
    assert tasks[0].panel.y[-1] == 5


@pytest.mark.parametrize("more", (0, 3))
def test_windows_are_rows_of_the_panel_whatever_was_asked_for_before(more):
    """Against one window after the other, short and long ones in turn, with gaps, padding, ends and covariates."""
    draw, lengths = np.random.default_rng(0), (11, 40, 7)
    frame = pd.DataFrame(
        {"unique_id": np.repeat(range(3), lengths), "ds": np.concatenate([np.arange(n) for n in lengths])}
    )
    frame = frame.assign(x=frame.ds + 100.0 * frame.unique_id, y=draw.normal(size=58), z=draw.normal(size=58))
    frame.loc[draw.integers(0, len(frame), 12), "y"] = np.nan
    panel = panel_of(frame, Columns("unique_id", "ds", "y", futr=("x",), hist=("z",)))
    future = np.full((3, more, 1), 55.0) if more else None
    windows = Windows(panel, 4, future=future).with_calendar(6)
    pairs = [(n, t) for n, length in enumerate(lengths) for t in range(length + 1)]
    y, seen = windows.y.numpy().copy(), ~np.isnan(panel.y)
    for lookback, horizon in ((5, 3), (30, 2), (1, 6), (12, 3)):
        batch = windows.batch(*(torch.tensor(column) for column in zip(*pairs)), lookback, horizon)
        for row, (n, t) in enumerate(pairs):
            own = slice(panel.offsets[n], panel.offsets[n + 1])
            before = np.arange(t - lookback, t)
            inside, kept = before >= 0, before.clip(0)
            ahead = np.arange(t, t + horizon)
            known = (ahead < lengths[n]) & seen[own][ahead.clip(0, lengths[n] - 1)]
            x, z = (
                np.r_[windows.futr.numpy()[panel.offsets[n] + n * more :][: lengths[n] + more, 0]],
                windows.hist.numpy()[own][:, 0],
            )
            wanted = {
                "y": np.where(inside, y[own][kept.clip(0, lengths[n] - 1)], 0), "inside": inside,
                "seen": inside & seen[own][kept.clip(0, lengths[n] - 1)],
                "target": np.where(known, y[own][ahead.clip(0, lengths[n] - 1)], np.nan),
                "future": x[ahead.clip(0, len(x) - 1)][:, None],
                "past": np.where(inside[:, None], np.stack([z[kept.clip(0, lengths[n] - 1)], x[kept]], 1), 0),
            }  # fmt: skip
            for name, value in wanted.items():
                np.testing.assert_array_equal(
                    getattr(batch, name)[row].numpy(), value.astype(getattr(batch, name).numpy().dtype), name
                )
    assert windows.room == 30
    np.testing.assert_array_equal(windows.y.numpy(), y)


def test_levels_that_nobody_asks_for_are_not_made_and_change_no_other():
    panel = panel_of(wide(200, 3).drop(columns="help").bfill())
    made = engine.fit(panel, FitConfig(horizon=5, members=("naive", "linear"), max_lookback=24), 24)
    windows, names = made.windows(panel), list(made.scores)[:-1]
    series, at = torch.arange(3).repeat_interleave(20), torch.arange(100, 120).repeat(3)
    ((_, whole, _),) = made.forecast(windows, series, at, names)
    ((_, some, _),) = made.forecast(windows, series, at, names, at=[0, 6, 12])
    for name, q in whole.items():
        torch.testing.assert_close(some[name], q[..., [0, 6, 12]], rtol=0, atol=0)


def test_the_long_protocols_sum_only_the_levels_that_they_show():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, 13, generator=draw, dtype=torch.float64).sort(-1).values
    y = torch.where(torch.rand(6, 4, generator=draw) < 0.2, torch.nan, torch.randn(6, 4, generator=draw)).double()
    rows = []
    for ratios in (True, False):
        tally = forecasting.Tally(ratios)
        tally.add(q[..., tally.at], y, torch.ones(6).double())
        rows.append(tally.row())
    assert len(forecasting.Tally(False).at) == 5
    for name in ("MSE", "MAE", "cover 80", "cover 95"):
        assert rows[0][name] == rows[1][name]
    assert (q[..., 6] - y).square().nanmean() == pytest.approx(rows[0]["MSE"])


@pytest.mark.parametrize("center", ("mean", "last"))
@pytest.mark.parametrize("n_dates", (0, 3))
def test_stretches_give_the_sums_of_their_windows(center, n_dates, monkeypatch):
    """In float64, in pieces of any size, also where some windows lie too far off to teach anything."""
    monkeypatch.setattr(linear, "PIECE", 16)
    monkeypatch.setattr(linear, "HELD", 2)
    path = LinearPath(LinearConfig(4, 9, 0, 0, 0, n_dates, center, "series"), dtype=torch.float64)
    draw, added, whole = torch.Generator().manual_seed(0), Gram(path), Gram(path)
    stretches = []
    for steps in (50, 13, 36):
        y = torch.randn(steps, generator=draw, dtype=torch.float64).cumsum(0)
        y[steps // 2] += 40.0
        dates = torch.randn(steps - 12, 3, generator=draw, dtype=torch.float64)
        stretches.append((y, dates))
        z, seen = y.unfold(0, 13, 1), torch.ones(steps - 12, 9, dtype=torch.bool)
        none = torch.zeros(len(z), 0)
        added.add(Batch(z[:, :9], seen, seen, none, none, none, dates, none, z[:, 9:], none))
    whole.add_stretches(stretches)
    assert 0 < int(whole.windows) == int(added.windows) < 63
    for name in ("xx", "xy"):
        torch.testing.assert_close(getattr(whole, name), getattr(added, name), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("apart", (False, True))
def test_long_stretches_are_learnt_from_without_a_window(apart, monkeypatch):
    """Every window once: those of stretches without a gap at once, those that see a gap one by one, and the sums are the same."""
    draw, n = np.random.default_rng(0), 400
    frame = pd.DataFrame(draw.normal(size=(n, 3)).cumsum(0) / 9, columns=list("abc"))
    frame.loc[200, "b"] = frame.loc[[50, 52], "c"] = np.nan
    frame.insert(0, "ds", pd.date_range("2024-01-01", periods=n, freq="h"))
    config = FitConfig(horizon=6)
    found = fitting.split(Windows(panel_of(frame), 24).with_calendar(6), config)
    path = LinearPath(LinearConfig(6, 24, 0, 0, 0, found.windows.n_dates, "mean", "series"))
    batches, windows = fitting.batches, []
    monkeypatch.setattr(ridges, "WORTH", 0)
    monkeypatch.setattr(ridges, "batches", lambda w, c, m, *a, **b: windows.append(len(m)) or batches(w, c, m, *a, **b))
    grams = ridges._grams(found, path, config, ridges.EVERY, apart=apart)
    wanted = ridges._grams(found, path, config, ridges.EVERY - 1, apart=apart)
    each = int(found.train(24, 6).counts[0])
    # A gap is seen by 24 + 6 windows, two gaps with a step between them by 32.
    assert windows == ([0, 30, 32, each, each, each] if apart else [62, 3 * each])
    # Stretches of few products are not worth it.
    monkeypatch.setattr(ridges, "WORTH", 10**6)
    ridges._grams(found, path, config, ridges.EVERY)
    assert windows[-1] == 3 * each
    for one, other in zip(grams, wanted):
        assert int(one.windows) == int(other.windows)
        torch.testing.assert_close(one.xx, other.xx, rtol=1e-5, atol=2e-3)
        torch.testing.assert_close(one.xy, other.xy, rtol=1e-5, atol=2e-3)


def test_stretches_are_all_runs_of_windows_without_a_gap():
    """Against a search through every cut of series with gaps, short ones and such that end in one."""
    draw, lengths = np.random.default_rng(0), (90, 30, 4, 60, 90)
    y = [np.where(draw.random(n) < 0.04, np.nan, 1.0) for n in lengths]
    y[3][-3:] = np.nan
    windows = Windows(panel_of(y), 1).with_calendar(3)
    cuts = fitting.Cuts(torch.tensor([12, 4, 4, 4, 20]), torch.tensor(lengths) - 3)
    found = {(n, t) for n, first, count in zip(*windows.stretches(cuts, 8, 3, 2)) for t in range(first, first + count)}
    wanted = set()
    for n, first in enumerate(cuts.first.tolist()):
        run = []
        for t in range(first, lengths[n] - 1):
            if t <= lengths[n] - 3 and t >= 8 and not np.isnan(y[n][t - 8 : t + 3]).any():
                run.append((n, t))
                continue
            wanted |= set(run) if len(run) >= 2 else set()
            run = []
    assert found == wanted
    assert len(found) > 50


def test_a_fit_fills_every_series_once_and_reads_the_calendar_once(monkeypatch):
    panel = panel_of(wide(200, 3).drop(columns="help"))
    panel.y[[7, 307, 507]] = np.nan
    count, filled, calendar = {"filled": 0, "calendar": 0}, windows_module.filled, frequency.calendar

    def counted(name, plain):
        def call(*values):
            count[name] += 1
            return plain(*values)

        return call

    monkeypatch.setattr(windows_module, "filled", counted("filled", filled))
    monkeypatch.setattr(frequency, "calendar", counted("calendar", calendar))
    config = FitConfig(horizon=5, members=("naive", "linear"), max_lookback=24)
    made = engine.fit(panel, config, 24)
    assert count == {"filled": 3, "calendar": 1}
    begin = int(fitting.begins(torch.tensor([200]), 24, config)[0])
    for name, y in zip(panel.ids, panel.y.reshape(3, 200)):
        assert made.statistics["series"][name] == pytest.approx((np.nanmean(y[:begin]), np.nanstd(y[:begin])))


def test_a_series_that_is_all_test_window_is_left_out_and_told(tmp_path, capsys):
    """It had windows that begin before its first row."""
    path = tsf(tmp_path / "a.tsf", ["long:" + ",".join("5" * 50), "short:1,2,3,4", "even:1,2,3,4,5,6"], None, ())
    (task,) = forecast_tasks.tasks_of(path, ForecastingConfig(horizons=(6,)))
    assert task.panel.ids == ["long"]
    assert "2 series of at most 6 steps" in capsys.readouterr().out
    assert task.told() == "a (archive): 1 series, 50 steps of 1, season 1, horizon 6, 1 test windows"
    with pytest.raises(ValueError, match="no series of more than the 60 steps"):
        forecast_tasks.tasks_of(path, ForecastingConfig(horizons=(60,)))
