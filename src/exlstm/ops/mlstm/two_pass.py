"""The mLSTM in two passes: memories from chunk to chunk, then every chunk by itself, forward and backward. Any widths of heads.

    states       C⁻, n⁻ of every chunk, forward; dC⁺, dn⁺, backward          (sequential over chunks, parallel over tiles of C)
    intra        P = a(QKᵀ)⊙D and the denominator; backward P/den and a dS   (a block of rows against the blocks before it)
    outputs      h = (P V + a β ⊙ Q C⁻) / den
    dqdk, dv     the gradients of q and k, of v; row sums for the gates' gradients from the float32 accumulators

The equations stand in `cpu.py`. A chunk of L tokens is worked on in blocks of BT rows. Tensors of four axes are descriptors
(B, H, T, features), so any strides will do, tails are zeros, and Hopper's copy engine brings the tiles. Vectors are (B·H, N·L),
chunk memories (B·H·N, K, V). No kernel uses atomics: same inputs, same bits.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import Call, aligned, heads, matrices, on, padded, tile
from exlstm.ops.mlstm.plan import cdiv


@triton.jit
def _decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_j, RESET: tl.constexpr, PAIR: tl.constexpr):
    """D (rows, columns) = 2^(u_j - M_t) for tokens o_t and o_j of one sequence, 0 in the future and across a reset."""
    exponent = tl.load(p_u + o_j)[None, :] - tl.load(p_top + o_t)[:, None]
    if PAIR:
        exponent += tl.load(p_u_low + o_j)[None, :] - tl.load(p_top_low + o_t)[:, None]
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_j)[None, :])
    return tl.exp2(tl.where(seen, exponent, -float("inf")))


@triton.jit(do_not_specialize=["N"])
def mlstm_states_kernel(d_x, d_y, d_c, p_w, p_wn, p_gamma, p_c0, p_n0, p_n, p_c_last, p_n_last, H, N, K, V,
                        L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
                        EMPTY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The memory at the start of every chunk, C ← γ C + Xᵀ(w ⊙ Y) and n ← γ n + Xᵀ w_n, or at its end, from the last to the first."""
    tiles_v, tiles = tl.cdiv(V, BV), tl.cdiv(V, BV) * tl.cdiv(K, BK)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_k, i_v = (tl.program_id(0) % tiles) // tiles_v, tl.program_id(0) % tiles_v
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_t = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    p_c0 += i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c = tl.zeros([BK, BV], dtype=tl.float32)
    b_n = tl.zeros([BK], dtype=tl.float32)
    if not EMPTY:
        b_c += tl.load(p_c0, mask=inside, other=0.0)
        b_n += tl.load(p_n0 + i_bh * K + o_k, mask=o_k < K, other=0.0)
    for i in tl.range(0, N * (L // BT), num_stages=STAGES):
        i_t = N * (L // BT) - 1 - i if REVERSE else i
        i_n, starts = i_t // (L // BT), i % (L // BT) == 0
        if starts:
            d_c.store([(i_bh * N + i_n).to(tl.int32), i_k * BK, i_v * BV], b_c.to(d_c.dtype).reshape(1, BK, BV))
            if i_v == 0:
                tl.store(p_n + (i_bh * N + i_n) * K + o_k, b_n, mask=o_k < K)
        b_x = tile(d_x, i_b, i_h, i_t * BT, i_k * BK, BT, BK, DOT)
        b_y = tile(d_y, i_b, i_h, i_t * BT, i_v * BV, BT, BV, DOT)
        b_gamma = tl.where(starts, tl.load(p_gamma + i_bh * N + i_n), 1.0)
        b_w = tl.load(p_w + i_bh * N * L + i_t * BT + o_t)
        b_y = (b_y.to(tl.float32) * b_w[:, None]).to(DOT)
        b_c = tl.dot(b_x.T, b_y, b_c * b_gamma, input_precision=PRECISION)
        if i_v == 0:
            b_wn = tl.load(p_wn + i_bh * N * L + i_t * BT + o_t)
            b_n = b_n * b_gamma + tl.sum(b_x.to(tl.float32) * b_wn[:, None], 0)
    tl.store(p_c_last + i_bh * K * V + o_k[:, None] * V + o_v[None, :], b_c, mask=inside)
    if i_v == 0:
        tl.store(p_n_last + i_bh * K + o_k, b_n, mask=o_k < K)


@triton.jit(do_not_specialize=["N"])
def mlstm_intra_kernel(d_q, d_k, d_p, p_n, p_u, p_top, p_u_low, p_top_low, p_beta, p_floor, p_document, p_den, p_s, H, N, K, scale, eps,
                       L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                       PAIR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """P (B·H·N·L, L) up to the diagonal; den, and the signed s where it is larger than the floor, else 0."""
    rows = N * (L // BT)
    i_bh, i_r = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    i_n, i_first = i_r // (L // BT), (i_r // (L // BT)) * (L // BT)
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_r * BT + tl.arange(0, BT)
    base = i_bh * N * L
    p_u += base
    p_top += base
    p_u_low += base
    p_top_low += base
    p_document += base
    b_s = tl.zeros([BT], dtype=tl.float32)
    for i_j in range(i_first, i_r + 1):
        b_p = tl.zeros([BT, BT], dtype=tl.float32)
        for i_k in tl.range(0, K, BK, num_stages=STAGES):
            b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
            b_k = tile(d_k, i_b, i_h, i_j * BT, i_k, BT, BK, DOT)
            b_p = tl.dot(b_q, b_k.T, b_p, input_precision=PRECISION)
        b_p *= scale * _decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, i_j * BT + tl.arange(0, BT), RESET, PAIR)
        b_s += tl.sum(b_p, 1)
        d_p.store([i_bh.to(tl.int32), i_r * BT, (i_j - i_first) * BT], b_p.to(d_p.dtype).reshape(1, BT, BT))
    b_den = tl.load(p_floor + base + o_t)
    if NORM:
        b_qn = tl.zeros([BT], dtype=tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
            b_n = tl.load(p_n + (i_bh * N + i_n) * K + o_k, mask=o_k < K, other=0.0)
            b_qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
        b_s += scale * tl.load(p_beta + base + o_t) * b_qn
        tl.store(p_s + base + o_t, tl.where(tl.abs(b_s) > b_den, b_s, 0.0))
        b_den = tl.maximum(tl.abs(b_s), b_den) + eps
    tl.store(p_den + base + o_t, b_den)


@triton.jit(do_not_specialize=["N"])
def mlstm_outputs_kernel(d_q, d_v, d_p, d_c, d_h, p_beta, p_den, H, N, K, V, scale,
                         L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                         DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h = (P V + a β ⊙ Q C⁻) / den of BT rows and BV columns."""
    tiles, blocks = tl.cdiv(V, BV), L // BT
    i_v, i_x = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_first = i_r // blocks, (i_r // blocks) * blocks
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_h = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
        b_c = d_c.load([(i_bh * N + i_n).to(tl.int32), i_k, i_v]).reshape(BK, BV)
        b_h = tl.dot(b_q, b_c, b_h, input_precision=PRECISION)
    b_h *= (scale * tl.load(p_beta + o_t))[:, None]
    for i_j in range(i_first, i_r + 1):
        b_p = d_p.load([i_bh.to(tl.int32), i_r * BT, (i_j - i_first) * BT]).reshape(BT, BT)
        b_v = tile(d_v, i_b, i_h, i_j * BT, i_v, BT, BV, DOT)
        b_h = tl.dot(b_p, b_v, b_h, input_precision=PRECISION)
    b_h /= tl.load(p_den + o_t)[:, None]
    d_h.store([i_b, i_h, i_r * BT, i_v], b_h.to(d_h.dtype).reshape(1, 1, BT, BV))


@triton.jit(do_not_specialize=["N"])
def mlstm_intra_backward_kernel(d_q, d_k, d_v, d_h, d_dh, d_p, d_g, p_u, p_top, p_u_low, p_top_low, p_beta, p_document, p_den, p_s,
                                p_w, p_wn, H, N, K, V, scale,
                                L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
                                RESET: tl.constexpr, PAIR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """P / den and a dS, both (B·H·N·L, L) up to the diagonal; w = a β / den and w_n = a β ds of every token."""
    rows = N * (L // BT)
    i_bh, i_r = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    i_first = (i_r // (L // BT)) * (L // BT)
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_r * BT + tl.arange(0, BT)
    base = i_bh * N * L
    p_u += base
    p_top += base
    p_u_low += base
    p_top_low += base
    p_document += base
    b_part = 1.0 / tl.load(p_den + base + o_t)
    b_ds = tl.zeros([BT], dtype=tl.float32)
    if NORM:
        for i_v in tl.range(0, V, BV, num_stages=STAGES):
            b_h = tile(d_h, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
            b_dh = tile(d_dh, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
            b_ds += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        b_s = tl.load(p_s + base + o_t)
        b_ds *= tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
    b_w = scale * tl.load(p_beta + base + o_t)
    tl.store(p_w + base + o_t, b_w * b_part)
    tl.store(p_wn + base + o_t, b_w * b_ds)
    for i_j in range(i_first, i_r + 1):
        b_p = tl.zeros([BT, BT], dtype=tl.float32)
        for i_k in tl.range(0, K, BK, num_stages=STAGES):
            b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
            b_k = tile(d_k, i_b, i_h, i_j * BT, i_k, BT, BK, DOT)
            b_p = tl.dot(b_q, b_k.T, b_p, input_precision=PRECISION)
        b_d = scale * _decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, i_j * BT + tl.arange(0, BT), RESET, PAIR)
        o_p = [i_bh.to(tl.int32), i_r * BT, (i_j - i_first) * BT]
        d_p.store(o_p, (b_p * b_d * b_part[:, None]).to(d_p.dtype).reshape(1, BT, BT))
        b_g = tl.zeros([BT, BT], dtype=tl.float32)
        for i_v in tl.range(0, V, BV, num_stages=STAGES):
            b_dh = tile(d_dh, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
            b_v = tile(d_v, i_b, i_h, i_j * BT, i_v, BT, BV, DOT)
            b_g = tl.dot(b_dh, b_v.T, b_g, input_precision=PRECISION)
        b_g = (b_g * b_part[:, None] + b_ds[:, None]) * b_d
        d_g.store(o_p, b_g.to(d_g.dtype).reshape(1, BT, BT))


@triton.jit(do_not_specialize=["N"])
def mlstm_dqdk_kernel(d_q, d_k, d_v, d_dh, d_g, d_c, d_dc, d_dq, d_dk, p_n, p_dn, p_alpha, p_w, p_wn, p_gamma, p_qdq, p_kdk, p_inflow,
                      H, N, K, V, rows,
                      L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                      DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq and dk of BT rows and BK columns; their parts of q·dq, k·dk (tiles, B·H·N·L) and of <C⁺, dC⁺> + <n⁺, dn⁺> (tiles, B·H·N·L/BT)."""
    tiles, blocks = tl.cdiv(K, BK), L // BT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_first = i_r // blocks, (i_r // blocks) * blocks
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    i_c = (i_bh * N + i_n).to(tl.int32)
    o_k, o_t = i_k * BK + tl.arange(0, BK), i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_cdc = tl.zeros([BK], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        b_dh = tile(d_dh, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
        b_v = tile(d_v, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
        b_c = d_c.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_dc = d_dc.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_dq = tl.dot(b_dh, b_c.T, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, b_dc.T, b_dk, input_precision=PRECISION)
        b_cdc += tl.sum(b_c.to(tl.float32) * b_dc.to(tl.float32), 1)
    b_dq *= tl.load(p_w + o_t)[:, None]
    b_alpha = tl.load(p_alpha + o_t)
    b_dk *= b_alpha[:, None]
    b_n = tl.load(p_n + (i_bh * N + i_n) * K + o_k, mask=o_k < K, other=0.0)
    b_dn = tl.load(p_dn + (i_bh * N + i_n) * K + o_k, mask=o_k < K, other=0.0)
    b_dq += tl.load(p_wn + o_t)[:, None] * b_n[None, :]
    b_dk += b_alpha[:, None] * b_dn[None, :]
    b_cdc += b_n * b_dn
    b_k = tile(d_k, i_b, i_h, i_r * BT, i_k * BK, BT, BK, DOT)
    # <C⁺, dC⁺> = γ <C⁻, dC⁺> + Σ_j k_j · (what dk_j has from dC⁺), and so for n; the chunk's first block of rows counts C⁻.
    b_inflow = tl.sum(tl.sum(b_k.to(tl.float32) * b_dk, 1), 0)
    if i_r == i_first:
        b_inflow += tl.load(p_gamma + i_bh * N + i_n) * tl.sum(b_cdc, 0)
    tl.store(p_inflow + (i_k.to(tl.int64) * rows + i_bh * N * L) // BT + i_r, b_inflow)
    for i_j in range(i_first, i_r + 1):
        b_g = d_g.load([i_bh.to(tl.int32), i_r * BT, (i_j - i_first) * BT]).reshape(BT, BT)
        b_kj = tile(d_k, i_b, i_h, i_j * BT, i_k * BK, BT, BK, DOT)
        b_dq = tl.dot(b_g, b_kj, b_dq, input_precision=PRECISION)
    b_q = tile(d_q, i_b, i_h, i_r * BT, i_k * BK, BT, BK, DOT)
    tl.store(p_qdq + i_k.to(tl.int64) * rows + o_t, tl.sum(b_q.to(tl.float32) * b_dq, 1))
    d_dq.store([i_b, i_h, i_r * BT, i_k * BK], b_dq.to(d_dq.dtype).reshape(1, 1, BT, BK))
    for i_i in range(i_r, i_first + blocks):
        b_g = d_g.load([i_bh.to(tl.int32), i_i * BT, (i_r - i_first) * BT]).reshape(BT, BT)
        b_qi = tile(d_q, i_b, i_h, i_i * BT, i_k * BK, BT, BK, DOT)
        b_dk = tl.dot(b_g.T, b_qi, b_dk, input_precision=PRECISION)
    tl.store(p_kdk + i_k.to(tl.int64) * rows + o_t, tl.sum(b_k.to(tl.float32) * b_dk, 1))
    d_dk.store([i_b, i_h, i_r * BT, i_k * BK], b_dk.to(d_dk.dtype).reshape(1, 1, BT, BK))


@triton.jit(do_not_specialize=["N"])
def mlstm_dv_kernel(d_k, d_dh, d_p, d_dc, d_dv, p_alpha, H, N, K, V,
                    L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dv = (P / den)ᵀ dh + α ⊙ (K dC⁺) of BT rows and BV columns."""
    tiles, blocks = tl.cdiv(V, BV), L // BT
    i_v, i_x = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_first = i_r // blocks, (i_r // blocks) * blocks
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_k = tile(d_k, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
        b_dc = d_dc.load([(i_bh * N + i_n).to(tl.int32), i_k, i_v]).reshape(BK, BV)
        b_dv = tl.dot(b_k, b_dc, b_dv, input_precision=PRECISION)
    b_dv *= tl.load(p_alpha + o_t)[:, None]
    for i_i in range(i_r, i_first + blocks):
        b_p = d_p.load([i_bh.to(tl.int32), i_i * BT, (i_r - i_first) * BT]).reshape(BT, BT)
        b_dh = tile(d_dh, i_b, i_h, i_i * BT, i_v, BT, BV, DOT)
        b_dv = tl.dot(b_p.T, b_dh, b_dv, input_precision=PRECISION)
    d_dv.store([i_b, i_h, i_r * BT, i_v], b_dv.to(d_dv.dtype).reshape(1, 1, BT, BV))


def forward(plan, q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, save):
    """h, c, n, m, then den and s (B·H, N·L) and two empty tensors for the backward."""
    call = _call(plan, q, v, reset, scale, normalize)
    q, k, v = aligned(q), aligned(k), aligned(v)
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        cs, ns, c_last, n_last = states(call, plan, k, v, gates.alpha, gates.alpha, gates.gamma, c, n, reverse=False)
        p, den, s = intra(call, plan, q, k, ns, gates, eps)
        h = outputs(call, plan, q, v, p, cs, gates.beta, den)
    saved = [den, s] if save else []
    return h, c_last, n_last, gates.last_m, *saved, *(den.new_empty(0) for _ in range(4 - len(saved)))


def backward(plan, grads, q, k, v, log_i, log_f, c, n, m, reset, h, den, s, cs, ns, scale, normalize, eps):
    """dq, dk, dv, dlog_i, dlog_f, dc, dn of the gradients (dh, dc, dn) of h and of the last memory."""
    (dh, dc, dn), call = grads, _call(plan, q, v, reset, scale, normalize)
    q, k, v, h, dh = (aligned(x) for x in (q, k, v, h, dh))
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        p, g, w, wn = intra_backward(call, plan, q, k, v, h, dh, gates, den, s)
        cs, ns, _, _ = states(call, plan, k, v, gates.alpha, gates.alpha, gates.gamma, c, n, reverse=False)
        dcs, dns, dc, dn = states(call, plan, q, dh, w, wn, gates.gamma, dc, dn, reverse=True)
        dq, dk, sums = queries_and_keys(call, plan, q, k, v, dh, g, (cs, dcs, ns, dns), gates, w, wn)
        del cs, g
        dv = values(call, plan, k, v, dh, p, dcs, gates.alpha)
        dlog_i, dlog_f = call.gate_gradients(log_i, *sums, plan.L)
    return dq, dk, dv, dlog_i, dlog_f, dc, dn


def _call(plan, q, v, reset, scale, normalize):
    return Call(q, v, reset, scale, normalize, plan.L, -(-q.shape[1] // plan.L))


def _blocks(call, plan):
    """Blocks of rows in all sequences together."""
    return call.tokens // plan.BT


def _options(call, plan, tiles, *names):
    """What every matrix kernel is compiled for."""
    chosen = {key: value for key, value in tiles._asdict().items() if not names or key in names}
    return {"L": plan.L, "BT": plan.BT, "DOT": call.dot, "PRECISION": call.precision, **chosen}


def states(call, plan, x, y, w, wn, gamma, c, n, reverse):
    """Memories before every chunk (B·H·N, K, V), (B·H·N, K), and after the last; from the last to the first in reverse."""
    tiles = plan.states
    BT, BK, BV = plan.BT, tiles.BK, tiles.BV
    cs = padded(x, (call.rows * call.N, call.K, call.V), call.dtype)
    ns = call.vector(x, call.rows * call.N, call.K)
    c_last = call.vector(x, call.rows, call.K, call.V)
    n_last = call.vector(x, call.rows, call.K)
    empty = c is None
    mlstm_states_kernel[(call.rows * cdiv(call.K, BK) * cdiv(call.V, BV),)](
        heads(x, BT, BK), heads(y, BT, BV), matrices(cs, BK, BV), w, wn, gamma,
        gamma if empty else c.contiguous(), gamma if empty else n.contiguous(), ns, c_last, n_last, call.H, call.N, call.K, call.V,
        **_options(call, plan, tiles), REVERSE=reverse, EMPTY=empty,
    )  # fmt: skip
    return cs, ns, c_last, n_last


def intra(call, plan, q, k, ns, gates, eps):
    """P, the denominator, and the sum in it where it counts."""
    tiles = plan.intra
    L, BT, BK = plan.L, plan.BT, tiles.BK
    p = padded(q, (call.rows, call.N * L, L), call.dtype)
    den, s = call.vector(ns), call.vector(ns)
    mlstm_intra_kernel[(_blocks(call, plan),)](
        heads(q, BT, BK), heads(k, BT, BK), matrices(p, BT, BT), ns, *gates[:4], gates.beta, gates.floor, gates.document,
        den, s, call.H, call.N, call.K, call.scale, eps, **_options(call, plan, tiles, "BK", "num_warps", "STAGES"),
        **call.flags, PAIR=call.pair,
    )  # fmt: skip
    return p, den, s


def outputs(call, plan, q, v, p, cs, beta, den):
    """h (B, T, H, V)."""
    tiles = plan.outputs
    BT, BK, BV = plan.BT, tiles.BK, tiles.BV
    h = padded(v, v.shape)
    mlstm_outputs_kernel[(_blocks(call, plan) * cdiv(call.V, BV),)](
        heads(q, BT, BK), heads(v, BT, BV), matrices(p, BT, BT), matrices(cs, BK, BV), heads(h, BT, BV), beta, den,
        call.H, call.N, call.K, call.V, call.scale, **_options(call, plan, tiles),
    )  # fmt: skip
    return h.contiguous()


def intra_backward(call, plan, q, k, v, h, dh, gates, den, s):
    """P / den, a dS, and the weights w and w_n of every token in dC and dn."""
    tiles = plan.intra_backward
    L, BT, BK, BV = plan.L, plan.BT, tiles.BK, tiles.BV
    p, g = (padded(q, (call.rows, call.N * L, L), call.dtype) for _ in range(2))
    w, wn = call.vector(den), call.vector(den)
    mlstm_intra_backward_kernel[(_blocks(call, plan),)](
        heads(q, BT, BK), heads(k, BT, BK), heads(v, BT, BV), heads(h, BT, BV), heads(dh, BT, BV),
        matrices(p, BT, BT), matrices(g, BT, BT), *gates[:4], gates.beta, gates.document, den, s, w, wn,
        call.H, call.N, call.K, call.V, call.scale, **_options(call, plan, tiles), **call.flags, PAIR=call.pair,
    )  # fmt: skip
    return p, g, w, wn


def queries_and_keys(call, plan, q, k, v, dh, g, memories, gates, w, wn):
    """dq, dk, and the sums that the gates' gradients are made of."""
    (cs, dcs, ns, dns), tiles = memories, plan.dqdk
    BT, BK, BV = plan.BT, tiles.BK, tiles.BV
    dq, dk, count = padded(q, q.shape), padded(k, k.shape), cdiv(call.K, BK)
    qdq, kdk = (call.vector(w, count, call.tokens) for _ in range(2))
    inflow = call.vector(w, count, call.tokens // BT)
    mlstm_dqdk_kernel[(_blocks(call, plan) * count,)](
        heads(q, BT, BK), heads(k, BT, BK), heads(v, BT, BV), heads(dh, BT, BV), matrices(g, BT, BT),
        matrices(cs, BK, BV), matrices(dcs, BK, BV), heads(dq, BT, BK), heads(dk, BT, BK), ns, dns,
        gates.alpha, w, wn, gates.gamma, qdq, kdk, inflow, call.H, call.N, call.K, call.V, call.tokens,
        **_options(call, plan, tiles),
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), (qdq, kdk, inflow)


def values(call, plan, k, v, dh, p, dcs, alpha):
    """dv (B, T, H, V)."""
    tiles = plan.dv
    BT, BK, BV = plan.BT, tiles.BK, tiles.BV
    dv = padded(v, v.shape)
    mlstm_dv_kernel[(_blocks(call, plan) * cdiv(call.V, BV),)](
        heads(k, BT, BK), heads(dh, BT, BV), matrices(p, BT, BT), matrices(dcs, BK, BV), heads(dv, BT, BV),
        alpha, call.H, call.N, call.K, call.V, **_options(call, plan, tiles),
    )  # fmt: skip
    return dv.contiguous()
