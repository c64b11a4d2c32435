"""The command line, in this process: train, go on, generate, evaluate, plot, doctor; sizes, settings and their order."""

import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from exlstm import LanguageModel, __version__, cli, runs
from exlstm.bench import kernels
from exlstm.cli import main
from exlstm.data.config import DataConfig
from exlstm.models.config import SIZES
from exlstm.ops import mlstm
from exlstm.recipes import default_folder, sized
from exlstm.train.config import TrainConfig

TINY = ["--model.d-model", "16", "--model.n-layers", "2", "--model.n-heads", "2", "--model.blocks", "mlstm", "slstm"]
SHORT = ["--data.context", "16", "--data.batch-size", "2", "--train.eval-batches", "2", "--train.save-every", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text of three files, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b", "c"):
        lines = (f"{name}{i} the quick brown fox jumps over the lazy dog\n" for i in range(60))
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A finished run of six steps, and the arguments that made it."""
    run = tmp_path_factory.mktemp("runs") / "fox"
    arguments = ["train", str(text), "--out", str(run), *TINY, *SHORT, "--train.steps", "6"]
    assert main(arguments) == 0
    return run, arguments


def test_int8_writes_and_is_judged(trained, capsys):
    run, _ = trained
    assert main(["generate", str(run), "--prompt", "the quick", "--tokens", "5", "--seed", "0", "--int8"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the quick") and not err
    assert main(["evaluate", str(run), "--int8"]) == 0
    plain, held = runs.evaluate(run), runs.evaluate(run, int8=True)
    assert 0 < abs(held - plain) < 0.02 * plain


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}


def test_a_run_leaves_what_it_says(trained, capsys):
    run, _ = trained
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert any("bits_per_byte" in record for record in records(run))
    assert {"checkpoints", "data", "metrics.jsonl", "run.json"} == {file.name for file in run.iterdir()} - {
        "loss.png",
        "gates.png",
    }
    settings = json.loads((run / "run.json").read_text())
    assert settings["version"] == 1
    assert settings["model"]["vocab_size"] == 256
    assert settings["train"]["steps"] == 6


def test_training_tells_what_it_wrote_and_how_good_it_is(trained, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(text), "--out", str(run), *TINY, *SHORT, "--train.steps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"writes to {run}")
    for told in ("held-out text", "xz", "bits/byte", f"{run}/checkpoints/step-00000001", f"exlstm generate {run}"):
        assert told in out
    assert (run / "checkpoints/step-00000001/model.safetensors").is_file()


def test_a_sample_that_cannot_be_written_ends_no_training(text, tmp_path, capsys):
    """Weights beyond all bounds: the loss says so, and what was measured stands."""
    much = ["--train.lr", "1e9", "--train.clip", "0", "--train.steps", "4"]
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY[:-2], "lstm", *SHORT, *much]) == 0
    out = capsys.readouterr().out
    assert "bits_per_byte not finite" in out and "writes: (nothing: the logits" in out
    assert [r["step"] for r in records(tmp_path / "run") if "reason" in r] == [2, 3, 4]
    assert (tmp_path / "run/checkpoints/step-00000004/model.safetensors").is_file()


def test_the_same_command_again_changes_nothing(trained, capsys):
    run, arguments = trained
    before = (run / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_stopped_run_goes_on_where_it_stopped(trained, tmp_path):
    run, arguments = trained
    other = tmp_path / "stopped"
    stopped = [str(other) if word == str(run) else word for word in arguments]
    # Every process of its own stops after a while; the history is the one of a single process, bit by bit.
    code = (
        "import sys, threading, os, signal; from exlstm.train import loop\n"
        "advance = loop._Run._advance\n"
        "def once(self):\n"
        "    advance(self)\n"
        "    if self.step == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "loop._Run._advance = once\n"
        f"from exlstm.cli import main; sys.exit(main({stopped!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(losses(other)) == [1, 2, 3]
    assert main(stopped) == 0
    assert losses(other) == losses(run)


def test_generate_streams_the_same_text_for_the_same_seed(trained, capsys):
    run, _ = trained
    command = ["generate", str(run), "--prompt", "the quick", "--tokens", "20", "--seed", "3", "--temperature", "0.8"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    assert len(first.encode()) > len("the quick\n")
    assert main([*command, "--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == first
    checkpoint = str(run / "checkpoints/step-00000006")
    assert main([*command[:1], checkpoint, *command[2:]]) == 0
    assert capsys.readouterr().out == first


def test_generate_stops_at_a_text(trained, capsys):
    run, _ = trained
    greedy = ["generate", str(run), "--prompt", "fox", "--tokens", "30", "--temperature", "0"]
    assert main(greedy) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[len("fox") + 4 : len("fox") + 6]
    assert main([*greedy, "--stop", stop]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == whole[: whole.index(stop, len("fox"))]


def test_evaluate_agrees_with_the_model_itself(trained, text, capsys):
    run, _ = trained
    assert main(["evaluate", str(run), str(text / "a.txt")]) == 0
    rows = dict(
        line.split()[0::2] for line in capsys.readouterr().out.splitlines() if line.startswith(("  all", "  xz"))
    )
    tokens = torch.tensor([list((text / "a.txt").read_bytes())])
    loss = LanguageModel.from_pretrained(run).loss(tokens).item()
    assert float(rows["all"]) == pytest.approx(loss / math.log(2), abs=2e-3)
    assert 0 < float(rows["xz"]) < 2


def test_evaluate_takes_the_held_out_text_and_a_limit(trained, capsys):
    run, _ = trained
    assert main(["evaluate", str(run), "--limit", "100"]) == 0
    whole = capsys.readouterr().out
    assert f"held-out text of {run}, 100 bytes" in whole
    checkpoint = run / "checkpoints" / "step-00000006"
    assert main(["evaluate", str(checkpoint), "--limit", "100"]) == 0
    assert capsys.readouterr().out == whole.replace(str(run), str(checkpoint))


def test_metrics_that_are_damaged_are_passed_over(tmp_path):
    lines = [b'{"step": 1, "loss": 2.0}', b"null", b'{"loss": 1}', b"\xff\x00", b'{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert runs._metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_plot_draws_loss_and_gates(trained, capsys):
    pytest.importorskip("matplotlib")
    run, _ = trained
    assert main(["plot", str(run), "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    for name in ("loss.png", "gates.png"):
        assert f"figure  {run / name}" in out
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert "mlstm" in out
    assert "slstm" in out


def test_doctor_names_what_runs_and_finds_it_right(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for told in ("torch", "mlstm on cpu: cpu runs, chosen by itself", "slstm on cpu", "reference", "ok", "in bfloat16"):
        assert told in out
    assert "WRONG" not in out
    assert re.search(
        r"triton     not here: backend 'triton' (takes .* on a GPU, q is torch\.float32 on cpu|needs)", out
    )


@pytest.mark.gpu
def test_doctor_checks_the_kernels_on_a_gpu(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("mlstm", "slstm"):
        assert f"{name} on cuda: triton runs, chosen by itself" in out
    assert out.count("triton     ok, outputs and gradients off by") == 2


def test_doctor_sees_a_wrong_implementation(monkeypatch, capsys):
    def wrong(factor, dtype):
        def run(q, *arguments):
            h, *memory = mlstm.IMPLEMENTATIONS["reference"](q, *arguments)
            return h * (factor if q.dtype == dtype else 1), *memory

        return run

    monkeypatch.setitem(mlstm.IMPLEMENTATIONS, "wrong", wrong(1.01, torch.float32))
    monkeypatch.setitem(mlstm.IMPLEMENTATIONS, "coarse", wrong(1.1, torch.bfloat16))
    monkeypatch.setitem(mlstm.IMPLEMENTATIONS, "lost", wrong(float("nan"), torch.bfloat16))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert all(f"{name:10} WRONG" in out for name in ("wrong", "coarse", "lost"))
    assert f"{'reference':10} ok" in out


def test_doctor_refuses_an_unknown_backend(monkeypatch, capsys):
    monkeypatch.setenv("EXLSTM_BACKEND", "nonsense")
    assert main(["doctor"]) == 1
    assert "nonsense" in capsys.readouterr().out


@pytest.fixture
def settled(monkeypatch):
    """What `train` would do, without doing it."""

    class Done:
        interrupted = None

    configs = []
    monkeypatch.setattr(cli, "train_language", lambda config: configs.append(config) or Done)

    def settle(*arguments):
        assert main(["train", *arguments]) == 0
        return configs.pop()

    return settle


def test_size_is_one_dial_and_fields_go_first(settled):
    for size, fields in SIZES.items():
        model = settled("--size", size).model
        assert {name: getattr(model, name) for name in fields} == fields
    assert settled().model == sized("tiny").model
    tuned = [settled(*given).train for given in ((), ("--size", "nano"), ("--train.optimizer", "adamw"))]
    assert [(train.optimizer, train.lr) for train in tuned] == [("muon", 5e-3), ("adamw", 1e-3), ("adamw", 5e-3)]
    model = settled("--size", "nano", "--model.n-layers", "5").model
    assert (model.d_model, model.n_layers) == (SIZES["nano"]["d_model"], 5)


def test_a_config_file_lies_below_size_and_fields(settled, tmp_path, trained):
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"size": "nano", "model": {"blocks": ["slstm"]}, "train": {"steps": 7, "lr": 0.01}}))
    config = settled("--config", str(part), "--train.lr", "0.002")
    assert (config.model.d_model, config.model.blocks) == (SIZES["nano"]["d_model"], ("slstm",))
    assert (config.train.steps, config.train.lr) == (7, 0.002)
    assert settled("--config", str(part), "--size", "small").model.d_model == SIZES["small"]["d_model"]
    marked = tmp_path / "marked.json"
    marked.write_text(part.read_text(), encoding="utf-8-sig")
    assert settled("--config", str(marked)) == settled("--config", str(part))
    # A run of before there was a choice of optimizers goes on with the one it had.
    part.write_text(json.dumps({"version": 1, "train": {"steps": 7}}))
    assert settled("--config", str(part)).train == TrainConfig(steps=7)
    timed = settled("--config", str(marked), "--minutes", "3").train
    assert (timed.steps, timed.minutes) == (None, 3.0)
    run, _ = trained
    whole = settled("--config", str(run / "run.json"))
    assert (whole.model.d_model, whole.data.context, whole.train.steps) == (16, 16, 6)


def test_every_field_can_be_reached(settled):
    config = settled(
        "x.txt", "y", "--minutes", "0.5", "--data.context=32", "--train.save_every", "9", "--model.slstm.conv", "4"
    )
    assert (config.data.files, config.data.context) == (("x.txt", "y"), 32)
    assert (config.train.minutes, config.train.save_every, config.model.slstm.conv) == (0.5, 9, 4)


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        ((), "runs/stdlib"),
        (("texts/my book.txt", "x.txt"), "runs/my book"),
        (("texts/my book.txt.gz",), "runs/my book"),
        (("texts/",), "runs/texts"),
        (("texts/**/*.md",), "runs/texts"),
        (("*.py",), "runs/text"),
        (("..",), "runs/text"),
    ],
)
def test_a_run_is_named_after_its_first_file(files, folder):
    assert default_folder(DataConfig(files=files)) == folder


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert main([]) == 0


@pytest.mark.parametrize("command", [*cli.COMMANDS, *(f"bench {name}" for name in cli.BENCHES)])
def test_every_command_explains_itself(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert f"exlstm {command}" in capsys.readouterr().out


def test_help_names_no_flag_that_is_refused(capsys):
    main(["train", "--help"])
    flags = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert "--model.d-model" in flags and "--data.vocab-size" in flags and "--model.vocab-size" not in flags


def test_a_benchmark_gets_its_settings(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(kernels, "run", seen.append)
    assert main(["bench", "kernels", "--rounds", "3"]) == 0
    assert seen[0].rounds == 3


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"exlstm {__version__}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(config):
        return int("not a number that a user gave")

    monkeypatch.setattr(cli, "train_language", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["train"])


def test_ctrl_c_is_130(monkeypatch, capsys):
    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_language", stopped)
    assert main(["train"]) == 130


def test_a_failed_start_leaves_no_folder(text, tmp_path, monkeypatch):
    run = tmp_path / "new" / "run"

    def failing(*_, **__):
        raise RuntimeError("a failure after the text was prepared")

    monkeypatch.setattr("exlstm.train.loop.train", failing)
    with pytest.raises(RuntimeError):
        main(["train", str(text), "--out", str(run), *TINY, *SHORT, "--train.steps", "1"])
    assert not run.parent.exists()


def test_the_first_line_comes_at_once(text, tmp_path):
    """Before torch is loaded: within the three seconds that a newcomer waits."""
    command = [
        sys.executable,
        "-c",
        "from exlstm.cli import main; main()",
        "train",
        str(text),
        "--out",
        str(tmp_path / "r"),
    ]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, *TINY, "--train.steps", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        line = run.stdout.readline()
        waited = time.perf_counter() - start
        run.kill()
    assert line.startswith(b"writes to")
    assert waited < 3
