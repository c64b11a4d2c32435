"""The two operators forward and backward: sLSTM beside nn.LSTM, mLSTM beside mlstm_kernels, and growth with the length."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from exlstm.bench import peers, timing
from exlstm.bench.config import KernelsConfig
from exlstm.ops.mlstm import mlstm
from exlstm.ops.slstm import slstm

# Time of ours over nn.LSTM's that we call good, by H·D: the wider, the more its dense recurrent matrix costs nn.LSTM.
SLSTM_WANTED = {128: 1.8, 256: 0.9, 512: 0.75}
MLSTM_PEER = "chunkwise--native_custbw"
GRADIENTS = ("h", "dq", "dk", "dv", "di", "df")


def run(config: KernelsConfig) -> list[dict]:
    """Measures, prints and writes; returns the rows of the table."""
    with timing.cores(config):
        torch.manual_seed(0)
        rows = [_slstm_row(config, *shape) for shape in config.slstm]
        kernel = _mlstm_peer() if config.mlstm else None
        for shape in config.mlstm:
            rows.append(_mlstm_row(config, kernel, *shape))
            print(timing.table(_mlstm_errors(config, kernel, *shape)), end="\n\n")
        if config.growth:
            rows += _growth_rows(config)
    facts = timing.machine(config, "mlstm_kernels")
    timing.report("kernels", rows, config, facts, timing.bars(rows, "ms"))
    return rows


def _slstm_row(config, B, T, H, D):
    width = H * D
    project = nn.Linear(width, 4 * width, device=config.device)
    r = nn.Parameter(torch.randn(H, 4, D, D, device=config.device) * D**-0.5)
    lstm = nn.LSTM(width, width, batch_first=True, device=config.device)
    x, dh = torch.randn(2, B, T, width, device=config.device)
    x.requires_grad_()

    def ours():
        return slstm(project(x).view(B, T, H, 4, D), r)[0].flatten(2)

    times = timing.paired(
        lambda: torch.autograd.grad(ours(), [x, r, *project.parameters()], dh),
        lambda: torch.autograd.grad(lstm(x)[0], [x, *lstm.parameters()], dh),
        rounds=config.rounds,
        device=config.device,
    )
    saved = timing.saved_bytes(ours, [r, *project.parameters()]) / (B * T)
    case = f"sLSTM B{B} T{T} {H}×{D}"
    return timing.row(case, "ms", times, "nn.LSTM", SLSTM_WANTED.get(width), **{"saved B/token": round(saved)})


def _mlstm_peer():
    """mlstm_kernels' fastest kernel for a CPU, as a call on our shapes, or None."""
    package = peers.find("mlstm_kernels.torch")
    if package is None:
        return None
    kernel = package.get_mlstm_kernel(MLSTM_PEER)
    return lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, eps=0.0, chunk_size=_peer_chunk(q.shape[2]))


def _peer_chunk(length: int) -> int:
    """Theirs wants a length that is a multiple of its chunk."""
    return math.gcd(64, length)


def _inputs(B, T, H, K, V, device):
    """q, k, v, gates' pre-activations i ~ N(0, 1) and f ~ N(3, 1), and the gradient of h."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, dh = (torch.randn(B, T, H, n, device=device, generator=draw) for n in (K, K, V, V))
    i, f = (torch.randn(B, T, H, device=device, generator=draw) + mean for mean in (0.0, 3.0))
    return [q, k, v, i, f], dh


def _call_ours(q, k, v, i, f):
    return mlstm(q, k, v, i, F.logsigmoid(f))[0]


def _leaves(tensors, dtype=torch.float32, heads_first=False):
    """Fresh leaves for gradients; `heads_first` in the peer's own layout (B, H, T, ...), so that no transpose is timed."""
    return [(t.transpose(1, 2) if heads_first else t).to(dtype).contiguous().requires_grad_() for t in tensors]


def _mlstm_row(config, kernel, B, T, H, K, V):
    inputs, dh = _inputs(B, T, H, K, V, config.device)
    mine, theirs, dh_theirs = _leaves(inputs), _leaves(inputs, heads_first=True), dh.transpose(1, 2).contiguous()
    times = timing.paired(
        lambda: torch.autograd.grad(_call_ours(*mine), mine, dh),
        None if kernel is None else lambda: torch.autograd.grad(kernel(*theirs), theirs, dh_theirs),
        rounds=config.rounds,
        device=config.device,
    )
    saved = timing.saved_bytes(lambda: _call_ours(*mine)) / (B * T)
    peer = f"mlstm_kernels {MLSTM_PEER}, chunk {_peer_chunk(T)}"
    return timing.row(f"mLSTM B{B} T{T} {H}×{K}/{V}", "ms", times, peer, 1.0, **{"saved B/token": round(saved)})


def _mlstm_errors(config, kernel, B, T, H, K, V) -> list[dict]:
    """‖x − reference‖ / ‖reference‖ of h and of every gradient, the reference being the plain recurrence in float64.

    Once for any gradient of h, and once for one without a part along h, which is what a scale-free norm behind the
    operator hands back: kernels that leave the denominator out of their backward are right there alone.
    """
    inputs, dh = _inputs(B, T, H, K, V, config.device)
    exact = _leaves(inputs, torch.float64)
    q, k, v, i, f = exact
    h = mlstm(q, k, v, i, F.logsigmoid(f), backend="reference")[0]
    along = h.detach() * ((dh * h.detach()).sum(-1, keepdim=True) / h.detach().square().sum(-1, keepdim=True))
    sides = {"ours": (_call_ours, False)}
    if kernel is not None:
        sides[f"mlstm_kernels {MLSTM_PEER}"] = (kernel, True)
    rows = []
    for kind, dy in (("any dh", dh), ("dh ⟂ h", (dh - along).float())):
        truth = [h.detach(), *torch.autograd.grad(h, exact, dy.double(), retain_graph=True)]
        for name, (call, heads_first) in sides.items():
            errors = (timing.relative_error(a, b) for a, b in zip(_gradients(call, inputs, dy, heads_first), truth))
            rows.append(
                {f"error against float64, T{T}": name, "": kind} | {n: f"{e:.1e}" for n, e in zip(GRADIENTS, errors)}
            )
    return rows


def _gradients(call, inputs, dy, heads_first):
    """h and the gradients of all inputs, in our layout."""
    leaves = _leaves(inputs, heads_first=heads_first)
    h = call(*leaves)
    grads = torch.autograd.grad(h, leaves, dy.transpose(1, 2).contiguous() if heads_first else dy)
    return [t.transpose(1, 2) if heads_first else t for t in (h, *grads)]


def _growth_rows(config):
    """Time and bytes saved for the backward at two lengths: both should grow with the length and no faster."""
    short, long = config.growth
    calls, saved = {}, {}
    for length in config.growth:
        inputs, dh = _inputs(1, length, 4, 64, 64, config.device)
        leaves = _leaves(inputs)
        calls[length] = lambda leaves=leaves, dh=dh: torch.autograd.grad(_call_ours(*leaves), leaves, dh)
        saved[length] = timing.saved_bytes(lambda leaves=leaves: _call_ours(*leaves)) / length
    times = timing.paired(calls[long], calls[short], rounds=max(3, config.rounds // 2), device=config.device)
    case, peer = f"mLSTM T{long} over T{short}, B1 4×64/64", f"ours at T{short}: {saved[short]:.0f} B/token saved"
    wanted = round(long / short * 1.075, 2)
    return [timing.row(case, "ms", times, peer, wanted, **{"saved B/token": round(saved[long])})]
