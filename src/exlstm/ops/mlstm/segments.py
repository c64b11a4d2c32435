"""Where the segments of a sequence start, for few sequences and heads: cut into S of them, it is walked by S programs at once.

    sums     what each of P parts of a segment by itself adds to C and n, and the product of its γ; in reverse to dC and dn
    chain    from these C and n where every segment starts; in reverse dC and dn where it ends

A row of the walks is a segment: r = (b·H + h)·S + s, its chunk i of N is chunk s·N + i of the sequence, so vectors (B·H, S·N·L)
are at r·N + i as they are without segments. At a border, n of a chunk comes from the segment that starts there.
"""

import triton
import triton.language as tl

from exlstm.ops.mlstm.gates import heads, tile
from exlstm.ops.mlstm.plan import cdiv, parts, sums

# Numbers of a memory that a program of the chain takes.
BLOCK = 1024


@triton.jit
def _weights(p_w, p_den, p_s, p_gamma, i_c, scale, L: tl.constexpr, REVERSE: tl.constexpr, NORM: tl.constexpr):
    """What the tokens of chunk i_c weigh in C and in n (in reverse times h·dh), and its γ."""
    o_t = i_c * L + tl.arange(0, L)
    b_w = tl.load(p_w + o_t)
    b_wn = b_w
    if REVERSE:
        b_w *= scale
        b_part = 1.0 / tl.load(p_den + o_t)
        if NORM:
            b_s = tl.load(p_s + o_t)
            b_wn = b_w * tl.where(b_s > 0, -b_part, tl.where(b_s < 0, b_part, 0.0))
        b_w *= b_part
    return b_w, b_wn, tl.load(p_gamma + i_c)


