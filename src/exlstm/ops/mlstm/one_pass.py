"""The forward of the mLSTM in one pass, for narrow heads: some columns of the memory stay on chip over the whole sequence.

Of what the two passes of two_pass.py move for narrow heads, the memories between chunks are most; here they are never written.
For few columns of K the scores too are worked out on the way; otherwise they come from intra.py.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile
from exlstm.ops.mlstm.intra import intra
from exlstm.ops.mlstm.plan import cdiv, memories
from exlstm.ops.mlstm.segments import starts


@triton.jit
def _scores(b_q, b_k, b_n, b_beta, p_u, p_top, p_floor, p_document, o_t, scale, eps,
            L: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr):  # fmt: skip
    """P = a(QKᵀ)⊙D, the denominators, and the signed sum in them where it is larger than the floor, else 0."""
    o_l = tl.arange(0, L)
    b_p = tl.dot(b_q, b_k.T, input_precision="ieee")
    exponent = tl.load(p_u + o_t)[None, :] - tl.load(p_top + o_t)[:, None]
    seen = o_l[:, None] >= o_l[None, :]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_t)[None, :])
    b_p *= scale * tl.exp2(tl.where(seen, exponent, -float("inf")))
    b_den = tl.load(p_floor + o_t)
    b_s = tl.zeros([L], dtype=tl.float32)
    if NORM:
        b_sum = tl.sum(b_p, 1) + b_beta * tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
        b_s = tl.where(tl.abs(b_sum) > b_den, b_sum, 0.0)
        b_den = tl.maximum(tl.abs(b_sum), b_den) + eps
    return b_p, b_den, b_s


@triton.jit
def _segment(i_row, S, N, CUT: tl.constexpr):
    """Sequence and head of a row, the chunk where it begins, and whether it is final: another's end is a start, stored there."""
    i_bh, i_first, final = i_row, 0, True
    if CUT:
        i_bh, i_first, final = i_row // S, (i_row % S).to(tl.int32) * N, i_row % S == S - 1
    return i_bh, i_first, final


@triton.jit(do_not_specialize=["S", "N"])
def mlstm_forward_kernel(d_q, d_k, d_v, d_p, d_h, p_c0, p_n0, p_c_last, p_n, p_u, p_top, p_floor, p_document, p_alpha, p_beta,
                         p_gamma, p_den, p_s, p_cs, H, S, N, K, V, s_c, scale, eps, CUT: tl.constexpr,
                         L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr, SCORES: tl.constexpr,
                         NORM: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h of BV columns, the last memory and that before every EVERY-th chunk; with SCORES, P, den and s are not read but found."""
    tiles = tl.cdiv(V, BV)
    i_row, i_v = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BV
    i_bh, i_first, final = _segment(i_row, S, N, CUT)
    # n and the last memory stand with those of the sequence.
    p_n, p_c_last = p_n + (i_bh - i_row) * K, p_c_last + (i_bh - i_row) * K * V
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_l = tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, L)
    o_c = i_row * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c, b_n = tl.load(p_c0 + o_c, mask=inside, other=0.0), tl.load(p_n0 + i_row * K + o_k, mask=o_k < K, other=0.0)
    for i_n in tl.range(0, N, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, (i_first + i_n) * L, 0, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, (i_first + i_n) * L, 0, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, (i_first + i_n) * L, i_v, L, BV, DOT)
        o_t = (i_row * N + i_n) * L + o_l
        if EVERY and i_n % EVERY == 0:
            o_s = ((i_row * N + i_n) // EVERY * K + o_k[:, None]) * s_c + o_v[None, :]
            tl.store(p_cs + o_s, b_c.to(DOT), mask=inside)
        b_beta = scale * tl.load(p_beta + o_t)
        if SCORES:
            b_p, b_den, b_s = _scores(
                b_q, b_k, b_n, b_beta, p_u, p_top, p_floor, p_document, o_t, scale, eps, L, NORM, RESET
            )
            b_p = b_p.to(DOT)
            if i_v == 0:
                tl.store(p_n + (i_row * (N + 1) + i_n) * K + o_k, b_n, mask=o_k < K)
                tl.store(p_s + o_t, b_s)
                tl.store(p_den + o_t, b_den)
        else:
            b_p = d_p.load([i_bh.to(tl.int32), (i_first + i_n) * L, 0]).reshape(L, L)
            b_den = tl.load(p_den + o_t)
        b_h = tl.dot(b_q, b_c.to(DOT), input_precision="ieee") * b_beta[:, None]
        b_h = tl.dot(b_p, b_v, b_h, input_precision="ieee") * (1.0 / b_den)[:, None]
        d_h.store([i_b, i_h, (i_first + i_n) * L, i_v], b_h.to(d_h.dtype).reshape(1, 1, L, BV))
        b_c *= tl.load(p_gamma + i_row * N + i_n)
        b_w = tl.load(p_alpha + o_t)[:, None]
        if SCORES:
            b_n = b_n * tl.load(p_gamma + i_row * N + i_n) + tl.sum(b_k.to(tl.float32) * b_w, 0)
        # The weights go where there are fewer numbers.
        if BK <= BV:
            b_c = tl.dot((b_k.to(tl.float32) * b_w).to(DOT).T, b_v, b_c, input_precision="ieee")
        else:
            b_c = tl.dot(b_k.T, (b_v.to(tl.float32) * b_w).to(DOT), b_c, input_precision="ieee")
    tl.store(p_c_last + o_c, b_c, mask=inside & final)
    if SCORES:
        tl.store(p_n + (i_row * (N + 1) + N) * K + o_k, b_n, mask=(o_k < K) & (i_v == 0) & final)


def forward(plan, call, q, k, v, gates, c, n, eps, every):
    """h, the last C, n of every chunk, den and s, and C before every `every`-th chunk, of none where 0."""
    L, S, (BK, BV, *_) = plan.L, plan.S, plan.forward
    if plan.SCORES:
        ns = call.vector(n, call.rows, call.N + 1, call.K)
        p, den, s = padded(ns, (1, 1, L), call.dtype), call.vector(ns), call.vector(ns)
    else:
        ns = call.normalisers(k, gates, n)
        p, den, s = intra(call, plan, q, k, ns, gates, eps)
    cs = (
        c.new_empty(memories(call.rows * call.N // every, call.K, call.V, call.dtype), dtype=call.dtype)
        if every
        else None
    )
    c, n = starts(call, S, k, v, gates, (c, n))
    h, c_last = padded(v, v.shape), call.vector(den, call.rows, call.K, call.V)
    mlstm_forward_kernel[(call.rows * S * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), matrices(p, L, L), heads(h, L, BV), c, n,
        c_last, ns, gates.u, gates.top, gates.floor, gates.document, gates.alpha, gates.beta, gates.gamma, den, s,
        h if cs is None else cs, call.H, S, call.N // S, call.K, call.V, 0 if cs is None else cs.stride(1), call.scale, eps,
        L=L, EVERY=every, SCORES=plan.SCORES, CUT=S > 1, DOT=call.dot, **call.flags, **plan.forward._asdict(),
    )  # fmt: skip
    return h.contiguous(), c_last, ns, den, s, cs
