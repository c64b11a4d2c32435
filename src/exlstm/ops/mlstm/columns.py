"""The mLSTM on Hopper for keys of 128 or 256: a walk over all chunks with 128 columns of C on chip, for h and for dv.

    forward      hᵀ = (C_T q_T) ⊙ aβ/den + v_T (P/den)_T       C_T ← γ C_T + (α ⊙ v)_T k
    backward     dvᵀ = (dC_T k_T) ⊙ α + dh_T (P/den)           dC_T ← γ dC_T + (aβ/den ⊙ dh)_T q, from the last chunk to the first

Both are one kernel. C stands in registers as its transpose, so that it goes into the products as it stands: what the matrix units
leave as a sum is laid out as what they take for a left side. Three groups of warps: one brings the tiles and vectors, two keep
64 columns each. P/den of all chunks is worked out before. Every tile is 64 × 64. Beside that the kernel writes C before (dC
behind) every second chunk, for the gradients that chunks of 128 want of them; on the way back, h · dh of its columns, which the
group that brings the tiles has time for.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from exlstm.ops.mlstm import gates as descriptors
from exlstm.ops.mlstm.gates import padded, tile
from exlstm.ops.mlstm.hopper import _anew, _columns, _product, _rows, _sums, heads, matrices
from exlstm.ops.mlstm.plan import cdiv
from exlstm.ops.mlstm.segments import ends, starts
from exlstm.ops.mlstm.walk import _counters

# Registers a thread of the groups that keep a memory; who brings the tiles has what is left.
REGISTERS = 232


@triton.jit(do_not_specialize=["N"])
def mlstm_scores_kernel(d_q, d_k, d_p, p_n, p_u, p_top, p_beta, p_floor, p_document, p_den, p_s, H, N, K, scale, eps,
                        L: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RESET: tl.constexpr,
                        DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """P/den (B·H, N·L, L), den, and the signed s where it is larger than the floor, else 0."""
    i_bh, i_n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    o_t = (i_bh * N + i_n) * L + tl.arange(0, L)
    b_p = tl.zeros([L, L], dtype=tl.float32)
    b_qn = tl.zeros([L], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_q = tile(d_q, i_b, i_h, i_n * L, i_k, L, BK, DOT)
        b_k = tile(d_k, i_b, i_h, i_n * L, i_k, L, BK, DOT)
        b_p = tl.dot(b_q, b_k.T, b_p, input_precision=PRECISION)
        if NORM:
            b_n = tl.load(p_n + (i_bh * (N + 1) + i_n) * K + i_k + tl.arange(0, BK))
            b_qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
    seen = tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :]
    if RESET:
        b_document = tl.load(p_document + o_t)
        seen = seen & (b_document[:, None] == b_document[None, :])
    exponent = tl.load(p_u + o_t)[None, :] - tl.load(p_top + o_t)[:, None]
    b_p *= scale * tl.exp2(tl.where(seen, exponent, -float("inf")))
    b_den = tl.load(p_floor + o_t)
    if NORM:
        b_s = tl.sum(b_p, 1) + scale * tl.load(p_beta + o_t) * b_qn
        tl.store(p_s + o_t, tl.where(tl.abs(b_s) > b_den, b_s, 0.0))
        b_den = tl.maximum(tl.abs(b_s), b_den) + eps
    tl.store(p_den + o_t, b_den)
    b_p *= (1.0 / b_den)[:, None]
    d_p.store([i_bh.to(tl.int32), i_n * L, 0], b_p.to(d_p.dtype).reshape(1, L, L))


@gluon.jit
def _places(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.bfloat16, [COUNT, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit
def _come(desc, at, bar, place):
    tma.async_copy_global_to_shared(desc, at, bar, place)


@gluon.constexpr_function
def _left():
    """Where the matrix units take a left side from registers: a sum that is made small stands there already."""
    return gl.DotOperandLayout(0, _sums(64), 2)


@gluon.jit
def _flow(p_flow, all_m, all_h, at):
    """h · dh of 64 tokens over 128 columns, 8 tokens at a time, for which there are registers."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_t = gl.arange(0, 8, gl.SliceLayout(1, LINES))
    for i in gl.static_range(8):
        b_sum = gl.zeros([8, 64], gl.float32, LINES)
        for b in gl.static_range(2):
            b_m = all_m.index(at + b).slice(8 * i, 8).load(LINES).to(gl.float32)
            b_sum += b_m * all_h.index(b).slice(8 * i, 8).load(LINES).to(gl.float32)
        gl.store(p_flow + 8 * i + o_t, gl.sum(b_sum, 1))


