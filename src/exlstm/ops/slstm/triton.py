"""sLSTM on a GPU: the Triton kernels of kernels.py behind the operator's signature, with their exact backward.

The serial part is one launch each way; the gradient of r is one product behind it. Kept for the backward are 10 bytes a unit
and step with inputs of 16 bits, 20 with float32, and h.
"""

import torch
from torch import Tensor

from exlstm.ops import backend as backends

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton(x, r, h, c, n, m, reset, mask):
    """Same signature and result as `reference`, for bfloat16, float16 and float32 on a GPU (or in Triton's interpreter)."""
    if not backends.TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if not (runs_on(x) or x.device.type == "meta"):
        raise ValueError(f"backend 'triton' takes bfloat16, float16 and float32 on a GPU, x is {x.dtype} on {x.device}")
    tensors = (x, r, h, c, n)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # What nobody differentiates or traces goes without the operator's machinery.
    traced = torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta"
    forward = _slstm_triton if save or traced else _forward
    return tuple(forward(*tensors, m.detach(), reset, mask, save)[:5])


def runs_on(x) -> bool:
    """Whether the kernels take x: its dtype, and its device, which is a GPU or stands in for one in Triton's interpreter."""
    return x.dtype in DTYPES and backends.triton_runs(x)


def _forward(
    x: Tensor,
    r: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hs, h, c, n, m, then for the backward the gates and q of every step."""
    # Imported here, so that a machine without Triton or without a GPU never pays for it.
    from exlstm.ops.kernels import rows_apart
    from exlstm.ops.slstm import kernels

    cut = kernels.choose(x.shape[-1], x.dtype, False, backends.shared_memory(x.device))
    with backends.on(x.device):
        return kernels.forward(cut, rows_apart(x), r.to(x.dtype).contiguous(), (h, c, n, m), reset, mask, save)


_slstm_triton = torch.library.custom_op("exlstm::slstm_triton", _forward, mutates_args=())


@torch.library.custom_op("exlstm::slstm_triton_backward", mutates_args=())
def _slstm_triton_backward(
    dhs: Tensor | None, dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, r: Tensor, h: Tensor, n: Tensor, hs: Tensor,
    last_n: Tensor, gates: Tensor, qs: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dr, and dh, dc, dn with respect to the initial state."""
    from exlstm.ops.kernels import rows_apart
    from exlstm.ops.slstm import kernels

    cut = kernels.choose(hs.shape[-1], hs.dtype, True, backends.shared_memory(hs.device))
    dhs = hs.new_zeros(()).expand(hs.shape[:-1]).unsqueeze(-1).expand(hs.shape) if dhs is None else dhs
    dh, dc, dn = (torch.zeros_like(n) if d is None else d for d in (dh, dc, dn))
    dq, dp = dc * last_n, (dn + dc * qs[:, -1]) * last_n
    with backends.on(hs.device):
        weights = r.to(hs.dtype).contiguous()
        dh = dh.clone(memory_format=torch.contiguous_format)
        dx, dh, dq, dp = kernels.backward(cut, rows_apart(dhs), dh, dq, dp, weights, gates, qs, reset, mask, hs.dtype)
    before = torch.cat([h.to(hs.dtype).unsqueeze(1), hs[:, :-1]], 1)  # (B, T, H, D)
    if reset is not None:
        before.masked_fill_(reset[..., None, None], 0)
    dr = _products(dx.flatten(3).flatten(0, 1), before.flatten(0, 1)).view(r.shape)
    empty = n == 0
    whole = n.masked_fill(empty, 1)
    dc, dn = (dq / whole).masked_fill(empty, 0), ((dp - dq * qs[:, 0]) / whole).masked_fill(empty, 0)
    return dx, dr.to(r.dtype), dh, dc, dn


def _products(a, b):
    """Σ a ⊗ b over the tokens of a (N, H, I) and b (N, H, J): (H, I, J) in float32."""
    a, b = a.permute(1, 2, 0), b.transpose(0, 1)
    with backends.exact(a.device):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())


@_slstm_triton.register_fake
def _(x, r, h, c, n, m, reset, mask, save):
    batch, steps, heads, _, width = x.shape
    hs, wide = x.new_empty(batch, steps, heads, width), x.dtype == torch.float32
    shape = (4, *hs.shape) if wide else hs.shape
    gates = x.new_empty(shape if save else 0, dtype=torch.float32 if wide else torch.int64)
    qs = x.new_empty((batch, steps + 1, heads, width) if save else 0, dtype=torch.float32 if wide else torch.bfloat16)
    return hs, *(s.new_empty(s.shape) for s in (h, c, n, m)), gates, qs


@_slstm_triton_backward.register_fake
def _(dhs, dh, dc, dn, r, h, n, hs, last_n, gates, qs, reset, mask):
    dx = hs.new_empty(*hs.shape[:3], 4, hs.shape[3])
    return dx, r.new_empty(r.shape), *(h.new_empty(h.shape) for _ in range(3))


def _setup_context(ctx, inputs, output):
    _, r, h, _, n, _, reset, mask, save = inputs
    if not save:
        return
    hs, _, _, last_n, m, gates, qs = output
    ctx.mark_non_differentiable(m, gates, qs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(r, h, n, hs, last_n, gates, qs, reset, mask)


def _backward(ctx, dhs, dh, dc, dn, *_):
    return *_slstm_triton_backward(dhs, dh, dc, dn, *ctx.saved_tensors), None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "slstm has no second derivative on backend 'triton'; inside `with exlstm.backend(\"reference\")` it has one"
    )


_slstm_triton.register_autograd(_backward, setup_context=_setup_context)
_slstm_triton_backward.register_autograd(_no_double_backward)
