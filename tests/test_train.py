"""The training loop: updates, accumulation, resuming bit by bit, budgets, records, steps that are not finite."""

import io
import json
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from exlstm.train import checkpoint, loop
from exlstm.train.config import TrainConfig
from exlstm.train.loop import train
from exlstm.train.optim import Optimizer, lr_at
from exlstm.train.progress import Progress


class Toy(nn.Module):
    """Tied embedding, a hidden layer with dropout, a next-token loss."""

    def __init__(self, dropout=0.1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(16, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, batch):
        inputs, targets = batch
        logits = self.head(self.hidden(self.embedding(inputs))) * self.scale
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Batches:
    """Pure in (step, micro); `on` maps a step to something that happens while its batch is made."""

    def __init__(self, rows=4, on=None):
        self.rows, self.on = rows, on or {}

    def batch(self, step, micro=0):
        self.on.get(step, lambda: None)()
        inputs = torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(step))
        inputs = inputs[micro * self.rows : (micro + 1) * self.rows]
        return inputs, (3 * inputs + 1) % 16


class Halves(nn.Module):
    """The batch is (weight of the loss, slope of a term that is 0 and whose gradient overflows at 1e38)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.0]))

    def loss(self, batch):
        return batch[0] * self.w[0] ** 2 + batch[1] * self.w[1] * 1e10


def quiet():
    return Progress(stream=io.StringIO())


def run(out, model=None, batches=None, **settings):
    others = {k: settings.pop(k) for k in ("evaluate", "sample", "progress", "save_model") if k in settings}
    model = Toy() if model is None else model
    config = TrainConfig(**settings)
    return train(model, batches or Batches(), config, out, **{"progress": quiet(), **others}), model


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def history(out):
    return [(r["step"], r["loss"]) for r in records(out) if "loss" in r]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_is_adamw():
    ours, theirs = Toy(0), Toy(0)
    optimizer = Optimizer(ours, TrainConfig(steps=1))
    free = [theirs.embedding.weight, theirs.hidden[0].bias, theirs.scale]
    groups = [{"params": [theirs.hidden[0].weight]}, {"params": free, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False)
    for step in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            model.loss(Batches().batch(step)).backward()
        optimizer.step(3e-3)
        plain.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=1e-7)


def test_the_state_of_the_optimizer_survives(tmp_path):
    _, model = run(tmp_path, steps=4)
    folder = checkpoint.newest(tmp_path / "checkpoints")[0]
    optimizer = Optimizer(model, TrainConfig(steps=4))
    checkpoint.load(folder, model, optimizer)
    state = optimizer.state()
    assert set(state) == {f"{n}.{k}" for n in optimizer.names for k in ("step", "exp_avg", "exp_avg_sq")}
    assert state["scale.step"] == 4 and state["embedding.weight.exp_avg"].abs().sum() > 0
    with pytest.raises(ValueError, match="a parameter that the model lacks"):
        optimizer.load({"other.exp_avg": torch.zeros(2)})
    with pytest.raises(ValueError, match="has shape"):
        optimizer.load({"embedding.weight.exp_avg": torch.zeros(2)})


def test_accumulation_equals_the_big_batch(tmp_path):
    _, small = run(tmp_path / "small", Toy(0), Batches(rows=2), steps=20, accumulate=4)
    _, big = run(tmp_path / "big", Toy(0), Batches(rows=8), steps=20)
    torch.testing.assert_close(weights(small), weights(big), rtol=0, atol=1e-6)
    pairs = zip(history(tmp_path / "small"), history(tmp_path / "big"))
    assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in pairs)


def test_same_seed_same_run_other_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, steps=6, seed=seed)
    assert history(tmp_path / "a") == history(tmp_path / "b") != history(tmp_path / "c")


def test_a_run_leaves_the_process_as_it_was(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, handlers = Toy().eval(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(5)
    run(tmp_path, model, steps=3)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_resumes_bit_by_bit(tmp_path, number):
    settings = {"steps": 30, "save_every": 8, "eval_every": 7, "evaluate": lambda m: {"noise": torch.rand(()).item()}}
    _, clean = run(tmp_path / "clean", **settings)
    stop = {12: lambda: os.kill(os.getpid(), number)}
    result, _ = run(tmp_path / "cut", batches=Batches(on=stop), **settings)
    assert (result.interrupted, result.step, result.steps) == (number, 13, 30)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints")[0] == 13
    result, resumed = run(tmp_path / "cut", Toy(seed=3), **settings)
    assert (result.interrupted, result.step) == (None, 30)
    assert torch.equal(weights(clean), weights(resumed))
    timeless = [
        [{k: v for k, v in r.items() if "second" not in k} for r in records(tmp_path / n)] for n in ("cut", "clean")
    ]
    assert timeless[0] == timeless[1]


def test_a_second_signal_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run(tmp_path, batches=Batches(on={12: twice}), steps=30, save_every=5)
    assert ended.value.code == 143
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [10, 5]


def test_a_finished_run_says_so_and_does_nothing(tmp_path):
    result, model = run(tmp_path, steps=5, evaluate=lambda m: {"held_out_loss": 1.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shown = io.StringIO()
    again, other = run(tmp_path, Toy(seed=9), steps=5, progress=Progress(stream=shown))
    assert again.already_finished and again.step == 5 and "already finished: step 5 of 5" in shown.getvalue()
    assert (again.loss, again.evaluation) == (result.loss, {"held_out_loss": 1.5})
    assert torch.equal(weights(model), weights(other))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_records(tmp_path):
    numbers = {"held_out_loss": 2, "bad": math.inf}
    settings = {"steps": 20, "eval_every": 10, "sample_every": 20, "evaluate": lambda m: numbers}
    result, _ = run(tmp_path, **settings, sample=lambda m: f"training {m.training}, grad {torch.is_grad_enabled()}")
    all_records = records(tmp_path)
    trained = [r for r in all_records if "loss" in r]
    assert [r["step"] for r in trained] == list(range(1, 21))
    assert set(trained[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert [r["lr"] for r in trained] == [lr_at(s, 20, TrainConfig(steps=20)) for s in range(20)]
    others = [r for r in all_records if "loss" not in r]
    evaluation = {"held_out_loss": 2.0, "bad": None}
    assert others[:2] == [{"step": 10, **evaluation}, {"step": 20, **evaluation}]
    assert others[2:] == [{"step": 20, "sample": "training False, grad False"}]
    assert result.evaluation == evaluation and result.loss == trained[-1]["loss"]
    with pytest.raises(ValueError, match="'loss', a name of the training records"):
        run(tmp_path / "clash", steps=1, evaluate=lambda m: {"loss": 1.0})


def test_torn_and_later_records_are_dropped(tmp_path):
    metrics = checkpoint.Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(
        b'{"step": 1, "loss": 0.1}\nnot json\n{"step": 3, "loss": 1}\n{"step": 2, "x": 1}\n{"step": 2'
    )
    metrics.rewind(2)
    metrics.write({"step": 3, "loss": 0.1 + 0.2})
    metrics.close()
    assert [(r["step"], r.get("loss")) for r in records(tmp_path)] == [(1, 0.1), (2, None), (3, 0.1 + 0.2)]


def test_minutes_become_steps_once_and_measuring_changes_nothing(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def spend(seconds):
        clock.now += seconds

    class Slow(Batches):
        def batch(self, step, micro=0):
            spend(0.1)
            return super().batch(step, micro)

    settings = {"evaluate": lambda m: spend(0.1) or {"held_out_loss": 1.0}, "sample": lambda m: spend(0.05) or ""}
    result, model = run(tmp_path / "timed", batches=Slow(), minutes=0.5, **settings)
    assert 0.93 * 30 < result.seconds < 30
    _, same = run(tmp_path / "counted", batches=Slow(), steps=result.steps, **settings)
    assert history(tmp_path / "timed") == history(tmp_path / "counted")
    assert torch.equal(weights(model), weights(same))
    # Stopped early and continued on a machine ten times as slow: still the same run.
    clock.now, stop = 0.0, {40: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    first, _ = run(tmp_path / "cut", batches=Slow(on=stop), minutes=0.5, **settings)
    slower = {41: lambda: spend(1000.0)}
    second, _ = run(tmp_path / "cut", batches=Slow(on=slower), minutes=0.5, **settings)
    assert (first.step, first.steps, second.step) == (41, result.steps, result.steps)
    assert history(tmp_path / "cut") == history(tmp_path / "timed")


def test_steps_that_are_not_finite_are_skipped(tmp_path):
    values = {3: (math.nan, 0.0), 5: (1.0, 1e38), 8: (math.inf, 0.0)}
    batches = SimpleNamespace(batch=lambda step, micro: torch.tensor(values.get(step, (1.0, 0.0))).unbind())
    shown = io.StringIO()
    result, model = run(tmp_path, Halves(), batches, steps=10, progress=Progress(stream=shown))
    skipped = [(r["step"], r["skipped"], r["reason"], r.get("loss")) for r in records(tmp_path) if "skipped" in r]
    before = history(tmp_path)[3:4][0][1]
    assert skipped == [
        (4, 1, "loss is nan and grad_norm is nan", None),
        (6, 2, "grad_norm is inf", pytest.approx(before, rel=0.01)),
        (9, 3, "loss is inf and grad_norm is inf", None),
    ]
    assert "step 4 skipped: loss is nan" in shown.getvalue()
    assert result.skipped == 3 and result.step == 10
    assert weights(model).isfinite().all() and weights(model)[0] < 1
    assert len(history(tmp_path)) == 8


def test_training_stops_after_several_bad_steps_in_a_row(tmp_path):
    batches = SimpleNamespace(
        batch=lambda step, micro: (torch.tensor(math.nan if step in (4, *range(9, 99)) else 1.0), torch.tensor(0.0))
    )
    for _ in range(2):
        with pytest.raises(
            FloatingPointError, match=r"loss is nan .* at step 14, the last of 5 .* checkpoint of step 6 stands"
        ):
            run(tmp_path, Halves(), batches, steps=30, save_every=5)
    # A step that is due on a bad one comes behind it, none comes in the middle of them.
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [6, 0]
    folder, bad = checkpoint.newest(tmp_path / "checkpoints")
    assert not bad and checkpoint.read_state(folder)["skipped_in_a_row"] == 0
    model = Halves()
    checkpoint.load(folder, model, Optimizer(model, TrainConfig(steps=30)))
    assert weights(model).isfinite().all()


def test_clipping(tmp_path):
    batches = SimpleNamespace(batch=lambda step, micro: (torch.tensor(100.0), torch.tensor(0.0)))
    moments = []
    for clip in (0.0, 0.5):
        _, model = run(tmp_path / f"moment{clip}", Halves(), batches, steps=1, clip=clip)
        optimizer = Optimizer(model, TrainConfig(steps=1))
        assert records(tmp_path / f"moment{clip}")[0]["grad_norm"] == pytest.approx(200.0)
        checkpoint.load(checkpoint.newest(tmp_path / f"moment{clip}" / "checkpoints")[0], model, optimizer)
        moments.append(optimizer.state()["w.exp_avg"][0].item())
    assert moments == pytest.approx([0.1 * 200, 0.1 * 0.5], rel=1e-5)


def test_bfloat16_keeps_parameters_and_moments_in_float32(tmp_path):
    seen = set()

    class Watched(Toy):
        def loss(self, batch):
            seen.add(self.hidden(self.embedding(batch[0])).dtype)
            return super().loss(batch)

    result, model = run(tmp_path / "half", Watched(0), steps=60, lr=1e-2, precision="bfloat16")
    run(tmp_path / "full", Toy(0), steps=60, lr=1e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and seen == {torch.bfloat16}
    assert history(tmp_path / "half") != history(tmp_path / "full")
    assert result.loss == pytest.approx(history(tmp_path / "full")[-1][1], rel=0.1)


def test_a_graph_wants_a_gpu_and_one_batch_a_step(tmp_path):
    with pytest.raises(ValueError, match="wants parameters on an NVIDIA GPU, they are on cpu"):
        run(tmp_path / "graph", steps=1, graph=True)
    for other, told in (({"compile": True}, "without compile"), ({"accumulate": 2}, "without accumulate 2")):
        with pytest.raises(ValueError, match=told):
            TrainConfig(graph=True, **other)


def test_compiled_equals_eager(tmp_path):
    run(tmp_path / "eager", steps=6)
    run(tmp_path / "compiled", steps=6, compile=True, compile_backend="aot_eager")
    pairs = zip(history(tmp_path / "eager"), history(tmp_path / "compiled"))
    assert all(a == pytest.approx(b, rel=1e-5) for (_, a), (_, b) in pairs)
    with pytest.raises(ValueError, match="compile_backend is 'nothing', torch knows"):
        run(tmp_path / "unknown", steps=1, compile=True, compile_backend="nothing")


def test_gradient_checkpointing_is_switched_on_or_refused(tmp_path):
    model = Toy()
    model.hidden.gradient_checkpointing = False
    run(tmp_path / "a", model, steps=1, gradient_checkpointing=True)
    assert model.hidden.gradient_checkpointing is True
    with pytest.raises(ValueError, match="no module of Toy has it"):
        run(tmp_path / "b", steps=1, gradient_checkpointing=True)


def test_batches_may_be_any_nesting(tmp_path):
    class Nested(Toy):
        def loss(self, batch):
            return super().loss((batch["in"][0], batch["out"]))

    plain = Batches()
    nested = SimpleNamespace(
        batch=lambda s, m: {"in": [plain.batch(s, m)[0]], "out": plain.batch(s, m)[1], "name": "x"}
    )
    run(tmp_path / "nested", Nested(), nested, steps=3)
    run(tmp_path / "plain", steps=3)
    assert history(tmp_path / "nested") == history(tmp_path / "plain")


def test_a_loss_that_is_no_scalar_and_a_model_without_parameters(tmp_path):
    wrong = Toy()
    wrong.loss = lambda batch: torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Toy.loss gave a tensor of shape \(3,\), wanted a scalar"):
        run(tmp_path, wrong, steps=1)
    for loss, told in ((1.0, "gave float"), (torch.ones(()), "gave Tensor without gradient")):
        wrong.loss = lambda batch, loss=loss: loss
        with pytest.raises(ValueError, match=f"Toy.loss {told}, wanted a scalar that has a gradient"):
            run(tmp_path, wrong, steps=1)
    empty = nn.Identity()
    empty.loss = wrong.loss
    with pytest.raises(ValueError, match="Identity has parameters on 0 devices"):
        run(tmp_path / "empty", empty, steps=1)
    with pytest.raises(TypeError, match=r"model is Linear, which has no \.loss"):
        run(tmp_path / "empty", nn.Linear(1, 1), steps=1)
    with pytest.raises(TypeError, match=r"batches is list, which has no \.batch"):
        run(tmp_path / "empty", batches=[1], steps=1)
    assert not (tmp_path / "empty").exists()


def test_training_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path, steps=2)[0].step))
    thread.start()
    thread.join()
    assert done == [2]


def test_a_caller_writes_the_model_its_own_way(tmp_path):
    def writer(model, folder):
        checkpoint.save_weights(model, folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "config.json").write_text("{}")

    run(tmp_path, steps=4, save_every=2, save_model=writer)
    folder, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert set(checkpoint.verify(folder)) == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "sub/config.json",
    }
