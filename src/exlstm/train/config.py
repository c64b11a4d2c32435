"""How a network is trained: frozen settings, without torch so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
MINUTES = 2.0
# What may change between the pieces of one run: nothing of it enters the mathematics of a step.
FREE = {
    "eval_every",
    "eval_batches",
    "save_every",
    "sample_every",
    "keep",
    "compile",
    "compile_backend",
    "graph",
    "gradient_checkpointing",
}


@dataclass(frozen=True)
class TrainConfig:
    """Training with AdamW (arXiv 1711.05101) or Muon, a linear warm-up and a cosine decay of the learning rate."""

    steps: int | None = None
    """updates; left out, `minutes` decides"""
    minutes: float | None = None
    """wall-clock budget, turned into a number of steps once, at the start; left out with `steps`: 2"""
    lr: float = 1e-3
    """highest learning rate, reached after the warm-up"""
    final_lr: float = 0.1
    """learning rate of the last step over the highest"""
    warmup: float = 0.05
    """share of the steps over which the learning rate rises"""
    weight_decay: float = 0.1
    """decay of the matrices; biases, norms, embeddings and vectors have none"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the mean and of the square of the gradients"""
    optimizer: str = "adamw"
    """adamw, or muon: Muon moves the matrices of blocks from 16 x 16 on, AdamW what is left, both at the one learning rate"""
    momentum: float = 0.95
    """Muon's decay of the mean of the gradients"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0 leaves it as it is"""
    accumulate: int = 1
    """batches a step, their gradients averaged"""
    precision: str = "float32"
    """float32, or bfloat16: autocast, parameters stay float32"""
    compile: bool = False
    """compile the loss with torch.compile"""
    compile_backend: str = "inductor"
    """torch.compile's backend; aot_eager needs no C++ compiler"""
    graph: bool = False
    """record forward and backward as a CUDA graph, for batches of one form: no step waits for launches. On a GPU alone"""
    gradient_checkpointing: bool = False
    """recompute the blocks in the backward pass: less memory, about a third more time"""
    eval_every: int = 0
    """steps between evaluations; 0: ten in a run, fewer in a short one. The last step is always evaluated"""
    eval_batches: int = 16
    """batches an evaluation, spread evenly over the held-out text; `exlstm train` measures all of it at the end"""
    save_every: int = 0
    """steps between checkpoints; 0: ten in a run, at least every 500. The last step is always saved"""
    sample_every: int = 0
    """steps between samples; 0: as often as evaluations by themselves"""
    keep: int = 2
    """newest checkpoints that are kept"""
    seed: int = 0
    """seed of everything random in a step"""
    recurrent_lr: float = 1.0
    """learning rate of recurrent maps (an sLSTM's, an LSTM's) over that of all others"""

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"steps is {self.steps} and minutes is {self.minutes}; one of the two fixes the length of a run"
            )
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        if self.minutes is not None:
            _number("minutes", self.minutes, lambda x: x > 0, "above 0")
        if self.graph and (self.compile or self.accumulate > 1):
            came = "compile" if self.compile else f"accumulate {self.accumulate}"
            raise ValueError(f"graph records a whole step of one batch, it goes without {came}")
        for name, least in (("accumulate", 1), ("eval_batches", 1), ("keep", 1), ("seed", 0)):
            _whole(name, getattr(self, name), least)
        for name in ("eval_every", "save_every", "sample_every"):
            _whole(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, wanted a whole number below 2^63")
        _number("lr", self.lr, lambda x: x > 0, "above 0")
        _number("final_lr", self.final_lr, lambda x: 0 <= x <= 1, "from 0 to 1")
        _number("warmup", self.warmup, lambda x: 0 <= x < 1, "from 0 to below 1 (a share of the steps)")
        _number("weight_decay", self.weight_decay, lambda x: x >= 0, "of at least 0")
        _number("recurrent_lr", self.recurrent_lr, lambda x: x >= 0, "of at least 0")
        _number("clip", self.clip, lambda x: x >= 0, "of at least 0")
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas}, wanted two numbers")
        for beta in self.betas:
            _number("betas", beta, lambda x: 0 <= x < 1, "from 0 to below 1")
        _number("momentum", self.momentum, lambda x: 0 <= x < 1, "from 0 to below 1")
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted {' or '.join(known)}")

    def every(self, kind: str, steps: int) -> int:
        """Steps between two of `kind` (eval, save, sample) in a run of `steps`."""
        chosen, tenth = getattr(self, f"{kind}_every"), -(-steps // 10)
        # A batch evaluated costs about a third of a batch learned: evaluations then take a sixth of a run at most.
        return chosen or (min(tenth, 500) if kind == "save" else max(tenth, 2 * self.eval_batches))

    def budget(self) -> float | None:
        """Seconds the run may take, or None when `steps` fixes its length."""
        return None if self.steps is not None else 60 * (MINUTES if self.minutes is None else self.minutes)

    def changes(self, stored: dict) -> list[str]:
        """Fields that make this another run than the one of the stored settings: 'lr is 0.1, was 0.001'."""
        # A run from before a setting existed had its default; JSON has no tuples.
        was = {f.name: stored.get(f.name, f.default) for f in fields(self) if f.name not in FREE}
        now = {k: v for k, v in asdict(self).items() if k in was}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in was.items()}
        return [f"{k} is {v}, was {was[k]}" for k, v in now.items() if v != plain[k]]


def _whole(name: str, value, least: int):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, wanted a whole number of at least {least}")


def _number(name: str, value, fits, wanted: str):
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise ValueError(f"{name} is {value!r}, wanted a number {wanted}")
