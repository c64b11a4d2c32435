"""RMSNorm and LayerNorm of rows as Triton kernels, with the residual addition in front: each tensor is moved once each way.

r = x + y      c = r - mean r, or r itself      n̂ = c / sqrt(mean c² + eps)      n = w n̂ + b
u = w dn      dx = dy = dr + (u - mean u - n̂ mean(u n̂)) / sqrt(mean c² + eps)      dw = Σ dn n̂      db = Σ dn

The mean of u falls away with that of r. Only r is kept for the backward, whose programs sum dw and db over their rows; the
sums of all programs are added in a second step: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, rows_apart

# Features up to which a row stays in registers.
LARGEST = 4096
# Numbers in a tile, and programs that a backward is spread over.
FORWARD, BACKWARD, PROGRAMS = 4096, 2048, 2048


@triton.jit
def _normed(b_r, keep, eps, D: tl.constexpr, CENTRE: tl.constexpr):
    """Rows with mean square 1, and mean 0 if asked for, and the factor that made them so."""
    if CENTRE:
        b_r = tl.where(keep, b_r - (tl.sum(b_r, 1) / D)[:, None], 0.0)
    b_s = tl.rsqrt(tl.sum(b_r * b_r, 1) / D + eps)[:, None]
    return b_r * b_s, b_s


@triton.jit(do_not_specialize=["rows"])
def row_norm_forward_kernel(
    x, y, weight, bias, n, r, rows, eps, stride_x, stride_y,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    CENTRE: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Programs (rows / BR,)."""
    o_r, o_d = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None], tl.arange(0, BD)[None, :]
    keep_d = o_d < D
    keep = (o_r < rows) & keep_d
    b_r = tl.load(x + o_r * stride_x + o_d, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        b_r += tl.load(y + o_r * stride_y + o_d, mask=keep, other=0.0).to(tl.float32)
        # What is normalised is what is kept.
        b_r = b_r.to(r.dtype.element_ty)
        tl.store(r + o_r * D + o_d, b_r, mask=keep)
        b_r = b_r.to(tl.float32)
    b_n, _ = _normed(b_r, keep, eps, D, CENTRE)
    b_n *= tl.load(weight + o_d, mask=keep_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_n += tl.load(bias + o_d, mask=keep_d, other=0.0).to(tl.float32)
    tl.store(n + o_r * D + o_d, b_n.to(n.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "steps"])
def row_norm_backward_kernel(
    dn, dr, r, weight, dx, dy, dweight, dbias, rows, steps, eps, stride_n, stride_d, stride_r,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    CENTRE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DR: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Programs (P,): `steps` tiles of BR rows, and the sums over them in row i_p of dweight and dbias."""
    i_p, o_d = tl.program_id(0), tl.arange(0, BD)[None, :]
    keep_d = o_d < D
    b_w = tl.load(weight + o_d, mask=keep_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros((BR, BD), tl.float32)
    if HAS_BIAS:
        b_db = tl.zeros((BR, BD), tl.float32)
    for i_r in range(i_p * steps, tl.minimum((i_p + 1) * steps, tl.cdiv(rows, BR))):
        o_r = (i_r * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
        keep = (o_r < rows) & keep_d
        b_dn = tl.load(dn + o_r * stride_n + o_d, mask=keep, other=0.0).to(tl.float32)
        b_n = tl.load(r + o_r * stride_r + o_d, mask=keep, other=0.0).to(tl.float32)
        b_n, b_s = _normed(b_n, keep, eps, D, CENTRE)
        b_dw += b_dn * b_n
        if HAS_BIAS:
            b_db += b_dn
        b_dn *= b_w
        b_dx = b_dn - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None]
        if CENTRE:
            b_dx -= (tl.sum(b_dn, 1) / D)[:, None]
        b_dx *= b_s
        if HAS_DR:
            b_dx += tl.load(dr + o_r * stride_d + o_d, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + o_r * D + o_d, b_dx.to(dx.dtype.element_ty), mask=keep)
        if TWO:
            tl.store(dy + o_r * D + o_d, b_dx.to(dy.dtype.element_ty), mask=keep)
    o_sum = i_p.to(tl.int64) * D + o_d
    tl.store(dweight + o_sum, tl.sum(b_dw, 0, keep_dims=True), mask=keep_d)
    if HAS_BIAS:
        tl.store(dbias + o_sum, tl.sum(b_db, 0, keep_dims=True), mask=keep_d)


def takes(x: Tensor, weight: Tensor, y: Tensor | None) -> bool:
    """Whether the kernels run on these arguments of `row_norm`."""
    fits = weight.shape == x.shape[-1:] and (y is None or (y.dtype in DTYPES and y.shape == x.shape))
    return fits and x.dtype in DTYPES and weight.dtype in DTYPES and x.shape[-1] <= LARGEST and x.numel() > 0


def row_norm(x, y, weight, bias, eps, centre, dtype):
    """(n in `dtype`, x + y, or an empty tensor where y is None)."""
    # Without gradients an operator of torch would cost more than the kernel.
    known = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (_row_norm if known else _forward)(x, y, weight, bias, eps, centre, dtype)


def _forward(x, y, weight, bias, eps, centre, dtype):
    n, r = _room(x, y, dtype)
    flat, other, width = _rows(x), _rows(x if y is None else y), x.shape[-1]
    cut = _cut(width, FORWARD)
    with backends.on(x.device):
        row_norm_forward_kernel[(triton.cdiv(flat.shape[0], cut["BR"]),)](
            flat, other, weight.contiguous(), weight if bias is None else bias.contiguous(), n, r, flat.shape[0], eps,
            flat.stride(0), other.stride(0), **cut, CENTRE=centre, HAS_BIAS=bias is not None, ADD=y is not None,
        )  # fmt: skip
    return n, r


@torch.library.custom_op("exlstm::row_norm", mutates_args=())
def _row_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward(x, y, weight, bias, eps, centre, dtype)


@torch.library.custom_op("exlstm::row_norm_backward", mutates_args=())
def _backward(
    dn: Tensor, dr: Tensor | None, r: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centre: bool,
    dtype: torch.dtype, other: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """dx in `dtype` and, if asked for, in the `other`; then the gradients of weight and, where it is there, of bias."""
    found = _slopes(r, dtype, other)
    flat, dn, width = _rows(r), _rows(dn), r.shape[-1]
    after = flat if dr is None else _rows(dr)
    cut = _cut(width, BACKWARD)
    tiles = triton.cdiv(flat.shape[0], cut["BR"])
    steps = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, steps)
    given = [weight] if bias is None else [weight, bias]
    sums = torch.empty(len(given), programs, width, dtype=torch.float32, device=r.device)
    with backends.on(r.device):
        row_norm_backward_kernel[(programs,)](
            dn, after, flat, weight.contiguous(), found[0], found[-1], sums[0], sums[-1], flat.shape[0], steps, eps,
            dn.stride(0), after.stride(0), flat.stride(0), **cut, CENTRE=centre, HAS_BIAS=bias is not None,
            HAS_DR=dr is not None, TWO=other is not None,
        )  # fmt: skip
    # Copies, as no output of an operator may be a view of another.
    return found + [total.to(p.dtype, copy=True) for total, p in zip(sums.sum(1), given, strict=True)]


def _rows(x):
    """x (..., D) as (rows, D), a view where its strides allow it, the last axis contiguous."""
    return rows_apart(x.reshape(-1, x.shape[-1]))


def _cut(width, tile):
    """Rows and features of a tile, and warps that hold at most 32 numbers of it a thread."""
    wide = triton.next_power_of_2(width)
    return {"D": width, "BR": max(1, tile // wide), "BD": wide, "num_warps": max(4, wide // 512)}


def _room(x, y, dtype):
    """n and r to be written; r is empty where nothing is added."""
    r = x.new_empty(0)
    if y is not None:
        r = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), r


def _slopes(r, *dtypes):
    return [torch.empty(r.shape, dtype=dtype, device=r.device) for dtype in dtypes if dtype is not None]


@_row_norm.register_fake
def _(x, y, weight, bias, eps, centre, dtype):
    return _room(x, y, dtype)


@_backward.register_fake
def _(dn, dr, r, weight, bias, eps, centre, dtype, other):
    return _slopes(r, dtype, other) + [torch.empty_like(p) for p in (weight, bias) if p is not None]


def _setup_context(ctx, inputs, output):
    x, y, weight, bias, ctx.eps, ctx.centre, _ = inputs
    ctx.added = y is not None
    ctx.dtypes = x.dtype, y.dtype if ctx.added and y.dtype != x.dtype else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.added else x, weight, bias)


def _differentiate(ctx, dn, dr):
    r, weight, bias = ctx.saved_tensors
    dn = torch.zeros_like(r) if dn is None else dn
    found = _backward(dn, dr if ctx.added else None, r, weight, bias, ctx.eps, ctx.centre, *ctx.dtypes)
    dweight, dbias = (found[-1], None) if bias is None else found[-2:]
    dy = None if not ctx.added else found[0] if ctx.dtypes[1] is None else found[1]
    return found[0], dy, dweight, dbias, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("the norm has no second derivative on a GPU")


_row_norm.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
