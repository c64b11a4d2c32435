"""mLSTM on a GPU: the Triton kernels of one_pass.py and two_pass.py behind the operator's signature, with their exact backward.

Kept for the backward are the inputs, h, two numbers a token and head (the denominator, and the sum in it where it counts), and
for narrow heads a memory every 512 tokens; everything else is worked out again.
"""

import os

import torch
from torch import Tensor

from exlstm.ops.mlstm.cpu import cpu
from exlstm.ops.mlstm.plan import OnePass, cdiv, choose

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, c, n, m, then what the backward wants of the forward: den, s, memories at the ends of segments."""
    plan = choose(q, v, chunk, save)
    h, c_last, n_last, m_last, *saved = _kernels(plan).forward(
        plan, q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, save
    )
    return h, c_last.view(c.shape), n_last.view(n.shape), m_last.view(m.shape), *saved


@torch.library.custom_op("exlstm::mlstm_triton_backward", mutates_args=())
def _mlstm_triton_backward(
    dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor,
    c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None, h: Tensor, den: Tensor, s: Tensor, cs: Tensor, ns: Tensor,
    scale: float, normalize: bool, eps: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_i, dlog_f, dc, dn, the last two with respect to the initial memory."""
    plan = choose(q, v, chunk, True)
    dh = torch.zeros_like(h) if dh is None else dh
    if dc is not None or dn is not None:
        dc, dn = (torch.zeros_like(x) if dx is None else dx for x, dx in ((c, dc), (n, dn)))
    *grads, dc, dn = _kernels(plan).backward(
        plan, (dh, dc, dn), q, k, v, log_i, log_f, c, n, m, reset, h, den, s, cs, ns, scale, normalize, eps
    )
    return *grads, dc.view(c.shape), dn.view(n.shape)


@_mlstm_triton.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
    plan = choose(q, v, chunk, save)
    rows, K, V = m.numel(), *c.shape[2:]
    memory = [v.new_empty(v.shape), *(x.new_empty(x.shape) for x in (c, n, m))]
    if not save:
        return *memory, *(c.new_empty(0) for _ in range(4))
    if not isinstance(plan, OnePass):
        vector = (rows, cdiv(q.shape[1], plan.L) * plan.L)
        return *memory, c.new_empty(vector), c.new_empty(vector), c.new_empty(0), c.new_empty(0)
    segments = cdiv(q.shape[1], plan.L * plan.SEGMENT)
    vector, slots = (rows, segments * plan.SEGMENT * plan.L), rows * (segments + 1)
    return *memory, c.new_empty(vector), c.new_empty(vector), q.new_empty(slots, K, V), c.new_empty(slots, K)


@_mlstm_triton_backward.register_fake
def _(dh, dc, dn, q, k, v, log_i, log_f, c, n, m, reset, h, den, s, cs, ns, scale, normalize, eps, chunk):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_i, log_f, c, n))


def _setup_context(ctx, inputs, output):
    q, k, v, log_i, log_f, c, n, m, reset, *ctx.settings, save = inputs
    if not save:
        return
    h, _, _, *rest = output
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