@gluon.jit
def _bring(descs, tiles, all_g, bars, pointers, i_b, i_h, i_r, i_v, first, N, KEYS: gl.constexpr, BACK: gl.constexpr,
           FLOW: gl.constexpr):  # fmt: skip
    """X, Y, P, the program's part of M, and two vectors of every chunk into the places that turn has; h · dh."""
    d_x, d_y, d_m, d_p, d_h = descs
    all_x, all_y, all_m, all_p, all_h = tiles
    read_full, write_full, g_full, read_empty, write_empty, h_full = bars
    SIZE: gl.constexpr = d_x.block_type.nbytes
    o_t = gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
    for i in range(N):
        i_n, turn = N - 1 - i if BACK else i, i & 1
        i_t, phase = (first + i_n) * 64, i >> 1 & 1
        # A barrier that nothing has arrived at yet lets pass who waits for phase 1.
        mbarrier.wait(read_empty.index(turn), phase ^ 1)
        mbarrier.expect(read_full.index(turn), (KEYS + 3) * SIZE)
        for b in gl.static_range(KEYS):
            _come(d_x, [i_b, i_h, i_t, 64 * b], read_full.index(turn), all_x.index(KEYS * turn + b))
        for b in gl.static_range(2):
            _come(d_m, [i_b, i_h, i_t, i_v + 64 * b], read_full.index(turn), all_m.index(2 * turn + b))
        _come(d_p, [i_r, i_n * 64, 0], read_full.index(turn), all_p.index(turn))
        o = (i_r.to(gl.int64) * N + i_n) * 64 + o_t
        all_g.index(2 * turn).store(gl.load(pointers[0] + o))
        all_g.index(2 * turn + 1).store(gl.load(pointers[1] + o))
        gl.thread_barrier()
        mbarrier.arrive(g_full.index(turn))
        mbarrier.wait(write_empty.index(turn), phase ^ 1)
        mbarrier.expect(write_full.index(turn), KEYS * SIZE)
        for b in gl.static_range(KEYS):
            _come(d_y, [i_b, i_h, i_t, 64 * b], write_full.index(turn), all_y.index(KEYS * turn + b))
        if FLOW:
            if i > 0:
                # The chunk before, while this one is on its way.
                mbarrier.wait(read_full.index(turn ^ 1), (i - 1) >> 1 & 1)
                mbarrier.wait(h_full, (i - 1) & 1)
                then = i_n + 1 if BACK else i_n - 1
                _flow(pointers[2] + (i_r.to(gl.int64) * N + then) * 64, all_m, all_h, 2 * (turn ^ 1))
                # Nobody of this group reads these places any more: the next turn may fill them.
                gl.thread_barrier()
            mbarrier.expect(h_full, 2 * SIZE)
            for b in gl.static_range(2):
                _come(d_h, [i_b, i_h, i_t, i_v + 64 * b], h_full, all_h.index(b))
    if FLOW:
        mbarrier.wait(read_full.index((N - 1) & 1), (N - 1) >> 1 & 1)
        mbarrier.wait(h_full, (N - 1) & 1)
        then = 0 if BACK else N - 1
        _flow(pointers[2] + (i_r.to(gl.int64) * N + then) * 64, all_m, all_h, 2 * ((N - 1) & 1))


@gluon.jit
def _corner(i_r, i_v, K, V, B: gl.constexpr):
    """Offsets of the numbers of 64 columns from i_v on and keys from 64 B on, with columns as rows."""
    # Made anew where they are wanted: kept over the loop they would not fit into the registers.
    o_v, o_k = i_v + _anew(gl.arange(0, 64, _rows(64))), 64 * B + _anew(gl.arange(0, 64, _columns(64)))
    return i_r.to(gl.int64) * K * V + o_k[None, :] * V + o_v[:, None]


