"""The mLSTM in one pass, for narrow heads: the memory of some columns stays on chip over the whole sequence, in chunks of L tokens.

What a two-pass kernel (`two_pass.py`, whose letters these are) moves for narrow heads is mostly the memories between chunks; here
they are written once a segment of SEGMENT chunks, for the backward. A program holds

    forward     C[:, columns of V], n       from the first chunk to the last      → h, den
    dq          C[columns of K, :], n       inside one segment, forward           → dq, ds
    dv          dC[:, columns of V], dn     from the last chunk to the first      → dv, and dC, dn at the end of each segment
    dk          dC[columns of K, :], dn     inside one segment, backward          → dk, and <C, dC> + <n, dn> at the segment's end

so that no sum crosses programs: no atomics, same inputs, same bits.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import Call, aligned, heads, matrices, on, padded, tile
from exlstm.ops.mlstm.plan import cdiv


@triton.jit
def _decay(p_u, p_top, p_document, o_t, o_j, RESET: tl.constexpr):
    """D (tokens o_t, tokens o_j) of one chunk, 0 in the future and across a reset."""
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_j)[None, :])
    exponent = tl.load(p_u + o_j)[None, :] - tl.load(p_top + o_t)[:, None]
    return tl.exp2(tl.where(seen, exponent, -float("inf")))


@triton.jit
def _decay_transposed(p_u, p_top, p_document, o_j, o_t, RESET: tl.constexpr):
    """Dᵀ (tokens o_j, tokens o_t)."""
    seen = o_t[None, :] >= o_j[:, None]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[None, :] == tl.load(p_document + o_j)[:, None])
    exponent = tl.load(p_u + o_j)[:, None] - tl.load(p_top + o_t)[None, :]
    return tl.exp2(tl.where(seen, exponent, -float("inf")))


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_fused_forward_kernel(d_q, d_k, d_v, d_h, d_c, p_n, p_c0, p_n0, p_c_last, p_n_last, p_u, p_top, p_alpha, p_beta, p_floor,
                               p_gamma, p_document, p_den, p_s, H, N, K, V, SEGMENT, scale, eps,
                               L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                               SAVE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h, den, s and the last memory; with SAVE also the memories at the start of every segment and after the last."""
    tiles = tl.cdiv(V, BV)
    i_bh, i_v = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BV
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_l = tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, L)
    o_c = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c = tl.load(p_c0 + o_c, mask=inside, other=0.0)
    b_n = tl.load(p_n0 + i_bh * K + o_k, mask=o_k < K, other=0.0)
    slots = N // SEGMENT + 1
    for i_n in tl.range(0, N, num_stages=STAGES):
        if SAVE:
            if i_n % SEGMENT == 0:
                i_s = i_bh * slots + i_n // SEGMENT
                d_c.store([i_s.to(tl.int32), 0, i_v], b_c.to(d_c.dtype).reshape(1, BK, BV))
                if i_v == 0:
                    tl.store(p_n + i_s * K + o_k, b_n, mask=o_k < K)
        b_q = tile(d_q, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, i_v, L, BV, DOT)
        o_t = (i_bh * N + i_n) * L + o_l
        b_beta, b_alpha = scale * tl.load(p_beta + o_t), tl.load(p_alpha + o_t)
        b_den, b_gamma = tl.load(p_floor + o_t), tl.load(p_gamma + i_bh * N + i_n)
        b_p = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_h = tl.dot(b_q, b_c.to(DOT), input_precision="ieee")
        b_p *= scale * _decay(p_u, p_top, p_document, o_t, (i_bh * N + i_n) * L + o_l, RESET)
        if NORM:
            b_s = tl.sum(b_p, 1) + b_beta * tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
            if SAVE:
                if i_v == 0:
                    tl.store(p_s + o_t, tl.where(tl.abs(b_s) > b_den, b_s, 0.0))
            b_den = tl.maximum(tl.abs(b_s), b_den) + eps
        if SAVE:
            if i_v == 0:
                tl.store(p_den + o_t, b_den)
        b_h = tl.dot(b_p.to(DOT), b_v, b_h * b_beta[:, None], input_precision="ieee")
        d_h.store([i_b, i_h, i_n * L, i_v], (b_h / b_den[:, None]).to(d_h.dtype).reshape(1, 1, L, BV))
        b_v = (b_v.to(tl.float32) * b_alpha[:, None]).to(DOT)
        b_c = tl.dot(b_k.T, b_v, b_c * b_gamma, input_precision="ieee")
        b_n = b_n * b_gamma + tl.sum(b_k.to(tl.float32) * b_alpha[:, None], 0)
    tl.store(p_c_last + o_c, b_c, mask=inside)
    if SAVE:
        i_s = i_bh * slots + N // SEGMENT
        d_c.store([i_s.to(tl.int32), 0, i_v], b_c.to(d_c.dtype).reshape(1, BK, BV))
    if i_v == 0:
        tl.store(p_n_last + i_bh * K + o_k, b_n, mask=o_k < K)
        if SAVE:
            tl.store(p_n + (i_bh * slots + N // SEGMENT) * K + o_k, b_n, mask=o_k < K)


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_fused_dq_kernel(d_q, d_k, d_v, d_h, d_dh, d_c, d_dq, p_n, p_u, p_top, p_alpha, p_beta, p_gamma, p_document, p_den, p_s,
                          p_ds, p_qdq, H, N, K, V, SEGMENT, rows, scale,
                          L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                          DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq of BK columns over one segment, their part of q·dq, and ds of every token."""
    tiles, segments = tl.cdiv(K, BK), N // SEGMENT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_s = (i_x // segments).to(tl.int64), i_x % segments
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_l = i_k * BK + tl.arange(0, BK), tl.arange(0, L)
    slot = i_bh * (segments + 1) + i_s
    b_c = d_c.load([slot.to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    b_n = tl.load(p_n + slot * K + o_k, mask=o_k < K, other=0.0)
    for i in tl.range(0, SEGMENT, num_stages=STAGES):
        i_n = i_s * SEGMENT + i
        b_k = tile(d_k, i_b, i_h, i_n * L, i_k * BK, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, 0, L, BV, DOT)
        o_t = (i_bh * N + i_n) * L + o_l
        b_part, b_beta = 1.0 / tl.load(p_den + o_t), scale * tl.load(p_beta + o_t)
        b_alpha, b_gamma = tl.load(p_alpha + o_t), tl.load(p_gamma + i_bh * N + i_n)
        b_g = tl.dot(b_dh, b_v.T, input_precision="ieee")
        b_dq = tl.dot(b_dh, b_c.to(DOT).T, input_precision="ieee")
        b_ds = tl.zeros([L], dtype=tl.float32)
        if NORM:
            b_h = d_h.load([i_b, i_h, i_n * L, 0]).reshape(L, BV)
            b_s = tl.load(p_s + o_t)
            b_ds = tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
            b_ds *= tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        if i_k == 0:
            tl.store(p_ds + o_t, b_ds)
        b_g = (b_g * b_part[:, None] + b_ds[:, None]) * scale
        b_g *= _decay(p_u, p_top, p_document, o_t, (i_bh * N + i_n) * L + o_l, RESET)
        b_dq = b_dq * (b_beta * b_part)[:, None] + (b_beta * b_ds)[:, None] * b_n[None, :]
        b_dq = tl.dot(b_g.to(DOT), b_k, b_dq, input_precision="ieee")
        b_q = d_q.load([i_b, i_h, i_n * L, i_k * BK]).reshape(L, BK)
        tl.store(p_qdq + i_k.to(tl.int64) * rows + o_t, tl.sum(b_q.to(tl.float32) * b_dq, 1))
        d_dq.store([i_b, i_h, i_n * L, i_k * BK], b_dq.to(d_dq.dtype).reshape(1, 1, L, BK))
        b_v = (b_v.to(tl.float32) * b_alpha[:, None]).to(DOT)
        b_c = tl.dot(b_k.T, b_v, b_c * b_gamma, input_precision="ieee")
        b_n = b_n * b_gamma + tl.sum(b_k.to(tl.float32) * b_alpha[:, None], 0)


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_fused_dv_kernel(d_q, d_k, d_dh, d_dv, d_dc, p_dn, p_dc_last, p_dn_last, p_dc0, p_dn0, p_u, p_top, p_alpha, p_beta, p_gamma,
                          p_document, p_den, p_ds, H, N, K, V, SEGMENT, scale,
                          L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RESET: tl.constexpr, EMPTY: tl.constexpr,
                          DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dv of BV columns, dC and dn at the end of every segment, and those of the first memory."""
    tiles = tl.cdiv(V, BV)
    i_bh, i_v = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BV
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_v, o_l = tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, L)
    o_c = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_dc = tl.zeros([BK, BV], dtype=tl.float32)
    b_dn = tl.zeros([BK], dtype=tl.float32)
    if not EMPTY:
        b_dc += tl.load(p_dc_last + o_c, mask=inside, other=0.0)
        b_dn += tl.load(p_dn_last + i_bh * K + o_k, mask=o_k < K, other=0.0)
    for i in tl.range(0, N, num_stages=STAGES):
        i_n = N - 1 - i
        if i % SEGMENT == 0:
            i_s = i_bh * (N // SEGMENT) + i_n // SEGMENT
            d_dc.store([i_s.to(tl.int32), 0, i_v], b_dc.to(d_dc.dtype).reshape(1, BK, BV))
            if i_v == 0:
                tl.store(p_dn + i_s * K + o_k, b_dn, mask=o_k < K)
        b_q = tile(d_q, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_n * L, 0, L, BK, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, i_v, L, BV, DOT)
        o_t = (i_bh * N + i_n) * L + o_l
        b_part, b_beta = 1.0 / tl.load(p_den + o_t), scale * tl.load(p_beta + o_t)
        b_alpha, b_gamma = tl.load(p_alpha + o_t), tl.load(p_gamma + i_bh * N + i_n)
        b_p = tl.dot(b_k, b_q.T, input_precision="ieee")
        b_dv = tl.dot(b_k, b_dc.to(DOT), input_precision="ieee")
        b_p *= _decay_transposed(p_u, p_top, p_document, (i_bh * N + i_n) * L + o_l, o_t, RESET) * (scale * b_part)[None, :]
        b_dv = tl.dot(b_p.to(DOT), b_dh, b_dv * b_alpha[:, None], input_precision="ieee")
        d_dv.store([i_b, i_h, i_n * L, i_v], b_dv.to(d_dv.dtype).reshape(1, 1, L, BV))
        b_dh = (b_dh.to(tl.float32) * (b_beta * b_part)[:, None]).to(DOT)
        b_dc = tl.dot(b_q.T, b_dh, b_dc * b_gamma, input_precision="ieee")
        if i_v == 0:
            b_wn = b_beta * tl.load(p_ds + o_t)
            b_dn = b_dn * b_gamma + tl.sum(b_q.to(tl.float32) * b_wn[:, None], 0)
    tl.store(p_dc0 + o_c, b_dc, mask=inside)
    if i_v == 0:
        tl.store(p_dn0 + i_bh * K + o_k, b_dn, mask=o_k < K)


@triton.jit(do_not_specialize=["N", "SEGMENT"])
def mlstm_fused_dk_kernel(d_q, d_k, d_v, d_dh, d_c, d_dc, d_dk, p_n, p_dn, p_u, p_top, p_alpha, p_beta, p_gamma, p_document, p_den,
                          p_ds, p_kdk, p_inflow, H, N, K, V, SEGMENT, rows, scale,
                          L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RESET: tl.constexpr,
                          DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dk of BK columns over one segment, their part of k·dk, and of <C, dC> + <n, dn> at the segment's end."""
    tiles, segments = tl.cdiv(K, BK), N // SEGMENT
    i_k, i_x = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_bh, i_s = (i_x // segments).to(tl.int64), i_x % segments
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_k, o_l = i_k * BK + tl.arange(0, BK), tl.arange(0, L)
    slot, behind = i_bh * segments + i_s, i_bh * (segments + 1) + i_s + 1
    b_dc = d_dc.load([slot.to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    b_dn = tl.load(p_dn + slot * K + o_k, mask=o_k < K, other=0.0)
    b_c = d_c.load([behind.to(tl.int32), i_k * BK, 0]).reshape(BK, BV).to(tl.float32)
    b_n = tl.load(p_n + behind * K + o_k, mask=o_k < K, other=0.0)
    tl.store(p_inflow + i_k * (rows // (SEGMENT * L)) + slot, tl.sum(tl.sum(b_c * b_dc, 1) + b_n * b_dn, 0))
    for i in tl.range(0, SEGMENT, num_stages=STAGES):
        i_n = (i_s + 1) * SEGMENT - 1 - i
        b_q = tile(d_q, i_b, i_h, i_n * L, i_k * BK, L, BK, DOT)
        b_v = tile(d_v, i_b, i_h, i_n * L, 0, L, BV, DOT)
        b_dh = tile(d_dh, i_b, i_h, i_n * L, 0, L, BV, DOT)
        o_t = (i_bh * N + i_n) * L + o_l
        b_part, b_beta = 1.0 / tl.load(p_den + o_t), scale * tl.load(p_beta + o_t)
        b_alpha, b_gamma, b_ds = tl.load(p_alpha + o_t), tl.load(p_gamma + i_bh * N + i_n), tl.load(p_ds + o_t)
        b_g = tl.dot(b_v, b_dh.T, input_precision="ieee")
        b_dk = tl.dot(b_v, b_dc.to(DOT).T, input_precision="ieee")
        b_g = (b_g * b_part[None, :] + b_ds[None, :]) * scale
        b_g *= _decay_transposed(p_u, p_top, p_document, (i_bh * N + i_n) * L + o_l, o_t, RESET)
        b_dk = (b_dk + b_dn[None, :]) * b_alpha[:, None]
        b_dk = tl.dot(b_g.to(DOT), b_q, b_dk, input_precision="ieee")
        b_k = d_k.load([i_b, i_h, i_n * L, i_k * BK]).reshape(L, BK)
        tl.store(p_kdk + i_k.to(tl.int64) * rows + o_t, tl.sum(b_k.to(tl.float32) * b_dk, 1))
        d_dk.store([i_b, i_h, i_n * L, i_k * BK], b_dk.to(d_dk.dtype).reshape(1, 1, L, BK))
        b_dh = (b_dh.to(tl.float32) * (b_beta * b_part)[:, None]).to(DOT)
        b_dc = tl.dot(b_q.T, b_dh, b_dc * b_gamma, input_precision="ieee")
        b_dn = b_dn * b_gamma + tl.sum(b_q.to(tl.float32) * (b_beta * b_ds)[:, None], 0)


def forward(plan, q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, save):
    """h, c, n, m, then den and s (B·H, N·L), and C, n (B·H, segments + 1, …) at the ends of all segments for the backward."""
    call, tiles = _call(plan, q, v, reset, scale, normalize), plan.forward
    q, k, v = aligned(q), aligned(k), aligned(v)
    L, BK, BV = plan.L, tiles.BK, tiles.BV
    slots = call.rows * (call.N // plan.SEGMENT + 1) if save else 1
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        h = padded(v, v.shape)
        c_last, n_last = call.vector(m, call.rows, call.K, call.V), call.vector(m, call.rows, call.K)
        cs, ns = padded(q, (slots, call.K, call.V), call.dtype), call.vector(m, slots, call.K)
        den, s = call.vector(m), call.vector(m)
        mlstm_fused_forward_kernel[(call.rows * cdiv(call.V, BV),)](
            heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(h, L, BV), matrices(cs, BK, BV), ns,
            c.contiguous(), n.contiguous(), c_last, n_last, gates.u, gates.top, gates.alpha, gates.beta, gates.floor, gates.gamma,
            gates.document, den, s, call.H, call.N, call.K, call.V, plan.SEGMENT, scale, eps,
            SAVE=save, **call.flags, **_options(call, plan, tiles),
        )  # fmt: skip
    saved = [den, s, cs, ns] if save else [den.new_empty(0) for _ in range(4)]
    return h.contiguous(), c_last, n_last, gates.last_m, *saved


def backward(plan, grads, q, k, v, log_i, log_f, c, n, m, reset, h, den, s, cs, ns, scale, normalize, eps):
    """dq, dk, dv, dlog_i, dlog_f, dc, dn of the gradients (dh, dc, dn) of h and of the last memory."""
    (dh, dc, dn), call = grads, _call(plan, q, v, reset, scale, normalize)
    q, k, v, h, dh = (aligned(x) for x in (q, k, v, h, dh))
    with on(q.device):
        gates = call.gates(log_i, log_f, m)
        vectors = (gates.u, gates.top, gates.alpha, gates.beta, gates.gamma, gates.document, den)
        dq, ds, qdq = queries(call, plan, q, k, v, h, dh, cs, ns, vectors, s)
        dv, dcs, dns, dc, dn = values(call, plan, q, k, v, dh, vectors, ds, dc, dn)
        dk, kdk, inflow = keys(call, plan, q, k, v, dh, (cs, dcs, ns, dns), vectors, ds)
        dlog_i, dlog_f = call.gate_gradients(log_i, qdq, kdk, inflow, plan.SEGMENT * plan.L)
    return dq, dk, dv, dlog_i, dlog_f, dc, dn


def queries(call, plan, q, k, v, h, dh, cs, ns, vectors, s):
    """dq, ds of every token, and q·dq (tiles of K, B·H·N·L)."""
    L, tiles = plan.L, plan.dq
    BK, BV, count = tiles.BK, tiles.BV, cdiv(call.K, tiles.BK)
    dq, ds, qdq = padded(q, q.shape), call.vector(s), call.vector(s, count, call.tokens)
    mlstm_fused_dq_kernel[(call.rows * (call.N // plan.SEGMENT) * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(h, L, BV), heads(dh, L, BV), matrices(cs, BK, BV), heads(dq, L, BK),
        ns, *vectors, s, ds, qdq, call.H, call.N, call.K, call.V, plan.SEGMENT, call.tokens, call.scale,
        **call.flags, **_options(call, plan, tiles),
    )  # fmt: skip
    return dq.contiguous(), ds, qdq


def values(call, plan, q, k, v, dh, vectors, ds, dc, dn):
    """dv, dC and dn at the end of every segment, and those of the first memory."""
    L, tiles = plan.L, plan.dv
    BK, BV, segments = tiles.BK, tiles.BV, call.rows * (call.N // plan.SEGMENT)
    dv, dcs = padded(v, v.shape), padded(q, (segments, call.K, call.V), call.dtype)
    dns, dc0 = call.vector(ds, segments, call.K), call.vector(ds, call.rows, call.K, call.V)
    dn0, empty = call.vector(ds, call.rows, call.K), dc is None
    mlstm_fused_dv_kernel[(call.rows * cdiv(call.V, BV),)](
        heads(q, L, BK), heads(k, L, BK), heads(dh, L, BV), heads(dv, L, BV), matrices(dcs, BK, BV), dns,
        dc0 if empty else dc.contiguous(), dn0 if empty else dn.contiguous(), dc0, dn0, *vectors, ds,
        call.H, call.N, call.K, call.V, plan.SEGMENT, call.scale,
        RESET=call.flags["RESET"], EMPTY=empty, **_options(call, plan, tiles),
    )  # fmt: skip
    return dv.contiguous(), dcs, dns, dc0, dn0


def keys(call, plan, q, k, v, dh, memories, vectors, ds):
    """dk, k·dk (tiles of K, B·H·N·L), and <C, dC> + <n, dn> at the end of every segment (tiles of K, segments)."""
    (cs, dcs, ns, dns), L, tiles = memories, plan.L, plan.dk
    BK, BV, count = tiles.BK, tiles.BV, cdiv(call.K, tiles.BK)
    segments = call.rows * (call.N // plan.SEGMENT)
    dk, kdk, inflow = padded(k, k.shape), call.vector(ds, count, call.tokens), call.vector(ds, count, segments)
    mlstm_fused_dk_kernel[(segments * count,)](
        heads(q, L, BK), heads(k, L, BK), heads(v, L, BV), heads(dh, L, BV), matrices(cs, BK, BV), matrices(dcs, BK, BV),
        heads(dk, L, BK), ns, dns, *vectors, ds, kdk, inflow, call.H, call.N, call.K, call.V, plan.SEGMENT, call.tokens, call.scale,
        RESET=call.flags["RESET"], **_options(call, plan, tiles),
    )  # fmt: skip
    return dk.contiguous(), kdk, inflow


def _call(plan, q, v, reset, scale, normalize):
    return Call(q, v, reset, scale, normalize, plan.L, cdiv(q.shape[1], plan.L * plan.SEGMENT) * plan.SEGMENT)


def _options(call, plan, tiles):
    return {"L": plan.L, "DOT": call.dot, **tiles._asdict()}
