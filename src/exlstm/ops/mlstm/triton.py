"""mLSTM on a GPU: the kernels that plan.py chooses behind the operator's signature, with exact backward.

Kept for the backward are the inputs, h, two numbers a token and head (the denominator, and the sum in it where it counts), n of
every chunk, and C and the scores of every chunk where the forward wrote them, a third of what q, k, v and h take, and two thirds
behind columns.py; the rest is worked out again.
"""

import torch
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.mlstm.cpu import cpu
from exlstm.ops.mlstm.plan import (
    Chain,
    Chunks,
    Columns,
    Fused,
    OnePass,
    TwoPass,
    Walk,
    choose,
    memories,
    padded_length,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """Same signature and result as `reference`, for bfloat16, float16 and float32 on a GPU (or in Triton's interpreter)."""
    if not backends.TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if not (runs_on(q) or q.device.type == "meta"):
        raise ValueError(f"backend 'triton' takes bfloat16, float16 and float32 on a GPU, q is {q.dtype} on {q.device}")
    m = m.detach()
    tensors = (q, k, v, log_i, log_f, c, n)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if q.shape[1] == 1:
        return _step(q, v, save)(*tensors, m, reset, scale, normalize, eps)
    # What nobody differentiates or traces goes without the operator's machinery, a tenth of a millisecond on the CPU.
    traced = torch.compiler.is_compiling() or type(q) is not Tensor or q.device.type == "meta"
    forward = _mlstm_triton if save or traced else _forward
    h, *memory = forward(*tensors, m, reset, scale, normalize, eps, chunk or 0, save)[:4]
    return h, *memory


def runs_on(q) -> bool:
    """Whether the kernels take q: its dtype, and its device, which is a GPU or stands in for one in Triton's interpreter."""
    return q.dtype in DTYPES and backends.triton_runs(q)


def _step(q, v, save):
    """What does a single token: one kernel, or plain PyTorch where a gradient is wanted or a head is too wide for it."""
    if save or q.device.type == "meta":
        return cpu
    from exlstm.ops.mlstm.step import step, takes

    return step if takes(q, v, torch.float32) else cpu


def keeps(plan) -> bool:
    """Whether the forward hands its memories to the backward: two passes have them anyway, a walk back cannot find them."""
    return isinstance(plan.forward, TwoPass) or isinstance(plan.backward, Chain | Chunks)


def _kernels(plan):
    # Imported here, so that a machine without Triton or without a GPU never pays for them.
    if isinstance(plan, OnePass):
        from exlstm.ops.mlstm import one_pass as kernels
    elif isinstance(plan, Walk):
        from exlstm.ops.mlstm import walk as kernels
    elif isinstance(plan, Columns):
        from exlstm.ops.mlstm import columns as kernels
    elif isinstance(plan, Chunks):
        from exlstm.ops.mlstm import chunks as kernels
    elif isinstance(plan, Chain | Fused):
        from exlstm.ops.mlstm import hopper as kernels
    else:
        from exlstm.ops.mlstm import two_pass as kernels
    return kernels


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None,
    scale: float, normalize: bool, eps: float, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, c, n, m, then what the backward wants of the forward: den, s, n of every chunk, C and scores where it keeps them."""
    from exlstm.ops.mlstm.gates import Call, aligned

    plan = choose(q, v, chunk)
    call = Call(q, v, reset, scale, normalize, plan.forward.L, padded_length(plan, q.shape[1], save))
    longer = plan.backward.L // plan.forward.L
    with backends.on(q.device):
        gates = call.gates(log_i, log_f, m)
        kernels, tensors = _kernels(plan.forward), (aligned(q), aligned(k), aligned(v))
        every = longer if save and keeps(plan) else 0
        h, c_last, ns, den, s, *kept = kernels.forward(plan.forward, call, *tensors, gates, c, n, eps, every)
    memory = c_last.view(c.shape), ns[:, -1].reshape(n.shape).clone(), gates.last_m.view(m.shape)
    # n at the start of the backward's chunks, which may be longer.
    saved = (den, s, ns[:, ::longer].contiguous()) if save else (ns.new_empty(0) for _ in range(3))
    wanted = save and keeps(plan), save and isinstance(plan.backward, Chunks)
    kept = [x if there else ns.new_empty(0, dtype=call.dtype) for x, there in zip((*kept, None), wanted)]
    return h, *memory, *saved, *kept


_mlstm_triton = torch.library.custom_op("exlstm::mlstm_triton", _forward, mutates_args=())


@torch.library.custom_op("exlstm::mlstm_triton_backward", mutates_args=())
def _mlstm_triton_backward(
    dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor,
    c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None, h: Tensor, den: Tensor, s: Tensor, ns: Tensor, cs: Tensor, p: Tensor,
    scale: float, normalize: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_i, dlog_f, dc, dn, the last two with respect to the initial memory."""
    from exlstm.ops.mlstm.gates import Call, aligned

    plan = choose(q, v, chunk).backward
    call = Call(q, v, reset, scale, normalize, plan.L, den.shape[1])
    dh = torch.zeros_like(h) if dh is None else dh
    if dc is not None or dn is not None:
        dc, dn = (torch.zeros_like(x) if dx is None else dx for x, dx in ((c, dc), (n, dn)))
    with backends.on(q.device):
        gates = call.gates(log_i, log_f, m)
        q, k, v, h, dh = (aligned(x) for x in (q, k, v, h, dh))
        dq, dk, dv, flows, dc, dn = _kernels(plan).backward(
            plan, call, (dh, dc, dn), q, k, v, gates, c, (h, den, s, ns, cs if cs.numel() else None, p)
        )
        dlog_i, dlog_f = call.gate_gradients(log_i, *flows)
    return dq, dk, dv, dlog_i, dlog_f, dc.view(c.shape), dn.view(n.shape)


@_mlstm_triton.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
    memory = [v.new_empty(v.shape), *(x.new_empty(x.shape) for x in (c, n, m))]
    plan, rows = choose(q, v, chunk), m.numel()
    tokens = padded_length(plan, q.shape[1], save)
    chunks = tokens // plan.backward.L
    saved = [(rows, tokens), (rows, tokens), (rows, chunks + 1, q.shape[-1])] if save else [(0,)] * 3
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and q.is_cuda else torch.float32
    kept = memories(rows * chunks, *c.shape[2:], dtype) if save and keeps(plan) else (0,)
    kept = kept, (rows, tokens, plan.forward.L) if save and isinstance(plan.backward, Chunks) else (0,)
    return *memory, *(c.new_empty(shape) for shape in saved), *(c.new_empty(shape, dtype=dtype) for shape in kept)


@_mlstm_triton_backward.register_fake
def _(dh, dc, dn, q, k, v, log_i, log_f, c, n, m, reset, h, den, s, ns, cs, p, scale, normalize, chunk):
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
    raise RuntimeError(
        "mlstm has no second derivative on backend 'triton'; inside `with exlstm.backend(\"reference\")` it has one"
    )


_mlstm_triton.register_autograd(_backward, setup_context=_setup_context)
_mlstm_triton_backward.register_autograd(_no_double_backward)
