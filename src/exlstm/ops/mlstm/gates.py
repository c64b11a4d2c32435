"""What the gates of a sequence amount to, worked out once before the matrix kernels, and the gradients of the gates after them.

The equations stand in docs/math.md. A chunk of L tokens is rank one in its gates, so the other kernels read but a few vectors:
u, M, α, β and exp(-m) of every token, γ of every chunk. Prefix sums run in float64 and in powers of two, in three small kernels:
what each chunk does to the stabiliser, a scan over the chunks, and the rest. Vectors are (B·H, N·L), N chunks, float32.
"""

from copy import copy
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from exlstm.ops.mlstm.plan import cdiv, power

LOG2E = tl.constexpr(1.4426950408889634)
# exp(-m) would underflow far above e^60, and 0 / 0 follow where q·n vanishes: held there, as in the reference.
M_MAX = tl.constexpr(60.0 * 1.4426950408889634)
# 2^127 and not infinity: h is 0 in any case, and so is what its gradient is multiplied by.
M_MIN = tl.constexpr(-127.0)


@triton.jit
def _add_since(a, a_fresh, b, b_fresh):
    return tl.where(b_fresh != 0, b, a + b), a_fresh | b_fresh


@triton.jit
def _max_since(a, a_fresh, b, b_fresh):
    return tl.where(b_fresh != 0, b, tl.maximum(a, b)), a_fresh | b_fresh


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _after(a_shift, a_floor, b_shift, b_floor):
    """max(x + a_shift, a_floor), then max(· + b_shift, b_floor)."""
    return a_shift + b_shift, tl.maximum(a_floor + b_shift, b_floor)


@triton.jit
def _local_gates(p_i, p_f, p_reset, i_b, o_h, i_n, T, H, s_ib, s_it, s_ih, s_fb, s_ft, s_fh,
                 BH: tl.constexpr, L: tl.constexpr, RESET: tl.constexpr):  # fmt: skip
    """b, u and the running maximum of u (BH, L) of some heads in one chunk in powers of two, and resets so far in the chunk."""
    o_t = (i_n * L + tl.arange(0, L)).to(tl.int64)[None, :]
    inside = (o_h < H)[:, None] & (o_t < T)
    o_h = o_h.to(tl.int64)[:, None]
    log_i = tl.load(p_i + i_b * s_ib + o_t * s_it + o_h * s_ih, mask=inside, other=-float("inf")).to(tl.float64) * LOG2E
    log_f = tl.load(p_f + i_b * s_fb + o_t * s_ft + o_h * s_fh, mask=inside, other=0.0).to(tl.float64) * LOG2E
    if RESET:
        fresh = tl.load(p_reset + i_b * T + o_t + tl.zeros([BH, L], dtype=tl.int64), mask=inside, other=0).to(tl.int32)
        document = tl.cumsum(fresh, 1)
        b, _ = tl.associative_scan((log_f, fresh), 1, _add_since)
        u = log_i - b
        top, _ = tl.associative_scan((u, fresh), 1, _max_since)
    else:
        document = tl.zeros([BH, L], dtype=tl.int32)
        b = tl.cumsum(log_f, 1)
        u = log_i - b
        top = tl.associative_scan(u, 1, _larger)
    return b, u, top, document