@triton.jit(do_not_specialize=["S", "P", "N"])
def mlstm_segment_sums_kernel(d_x, d_y, d_h, p_w, p_den, p_s, p_gamma, p_c, p_n, p_decay, H, S, P, N, K, V, scale,
                              L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, NORM: tl.constexpr,
                              DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Σ (w ⊙ X)ᵀ Y of every part, each chunk times the γ of those behind it in the part; in reverse of those before it."""
    tiles_v, tiles = tl.cdiv(V, BV), tl.cdiv(V, BV) * tl.cdiv(K, BK)
    i_x, i_k, i_v = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) // tiles_v, tl.program_id(0) % tiles_v
    # Nobody wants the sums of the last segment, in reverse of the first.
    i_bh, i_part = (i_x // ((S - 1) * P)).to(tl.int64), i_x % ((S - 1) * P) + (P if REVERSE else 0)
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    i_first, count = i_part // P * N + i_part % P * N // P, (i_part % P + 1) * N // P - i_part % P * N // P
    i_c = i_bh * S * N + i_first
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_c = tl.zeros([BK, BV], dtype=tl.float32)
    b_n = tl.zeros([L, BK], dtype=tl.float32)
    b_decay = tl.full([], 1.0, dtype=tl.float32)
    i_n = 0 if REVERSE else count - 1
    b_w, b_wn, b_gamma = _weights(p_w, p_den, p_s, p_gamma, i_c + i_n, scale, L, REVERSE, NORM)
    # From the chunk whose share nothing decays on: a weight carries what decays the others, and the sum is only added to.
    for i in tl.range(0, count, num_stages=STAGES):
        i_n = i if REVERSE else count - 1 - i
        i_next = tl.minimum(i + 1, count - 1) if REVERSE else tl.maximum(count - 2 - i, 0)
        i_t = (i_first + i_n) * L
        b_x = tile(d_x, i_b, i_h, i_t, i_k * BK, L, BK, DOT)
        b_y = tile(d_y, i_b, i_h, i_t, i_v * BV, L, BV, DOT)
        if REVERSE and NORM:
            b_wn *= tl.sum(tile(d_h, i_b, i_h, i_t, i_v * BV, L, BV, tl.float32) * b_y.to(tl.float32), 1)
        b_w *= b_decay
        b_c = tl.dot((b_x.to(tl.float32) * b_w[:, None]).to(DOT).T, b_y, b_c, input_precision=PRECISION)
        if NORM:
            # Tokens are summed at the end: within the loop, warps would have to meet for it.
            b_n += b_x.to(tl.float32) * (b_wn * b_decay)[:, None]
        b_decay *= b_gamma
        b_w, b_wn, b_gamma = _weights(p_w, p_den, p_s, p_gamma, i_c + i_next, scale, L, REVERSE, NORM)
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    tl.store(p_c + i_x.to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :], b_c, mask=inside)
    if NORM:
        tl.store(p_n + i_x.to(tl.int64) * K + o_k, tl.sum(b_n, 0), mask=(o_k < K) & (i_v == 0))
    tl.store(p_decay + i_x, b_decay, mask=(i_k == 0) & (i_v == 0))


@triton.jit(do_not_specialize=["S", "P"])
def mlstm_segment_chain_kernel(p_first, p_decay, p_sums, p_x, S, P, size,
                               BLOCK: tl.constexpr, REVERSE: tl.constexpr, EMPTY: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """x (B·H·S, size) where every segment starts, in reverse where it ends, of the sums of their parts; ALONE, these are 0."""
    tiles, count = tl.cdiv(size, BLOCK), (S - 1) * P
    i_bh, o = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.zeros([BLOCK], dtype=tl.float32)
    if not EMPTY:
        b_x += tl.load(p_first + i_bh * size + o, mask=o < size, other=0.0)
    tl.store(p_x + (i_bh * S + (S - 1 if REVERSE else 0)) * size + o, b_x, mask=o < size)
    for i in range(count):
        i_part = i_bh * count + (count - 1 - i if REVERSE else i)
        b_x *= tl.load(p_decay + i_part)
        if not ALONE:
            b_x += tl.load(p_sums + i_part * size + o, mask=o < size, other=0.0)
        i_s = (i + 1) // P
        there = (o < size) & ((i + 1) % P == 0)
        tl.store(p_x + (i_bh * S + (S - 1 - i_s if REVERSE else i_s)) * size + o, b_x, mask=there)


def starts(call, S, k, v, gates, first):
    """C (B·H·S, K, V) and n (B·H·S, K) where every segment starts, of the first ones; n None where that is."""
    if S == 1:
        return tuple(None if x is None else x.contiguous() for x in first)
    return _chained(call, S, (k, v, v), (gates.alpha,) * 3, gates.gamma, first, first[1] is not None)


def ends(call, S, tensors, gates, denominators, last):
    """dC, and dn where s is given, where every segment ends, of q, h and dh, den and s, and of those behind the last, or None.

    What dn wants of h and dh is summed over all values by one program, so s is only for values that fit into a tile.
    """
    if S == 1:
        return tuple(None if x is None else x.contiguous() for x in last)
    (q, h, dh), (den, s) = tensors, denominators
    return _chained(call, S, (q, dh, h), (gates.beta, den, s), gates.gamma, last, s is not None, reverse=True)


def _chained(call, S, tensors, weights, gamma, first, with_n, reverse=False):
    (BK, BV, num_warps, STAGES), K, V, L, N = sums(call.K, call.V), call.K, call.V, call.L, call.N // S
    programs = call.rows * (S - 1) * cdiv(K, BK) * cdiv(V, BV)
    P = parts(programs, N)
    assert not (with_n and reverse) or BV >= V
    count, norm = call.rows * (S - 1) * P, with_n and (call.flags["NORM"] or not reverse)
    c, n, decay = (call.vector(gamma, count, *size) for size in ((K, V), (K,), ()))
    x, y, h = (heads(x, L, width) for x, width in zip(tensors, (BK, BV, BV)))
    weights = [gamma if w is None else w for w in weights]
    mlstm_segment_sums_kernel[(programs * P,)](
        x, y, h, *weights, gamma, c, n, decay, call.H, S, P, N, K, V, call.scale,
        L=L, BK=BK, BV=BV, REVERSE=reverse, NORM=norm, DOT=call.dot, PRECISION=call.precision,
        STAGES=STAGES, num_warps=num_warps,
    )  # fmt: skip
    found = []
    for x, start, alone in ((c, first[0], False), (n, first[1], not norm))[: 1 + with_n]:
        size = x[0].numel()
        found.append(call.vector(gamma, call.rows * S, *x.shape[1:]))
        mlstm_segment_chain_kernel[(call.rows * cdiv(size, BLOCK),)](
            decay if start is None else start.contiguous(), decay, x, found[-1], S, P, size,
            BLOCK=BLOCK, REVERSE=reverse, EMPTY=start is None, ALONE=alone,
        )  # fmt: skip
    return tuple(found) if with_n else (*found, None)
