"""The mLSTM on a GPU beside mlstm_kernels, causal attention and fla: time, share of the card, memory, errors, decoding.

Useful work of a forward, the causal products in chunks of 64 tokens: 4·K·V + 64·(K + V) operations a token and head, whoever
works and however. Least traffic: q, k, v and the gates are read and h is written once; a backward reads q, k, v, dh and the
gates, and writes their gradients. Times are medians of `triton.testing.do_bench`, which empties the L2 cache before every run;
inputs are random, every side gets them in its own layout, and the logsigmoid of the forget gate is part of the time.
"graph ms" and "graph both ms" are the forward without gradients, and forward and backward, out of a CUDA graph: the card alone,
without what the CPU takes to launch it; shares of the card are of these times.
"""

import itertools
import math
import time
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from exlstm.bench import peers, timing
from exlstm.bench.config import MLSTMConfig
from exlstm.ops.mlstm import mlstm

KERNEL, CHUNK = "chunkwise--triton_xl_chunk", 128
GRADIENTS = ("h", "dq", "dk", "dv", "di", "df")
# Tokens of a decoding loop that one graph holds, so that no launch from the CPU is measured.
STEPS = 50
# Forwards with their backwards that one graph holds.
BOTH = 4


class Case(NamedTuple):
    """Sequences, tokens, heads, width of keys and of values; `causal` attention, whose work grows with the length."""

    B: int
    T: int
    H: int
    K: int
    V: int
    causal: bool = False

    def __str__(self):
        return f"B{self.B} T{self.T} {self.H}×{self.K}/{self.V}"

    @property
    def work(self) -> float:
        """Operations of a forward."""
        widths = self.K + self.V
        return self.B * self.T * self.H * (self.T * widths if self.causal else 4 * self.K * self.V + 64 * widths)

    @property
    def traffic(self) -> float:
        """Bytes that a forward moves at least, in bfloat16 with float32 gates."""
        return self.B * self.T * self.H * (4 * (self.K + self.V) + 8 * (not self.causal))

    @property
    def traffic_both(self) -> float:
        """Bytes that forward and backward move at least."""
        return self.traffic + self.B * self.T * self.H * (8 * self.K + 6 * self.V + 16 * (not self.causal))


class Side(NamedTuple):
    """A call on q, k, v, i, f, and whether it wants (B, H, T, ·)."""

    call: object
    heads_first: bool = False


def _ours():
    return Side(lambda q, k, v, i, f: mlstm(q, k, v, i, F.logsigmoid(f))[0])


def _mlstm_kernels():
    package = peers.find("mlstm_kernels.torch")
    if package is None:
        return None
    kernel = package.get_mlstm_kernel(KERNEL)
    # The gates stay float32: with bfloat16 ones its kernel stops Triton's compiler.
    return Side(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, return_last_states=False, chunk_size=CHUNK), True)


def _fla():
    package = peers.find("fla.ops.simple_gla")
    # Without input gate and normaliser, so nearest and not the same.
    return package and Side(lambda q, k, v, i, f: package.chunk_simple_gla(q, k, v, F.logsigmoid(f))[0])


def _attention(backend):
    def call(q, k, v, i, f):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Side(call, True)


