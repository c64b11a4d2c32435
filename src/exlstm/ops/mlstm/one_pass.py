"""The mLSTM in one pass: the memory of some columns stays on chip over a sequence, in chunks of L tokens.

What a two-pass kernel (`two_pass.py`, whose letters these are) moves is largely the memories between chunks; here they are written
once a segment of SEGMENT chunks, for the backward. What happens inside the chunks (P, dS) comes from intra.py. A program holds

    forward     C[:, columns of V]      from the first chunk to the last      → h
    dv          dC[:, columns of V]     from the last chunk to the first      → dv, and dC at the end of each segment
    dq          C[columns of K, :]      inside one segment, forward           → dq
    dk          dC[columns of K, :]     inside one segment, backward          → dk, and <C, dC> + <n, dn> at the segment's end

so that no sum crosses programs: no atomics, same inputs, same bits.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile
from exlstm.ops.mlstm.intra import intra, intra_backward
from exlstm.ops.mlstm.plan import cdiv


@triton.jit
def _weighted_product(b_x, b_y, b_w, b_c, DOT: tl.constexpr):
    """b_c + Xᵀ(w ⊙ Y): the weights go where there are fewer numbers."""
    if b_x.shape[1] <= b_y.shape[1]:
        return tl.dot((b_x.to(tl.float32) * b_w[:, None]).to(DOT).T, b_y, b_c, input_precision="ieee")
    return tl.dot(b_x.T, (b_y.to(tl.float32) * b_w[:, None]).to(DOT), b_c, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_forward_kernel(d_q, d_k, d_v, d_p, d_h, d_c, p_c0, p_c_last, p_n, p_u, p_top, p_floor, p_document, p_alpha, p_beta, p_gamma,
                         p_den, p_s, H, N, K, V, SEGMENT, scale, eps,
                         L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SAVE: tl.constexpr, SCORES: tl.constexpr,
                         NORM: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h and the last memory; with SAVE also the memories at the start of every segment and after the last.

    With SCORES, P, den and s are worked out here and not read.
    """
    tiles, slots = tl.cdiv(V, BV), N // SEGMENT + 1
    i_bh, i_v = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BV
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_l = tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, L)
    o_c = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c = tl.load(p_c0 + o_c, mask=inside, other=0.0)
    for i_n in tl.range(0, N, num_stages=STAGES):
        if SAVE:
            if i_n % SEGMENT == 0:
                d_c.store([(i_bh * slots + i_n // SEGMENT).to(tl.int32), 0, i_v], b_c.to(d_c.dtype).reshape(1, BK, BV))
        b_q = tile(d_q, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, i_v, L, BV, DOT)
        o_t = (i_bh * N + i_n) * L + o_l
        b_beta = scale * tl.load(p_beta + o_t)
        if SCORES:
            b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
            exponent = tl.load(p_u + o_t)[None, :] - tl.load(p_top + o_t)[:, None]
            seen = o_l[:, None] >= o_l[None, :]
            if RESET:
                seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_t)[None, :])
            b_s *= scale * tl.exp2(tl.where(seen, exponent, -float("inf")))
            b_p = b_s.to(DOT)
            b_den = tl.load(p_floor + o_t)
            if NORM:
                b_n = tl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
                b_sum = tl.sum(b_s, 1) + b_beta * tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
                if SAVE and i_v == 0:
                    tl.store(p_s + o_t, tl.where(tl.abs(b_sum) > b_den, b_sum, 0.0))
                b_den = tl.maximum(tl.abs(b_sum), b_den) + eps
            if SAVE and i_v == 0:
                tl.store(p_den + o_t, b_den)
        else:
            b_p = d_p.load([i_bh.to(tl.int32), i_n * L, 0]).reshape(L, L)
            b_den = tl.load(p_den + o_t)
        b_h = tl.dot(b_q, b_c.to(DOT), input_precision="ieee") * b_beta[:, None]
        b_h = tl.dot(b_p, b_v, b_h, input_precision="ieee") * (1.0 / b_den)[:, None]
        d_h.store([i_b, i_h, i_n * L, i_v], b_h.to(d_h.dtype).reshape(1, 1, L, BV))
        b_c *= tl.load(p_gamma + i_bh * N + i_n)
        b_c = _weighted_product(b_k, b_v, tl.load(p_alpha + o_t), b_c, DOT)
    tl.store(p_c_last + o_c, b_c, mask=inside)
    if SAVE:
        d_c.store([(i_bh * slots + N // SEGMENT).to(tl.int32), 0, i_v], b_c.to(d_c.dtype).reshape(1, BK, BV))


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_values_kernel(d_q, d_k, d_dh, d_p, d_dv, d_dc, p_dc_last, p_dc0, p_alpha, p_w, p_gamma, H, N, K, V, SEGMENT,
                        L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EMPTY: tl.constexpr, DOT: tl.constexpr,
                        STAGES: tl.constexpr):  # fmt: skip
    """dv of BV columns, dC at the end of every segment, and that of the first memory."""
    tiles = tl.cdiv(V, BV)
    i_bh, i_v = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BV
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_l = tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, L)
    o_c = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_dc = tl.zeros([BK, BV], dtype=tl.float32)
    if not EMPTY:
        b_dc += tl.load(p_dc_last + o_c, mask=inside, other=0.0)
    for i in tl.range(0, N, num_stages=STAGES):
        i_n = N - 1 - i
        if i % SEGMENT == 0:
            i_s = i_bh * (N // SEGMENT) + i_n // SEGMENT
            d_dc.store([i_s.to(tl.int32), 0, i_v], b_dc.to(d_dc.dtype).reshape(1, BK, BV))
        b_q = tile(d_q, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, i_v, L, BV, DOT)
        b_p = d_p.load([i_bh.to(tl.int32), i_n * L, 0]).reshape(L, L)
        o_t = (i_bh * N + i_n) * L + o_l
        b_dv = tl.dot(b_k, b_dc.to(DOT), input_precision="ieee") * tl.load(p_alpha + o_t)[:, None]
        b_dv = tl.dot(b_p.T, b_dh, b_dv, input_precision="ieee")
        d_dv.store([i_b, i_h, i_n * L, i_v], b_dv.to(d_dv.dtype).reshape(1, 1, L, BV))
        b_dc *= tl.load(p_gamma + i_bh * N + i_n)
        b_dc = _weighted_product(b_q, b_dh, tl.load(p_w + o_t), b_dc, DOT)
    tl.store(p_dc0 + o_c, b_dc, mask=inside)


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_queries_kernel(d_q, d_k, d_v, d_dh, d_g, d_c, d_dq, p_n, p_alpha, p_w, p_wn, p_gamma, p_qdq, H, N, K, V, SEGMENT, rows,
                         L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq of BK columns over one segment, and their part of q·dq."""
    tiles, segments = tl.cdiv(K, BK), N // SEGMENT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_s = (i_x // segments).to(tl.int64), i_x % segments
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_l = i_k * BK + tl.arange(0, BK), tl.arange(0, L)
    p_qdq += i_k.to(tl.int64) * rows
    b_c = d_c.load([(i_bh * (segments + 1) + i_s).to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    for i in tl.range(0, SEGMENT, num_stages=STAGES):
        i_n = i_s * SEGMENT + i
        b_k = tile(d_k, i_b, i_h, i_n * L, i_k * BK, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_g = d_g.load([i_bh.to(tl.int32), i_n * L, 0]).reshape(L, L)
        o_t = (i_bh * N + i_n) * L + o_l
        b_n = tl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
        b_dq = tl.dot(b_dh, b_c.to(DOT).T, input_precision="ieee") * tl.load(p_w + o_t)[:, None]
        b_dq += tl.load(p_wn + o_t)[:, None] * b_n[None, :]
        b_dq = tl.dot(b_g, b_k, b_dq, input_precision="ieee")
        b_q = tile(d_q, i_b, i_h, i_n * L, i_k * BK, L, BK, tl.float32)
        tl.store(p_qdq + o_t, tl.sum(b_q * b_dq, 1))
        d_dq.store([i_b, i_h, i_n * L, i_k * BK], b_dq.to(d_dq.dtype).reshape(1, 1, L, BK))
        b_c *= tl.load(p_gamma + i_bh * N + i_n)
        b_c = _weighted_product(b_k, b_v, tl.load(p_alpha + o_t), b_c, DOT)


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_keys_kernel(d_q, d_k, d_v, d_dh, d_g, d_c, d_dc, d_dk, p_n, p_dn, p_alpha, p_w, p_gamma, p_kdk, p_inflow,
                      H, N, K, V, SEGMENT, rows,
                      L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dk of BK columns over one segment, their part of k·dk, and of <C, dC> + <n, dn> at the segment's end."""
    tiles, segments = tl.cdiv(K, BK), N // SEGMENT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_s = (i_x // segments).to(tl.int64), i_x % segments
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_l = i_k * BK + tl.arange(0, BK), tl.arange(0, L)
    p_kdk += i_k.to(tl.int64) * rows
    slot, end = i_bh * segments + i_s, (i_bh * (N + 1) + (i_s + 1) * SEGMENT) * K + o_k
    b_dc = d_dc.load([slot.to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    b_c = d_c.load([(slot + i_bh + 1).to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    b_ndn = tl.load(p_n + end, mask=o_k < K, other=0.0) * tl.load(p_dn + end, mask=o_k < K, other=0.0)
    tl.store(p_inflow + i_k * (rows // (SEGMENT * L)) + slot, tl.sum(tl.sum(b_c * b_dc, 1) + b_ndn, 0))
    for i in tl.range(0, SEGMENT, num_stages=STAGES):
        i_n = (i_s + 1) * SEGMENT - 1 - i
        b_q = tile(d_q, i_b, i_h, i_n * L, i_k * BK, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_g = d_g.load([i_bh.to(tl.int32), i_n * L, 0]).reshape(L, L)
        o_t = (i_bh * N + i_n) * L + o_l
        b_dn = tl.load(p_dn + (i_bh * (N + 1) + i_n + 1) * K + o_k, mask=o_k < K, other=0.0)
        b_dk = tl.dot(b_v, b_dc.to(DOT).T, input_precision="ieee") + b_dn[None, :]
        b_dk = tl.dot(b_g.T, b_q, b_dk * tl.load(p_alpha + o_t)[:, None], input_precision="ieee")
        b_k = tile(d_k, i_b, i_h, i_n * L, i_k * BK, L, BK, tl.float32)
        tl.store(p_kdk + o_t, tl.sum(b_k * b_dk, 1))
        d_dk.store([i_b, i_h, i_n * L, i_k * BK], b_dk.to(d_dk.dtype).reshape(1, 1, L, BK))
        b_dc *= tl.load(p_gamma + i_bh * N + i_n)
        b_dc = _weighted_product(b_q, b_dh, tl.load(p_w + o_t), b_dc, DOT)


def forward(plan, call, q, k, v, gates, c, n, eps, save):
    """h, the last C, n of every chunk, den, s, and with `save` C (B·H·(segments + 1), K, V) at the ends of segments."""
    L, tiles, segment = plan.L, plan.forward, plan.SEGMENT if save else 1
    BK, BV = tiles.BK, tiles.BV
    ns = call.normalisers(k, gates, n)
    if plan.SCORES:
        p, den, s = padded(ns, (1, 1, L), call.dtype), call.vector(ns), call.vector(ns)
    else:
        p, den, s = intra(call, L, plan.intra, q, k, ns, gates, eps)
    cs = padded(den, (call.rows * (call.N // segment + 1) if save else 1, call.K, call.V))
    h, c_last = padded(v, v.shape), call.vector(den, call.rows, call.K, call.V)
    mlstm_forward_kernel[(call.rows * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), matrices(p, L, L), heads(h, L, BV), matrices(cs, BK, BV),
        c.contiguous(), c_last, ns, gates.u, gates.top, gates.floor, gates.document, gates.alpha, gates.beta, gates.gamma, den, s,
        call.H, call.N, call.K, call.V, segment, call.scale, eps, SAVE=save, SCORES=plan.SCORES, **call.flags, **_options(call, tiles),
    )  # fmt: skip
    return h.contiguous(), c_last, ns, den, s, cs if save else None


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    (dh, dc, dn), (h, den, s, ns, cs) = grads, saved
    p, g, w, wn, sums = intra_backward(call, plan.L, plan.intra_backward, q, k, v, h, dh, gates, den, s)
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    dv, dcs, dc = values(call, plan, q, k, v, dh, p, gates, w, dc)
    dq, qdq = queries(call, plan, q, k, v, dh, g, cs, ns, gates, w, wn)
    dk, kdk, inflow = keys(call, plan, q, k, v, dh, g, (cs, dcs, ns, dns), gates, w)
    return dq, dk, dv, (qdq, kdk, inflow), dc, dns[:, 0].clone()


def values(call, plan, q, k, v, dh, p, gates, w, dc):
    """dv, dC at the end of every segment (B·H·segments, K, V), and of the first memory."""
    L, tiles, empty = plan.L, plan.dv, dc is None
    BK, BV = tiles.BK, tiles.BV
    dcs = padded(w, (call.rows * (call.N // plan.SEGMENT), call.K, call.V))
    dv, dc0 = padded(v, v.shape), call.vector(w, call.rows, call.K, call.V)
    mlstm_values_kernel[(call.rows * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(k, L, BK), heads(dh, L, BV), matrices(p, L, L), heads(dv, L, BV), matrices(dcs, BK, BV),
        dc0 if empty else dc.contiguous(), dc0, gates.alpha, w, gates.gamma, call.H, call.N, call.K, call.V, plan.SEGMENT,
        EMPTY=empty, **_options(call, tiles),
    )  # fmt: skip
    return dv.contiguous(), dcs, dc0


def queries(call, plan, q, k, v, dh, g, cs, ns, gates, w, wn):
    """dq, and q·dq (tiles of K, B·H·N·L)."""
    L, tiles = plan.L, plan.dq
    BK, BV, count = tiles.BK, tiles.BV, cdiv(call.K, tiles.BK)
    dq, qdq = padded(q, q.shape), call.vector(w, count, call.tokens)
    mlstm_queries_kernel[(call.rows * (call.N // plan.SEGMENT) * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(dh, L, BV), matrices(g, L, L), matrices(cs, BK, BV),
        heads(dq, L, BK), ns, gates.alpha, w, wn, gates.gamma, qdq, call.H, call.N, call.K, call.V, plan.SEGMENT, call.tokens,
        **_options(call, tiles),
    )  # fmt: skip
    return dq.contiguous(), qdq


def keys(call, plan, q, k, v, dh, g, memories, gates, w):
    """dk, k·dk (tiles of K, B·H·N·L), and <C, dC> + <n, dn> at the end of every segment (tiles of K, segments)."""
    (cs, dcs, ns, dns), L, tiles = memories, plan.L, plan.dk
    BK, BV, count, segments = tiles.BK, tiles.BV, cdiv(call.K, tiles.BK), call.rows * (call.N // plan.SEGMENT)
    dk, kdk, inflow = padded(k, k.shape), call.vector(w, count, call.tokens), call.vector(w, count, segments)
    mlstm_keys_kernel[(segments * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(dh, L, BV), matrices(g, L, L), matrices(cs, BK, BV),
        matrices(dcs, BK, BV), heads(dk, L, BK), ns, dns, gates.alpha, w, gates.gamma, kdk, inflow,
        call.H, call.N, call.K, call.V, plan.SEGMENT, call.tokens, **_options(call, tiles),
    )  # fmt: skip
    return dk.contiguous(), kdk, inflow


def _options(call, tiles):
    return {"L": call.L, "DOT": call.dot, **tiles._asdict()}
