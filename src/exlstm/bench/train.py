"""Training on a GPU, tokens a second of whole steps (forward, backward, optimiser) over the length: ours beside two peers.

Weights and AdamW (fused) in float32, products in bfloat16 by autocast, random tokens. A step holds --tokens tokens, or one
longer sequence; then blocks run again in the backward. "captured" replays forward and backward out of a CUDA graph, as 7:1
does; "compiled" compiles block by block, so that a block is compiled once; Llama is compiled whole. Tokens a second are of the
median step; memory is the peak of all from the weights on, a graph's recording with it.
"""

import math
import statistics
import time
from functools import partial

import torch
from torch.nn import functional as F

from exlstm.bench import peers, timing
from exlstm.bench.config import TrainConfig
from exlstm.train.capture import Captured

# Steps before the clock starts, and timed steps at most.
WARM, STEPS = 3, 12


class Ours:
    """A model of ours; `blocks` are in turn its own, `depth` times as many as the size has."""

    def __init__(self, size, device, blocks=("mlstm",), depth=1, compiled=False, captured=False):
        self.model = peers.language(size, blocks, device, depth=depth)
        captured = captured and torch.device(device).type == "cuda"
        self.captured = Captured(self.model.loss, self.model.parameters()) if captured else None
        if compiled:
            for block in self.model.stack.blocks:
                block.compile()

    def loss(self, inputs, targets, again):
        self.model.gradient_checkpointing = again
        return (self.captured or self.model.loss)((inputs, targets))


class Large:
    """xLSTMLarge of the package xlstm in its training mode."""

    def __init__(self, size, device):
        # Without the states its training forward does not return.
        kernels = {"chunkwise_kernel": "chunkwise--triton_limit_chunk", "return_last_states": True}
        self.model = peers.large(size, device, mode="train", **kernels)

    def loss(self, inputs, targets, again):
        if again:
            raise ValueError("xLSTMLarge has no gradient checkpointing")
        logits, _ = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Llama:
    """Llama of transformers, with SDPA and compiled."""

    def __init__(self, size, device):
        self.model = peers.llama(size, device, length=1 << 18)
        self.model.compile()

    def loss(self, inputs, targets, again):
        if again:
            self.model.gradient_checkpointing_enable()
        logits = self.model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# name -> what builds it for a size; ours first, so that no peer can spoil it
SIDES = {
    "ours": Ours,
    "ours, captured": partial(Ours, captured=True),
    "ours, compiled": partial(Ours, compiled=True),
    "ours 7:1": partial(Ours, blocks=("mlstm",) * 7 + ("slstm",), captured=True),
    "attention": partial(Ours, blocks=("attention",), compiled=True),
    "mamba2": partial(Ours, blocks=("mamba2",), depth=2, compiled=True),
    "xlstm": Large,
    "llama": Llama,
}
NEEDS = {"xlstm": "xlstm.xlstm_large.model", "llama": "transformers"}


def run(config: TrainConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the table."""
    timing.wants_gpu(config, "train")
    for name in config.only:
        if name not in SIDES:
            raise ValueError(f"side {name!r} is not one of {', '.join(SIDES)}")
    if config.size not in peers.SIZES:
        raise ValueError(f"size {config.size!r} is not one of {', '.join(peers.SIZES)}")
    deadline, rows = time.monotonic() + config.seconds, []
    with timing.cores(config):
        facts = timing.machine(config, "triton", "xlstm", "mlstm_kernels", "transformers")
        for name in config.only or SIDES:
            if name in NEEDS and peers.find(NEEDS[name]) is None:
                continue
            for length in config.lengths:
                what = f"{name} T {length}"
                row = timing.attempt(what, deadline, partial(_row, name, length, config, deadline))
                if row is not None:
                    rows.append(row)
                    print(f"{what}: {row['tokens/s']} tokens/s", flush=True)
    timing.report("train", rows, config, facts, _draw(rows) if rows else None)
    return rows


def _row(name, length, config, deadline):
    """One side at one length, built anew so that nothing of another length stands in memory."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    side = SIDES[name](config.size, config.device)
    model = side.model.train()
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    batch, again = max(1, config.tokens // length), length > config.tokens
    tokens = torch.randint(peers.VOCABULARY, (batch, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = side.loss(inputs, targets, again)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses = [step() for _ in range(WARM)]
    times = []
    while len(times) < 3 or (len(times) < STEPS and time.monotonic() < deadline):
        times.append(timing.milliseconds(step, device))
    ms = statistics.median(times)
    return {
        "side": name,
        "T": length,
        "B": batch,
        "tokens/s": round(1e3 * batch * length / ms),
        "ms": round(ms, 2),
        "least ms": round(min(times), 2),
        "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "blocks again": again,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first loss − log V": round(losses[0].item() - math.log(peers.VOCABULARY), 3),
    }


def _draw(rows):
    """Tokens a second over the length, a line a side."""

    def draw(axes):
        for side in dict.fromkeys(row["side"] for row in rows):
            own = [row for row in rows if row["side"] == side]
            axes.plot([r["T"] for r in own], [r["tokens/s"] / 1e3 for r in own], "o-", label=side)
        axes.set(
            xscale="log", xlabel="tokens a sequence", ylabel="thousand tokens a second", title="whole training steps"
        )
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)

    return draw