# name -> what makes it, None where it cannot be imported; ours first, so that no peer can spoil it
SIDES = {
    "ours": _ours,
    "cudnn": lambda: _attention(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: _attention(SDPBackend.FLASH_ATTENTION),
    "mlstm_kernels": _mlstm_kernels,
    "fla": _fla,
}
ATTENTION = ("cudnn", "flash")
LABELS = {
    "mlstm_kernels": f"mlstm_kernels xl_chunk {CHUNK}",
    "fla": "fla simple_gla",
    "cudnn": "attention, cuDNN",
    "flash": "attention, flash",
}


def run(config: MLSTMConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the main table."""
    timing.wants_gpu(config, "mlstm")
    for name in config.only:
        if name not in SIDES:
            raise ValueError(f"side {name!r} is not one of {', '.join(SIDES)}")
    deadline = time.monotonic() + config.seconds
    errors, steps, rows = [], [], {}
    with timing.cores(config):
        facts = timing.machine(config, "triton", "mlstm_kernels", "flash-linear-attention")
        product, copy = _peaks(config.device)
        facts |= {"product TFLOP/s": round(product), "copy TB/s": round(copy, 2)}
        for name in config.only or SIDES:
            side = timing.attempt(name, deadline, SIDES[name])
            if side is None:
                continue
            if name in ("ours", "mlstm_kernels"):
                steps += _steps(name, config, deadline)
                errors += _errors(name, side, config, deadline)
            for case in _cases(config, name):
                call = partial(_measured, name, side, case, config)
                found = timing.attempt(f"{name} {case}", deadline, call)
                if found is not None:
                    rows[name, case] = found | _shares(case, found, product, copy)
    for report, table in (("mlstm_errors", errors), ("mlstm_steps", steps)):
        if table:
            timing.report(report, table, config, facts)
    _add_ratios(rows)
    rows = list(rows.values())
    timing.report("mlstm", rows, config, facts, _roofline(rows, product, copy) if rows else None)
    return rows


def _cases(config, name):
    """What a side is measured on, the middle length first: it is what a short run should know."""
    middle = config.lengths[len(config.lengths) // 2 :][:1]
    lengths = middle if config.quick else dict.fromkeys((*middle, *config.lengths))
    attention = name in ATTENTION
    for length in lengths:
        for shape in ((32, 128, 128),) if attention else config.shapes:
            yield Case(max(1, config.tokens // length), length, *shape, attention)
    if config.shapes and not (attention or config.quick):
        yield Case(1, config.tokens, *config.shapes[0])


def _milliseconds(call, quick=False) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5 if quick else 15, rep=15 if quick else 50, return_mode="median"))


def _peaks(device):
    """TFLOP/s of a bfloat16 product of 8192³, and TB/s, read and written, of a copy of 2 GiB."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    product = 2 * 8192**3 / _milliseconds(lambda: a @ b) / 1e9
    x = torch.zeros(2**31, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return product, 2 * x.numel() / _milliseconds(lambda: y.copy_(x)) / 1e9


def _inputs(case, device, heads_first=False, seed=0):
    """q, k, v in bfloat16, i ~ N(0, 1) and f ~ N(3, 1) in float32, and the gradient of h."""
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*width, dtype=torch.bfloat16):
        x = torch.randn(case.B, case.T, case.H, *width, device=device, dtype=dtype, generator=draw)
        return x.transpose(1, 2).contiguous() if heads_first else x

    q, k, v, dh = (normal(width) for width in (case.K, case.K, case.V, case.V))
    i, f = normal(dtype=torch.float32), normal(dtype=torch.float32) + 3
    return [q, k, v] if case.causal else [q, k, v, i, f], dh


def _measured(name, side, case, config):
    """Times of one side in one case, and what its forward and backward need beside the inputs."""
    tensors, dh = _inputs(case, config.device, side.heads_first)
    leaves = [x.requires_grad_() for x in tensors]
    gates = (None, None) if case.causal else ()

    def forward():
        return side.call(*leaves, *gates)

    def both():
        return torch.autograd.grad(forward(), leaves, dh, allow_unused=True)

    with torch.no_grad():
        inference = _milliseconds(forward, config.quick)
    what = f"{name} {case} in a graph"
    graph = timing.attempt(what, math.inf, partial(_replayed, torch.no_grad()(forward), config.device))
    graph_both = timing.attempt(f"{what}, both", math.inf, partial(_replayed, both, config.device, BOTH))
    times = [inference, *(_milliseconds(call, config.quick) for call in (forward, both))]
    columns = dict(zip(("infer ms", "fwd ms", "fwd+bwd ms"), (round(t, 3) for t in times), strict=True))
    columns["graph ms"], columns["graph both ms"] = graph and round(graph, 3), graph_both and round(graph_both, 3)
    print(f"{name} {case}: {columns}", flush=True)
    return {"case": str(case), "side": LABELS.get(name, name), **columns, "extra GiB": _extra(both, config.device)}


def _extra(call, device):
    """GiB that `call` needs at its peak beside what stands."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def _shares(case, found, product, copy):
    """What a forward without gradients makes of the card, and what forward and backward make of its memory."""
    forward, both = (
        found[graph] or found[call] for graph, call in (("graph ms", "infer ms"), ("graph both ms", "fwd+bwd ms"))
    )
    speed = case.work / forward / 1e9
    moved, moved_both = case.traffic / forward / 1e9, case.traffic_both / both / 1e9
    return {
        "TFLOP/s": round(speed),
        "% product": round(100 * speed / product, 1),
        "% copy": round(100 * moved / copy, 1),
        "% copy, both": round(100 * moved_both / copy, 1),
        "intensity": round(case.work / case.traffic, 1),
    }


def _add_ratios(rows):
    """Ours over the peer of the same case, in the rows of ours."""
    for (name, case), row in rows.items():
        peer = rows.get(("mlstm_kernels", case))
        if name == "ours" and peer is not None:
            for column in ("infer", "fwd+bwd"):
                row[f"peer/ours {column}"] = round(peer[f"{column} ms"] / row[f"{column} ms"], 2)


def _errors(name, side, config, deadline):
    """‖x − truth‖ / ‖truth‖ of h and of every gradient, for two kinds of dh as in bench/kernels.py; truth is in float64."""
    shapes = (config.shapes[:1] if config.quick else config.shapes) if config.error_length else ()
    cases = [Case(1, config.error_length, *shape) for shape in shapes]
    calls = {f"errors of {name} {case}": partial(_error_rows, name, side, case, config.device) for case in cases}
    return [row for what, call in calls.items() for row in timing.attempt(what, deadline, call) or []]


def _error_rows(name, side, case, device):
    inputs, dh = _inputs(case, device)
    exact = [x.double().requires_grad_() for x in inputs]
    q, k, v, i, f = exact
    h = mlstm(q, k, v, i, F.logsigmoid(f), backend="cpu")[0]
    along = h.detach() * ((dh * h.detach()).sum(-1, keepdim=True) / h.detach().square().sum(-1, keepdim=True))
    rows = []
    for kind, dy in (("any dh", dh), ("dh ⟂ h", (dh - along).to(dh.dtype))):
        truth = [h.detach(), *torch.autograd.grad(h, exact, dy.double(), retain_graph=True)]
        lay = (lambda x: x.transpose(1, 2).contiguous()) if side.heads_first else (lambda x: x)
        leaves = [lay(x).detach().requires_grad_() for x in inputs]
        found = side.call(*leaves)
        found = [found, *torch.autograd.grad(found, leaves, lay(dy))]
        found = [x.transpose(1, 2) if side.heads_first else x for x in found]
        errors = (f"{timing.relative_error(a, b):.1e}" for a, b in zip(found, truth, strict=True))
        rows.append(
            {"error against float64": str(case), "side": LABELS.get(name, name), "": kind}
            | dict(zip(GRADIENTS, errors))
        )
    return rows


def _steps(name, config, deadline):
    """A decoding step inside a graph; the traffic is that of c, read and written.

    Ours writes n and m beside the old ones, in one launch, as `Engine` has it, whose next kernel takes them over; and all in
    place, in two launches.
    """
    ours = {"ours": _our_step, "ours, n and m in place": partial(_our_step, beside=False)}
    batches, rows = config.batches[:1] if config.quick else config.batches, []
    for side, make in (ours if name == "ours" else {name: _their_step}).items():
        for case in (Case(batch, 1, *shape) for shape in config.shapes[:1] for batch in batches):
            ms = timing.attempt(
                f"step of {side} {case}",
                deadline,
                lambda c=case, make=make: _replayed(torch.no_grad()(make(c, config.device)), config.device),
            )
            if ms is not None:
                speed = 8 * case.B * case.H * case.K * case.V / ms / 1e9
                row = {"decoding step": str(case), "side": side, "µs": round(1e3 * ms, 1), "TB/s": round(speed, 2)}
                rows.append(row)
    return rows


def _token(case, device):
    (q, k, v, i, f), _ = _inputs(case, device)
    c, n, m = (torch.zeros(case.B, case.H, *width, device=device) for width in ((case.K, case.V), (case.K,), ()))
    return q, k, v, i, f, c, n, m


def _our_step(case, device, beside=True):
    from exlstm.ops.mlstm.step import step_

    q, k, v, i, f, c, n, m = _token(case, device)
    f, h, scale = F.logsigmoid(f), torch.empty_like(v), case.K**-0.5
    if not beside:
        return lambda: step_(q, k, v, i, f, c, n, m, scale, True, 0.0, h)
    # By turns, so that every token reads what the one before it wrote.
    first, second = (n, m), (n.clone(), m.clone())
    turns = itertools.cycle([(first, second), (second, first)])

    def step():
        old, new = next(turns)
        return step_(q, k, v, i, f, c, *old, scale, True, 0.0, h, out=new)

    return step


def _their_step(case, device):
    from mlstm_kernels.torch import get_mlstm_step_kernel

    kernel = get_mlstm_step_kernel("triton")
    q, k, v, i, f, c, n, m = _token(case, device)
    q, k, v = (x.squeeze(1) for x in (q, k, v))
    # Its gates and its m carry one axis more.
    i, f = (x.squeeze(1).unsqueeze(-1).bfloat16() for x in (i, f))
    return lambda: kernel(q=q, k=k, v=v, i=i, f=f, c=c, n=n, m=m.unsqueeze(-1))


def _replayed(call, device, times=STEPS) -> float:
    """Milliseconds of `call` inside a graph of many."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return _milliseconds(graph.replay) / times


def _roofline(rows, product, copy):
    """Forwards without gradients under the roof of the card, as measured: operations a second over operations a byte."""

    def draw(axes):
        ridge = product / copy
        xs = [10, ridge, max(1e4, *(2 * row["intensity"] for row in rows))]
        axes.plot(xs, [min(product, copy * x) for x in xs], color="0.3", label="product and copy, measured")
        for side in dict.fromkeys(row["side"] for row in rows):
            own = [row for row in rows if row["side"] == side]
            axes.plot([r["intensity"] for r in own], [r["TFLOP/s"] for r in own], "o", alpha=0.7, label=side)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s, forward", title="bfloat16")
        axes.legend(frameon=False, fontsize=8)

    return draw
