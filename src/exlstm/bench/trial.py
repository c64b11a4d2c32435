"""One run of a comparison: a model, its batches, its schedule; on a GPU a CUDA graph a shape, on a stream of its own.

The first steps run as they stand and warm everything up; then a step is recorded once and replayed, so that a step of a small
model costs one launch and many runs share the card. What cannot be recorded goes on without a graph, and the run says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from exlstm.bench import contenders, rows
from exlstm.bench.rows import Case, Row
from exlstm.train import checkpoint
from exlstm.train.config import TrainConfig
from exlstm.train.optim import Optimizer, lr_at

WARM, TURN = 3, 16
# What of a row does not change a run, stands beside it, or is in the settings of its model.
FREE = ("about", "cases", "models", "lrs", "seeds", "steps", "attention_head", "window", "drops_weights", "memory")
# What was not there when runs were first kept: a run that has them as they are is known by the name it had.
LATER = {"clips": (), "precisions": (), "recurrent_lrs": (), "recurrent_lr": 1.0}


@dataclass(frozen=True)
class Plan:
    """What a run is: everything that its figures depend on."""

    row: Row
    case: Case
    model: str
    lr: float
    seed: int
    steps: int
    equal: str = "tokens"
    """all models of the comparison have equal tokens, or equal seconds"""

    @property
    def key(self) -> str:
        """A name for its files, the same for the same run; a model is known by its blocks and their settings, too."""
        row = {k: v for k, v in asdict(self.row).items() if k not in FREE and (k not in LATER or v != LATER[k])}
        parts = [
            row,
            asdict(self.case),
            self.model,
            rows.settings(self.model, self.row),
            self.lr,
            self.seed,
            self.steps,
        ]
        told = f"{self.case.name}-{self.model}-{self.lr:g}-{self.seed}"
        plain = "".join(c if c.isalnum() or c in "-." else "_" for c in told)
        return f"{plain}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"

    def training(self) -> TrainConfig:
        row = self.row
        kept = ("betas", "clip", "final_lr", "optimizer", "recurrent_lr", "warmup", "weight_decay")
        return TrainConfig(steps=self.steps, lr=self.lr, seed=self.seed, **{name: getattr(row, name) for name in kept})


class Trial:
    """A run at work: `advance` some steps, `evaluate` where that is due, `save` and go on from there."""

    def __init__(self, plan: Plan, feed, folder: Path, device: str, graphs: bool = True):
        self.plan, self.feed, self.device, self.folder = plan, feed, torch.device(device), folder / plan.key
        self.cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            # Weights are drawn on the CPU, so that they are the same wherever the run is.
            self.model = contenders.build(plan.model, plan.case, plan.row, feed.vocab_size).to(self.device)
        self.settings = plan.training()
        self.optimizer = Optimizer(self.model, self.settings)
        self.rate = torch.tensor(0.0, device=self.device)
        self.graphs = {} if self.cuda and graphs else None
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        self.generator = torch.default_generator
        if self.cuda:
            self.generator = torch.cuda.default_generators[self.device.index or 0]
        self.mark, self.loss, self.note = None, None, ""
        self.step, self.curve, self.eager, self.saved_at = 0, [], {}, time.time()
        parts = plan.row.evaluations
        self.stops = sorted({round(plan.steps * i / parts) for i in range(1, parts + 1)} - {0})
        self._resume()
        if self.cuda:
            self.optimizer.follow(self.rate)

    @property
    def done(self) -> bool:
        """Whether the last evaluation is behind it."""
        return bool(self.curve) and self.curve[-1].get("last", False)

    def ready(self) -> bool:
        """Whether the device has finished what it was last given."""
        return self.mark is None or self.mark.query()

    def due(self) -> bool:
        """Whether an evaluation comes before the next step."""
        return self.step in self.stops and (not self.curve or self.curve[-1]["step"] < self.step)

    def advance(self, count: int = TURN):
        """Up to `count` steps, as far as the next evaluation; on a GPU they are only begun."""
        until = min(self.step + count, next(stop for stop in self.stops if stop > self.step))
        self.model.train()
        # Batches are shared with other runs: they are made on the stream that all come from, before each goes its way.
        batches = [(self.feed.part(step), self.feed.batch(step)) for step in range(self.step, until)]
        with self._on_stream():
            for part, batch in batches:
                if self.cuda:
                    # The memory of a batch is not to be reused before this stream has read it.
                    for tensor in batch:
                        tensor.record_stream(self.stream)
                self.loss = self._take(part, batch, lr_at(self.step, self.plan.steps, self.settings))
                self.step += 1
        if self.cuda:
            self.mark = torch.cuda.Event()
            self.mark.record(self.stream)

    @contextlib.contextmanager
    def _on_stream(self):
        if not self.cuda:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _take(self, part: int, batch, lr: float):
        """One step, by the graph of its shape where there is one."""
        if self.plan.row.dropout:
            # What is dropped depends on seed and step, however often the run stops and whoever runs beside it.
            self.generator.manual_seed(self.plan.seed * 1_000_003 + self.step)
        if not self.cuda:
            loss = self._work(*batch)
            self.optimizer.step(lr)
            return loss
        self.rate.fill_(lr)
        if self.graphs is not None and part in self.graphs:
            graph, inputs, loss = self.graphs[part]
            for kept, given in zip(inputs, batch):
                kept.copy_(given)
            graph.replay()
            return loss
        seen = self.eager[part] = self.eager.get(part, 0) + 1
        if self.graphs is None or seen <= WARM:
            loss = self._work(*batch)
            self.optimizer.step()
            return loss
        self._record(part, batch)
        return self._take(part, batch, lr)

    def _work(self, inputs, targets):
        """Loss and clipped gradients."""
        self.optimizer.zero_grad()
        with self._precision():
            loss = self.model.loss((inputs, targets))
        loss.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.optimizer.parameters, self.settings.clip)
        return loss.detach()

    def _precision(self):
        if self.plan.row.precision == "float32" or not self.cuda:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _record(self, part: int, batch):
        inputs, graph = [t.clone() for t in batch], torch.cuda.CUDAGraph()
        try:
            self.optimizer.zero_grad()
            with torch.cuda.graph(graph, stream=self.stream):
                loss = self._work(*inputs)
                self.optimizer.step()
            self.graphs[part] = graph, inputs, loss
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self.graphs = None
            self.note = f"no CUDA graph: {' '.join(str(error).split())[:120]}"

    def evaluate(self):
        """Scores at this step, onto the curve. FloatingPointError: the run has diverged."""
        self.model.eval()
        with self._on_stream(), self._precision():
            loss = self.loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {self.step}")
            scores = self.feed.test(self.model, last=(last := self.step == self.plan.steps))
            reached, enough = next(iter(scores.values())), self.plan.row.stop_at
            if not math.isfinite(reached):
                raise FloatingPointError(f"the score is {reached} at step {self.step}")
            if enough and not last and reached >= enough:
                scores, last = self.feed.test(self.model, last=True), True
        self.curve.append({"step": self.step, "loss": loss, "scores": scores, "last": last})

    def state_size(self) -> dict[str, int | None]:
        """What it remembers of the first test's longest words, in the precision of its row."""
        with self._precision():
            return contenders.state_size(self.model.eval(), self.plan.case.test[0][1])

    def pace(self, steps: int) -> float:
        """Seconds of a step when nothing else is at work: the best of three times `steps`, after as many warm ones."""
        self.stops, times = [10**9], []
        steps = len(self.feed.turns) * max(1, steps // len(self.feed.turns))
        # Every shape has to have been warmed up and recorded.
        self.advance(max(steps, (WARM + 1) * len(self.feed.turns)) if self.cuda else steps)
        for _ in range(3):
            self._wait()
            start = time.perf_counter()
            self.advance(steps)
            self._wait()
            times.append((time.perf_counter() - start) / steps)
        return min(times)

    def _wait(self):
        if self.cuda:
            self.stream.synchronize()

    def save(self):
        """A checkpoint to go on from."""
        self._wait()
        loss = None if self.loss is None else self.loss.item()
        state = {"step": self.step, "curve": self.curve, "loss": loss if loss is None or math.isfinite(loss) else None}
        checkpoint.save(checkpoint.step_folder(self.folder, self.step), self.model, self.optimizer, state)
        checkpoint.prune(self.folder, self.step, 1)
        self.saved_at = time.time()

    def forget(self):
        """Removes the checkpoint of a run that has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _resume(self):
        path, _ = checkpoint.newest(self.folder) if self.folder.is_dir() else (None, [])
        if path is None:
            return
        state = checkpoint.read_state(path)
        checkpoint.load(path, self.model, self.optimizer)
        self.step, self.curve = state["step"], state["curve"]
        self.loss = torch.tensor(math.nan if state["loss"] is None else state["loss"])
