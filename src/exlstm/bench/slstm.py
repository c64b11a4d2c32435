"""The sLSTM on a GPU beside cuDNN's LSTM of the same width and FlashRNN: microseconds a step of time, and errors.

bfloat16, pre-activations given: of cuDNN's LSTM, which makes them itself, its one product is part of the time. An LSTM mixes
its whole width where the sLSTM mixes inside heads. Times are medians of `triton.testing.do_bench`, which empties the L2 cache
before every run; both ways is forward, backward and the gradients of all inputs and weights.
"""

import time
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from exlstm.bench import peers, timing
from exlstm.bench.config import SLSTMConfig
from exlstm.ops.slstm import slstm


class Case(NamedTuple):
    """Sequences, tokens, heads and units a head."""

    B: int
    T: int
    H: int
    D: int

    def __str__(self):
        return f"B{self.B} T{self.T} {self.H}×{self.D}"


def _ours(case, x, r):
    return [x, r], lambda: slstm(x, r)[0]


def _lstm(case, x, r):
    width = case.H * case.D
    net = nn.LSTM(width, width, batch_first=True, device=x.device, dtype=x.dtype)
    given = x[:, :, :, 0].flatten(2).detach().requires_grad_()
    return [given, *net.parameters()], lambda: net(given)[0]


def _flashrnn(backend, case, x, r):
    call = peers.find("flashrnn").flashrnn
    given = x.movedim(3, 2).contiguous().detach().requires_grad_()  # (B, T, 4, H, D)
    weights = r.movedim(1, 0).contiguous().detach().requires_grad_()  # (4, H, D, D)
    bias = torch.zeros_like(weights[..., 0]).requires_grad_()
    return [given, weights, bias], lambda: call(given, weights, bias, function="slstm", backend=backend)[0][0]


# name -> what gives, for a case, x and r, the tensors to be differentiated and the call; ours first
SIDES = {
    "ours": _ours,
    "lstm": _lstm,
    "flashrnn-triton": partial(_flashrnn, "triton"),
    "flashrnn-cuda": partial(_flashrnn, "cuda"),
}


def run(config: SLSTMConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the main table."""
    timing.wants_gpu(config, "slstm")
    for name in config.only:
        if name not in SIDES:
            raise ValueError(f"side {name!r} is not one of {', '.join(SIDES)}")
    deadline, rows, errors = time.monotonic() + config.seconds, [], []
    with timing.cores(config):
        facts = timing.machine(config, "triton", "flashrnn")
        for name in config.only or SIDES:
            if name.startswith("flashrnn") and peers.find("flashrnn") is None:
                continue
            for case in _cases(config):
                row = timing.attempt(f"{name} {case}", deadline, partial(_row, name, case, config))
                if row is not None:
                    rows.append(row)
                    print(f"{name} {case}: {row['infer µs']} and {row['both µs']} µs a step", flush=True)
        for shape in (config.shapes[:1] if config.quick else config.shapes) if config.error_length else ():
            errors.append(_errors(Case(2, config.error_length, *shape), config.device))
    timing.report("slstm_errors", errors, config, facts)
    timing.report("slstm", rows, config, facts, _draw(rows, config) if rows else None)
    return rows


def _cases(config):
    for i, shape in enumerate(config.shapes[:1] if config.quick else config.shapes):
        for batch in config.batches[: None if i == 0 and not config.quick else 1]:
            yield Case(batch, config.length, *shape)


def _inputs(case, device):
    """x and r in bfloat16, gates i ~ N(0, 1) and f ~ N(3, 1), and the gradient of h."""
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.B, case.T, case.H, 4, case.D, device=device, generator=draw)
    x[:, :, :, 1] += 3
    r = torch.randn(case.H, 4, case.D, case.D, device=device, generator=draw) / case.D**0.5
    dh = torch.randn(case.B, case.T, case.H, case.D, device=device, generator=draw)
    return [t.bfloat16() for t in (x, r, dh)]


def _row(name, case, config):
    """Times of one side in one case."""
    x, r, dh = _inputs(case, config.device)
    leaves, call = SIDES[name](case, x.requires_grad_(), r.requires_grad_())
    with torch.no_grad():
        infer, shape = _microseconds(call, config), call().shape
    dh = dh.reshape(shape)
    times = infer, _microseconds(call, config), _microseconds(lambda: torch.autograd.grad(call(), leaves, dh), config)
    columns = zip(("infer µs", "fwd µs", "both µs"), (round(t / case.T, 3) for t in times), strict=True)
    return {"case": str(case), "side": name, **dict(columns)}


def _microseconds(call, config) -> float:
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=5, rep=10 if config.quick else 30, return_mode="median")


def _errors(case, device):
    """‖x − truth‖ / ‖truth‖ of h and of the gradients, truth in float64 by the recurrence."""
    x, r, dh = _inputs(case, device)
    results = []
    for dtype, backend in ((torch.bfloat16, None), (torch.float64, "reference")):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, r)]
        h, _ = slstm(*leaves, backend=backend)
        results.append([h.detach(), *torch.autograd.grad(h, leaves, dh.to(dtype))])
    found = (f"{timing.relative_error(a, b):.1e}" for a, b in zip(*results, strict=True))
    return {"error against float64": str(case), **dict(zip(("h", "dx", "dr"), found))}


def _draw(rows, config):
    """Microseconds a step of the first batch, forward without gradients and both ways."""

    def draw(axes):
        first = [row for row in rows if row["case"].startswith(f"B{config.batches[0]} ")]
        cases, sides = (list(dict.fromkeys(row[key] for row in first)) for key in ("case", "side"))
        for i, side in enumerate(sides):
            own = {row["case"]: row for row in first if row["side"] == side}
            places = [cases.index(case) + i * 0.8 / len(sides) for case in own]
            bars = axes.bar(places, [r["both µs"] for r in own.values()], 0.8 / len(sides), label=side, alpha=0.5)
            color = bars[0].get_facecolor()
            axes.bar(places, [r["infer µs"] for r in own.values()], 0.8 / len(sides), color=color[:3])
        axes.set_xticks(range(len(cases)), cases, fontsize=7)
        axes.set(yscale="log", ylabel="µs a step: forward dark, both ways light", title="bfloat16")
        axes.legend(frameon=False, fontsize=8)

    return draw
