"""What happens inside the chunks of the mLSTM, all of them at once: scores and denominators, and their gradients.

    forward      P = a(QKᵀ)⊙D, and the denominator of every token, for which n of every chunk is known
    backward     P/den and a dS, and what a token weighs in dC and dn

The equations stand in docs/math.md. A program takes BT rows against the blocks of rows before them in the chunk, so these
matrices are worked out once, however many tiles of values read them.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, matrices, padded, tile
from exlstm.ops.mlstm.plan import power


@triton.jit
def _exact_power_of_two(x):
    """2^x for x ≤ 0 to the last digit, where the hardware's own is two units off: its series around the nearest whole number."""
    whole = tl.floor(tl.maximum(x, -126.0) + 0.5)
    f = tl.maximum(x, -126.0) - whole
    series = 0.0013333558146428443 + f * (0.00015403530393381608 + f * 1.525273380405984e-05)
    series = 0.2402265069591007 + f * (0.05550410866482158 + f * (0.009618129107628477 + f * series))
    return tl.where(x < -126.0, 0.0, tl.exp2(whole) * (1.0 + f * (0.6931471805599453 + f * series)))


@triton.jit
def _decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, o_j, RESET: tl.constexpr, PAIR: tl.constexpr):
    """D (rows, columns) = 2^(u_j - M_t) for tokens o_t and o_j of one sequence, 0 in the future and across a reset."""
    exponent = tl.load(p_u + o_j)[None, :] - tl.load(p_top + o_t)[:, None]
    if PAIR:
        exponent += tl.load(p_u_low + o_j)[None, :] - tl.load(p_top_low + o_t)[:, None]
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (tl.load(p_document + o_t)[:, None] == tl.load(p_document + o_j)[None, :])
    exponent = tl.where(seen, exponent, -float("inf"))
    return _exact_power_of_two(exponent) if PAIR else tl.exp2(exponent)


@triton.jit(do_not_specialize=["N"])
def mlstm_intra_kernel(d_q, d_k, d_p, p_n, p_u, p_top, p_u_low, p_top_low, p_beta, p_floor, p_document, p_den, p_s,
                       H, N, K, scale, eps,
                       L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                       PAIR: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                       STAGES: tl.constexpr):  # fmt: skip
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
    if EVEN and (i_r - i_first) % 2 == 0:
        # Who reads two blocks of rows at once reads the second's diagonal beside the first.
        d_p.store([i_bh.to(tl.int32), i_r * BT, (i_r - i_first + 1) * BT], tl.zeros([1, BT, BT], dtype=d_p.dtype))
    b_den = tl.load(p_floor + base + o_t)
    if NORM:
        b_qn = tl.zeros([BT], dtype=tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
            b_n = tl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k, mask=o_k < K, other=0.0)
            b_qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
        b_s += scale * tl.load(p_beta + base + o_t) * b_qn
        tl.store(p_s + base + o_t, tl.where(tl.abs(b_s) > b_den, b_s, 0.0))
        b_den = tl.maximum(tl.abs(b_s), b_den) + eps
    tl.store(p_den + base + o_t, b_den)