@gluon.jit
def _first(p_c, i_r, i_v, K, V, B: gl.constexpr, EMPTY: gl.constexpr):
    if EMPTY:
        return gl.zeros([64, 64], gl.float32, _sums(64))
    return gl.load(p_c + _corner(i_r, i_v, K, V, B))


@gluon.jit
def _place(place, b_x):
    """b_x into a place that the store before the last one has left."""
    tma.store_wait(1)
    gl.thread_barrier()
    place.store(b_x.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _once(b_x):
    """b_x, which the compiler may not make small here and keep for later: registers are scarcer than arithmetic."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b_x], dtype=b_x.dtype, is_pure=False, pack=1)


@gluon.jit
def _keep(d_kept, i_kept, i_v, own, b_0, b_1, b_2, b_3, zero, KEYS: gl.constexpr):
    """C of this moment for chunks of 128."""
    s_0, s_1 = own.index(zero), own.index(zero + 1)
    _place(s_0.permute([1, 0]), _once(b_0))
    tma.async_copy_shared_to_global(d_kept, [i_kept, 0, i_v], s_0)
    _place(s_1.permute([1, 0]), _once(b_1))
    tma.async_copy_shared_to_global(d_kept, [i_kept, 64, i_v], s_1)
    if KEYS == 4:
        _place(s_0.permute([1, 0]), _once(b_2))
        tma.async_copy_shared_to_global(d_kept, [i_kept, 128, i_v], s_0)
        _place(s_1.permute([1, 0]), _once(b_3))
        tma.async_copy_shared_to_global(d_kept, [i_kept, 192, i_v], s_1)


@gluon.jit
def _read(b_o, b_c, s_x):
    """b_o + C_T X_T of 64 keys, begun, and what has to stay until it ends."""
    b_left = gl.convert_layout(b_c.to(gl.bfloat16), _left())
    return _product(b_left, s_x.permute([1, 0]), b_o), b_left


@gluon.jit
def _reads(b_0, b_1, b_2, b_3, all_x, at, KEYS: gl.constexpr):
    """C_T X_T; nobody reads X any more."""
    b_o, b_a = _read(gl.zeros([64, 64], gl.float32, _sums(64)), b_0, all_x.index(at))
    b_o, b_b = _read(b_o, b_1, all_x.index(at + 1))
    if KEYS == 4:
        b_o, b_a = warpgroup_mma_wait(1, deps=[b_o, b_a])
        b_o, b_a = _read(b_o, b_2, all_x.index(at + 2))
        b_o, b_b = warpgroup_mma_wait(1, deps=[b_o, b_b])
        b_o, b_b = _read(b_o, b_3, all_x.index(at + 3))
    b_o, b_a, b_b = warpgroup_mma_wait(0, deps=[b_o, b_a, b_b])
    return b_o


@gluon.jit
def _values(descs, tiles, all_g, own, bars, d_o, d_kept, p_gamma, p_c, p_last, i_b, i_h, i_r, i_v, first, N, K, V,
            G: gl.constexpr, KEYS: gl.constexpr, BACK: gl.constexpr, KEEP: gl.constexpr, EMPTY: gl.constexpr):  # fmt: skip
    """h, or dv, of 64 columns of every chunk, and their last C."""
    all_x, all_y, all_m, all_p, _ = tiles
    read_full, write_full, g_full, read_empty, write_empty, _ = bars
    i_v += 64 * G
    b_0, b_1 = _first(p_c, i_r, i_v, K, V, 0, EMPTY), _first(p_c, i_r, i_v, K, V, 1, EMPTY)
    b_2, b_3 = b_0, b_1
    if KEYS == 4:
        b_2, b_3 = _first(p_c, i_r, i_v, K, V, 2, EMPTY), _first(p_c, i_r, i_v, K, V, 3, EMPTY)
    for i in range(N):
        # Addresses are made anew in every turn: kept over the loop they would not fit into the registers.
        zero = _anew(i * 0)
        i_n, turn, phase = N - 1 - i if BACK else i, (i & 1) + zero, i >> 1 & 1
        b_gamma = gl.load(p_gamma + i_r.to(gl.int64) * N + i_n)
        if KEEP and i & 1 == 0:
            _keep(d_kept, i_r * (N // 2) + i_n // 2, i_v, own, b_0, b_1, b_2, b_3, 2 * G + zero, KEYS)
        mbarrier.wait(read_full.index(turn), phase)
        b_o = _reads(b_0, b_1, b_2, b_3, all_x, KEYS * turn, KEYS)
        mbarrier.wait(g_full.index(turn), phase)
        b_m = all_m.index(2 * turn + G).permute([1, 0]).load(_left())
        b_w = all_g.index(2 * turn + 1).load(gl.SliceLayout(0, _left()))
        b_w = (b_m.to(gl.float32) * b_w[None, :]).to(gl.bfloat16)
        b_o *= all_g.index(2 * turn).load(_columns(64))[None, :]
        s_p = all_p.index(turn)
        b_o = _product(b_m, s_p if BACK else s_p.permute([1, 0]), b_o)
        mbarrier.wait(write_full.index(turn), phase)
        b_0 = _product(b_w, all_y.index(KEYS * turn), b_0 * b_gamma)
        b_1 = _product(b_w, all_y.index(KEYS * turn + 1), b_1 * b_gamma)
        if KEYS == 4:
            b_2 = _product(b_w, all_y.index(KEYS * turn + 2), b_2 * b_gamma)
            b_3 = _product(b_w, all_y.index(KEYS * turn + 3), b_3 * b_gamma)
        b_o, b_m = warpgroup_mma_wait(KEYS, deps=[b_o, b_m])
        s_o = own.index(2 * G + turn)
        _place(s_o.permute([1, 0]), b_o)
        mbarrier.arrive(read_empty.index(turn))
        tma.async_copy_shared_to_global(d_o, [i_b, i_h, (first + i_n) * 64, i_v], s_o)
        if KEYS == 4:
            b_0, b_1, b_2, b_3, b_w = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2, b_3, b_w])
        else:
            b_0, b_1, b_w = warpgroup_mma_wait(0, deps=[b_0, b_1, b_w])
        gl.thread_barrier()
        mbarrier.arrive(write_empty.index(turn))
    tma.store_wait(0)
    gl.store(p_last + _corner(i_r, i_v, K, V, 0), b_0)
    gl.store(p_last + _corner(i_r, i_v, K, V, 1), b_1)
    if KEYS == 4:
        gl.store(p_last + _corner(i_r, i_v, K, V, 2), b_2)
        gl.store(p_last + _corner(i_r, i_v, K, V, 3), b_3)


@gluon.jit(do_not_specialize=["N", "S"])
def mlstm_columns_kernel(d_x, d_y, d_m, d_p, d_o, d_kept, d_h, p_scale, p_weight, p_gamma, p_c, p_last, p_flow,
                         H, N, S, K, V,
                         KEYS: gl.constexpr, REGS: gl.constexpr, BACK: gl.constexpr, KEEP: gl.constexpr,
                         EMPTY: gl.constexpr, FLOW: gl.constexpr):  # fmt: skip
    """h (dv) of 128 columns of one of S parts of a sequence, of N chunks each, and C behind (dC before) it."""
    tiles_v = V // 128
    i_r, i_v = gl.program_id(0) // tiles_v, (gl.program_id(0) % tiles_v) * 128
    i_b, i_h, first = i_r // S // H, i_r // S % H, i_r % S * N
    all_m = _places(4)
    all_h = all_m
    if FLOW:
        all_h = _places(2)
        p_flow += (i_v // 128) * (gl.num_programs(0) // tiles_v).to(gl.int64) * N * 64
    tiles = _places(2 * KEYS), _places(2 * KEYS), all_m, _places(2), all_h
    own = _places(4)
    all_g = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = _counters(2, 1), _counters(2, 1), _counters(2, 1), _counters(2, 2), _counters(2, 2), _counters(1, 1).index(0)
    descs = d_x, d_y, d_m, d_p, d_h
    gl.warp_specialize(
        [
            (_bring, (descs, tiles, all_g, bars, (p_scale, p_weight, p_flow), i_b, i_h, i_r, i_v, first, N, KEYS, BACK, FLOW)),
            (_values, (descs, tiles, all_g, own, bars, d_o, d_kept, p_gamma, p_c, p_last, i_b, i_h, i_r, i_v, first, N, K, V,
                       0, KEYS, BACK, KEEP, EMPTY)),
            (_values, (descs, tiles, all_g, own, bars, d_o, d_kept, p_gamma, p_c, p_last, i_b, i_h, i_r, i_v, first, N, K, V,
                       1, KEYS, BACK, KEEP, EMPTY)),
        ],
        [4, 4],
        [REGS, REGS],
    )  # fmt: skip


def forward(plan, call, q, k, v, gates, c, n, eps, every):
    """h, the last C, n of every chunk, den and s; where `every` asks, C before every second chunk and P/den."""
    ns = call.normalisers(k, gates, n)
    den, s = call.vector(ns), call.vector(ns)
    p = scores(call, q, k, ns, gates, den, s, eps)
    first, _ = starts(call, plan.S, k, v, gates, (c, None))
    scale = call.scale * gates.beta / den
    h, c_last, cs, _ = columns(call, plan.S, (q, k, v, p), (scale, gates.alpha, gates.gamma), first, every > 0)
    return h, _alone(c_last, -1), ns, den, s, cs, p


def values(call, S, q, k, h, dh, p, gates, den, dc):
    """dv, dC behind every second chunk (B·H·N/2, K, V), dC of the first memory, and h · dh (V/128, B·H·N·L) of 128 columns
    each, which only a normaliser wants; of P/den and gates in chunks of 64."""
    last, _ = ends(call, S, (q, dh, dh), gates, (den, None), (dc, None))
    vectors = gates.alpha, call.scale * gates.beta / den, gates.gamma
    h = h if call.flags["NORM"] else None
    dv, first, dcs, flow = columns(call, S, (k, q, dh, p), vectors, last, True, back=True, h=h)
    return dv, dcs, _alone(first, 0), flow


def _alone(memories, at):
    """One of the memories of each row (B·H, S, K, V), which keeps none of the others alive."""
    return memories[:, at].clone() if memories.shape[1] > 1 else memories[:, 0]


def scores(call, q, k, ns, gates, den, s, eps):
    """P/den (B·H, N·L, L); fills den and s."""
    L = call.L
    p = padded(q, (call.rows, call.N * L, L), call.dtype)
    mlstm_scores_kernel[(call.rows * call.N,)](
        descriptors.heads(q, L, 64), descriptors.heads(k, L, 64), descriptors.matrices(p, L, L), ns, gates.u, gates.top,
        gates.beta, gates.floor, gates.document, den, s, call.H, call.N, call.K, call.scale, eps, L=L, BK=64,
        DOT=call.dot, PRECISION=call.precision, STAGES=3, num_warps=4, **call.flags,
    )  # fmt: skip
    return p


def columns(call, S, tensors, vectors, start, keep, back=False, h=None):
    """h or dv, the memories behind (before) all segments (B·H, S, K, V), the kept ones (none without `keep`), h · M of `h`."""
    x, y, m, p = tensors
    out, last = padded(m, m.shape), call.vector(vectors[0], call.rows, S, call.K, call.V)
    kept, empty = m.new_empty(call.rows * call.N // 2 if keep else 1, call.K, call.V), start is None
    flow = last if h is None else call.vector(last, call.V // 128, call.tokens)
    mlstm_columns_kernel[(call.rows * S * cdiv(call.V, 128),)](
        heads(x, 64, 64), heads(y, 64, 64), heads(m, 64, 64), matrices(p.view(call.rows * S, -1, 64), 64, 64),
        heads(out, 64, 64), matrices(kept, 64, 64), heads(m if h is None else h, 64, 64),
        *vectors, last if empty else start, last, flow, call.H, call.N // S, S, call.K, call.V,
        KEYS=call.K // 64, REGS=REGISTERS, BACK=back, KEEP=keep, EMPTY=empty, FLOW=h is not None, num_warps=4,
    )  # fmt: skip
    return out.contiguous(), last, kept if keep else None, None if h is None else flow
