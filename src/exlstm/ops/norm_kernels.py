"""`head_norm` as Triton kernels: each tensor is moved once forward and once backward, and nothing is saved but the inputs.

x = (h - mean h) / sqrt(var h + eps)      p = w x + s c      y = p a(g)
e = dy a(g)      dg = dy p a'(g)      dw = Σ e x      ds = Σ e c      dc = e s
u = e w      dh = (u - mean u - x mean(u x)) / sqrt(var h + eps)

A program sums dw and ds over its rows, and the sums of all programs are added in a second step: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, room, rows_apart, sigmoid

# Features of a head up to which a row stays in registers.
LARGEST = 4096
# Numbers in a tile and warps a program, and programs that a backward is spread over.
FORWARD, BACKWARD, PROGRAMS = (4096, 4), (1024, 4), 4096


@triton.jit
def _normed(p_h, keep, eps, V: tl.constexpr):
    """Rows of a head with mean 0 and variance 1, and the factor that made them so."""
    b_h = tl.load(p_h, mask=keep, other=0.0).to(tl.float32)
    b_x = tl.where(keep, b_h - (tl.sum(b_h, 1) / V)[:, None], 0.0)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]
    return b_x * b_r, b_r


@triton.jit
def _activate(b_g, SILU: tl.constexpr):
    """a(g) and a'(g)."""
    b_s = sigmoid(b_g)
    if SILU:
        return b_g * b_s, b_s * (1 + b_g * (1 - b_s))
    return b_s, b_s * (1 - b_s)


