"""A backward of the mLSTM on Hopper in Gluon, for heads of 64, in one kernel a chunk or a sequence.

What two_pass.py works out for the backward in several kernels, which read q, k, v and dh again and
again, is here one: `mlstm_backward_kernel`, for many sequences and heads, walks from the last chunk of each to the first with dC
and dn on chip; `mlstm_gradients_kernel`, for few, takes the chunks one by one, with dC out of `states`. Gluon, because Triton's
own pipeline neither overlaps loads with the products nor keeps so much in registers: each tile has one place in shared memory,
and the next one comes as soon as nobody reads it any more. The equations stand in docs/math.md, what was measured in docs/log.md.
"""

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from exlstm.ops.mlstm import gates as descriptors
from exlstm.ops.mlstm.gates import padded
from exlstm.ops.mlstm.intra import denominator_gradient
from exlstm.ops.mlstm.plan import Chain, cdiv, power
from exlstm.ops.mlstm.segments import ends
from exlstm.ops.mlstm.two_pass import states


@gluon.constexpr_function
def _sums(width):
    """Where the matrix units leave a product `width` wide, in four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def _rows(width):
    """Where a vector stands that has a number for each row of such a product."""
    return gl.SliceLayout(1, _sums(width))


@gluon.constexpr_function
def _columns(width):
    """The same with a number for each column."""
    return gl.SliceLayout(0, _sums(width))


@gluon.constexpr_function
def _parts():
    """Where a part of a memory, 32 of its rows, stands to be multiplied number by number."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _fetch(desc, at, bar, buffer, wanted):
    mbarrier.expect(bar, desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(desc, at, bar, buffer, pred=wanted)


@gluon.jit
def _fetch_vector(buffer, pointer, L: gl.constexpr):
    o = gl.arange(0, L, gl.BlockedLayout([4], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(buffer, pointer + o)


@gluon.jit
def _fetch_vectors(to, vectors, pointers, at, at_n, L: gl.constexpr):
    """den, s, α, β, M, u and n of a chunk of L tokens, which is as many as n has numbers, on their way to `vectors`."""
    for i in gl.static_range(6):
        _fetch_vector(vectors[i].index(to), pointers[i] + at, L)
    _fetch_vector(vectors[6].index(to), pointers[6] + at_n, L)
    async_copy.commit_group()


@gluon.jit
def _product(a, b, acc):
    """acc + a b, begun."""
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def _anew(x):
    """x, which the compiler may not work out before a loop and keep: registers are scarcer than arithmetic."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def _memory(i_bh, K, V, BK: gl.constexpr, BV: gl.constexpr):
    """Offsets of a memory's numbers, and which of them are there."""
    o_k, o_v = _anew(gl.arange(0, BK, _rows(BV))), gl.arange(0, BV, _columns(BV))
    return i_bh * K * V + o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@gluon.jit
def _places(L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """Shared memory for q, k, v, dh, C, dC, and for two matrices (L, L) that are worked out, each behind an axis of one."""
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    all_q = gl.allocate_shared_memory(gl.bfloat16, [1, L, BK], WIDE)
    all_k = gl.allocate_shared_memory(gl.bfloat16, [1, L, BK], WIDE)
    all_v = gl.allocate_shared_memory(gl.bfloat16, [1, L, BV], WIDE)
    all_dh = gl.allocate_shared_memory(gl.bfloat16, [1, L, BV], WIDE)
    all_c = gl.allocate_shared_memory(gl.bfloat16, [1, BK, BV], WIDE)
    all_dc = gl.allocate_shared_memory(gl.bfloat16, [1, BK, BV], WIDE)
    all_p = gl.allocate_shared_memory(gl.bfloat16, [1, L, L], WIDE)
    all_g = gl.allocate_shared_memory(gl.bfloat16, [1, L, L], WIDE)
    return all_q, all_k, all_v, all_dh, all_c, all_dc, all_p, all_g


@gluon.jit
def _tiles(places, at):
    all_q, all_k, all_v, all_dh, all_c, all_dc, all_p, all_g = places
    s_q, s_k, s_v, s_dh, s_c = all_q.index(at), all_k.index(at), all_v.index(at), all_dh.index(at), all_c.index(at)
    return s_q, s_k, s_v, s_dh, s_c, all_dc.index(at), all_p.index(at), all_g.index(at)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _vectors(L: gl.constexpr, BK: gl.constexpr):
    """Shared memory for den, s, α, β, M, u and n of two chunks."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_den = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_s = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_alpha = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_beta = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_top = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_u = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_n = gl.allocate_shared_memory(gl.float32, [2, BK], FLAT)
    return s_den, s_s, s_alpha, s_beta, s_top, s_u, s_n


@gluon.jit
def _first_products(b_dc, b_gamma, phase, tiles, bars, L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """dh Cᵀ, q kᵀ and dh vᵀ of a chunk whose tiles are on their way, and γ <C⁻, dC⁺> row by row; nobody reads C then."""
    s_q, s_k, s_v, s_dh, s_c, s_dc, _, _ = tiles
    s_dc.store(b_dc.to(gl.bfloat16))
    fence_async_shared()
    mbarrier.wait(bars.index(4), phase)
    mbarrier.wait(bars.index(3), phase)
    b_dq = _product(s_dh, s_c.permute([1, 0]), gl.zeros([L, BK], gl.float32, _sums(BK)))
    mbarrier.wait(bars.index(0), phase)
    mbarrier.wait(bars.index(1), phase)
    b_p = _product(s_q, s_k.permute([1, 0]), gl.zeros([L, L], gl.float32, _sums(L)))
    mbarrier.wait(bars.index(2), phase)
    b_g = _product(s_dh, s_v.permute([1, 0]), gl.zeros([L, L], gl.float32, _sums(L)))
    # <C⁺, dC⁺> = γ <C⁻, dC⁺> + Σ_j k_j · (what dk_j has from dC⁺), and so for n.
    b_inflow = gl.convert_layout(gl.sum(s_c.load(_sums(BV)).to(gl.float32) * b_dc, 1), _rows(L)) * b_gamma
    b_dq, b_p, b_g = warpgroup_mma_wait(0, deps=[b_dq, b_p, b_g])
    gl.thread_barrier()
    return b_dq, b_p, b_g, b_inflow


@gluon.jit
def _inside(b_dq, b_p, b_g, b_part, b_beta, o_t, o_j, p_document, at, scale, phase, vectors, tiles, s_w,
            L: gl.constexpr, BK: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """P / den, a dS and w q into their places; the first half of dq, and what n of the chunk has from it."""
    _, s_s, _, _, s_top, s_u, s_n = vectors
    s_q, _, _, _, _, _, s_p, s_g = tiles
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        b_document = gl.load(p_document + at + o_t)
        seen = seen & (b_document[:, None] == gl.load(p_document + at + o_j)[None, :])
    b_u, b_top = s_u.index(phase).load(_columns(L)), s_top.index(phase).load(_rows(L))
    b_d = scale * gl.exp2(gl.where(seen, b_u[None, :] - b_top[:, None], -float("inf")))
    b_p *= b_d
    b_ds = gl.zeros([L], gl.float32, _rows(L))
    if NORM:
        # h·dh of every token, by the two sums that h is made of.
        b_sum = s_s.index(phase).load(_rows(L))
        b_ds = gl.where(b_sum > 0, -b_part, gl.where(b_sum < 0, b_part, 0.0)) * b_part
        b_qc = gl.convert_layout(gl.sum(s_q.load(_sums(BK)).to(gl.float32) * b_dq, 1), _rows(L))
        b_ds *= gl.sum(b_p * b_g, 1) + b_beta * b_qc
    s_p.store((b_p * b_part[:, None]).to(gl.bfloat16))
    s_g.store(((b_g * b_part[:, None] + b_ds[:, None]) * b_d).to(gl.bfloat16))
    b_w, b_wn = gl.convert_layout(b_beta * b_part, _rows(BK)), gl.convert_layout(b_beta * b_ds, _rows(BK))
    b_q = s_q.load(_sums(BK)).to(gl.float32)
    s_w.store((b_q * b_w[:, None]).to(gl.bfloat16))
    fence_async_shared()
    b_flow = gl.sum(b_q * b_wn[:, None], 0)
    b_n = s_n.index(phase).load(_columns(BK))
    b_dq = b_dq * b_w[:, None] + b_wn[:, None] * b_n[None, :]
    gl.thread_barrier()
    return b_dq, b_flow


@gluon.jit
def _keys_from_behind(b_dk, b_gamma, b_inflow, b_flow, p_inflow, i_row, N, i_n, phase, vectors, s_dn, s_k,
                      BK: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """What dk has from dC⁺ and dn⁺; the inflow goes to memory, and dn⁻ in the place of dn⁺."""
    b_dn = s_dn.load(_columns(BK))
    b_nn = b_gamma * gl.sum(vectors[6].index(phase).load(_columns(BK)) * b_dn, 0)
    b_dk = (b_dk + b_dn[None, :]) * vectors[2].index(phase).load(_rows(BK))[:, None]
    b_kin = gl.convert_layout(gl.sum(s_k.load(_sums(BK)).to(gl.float32) * b_dk, 1), _rows(L))
    gl.store(p_inflow + i_row * N + i_n, b_nn + gl.sum(b_inflow + b_kin, 0))
    s_dn.store(b_dn * b_gamma + b_flow)
    return b_dk


@gluon.jit
def _row_sums(p_out, at, s_x, b_dx, o_t, BK: gl.constexpr, L: gl.constexpr):
    """x·dx of every token to memory."""
    b_sums = gl.convert_layout(gl.sum(s_x.load(_sums(BK)).to(gl.float32) * b_dx, 1), _rows(L))
    gl.store(p_out + at + o_t, b_sums)


@gluon.jit
def _first_fetches(inputs, i_b, i_h, i_row, i_first, N, i_n, tiles, bars, L: gl.constexpr):
    d_q, d_k, d_v, d_dh, d_c = inputs
    s_q, s_k, s_v, s_dh, s_c, _, _, _ = tiles
    _fetch(d_c, [(i_row * N + i_n).to(gl.int32), 0, 0], bars.index(4), s_c, N > 0)
    _fetch(d_dh, [i_b, i_h, (i_first + i_n) * L, 0], bars.index(3), s_dh, N > 0)
    _fetch(d_q, [i_b, i_h, (i_first + i_n) * L, 0], bars.index(0), s_q, N > 0)
    _fetch(d_k, [i_b, i_h, (i_first + i_n) * L, 0], bars.index(1), s_k, N > 0)
    _fetch(d_v, [i_b, i_h, (i_first + i_n) * L, 0], bars.index(2), s_v, N > 0)


@gluon.jit
def _last_memory(p_dc, p_dn, s_dn, r_k, i_row, K, V, BK: gl.constexpr, BV: gl.constexpr, EMPTY: gl.constexpr):
    """dC after the last chunk, with dn in its place."""
    if EMPTY:
        b_dc = gl.zeros([BK, BV], gl.float32, _sums(BV))
        s_dn.store(gl.zeros([BK], gl.float32, _columns(BK)))
    else:
        o_c, inside = _memory(i_row, K, V, BK, BV)
        b_dc = gl.load(p_dc + o_c, mask=inside, other=0.0)
        s_dn.store(gl.load(p_dn + i_row * K + r_k))
    return b_dc


@gluon.jit
def _gradients(b_dq, b_dc, b_gamma, b_inflow, b_flow, p_inflow, p_qdq, p_kdk, at, o_t, d_q, d_k, d_v, d_dh, i_b, i_h, i_row,
               i_first, N, i_n, more, phase, vectors, s_dn, tiles, s_w, bars,
               L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):  # fmt: skip
    """dq, dk and dv into the places of a dS, P and dC, and dC⁻; the tiles of the chunk before come as theirs are through."""
    s_q, s_k, s_v, s_dh, _, s_dc, s_p, s_g = tiles
    b_dk = _product(s_v, s_dc.permute([1, 0]), gl.zeros([L, BK], gl.float32, _sums(BK)))
    b_dq = _product(s_g, s_k, b_dq)
    b_dv = _product(s_k, s_dc, gl.zeros([L, BV], gl.float32, _sums(BV)))
    b_dk = warpgroup_mma_wait(2, deps=[b_dk])
    b_dk = _keys_from_behind(b_dk, b_gamma, b_inflow, b_flow, p_inflow, i_row, N, i_n, phase, vectors, s_dn, s_k, BK, L)
    _fetch(d_v, [i_b, i_h, (i_first + i_n - 1) * L, 0], bars.index(2), s_v, more)
    b_dk = _product(s_g.permute([1, 0]), s_q, b_dk)
    b_dq, b_dv = warpgroup_mma_wait(1, deps=[b_dq, b_dv])
    b_dv = b_dv * vectors[2].index(phase).load(_rows(BV))[:, None]
    b_dv = _product(s_p.permute([1, 0]), s_dh, b_dv)
    b_dc = _product(s_w.permute([1, 0]), s_dh, b_dc * b_gamma)
    _row_sums(p_qdq, at, s_q, b_dq, o_t, BK, L)
    b_dk = warpgroup_mma_wait(2, deps=[b_dk])
    _row_sums(p_kdk, at, s_k, b_dk, o_t, BK, L)
    gl.thread_barrier()
    _fetch(d_q, [i_b, i_h, (i_first + i_n - 1) * L, 0], bars.index(0), s_q, more)
    _fetch(d_k, [i_b, i_h, (i_first + i_n - 1) * L, 0], bars.index(1), s_k, more)
    s_g.store(b_dq.to(gl.bfloat16))
    b_dv, b_dc = warpgroup_mma_wait(0, deps=[b_dv, b_dc])
    gl.thread_barrier()
    _fetch(d_dh, [i_b, i_h, (i_first + i_n - 1) * L, 0], bars.index(3), s_dh, more)
    s_p.store(b_dk.to(gl.bfloat16))
    s_dc.store(b_dv.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    return b_dc


@gluon.jit
def _segment(S, N, CUT: gl.constexpr):
    """Row of this program, of its sequence and head, the chunk of the sequence where it begins, and whether that is the first."""
    i_row = gl.program_id(0).to(gl.int64)
    i_bh, i_first, first = i_row, 0, True
    if CUT:
        i_bh, i_first, first = i_row // S, (i_row % S).to(gl.int32) * N, i_row % S == 0
    return i_row, i_bh, i_first, first


@gluon.jit(do_not_specialize=["S", "N"])
def mlstm_backward_kernel(d_q, d_k, d_v, d_dh, d_c, d_dq, d_dk, d_dv, p_dc, p_dn, p_dc_first, p_dn_first, p_n, p_u, p_top,
                          p_document, p_alpha, p_beta, p_gamma, p_den, p_s, p_qdq, p_kdk, p_inflow, H, S, N, K, V, scale,
                          L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr,
                          EMPTY: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """dq, dk, dv and what the gates' gradients are made of, from the last chunk to the first, with dC and dn on chip."""
    i_row, i_bh, i_first, first = _segment(S, N, CUT)
    # n of the chunks stand with those of the sequence.
    p_n += (i_bh - i_row) * K
    i_b, i_h = (i_bh // H).to(gl.int32), (i_bh % H).to(gl.int32)
    places = _places(L, BK, BV)
    all_w = gl.allocate_shared_memory(gl.bfloat16, [1, L, BK], gl.NVMMASharedLayout(128, 16, rank=2))
    vectors, pointers, last = _vectors(L, BK), (p_den, p_s, p_alpha, p_beta, p_top, p_u, p_n), N - 1
    s_dn = gl.allocate_shared_memory(gl.float32, [BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = _barriers(5)
    _first_fetches((d_q, d_k, d_v, d_dh, d_c), i_b, i_h, i_row, i_first, N, last, _tiles(places, 0), bars, L)
    _fetch_vectors(0, vectors, pointers, (i_row * N + last) * L, (i_row * (N + 1) + last) * K, L)
    r_t, r_j = gl.arange(0, L, _rows(L)), gl.arange(0, L, _columns(L))
    r_k = gl.arange(0, BK, gl.BlockedLayout([1], [32], [4], [0]))
    b_dc = _last_memory(p_dc, p_dn, s_dn, r_k, i_row, K, V, BK, BV, EMPTY)
    for i in range(N):
        zero = _anew(i * 0)
        tiles, s_w = _tiles(places, zero), all_w.index(zero)
        i_n, phase, more = N - 1 - i, i & 1, i < N - 1
        at, o_t, o_j = (i_row * N + i_n) * L, _anew(r_t), _anew(r_j)
        async_copy.wait_group(0)
        before = gl.maximum(i_n - 1, 0)
        _fetch_vectors(1 - phase, vectors, pointers, (i_row * N + before) * L, (i_row * (N + 1) + before) * K, L)
        b_part, b_beta = 1.0 / vectors[0].index(phase).load(_rows(L)), scale * vectors[3].index(phase).load(_rows(L))
        b_gamma = gl.load(p_gamma + i_row * N + i_n)
        # The chunk before, whose stores read them, is through with the places of dC, P and a dS.
        tma.store_wait(0)
        b_dq, b_p, b_g, b_inflow = _first_products(b_dc, b_gamma, phase, tiles, bars, L, BK, BV)
        _fetch(d_c, [(i_row * N + i_n - 1).to(gl.int32), 0, 0], bars.index(4), tiles[4], more)
        b_dq, b_flow = _inside(
            b_dq, b_p, b_g, b_part, b_beta, o_t, o_j, p_document, at, scale, phase, vectors, tiles, s_w, L, BK, NORM, RESET
        )  # fmt: skip
        b_dc = _gradients(
            b_dq, b_dc, b_gamma, b_inflow, b_flow, p_inflow, p_qdq, p_kdk, at, o_t, d_q, d_k, d_v, d_dh,
            i_b, i_h, i_row, i_first, N, i_n, more, phase, vectors, s_dn, tiles, s_w, bars, L, BK, BV,
        )  # fmt: skip
        tma.async_copy_shared_to_global(d_dq, [i_b, i_h, (i_first + i_n) * L, 0], tiles[7])
        tma.async_copy_shared_to_global(d_dk, [i_b, i_h, (i_first + i_n) * L, 0], tiles[6])
        tma.async_copy_shared_to_global(d_dv, [i_b, i_h, (i_first + i_n) * L, 0], tiles[5])
    tma.store_wait(0)
    async_copy.wait_group(0)
    for i in gl.static_range(5):
        mbarrier.invalidate(bars.index(i))
    o_c, inside = _memory(i_bh, K, V, BK, BV)
    gl.store(p_dc_first + o_c, b_dc, mask=inside & first)
    gl.store(p_dn_first + i_bh * K + r_k, s_dn.load(gl.BlockedLayout([1], [32], [4], [0])), mask=first)


@gluon.jit
def _decay(p_u, p_top, p_document, at, L: gl.constexpr, RESET: gl.constexpr):
    """D (L, L) of the chunk whose vectors begin at `at`."""
    o_t, o_j = gl.arange(0, L, _rows(L)), gl.arange(0, L, _columns(L))
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (gl.load(p_document + at + o_t)[:, None] == gl.load(p_document + at + o_j)[None, :])
    return gl.exp2(gl.where(seen, gl.load(p_u + at + o_j)[None, :] - gl.load(p_top + at + o_t)[:, None], -float("inf")))


@gluon.jit
def _fetch_chunk(d_q, d_k, d_v, d_dh, d_c, d_dc, i_b, i_h, i_t, i_c, tiles, bars):
    s_q, s_k, s_v, s_dh, s_c, s_dc, _, _ = tiles
    _fetch(d_q, [i_b, i_h, i_t, 0], bars.index(0), s_q, True)
    _fetch(d_k, [i_b, i_h, i_t, 0], bars.index(1), s_k, True)
    _fetch(d_dh, [i_b, i_h, i_t, 0], bars.index(2), s_dh, True)
    _fetch(d_v, [i_b, i_h, i_t, 0], bars.index(3), s_v, True)
    _fetch(d_c, [i_c, 0, 0], bars.index(4), s_c, True)
    _fetch(d_dc, [i_c, 0, 0], bars.index(5), s_dc, True)


@gluon.jit
def _scores(b_d, b_part, tiles, bars, L: gl.constexpr):
    """P / den into its place."""
    s_q, s_k, _, _, _, _, s_p, _ = tiles
    mbarrier.wait(bars.index(0), 0)
    mbarrier.wait(bars.index(1), 0)
    b_p = warpgroup_mma(s_q, s_k.permute([1, 0]), gl.zeros([L, L], gl.float32, _sums(L)))
    s_p.store((b_p * b_d * b_part[:, None]).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _values(b_sums, d_v, d_dh, d_c, d_dc, d_dv, b_alpha, i_b, i_h, i_n, i_c, places, bars,
            L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """dv, tile by tile of BV values; dh vᵀ, dh Cᵀ, v dCᵀ and the parts of <C, dC>, which began as `b_sums`."""
    b_g, b_dq, b_dk, b_cdc = b_sums
    i_t = i_n * L
    for j in gl.static_range(TILES):
        zero = _anew(i_n * 0)
        _, s_k, s_v, s_dh, s_c, s_dc, s_p, s_g = _tiles(places, zero)
        mbarrier.wait(bars.index(2), j & 1)
        mbarrier.wait(bars.index(3), j & 1)
        b_g = _product(s_dh, s_v.permute([1, 0]), b_g)
        mbarrier.wait(bars.index(4), j & 1)
        b_dq = _product(s_dh, s_c.permute([1, 0]), b_dq)
        mbarrier.wait(bars.index(5), j & 1)
        b_dk = _product(s_v, s_dc.permute([1, 0]), b_dk)
        b_dv = _product(s_k, s_dc, gl.zeros([L, BV], gl.float32, _sums(BV)))
        for part in gl.static_range(BK // 32):
            b_c = s_c.slice(32 * part, 32).load(_parts()).to(gl.float32)
            b_cdc += gl.sum(b_c * s_dc.slice(32 * part, 32).load(_parts()).to(gl.float32), 1)
        b_g, b_dq, b_dk, b_dv = warpgroup_mma_wait(0, deps=[b_g, b_dq, b_dk, b_dv])
        gl.thread_barrier()
        if j + 1 < TILES:
            _fetch(d_v, [i_b, i_h, i_t, (j + 1) * BV], bars.index(3), s_v, True)
            _fetch(d_c, [i_c, 0, (j + 1) * BV], bars.index(4), s_c, True)
            _fetch(d_dc, [i_c, 0, (j + 1) * BV], bars.index(5), s_dc, True)
        b_dv = b_dv * gl.convert_layout(b_alpha, _rows(BV))[:, None]
        b_dv = warpgroup_mma(s_p.permute([1, 0]), s_dh, b_dv)
        tma.store_wait(0)
        gl.thread_barrier()
        if j + 1 < TILES:
            _fetch(d_dh, [i_b, i_h, i_t, (j + 1) * BV], bars.index(2), s_dh, True)
        s_g.store(b_dv.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(d_dv, [i_b, i_h, i_t, j * BV], s_g)
    return b_g, b_dq, b_dk, b_cdc


@gluon.jit
def _rest(b_dq, b_dk, b_cdc, b_alpha, b_gamma, b_w, b_wn, b_n, b_dn, p_inflow, p_qdq, p_kdk, i_c, at, tiles,
          L: gl.constexpr, BK: gl.constexpr):  # fmt: skip
    """dq and dk into the places of q and k, once a dS stands in its own."""
    s_q, s_k, _, _, _, _, _, s_g = tiles
    # <C⁺, dC⁺> = γ <C⁻, dC⁺> + Σ_j k_j · (what dk_j has from dC⁺), and so for n.
    b_dk = (b_dk + b_dn[None, :]) * gl.convert_layout(b_alpha, _rows(BK))[:, None]
    b_kin = gl.sum(s_k.load(_sums(BK)).to(gl.float32) * b_dk, 1)
    b_inflow = b_gamma * (gl.sum(b_cdc, 0) + gl.sum(b_n * b_dn, 0)) + gl.sum(b_kin, 0)
    gl.store(p_inflow + i_c, b_inflow)
    b_dq = b_dq * b_w[:, None] + b_wn[:, None] * b_n[None, :]
    gl.thread_barrier()
    b_dq = _product(s_g, s_k, b_dq)
    b_dk = _product(s_g.permute([1, 0]), s_q, b_dk)
    b_dq, b_dk = warpgroup_mma_wait(0, deps=[b_dq, b_dk])
    o_t = gl.arange(0, L, _rows(BK))
    gl.store(p_qdq + at + o_t, gl.sum(s_q.load(_sums(BK)).to(gl.float32) * b_dq, 1))
    gl.store(p_kdk + at + o_t, gl.sum(s_k.load(_sums(BK)).to(gl.float32) * b_dk, 1))
    gl.thread_barrier()
    s_q.store(b_dq.to(gl.bfloat16))
    s_k.store(b_dk.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit(do_not_specialize=["N"])
def mlstm_gradients_kernel(d_q, d_k, d_v, d_dh, d_c, d_dc, d_dq, d_dk, d_dv, p_n, p_dn, p_u, p_top, p_document, p_alpha,
                           p_gamma, p_den, p_w, p_ds, p_qdq, p_kdk, p_inflow, H, N, K, scale,
                           L: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, TILES: gl.constexpr,
                           RESET: gl.constexpr):  # fmt: skip
    """dq, dk, dv and what the gates' gradients are made of, of one chunk, in TILES tiles of BV values."""
    i_bh, i_n = (gl.program_id(0) // N).to(gl.int64), gl.program_id(0) % N
    i_b, i_h, i_t = (i_bh // H).to(gl.int32), (i_bh % H).to(gl.int32), i_n * L
    i_c, at = (i_bh * N + i_n).to(gl.int32), (i_bh * N + i_n) * L
    places = _places(L, BK, BV)
    tiles, bars = _tiles(places, 0), _barriers(6)
    _fetch_chunk(d_q, d_k, d_v, d_dh, d_c, d_dc, i_b, i_h, i_t, i_c, tiles, bars)
    o_t, o_k = gl.arange(0, L, _rows(L)), gl.arange(0, BK, _columns(BK))
    b_part, b_alpha, b_gamma = 1.0 / gl.load(p_den + at + o_t), gl.load(p_alpha + at + o_t), gl.load(p_gamma + i_c)
    b_d = scale * _decay(p_u, p_top, p_document, at, L, RESET)
    _scores(b_d, b_part, tiles, bars, L)
    b_g, b_dq = gl.zeros([L, L], gl.float32, _sums(L)), gl.zeros([L, BK], gl.float32, _sums(BK))
    b_dk, b_cdc = gl.zeros([L, BK], gl.float32, _sums(BK)), gl.zeros([32], gl.float32, gl.SliceLayout(1, _parts()))
    sums = b_g, b_dq, b_dk, b_cdc
    b_g, b_dq, b_dk, b_cdc = _values(
        sums, d_v, d_dh, d_c, d_dc, d_dv, b_alpha, i_b, i_h, i_n, i_c, places, bars, L, BK, BV, TILES
    )
    tiles = _tiles(places, _anew(i_n * 0))
    b_ds = gl.load(p_ds + at + o_t)
    o_r = gl.arange(0, L, _rows(BK))
    b_w = gl.load(p_w + at + o_r)
    # aβ ds is w den ds.
    b_wn = b_w * gl.load(p_den + at + o_r) * gl.load(p_ds + at + o_r)
    b_d = scale * _decay(p_u, p_top, p_document, at, L, RESET)
    b_g = ((b_g * b_part[:, None] + b_ds[:, None]) * b_d).to(gl.bfloat16)
    tma.store_wait(0)
    tiles[7].store(b_g)
    fence_async_shared()
    b_n = gl.load(p_n + (i_bh * (N + 1) + i_n) * K + o_k)
    b_dn = gl.load(p_dn + (i_bh * (N + 1) + i_n + 1) * K + o_k)
    _rest(b_dq, b_dk, b_cdc, b_alpha, b_gamma, b_w, b_wn, b_n, b_dn, p_inflow, p_qdq, p_kdk, i_c, at, tiles, L, BK)
    tma.async_copy_shared_to_global(d_dq, [i_b, i_h, i_t, 0], tiles[0])
    tma.async_copy_shared_to_global(d_dk, [i_b, i_h, i_t, 0], tiles[1])
    tma.store_wait(0)
    for i in gl.static_range(6):
        mbarrier.invalidate(bars.index(i))


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    return (_chain if isinstance(plan, Chain) else _fused)(plan, call, grads, q, k, v, gates, saved)


def _chain(plan, call, grads, q, k, v, gates, saved):
    (dh, dc, dn), (h, den, s, ns, cs, _), L, S, K = grads, saved, plan.L, plan.S, call.K
    V, (dc, dn) = power(call.V), ends(call, S, (q, h, dh), gates, (den, s), (dc, dn))
    dq, dk, dv = padded(q, q.shape), padded(k, k.shape), padded(v, v.shape)
    qdq, kdk = call.vector(den, 1, call.tokens), call.vector(den, 1, call.tokens)
    inflow = call.vector(den, 1, call.rows * call.N)
    first_c, first_n = call.vector(den, call.rows, K, call.V), call.vector(den, call.rows, K)
    keys, values = ([heads(x, L, width) for x in xs] for xs, width in (((q, k, dq, dk), K), ((v, dh, dv), V)))
    mlstm_backward_kernel[(call.rows * S,)](
        keys[0], keys[1], values[0], values[1], matrices(cs, K, V), keys[2], keys[3], values[2],
        first_c if dc is None else dc, first_n if dn is None else dn, first_c, first_n, ns, gates.u, gates.top,
        gates.document, gates.alpha, gates.beta, gates.gamma, den, s, qdq, kdk, inflow,
        call.H, S, call.N // S, K, call.V, call.scale, L=L, BK=K, BV=V, EMPTY=dc is None, CUT=S > 1, **call.flags, num_warps=4,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), (qdq, kdk, inflow), first_c, first_n


def _fused(plan, call, grads, q, k, v, gates, saved):
    (dh, dc, dn), (h, den, s, ns, cs, _), L, K, BV = grads, saved, plan.L, call.K, plan.BV
    w, ds, sums = denominator_gradient(call, q, h, dh, gates, den, s)
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    dcs, first = states(call, plan, q, dh, w, gates.gamma, dc, reverse=True)
    dq, dk, dv = padded(q, q.shape), padded(k, k.shape), padded(v, v.shape)
    qdq, kdk = call.vector(den, 1, call.tokens), call.vector(den, 1, call.tokens)
    inflow = call.vector(den, 1, call.rows * call.N)
    keys, values = ([heads(x, L, width) for x in xs] for xs, width in (((q, k, dq, dk), K), ((v, dh, dv), BV)))
    mlstm_gradients_kernel[(call.rows * call.N,)](
        keys[0], keys[1], values[0], values[1], matrices(cs, K, BV), matrices(dcs, K, BV), keys[2], keys[3], values[2],
        ns, dns, gates.u, gates.top, gates.document, gates.alpha, gates.gamma, den, w, ds, qdq, kdk, inflow,
        call.H, call.N, K, call.scale, L=L, BK=K, BV=BV, TILES=cdiv(call.V, BV), RESET=call.flags["RESET"], num_warps=4,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), (qdq, kdk, inflow), first, dns[:, 0].clone()


def heads(x, rows, width):
    """x (B, T, H, D) as (B, H, T, D) in tiles of `rows` × `width`."""
    return TensorDescriptor(*descriptors.tiles_of_heads(x, rows, width), _layout(4))


def matrices(x, rows, width):
    """x (M, R, W) in tiles of `rows` × `width`."""
    return TensorDescriptor(*descriptors.tiles_of_matrices(x, rows, width), _layout(3))


@cache
def _layout(rank):
    """Where the copy engine leaves a tile; made once, for a call has twenty tiles."""
    return gl.NVMMASharedLayout(128, 16, rank=rank)
