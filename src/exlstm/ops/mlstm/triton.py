"""mLSTM on a GPU: the Triton kernels of one_pass.py and two_pass.py behind the operator's signature, with their exact backward.

Kept for the backward are the inputs, h, two numbers a token and head (the denominator, and the sum in it where it counts), and n of
every chunk; everything else is worked out again.
"""

import os

import torch
from torch import Tensor

from exlstm.ops.mlstm.cpu import cpu
from exlstm.ops.mlstm.plan import OnePass, choose, padded_length

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """Same signature and result as `reference`, for bfloat16, float16 and float32 on a GPU (or in Triton's interpreter)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and q.device.type == "cpu"
    if q.device.type not in ("cuda", "meta") and not interpreted:
        raise ValueError(f"backend 'triton' runs on a GPU, q is on {q.device}")
    if q.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' takes bfloat16, float16 and float32, q is {q.dtype}")
    m = m.detach()
    if q.shape[1] == 1:
        return cpu(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps)
    tensors = (q, k, v, log_i, log_f, c, n)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    h, *memory = _mlstm_triton(*tensors, m, reset, scale, normalize, eps, chunk or 0, save)[:4]
    return h, *memory


def _kernels(plan):
    # Imported here, so that a machine without Triton or without a GPU never pays for them.
    if isinstance(plan, OnePass):
        from exlstm.ops.mlstm import one_pass as kernels
    else:
        from exlstm.ops.mlstm import two_pass as kernels
    return kernels


@torch.library.custom_op("exlstm::mlstm_triton", mutates_args=())
def _mlstm_triton(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None,
    scale: float, normalize: bool, eps: float, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, c, n, m, then what the backward wants of the forward: den, s, n of every chunk."""
    from exlstm.ops.mlstm.gates import Call, aligned, on

    plan = choose(q, v, chunk)
    call = Call(q, v, reset, scale, normalize, plan.forward.L, padded_length(plan, q.shape[1], save))
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        kernels, tensors = _kernels(plan.forward), (aligned(q), aligned(k), aligned(v))
        h, c_last, ns, den, s = kernels.forward(plan.forward, call, *tensors, gates, c, n, eps)
    memory = c_last.view(c.shape), ns[:, -1].reshape(n.shape).clone(), gates.last_m.view(m.shape)
    # n at the start of the backward's chunks, which may be longer.
    kept = ns[:, :: plan.backward.L // plan.forward.L].contiguous()
    saved = (den, s, kept) if save else (ns.new_empty(0) for _ in range(3))
    return h, *memory, *saved


@torch.library.custom_op("exlstm::mlstm_triton_backward", mutates_args=())
def _mlstm_triton_backward(
    dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor,
    c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None, h: Tensor, den: Tensor, s: Tensor, ns: Tensor,
    scale: float, normalize: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_i, dlog_f, dc, dn, the last two with respect to the initial memory."""
    from exlstm.ops.mlstm.gates import Call, aligned, on

    plan = choose(q, v, chunk).backward
    call = Call(q, v, reset, scale, normalize, plan.L, den.shape[1])
    dh = torch.zeros_like(h) if dh is None else dh
    if dc is not None or dn is not None:
        dc, dn = (torch.zeros_like(x) if dx is None else dx for x, dx in ((c, dc), (n, dn)))
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        q, k, v, h, dh = (aligned(x) for x in (q, k, v, h, dh))
        dq, dk, dv, flows, dc, dn = _kernels(plan).backward(
            plan, call, (dh, dc, dn), q, k, v, gates, c, (h, den, s, ns)
        )
        dlog_i, dlog_f = call.gate_gradients(log_i, *flows)
    return dq, dk, dv, dlog_i, dlog_f, dc.view(c.shape), dn.view(n.shape)


@_mlstm_triton.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
    memory = [v.new_empty(v.shape), *(x.new_empty(x.shape) for x in (c, n, m))]
    plan, rows = choose(q, v, chunk), m.numel()
    tokens = padded_length(plan, q.shape[1], save)
    saved = [(rows, tokens), (rows, tokens), (rows, tokens // plan.backward.L + 1, q.shape[-1])] if save else [(0,)] * 3
    return *memory, *(c.new_empty(shape) for shape in saved)


@_mlstm_triton_backward.register_fake
def _(dh, dc, dn, q, k, v, log_i, log_f, c, n, m, reset, h, den, s, ns, scale, normalize, chunk):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_i, log_f, c, n))


def _setup_context(ctx, inputs, output):
    q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, _, chunk, save = inputs
    if not save:
        return
    h, _, _, *rest = output
    ctx.settings = (scale, normalize, chunk)
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_i, log_f, c, n, m, reset, h, *rest[1:])


def _backward(ctx, dh, dc, dn, *_):
    grads = _mlstm_triton_backward(dh, dc, dn, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("mlstm has no second derivative on backend 'triton'; backend='reference' has one")


_mlstm_triton.register_autograd(_backward, setup_context=_setup_context)
_mlstm_triton_backward.register_autograd(_no_double_backward)
