"""The mLSTM in two passes: memories from chunk to chunk, then every chunk by itself, forward and backward. Any widths of heads.

    states       C⁻ of every chunk, forward; dC⁺, backward                   (sequential over chunks, parallel over tiles of C)
    outputs      h = (P V + a β ⊙ Q C⁻) / den
    dq, dk, dv   their gradients; row sums for the gates' gradients from the float32 accumulators

What happens inside the chunks (P, dS) comes from intra.py. A chunk of L tokens is worked on in blocks of BT rows, against
blocks of BJ tokens. Tensors of four axes are descriptors
(B, H, T, features), so any strides will do, tails are zeros, and Hopper's copy engine brings the tiles. Vectors are (B·H, N·L),
chunk memories (B·H·N, K, V). No kernel uses atomics: same inputs, same bits.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile
from exlstm.ops.mlstm.intra import intra, intra_backward
from exlstm.ops.mlstm.plan import cdiv, memories


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
                         L: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                         DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h = (P V + a β ⊙ Q C⁻) / den of BT rows and BV columns."""
    tiles, blocks = tl.cdiv(V, BV), L // BT
    i_v, i_x = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_b, i_h = i_r // blocks, (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_h = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
        b_c = d_c.load([(i_bh * N + i_n).to(tl.int32), i_k, i_v]).reshape(BK, BV)
        b_h = tl.dot(b_q, b_c, b_h, input_precision=PRECISION)
    b_h *= (scale * tl.load(p_beta + o_t))[:, None]
    for i_j in tl.range(0, (i_r % blocks + 1) * BT, BJ, num_stages=STAGES):
        b_p = d_p.load([i_bh.to(tl.int32), i_r * BT, i_j]).reshape(BT, BJ)
        b_v = tile(d_v, i_b, i_h, i_n * L + i_j, i_v, BJ, BV, DOT)
        b_h = tl.dot(b_p, b_v, b_h, input_precision=PRECISION)
    b_h *= (1.0 / tl.load(p_den + o_t))[:, None]
    d_h.store([i_b, i_h, i_r * BT, i_v], b_h.to(d_h.dtype).reshape(1, 1, BT, BV))


