"""The sLSTM's loop over time on a GPU, forward and backward: one launch for all steps, recurrent weights kept on chip.

A program owns some units of a head, with all four gates, for a few rows. A head of few units is one program, and its h stays in
registers; a wider head is spread over several, which exchange h, and in the backward their shares of dh, through memory. There
every number is a word that carries its own flag in the last bit of its mantissa, so that one trip does it:

    step t writes words[t % 2] and flags them by ⌊t / 2⌋ even or odd; who wants them reads until every flag is right

Nobody writes a word before everybody has read the one it replaces: step t follows on the words of step t - 1, which are
written after those of step t - 2 were read. Programs of a head follow on each other, so that all of them run at once.
The arithmetic is that of cpu.py: q = c/n, w = i'/n, and a backward whose factors are at most 1. Kept of a step are w or 1 - w,
sigmoid(-f̃), tanh(z̃) and sigmoid(õ), as four bfloat16 in a word where the inputs have 16 bits, and q.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from exlstm.ops import backend as backends
from exlstm.ops.kernels import rows_apart

# Rows a program works on: what a product of the tensor cores has at least.
ROWS = tl.constexpr(16)
DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Where the assembler of an NVIDIA card reads what is written here.
PTX = tl.constexpr(not backends.INTERPRETED and torch.version.hip is None)
NAN = tl.constexpr(tl.PropagateNan.ALL)
# How float32 is multiplied on tensor cores: as six products of bfloat16, which leave out less than it rounds.
EXACT = "bf16x6"
RUNTIME = ("B", "T", "start", "end", "first")


class Cut(NamedTuple):
    """How a head is cut: units a program, programs a head, and whether these exchange h (one may be too wide to hold it)."""

    units: int
    parts: int
    exchange: bool
    slice: int
    """recurrent weights multiplied at once: all of them stay on chip where it is the width of the head"""
    warps: int
    stages: int


def choose(width: int, dtype: torch.dtype, backward: bool, room: int) -> Cut:
    """The cut of heads of `width` units, a program having `room` bytes of shared memory; chosen on one H200 (docs/log.md)."""
    whole, wide = max(16, triton.next_power_of_2(width)), dtype == torch.float32
    # float32 is split into three parts on its way to the products.
    if width <= (64 if not wide or room >= 160 << 10 else 32):
        return Cut(whole, 1, False, whole, 4, 3)
    units = 16 if backward or width > 512 else 32
    # Weights of four gates in 16 bits, and what else a program keeps.
    fits = not wide and 8 * whole * units <= room - (48 << 10)
    slice = whole if fits else min(64, whole // 2)
    return Cut(units, triton.cdiv(width, units), True, slice, 8 if backward and width > 128 else 4, 3)


@triton.jit
def _place(first, B, H, D: tl.constexpr, P: tl.constexpr, BU: tl.constexpr):
    """Of program (row tiles from `first`, H, P): part, head, units, rows, which of these exist, and where the head's units stand.

    The last is an offset (ROWS, 1) into (B, H, D).
    """
    i_p, i_hb = tl.program_id(0) % P, tl.program_id(0) // P
    i_h, i_b = (i_hb % H).to(tl.int64), (i_hb // H + first).to(tl.int64)
    o_u, o_b = i_p * BU + tl.arange(0, BU), i_b * ROWS + tl.arange(0, ROWS)
    return i_p, i_h, o_u, o_b, o_b < B, o_u < D, (o_b[:, None] * H + i_h) * D


@triton.jit
def _flagged(b_x, t):
    """Words of float32 numbers that step t writes."""
    return (b_x.to(tl.int32, bitcast=True) & -2) | (1 - ((t >> 1) & 1))


@triton.jit
def _arrived(p_w, keep, t):
    """The float32 numbers of the words that step t writes, once all have arrived; 0 outside `keep`."""
    flag = 1 - ((t >> 1) & 1)
    b_w = tl.load(p_w, mask=keep, other=flag, volatile=True)
    while tl.max(tl.ravel((b_w ^ flag) & 1), 0) != 0:
        b_w = tl.load(p_w, mask=keep, other=flag, volatile=True)
    return (b_w & -2).to(tl.float32, bitcast=True)


@triton.jit
def _output_before(p_h, p_w, o_d, rows, fresh, t, D: tl.constexpr, HAS_RESET: tl.constexpr):
    """h_{t-1} of units o_d as step t sees it, in float32."""
    keep = rows[:, None] & (o_d < D)[None, :]
    if t == 0:
        b_h = tl.load(p_h + o_d[None, :], mask=keep, other=0.0)
    else:
        b_h = _arrived(p_w + o_d[None, :], keep, t - 1)
    if HAS_RESET:
        b_h = tl.where(fresh[:, None], 0.0, b_h)
    return b_h


@triton.jit
def _three(p_a, p_b, p_c, keep):
    """Tiles at three pointers; 0 outside `keep`."""
    b_a, b_b = tl.load(p_a, mask=keep, other=0.0), tl.load(p_b, mask=keep, other=0.0)
    return b_a, b_b, tl.load(p_c, mask=keep, other=0.0)


@triton.jit
def _memory(p_h, p_c, p_n, p_m, keep):
    """h, c, n, m and q = c/n before the first step; an empty memory has m = -inf and q = 0."""
    b_c, b_n, b_m = _three(p_c, p_n, p_m, keep)
    b_h = tl.load(p_h, mask=keep, other=0.0)
    empty = b_n == 0
    b_q = tl.where(empty, 0.0, b_c / tl.where(empty, 1.0, b_n))
    return b_h, b_c, b_n, tl.where(empty, float("-inf"), b_m), b_q


@triton.jit
def _remember(p_h, p_c, p_n, p_m, b_h, b_c, b_n, b_m, keep):
    """Writes the memory after the last step."""
    tl.store(p_h, b_h, mask=keep)
    tl.store(p_c, b_c, mask=keep)
    tl.store(p_n, b_n, mask=keep)
    tl.store(p_m, tl.where(b_n == 0, 0.0, b_m), mask=keep)


@triton.jit
def _flag(p, o_b, stride, t, rows):
    """Whether step t of the rows is flagged (ROWS,)."""
    return tl.load(p + o_b * stride + t, mask=rows, other=0) != 0


@triton.jit
def _four(p_x, stride, keep, dtype: tl.constexpr):
    """The tiles of the gates i, f, z, o, `stride` apart, in `dtype`; 0 outside `keep`."""
    b_i = tl.load(p_x, mask=keep, other=0.0).to(dtype)
    b_f = tl.load(p_x + stride, mask=keep, other=0.0).to(dtype)
    b_z = tl.load(p_x + 2 * stride, mask=keep, other=0.0).to(dtype)
    return b_i, b_f, b_z, tl.load(p_x + 3 * stride, mask=keep, other=0.0).to(dtype)


@triton.jit
def _bits(b_x):
    """The 16 bits of a bfloat16, in 64."""
    return b_x.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint64)


@triton.jit
def _number(b_x):
    """The bfloat16 in the last 16 bits of a word, in float32."""
    return (b_x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(b_x):
    """1 / x for x > 0, in two instructions."""
    b_root = tl.rsqrt(b_x)
    return b_root * b_root


@triton.jit
def _exp(b_x, WIDE: tl.constexpr):
    """exp(x), 0 where it would be subnormal: what Triton's does about those takes three instructions more.

    WIDE: as exact far from 0, where the product with log2(e) is rounded to fewer digits behind the point.
    """
    if PTX:
        b_e = b_x * 1.4426950408889634
        b_y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_e], tl.float32, is_pure=True, pack=1)
        if WIDE:
            b_rest = tl.fma(b_x, 1.4426950408889634, -b_e) + b_x * 1.9259629911e-8
            # At -inf the rest is no number.
            b_y = tl.where(b_y > 0, tl.fma(b_y, b_rest * 0.6931471805599453, b_y), b_y)
    else:
        b_y = tl.exp(b_x)
    return b_y


@triton.jit
def _log1p(b_x):
    """log(1 + x) for x in [0, 1], within 2.3e-7 of it; the library's takes twice as long, and loses small x."""
    b_y = tl.fma(b_x, 0.005232624243944883, -0.029504956677556038)
    b_y = tl.fma(b_x, b_y, 0.07822549343109131)
    b_y = tl.fma(b_x, b_y, -0.1366320699453354)
    b_y = tl.fma(b_x, b_y, 0.1910598874092102)
    b_y = tl.fma(b_x, b_y, -0.2484297752380371)
    b_y = tl.fma(b_x, b_y, 0.3331909477710724)
    b_y = tl.fma(b_x, b_y, -0.4999949336051941)
    return b_x * tl.fma(b_x, b_y, 0.9999999403953552)


