"""What happens inside the chunks of the mLSTM, all of them at once: P = a(QKᵀ)⊙D, and the denominator of every token.

The equations stand in `cpu.py`; n of every chunk is known before.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile


@triton.jit
def decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_j, RESET: tl.constexpr, PAIR: tl.constexpr):
    """D (rows, columns) = 2^(u_j - M_t) for tokens o_t and o_j of one chunk, 0 in the future and across a reset."""
    exponent = tl.load(p_u + o_j)[None, :] - tl.load(p_top + o_t)[:, None]
    if PAIR:
        exponent += tl.load(p_u_low + o_j)[None, :] - tl.load(p_top_low + o_t)[:, None]
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_j)[None, :])
    return tl.exp2(tl.where(seen, exponent, -float("inf")))


@triton.jit
def decay_transposed(p_u, p_top, p_u_low, p_top_low, p_document, o_j, o_t, RESET: tl.constexpr, PAIR: tl.constexpr):
    """Dᵀ (tokens o_j, tokens o_t)."""
    exponent = tl.load(p_u + o_j)[:, None] - tl.load(p_top + o_t)[None, :]
    if PAIR:
        exponent += tl.load(p_u_low + o_j)[:, None] - tl.load(p_top_low + o_t)[None, :]
    seen = o_t[None, :] >= o_j[:, None]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[None, :] == tl.load(p_document + o_j)[:, None])
    return tl.exp2(tl.where(seen, exponent, -float("inf")))


@triton.jit(do_not_specialize=["N"])
def mlstm_intra_kernel(d_q, d_k, d_p, p_n, p_u, p_top, p_u_low, p_top_low, p_beta, p_floor, p_document, p_den, p_s, H, N, K, scale, eps,
                       L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                       PAIR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """BT rows of P (B·H·N, L, L); den, and the signed s where it is larger than the floor, else 0."""
    i_c, i_r = tl.program_id(0) // (L // BT), (tl.program_id(0) % (L // BT)) * BT
    i_bh, i_n, i_t = i_c // N, i_c % N, (i_c % N) * L
    i_b, i_h, base = i_bh // H, i_bh % H, i_c.to(tl.int64) * L
    o_t = base + i_r + tl.arange(0, BT)
    b_s = tl.zeros([BT], dtype=tl.float32)
    b_qn = tl.zeros([BT], dtype=tl.float32)
    for i_j in tl.static_range(0, L, BT):
        b_p = tl.zeros([BT, BT], dtype=tl.float32)
        if i_j <= i_r:
            for i_k in tl.range(0, K, BK, num_stages=STAGES):
                b_q = tile(d_q, i_b, i_h, i_t + i_r, i_k, BT, BK, DOT)
                b_k = tile(d_k, i_b, i_h, i_t + i_j, i_k, BT, BK, DOT)
                b_p = tl.dot(b_q, b_k.T, b_p, input_precision=PRECISION)
                if NORM and i_j == 0:
                    o_k = i_k + tl.arange(0, BK)
                    b_n = tl.load(p_n + (i_bh.to(tl.int64) * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
                    b_qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
            o_j = base + i_j + tl.arange(0, BT)
            b_p *= scale * decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_j, RESET, PAIR)
            b_s += tl.sum(b_p, 1)
        d_p.store([i_c, i_r, i_j], b_p.to(d_p.dtype).reshape(1, BT, BT))
    b_den = tl.load(p_floor + o_t)
    if NORM:
        b_s += scale * tl.load(p_beta + o_t) * b_qn
        tl.store(p_s + o_t, tl.where(tl.abs(b_s) > b_den, b_s, 0.0))
        b_den = tl.maximum(tl.abs(b_s), b_den) + eps
    tl.store(p_den + o_t, b_den)


def intra(call, plan, q, k, ns, gates, eps):
    """P, the denominator, and the sum in it where it counts."""
    L, BT, (BK, _, warps, stages) = call.L, min(64, call.L), plan.intra
    p, den, s = padded(q, (call.rows * call.N, L, L), call.dtype), call.vector(ns), call.vector(ns)
    mlstm_intra_kernel[(call.tokens // BT,)](
        heads(q, BT, BK), heads(k, BT, BK), matrices(p, BT, BT), ns, *gates[:4], gates.beta, gates.floor, gates.document,
        den, s, call.H, call.N, call.K, call.scale, eps, L=L, BT=BT, BK=BK, PAIR=call.pair, DOT=call.dot,
        PRECISION=call.precision, STAGES=stages, num_warps=warps, **call.flags,
    )  # fmt: skip
    return p, den, s
