"""The forward of the mLSTM on Hopper in one kernel of eight warps, which prepare the next chunk while this one is multiplied.

A program keeps BLOCKS · 128 columns of C and n on chip. While the matrix units are at work on what a chunk reads in the memory
and writes into it, the warps work out scores and denominators of the chunk after it. The equations stand in docs/math.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from exlstm.ops.mlstm.gates import padded
from exlstm.ops.mlstm.hopper import _anew, _barriers, _product, _wide, heads
from exlstm.ops.mlstm.plan import cdiv, power


@gluon.constexpr_function
def _lines():
    """Where 64 features of q or k stand to be multiplied number by number: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])


@gluon.constexpr_function
def _rows(width):
    return gl.SliceLayout(1, _wide(width))


@gluon.constexpr_function
def _columns(width):
    return gl.SliceLayout(0, _wide(width))


@gluon.jit
def _come_keys(d_q, d_k, all_q, all_k, bar, i_b, i_h, i_n, N, at, L: gl.constexpr):
    """q and k of chunk i_n, if there is one, on their way to place `at`."""
    there = i_n < N
    mbarrier.expect(bar, d_q.block_type.nbytes + d_k.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(d_q, [i_b, i_h, i_n * L, 0], bar, all_q.index(at), pred=there)
    tma.async_copy_global_to_shared(d_k, [i_b, i_h, i_n * L, 0], bar, all_k.index(at), pred=there)


@gluon.jit
def _come_values(d_v, all_v, bar, i_b, i_h, i_v, i_n, N, at, L: gl.constexpr, BLOCKS: gl.constexpr):
    there = i_n < N
    mbarrier.expect(bar, BLOCKS * d_v.block_type.nbytes, pred=there)
    for i in gl.static_range(BLOCKS):
        to = all_v.index(at * BLOCKS + i)
        tma.async_copy_global_to_shared(d_v, [i_b, i_h, i_n * L, i_v + 128 * i], bar, to, pred=there)


@gluon.jit
def _come_weights(all_g, pointers, i_c, L: gl.constexpr):
    """α, u and M of a chunk on their way."""
    o = gl.arange(0, L, gl.BlockedLayout([4], [32], [8], [0]))
    for i in gl.static_range(3):
        async_copy.async_copy_global_to_shared(all_g.index(i), pointers[i] + i_c * L + o)
    async_copy.commit_group()


@gluon.jit
def _with_n(s_q, b_n, b_m):
    """q·n, in two halves of the features."""
    b_q = gl.sum(s_q.slice(0, 64, dim=1).load(_lines()).to(gl.float32) * b_n[None, :], 1)
    return b_q + gl.sum(s_q.slice(64, 64, dim=1).load(_lines()).to(gl.float32) * b_m[None, :], 1)


@gluon.jit
def _weigh(s_k, b_n, b_gamma, all_g, there):
    """64 features of k times α in their place; those of n behind the chunk, if it is there."""
    b_k = s_k.load(_lines()).to(gl.float32) * all_g.index(0).load(gl.SliceLayout(1, _lines()))[:, None]
    s_k.store(b_k.to(gl.bfloat16))
    return gl.where(there, b_n * b_gamma + gl.sum(b_k, 0), b_n)


@gluon.jit
def _load_n(p_n, K):
    o_n = gl.arange(0, 64, gl.SliceLayout(0, _lines()))
    return gl.load(p_n + o_n, mask=o_n < K, other=0.0), gl.load(p_n + 64 + o_n, mask=o_n + 64 < K, other=0.0)


@gluon.jit
def _store_n(p_n, b_n, b_m, K, there):
    o_n = gl.arange(0, 64, gl.SliceLayout(0, _lines()))
    gl.store(p_n + o_n, b_n, mask=(o_n < K) & there)
    gl.store(p_n + 64 + o_n, b_m, mask=(o_n + 64 < K) & there)


@gluon.jit
def _decays(p_document, all_g, scale, L: gl.constexpr, RESET: gl.constexpr):
    o_t, o_j = gl.arange(0, L, _rows(L)), gl.arange(0, L, _columns(L))
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (gl.load(p_document + o_t)[:, None] == gl.load(p_document + o_j)[None, :])
    b_u, b_top = all_g.index(1).load(_columns(L)), all_g.index(2).load(_rows(L))
    return scale * gl.exp2(gl.where(seen, b_u[None, :] - b_top[:, None], -float("inf")))


@gluon.jit
def _row(p_beta, p_floor, i_c, scale, L: gl.constexpr):
    """a β and the floor of a chunk."""
    o_t = i_c * L + gl.arange(0, L, _rows(L))
    return scale * gl.load(p_beta + o_t), gl.load(p_floor + o_t)


@gluon.jit
def _weighted(b_p, b_qn, b_row, s_p, all_g, outs, p_document, scale, eps, at, there,
              L: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """P / den into its place, and a β / den; den and s to memory."""
    b_p = b_p * _decays(p_document + at, all_g, scale, L, RESET)
    b_beta, b_den = b_row
    b_s = gl.zeros([L], gl.float32, _rows(L))
    if NORM:
        b_sum = gl.sum(b_p, 1) + b_beta * gl.convert_layout(b_qn, _rows(L))
        b_s = gl.where(gl.abs(b_sum) > b_den, b_sum, 0.0)
        b_den = gl.maximum(gl.abs(b_sum), b_den) + eps
    b_part = 1.0 / b_den
    s_p.store((b_p * b_part[:, None]).to(gl.bfloat16))
    o_t = at + gl.arange(0, L, _rows(L))
    gl.store(outs[0] + o_t, b_den, mask=there)
    gl.store(outs[1] + o_t, b_s, mask=there)
    return b_beta * b_part


@gluon.jit
def _begin(b_c, b_gamma, s_q, s_k, s_v, s_c, L: gl.constexpr):
    """What 128 values of a chunk read in C, and C behind it, both begun. Nobody reads the place of C."""
    s_c.store(b_c.to(gl.bfloat16))
    b_c = b_c * b_gamma
    fence_async_shared()
    gl.thread_barrier()
    b_h = _product(s_q, s_c, gl.zeros([L, 128], gl.float32, _wide(128)))
    return b_h, _product(s_k.permute([1, 0]), s_v, b_c)


@gluon.jit
def _out(d_h, b_h, s_h, i_b, i_h, i_t, i_v):
    """h of 128 values to memory, as soon as its place is free."""
    tma.store_wait(0)
    gl.thread_barrier()
    s_h.store(b_h.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(d_h, [i_b, i_h, i_t, i_v], s_h)


@gluon.jit
def _memory_columns(i_bh, i_v, K, V, BK: gl.constexpr):
    """Offsets of the numbers in 128 columns of a memory, and which of them are there."""
    o_k, o_v = _anew(gl.arange(0, BK, _rows(128))), i_v + _anew(gl.arange(0, 128, _columns(128)))
    return i_bh * K * V + o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@gluon.jit
def _first(p_c0, i_bh, i_v, K, V, BK: gl.constexpr):
    o_c, inside = _memory_columns(i_bh, i_v, K, V, BK)
    return gl.load(p_c0 + o_c, mask=inside, other=0.0)


@gluon.jit
def _last(p_c_last, b_c, i_bh, i_v, K, V, BK: gl.constexpr):
    o_c, inside = _memory_columns(i_bh, i_v, K, V, BK)
    gl.store(p_c_last + o_c, b_c, mask=inside)


@gluon.jit
def _end(bars, values):
    """Nothing is on its way any more."""
    async_copy.wait_group(0)
    tma.store_wait(0)
    for i in gl.static_range(3):
        mbarrier.invalidate(bars.index(i))
    for i in gl.static_range(2):
        mbarrier.invalidate(values.index(i))


@gluon.jit
def _places(L: gl.constexpr, BK: gl.constexpr, BLOCKS: gl.constexpr):
    """Shared memory for q and k of three chunks, v and P of two, C and h of 128 values, and the weights of a chunk."""
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    all_q = gl.allocate_shared_memory(gl.bfloat16, [3, L, BK], WIDE)
    all_k = gl.allocate_shared_memory(gl.bfloat16, [3, L, BK], WIDE)
    all_v = gl.allocate_shared_memory(gl.bfloat16, [2 * BLOCKS, L, 128], WIDE)
    all_p = gl.allocate_shared_memory(gl.bfloat16, [2, L, L], WIDE)
    all_c = gl.allocate_shared_memory(gl.bfloat16, [1, BK, 128], WIDE)
    all_h = gl.allocate_shared_memory(gl.bfloat16, [1, L, 128], WIDE)
    all_g = gl.allocate_shared_memory(gl.float32, [3, L], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return all_q, all_k, all_v, all_p, all_c, all_h, all_g


@gluon.jit
def _first_scores(s_q, s_k, s_p, all_g, b_n, b_m, b_gamma, b_row, outs, p_document, scale, eps, at, first,
                  L: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """a β / den of the first chunk, and n behind it; P / den and k times α into their places."""
    b_p = _product(s_q, s_k.permute([1, 0]), gl.zeros([L, L], gl.float32, _wide(L)))
    b_qn = _with_n(s_q, b_n, b_m)
    b_p = warpgroup_mma_wait(0, deps=[b_p])
    async_copy.wait_group(0)
    gl.thread_barrier()
    b_w = _weighted(b_p, b_qn, b_row, s_p, all_g, outs, p_document, scale, eps, at, first, L, NORM, RESET)
    b_n = _weigh(s_k.slice(0, 64, dim=1), b_n, b_gamma, all_g, True)
    b_m = _weigh(s_k.slice(64, 64, dim=1), b_m, b_gamma, all_g, True)
    gl.thread_barrier()
    return b_w, b_n, b_m


@gluon.jit
def _first_half(b_c, b_n, b_m, b_w, b_gamma, b_row, tiles, then, all_g, bars, outs, p_document, scale, eps, i, at, first, there,
                L: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """h of the first 128 values of chunk i and C behind it, both begun; a β / den of chunk i and, with P / den, of the next."""
    s_q, s_k, s_v, s_p, s_c = tiles
    s_r, s_l, s_s = then
    mbarrier.wait(bars[0], (i + 1) // 3 & 1, pred=there)
    b_p = _product(s_r, s_l.permute([1, 0]), gl.zeros([L, L], gl.float32, _wide(L)))
    mbarrier.wait(bars[1], i // 2 & 1)
    b_h, b_c = _begin(b_c, b_gamma, s_q, s_k, s_v, s_c, L)
    b_qn = _with_n(s_r, b_n, b_m)
    b_p, b_h = warpgroup_mma_wait(1, deps=[b_p, b_h])
    b_r = gl.convert_layout(b_w, _rows(128))
    b_h = _product(s_p, s_v, b_h * b_r[:, None])
    async_copy.wait_group(0)
    gl.thread_barrier()
    store = first & there
    b_w = _weighted(b_p, b_qn, b_row, s_s, all_g, outs, p_document, scale, eps, at, store, L, NORM, RESET)
    return b_h, b_c, b_r, b_w


@gluon.jit
def _second_half(d_h, b_h, b_c, b_e, b_n, b_m, b_r, b_gamma, b_coming, tiles, s_y, s_l, s_h, all_g, there, i_b, i_h, i_t, i_v,
                 L: gl.constexpr, BLOCKS: gl.constexpr):  # fmt: skip
    """h of chunk i to memory, of another 128 values too where there are two blocks; k of the next times α, and n behind it."""
    s_q, s_k, _, s_p, s_c = tiles
    if BLOCKS == 2:
        b_h, b_c = warpgroup_mma_wait(0, deps=[b_h, b_c])
        _out(d_h, b_h, s_h, i_b, i_h, i_t, i_v)
        b_h, b_e = _begin(b_e, b_gamma, s_q, s_k, s_y, s_c, L)
    b_n = _weigh(s_l.slice(0, 64, dim=1), b_n, b_coming, all_g, there)
    b_m = _weigh(s_l.slice(64, 64, dim=1), b_m, b_coming, all_g, there)
    if BLOCKS == 2:
        b_h = warpgroup_mma_wait(1, deps=[b_h])
        b_h = _product(s_p, s_y, b_h * b_r[:, None])
        b_h, b_e = warpgroup_mma_wait(0, deps=[b_h, b_e])
    else:
        b_h, b_c = warpgroup_mma_wait(0, deps=[b_h, b_c])
        b_e = b_c
    _out(d_h, b_h, s_h, i_b, i_h, i_t, i_v + 128 * (BLOCKS - 1))
    return b_c, b_e, b_n, b_m


@gluon.jit(do_not_specialize=["N"])
def mlstm_ahead_kernel(d_q, d_k, d_v, d_h, p_c0, p_n0, p_c_last, p_n, p_alpha, p_beta, p_gamma, p_u, p_top, p_floor,
                       p_document, p_den, p_s, H, N, K, V, scale, eps, L: gl.constexpr, BK: gl.constexpr,
                       BLOCKS: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """h of 128 · BLOCKS columns, the last memory, denominators, and n of every chunk; eight warps."""
    tiles_v = (V + 128 * BLOCKS - 1) // (128 * BLOCKS)
    i_bh, i_v = (gl.program_id(0) // tiles_v).to(gl.int64), (gl.program_id(0) % tiles_v) * (128 * BLOCKS)
    i_b, i_h = (i_bh // H).to(gl.int32), (i_bh % H).to(gl.int32)
    all_q, all_k, all_v, all_p, all_c, all_h, all_g = _places(L, BK, BLOCKS)
    bars, values, first = _barriers(3), _barriers(2), i_v == 0
    pointers, outs = (p_alpha, p_u, p_top), (p_den, p_s)
    for i in gl.static_range(3):
        _come_keys(d_q, d_k, all_q, all_k, bars.index(i), i_b, i_h, i, N, i, L)
        if i < 2:
            _come_values(d_v, all_v, values.index(i), i_b, i_h, i_v, i, N, i, L, BLOCKS)
    _come_weights(all_g, pointers, i_bh * N, L)
    b_c, b_e = _first(p_c0, i_bh, i_v, K, V, BK), _first(p_c0, i_bh, i_v + 128 * (BLOCKS - 1), K, V, BK)
    b_n, b_m = _load_n(p_n0 + i_bh * K, K)
    b_gamma, b_row = gl.load(p_gamma + i_bh * N), _row(p_beta, p_floor, i_bh * N, scale, L)
    # Scores of the first chunk, then always those of the next.
    _store_n(p_n + i_bh * (N + 1) * K, b_n, b_m, K, first)
    mbarrier.wait(bars.index(0), 0)
    b_w, b_n, b_m = _first_scores(
        all_q.index(0), all_k.index(0), all_p.index(0), all_g, b_n, b_m, b_gamma, b_row, outs, p_document, scale, eps,
        i_bh * N * L, first, L, NORM, RESET,
    )  # fmt: skip
    _come_weights(all_g, pointers, i_bh * N + gl.minimum(1, N - 1), L)
    for i in range(N):
        # Addresses are made anew in every turn: kept over the loop they would not fit into the registers.
        zero = _anew(i * 0)
        at, turn, then, there = i % 3 + zero, (i & 1) + zero, (i + 1) % 3 + zero, i + 1 < N
        s_q, s_k, s_p, s_l, s_v = all_q.index(at), all_k.index(at), all_p.index(turn), all_k.index(then), turn * BLOCKS
        s_c, s_h, i_c, i_y = all_c.index(zero), all_h.index(zero), i_bh * N + i, i_bh * N + gl.minimum(i + 1, N - 1)
        b_coming, b_row = gl.load(p_gamma + i_y), _row(p_beta, p_floor, i_y, scale, L)
        _store_n(p_n + (i_c + i_bh + 1) * K, b_n, b_m, K, first)
        tiles, coming = (s_q, s_k, all_v.index(s_v), s_p, s_c), (all_q.index(then), s_l, all_p.index(1 - turn))
        b_h, b_c, b_r, b_w = _first_half(
            b_c, b_n, b_m, b_w, b_gamma, b_row, tiles, coming, all_g, (bars.index(then), values.index(turn)), outs, p_document,
            scale, eps, i, i_y * L, first, there, L, NORM, RESET,
        )  # fmt: skip
        b_c, b_e, b_n, b_m = _second_half(
            d_h, b_h, b_c, b_e, b_n, b_m, b_r, b_gamma, b_coming, tiles, all_v.index(s_v + BLOCKS - 1), s_l, s_h, all_g,
            there, i_b, i_h, i * L, i_v, L, BLOCKS,
        )  # fmt: skip
        _come_values(d_v, all_v, values.index(turn), i_b, i_h, i_v, i + 2, N, turn, L, BLOCKS)
        _come_keys(d_q, d_k, all_q, all_k, bars.index(at), i_b, i_h, i + 3, N, at, L)
        _come_weights(all_g, pointers, i_bh * N + gl.minimum(i + 2, N - 1), L)
        b_gamma = b_coming
    _end(bars, values)
    _last(p_c_last, b_c, i_bh, i_v, K, V, BK)
    if BLOCKS == 2:
        _last(p_c_last, b_e, i_bh, i_v + 128, K, V, BK)


def forward(plan, call, q, k, v, gates, c, n, eps, every):
    """h, the last C, n of every chunk, den and s; C of none, for whoever wants it works it out again."""
    L, K = plan.L, power(call.K)
    ns = call.vector(n, call.rows, call.N + 1, call.K)
    den, s, c_last = call.vector(ns), call.vector(ns), call.vector(ns, call.rows, call.K, call.V)
    h = padded(v, v.shape)
    mlstm_ahead_kernel[(call.rows * cdiv(call.V, plan.BV),)](
        heads(q, L, K), heads(k, L, K), heads(v, L, 128), heads(h, L, 128), c.contiguous(), n.contiguous(), c_last, ns,
        gates.alpha, gates.beta, gates.gamma, gates.u, gates.top, gates.floor, gates.document, den, s,
        call.H, call.N, call.K, call.V, call.scale, eps, L=L, BK=K, BLOCKS=plan.BV // 128, num_warps=8, **call.flags,
    )  # fmt: skip
    return h.contiguous(), c_last, ns, den, s, None
