"""Forward and backward of the stack in the README of xlstm, ours beside theirs, and beside a plain LSTM of the same depth."""

import torch

from exlstm.bench import peers, timing
from exlstm.bench.config import TrainingConfig


def run(config: TrainingConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the table."""
    with timing.cores(config):
        torch.manual_seed(0)
        ours, theirs = peers.Readme(config.device), peers.their_stack(config.length, config.device)
        x, dy = torch.randn(2, config.batch, config.length, peers.WIDTH, device=config.device)
        times = timing.paired(
            _step(ours, x, dy, ours=True),
            None if theirs is None else _step(theirs, x, dy, ours=False),
            rounds=config.rounds,
            device=config.device,
        )
        sizes = {"parameters": _parameters(ours), "theirs": None if theirs is None else _parameters(theirs)}
        saved = {"saved MiB": _saved(lambda: ours(x)[0], ours)}
        if theirs is not None:
            saved["saved MiB, theirs"] = _saved(lambda: theirs(x), theirs)
    case = f"6 mLSTM + 1 sLSTM, D {peers.WIDTH}, B {config.batch}, T {config.length}"
    rows = [timing.row(case, "ms", times, "xlstm, backend=vanilla", 0.2, **sizes, **saved)]
    timing.report("training", rows, config, timing.machine(config, "xlstm"), timing.bars(rows, "ms"))
    return rows


def _step(stack, x, dy, ours: bool):
    """Forward and backward, gradients of the parameters and of the input."""
    x = x.clone().requires_grad_()
    wanted = [x, *stack.parameters()]

    def step():
        y = stack(x)
        torch.autograd.grad(y[0] if ours else y, wanted, dy)

    return step


def _parameters(stack) -> int:
    return sum(p.numel() for p in stack.parameters())


def _saved(forward, stack) -> float:
    return round(timing.saved_bytes(forward, stack.parameters()) / 2**20, 1)