@triton.jit
def _gates(b_g, b_c, b_n, b_m, SAVE: tl.constexpr, WIDE: tl.constexpr):
    """h, c, n, m after a step, and if SAVE q and (w, sigmoid(-f̃), tanh(z̃), sigmoid(õ)).

    Five special functions: all divisions together are one.
    """
    b_i, b_f, b_z, b_o = b_g
    b_ef = _exp(-tl.abs(b_f), WIDE)
    b_a = tl.minimum(b_f, 0.0) + b_m - _log1p(b_ef)
    b_m = tl.maximum(b_a, b_i)
    # One of the two factors is 1: m is the larger exponent. An empty memory has m = -inf, and forgets everything.
    b_far = _exp(-tl.abs(b_a - b_i), WIDE)
    b_forget, b_input = tl.where(b_a > b_i, 1.0, b_far), tl.where(b_a > b_i, b_far, 1.0)
    b_old = b_forget * b_n
    b_n = b_old + b_input
    # tanh is -1 before -9.1, a gate as good as closed at -50, and so the product of all divisors stays a number.
    b_ez = _exp(-2.0 * tl.maximum(b_z, -9.1, propagate_nan=NAN), WIDE)
    b_1o = 1.0 + _exp(-tl.maximum(b_o, -50.0, propagate_nan=NAN), WIDE)
    b_1z = 1.0 + b_ez
    b_no = b_n * b_1o
    if SAVE:
        b_1f = 1.0 + b_ef
        b_zf = b_1z * b_1f
        b_all = _inverse(b_no * b_zf)
        b_by_no, b_by_zf = b_all * b_zf, b_all * b_no
        b_by_z = b_by_zf * b_1f
    else:
        b_all = _inverse(b_no * b_1z)
        b_by_no, b_by_z = b_all * b_1z, b_all * b_no
    b_tanh = (1.0 - b_ez) * b_by_z
    b_c = b_forget * b_c + b_input * b_tanh
    b_h = b_c * b_by_no
    b_w, b_open, b_out, b_q = b_h, b_h, b_h, b_h
    if SAVE:
        b_by_n = b_by_no * b_1o
        b_out, b_q = b_by_no * b_n, b_c * b_by_n
        # The smaller one of w and 1 - w, the latter with a minus: both keep their digits.
        b_w = tl.where(b_input > b_old, tl.minimum(-b_old * b_by_n, -1e-37), b_input * b_by_n)
        b_open = b_by_zf * b_1z
        b_open = tl.where(b_f > 0, b_open * b_ef, b_open)
    return b_h, b_c, b_n, b_m, b_q, (b_w, b_open, b_tanh, b_out)


