"""Every benchmark at toy size, with and without peers; the clock, the table and the files that they share."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from importlib import import_module, util
from types import ModuleType

import pytest
import torch
from torch.nn.functional import logsigmoid

from exlstm.bench import BENCHES, config, forecasting, parity, peers, quality, timing
from exlstm.bench import mlstm as on_gpu
from exlstm.bench import slstm as recurrent
from exlstm.cli import main
from exlstm.forecast.config import FitConfig
from exlstm.models.config import LanguageConfig
from exlstm.models.language import LanguageModel
from exlstm.ops.mlstm import mlstm
from exlstm.recipes import RunConfig

# What the peers do at their import is theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60


def forecasting_files(tmp_path):
    """A long-horizon file, a price file and two archive files."""
    hours = [f"2024-{1 + d // 28:02}-{1 + d % 28:02} {h:02}:00" for d in range(28) for h in range(24)]
    waves = [math.sin(i / 24 * 2 * math.pi) + i % 5 for i in range(len(hours))]
    (tmp_path / "long.csv").write_text("date,a,b\n" + "".join(f"{t},{w},{w * w}\n" for t, w in zip(hours, waves)))
    rows = "".join(f"{t},{w},{-w},{3 * w}\n" for t, w in zip(hours, waves))
    (tmp_path / "prices.csv").write_text("date, Grid load forecast, Wind power forecast,OT\n" + rows)
    header = "@attribute series_name string\n@attribute start_timestamp date\n@frequency monthly\n@horizon 12\n@data\n"
    for name in ("m3", "m4"):
        series = (",".join(str(w + k) for w in waves[k : 70 + 9 * k]) for k in range(3))
        body = "".join(f"T{k}:1990-01-01 00-00-00:{values}\n" for k, values in enumerate(series))
        (tmp_path / f"{name}.tsf").write_text(header + body)
    return tuple(tmp_path / name for name in ("long.csv", "prices.csv", "m3.tsf", "m4.tsf"))


def toys(tmp_path):
    """name -> settings that take about a second."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    quick = FitConfig(steps=2, d_model=8, n_layers=1, n_heads=2, lookback=12)
    shared = {"threads": 1, "out": tmp_path / "out"}
    return {
        "kernels": config.KernelsConfig(
            slstm=((2, 6, 2, 4),), mlstm=((1, 24, 2, 8, 4),), growth=(16, 64), rounds=2, **shared
        ),
        "mlstm": config.MLSTMConfig(
            shapes=((2, 8, 4),), lengths=(8, 16), tokens=32, batches=(1,), error_length=8, device="cpu", **shared
        ),
        "slstm": config.SLSTMConfig(
            shapes=((2, 4),), batches=(1, 2), length=6, error_length=5, only=("ours", "lstm"), device="cpu", **shared
        ),
        "decode": config.DecodeConfig(
            sizes=("toy",), batches=(1, 2), contexts=(4, 8), prompt=8, tokens=3, device="cpu", **shared
        ),
        "train": config.TrainConfig(
            size="toy", lengths=(8, 32), tokens=16, only=("ours", "ours 7:1"), device="cpu", **shared
        ),
        "training": config.TrainingConfig(batch=1, length=8, rounds=2, **shared),
        "decoding": config.DecodingConfig(batches=(1, 2), tokens=4, rounds=2, **shared),
        "parity": config.ParityConfig(steps=3, batch=8, d_model=8, n_heads=2, seeds=(0, 1), **shared),
        "quality": config.QualityConfig(
            text=text, blocks=("mlstm+slstm", "attention"), steps=2, minutes=0.002, files=(str(text),), **shared
        ),
        "forecast": config.ForecastingConfig(
            files=forecasting_files(tmp_path),
            horizons=(12,),
            seeds=(0, 1),
            mixers=("slstm", "lstm"),
            fit=quick,
            **shared,
        ),
    }


def small_default():
    """The default run, but small."""
    run = RunConfig(model=LanguageConfig(d_model=16, n_layers=2, n_heads=2))
    return replace(run, data=replace(run.data, context=16, batch_size=2), train=replace(run.train, sample_every=10**6))


