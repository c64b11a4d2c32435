"""The mLSTM in two passes: memories from chunk to chunk, then every chunk by itself, forward and backward. Any widths of heads.

    states       C⁻ of every chunk, forward; dC⁺, backward                   (sequential over chunks, parallel over tiles of C)
    outputs      h = (P V + a β ⊙ Q C⁻) / den
    dq, dk, dv   their gradients; row sums for the gates' gradients from the float32 accumulators

The equations stand in `cpu.py`; P and the denominators come from intra.py. Tensors of four axes are descriptors
(B, H, T, features), so any strides will do, tails are zeros, and Hopper's copy engine brings the tiles. Vectors are (B·H, N·L),
chunk memories (B·H·N, K, V). No kernel uses atomics: same inputs, same bits.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile
from exlstm.ops.mlstm.intra import decay, decay_transposed, intra
from exlstm.ops.mlstm.plan import cdiv


@triton.jit(do_not_specialize=["N"])
def mlstm_states_kernel(d_x, d_y, d_c, p_w, p_gamma, p_c0, p_c_last, H, N, K, V,
                        L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
                        EMPTY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The memory at the start of every chunk, C ← γ C + Xᵀ(w ⊙ Y), or its gradient at the end, from the last to the first."""
    tiles_v, tiles = tl.cdiv(V, BV), tl.cdiv(V, BV) * tl.cdiv(K, BK)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_k, i_v = (tl.program_id(0) % tiles) // tiles_v, tl.program_id(0) % tiles_v
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_t = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    p_c0 += i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c = tl.zeros([BK, BV], dtype=tl.float32)
    if not EMPTY:
        b_c += tl.load(p_c0, mask=inside, other=0.0)
    for i in tl.range(0, N * (L // BT), num_stages=STAGES):
        i_t = N * (L // BT) - 1 - i if REVERSE else i
        i_n, starts = i_t // (L // BT), i % (L // BT) == 0
        if starts:
            d_c.store([(i_bh * N + i_n).to(tl.int32), i_k * BK, i_v * BV], b_c.to(d_c.dtype).reshape(1, BK, BV))
        b_x = tile(d_x, i_b, i_h, i_t * BT, i_k * BK, BT, BK, DOT)
        b_y = tile(d_y, i_b, i_h, i_t * BT, i_v * BV, BT, BV, DOT)
        b_gamma = tl.where(starts, tl.load(p_gamma + i_bh * N + i_n), 1.0)
        b_w = tl.load(p_w + i_bh * N * L + i_t * BT + o_t)
        b_y = (b_y.to(tl.float32) * b_w[:, None]).to(DOT)
        b_c = tl.dot(b_x.T, b_y, b_c * b_gamma, input_precision=PRECISION)
    tl.store(p_c_last + i_bh * K * V + o_k[:, None] * V + o_v[None, :], b_c, mask=inside)


@triton.jit(do_not_specialize=["N"])
def mlstm_outputs_kernel(d_q, d_v, d_p, d_c, d_h, p_beta, p_den, H, N, K, V, scale,
                         L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                         STAGES: tl.constexpr):  # fmt: skip
    """h = (P V + a β ⊙ Q C⁻) / den of one chunk and BV columns."""
    tiles = tl.cdiv(V, BV)
    i_v, i_c = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_t = i_c // N, (i_c % N) * L
    i_b, i_h, o_t = i_bh // H, i_bh % H, i_c.to(tl.int64) * L + tl.arange(0, L)
    b_h = tl.zeros([L, BV], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, i_t, i_k, L, BK, DOT)
        b_c = d_c.load([i_c, i_k, i_v]).reshape(BK, BV)
        b_h = tl.dot(b_q, b_c, b_h, input_precision=PRECISION)
    b_h *= (scale * tl.load(p_beta + o_t))[:, None]
    b_p = d_p.load([i_c, 0, 0]).reshape(L, L)
    b_h = tl.dot(b_p, tile(d_v, i_b, i_h, i_t, i_v, L, BV, DOT), b_h, input_precision=PRECISION)
    b_h *= (1.0 / tl.load(p_den + o_t))[:, None]
    d_h.store([i_b, i_h, i_t, i_v], b_h.to(d_h.dtype).reshape(1, 1, L, BV))


@triton.jit(do_not_specialize=["N"])
def mlstm_dq_kernel(d_q, d_k, d_v, d_h, d_dh, d_g, d_c, d_dq, p_n, p_u, p_top, p_u_low, p_top_low, p_document, p_beta, p_den, p_s,
                    p_w, p_sums, p_qdq, H, N, K, V, rows, scale,
                    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                    PAIR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq of one chunk and BK columns, their part of q·dq (tiles, B·H·N·L) and Σ a β ds q (B·H·N, K); a dS, and w = a β / den."""
    tiles = tl.cdiv(K, BK)
    i_k, i_c = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_n, i_t = i_c // N, i_c % N, (i_c % N) * L
    i_b, i_h, o_t = i_bh // H, i_bh % H, i_c.to(tl.int64) * L + tl.arange(0, L)
    o_k = i_k * BK + tl.arange(0, BK)
    b_dq = tl.zeros([L, BK], dtype=tl.float32)
    b_g = tl.zeros([L, L], dtype=tl.float32)
    b_ds = tl.zeros([L], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        b_dh = tile(d_dh, i_b, i_h, i_t, i_v, L, BV, DOT)
        b_v = tile(d_v, i_b, i_h, i_t, i_v, L, BV, DOT)
        b_c = d_c.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_g = tl.dot(b_dh, b_v.T, b_g, input_precision=PRECISION)
        b_dq = tl.dot(b_dh, b_c.T, b_dq, input_precision=PRECISION)
        if NORM:
            b_h = tile(d_h, i_b, i_h, i_t, i_v, L, BV, tl.float32)
            b_ds += tl.sum(b_h * b_dh.to(tl.float32), 1)
    b_part, b_beta = 1.0 / tl.load(p_den + o_t), scale * tl.load(p_beta + o_t)
    if NORM:
        b_s = tl.load(p_s + o_t)
        b_ds *= tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
    b_g = (b_g * b_part[:, None] + b_ds[:, None]) * scale
    b_g *= decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_t, RESET, PAIR)
    b_w = b_beta * b_part
    if i_k == 0:
        d_g.store([i_c, 0, 0], b_g.to(d_g.dtype).reshape(1, L, L))
        tl.store(p_w + o_t, b_w)
    b_wn = b_beta * b_ds
    b_n = tl.load(p_n + (i_bh.to(tl.int64) * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
    b_dq = b_dq * b_w[:, None] + b_wn[:, None] * b_n[None, :]
    b_dq = tl.dot(b_g.to(DOT), tile(d_k, i_b, i_h, i_t, i_k * BK, L, BK, DOT), b_dq, input_precision=PRECISION)
    b_q = tile(d_q, i_b, i_h, i_t, i_k * BK, L, BK, tl.float32)
    tl.store(p_sums + i_c.to(tl.int64) * K + o_k, tl.sum(b_q * b_wn[:, None], 0), mask=o_k < K)
    tl.store(p_qdq + i_k.to(tl.int64) * rows + o_t, tl.sum(b_q * b_dq, 1))
    d_dq.store([i_b, i_h, i_t, i_k * BK], b_dq.to(d_dq.dtype).reshape(1, 1, L, BK))


@triton.jit(do_not_specialize=["N"])
def mlstm_dk_kernel(d_q, d_k, d_v, d_g, d_c, d_dc, d_dk, p_n, p_dn, p_alpha, p_gamma, p_kdk, p_inflow, H, N, K, V, rows,
                    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """dk of one chunk and BK columns; their parts of k·dk (tiles, B·H·N·L) and of <C⁺, dC⁺> + <n⁺, dn⁺> (tiles, B·H·N)."""
    tiles = tl.cdiv(K, BK)
    i_k, i_c = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_n, i_t = i_c // N, i_c % N, (i_c % N) * L
    i_b, i_h, o_t = i_bh // H, i_bh % H, i_c.to(tl.int64) * L + tl.arange(0, L)
    o_k = i_k * BK + tl.arange(0, BK)
    o_n = (i_bh.to(tl.int64) * (N + 1) + i_n) * K + o_k
    b_dn = tl.load(p_dn + o_n + K, mask=o_k < K, other=0.0)
    b_cdc = b_dn * tl.load(p_n + o_n, mask=o_k < K, other=0.0)
    b_dk = tl.zeros([L, BK], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        b_v = tile(d_v, i_b, i_h, i_t, i_v, L, BV, DOT)
        b_c = d_c.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_dc = d_dc.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_dk = tl.dot(b_v, b_dc.T, b_dk, input_precision=PRECISION)
        b_cdc += tl.sum(b_c.to(tl.float32) * b_dc.to(tl.float32), 1)
    b_dk = (b_dk + b_dn[None, :]) * tl.load(p_alpha + o_t)[:, None]
    # <C⁺, dC⁺> = γ <C⁻, dC⁺> + Σ_j k_j · (what dk_j has from dC⁺), and so for n.
    b_k = tile(d_k, i_b, i_h, i_t, i_k * BK, L, BK, tl.float32)
    b_inflow = tl.load(p_gamma + i_c) * tl.sum(b_cdc, 0) + tl.sum(tl.sum(b_k * b_dk, 1), 0)
    tl.store(p_inflow + i_k * (rows // L) + i_c, b_inflow)
    b_g = d_g.load([i_c, 0, 0]).reshape(L, L)
    b_dk = tl.dot(b_g.T, tile(d_q, i_b, i_h, i_t, i_k * BK, L, BK, DOT), b_dk, input_precision=PRECISION)
    tl.store(p_kdk + i_k.to(tl.int64) * rows + o_t, tl.sum(b_k * b_dk, 1))
    d_dk.store([i_b, i_h, i_t, i_k * BK], b_dk.to(d_dk.dtype).reshape(1, 1, L, BK))


@triton.jit(do_not_specialize=["N"])
def mlstm_dv_kernel(d_q, d_k, d_dh, d_dc, d_dv, p_u, p_top, p_u_low, p_top_low, p_document, p_alpha, p_den, H, N, K, V, scale,
                    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RESET: tl.constexpr, PAIR: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dv = (P / den)ᵀ dh + α ⊙ (K dC⁺) of one chunk and BV columns."""
    tiles = tl.cdiv(V, BV)
    i_v, i_c = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_t = i_c // N, (i_c % N) * L
    i_b, i_h, o_t = i_bh // H, i_bh % H, i_c.to(tl.int64) * L + tl.arange(0, L)
    b_dv = tl.zeros([L, BV], dtype=tl.float32)
    b_p = tl.zeros([L, L], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, i_t, i_k, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_t, i_k, L, BK, DOT)
        b_dc = d_dc.load([i_c, i_k, i_v]).reshape(BK, BV)
        b_p = tl.dot(b_k, b_q.T, b_p, input_precision=PRECISION)
        b_dv = tl.dot(b_k, b_dc, b_dv, input_precision=PRECISION)
    b_p *= (scale / tl.load(p_den + o_t))[None, :]
    b_p *= decay_transposed(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_t, RESET, PAIR)
    b_dv *= tl.load(p_alpha + o_t)[:, None]
    b_dv = tl.dot(b_p.to(DOT), tile(d_dh, i_b, i_h, i_t, i_v, L, BV, DOT), b_dv, input_precision=PRECISION)
    d_dv.store([i_b, i_h, i_t, i_v], b_dv.to(d_dv.dtype).reshape(1, 1, L, BV))


def forward(plan, call, q, k, v, gates, c, n, eps):
    """h, the last C, n of every chunk, den and s."""
    ns = call.normalisers(k, gates, n)
    cs, c_last = states(call, plan, k, v, gates.alpha, gates.gamma, c)
    p, den, s = intra(call, plan, q, k, ns, gates, eps)
    return outputs(call, plan, q, v, p, cs, gates.beta, den), c_last, ns, den, s


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    (dh, dc, dn), (h, den, s, ns) = grads, saved
    cs, _ = states(call, plan, k, v, gates.alpha, gates.gamma, c)
    dq, g, w, sums, qdq = queries(call, plan, q, k, v, h, dh, cs, ns, gates, den, s)
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    dcs, dc = states(call, plan, q, dh, w, gates.gamma, dc, reverse=True)
    dk, kdk, inflow = keys(call, plan, q, k, v, g, (cs, dcs, ns, dns), gates)
    del cs, g
    return dq, dk, values(call, plan, q, k, v, dh, dcs, gates, den), (qdq, kdk, inflow), dc, dns[:, 0].clone()


def states(call, plan, x, y, w, gamma, start, reverse=False):
    """Memories before every chunk (B·H·N, K, V) and after the last, of keys x, values y and weights w; in reverse their gradients."""
    BT, (BK, BV, *_), empty = plan.BT, plan.states, start is None
    cs, last = padded(x, (call.rows * call.N, call.K, call.V), call.dtype), call.vector(w, call.rows, call.K, call.V)
    mlstm_states_kernel[(call.rows * cdiv(call.K, BK) * cdiv(call.V, BV),)](
        heads(x, BT, BK), heads(y, BT, BV), matrices(cs, BK, BV), w, gamma, gamma if empty else start.contiguous(), last,
        call.H, call.N, call.K, call.V, BT=BT, REVERSE=reverse, EMPTY=empty, **_options(call, plan.states),
    )  # fmt: skip
    return cs, last


def outputs(call, plan, q, v, p, cs, beta, den):
    """h (B, T, H, V)."""
    L, (BK, BV, *_), h = call.L, plan.outputs, padded(v, v.shape)
    mlstm_outputs_kernel[(call.rows * call.N * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(v, L, BV), matrices(p, L, L), matrices(cs, BK, BV), heads(h, L, BV), beta, den,
        call.H, call.N, call.K, call.V, call.scale, **_options(call, plan.outputs),
    )  # fmt: skip
    return h.contiguous()


def queries(call, plan, q, k, v, h, dh, cs, ns, gates, den, s):
    """dq (B, T, H, K), a dS (B·H·N, L, L), w of every token, Σ a β ds q (B·H, N, K) and q·dq (tiles of K, B·H·N·L)."""
    L, (BK, BV, *_), count = call.L, plan.dq, cdiv(call.K, plan.dq.BK)
    dq, g, w = padded(q, q.shape), padded(q, (call.rows * call.N, L, L), call.dtype), call.vector(den)
    sums, qdq = call.vector(den, call.rows, call.N, call.K), call.vector(den, count, call.tokens)
    mlstm_dq_kernel[(call.rows * call.N * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(h, L, BV), heads(dh, L, BV), matrices(g, L, L),
        matrices(cs, BK, BV), heads(dq, L, BK), ns, *gates[:4], gates.document, gates.beta, den, s, w, sums, qdq,
        call.H, call.N, call.K, call.V, call.tokens, call.scale, PAIR=call.pair, **call.flags, **_options(call, plan.dq),
    )  # fmt: skip
    return dq.contiguous(), g, w, sums, qdq


def keys(call, plan, q, k, v, g, memories, gates):
    """dk (B, T, H, K), k·dk (tiles of K, B·H·N·L), and the inflow (tiles of K, chunks)."""
    (cs, dcs, ns, dns), L, (BK, BV, *_) = memories, call.L, plan.dk
    count, dk = cdiv(call.K, BK), padded(k, k.shape)
    kdk, inflow = call.vector(ns, count, call.tokens), call.vector(ns, count, call.rows * call.N)
    mlstm_dk_kernel[(call.rows * call.N * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), matrices(g, L, L), matrices(cs, BK, BV), matrices(dcs, BK, BV),
        heads(dk, L, BK), ns, dns, gates.alpha, gates.gamma, kdk, inflow, call.H, call.N, call.K, call.V, call.tokens,
        **_options(call, plan.dk),
    )  # fmt: skip
    return dk.contiguous(), kdk, inflow


def values(call, plan, q, k, v, dh, dcs, gates, den):
    """dv (B, T, H, V)."""
    L, (BK, BV, *_), dv = call.L, plan.dv, padded(v, v.shape)
    mlstm_dv_kernel[(call.rows * call.N * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(k, L, BK), heads(dh, L, BV), matrices(dcs, BK, BV), heads(dv, L, BV),
        *gates[:4], gates.document, gates.alpha, den, call.H, call.N, call.K, call.V, call.scale,
        RESET=call.flags["RESET"], PAIR=call.pair, **_options(call, plan.dv),
    )  # fmt: skip
    return dv.contiguous()


def _options(call, tiles):
    return {"L": call.L, "DOT": call.dot, "PRECISION": call.precision, **tiles._asdict()}
