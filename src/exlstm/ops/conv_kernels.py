"""`causal_conv` with its SiLU as Triton kernels for two to four columns: each tensor is moved once, forward and backward.

z_t = bias + Σ_j w_j x_{t-j}      y = a(z)      e = dy a'(z)      dx_t = Σ_j w_j e_{t+j}      dw_j = Σ_t e_t x_{t-j}

w_j is column W-1-j. The term j falls away where one of the tokens t-j+1 ... t starts a document. z is computed again
backward, by programs that walk back through a segment of time with the last x and e in registers; each of them sums dw over
its segments, and the sums are added in a second step: same inputs, same bits.
"""

# Triton's tuples grow by + alone.
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, room, rows_apart, sigmoid

# Columns that the kernels take; more of them would leave the registers.
COLUMNS = (2, 3, 4)
# Tokens that the backward loads before it works on them.
AHEAD = tl.constexpr(4)
# Tokens, channels and warps of a program forward.
FORWARD = (32, 128, 4)
# Tokens of a segment, segments, channels and warps of a program backward.
BACKWARD = (128, 4, 128, 4)


@triton.jit(do_not_specialize=["T"])
def causal_conv_forward_kernel(
    x, weight, bias, state, first, y, T, D, stride_xb, stride_xt,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FIRST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Programs (B · T / BT · D / BD,), the last fastest: BT tokens of BD channels."""
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, BT)
    i_d, i_t = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles
    i_b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    keep_t, keep_d = o_t < T, (o_d < D)[None, :]
    b_z = tl.zeros((BT, BD), tl.float32)
    if HAS_BIAS:
        b_z += tl.load(bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        o_s = o_t - j
        if HAS_FIRST and j > 0:
            keep_t = keep_t & (tl.load(first + i_b * T + o_s + 1, mask=keep_t & (o_s >= -1), other=0) == 0)
        o_x = i_b * stride_xb + o_s.to(tl.int64)[:, None] * stride_xt + o_d[None, :]
        b_x = tl.load(x + o_x, mask=(keep_t & (o_s >= 0))[:, None] & keep_d, other=0.0).to(tl.float32)
        if HAS_STATE and j > 0:
            o_h = (i_b * (W - 1) + o_s[:, None] + W - 1) * D + o_d[None, :]
            b_x += tl.load(state + o_h, mask=(keep_t & (o_s < 0))[:, None] & keep_d, other=0.0).to(tl.float32)
        b_z += tl.load(weight + o_d * W + W - 1 - j, mask=o_d < D, other=0.0).to(tl.float32)[None, :] * b_x
    if SILU:
        b_z *= sigmoid(b_z)
    o_y = (i_b * T + o_t[:, None]) * D + o_d[None, :]
    tl.store(y + o_y, b_z.to(y.dtype.element_ty), mask=(o_t < T)[:, None] & keep_d)


@triton.jit
def _load(
    p_x,
    p_state,
    p_first,
    o_t,
    T,
    D,
    stride,
    live,
    keep_d,
    W: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """x (BS, BD) at the times o_t (BS, 1), from the state where they are negative, and whether no document starts there."""
    inside = live & (o_t >= 0) & (o_t < T)
    b_x = tl.load(p_x + o_t.to(tl.int64) * stride, mask=inside & keep_d, other=0.0)
    if HAS_STATE:
        b_x += tl.load(p_state + (o_t + W - 1) * D, mask=live & (o_t < 0) & (o_t > -W) & keep_d, other=0.0)
    b_on = inside
    if HAS_FIRST:
        b_on = tl.load(p_first + o_t, mask=inside, other=0) == 0
    return b_x, b_on


@triton.jit
def _slope(b_dy, b_0, w, x, on, W: tl.constexpr, HAS_FIRST: tl.constexpr, SILU: tl.constexpr):
    """e of a token from its dy, and the x_{t-j} that it saw: 0 where a document starts between."""
    seen, b_on = (x[0].to(tl.float32),), on[0]
    for j in tl.static_range(1, W):
        b_x = x[j].to(tl.float32)
        if HAS_FIRST:
            b_x = tl.where(b_on, b_x, 0.0)
            b_on = b_on & on[j]
        seen = seen + (b_x,)
    b_e = b_dy.to(tl.float32)
    if SILU:
        b_z = b_0 + w[0] * seen[0]
        for j in tl.static_range(1, W):
            b_z += w[j] * seen[j]
        b_s = sigmoid(b_z)
        b_e *= b_s * (1 + b_z * (1 - b_s))
    return b_e, seen


@triton.jit
def _push(b_e, e, b_on, W: tl.constexpr, HAS_FIRST: tl.constexpr):
    """e of the W-1 tokens in front of the next one back, 0 where it is in another document."""
    moved = ()
    for j in tl.static_range(W - 1):
        b_moved = e[j - 1] if j > 0 else b_e
        moved = moved + (tl.where(b_on, b_moved, 0.0) if HAS_FIRST else b_moved,)
    return moved


@triton.jit
def _mix(w, e, j: tl.constexpr, W: tl.constexpr):
    """w_j e_0 + w_{j+1} e_1 + ... + w_{W-1} e_{W-1-j}."""
    b_dx = w[j] * e[0]
    for i in tl.static_range(j + 1, W):
        b_dx += w[i] * e[i - j]
    return b_dx


@triton.jit
def _sum(acc, b_e, seen, W: tl.constexpr):
    """The sums of dw_0 ... dw_{W-1} and dbias with one more token."""
    grown = ()
    for j in tl.static_range(W):
        grown = grown + (acc[j] + b_e * seen[j],)
    return grown + (acc[W] + b_e,)


@triton.jit(do_not_specialize=["T", "rows", "segments", "length"])
def causal_conv_backward_kernel(
    dy, x, weight, bias, state, first, dx, dstate, sums, T, D, rows, segments, length,
    stride_db, stride_dt, stride_xb, stride_xt,
    W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FIRST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Programs (rows / BS · D / BD,), the last fastest: BS of the B · segments = rows segments, `length` tokens each."""
    blocks = tl.cdiv(D, BD)
    i_s, i_d = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_s, o_d = (i_s * BS + tl.arange(0, BS))[:, None], (i_d * BD + tl.arange(0, BD))[None, :]
    i_b, o_begin, live, keep_d = (o_s // segments).to(tl.int64), o_s % segments * length, o_s < rows, o_d < D
    p_x, p_state, p_first = x + i_b * stride_xb + o_d, state + i_b * (W - 1) * D + o_d, first + i_b * T
    p_dy, p_dx = dy + i_b * stride_db + o_d, dx + i_b * T * D + o_d
    b_0 = tl.load(bias + o_d, mask=keep_d & HAS_BIAS, other=0.0).to(tl.float32)
    w, xs, on, e, acc = (), (), (), (), (tl.zeros((BS, BD), tl.float32),)
    o_t = o_begin + length + W - 2
    for j in tl.static_range(W):
        w = w + (tl.load(weight + o_d * W + W - 1 - j, mask=keep_d, other=0.0).to(tl.float32),)
        acc = acc + (tl.zeros((BS, BD), tl.float32),)
    for j in tl.static_range(2 * W - 2):
        b_x, b_on = _load(p_x, p_state, p_first, o_t - j, T, D, stride_xt, live, keep_d, W, HAS_STATE, HAS_FIRST)
        xs, on = xs + (b_x,), on + (b_on,)
    # The tokens behind the segment, whose e reaches into it: their own dx and sums are the next segment's.
    e = acc[: W - 1]
    for j in tl.static_range(W - 1):
        b_dy = tl.load(p_dy + (o_t - j).to(tl.int64) * stride_dt, mask=live & (o_t - j < T) & keep_d, other=0.0)
        b_e, _ = _slope(b_dy, b_0, w, xs[j:], on[j:], W, HAS_FIRST, SILU)
        e = _push(b_e, e, on[j], W, HAS_FIRST)
    xs, on, o_t = xs[W - 1 :], on[W - 1 :], o_t - (W - 1)
    for _ in range(0, length, AHEAD):
        dys = ()
        for j in tl.static_range(AHEAD):
            o_x = o_t - j - W + 1
            b_x, b_on = _load(p_x, p_state, p_first, o_x, T, D, stride_xt, live, keep_d, W, HAS_STATE, HAS_FIRST)
            b_dy = tl.load(p_dy + (o_t - j).to(tl.int64) * stride_dt, mask=live & (o_t - j < T) & keep_d, other=0.0)
            xs, on, dys = xs + (b_x,), on + (b_on,), dys + (b_dy,)
        for j in tl.static_range(AHEAD):
            b_e, seen = _slope(dys[j], b_0, w, xs[j:], on[j:], W, HAS_FIRST, SILU)
            b_dx = _mix(w, (b_e,) + e, 0, W)
            tl.store(
                p_dx + (o_t - j).to(tl.int64) * D, b_dx.to(dx.dtype.element_ty), mask=live & (o_t - j < T) & keep_d
            )
            e, acc = _push(b_e, e, on[j], W, HAS_FIRST), _sum(acc, b_e, seen, W)
        xs, on, o_t = xs[AHEAD:], on[AHEAD:], o_t - AHEAD
    for j in tl.static_range(W + 1):
        tl.store(sums + (i_s.to(tl.int64) * (W + 1) + j) * D + o_d, tl.sum(acc[j], 0, keep_dims=True), mask=keep_d)
    if HAS_STATE:
        for j in tl.static_range(1, W):
            p_state = dstate + (i_b * (W - 1) + W - 1 - j) * D + o_d
            tl.store(p_state, _mix(w, e, j, W).to(dx.dtype.element_ty), mask=live & keep_d & (o_begin == 0))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels run on these arguments of `causal_conv`."""
    return x.dtype in DTYPES and weight.dtype != torch.float64 and weight.shape[1] in COLUMNS


def causal_conv(x, weight, bias, state, first, silu):
    """y (B, T, D) of x (B, T, D), state (B, W-1, D) or None; a document starts where `first` (B, T), bool or None."""
    # In decoding without gradients an operator of torch would cost more than the kernel.
    known = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (_causal_conv if known else _forward)(x, weight, bias, state, first, silu)


def _forward(x, weight, bias, state, first, silu):
    (batch, time, width), columns = x.shape, weight.shape[1]
    x, *others = _lay(x, weight, bias, state, first)
    y = torch.empty((batch, time, width), dtype=x.dtype, device=x.device)
    tokens, channels, warps = FORWARD
    grid = batch * triton.cdiv(time, tokens) * triton.cdiv(width, channels)
    with backends.on(x.device):
        causal_conv_forward_kernel[(grid,)](
            x, *others, y, time, width, x.stride(0), x.stride(1), W=columns, BT=tokens, BD=channels,
            **_what(bias, state, first, silu), num_warps=warps,
        )  # fmt: skip
    return y


@torch.library.custom_op("exlstm::causal_conv", mutates_args=())
def _causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, first: Tensor | None, silu: bool
) -> Tensor:
    return _forward(x, weight, bias, state, first, silu)


@torch.library.custom_op("exlstm::causal_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, first: Tensor | None, silu: bool
) -> list[Tensor]:
    """Gradients of x, weight, bias and state, empty ones for what is None."""
    (batch, time, width), columns = x.shape, weight.shape[1]
    dx, dweight, dbias, dstate = room(x, weight, bias, state)
    x, *others = _lay(x, weight, bias, state, first)
    dy = rows_apart(dy)
    longest, count, channels, warps = BACKWARD
    segments = triton.cdiv(time, longest)
    # Segments of one length, in whole steps of the kernel's loop.
    length = triton.cdiv(triton.cdiv(time, segments), AHEAD.value) * AHEAD.value
    rows = batch * segments
    programs = triton.cdiv(rows, count)
    sums = torch.empty(programs, columns + 1, width, dtype=torch.float32, device=x.device)
    with backends.on(x.device):
        causal_conv_backward_kernel[(programs * triton.cdiv(width, channels),)](
            dy, x, *others, dx, dstate, sums, time, width, rows, segments, length,
            dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), W=columns, BS=count, BD=channels,
            **_what(bias, state, first, silu), num_warps=warps,
        )  # fmt: skip
    sums = sums.sum(0)  # (W+1, D)
    dweight.copy_(sums[:columns].flip(0).t())
    if bias is not None:
        dbias.copy_(sums[columns])
    return [dx, dweight, dbias, dstate]


def _lay(x, weight, bias, state, first):
    """The tensors as the kernels want them, with others in the place of what is None."""
    weight, x = weight.contiguous(), rows_apart(x)
    bias = weight if bias is None else bias.contiguous()
    state = x if state is None else state.contiguous()
    return x, weight, bias, state, weight if first is None else first.contiguous().view(torch.uint8)


def _what(bias, state, first, silu):
    return {"HAS_BIAS": bias is not None, "HAS_STATE": state is not None, "HAS_FIRST": first is not None, "SILU": silu}


@_causal_conv.register_fake
def _(x, weight, bias, state, first, silu):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, weight, bias, state, first, silu):
    return room(x, weight, bias, state)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    tensors = ctx.saved_tensors
    found = _backward(dy, *tensors, ctx.silu)
    return *(None if x is None else g for x, g in zip(tensors[:4], found, strict=True)), None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("causal_conv has no second derivative on a GPU")


_causal_conv.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
