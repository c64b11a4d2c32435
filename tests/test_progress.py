"""What a run shows: plain lines, the live panel, and that no display can harm a training."""

import io
import math

import pytest
import torch
from torch import nn

from exlstm.train import progress
from exlstm.train.config import TrainConfig
from exlstm.train.loop import train
from exlstm.train.progress import CURVE, Progress, legible, sparkline


class Toy(nn.Linear):
    def loss(self, x):
        return (self(x) - x).square().mean()


class Batches:
    def batch(self, step, micro):
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def run(out, progress, evaluate=None, sample=None, **settings):
    return train(
        Toy(3, 3), Batches(), TrainConfig(**settings), out, evaluate=evaluate, sample=sample, progress=progress
    )


@pytest.mark.parametrize("length", [0, 1, 3, 40, 1000])
def test_sparkline(length):
    bars = sparkline([float(i) for i in range(length)], 40)
    assert len(bars) == min(length, 40) and list(bars) == sorted(bars)
    assert len(set(sparkline([2.0] * length, 40))) == min(length, 1)


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert legible("a\x1b[2Jb\nc\x00", 40) == "a·[2Jb⏎c·"
    assert len(legible("x" * 1000, 40)) == 40


def test_plain_lines(tmp_path):
    shown = io.StringIO()
    settings = {"steps": 10, "eval_every": 5, "sample_every": 10}
    progress = Progress(bytes_per_token=2.0, stream=shown)
    result = run(tmp_path, progress, lambda m: {"held_out_loss": 2.0}, lambda m: "wrote\x07", **settings)
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("step  1/10  loss ") and "bits/byte" in lines[0] and "tokens/s" in lines[0]
    assert "step  5/10  held_out_loss 2.0000" in lines and "  writes: wrote·" in lines
    last = next(line for line in lines if line.startswith("step 10/10  loss"))
    assert f"loss {result.loss:.4f}" in last and f"bits/byte {result.loss / math.log(2) / 2:.3f}" in last
    assert last.endswith("0:00 left")


def test_the_live_panel(tmp_path):
    shown = io.StringIO()
    progress = Progress(stream=shown, live=True)
    run(tmp_path, progress, lambda m: {"held_out_loss": 2.0}, lambda m: "[bold]wrote", steps=10)
    text = shown.getvalue()
    assert "10/10" in text and "[bold]wrote" in text and "held_out_loss 2.0000" in text
    assert any(bar in text for bar in "▂▃▄▅▆▇")


def test_a_display_that_fails_never_ends_a_training(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for live in (False, True):
        assert run(tmp_path / str(live), Progress(stream=Closed(), live=live), steps=3).step == 3
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run(tmp_path / "ascii", Progress(stream=latin), sample=lambda m: "ü\n", steps=1)
    latin.seek(0)
    assert "writes: ??" in latin.read()


def test_the_curve_of_a_long_run_stays_short():
    progress = Progress(stream=io.StringIO())
    for step in range(20 * CURVE):
        progress.step({"step": step + 1, "loss": float(step)})
    assert len(progress.curve) < 2 * CURVE and progress.curve == sorted(progress.curve)


def test_a_task_says_how_far_it_is_and_when_it_ends(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    pace = progress.Pace("windows", 4000, told.append)
    for _ in range(4):
        now[0] += 3.0
        pace.add(1000)
    # Not before five seconds, and not at the end, where something better is said.
    assert told == ["  windows: 2,000 of 4,000, 6 s left"]
    progress.Pace("windows", 2, None).add()