@triton.jit
def _store_four(p_x, b_g, stride, keep):
    """Writes the tiles of the gates, `stride` apart."""
    tl.store(p_x, b_g[0], mask=keep)
    tl.store(p_x + stride, b_g[1], mask=keep)
    tl.store(p_x + 2 * stride, b_g[2], mask=keep)
    tl.store(p_x + 3 * stride, b_g[3], mask=keep)


@triton.jit
def _cast(b_g, dtype: tl.constexpr):
    """The tiles of the gates in `dtype`."""
    return b_g[0].to(dtype), b_g[1].to(dtype), b_g[2].to(dtype), b_g[3].to(dtype)


@triton.jit
def _chosen(which, yes, no):
    """Four tiles out of `yes` where `which`, else out of `no`."""
    b_a, b_b = tl.where(which, yes[0], no[0]), tl.where(which, yes[1], no[1])
    return b_a, b_b, tl.where(which, yes[2], no[2]), tl.where(which, yes[3], no[3])


@triton.jit
def _emptied(fresh, b_h, b_c, b_n, b_m, b_q):
    """The memory, empty where `fresh`."""
    b_h, b_c, b_n, b_q = _chosen(fresh, (0.0, 0.0, 0.0, 0.0), (b_h, b_c, b_n, b_q))
    return b_h, b_c, b_n, tl.where(fresh, float("-inf"), b_m), b_q