@triton.jit
def _some_heads(H, N, BH: tl.constexpr):
    """Row, chunk and BH heads of this program: heads lie side by side in memory, so that they are read together."""
    tiles = tl.cdiv(H, BH)
    i_x = tl.program_id(0) // tiles
    return (i_x // N).to(tl.int64), i_x % N, (tl.program_id(0) % tiles) * BH + tl.arange(0, BH)


@triton.jit
def _last(x, L: tl.constexpr):
    """The last column of x (G, L)."""
    return tl.sum(tl.where(tl.arange(0, L)[None, :] == L - 1, x, tl.zeros_like(x)), 1)


@triton.jit(do_not_specialize=["T", "N"])
def mlstm_gates_local_kernel(p_i, p_f, p_reset, p_shift, p_floor, T, H, N, s_ib, s_it, s_ih, s_fb, s_ft, s_fh,
                             BH: tl.constexpr, L: tl.constexpr, RESET: tl.constexpr):  # fmt: skip
    """What each chunk does to the stabiliser: m⁺ = max(m⁻ + shift, floor), both (B·H, N) float64."""
    i_b, i_n, o_h = _some_heads(H, N, BH)
    b, _, top, document = _local_gates(
        p_i, p_f, p_reset, i_b, o_h, i_n, T, H, s_ib, s_it, s_ih, s_fb, s_ft, s_fh, BH, L, RESET
    )
    total, top = _last(b, L), _last(top, L)
    shift = total
    if RESET:
        fresh = _last(document, L) > 0
        shift = tl.where(fresh, -float("inf"), shift)
        top = tl.where(fresh, tl.maximum(top, 0.0), top)
    o = (i_b * H + o_h) * N + i_n
    tl.store(p_shift + o, shift, mask=o_h < H)
    tl.store(p_floor + o, total + top, mask=o_h < H)


@triton.jit(do_not_specialize=["N"])
def mlstm_gates_scan_kernel(p_shift, p_floor, p_m0, p_m, p_last, N, BN: tl.constexpr):
    """m (B·H, N) at the start of every chunk in float64, and m after the last in nats."""
    i_bh = tl.program_id(0).to(tl.int64)
    m = tl.load(p_m0 + i_bh).to(tl.float64) * LOG2E
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        shift = tl.load(p_shift + i_bh * N + o_n, mask=o_n < N, other=0.0)
        floor = tl.load(p_floor + i_bh * N + o_n, mask=o_n < N, other=-float("inf"))
        shift, floor = tl.associative_scan((shift, floor), 0, _after)
        after = tl.maximum(m + shift, floor)
        tl.store(p_m + i_bh * (N + 1) + o_n + 1, after, mask=o_n < N)
        tl.store(p_m + i_bh * (N + 1) + i_n, m)
        m = tl.sum(tl.where(tl.arange(0, BN) == BN - 1, after, 0.0), 0)
    tl.store(p_last + i_bh, (m / LOG2E).to(tl.float32))


@triton.jit
def _power_of_two(x, EXACT: tl.constexpr):
    """2^x in float32 of a float64 x; the hardware's own has an error of two units in the last place."""
    return tl.exp2(x).to(tl.float32) if EXACT else tl.exp2(x.to(tl.float32))


@triton.jit(do_not_specialize=["T", "N"])
def mlstm_gates_kernel(p_i, p_f, p_reset, p_m, p_u, p_top, p_u_low, p_top_low, p_alpha, p_beta, p_floor, p_gamma, p_document,
                       T, H, N, s_ib, s_it, s_ih, s_fb, s_ft, s_fh,
                       BH: tl.constexpr, L: tl.constexpr, RESET: tl.constexpr, PAIR: tl.constexpr):  # fmt: skip
    """u, M, α, β, exp(-m) (B·H, N·L) and γ (B·H, N); u and M in powers of two, as pairs (high, low) where asked for."""
    i_b, i_n, o_h = _some_heads(H, N, BH)
    b, u, top, document = _local_gates(
        p_i, p_f, p_reset, i_b, o_h, i_n, T, H, s_ib, s_it, s_ih, s_fb, s_ft, s_fh, BH, L, RESET
    )
    o_bh = i_b * H + o_h
    m = tl.load(p_m + o_bh * (N + 1) + i_n, mask=o_h < H, other=0.0)
    before = tl.zeros([BH, L], dtype=tl.float64) + m[:, None]
    if RESET:
        before = tl.where(document > 0, 0.0, before)
    top = tl.maximum(top, before)
    last = _last(top, L)
    a, g = u - last[:, None], m - last
    beta = _power_of_two(before - top, PAIR)
    if RESET:
        behind = _last(document, L)
        a = tl.where(document == behind[:, None], a, -float("inf"))
        g = tl.where(behind > 0, -float("inf"), g)
        beta = tl.where(document > 0, 0.0, beta)
    alpha, gamma = _power_of_two(a, PAIR), _power_of_two(g, PAIR)
    floor = _power_of_two(-tl.maximum(tl.minimum(b + top, M_MAX), M_MIN), PAIR)
    o = (o_bh * N + i_n)[:, None] * L + tl.arange(0, L)[None, :]
    inside = (o_h < H)[:, None] & (tl.arange(0, L) < L)[None, :]
    u_high, top_high = u.to(tl.float32), top.to(tl.float32)
    tl.store(p_u + o, u_high, mask=inside)
    tl.store(p_top + o, top_high, mask=inside)
    if PAIR:
        u_low = tl.where(u == -float("inf"), 0.0, u - u_high.to(tl.float64))
        tl.store(p_u_low + o, u_low.to(tl.float32), mask=inside)
        tl.store(p_top_low + o, (top - top_high.to(tl.float64)).to(tl.float32), mask=inside)
    tl.store(p_alpha + o, alpha, mask=inside)
    tl.store(p_beta + o, beta, mask=inside)
    tl.store(p_floor + o, floor, mask=inside)
    tl.store(p_gamma + o_bh * N + i_n, gamma, mask=o_h < H)
    if RESET:
        tl.store(p_document + o, document, mask=inside)


@triton.jit
def tile(d, i_b, i_h, i_t, i_d, BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr):
    """Rows i_t … and features i_d … of one head, (BT, BD), zeros outside, as the matrix units take them."""
    return d.load([i_b, i_h, i_t, i_d]).reshape(BT, BD).to(DOT)


@triton.jit(do_not_specialize=["T", "N"])
def mlstm_gate_gradients_kernel(p_qdq, p_kdk, p_inflow, p_reset, p_di, p_df, T, H, N, rows, tiles_q, tiles_k,
                                BH: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr, RESET: tl.constexpr):  # fmt: skip
    """dlog_i = k·dk; dlog_f_t = Σ over t ≤ r of (q·dq - k·dk)_r in chunk and document, plus the inflow, (B, T, H) float32."""
    i_b, i_n, o_h = _some_heads(H, N, BH)
    o_c, o_l = (i_b * H + o_h) * N + i_n, tl.arange(0, L)
    o, o_t = o_c[:, None] * L + o_l[None, :], (i_n * L + o_l).to(tl.int64)[None, :]
    there = (o_h < H)[:, None] & (o_l < L)[None, :]
    b_q = tl.zeros([BH, L], dtype=tl.float64)
    b_k = tl.zeros([BH, L], dtype=tl.float64)
    b_in = tl.zeros([BH], dtype=tl.float64)
    for _ in range(tiles_q):
        b_q += tl.load(p_qdq + o, mask=there, other=0.0).to(tl.float64)
        p_qdq += rows
    for _ in range(tiles_k):
        b_k += tl.load(p_kdk + o, mask=there, other=0.0).to(tl.float64)
        for i_r in range(BLOCKS):
            b_in += tl.load(p_inflow + o_c * BLOCKS + i_r, mask=o_h < H, other=0.0).to(tl.float64)
        p_kdk += rows
        p_inflow += rows // L * BLOCKS
    b_flow, b_in = b_q - b_k, b_in[:, None]
    if RESET:
        # From the end of the chunk back, a sum restarts where a document ends: at a token whose successor is another one's.
        p_reset += i_b * T + tl.zeros([BH, L], dtype=tl.int64)
        fresh = tl.load(p_reset + o_t, mask=there & (o_t < T), other=0).to(tl.int32)
        ends = tl.load(p_reset + o_t + 1, mask=there & (o_l < L - 1)[None, :] & (o_t + 1 < T), other=0).to(tl.int32)
        document = tl.cumsum(fresh, 1)
        b_sum, _ = tl.associative_scan((b_flow, ends), 1, _add_since, reverse=True)
        b_df = b_sum + tl.where(document == _last(document, L)[:, None], b_in, 0.0)
        b_df = tl.where(fresh > 0, 0.0, b_df)
    else:
        b_df = tl.cumsum(b_flow, 1, reverse=True) + b_in
    o_out = (i_b * T + o_t) * H + o_h[:, None]
    tl.store(p_di + o_out, b_k.to(tl.float32), mask=there & (o_t < T))
    tl.store(p_df + o_out, b_df.to(tl.float32), mask=there & (o_t < T))


@triton.jit(do_not_specialize=["N"])
def mlstm_sums_kernel(d_x, p_w, p_sums, H, N, K, L: tl.constexpr, BK: tl.constexpr):
    """Σ_t w_t x_t of every chunk, (B·H, N, K) float32."""
    tiles = tl.cdiv(K, BK)
    i_k, i_x = (tl.program_id(0) % tiles) * BK, tl.program_id(0) // tiles
    i_bh, i_n = (i_x // N).to(tl.int64), i_x % N
    b_x = tile(d_x, (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32), i_n * L, i_k, L, BK, tl.float32)
    b_w = tl.load(p_w + (i_bh * N + i_n) * L + tl.arange(0, L))
    o_k = i_k + tl.arange(0, BK)
    tl.store(p_sums + (i_bh * N + i_n) * K + o_k, tl.sum(b_x * b_w[:, None], 0), mask=o_k < K)


@triton.jit
def _decayed(a_gamma, a, b_gamma, b):
    return a_gamma * b_gamma, a * b_gamma + b


@triton.jit(do_not_specialize=["N"])
def mlstm_sums_scan_kernel(p_sums, p_gamma, p_start, p_n, N, K, PARTS: tl.constexpr, REVERSE: tl.constexpr, EMPTY: tl.constexpr,
                           BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """n_{i+1} = γ_i n_i + sums_i, or in reverse dn_i = γ_i dn_{i+1} + sums_i; sums (B·H, N·PARTS, K), n (B·H, N + 1, K)."""
    tiles = tl.cdiv(K, BK)
    i_bh, o_k = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    p_sums += i_bh * N * PARTS * K
    p_n += i_bh * (N + 1) * K
    b_n = tl.zeros([BK], dtype=tl.float32)
    if not EMPTY:
        b_n += tl.load(p_start + i_bh * K + o_k, mask=o_k < K, other=0.0)
    tl.store(p_n + (N if REVERSE else 0) * K + o_k, b_n, mask=o_k < K)
    for i in range(0, N, BN):
        o_i = i + tl.arange(0, BN)
        o_n = N - 1 - o_i if REVERSE else o_i
        inside = (o_i < N)[:, None] & (o_k < K)[None, :]
        gamma = tl.load(p_gamma + i_bh * N + o_n, mask=o_i < N, other=1.0)[:, None] + tl.zeros(
            [BN, BK], dtype=tl.float32
        )
        sums = tl.zeros([BN, BK], dtype=tl.float32)
        for i_part in tl.static_range(PARTS):
            sums += tl.load(p_sums + (o_n * PARTS + i_part)[:, None] * K + o_k[None, :], mask=inside, other=0.0)
        gamma, sums = tl.associative_scan((gamma, sums), 0, _decayed)
        sums += gamma * b_n[None, :]
        tl.store(p_n + (o_n if REVERSE else o_n + 1)[:, None] * K + o_k[None, :], sums, mask=inside)
        b_n = tl.sum(tl.where(tl.arange(0, BN)[:, None] == BN - 1, sums, 0.0), 0)


class Gates(NamedTuple):
    """The vectors of a sequence, (B·H, N·L), gamma (B·H, N), m after the last token (B, H); see `mlstm_gates_kernel`."""

    u: Tensor
    top: Tensor
    u_low: Tensor
    top_low: Tensor
    alpha: Tensor
    beta: Tensor
    floor: Tensor
    gamma: Tensor
    document: Tensor
    last_m: Tensor


class Call:
    """The sizes of one call and what its kernels have in common."""

    def __init__(self, q, v, reset, scale, normalize, L, tokens):
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.L, self.N, self.rows = v.shape[-1], L, tokens // L, self.B * self.H
        self.tokens = self.rows * tokens
        self.reset, self.scale = None if reset is None else reset.contiguous(), scale
        self.pair = q.dtype == torch.float32
        self.flags = {"NORM": normalize, "RESET": reset is not None}
        # float16 would overflow in a memory of many tokens: its products run in tf32, which holds its digits.
        # And Triton's interpreter multiplies no bfloat16.
        wide = q.dtype != torch.bfloat16 or q.device.type == "cpu"
        fast = q.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.dtype = torch.float32 if wide else torch.bfloat16
        self.dot = tl.float32 if wide else tl.bfloat16
        self.precision = "tf32" if wide and fast else "ieee"

    def vector(self, like, *shape):
        return like.new_empty(shape or (self.rows, self.N * self.L), dtype=torch.float32)

    def _heads_together(self):
        """Heads a program of the gates' kernels, and how many programs."""
        BH = min(max(1, 1024 // self.L), power(self.H, 1))
        return BH, (self.B * self.N * cdiv(self.H, BH),)

    def gates(self, log_i, log_f, m) -> Gates:
        """log_i, log_f (B, T, H) in nats, m (B, H)."""
        self.given = log_i, log_f, m
        L, N, BN = self.L, self.N, min(1024, power(self.N, 1))
        BH, grid = self._heads_together()
        shift, floor, starts = m.new_empty(3, self.rows, N + 1, dtype=torch.float64)
        last_m = torch.empty_like(m, memory_format=torch.contiguous_format)
        inputs, strides = (log_i, log_f, self.reset), (*log_i.stride(), *log_f.stride())
        sizes = (self.T, self.H, N, *strides, BH, L, self.reset is not None)
        mlstm_gates_local_kernel[grid](*inputs, shift, floor, *sizes)
        mlstm_gates_scan_kernel[(self.rows,)](shift, floor, m.contiguous(), starts, last_m, N, BN, num_warps=1)
        u, top, alpha, beta, floor, *lows = self.vector(m, 7 if self.pair else 5, self.rows, N * L)
        document = m if self.reset is None else torch.empty_like(u, dtype=torch.int32)
        found = Gates(u, top, *(lows or (u, u)), alpha, beta, floor, self.vector(m, self.rows, N), document, last_m)
        mlstm_gates_kernel[grid](*inputs, starts, *found[:-1], *sizes, self.pair)
        return found

    def in_chunks(self, L):
        """The same call in chunks of L tokens, and its gates."""
        call = copy(self)
        call.L, call.N = L, self.N * self.L // L
        return call, call.gates(*self.given)

    def normalisers(self, k, gates, start):
        """n (B·H, N + 1, K) at the start of every chunk and after the last, of k (B, T, H, K)."""
        # The copy engine moves rows of 16 bytes and more.
        BK = min(8192 // self.L, power(self.K, 8))
        sums = self.vector(start, self.rows, self.N, self.K)
        mlstm_sums_kernel[(self.rows * self.N * cdiv(self.K, BK),)](
            heads(k, self.L, BK), gates.alpha, sums, self.H, self.N, self.K, self.L, BK
        )
        return self.normaliser_scan(sums, gates, start)

    def normaliser_scan(self, sums, gates, start, reverse=False):
        """n at the start of every chunk and after the last, of the sums inside the chunks (B·H, N·parts, K); in reverse dn."""
        BK, BN = min(32, power(self.K, 1)), min(64, power(self.N, 1))
        n, empty = self.vector(sums, self.rows, self.N + 1, self.K), start is None
        mlstm_sums_scan_kernel[(self.rows * cdiv(self.K, BK),)](
            sums,
            gates.gamma,
            sums if empty else start.contiguous(),
            n,
            self.N,
            self.K,
            sums.shape[1] // self.N,
            reverse,
            empty,
            BN,
            BK,
        )
        return n

    def gate_gradients(self, log_i, qdq, kdk, inflow):
        """dlog_i, dlog_f (B, T, H) from the kernels' sums (tiles of K, B·H·N·L) and inflow (tiles of K, blocks of rows)."""
        BH, grid = self._heads_together()
        dlog_i, dlog_f = (torch.empty_like(log_i, memory_format=torch.contiguous_format) for _ in range(2))
        mlstm_gate_gradients_kernel[grid](
            qdq, kdk, inflow, self.reset, dlog_i, dlog_f, self.T, self.H, self.N, self.tokens, qdq.shape[0], kdk.shape[0],
            BH, self.L, inflow.shape[1] * self.L // self.tokens, self.reset is not None,
        )  # fmt: skip
        return dlog_i, dlog_f


def aligned(x):
    """x, or a copy where its strides are not the copy engine's: 16 bytes, the last axis contiguous."""
    strides = [s for s, length in zip(x.stride()[:-1], x.shape[:-1]) if length > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s and s * x.element_size() % 16 == 0 for s in strides):
        return x
    return padded(x, x.shape).copy_(x)


def padded(x, shape, dtype=None):
    """New memory of `shape` for the copy engine: every row starts at 16 bytes."""
    dtype = dtype or x.dtype
    whole = 16 // dtype.itemsize
    return x.new_empty((*shape[:-1], cdiv(shape[-1], whole) * whole), dtype=dtype)[..., : shape[-1]]


def heads(x, rows, width):
    """x (B, T, H, D) as (B, H, T, D) in tiles of `rows` × `width`."""
    return TensorDescriptor(*tiles_of_heads(x, rows, width))


def matrices(x, rows, width):
    """x (M, R, W) in tiles of `rows` × `width`."""
    return TensorDescriptor(*tiles_of_matrices(x, rows, width))


def tiles_of_heads(x, rows, width):
    """What a descriptor is made of: the tensor, its sizes, strides and tiles."""
    batch, time, heads, features = x.shape
    # The stride of an axis of length one is anything; the copy engine wants a multiple of 16 bytes.
    b, t, h, _ = (s if length > 1 else 16 for s, length in zip(x.stride(), x.shape))
    return x, [batch, heads, time, features], [b, h, t, 1], [1, 1, rows, width]


def tiles_of_matrices(x, rows, width):
    return x, list(x.shape), list(x.stride()), [1, rows, width]
