"""Trains anything that has `.loss(batch)`; the history of a run depends on its settings alone, however often it stops.

Everything random in a step is a function of (seed, step, micro), the learning rate of (step, steps), the batch of
(step, micro): a checkpoint needs no generator state, and a resumed run repeats the uninterrupted one bit by bit.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exlstm.train import checkpoint
from exlstm.train.capture import Captured, mapped
from exlstm.train.capture import tokens as count
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, lr_at
from exlstm.train.process import Randomness, Signals
from exlstm.train.progress import Progress, clock

PATIENCE = 5


@dataclass(frozen=True)
class TrainResult:
    """What became of a run."""

    step: int
    """updates behind the model, skipped ones counted"""
    steps: int
    """updates of the whole run"""
    loss: float | None
    """training loss of the last step"""
    evaluation: dict[str, float] = field(default_factory=dict)
    """numbers of the last evaluation"""
    skipped: int = 0
    """steps without update, because loss or gradient was not finite"""
    seconds: float = 0.0
    """time spent, over all pieces of the run"""
    interrupted: int | None = None
    """the signal that ended it early; the exit code of the command is 128 + this"""
    already_finished: bool = False
    """nothing was left to do"""


def train(
    model: nn.Module,
    batches: Any,
    config: TrainConfig,
    out: Path | str,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    save_model: Callable[[nn.Module, Path], None] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains `model` in the folder `out`, from its newest good checkpoint if there is one; the same call resumes.

    `batches.batch(step, micro)` is a pure function: a tensor or any nesting of tensors that `model.loss` takes.
    `evaluate` and `sample` run in eval mode without gradients, in the run's precision.
    `save_model(model, folder)` writes model.safetensors, under the names of `model.state_dict()`, and more if it likes.
    SIGINT and SIGTERM finish the step, save and return with `interrupted`; a second one ends at once.

    ValueError: the folder holds another run. OSError: it cannot be written.
    FloatingPointError: loss or gradient was not finite in PATIENCE steps in a row; the last checkpoint stands.
    """
    out, was_training = Path(out), model.training
    save_model, progress = save_model or checkpoint.save_weights, progress or Progress()
    # Everything that can be refused is refused before anything is written.
    run = _Run(model, batches, config, out, evaluate, sample, save_model, progress)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"could not make the folder {run.folder}: {error.strerror}") from None
    with checkpoint.only_writer(out), run.randomness, run.signals:
        try:
            return run.go()
        finally:
            run.metrics.close()
            progress.stop()
            model.train(was_training)