@triton.jit
def _mixed(b_h, b_r, b_g, PRECISION: tl.constexpr):
    """The gates with R h added."""
    b_i = tl.dot(b_h, b_r[0], b_g[0], input_precision=PRECISION)
    b_f = tl.dot(b_h, b_r[1], b_g[1], input_precision=PRECISION)
    b_z = tl.dot(b_h, b_r[2], b_g[2], input_precision=PRECISION)
    return b_i, b_f, b_z, tl.dot(b_h, b_r[3], b_g[3], input_precision=PRECISION)


@triton.jit
def _added(b_g, b_m, fresh, HAS_RESET: tl.constexpr):
    """The gates with R h, which is nothing behind a reset.

    A head of one program makes it at the end of a step for the next, a third faster than at the beginning of a step.
    """
    if HAS_RESET:
        b_m = _chosen(fresh[:, None], (0.0, 0.0, 0.0, 0.0), b_m)
    return b_g[0] + b_m[0], b_g[1] + b_m[1], b_g[2] + b_m[2], b_g[3] + b_m[3]


@triton.jit
def _mixed_in_slices(b_g, p_r, p_h, p_w, rows, us, fresh, t, D: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
                     PRECISION: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """`_mixed` where R does not fit the chip: h and R are read BK units at a time."""
    b_i, b_f, b_z, b_o = b_g
    for k in tl.range(0, D, BK, num_stages=1):
        o_k = k + tl.arange(0, BK)
        b_h = _output_before(p_h, p_w, o_k, rows, fresh, t, D, HAS_RESET).to(DOT)
        b_r = _four(p_r + o_k[:, None], D * D, (o_k < D)[:, None] & us[None, :], DOT)
        b_i, b_f, b_z, b_o = _mixed(b_h, b_r, (b_i, b_f, b_z, b_o), PRECISION)
    return b_i, b_f, b_z, b_o


@triton.jit
def _keep_step(p_q, p_g, plane, b_q, kept, keep):
    """Writes what the backward wants of a step: q, and of the gates one word a unit, or four planes of float32."""
    tl.store(p_q, b_q.to(p_q.dtype.element_ty), mask=keep)
    if p_g.dtype.element_ty == tl.int64:
        b_word = _bits(kept[0]) | (_bits(kept[1]) << 16) | (_bits(kept[2]) << 32) | (_bits(kept[3]) << 48)
        tl.store(p_g, b_word.to(tl.int64, bitcast=True), mask=keep)
    else:
        _store_four(p_g, kept, plane, keep)


@triton.jit
def _kept(p_dhs, p_q, p_g, plane, keep):
    """The gradient of a step's h, q before the step, and what `_keep_step` wrote of it."""
    if p_g.dtype.element_ty == tl.int64:
        b_word = tl.load(p_g, mask=keep, other=0).to(tl.uint64, bitcast=True)
        b_w, b_open = _number(b_word & 0xFFFF), _number((b_word >> 16) & 0xFFFF)
        b_tanh, b_out = _number((b_word >> 32) & 0xFFFF), _number(b_word >> 48)
    else:
        b_w, b_open, b_tanh, b_out = _four(p_g, plane, keep, tl.float32)
    b_e, b_q = tl.load(p_dhs, mask=keep, other=0.0), tl.load(p_q, mask=keep, other=0.0)
    return b_e.to(tl.float32), b_q.to(tl.float32), (b_w, b_open, b_tanh, b_out)


@triton.jit
def _past_padding(alive, b_g, b_dq, b_dp, b_dq_before, b_dp_before):
    """No gradient of the gates where a token is padding, and dq and dp as they were."""
    b_g = _chosen(alive, b_g, (0.0, 0.0, 0.0, 0.0))
    return b_g, tl.where(alive, b_dq, b_dq_before), tl.where(alive, b_dp, b_dp_before)


@triton.jit
def _leave(p_dh, p_dq, p_dp, b_dh, b_dq, b_dp, keep, EXCHANGE: tl.constexpr):
    """Writes the gradients before the last step; of dh the words hold the shares where there are any."""
    tl.store(p_dq, b_dq, mask=keep)
    tl.store(p_dp, b_dp, mask=keep)
    if not EXCHANGE:
        tl.store(p_dh, b_dh, mask=keep)


@triton.jit(do_not_specialize=RUNTIME)
def slstm_forward_kernel(
    x, r, h, c, n, m, reset, mask, hs, h_out, c_out, n_out, m_out, gates, qs, words,
    B, T, start, end, first, H, stride_xb, stride_xt, stride_xh, stride_xg, stride_rb, stride_mb,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXCHANGE: tl.constexpr, SAVE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (row tiles·H·P,): steps start to end of T for some units of head i_h; h, c, n, m stand before step start.

    qs (B, T + 1, H, D): the q of step t stands one row behind, the first q before them all.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    _, i_h, o_u, o_b, rows, us, o_row = _place(first, B, H, D, P, BU)
    o_d, keep, all_units = tl.arange(0, BD), rows[:, None] & us[None, :], B.to(tl.int64) * H * D
    o_s, o_t = o_row + o_u[None, :], (o_b[:, None] * T + start) * H * D + i_h * D + o_u[None, :]
    p_r = r + i_h * 4 * D * D + o_u[None, :] * D
    if BK == BD:
        b_r = _four(p_r + o_d[:, None], D * D, (o_d < D)[:, None] & us[None, :], DOT)
    b_h, b_c, b_n, b_m, b_q = _memory(h + o_s, c + o_s, n + o_s, m + o_s, keep)
    p_q = qs + o_t + o_b[:, None] * H * D
    if SAVE and start == 0:
        tl.store(p_q, b_q.to(qs.dtype.element_ty), mask=keep)
    p_x = x + o_b[:, None] * stride_xb + start * stride_xt.to(tl.int64) + i_h * stride_xh + o_u[None, :]
    fresh, b_0 = tl.zeros([ROWS], tl.int1), tl.zeros([ROWS, BU], tl.float32)
    if not EXCHANGE:
        b_i, b_f, b_z, b_o = _mixed(b_h.to(dtype).to(DOT), b_r, (b_0, b_0, b_0, b_0), PRECISION)
    for t in tl.range(start, end, num_stages=STAGES):
        b_g = _four(p_x, stride_xg, keep, tl.float32)
        if HAS_RESET:
            fresh = _flag(reset, o_b, stride_rb, t, rows)
            b_h, b_c, b_n, b_m, b_q = _emptied(fresh[:, None], b_h, b_c, b_n, b_m, b_q)
        p_h, p_w = h + o_row, words + ((t - 1) & 1) * all_units + o_row
        if not EXCHANGE:
            b_g = _added(b_g, (b_i, b_f, b_z, b_o), fresh, HAS_RESET)
        elif BK == BD:
            b_a = _output_before(p_h, p_w, o_d, rows, fresh, t, D, HAS_RESET).to(dtype).to(DOT)
            b_g = _mixed(b_a, b_r, b_g, PRECISION)
        else:
            b_g = _mixed_in_slices(b_g, p_r, p_h, p_w, rows, us, fresh, t, D, BK, DOT, PRECISION, HAS_RESET)
        b_y, b_cy, b_ny, b_my, b_qy, kept = _gates(b_g, b_c, b_n, b_m, SAVE, dtype == tl.float32)
        if HAS_MASK:
            alive = _flag(mask, o_b, stride_mb, t, rows)[:, None]
            b_y, b_cy, b_ny, b_my = _chosen(alive, (b_y, b_cy, b_ny, b_my), (b_h, b_c, b_n, b_m))
            b_qy = tl.where(alive, b_qy, b_q)
        b_h, b_c, b_n, b_m, b_q = b_y, b_cy, b_ny, b_my, b_qy
        if EXCHANGE:
            tl.store(words + (t & 1) * all_units + o_s, _flagged(b_h, t), mask=keep)
        else:
            b_i, b_f, b_z, b_o = _mixed(b_h.to(dtype).to(DOT), b_r, (b_0, b_0, b_0, b_0), PRECISION)
        tl.store(hs + o_t, b_h.to(dtype), mask=keep)
        if SAVE:
            _keep_step(p_q + H * D, gates + o_t, all_units * T, b_q, kept, keep)
        p_x, p_q, o_t = p_x + stride_xt, p_q + H * D, o_t + H * D
    _remember(h_out + o_s, c_out + o_s, n_out + o_s, m_out + o_s, b_h, b_c, b_n, b_m, keep)


@triton.jit
def _shared(b_g, b_r, fresh, PRECISION: tl.constexpr, HAS_RESET: tl.constexpr):
    """What gate gradients of some units give to dh before them: Rᵀ dg̃, nothing behind a reset."""
    b_dh = tl.dot(b_g[0], b_r[0], input_precision=PRECISION)
    b_dh = tl.dot(b_g[1], b_r[1], b_dh, input_precision=PRECISION)
    b_dh = tl.dot(b_g[2], b_r[2], b_dh, input_precision=PRECISION)
    b_dh = tl.dot(b_g[3], b_r[3], b_dh, input_precision=PRECISION)
    if HAS_RESET:
        b_dh = tl.where(fresh[:, None], 0.0, b_dh)
    return b_dh


@triton.jit
def _share(b_g, b_r, p_w, o_d, rows, fresh, s, D: tl.constexpr, PRECISION: tl.constexpr, HAS_RESET: tl.constexpr):
    """Writes `_shared` for units o_d as words."""
    b_dh = _shared(b_g, b_r, fresh, PRECISION, HAS_RESET)
    tl.store(p_w + o_d[None, :], _flagged(b_dh, s), mask=rows[:, None] & (o_d < D)[None, :])


@triton.jit
def _share_in_slices(b_g, p_r, p_w, rows, us, fresh, s, D: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
                     PRECISION: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """`_share` of all units where R does not fit the chip, BK of them at a time."""
    for k in tl.range(0, D, BK, num_stages=1):
        o_k = k + tl.arange(0, BK)
        b_r = _four(p_r + o_k[None, :], D * D, us[:, None] & (o_k < D)[None, :], DOT)
        _share(b_g, b_r, p_w, o_k, rows, fresh, s, D, PRECISION, HAS_RESET)


@triton.jit
def _gate_gradients(b_e, b_dq, b_dp, kept, b_q, b_before):
    """dĩ, df̃, dz̃, dõ, and dq and dp before the step."""
    b_less, b_open, b_tanh, b_out = kept
    b_w, b_stays = tl.where(b_less < 0, 1.0 + b_less, b_less), tl.where(b_less < 0, -b_less, 1.0 - b_less)
    b_dq += b_e * b_out
    b_do = b_e * b_q * b_out * (1.0 - b_out)
    b_by_w = b_dq * b_w
    b_dz = b_by_w * (1.0 - b_tanh * b_tanh)
    b_di = b_dp * b_w + b_by_w * b_stays * (b_tanh - b_before)
    b_dp -= b_di
    return (b_di, b_dp * b_open, b_dz, b_do), b_dq * b_stays, b_dp


@triton.jit(do_not_specialize=RUNTIME)
def slstm_backward_kernel(
    dhs, r, gates, qs, reset, mask, dh, dq, dp, dx, words,
    B, T, start, end, first, H, stride_db, stride_dt, stride_dh, stride_rb, stride_mb,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EXCHANGE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Programs as above: steps T - 1 - start down to T - end; dh, dq, dp go from the gradients behind them to those before.

    words (2, SHARES, B, H, D): of dh a share from every program, and where there is padding one of what passes by it.
    """
    SHARES: tl.constexpr = P + 1 if HAS_MASK else P
    i_p, i_h, o_u, o_b, rows, us, o_row = _place(first, B, H, D, P, BU)
    o_d, keep, all_units = tl.arange(0, BD), rows[:, None] & us[None, :], B.to(tl.int64) * H * D
    o_s, o_p, last = o_row + o_u[None, :], tl.arange(0, BP)[:, None, None], T - 1 - start
    o_t = (o_b[:, None] * T + last) * H * D + i_h * D + o_u[None, :]
    p_shares, keep_shares = words + o_p * all_units + o_s[None, :, :], (o_p < SHARES) & keep[None, :, :]
    p_r = r + i_h * 4 * D * D + o_u[:, None] * D
    if BK == BD:
        b_r = _four(p_r + o_d[None, :], D * D, us[:, None] & (o_d < D)[None, :], DOT)
    b_dh, b_dq, b_dp = _three(dh + o_s, dq + o_s, dp + o_s, keep)
    p_dhs = dhs + o_b[:, None] * stride_db + last * stride_dt.to(tl.int64) + i_h * stride_dh + o_u[None, :]
    fresh = tl.zeros([ROWS], tl.int1)
    p_dx, p_q = dx + 4 * (o_t - o_u[None, :]) + o_u[None, :], qs + o_t + o_b[:, None] * H * D
    b_q = tl.load(p_q + H * D, mask=keep, other=0.0).to(tl.float32)
    for s in tl.range(start, end, num_stages=STAGES):
        b_e, b_before, kept = _kept(p_dhs, p_q, gates + o_t, all_units * T, keep)
        if EXCHANGE and s > 0:
            b_dh = tl.sum(_arrived(p_shares + ((s - 1) & 1) * SHARES * all_units, keep_shares, s - 1), 0)
        b_g, b_dqy, b_dpy = _gate_gradients(b_e + b_dh, b_dq, b_dp, kept, b_q, b_before)
        p_w = words + (s & 1) * SHARES * all_units + o_row
        if HAS_RESET:
            fresh = _flag(reset, o_b, stride_rb, T - 1 - s, rows)
        if HAS_MASK:
            alive = _flag(mask, o_b, stride_mb, T - 1 - s, rows)[:, None]
            b_g, b_dqy, b_dpy = _past_padding(alive, b_g, b_dqy, b_dpy, b_dq, b_dp)
            b_passed = tl.where(alive | fresh[:, None], 0.0, b_dh)
            if EXCHANGE:
                tl.store(p_w + P * all_units + o_u[None, :], _flagged(b_passed, s), mask=keep)
        if HAS_RESET:
            b_dqy, b_dpy = tl.where(fresh[:, None], 0.0, b_dqy), tl.where(fresh[:, None], 0.0, b_dpy)
        b_g, p_w = _cast(b_g, dx.dtype.element_ty), p_w + i_p * all_units
        if not EXCHANGE:
            b_dh = _shared(_cast(b_g, DOT), b_r, fresh, PRECISION, HAS_RESET)
            if HAS_MASK:
                b_dh += b_passed
        elif BK == BD:
            _share(_cast(b_g, DOT), b_r, p_w, o_d, rows, fresh, s, D, PRECISION, HAS_RESET)
        else:
            _share_in_slices(_cast(b_g, DOT), p_r, p_w, rows, us, fresh, s, D, BK, DOT, PRECISION, HAS_RESET)
        _store_four(p_dx, b_g, D, keep)
        b_dq, b_dp, b_q, p_dhs = b_dqy, b_dpy, b_before, p_dhs - stride_dt
        p_q, o_t, p_dx = p_q - H * D, o_t - H * D, p_dx - H * 4 * D
    _leave(dh + o_s, dq + o_s, dp + o_s, b_dh, b_dq, b_dp, keep, EXCHANGE)


def multiprocessors(device) -> int:
    """Programs that surely run at once: the interpreter runs one after the other."""
    return 1 if backends.INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _launches(cut: Cut, batch: int, steps: int, heads: int, device):
    """(grid, first row tile, steps) of every launch.

    Programs that wait for each other must run at once: no launch has more of them than the card has multiprocessors, and
    the driver is asked to start all or none. A head wider than that goes step by step.
    """
    tiles, each = triton.cdiv(batch, ROWS.value), heads * cut.parts
    if not cut.exchange:
        return [((tiles * each,), 0, (0, steps))]
    together = multiprocessors(device)
    if each > together:
        return [((tiles * each,), 0, (t, t + 1)) for t in range(steps)]
    most = together // each
    return [((min(most, tiles - tile) * each,), tile, (0, steps)) for tile in range(0, tiles, most)]


def _constants(cut: Cut, width: int, dtype: torch.dtype):
    """What both kernels are compiled for."""
    sizes = {"D": width, "BD": max(16, triton.next_power_of_2(width)), "BK": cut.slice, "BU": cut.units}
    # The interpreter cannot multiply bfloat16, nor split a float32.
    dot = DOTS[torch.float32 if backends.INTERPRETED else dtype]
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else EXACT
    options = {"DOT": dot, "PRECISION": "ieee" if backends.INTERPRETED else precision, "STAGES": cut.stages}
    gang = {"launch_cooperative_grid": True} if cut.exchange and not backends.INTERPRETED else {}
    return {**sizes, **options, "P": cut.parts, "EXCHANGE": cut.exchange, "num_warps": cut.warps, **gang}


def _flags(reset, mask, x):
    """Pointers and strides of reset and mask, and whether there are any."""
    given = [x if f is None else rows_apart(f).view(torch.uint8) for f in (reset, mask)]
    strides = [f.stride(0) if f.dtype == torch.uint8 else 0 for f in given]
    return given, strides, {"HAS_RESET": reset is not None, "HAS_MASK": mask is not None}


def forward(cut: Cut, x, r, memory, reset, mask, save: bool):
    """hs (B, T, H, D), the memory after it, and what the backward wants: gates and q, or two empty tensors.

    x (B, T, H, 4, D) with a contiguous last axis, r (H, 4, D, D) contiguous and of x's dtype, memory h, c, n, m in float32.
    """
    batch, steps, heads, _, width = x.shape
    wide = x.dtype == torch.float32
    hs = x.new_empty(batch, steps, heads, width)
    memory = [s.contiguous() for s in memory]
    new = [torch.empty_like(s) for s in memory]
    kept = torch.float32 if wide else torch.bfloat16
    numbers = (4, *hs.shape) if wide else hs.shape
    gates = torch.empty(numbers if save else 0, dtype=kept if wide else torch.int64, device=x.device)
    qs = torch.empty((batch, steps + 1, heads, width) if save else 0, dtype=kept, device=x.device)
    words = x.new_zeros((2, batch, heads, width) if cut.exchange else 1, dtype=torch.int32)
    (reset, mask), strides, has = _flags(reset, mask, words)
    constants = _constants(cut, width, x.dtype)
    for grid, first, (start, end) in _launches(cut, batch, steps, heads, x.device):
        before = new if start else memory
        slstm_forward_kernel[grid](
            x, r, *before, reset, mask, hs, *new, gates, qs, words, batch, steps, start, end, first, heads, *x.stride()[:4],
            *strides, SAVE=save, **has, **constants,
        )  # fmt: skip
    return hs, *new, gates, qs


def backward(cut: Cut, dhs, dh, dq, dp, r, gates, qs, reset, mask, dtype):
    """dx (B, T, H, 4, D) in `dtype`, and the gradients of h, q and p before the first step; the given ones are used up."""
    batch, steps, heads, width = dhs.shape
    dx = torch.empty(batch, steps, heads, 4, width, dtype=dtype, device=dhs.device)
    shares = cut.parts + (mask is not None)
    words = torch.zeros((2, shares, batch, heads, width) if cut.exchange else 1, dtype=torch.int32, device=dhs.device)
    (reset, mask), strides, has = _flags(reset, mask, words)
    constants = _constants(cut, width, dtype)
    for grid, first, (start, end) in _launches(cut, batch, steps, heads, dhs.device):
        slstm_backward_kernel[grid](
            dhs, r, gates, qs, reset, mask, dh, dq, dp, dx, words, batch, steps, start, end, first, heads, *dhs.stride()[:3],
            *strides, BP=triton.next_power_of_2(shares), **has, **constants,
        )  # fmt: skip
    if cut.exchange:
        dh = (words[(steps - 1) & 1] & -2).view(torch.float32).sum(0)
    return dx, dh, dq, dp