@triton.jit(do_not_specialize=["N"])
def mlstm_intra_backward_kernel(d_q, d_k, d_v, d_h, d_dh, d_p, d_g, p_u, p_top, p_u_low, p_top_low, p_beta, p_document, p_den,
                                p_s, p_w, p_wn, p_sums, H, N, K, V, scale,
                                L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
                                RESET: tl.constexpr, PAIR: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
                                PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """P/den and a dS (B·H, N·L, L) up to the diagonal; w = a β/den, w_n = a β ds of every token, Σ w_n q of every block."""
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
    b_part, b_w = 1.0 / tl.load(p_den + base + o_t), scale * tl.load(p_beta + base + o_t)
    b_ds = tl.zeros([BT], dtype=tl.float32)
    for i_j in range(i_first, i_r + 1):
        b_g = tl.zeros([BT, BT], dtype=tl.float32)
        for i_v in tl.range(0, V, BV, num_stages=STAGES):
            b_dh = tile(d_dh, i_b, i_h, i_r * BT, i_v, BT, BV, DOT)
            b_v = tile(d_v, i_b, i_h, i_j * BT, i_v, BT, BV, DOT)
            b_g = tl.dot(b_dh, b_v.T, b_g, input_precision=PRECISION)
            if NORM and i_j == i_first:
                b_h = tile(d_h, i_b, i_h, i_r * BT, i_v, BT, BV, tl.float32)
                b_ds += tl.sum(b_h * b_dh.to(tl.float32), 1)
        if NORM and i_j == i_first:
            b_s = tl.load(p_s + base + o_t)
            b_ds *= tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
        b_d = scale * _decay(p_u, p_top, p_u_low, p_top_low, p_document, o_t, i_j * BT + tl.arange(0, BT), RESET, PAIR)
        o_p = [i_bh.to(tl.int32), i_r * BT, (i_j - i_first) * BT]
        d_g.store(o_p, ((b_g * b_part[:, None] + b_ds[:, None]) * b_d).to(d_g.dtype).reshape(1, BT, BT))
        b_p = tl.zeros([BT, BT], dtype=tl.float32)
        for i_k in tl.range(0, K, BK, num_stages=STAGES):
            b_q = tile(d_q, i_b, i_h, i_r * BT, i_k, BT, BK, DOT)
            b_k = tile(d_k, i_b, i_h, i_j * BT, i_k, BT, BK, DOT)
            b_p = tl.dot(b_q, b_k.T, b_p, input_precision=PRECISION)
            if i_j == i_first:
                o_k = i_k + tl.arange(0, BK)
                b_sum = tl.sum(b_q.to(tl.float32) * (b_w * b_ds)[:, None], 0)
                tl.store(p_sums + (i_bh * rows + i_r) * K + o_k, b_sum, mask=o_k < K)
        d_p.store(o_p, (b_p * b_d * b_part[:, None]).to(d_p.dtype).reshape(1, BT, BT))
    if EVEN and (i_r - i_first) % 2 == 0:
        o_p = [i_bh.to(tl.int32), i_r * BT, (i_r - i_first + 1) * BT]
        d_p.store(o_p, tl.zeros([1, BT, BT], dtype=d_p.dtype))
        d_g.store(o_p, tl.zeros([1, BT, BT], dtype=d_p.dtype))
    tl.store(p_w + base + o_t, b_w * b_part)
    tl.store(p_wn + base + o_t, b_w * b_ds)


@triton.jit(do_not_specialize=["N"])
def mlstm_denominator_gradient_kernel(d_q, d_h, d_dh, p_flow, p_beta, p_den, p_s, p_w, p_ds, p_sums, H, N, K, V, scale,
                                      L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
                                      PARTS: tl.constexpr):  # fmt: skip
    """w = a β/den and ds of every token of a chunk, and Σ a β ds q, what n of the chunk has from it; h · dh in PARTS if not 0."""
    i_bh, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = (i_bh * N + i_n) * L + tl.arange(0, L)
    b_part, b_beta = 1.0 / tl.load(p_den + o_t), scale * tl.load(p_beta + o_t)
    tl.store(p_w + o_t, b_beta * b_part)
    b_ds = tl.zeros([L], dtype=tl.float32)
    if NORM:
        for i_part in tl.static_range(PARTS):
            b_ds += tl.load(p_flow + i_part * tl.num_programs(0).to(tl.int64) * L + o_t)
        if PARTS == 0:
            for i_v in range(0, V, BV):
                b_h = tile(d_h, i_b, i_h, i_n * L, i_v, L, BV, tl.float32)
                b_ds += tl.sum(b_h * tile(d_dh, i_b, i_h, i_n * L, i_v, L, BV, tl.float32), 1)
        b_s = tl.load(p_s + o_t)
        b_ds *= tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
    tl.store(p_ds + o_t, b_ds)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_q = tile(d_q, i_b, i_h, i_n * L, i_k, L, BK, tl.float32)
        tl.store(p_sums + (i_bh * N + i_n) * K + o_k, tl.sum(b_q * (b_beta * b_ds)[:, None], 0), mask=o_k < K)


def intra(call, plan, q, k, ns, gates, eps):
    """P, the denominator, and the sum in it where it counts."""
    L, BT, tiles = call.L, plan.BJ, plan.intra
    BK = tiles.BK
    p = padded(q, (call.rows, call.N * L, L), call.dtype)
    den, s = call.vector(ns), call.vector(ns)
    mlstm_intra_kernel[(call.tokens // BT,)](
        heads(q, BT, BK), heads(k, BT, BK), matrices(p, BT, BT), ns, *gates[:4], gates.beta, gates.floor, gates.document,
        den, s, call.H, call.N, call.K, call.scale, eps, **_options(call, plan, tiles, "BK", "num_warps", "STAGES"),
    )  # fmt: skip
    return p, den, s


def intra_backward(call, plan, q, k, v, h, dh, gates, den, s):
    """P/den, a dS, the weights w and w_n of every token in dC and dn, and Σ w_n q of every BT tokens."""
    L, BT, tiles = call.L, plan.BJ, plan.intra_backward
    BK, BV = tiles.BK, tiles.BV
    p, g = (padded(q, (call.rows, call.N * L, L), call.dtype) for _ in range(2))
    w, wn, sums = call.vector(den), call.vector(den), call.vector(den, call.rows, call.N * (L // BT), call.K)
    mlstm_intra_backward_kernel[(call.tokens // BT,)](
        heads(q, BT, BK), heads(k, BT, BK), heads(v, BT, BV), heads(h, BT, BV), heads(dh, BT, BV),
        matrices(p, BT, BT), matrices(g, BT, BT), *gates[:4], gates.beta, gates.document, den, s, w, wn, sums,
        call.H, call.N, call.K, call.V, call.scale, **_options(call, plan, tiles, "BK", "BV", "num_warps", "STAGES"),
    )  # fmt: skip
    return p, g, w, wn, sums


def denominator_gradient(call, q, h, dh, gates, den, s, flow=None):
    """The weights w in dC and ds of every token, and what a chunk adds to dn; h · dh may be given in parts (parts, B·H·N·L)."""
    L, BK, BV = call.L, min(64, power(call.K)), min(128, power(call.V))
    w, ds, sums = call.vector(den), call.vector(den), call.vector(den, call.rows, call.N, call.K)
    mlstm_denominator_gradient_kernel[(call.rows * call.N,)](
        heads(q, L, BK), heads(h, L, BV), heads(dh, L, BV), den if flow is None else flow, gates.beta, den, s, w, ds, sums,
        call.H, call.N, call.K, call.V, call.scale, L=L, BK=BK, BV=BV, NORM=call.flags["NORM"],
        PARTS=0 if flow is None else len(flow),
    )  # fmt: skip
    return w, ds, sums


def _options(call, plan, tiles, *names):
    chosen = {key: value for key, value in tiles._asdict().items() if key in names}
    flags = {"EVEN": plan.BT > plan.BJ, "PAIR": call.pair, **call.flags}
    return {"L": call.L, "BT": plan.BJ, "DOT": call.dot, "PRECISION": call.precision, **flags, **chosen}