@dataclass
class _Run:
    """One call of `train`: what it works with, and where it stands."""

    model: nn.Module
    batches: Any
    config: TrainConfig
    out: Path
    evaluate: Callable | None
    sample: Callable | None
    save_model: Callable
    progress: Progress

    def __post_init__(self):
        for what, name, method in ((self.model, "model", "loss"), (self.batches, "batches", "batch")):
            if not callable(getattr(what, method, None)):
                raise TypeError(f"{name} is {type(what).__name__}, which has no .{method}(...) to train with")
        self.device = _device(self.model)
        self.randomness, self.signals = Randomness(self.device), Signals()
        self.folder = self.out / "checkpoints"
        self.optimizer = Optimizer(self.model, self.config)
        self.metrics = checkpoint.Metrics(self.out / "metrics.jsonl")
        self.loss = _loss(self.model, self.config)
        self.ahead = (None, None)
        self.step = self.steps = self.saved = 0
        self.skipped = self.skipped_in_a_row = 0
        self.last_loss, self.evaluation = None, {}
        self.began, self.seconds_before = time.perf_counter(), 0.0

    def go(self) -> TrainResult:
        """From the newest good checkpoint, or from the start, to the last step or the first signal."""
        self.model.train()
        resumed = self._resume()
        self.metrics.rewind(self.step)
        if resumed and self.step >= self.steps:
            self.progress.say(f"already finished: step {self.step} of {self.steps} in {self.out}; nothing to do")
            return self._result(already_finished=True)
        if not resumed:
            self.steps = self.config.steps or self._measure()
            if self.signals.received:
                self.progress.say("stopped before the first step; nothing was saved")
                return self._result()
            self._save()
        self.progress.start(self.step, self.steps)
        while self.step < self.steps and not self.signals.received:
            self._advance()
        if self.step < self.steps:
            if self.saved < self.step:
                self._save()
            self.progress.say(f"stopped and saved at step {self.step} of {self.steps}; the same command continues")
        return self._result()

    def _result(self, already_finished: bool = False) -> TrainResult:
        counts = (self.step, self.steps, self.last_loss, self.evaluation, self.skipped, self._seconds())
        return TrainResult(*counts, self.signals.received, already_finished)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _advance(self):
        """One step, its record, and the evaluation, sample and checkpoint that are due."""
        start = time.perf_counter()
        record, tokens = self._update(self.step)
        self.step += 1
        if "reason" in record:
            self.skipped += 1
            self.skipped_in_a_row += 1
            record["skipped"] = self.skipped
        else:
            self.last_loss, self.skipped_in_a_row = record["loss"], 0
        record["tokens_per_second"] = round(tokens / (time.perf_counter() - start), 1)
        record["seconds"] = round(self._seconds(), 3)
        self.metrics.write(record)
        self.progress.step(record)
        if self.skipped_in_a_row:
            self._skip(record["reason"])
        if self._due("eval") and self.evaluate:
            self._evaluate()
        if self._due("sample") and self.sample and not self.signals.received:
            self._sample()
        if self._save_due():
            self._save()

    def _due(self, kind: str) -> bool:
        return self.step == self.steps or self.step % self.config.every(kind, self.steps) == 0

    def _save_due(self) -> bool:
        """Not among steps that are not finite: what they leave must not take the place of the checkpoints before them."""
        every = self.config.every("save", self.steps)
        return self.step == self.steps or (self.step // every > self.saved // every and not self.skipped_in_a_row)

    def _update(self, step: int) -> tuple[dict, int]:
        """Loss, gradient and update of one step: its record and its tokens. Not finite: no update, and a reason why."""
        config, total, tokens = self.config, 0.0, 0
        for micro in range(config.accumulate):
            batch = mapped(lambda t: t.to(self.device, non_blocking=True), self._batch(step, micro))
            tokens += count(batch)
            self.randomness.seed(config.seed, step, micro)
            total = total + self._gradients(batch) / config.accumulate
            self._prefetch(step, micro + 1)
        norm = nn.utils.get_total_norm(self.optimizer.grads())
        lr = lr_at(step, self.steps, config)
        record = {"step": step + 1, "loss": total.item(), "lr": lr, "grad_norm": norm.item()}
        odd = [k for k in ("loss", "grad_norm") if not math.isfinite(record[k])]
        if odd:
            record["reason"] = " and ".join(f"{k} is {record.pop(k)}" for k in odd)
        else:
            if 0 < config.clip < record["grad_norm"]:
                nn.utils.clip_grads_with_norm_(self.optimizer.parameters, config.clip, norm)
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        return record, tokens

    def _gradients(self, batch):
        """The loss of a batch, after its share of the gradients."""
        with self._autocast():
            loss = self.loss(batch)
        if not self.config.graph:
            is_tensor = isinstance(loss, torch.Tensor)
            if not is_tensor or loss.ndim or not loss.requires_grad:
                came = f"a tensor of shape {tuple(loss.shape)}" if is_tensor and loss.ndim else type(loss).__name__
                came += " without gradient" if is_tensor and not loss.requires_grad else ""
                raise ValueError(f"{type(self.model).__name__}.loss gave {came}, wanted a scalar that has a gradient")
            (loss / self.config.accumulate).backward()
        return loss.detach()

    def _skip(self, reason: str):
        """Reports a skipped step; ends the training after PATIENCE in a row."""
        if self.skipped_in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"{reason} at step {self.step}, the last of {PATIENCE} such steps in a row: training stops and the "
                f"checkpoint of step {self.saved} stands; a lower lr or a longer warmup may help"
            )
        if self.skipped <= 10 or self.skipped % 100 == 0:
            self.progress.say(f"step {self.step} skipped: {reason} ({self.skipped} skipped so far)")

    def _batch(self, step: int, micro: int):
        (key, batch), self.ahead = self.ahead, (None, None)
        return batch if key == (step, micro) else self.batches.batch(step, micro)

    def _prefetch(self, step: int, micro: int):
        """Makes the next batch while an accelerator still works on this one."""
        step, micro = (step, micro) if micro < self.config.accumulate else (step + 1, 0)
        if step < self.steps and self.device.type != "cpu":
            self.ahead = ((step, micro), self.batches.batch(step, micro))

    def _autocast(self):
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def _aside(self):
        """Evaluations and samples: eval mode, no gradients, the run's precision, randomness of their own."""
        self.randomness.seed(self.config.seed, self.step, -1)
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.model.train()

    def _evaluate(self):
        with self._aside():
            values = {k: float(v) for k, v in self.evaluate(self.model).items()}
        if clash := {"step", "loss"} & set(values):
            raise ValueError(
                f"evaluate gave {min(clash)!r}, a name of the training records; wanted one such as 'held_out_loss'"
            )
        self.evaluation = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.metrics.write({"step": self.step, **self.evaluation})
        self.progress.evaluated({"step": self.step, **self.evaluation})

    def _sample(self):
        with self._aside():
            text = str(self.sample(self.model))
        self.metrics.write({"step": self.step, "sample": text})
        self.progress.sample(text)

    def _save(self):
        """A checkpoint of this step; then the ones that are too old go."""
        state = {"step": self.step, "steps": self.steps, "seconds": self._seconds(), "loss": self.last_loss}
        state |= {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "evaluation": self.evaluation}
        state["config"] = asdict(self.config)
        self.metrics.sync()
        path = checkpoint.step_folder(self.folder, self.step)
        checkpoint.save(path, self.model, self.optimizer, state, self.save_model)
        checkpoint.prune(self.folder, self.step, self.config.keep)
        self.saved = self.step

    def _resume(self) -> bool:
        """Takes the newest checkpoint that verifies and says which do not; False if there is none."""
        checkpoint.clean(self.folder)
        path, damaged = checkpoint.newest(self.folder)
        for sentence in damaged:
            self.progress.say(sentence)
        if path is None:
            if damaged:
                self.progress.say("no good checkpoint is left: training starts from the beginning")
            return False
        state = checkpoint.read_state(path)
        if changes := self.config.changes(state["config"]):
            raise ValueError(
                f"{self.out} holds another run: {', '.join(changes)}; give its settings or choose another folder"
            )
        checkpoint.load(path, self.model, self.optimizer)
        self.step = self.saved = state["step"]
        self.steps, self.seconds_before, self.last_loss = state["steps"], state["seconds"], state["loss"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.evaluation = state["evaluation"]
        if damaged or 0 < self.step < self.steps:
            self.progress.say(f"continues after step {self.step} of {self.steps} from {path}")
        return True

    def _measure(self) -> int:
        """The number of steps that fit into the budget, from real steps that are undone."""
        budget = self.config.budget()
        self.progress.say(f"measures its speed, to turn {budget / 60:g} minutes into a number of steps")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        kept = [t.detach().clone() for t in tensors]
        self.steps = 1000
        times = _timed(self._update, budget, self.signals)
        a_step, costs = statistics.median(times), {}
        for kind, call in (("eval", self.evaluate), ("sample", self.sample)):
            start = time.perf_counter()
            if call is not None and not self.signals.received:
                with self._aside():
                    call(self.model)
                costs[kind] = time.perf_counter() - start
        with torch.no_grad():
            for tensor, value in zip(tensors, kept):
                tensor.copy_(value)
        self.optimizer.clear()
        self.ahead = (None, None)
        # 3 % for checkpoints; half of a budget that evaluations would eat is for training all the same.
        left = 0.97 * (budget - self._seconds())

        def cost(steps: int) -> float:
            asides = sum(-(-steps // self.config.every(kind, steps)) * seconds for kind, seconds in costs.items())
            return steps * a_step + min(asides, left / 2)

        steps = max(1, bisect.bisect_right(range(1, max(2, int(left / a_step))), left, key=cost))
        self.progress.say(f"{1000 * a_step:.3g} ms a step: {steps} steps in {clock(budget)}")
        return steps


def _timed(update: Callable[[int], Any], budget: float, signals: Signals) -> list[float]:
    """Seconds of single steps after a warm-up: 3 s of them, or ten and a second; a twentieth of a small budget."""
    times, enough = [], min(3.0, budget / 20)
    while not signals.received:
        start = time.perf_counter()
        update(len(times))
        times.append(time.perf_counter() - start)
        spent = sum(times[2:])
        if spent >= enough or (len(times) >= 12 and spent >= 1) or (len(times) >= 2 and sum(times) >= budget / 10):
            break
    return times[2:] or times[1:] or times or [1.0]


def _loss(model: nn.Module, config: TrainConfig) -> Callable:
    """model.loss as the settings want it: with gradient checkpointing, compiled, or with its gradients out of a graph."""
    if config.gradient_checkpointing:
        able = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        if not able:
            raise ValueError(f"gradient_checkpointing is asked for, and no module of {type(model).__name__} has it")
        for module in able:
            module.gradient_checkpointing = True
    if config.graph:
        return Captured(model.loss, model.parameters())
    if not config.compile:
        return model.loss
    known = torch.compiler.list_backends(exclude_tags=())
    if config.compile_backend not in known:
        raise ValueError(f"compile_backend is {config.compile_backend!r}, torch knows {', '.join(known)}")
    compiled = torch.compile(model.loss, backend=config.compile_backend)

    def loss(batch):
        try:
            return compiled(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            told = str(error).strip().splitlines()[0]
            raise ValueError(
                f"torch.compile with {config.compile_backend} failed ({told}); train without compile"
            ) from error

    return loss


def _device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"{type(model).__name__} has parameters on {len(devices)} devices, wanted one")
    return devices.pop()