@pytest.fixture
def card(monkeypatch):
    """Lets the benchmark for a GPU run on this CPU, where every call takes a millisecond."""
    monkeypatch.setattr(timing, "wants_gpu", lambda *_: None)
    monkeypatch.setattr(peers, "SIZES", {"toy": (32, 2, 2)})
    monkeypatch.setattr(peers, "VOCABULARY", 64)
    monkeypatch.setattr(recurrent, "_microseconds", lambda call, config: call() is None or 1.0)
    monkeypatch.setattr(on_gpu, "_peaks", lambda _: (100.0, 1.0))
    monkeypatch.setattr(on_gpu, "_milliseconds", lambda call, quick=False: call() is None or 1.0)
    monkeypatch.setattr(on_gpu, "_replayed", lambda call, device: call() is None or 0.01)


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_runs(name, tmp_path, monkeypatch, card, capsys):
    monkeypatch.setattr(quality, "sized", small_default)
    before = torch.get_num_threads()
    settings = toys(tmp_path)[name]
    module, kind, _ = BENCHES[name]
    assert isinstance(settings, getattr(config, kind))
    rows = import_module(module).run(settings)
    told = capsys.readouterr().out
    assert torch.get_num_threads() == before
    with open(settings.out / f"{name}.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) > 0
    assert all(line["torch"] == torch.__version__ for line in written)
    assert str(settings.out / f"{name}.csv") in told
    drawn = settings.out / f"{name}.png"
    if util.find_spec("matplotlib"):
        assert drawn.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        if "ours/peer" in row:
            ours, peer = (
                next((v for k, v in row.items() if k.startswith(side + " ")), None) for side in ("ours", "peer")
            )
            assert ours > 0
            assert (peer is None) == (row["ours/peer"] is None)


def test_absent_peers_are_told_and_ours_is_still_measured(tmp_path, monkeypatch, capsys):
    for package in ("xlstm", "mlstm_kernels", "mlstm_kernels.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    settings = toys(tmp_path)
    for name, package in (("kernels", "mlstm_kernels"), ("training", "xlstm"), ("decoding", "xlstm")):
        rows = import_module(BENCHES[name][0]).run(settings[name])
        told = capsys.readouterr().out
        assert f"{package}" in told.split("cannot be imported")[0]
        unit = "ms/token" if name == "decoding" else "ms"
        assert any(row[f"ours {unit}"] > 0 and row["ours/peer"] is None for row in rows)


def their_kernels(kernel):
    """A package like mlstm_kernels, whose `kernel` gets (B, H, T, ·), and whose step fails."""
    package = ModuleType("mlstm_kernels.torch")
    package.get_mlstm_kernel = lambda name: kernel

    def step(**_):
        raise RuntimeError("no step\nfor you")

    package.get_mlstm_step_kernel = lambda name: step
    return package


def test_the_mlstm_beside_its_peers(tmp_path, monkeypatch, card, capsys):
    def kernel(q, k, v, i, f, return_last_states, chunk_size):
        tensors = (x.transpose(1, 2) for x in (q, k, v, i, logsigmoid(f)))
        return 1.5 * mlstm(*tensors)[0].transpose(1, 2)

    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", their_kernels(kernel))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    rows = on_gpu.run(toys(tmp_path)["mlstm"])
    told = capsys.readouterr().out
    cases = ["B2 T16 2×8/4", "B4 T8 2×8/4", "B1 T32 2×8/4"]
    for side in ("ours", "mlstm_kernels xl_chunk 128"):
        assert [row["case"] for row in rows if row["side"] == side] == cases
    assert all(row["peer/ours infer"] == 1 for row in rows if row["side"] == "ours")
    assert "step of mlstm_kernels B1 T1 2×8/4: failed with RuntimeError: no step for you\n" in told
    assert "fla.ops.simple_gla cannot be imported here" in told
    with open(tmp_path / "out" / "mlstm_errors.csv", newline="", encoding="utf-8") as file:
        errors = {(row["side"][:5], row[""]): row for row in csv.DictReader(file)}
    assert len(errors) == 4
    # Half too large, and so are its gradients; ours is as exact as bfloat16 is on so few tokens.
    for name in on_gpu.GRADIENTS:
        assert 0.4 < float(errors["mlstm", "any dh"][name]) < 0.6
        assert float(errors["ours", "any dh"][name]) < 0.1


def test_the_mlstm_counts_work_and_bytes():
    case = on_gpu.Case(2, 10, 3, 4, 8)
    assert case.work == 60 * (4 * 32 + 64 * 12)
    assert case.traffic == 60 * (2 * (4 + 4 + 8 + 8) + 2 * 4)
    assert case.traffic_both == case.traffic + 60 * (2 * (4 + 4 + 8 + 8) + 2 * (4 + 4 + 8) + 2 * 4 + 2 * 4)
    assert on_gpu.Case(2, 10, 3, 4, 8, causal=True).work == 60 * 10 * 12


def test_the_mlstm_bench_restricts_itself_and_keeps_to_its_time(tmp_path, monkeypatch, card, capsys):
    toy = toys(tmp_path)["mlstm"]
    rows = on_gpu.run(replace(toy, only=("ours",), quick=True))
    assert [row["case"] for row in rows] == ["B2 T16 2×8/4"]
    assert on_gpu.run(replace(toy, seconds=0.0)) == []
    assert "ours: left out, the time is up (--seconds)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="side 'theirs' is not one of ours, cudnn"):
        on_gpu.run(replace(toy, only=("theirs",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_the_mlstm_bench_wants_a_gpu_in_one_sentence(capsys):
    assert main(["bench", "mlstm"]) == 2
    assert capsys.readouterr().err == "exlstm: bench mlstm measures kernels on an NVIDIA GPU, there is none here\n"


def test_a_benchmark_without_text_says_so(tmp_path, capsys):
    missing = tmp_path / "missing.txt"
    assert quality.run(config.QualityConfig(text=missing, threads=1, out=tmp_path)) == []
    told = capsys.readouterr().out
    assert f"there is no file {missing}" in told
    assert "no --minutes" in told
    assert list(tmp_path.iterdir()) == []


def test_settings_explain_themselves_without_torch():
    code = "import sys; import exlstm.bench, exlstm.bench.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sides_take_turns_and_the_ratio_is_of_pairs(monkeypatch):
    order, now = [], [0.0]
    # ours takes 3, 3, 9 ticks and the peer 1, 2, 3: ratios 3, 1.5, 3.
    ticks = {"a": iter([0, 0, 3, 3, 9]), "b": iter([0, 0, 1, 2, 3])}

    def side(name):
        def call():
            order.append(name)
            now[0] += next(ticks[name])

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = timing.paired(side("a"), side("b"), rounds=3)
    assert "".join(order) == "ababababab"
    assert found == timing.Timing(3000, 2000, 3.0, 1.5, 3.0, 3.0)


def test_saved_bytes_count_each_storage_once():
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    # x·w keeps both, the sine keeps their product.
    assert timing.saved_bytes(lambda: (x @ w).sin()) == 4 * (64 + 32 + 32)
    assert timing.saved_bytes(lambda: (x @ w).sin(), [w]) == 4 * (32 + 32)
    assert timing.saved_bytes(lambda: (x * x).sum()) == 4 * 32
    with torch.no_grad():
        assert timing.saved_bytes(lambda: (x @ w).sin()) == 0


def test_table_aligns_and_leaves_empty_columns_out():
    rows = [{"case": "a", "ms": 1.5, "none": None}, {"case": "longer", "ms": 12345.0, "none": None, "late": 2}]
    assert timing.table(rows).splitlines() == ["case       ms  late", "a         1.5", "longer  12345     2"]


def test_a_busy_machine_is_told(monkeypatch, capsys):
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (99.0, 0, 0), raising=False)
    with timing.cores(config.TrainingConfig(threads=1)):
        assert torch.get_num_threads() == 1
    assert "the machine is busy (load 99.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("training", {"threads": 0}, "threads is 0"),
        ("training", {"rounds": 0}, "rounds is 0"),
        ("training", {"length": -3}, "length is -3, wanted at least 0"),
        ("kernels", {"slstm": ((1, 8, 1, -8),)}, r"slstm is \(\(1, 8, 1, -8\),\), wanted at least 0"),
        ("decoding", {"tokens": -1}, "tokens is -1"),
        ("parity", {"seeds": (0, -1)}, r"seeds is \(0, -1\)"),
        ("parity", {"seconds": math.nan}, "seconds is nan"),
        ("decoding", {"device": "abacus"}, "device 'abacus' cannot be used here"),
        ("parity", {"seeds": ()}, "seeds is empty"),
        ("parity", {"block": "slstn"}, "did you mean 'slstm'"),
        ("parity", {"train_lengths": (9, 3)}, "lengths are 9 to 3"),
        ("quality", {"blocks": ("mlstm+slstn",)}, "did you mean 'slstm'"),
    ],
)
def test_wrong_settings_are_one_sentence(name, wrong, told, tmp_path):
    settings = replace(toys(tmp_path)[name], **wrong)
    with pytest.raises(ValueError, match=told) as error:
        import_module(BENCHES[name][0]).run(settings)
    assert "\n" not in str(error.value)


def test_parity_refuses_a_test_before_it_trains(tmp_path, capsys):
    with pytest.raises(ValueError, match="lengths are 5 to 4"):
        parity.run(replace(toys(tmp_path)["parity"], test_lengths=(5, 4)))
    assert "step" not in capsys.readouterr().out


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    timing.picture(tmp_path / "x.png", lambda axes: None)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()


def test_the_readme_stack_has_the_peers_size():
    # xlstm 2.0.6 counts 764,848 parameters: its gates' biases and norms included.
    ours = sum(p.numel() for p in peers.Readme("meta").parameters())
    assert abs(ours / 764_848 - 1) < 0.01


def test_the_lstm_of_equal_size_is_equal():
    ours = LanguageConfig(d_model=160, n_layers=4, n_heads=4)
    lstm = quality.equal_lstm(ours)
    sizes = [LanguageModel(c, device="meta").n_parameters() for c in (ours, lstm)]
    assert set(lstm.layers()) == {"lstm"}
    assert abs(sizes[1] / sizes[0] - 1) < 0.05


@pytest.mark.slow
def test_the_default_slstm_learns_parity_and_keeps_it_on_longer_strings(tmp_path):
    (row,) = parity.run(config.ParityConfig(seeds=(0,), out=tmp_path))
    assert row["seconds"] <= 180 + 10
    assert row["scaled accuracy"] >= 0.99


def test_forecasts_are_judged_by_every_window_of_the_test_part(tmp_path):
    pytest.importorskip("pandas")
    settings = toys(tmp_path)["forecast"]
    long, prices, m3, m4 = (forecasting.tasks_of(path, settings) for path in settings.files)
    (task,) = long
    rows = 28 * 24
    assert task.cuts[0].tolist() == list(range(rows - rows // 5, rows - 12 + 1))
    assert task.seen.tolist() == [rows - int(0.2 * rows)] * 2
    assert [t.panel.columns.futr for t in prices] == [("Grid load forecast", "Wind power forecast"), ()]
    for (task,), windows in ((m3, 1), (m4, 1)):
        assert all(len(cuts) == windows for cuts in task.cuts)
        assert [c[-1] + 12 for c in task.cuts] == task.panel.lengths.tolist()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_tasks_that_ended_are_kept_when_the_rest_is_not_waited_for(stop, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    settings = toys(tmp_path)["forecast"]
    fit, ours, plain = replace(settings.fit, members=("naive", "linear")), [], forecasting._ours
    settings = replace(settings, files=settings.files[2:], fit=fit, seeds=(0,), mixers=("slstm",))

    def second_stops(task, *given):
        ours.append(task.name)
        if task.name != ours[0]:
            raise stop
        return plain(task, *given)

    monkeypatch.setattr(forecasting, "_ours", second_stops)
    with pytest.raises(stop):
        forecasting.run(settings)
    tasks = {line.split(",")[0] for line in (settings.out / "forecast.csv").read_text().splitlines()[1:]}
    assert ours[0] in tasks and ours[-1] not in tasks


def test_a_tally_is_what_its_names_say():
    levels = torch.tensor(forecasting.engine.LEVELS)
    normal = torch.distributions.Normal(0.0, 1.0)
    y = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
    quantiles = normal.icdf(levels).expand(20000, 2, -1)
    tally = forecasting.Tally()
    tally.add(quantiles, y, torch.full((20000,), 2.0))
    row = tally.row()
    assert row["MSE"] == pytest.approx(1, abs=0.02)
    assert row["MAE"] == pytest.approx(0.798, abs=0.01)
    assert row["MASE"] == pytest.approx(0.399, abs=0.01)
    assert row["cover 80"] == pytest.approx(0.8, abs=0.01)
    assert row["cover 95"] == pytest.approx(0.95, abs=0.01)