@triton.jit(do_not_specialize=["rows"])
def head_norm_forward_kernel(
    h, weight, gate, skip, c, y, rows, eps, H, stride_hr, stride_hh, stride_gr, stride_cr,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SKIP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Programs (rows / BR · H,): BR rows of head i_h."""
    i_r, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_r, o_v = (i_r * BR + tl.arange(0, BR)).to(tl.int64)[:, None], tl.arange(0, BV)[None, :]
    keep_v, o_d = o_v < V, i_h * V + o_v
    keep = (o_r < rows) & keep_v
    b_p, _ = _normed(h + o_r * stride_hr + i_h * stride_hh + o_v, keep, eps, V)
    b_p *= tl.load(weight + o_d, mask=keep_v, other=0.0).to(tl.float32)
    if HAS_SKIP:
        b_c = tl.load(c + o_r * stride_cr + o_d, mask=keep, other=0.0).to(tl.float32)
        b_p += tl.load(skip + o_d, mask=keep_v, other=0.0).to(tl.float32) * b_c
    if HAS_GATE:
        b_a, _ = _activate(tl.load(gate + o_r * stride_gr + o_d, mask=keep, other=0.0).to(tl.float32), SILU)
        b_p *= b_a
    tl.store(y + o_r * H * V + o_d, b_p.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "steps"])
def head_norm_backward_kernel(
    dy, h, weight, gate, skip, c, dh, dgate, dc, dweight, dskip, rows, steps, eps, H,
    stride_dr, stride_hr, stride_hh, stride_gr, stride_cr,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SKIP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Programs (P · H,): `steps` tiles of BR rows of head i_h, and the sums over them in row i_p of dweight and dskip."""
    i_p, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_v = tl.arange(0, BV)[None, :]
    keep_v, o_d = o_v < V, i_h * V + o_v
    b_w = tl.load(weight + o_d, mask=keep_v, other=0.0).to(tl.float32)
    b_dw = tl.zeros((BR, BV), tl.float32)
    if HAS_SKIP:
        b_s = tl.load(skip + o_d, mask=keep_v, other=0.0).to(tl.float32)
        b_ds = tl.zeros((BR, BV), tl.float32)
    for i_r in range(i_p * steps, tl.minimum((i_p + 1) * steps, tl.cdiv(rows, BR))):
        o_r = (i_r * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
        keep, o_y = (o_r < rows) & keep_v, o_r * H * V + o_d
        b_e = tl.load(dy + o_r * stride_dr + o_d, mask=keep, other=0.0).to(tl.float32)
        b_x, b_r = _normed(h + o_r * stride_hr + i_h * stride_hh + o_v, keep, eps, V)
        b_p = b_w * b_x
        if HAS_SKIP:
            b_c = tl.load(c + o_r * stride_cr + o_d, mask=keep, other=0.0).to(tl.float32)
            b_p += b_s * b_c
        if HAS_GATE:
            b_a, b_da = _activate(tl.load(gate + o_r * stride_gr + o_d, mask=keep, other=0.0).to(tl.float32), SILU)
            tl.store(dgate + o_y, (b_e * b_p * b_da).to(dgate.dtype.element_ty), mask=keep)
            b_e *= b_a
        b_dw += b_e * b_x
        if HAS_SKIP:
            b_ds += b_e * b_c
            tl.store(dc + o_y, (b_e * b_s).to(dc.dtype.element_ty), mask=keep)
        b_u = b_e * b_w
        b_along = (tl.sum(b_u * b_x, 1) / V)[:, None]
        b_dh = b_r * (b_u - (tl.sum(b_u, 1) / V)[:, None] - b_x * b_along)
        tl.store(dh + o_y, b_dh.to(dh.dtype.element_ty), mask=keep)
    o_sum = i_p * H * V + o_d
    tl.store(dweight + o_sum, tl.sum(b_dw, 0, keep_dims=True), mask=keep_v)
    if HAS_SKIP:
        tl.store(dskip + o_sum, tl.sum(b_ds, 0, keep_dims=True), mask=keep_v)


def takes(h: Tensor, gate: Tensor | None, skip: tuple | None) -> bool:
    """Whether the kernels run on these arguments of `head_norm`."""
    moved = [h, *([] if gate is None else [gate]), *([] if skip is None else [skip[1]])]
    return h.shape[-1] <= LARGEST and h.numel() > 0 and all(x.dtype in DTYPES for x in moved)


def head_norm(h, weight, gate, skip, c, eps, activation):
    """`exlstm.ops.norm.head_norm` on a GPU."""
    # In decoding without gradients an operator of torch would cost more than the kernel.
    known = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (_head_norm if known else _forward)(h, weight, gate, skip, c, eps, activation)


def _forward(h, weight, gate, skip, c, eps, activation):
    shape, tensors, strides = _lay(h, weight, gate, skip, c)
    dtypes = (x.dtype for x in (gate, c) if x is not None)
    y = torch.empty(shape, dtype=_widest(h.dtype, *dtypes), device=h.device)
    rows, (heads, values) = tensors[0].shape[0], h.shape[-2:]
    cut = _cut(values, FORWARD)
    with backends.on(h.device):
        head_norm_forward_kernel[(triton.cdiv(rows, cut["BR"]) * heads,)](
            *tensors, y, rows, eps, heads, *strides, **cut, **_what(gate, skip, activation)
        )
    return y


@torch.library.custom_op("exlstm::head_norm", mutates_args=())
def _head_norm(
    h: Tensor, weight: Tensor, gate: Tensor | None, skip: Tensor | None, c: Tensor | None, eps: float, activation: str
) -> Tensor:
    return _forward(h, weight, gate, skip, c, eps, activation)


@torch.library.custom_op("exlstm::head_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, h: Tensor, weight: Tensor, gate: Tensor | None, skip: Tensor | None, c: Tensor | None, eps: float, activation: str
) -> list[Tensor]:  # fmt: skip
    """Gradients of h, weight, gate, skip and c, empty ones for what is None."""
    _, tensors, strides = _lay(h, weight, gate, skip, c)
    dh, dweight, dgate, dskip, dc = room(h, weight, gate, skip, c)
    dy = _rows(dy, 1)
    rows, (heads, values) = dy.shape[0], h.shape[-2:]
    cut = _cut(values, BACKWARD)
    tiles = triton.cdiv(rows, cut["BR"])
    steps = triton.cdiv(tiles, max(1, PROGRAMS // heads))
    programs = triton.cdiv(tiles, steps)
    sums = torch.empty(1 if skip is None else 2, programs, heads * values, dtype=torch.float32, device=h.device)
    with backends.on(h.device):
        head_norm_backward_kernel[(programs * heads,)](
            dy, *tensors, dh, dgate, dc, sums[0], sums[-1], rows, steps, eps, heads, dy.stride(0), *strides,
            **cut, **_what(gate, skip, activation),
        )  # fmt: skip
    for gradient, total in zip((dweight, dskip), sums.sum(1), strict=False):
        gradient.copy_(total)
    return [dh, dweight, dgate, dskip, dc]


def _lay(h, weight, gate, skip, c):
    """Shape of y; the tensors as rows, with weight in the place of what is None; the strides the kernels ask for."""
    shape = (*h.shape[:-2], h.shape[-2] * h.shape[-1])
    h, gate, c = _rows(h, 2), *(weight if x is None else _rows(x, 1) for x in (gate, c))
    tensors = (h, weight.contiguous(), gate, weight if skip is None else skip.contiguous(), c)
    return shape, tensors, (h.stride(0), h.stride(1), gate.stride(0), c.stride(0))


def _rows(x, axes):
    """x (..., the last `axes` axes) with one axis in front, a view where its strides allow it, the last axis contiguous."""
    return rows_apart(x.reshape(-1, *x.shape[-axes:]))


def _cut(values, tile):
    width = triton.next_power_of_2(values)
    return {"V": values, "BR": max(1, tile[0] // width), "BV": width, "num_warps": tile[1]}


def _what(gate, skip, activation):
    return {"HAS_GATE": gate is not None, "HAS_SKIP": skip is not None, "SILU": activation == "silu"}


def _widest(dtype, *others):
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


@_head_norm.register_fake
def _(h, weight, gate, skip, c, eps, activation):
    dtypes = (x.dtype for x in (gate, c) if x is not None)
    return h.new_empty((*h.shape[:-2], h.shape[-2] * h.shape[-1]), dtype=_widest(h.dtype, *dtypes))


@_backward.register_fake
def _(dy, h, weight, gate, skip, c, eps, activation):
    return room(h, weight, gate, skip, c)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    tensors = ctx.saved_tensors
    found = _backward(dy, *tensors, ctx.eps, ctx.activation)
    return *(None if x is None else g for x, g in zip(tensors, found, strict=True)), None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("head_norm has no second derivative on a GPU")


_head_norm.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