@triton.jit(do_not_specialize=["N"])
def mlstm_dq_kernel(d_q, d_k, d_dh, d_g, d_c, d_dq, p_n, p_w, p_wn, p_qdq, H, N, K, V, rows,
                    L: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq of BT rows and BK columns, and their part of q·dq (tiles, B·H·N·L)."""
    tiles, blocks = tl.cdiv(K, BK), L // BT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_b, i_h = i_r // blocks, (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_t = i_k * BK + tl.arange(0, BK), i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        b_dh = tile(d_dh, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
        b_c = d_c.load([(i_bh * N + i_n).to(tl.int32), i_k * BK, i_v]).reshape(BK, BV)
        b_dq = tl.dot(b_dh, b_c.T, b_dq, input_precision=PRECISION)
    b_n = tl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
    b_dq = b_dq * tl.load(p_w + o_t)[:, None] + tl.load(p_wn + o_t)[:, None] * b_n[None, :]
    for i_j in tl.range(0, (i_r % blocks + 1) * BT, BJ, num_stages=STAGES):
        b_g = d_g.load([i_bh.to(tl.int32), i_r * BT, i_j]).reshape(BT, BJ)
        b_k = tile(d_k, i_b, i_h, i_n * L + i_j, i_k * BK, BJ, BK, DOT)
        b_dq = tl.dot(b_g, b_k, b_dq, input_precision=PRECISION)
    b_q = tile(d_q, i_b, i_h, i_r * BT, i_k * BK, BT, BK, tl.float32)
    tl.store(p_qdq + i_k.to(tl.int64) * rows + o_t, tl.sum(b_q * b_dq, 1))
    d_dq.store([i_b, i_h, i_r * BT, i_k * BK], b_dq.to(d_dq.dtype).reshape(1, 1, BT, BK))


@triton.jit(do_not_specialize=["N"])
def mlstm_dk_kernel(d_q, d_k, d_v, d_g, d_c, d_dc, d_dk, p_n, p_dn, p_alpha, p_gamma, p_kdk, p_inflow, H, N, K, V, rows,
                    L: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dk of BT rows and BK columns; their parts of k·dk (tiles, B·H·N·L) and of <C⁺, dC⁺> + <n⁺, dn⁺> (tiles, B·H·N·L/BT)."""
    tiles, blocks = tl.cdiv(K, BK), L // BT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_b, i_h = i_r // blocks, (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    i_c = (i_bh * N + i_n).to(tl.int32)
    o_k, o_t = i_k * BK + tl.arange(0, BK), i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_dn = tl.load(p_dn + (i_bh * (N + 1) + i_n + 1) * K + o_k, mask=o_k < K, other=0.0)
    # <C⁺, dC⁺> = γ <C⁻, dC⁺> + Σ_j k_j · (what dk_j has from dC⁺), and so for n; the chunk's first block of rows counts C⁻.
    b_inflow = 0.0
    if i_r % blocks == 0:
        b_cdc = b_dn * tl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
        for i_v in tl.range(0, V, BV, num_stages=STAGES):
            b_c = d_c.load([i_c, i_k * BK, i_v]).reshape(BK, BV).to(tl.float32)
            b_cdc += tl.sum(b_c * d_dc.load([i_c, i_k * BK, i_v]).reshape(BK, BV).to(tl.float32), 1)
        b_inflow = tl.load(p_gamma + i_bh * N + i_n) * tl.sum(b_cdc, 0)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        b_v = tile(d_v, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
        b_dc = d_dc.load([i_c, i_k * BK, i_v]).reshape(BK, BV)
        b_dk = tl.dot(b_v, b_dc.T, b_dk, input_precision=PRECISION)
    b_dk = (b_dk + b_dn[None, :]) * tl.load(p_alpha + o_t)[:, None]
    b_k = tile(d_k, i_b, i_h, i_r * BT, i_k * BK, BT, BK, tl.float32)
    b_inflow += tl.sum(tl.sum(b_k * b_dk, 1), 0)
    tl.store(p_inflow + (i_k.to(tl.int64) * rows + i_bh * N * L) // BT + i_r, b_inflow)
    for i_j in tl.range((i_r % blocks) * BT, L, BJ, num_stages=STAGES):
        b_g = d_g.load([i_bh.to(tl.int32), i_n * L + i_j, (i_r % blocks) * BT]).reshape(BJ, BT)
        b_q = tile(d_q, i_b, i_h, i_n * L + i_j, i_k * BK, BJ, BK, DOT)
        b_dk = tl.dot(b_g.T, b_q, b_dk, input_precision=PRECISION)
    b_k = tile(d_k, i_b, i_h, i_r * BT, i_k * BK, BT, BK, tl.float32)
    tl.store(p_kdk + i_k.to(tl.int64) * rows + o_t, tl.sum(b_k * b_dk, 1))
    d_dk.store([i_b, i_h, i_r * BT, i_k * BK], b_dk.to(d_dk.dtype).reshape(1, 1, BT, BK))


@triton.jit(do_not_specialize=["N"])
def mlstm_dv_kernel(d_k, d_dh, d_p, d_dc, d_dv, p_alpha, H, N, K, V,
                    L: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dv = (P / den)ᵀ dh + α ⊙ (K dC⁺) of BT rows and BV columns."""
    tiles, blocks = tl.cdiv(V, BV), L // BT
    i_v, i_x = (tl.program_id(0) % tiles) * BV, tl.program_id(0) // tiles
    i_bh, i_r = (i_x // (N * blocks)).to(tl.int64), i_x % (N * blocks)
    i_n, i_b, i_h = i_r // blocks, (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = i_bh * N * L + i_r * BT + tl.arange(0, BT)
    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_k = tile(d_k, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
        b_dc = d_dc.load([(i_bh * N + i_n).to(tl.int32), i_k, i_v]).reshape(BK, BV)
        b_dv = tl.dot(b_k, b_dc, b_dv, input_precision=PRECISION)
    b_dv *= tl.load(p_alpha + o_t)[:, None]
    for i_j in tl.range((i_r % blocks) * BT, L, BJ, num_stages=STAGES):
        b_p = d_p.load([i_bh.to(tl.int32), i_n * L + i_j, (i_r % blocks) * BT]).reshape(BJ, BT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L + i_j, i_v, BJ, BV, DOT)
        b_dv = tl.dot(b_p.T, b_dh, b_dv, input_precision=PRECISION)
    d_dv.store([i_b, i_h, i_r * BT, i_v], b_dv.to(d_dv.dtype).reshape(1, 1, BT, BV))


def forward(plan, call, q, k, v, gates, c, n, eps, every):
    """h, the last C, n of every chunk, den and s, and C at the start of every chunk whatever `every` says."""
    ns = call.normalisers(k, gates, n)
    cs, c_last = states(call, plan, k, v, gates.alpha, gates.gamma, c)
    p, den, s = intra(call, plan, q, k, ns, gates, eps)
    return outputs(call, plan, q, v, p, cs, gates.beta, den), c_last, ns, den, s, cs


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    (dh, dc, dn), (h, den, s, ns, cs, _) = grads, saved
    p, g, w, wn, sums = intra_backward(call, plan, q, k, v, h, dh, gates, den, s)
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    if cs is None:
        cs, _ = states(call, plan, k, v, gates.alpha, gates.gamma, c)
    dq, qdq = queries(call, plan, q, k, dh, g, cs, ns, w, wn)
    dcs, dc = states(call, plan, q, dh, w, gates.gamma, dc, reverse=True)
    dk, kdk, inflow = keys(call, plan, q, k, v, g, (cs, dcs, ns, dns), gates)
    del cs, g
    return dq, dk, values(call, plan, k, v, dh, p, dcs, gates.alpha), (qdq, kdk, inflow), dc, dns[:, 0].clone()


def states(call, plan, x, y, w, gamma, start, reverse=False):
    """C before every chunk (B·H·N, K, V) and after the last, of keys x, values y and weights w; in reverse dC."""
    tiles, empty, BT = plan.states, start is None, plan.BJ
    BK, BV = tiles.BK, tiles.BV
    cs = x.new_empty(memories(call.rows * call.N, call.K, call.V, call.dtype), dtype=call.dtype)
    last = call.vector(w, call.rows, call.K, call.V)
    mlstm_states_kernel[(call.rows * cdiv(call.K, BK) * cdiv(call.V, BV),)](
        heads(x, BT, BK), heads(y, BT, BV), matrices(cs, BK, BV), w, gamma, gamma if empty else start.contiguous(), last,
        call.H, call.N, call.K, call.V, L=plan.L, BT=BT, REVERSE=reverse, EMPTY=empty, **_options(call, tiles),
    )  # fmt: skip
    return cs, last


def outputs(call, plan, q, v, p, cs, beta, den):
    """h (B, T, H, V)."""
    BT, BJ, (BK, BV, *_) = plan.BT, plan.BJ, plan.outputs
    h = padded(v, v.shape)
    mlstm_outputs_kernel[(call.tokens // BT * cdiv(call.V, BV),)](
        heads(q, BT, BK), heads(v, BJ, BV), matrices(p, BT, BJ), matrices(cs, BK, BV), heads(h, BT, BV), beta, den,
        call.H, call.N, call.K, call.V, call.scale, L=plan.L, BT=BT, BJ=BJ, **_options(call, plan.outputs),
    )  # fmt: skip
    return h.contiguous()


def queries(call, plan, q, k, dh, g, cs, ns, w, wn):
    """dq (B, T, H, K), and q·dq (tiles of K, B·H·N·L)."""
    BT, BJ, (BK, BV, *_) = plan.BT, plan.BJ, plan.dq
    dq, qdq = padded(q, q.shape), call.vector(w, cdiv(call.K, BK), call.tokens)
    mlstm_dq_kernel[(call.tokens // BT * cdiv(call.K, BK),)](
        heads(q, BT, BK), heads(k, BJ, BK), heads(dh, BT, BV), matrices(g, BT, BJ), matrices(cs, BK, BV), heads(dq, BT, BK),
        ns, w, wn, qdq, call.H, call.N, call.K, call.V, call.tokens, L=plan.L, BT=BT, BJ=BJ, **_options(call, plan.dq),
    )  # fmt: skip
    return dq.contiguous(), qdq


def keys(call, plan, q, k, v, g, memories, gates):
    """dk (B, T, H, K), k·dk (tiles of K, B·H·N·L), and the inflow (tiles of K, blocks of BT rows)."""
    (cs, dcs, ns, dns), BT, BJ, (BK, BV, *_) = memories, plan.BT, plan.BJ, plan.dk
    count, dk = cdiv(call.K, BK), padded(k, k.shape)
    kdk, inflow = call.vector(ns, count, call.tokens), call.vector(ns, count, call.tokens // BT)
    mlstm_dk_kernel[(call.tokens // BT * count,)](
        heads(q, BJ, BK), heads(k, BT, BK), heads(v, BT, BV), matrices(g, BJ, BT), matrices(cs, BK, BV), matrices(dcs, BK, BV),
        heads(dk, BT, BK), ns, dns, gates.alpha, gates.gamma, kdk, inflow, call.H, call.N, call.K, call.V, call.tokens,
        L=plan.L, BT=BT, BJ=BJ, **_options(call, plan.dk),
    )  # fmt: skip
    return dk.contiguous(), kdk, inflow


def values(call, plan, k, v, dh, p, dcs, alpha):
    """dv (B, T, H, V)."""
    BT, BJ, (BK, BV, *_) = plan.BT, plan.BJ, plan.dv
    dv = padded(v, v.shape)
    mlstm_dv_kernel[(call.tokens // BT * cdiv(call.V, BV),)](
        heads(k, BT, BK), heads(dh, BJ, BV), matrices(p, BJ, BT), matrices(dcs, BK, BV), heads(dv, BT, BV),
        alpha, call.H, call.N, call.K, call.V, L=plan.L, BT=BT, BJ=BJ, **_options(call, plan.dv),
    )  # fmt: skip
    return dv.contiguous()


def _options(call, tiles):
    return {"DOT": call.dot, "PRECISION": call.precision, **tiles._asdict()}
