"""The backward of the mLSTM on Hopper for keys of 128 and values of 256: two walks, which write neither P nor dS.

    there        from the first chunk to the last with C on chip: dq and ds, and C before every second chunk
    and back     from the last chunk to the first with dC on chip: dk and dv, and what flows into every chunk

Both are one kernel, for the equations (docs/math.md) are the same with queries for keys and dh for values:

    X = Q, Y = K, A = dh, M = V, C  or  X = K, Y = Q, A = V, M = dh, C = dC, P and dS transposed
    dX = weight ⊙ (A C_T) + row ⊗ n + dS Y                 C ← γ C + (weight_y ⊙ Y)_T M

Four groups of warps: one brings the tiles; two groups have half of the keys each, 64 rows of C and 64 columns of dX, so that
neither needs what the other sums; one works out what a chunk reads in itself, and on the way back dv. Every tile is 64 × 64.
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
from exlstm.ops.mlstm.hopper import _anew, _columns, _fetch_vector, _product, _rows, _sums, heads
from exlstm.ops.mlstm.plan import cdiv
from exlstm.ops.mlstm.segments import ends, starts
from exlstm.ops.mlstm.walk import _counters, _first_chunk

# Registers a thread of the groups that keep a memory; the scores have what is left.
REGISTERS, BRINGING = 192, 24


@gluon.constexpr_function
def _lines():
    """Where a tile stands to be multiplied row by row: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _come(desc, at, bar, place):
    tma.async_copy_global_to_shared(desc, at, bar, place)


@gluon.jit
def _bring(descs, tiles, bars, i_b, i_h, i_row, S, N, BACK: gl.constexpr, CUT: gl.constexpr):
    """X and Y of every chunk into the places that turn has, then the four tiles of A and of M into theirs."""
    d_x, d_y, d_a, d_m = descs
    all_x, all_y, all_a, all_m = tiles
    keys_full, keys_empty, a_full, a_empty, m_full, m_empty = bars
    i_first = _first_chunk(i_row, S, N, CUT)
    SIZE: gl.constexpr = d_x.block_type.nbytes
    for i in range(N):
        i_t, turn = (i_first + (N - 1 - i if BACK else i)) * 64, i & 1
        # A barrier that nothing has arrived at yet lets pass who waits for phase 1.
        mbarrier.wait(keys_empty.index(turn), (i >> 1 & 1) ^ 1)
        mbarrier.expect(keys_full.index(turn), 4 * SIZE)
        for g in gl.static_range(2):
            _come(d_x, [i_b, i_h, i_t, 64 * g], keys_full.index(turn), all_x.index(2 * turn + g))
            _come(d_y, [i_b, i_h, i_t, 64 * g], keys_full.index(turn), all_y.index(2 * turn + g))
        for b in gl.static_range(4):
            mbarrier.wait(a_empty.index(b), turn ^ 1)
            mbarrier.expect(a_full.index(b), SIZE)
            _come(d_a, [i_b, i_h, i_t, 64 * b], a_full.index(b), all_a.index(b))
        for b in gl.static_range(4):
            mbarrier.wait(m_empty.index(b), turn ^ 1)
            mbarrier.expect(m_full.index(b), SIZE)
            _come(d_m, [i_b, i_h, i_t, 64 * b], m_full.index(b), all_m.index(b))


@gluon.jit
def _come_vectors(all_g, pointers, p_row, to, i_c, i_row):
    """u, M, den, s or ds, β and α of a chunk, and the row of n or dn that it reads, on their way to eight places from `to`."""
    for i in gl.static_range(6):
        _fetch_vector(all_g.index(to + i), pointers[i] + i_c * 64, 64)
    for g in gl.static_range(2):
        _fetch_vector(all_g.index(to + 6 + g), p_row + i_row * 128 + 64 * g, 64)
    async_copy.commit_group()


@gluon.jit
def _decay(all_g, at, p_document, scale, BACK: gl.constexpr, RESET: gl.constexpr):
    """a D, with the reading tokens as rows, or on the way back as columns."""
    o_r, o_c = _anew(gl.arange(0, 64, _rows(64))), _anew(gl.arange(0, 64, _columns(64)))
    if BACK:
        b_u, b_top = all_g.index(at).load(_rows(64)), all_g.index(at + 1).load(_columns(64))
        exponent, seen = b_u[:, None] - b_top[None, :], o_r[:, None] <= o_c[None, :]
    else:
        b_u, b_top = all_g.index(at).load(_columns(64)), all_g.index(at + 1).load(_rows(64))
        exponent, seen = b_u[None, :] - b_top[:, None], o_r[:, None] >= o_c[None, :]
    if RESET:
        seen = seen & (gl.load(p_document + o_r)[:, None] == gl.load(p_document + o_c)[None, :])
    return scale * gl.exp2(gl.where(seen, exponent, -float("inf")))


@gluon.jit
def _values(b_alpha, keys, all_a, all_m, pieces, s_p, all_out, d_dv, bars, at, phase, zero):
    """v dhᵀ, and dv = α ⊙ K dC + (P / den)ᵀ dh in four tiles."""
    a_full, a_empty, m_full, m_empty, piece_full, piece_empty = bars
    b_g = gl.zeros([64, 64], gl.float32, _sums(64))
    for b in gl.static_range(4):
        place, s_a, s_m = b % 2, all_a.index(b + zero), all_m.index(b + zero)
        mbarrier.wait(piece_full.index(place), b // 2)
        b_dv = _product(keys[0], pieces.index(2 * place + zero), gl.zeros([64, 64], gl.float32, _sums(64)))
        b_dv = _product(keys[1], pieces.index(2 * place + 1 + zero), b_dv)
        mbarrier.wait(a_full.index(b), phase)
        mbarrier.wait(m_full.index(b), phase)
        b_g = _product(s_a, s_m.permute([1, 0]), b_g)
        b_dv = warpgroup_mma_wait(1, deps=[b_dv])
        b_dv = _product(s_p, s_m, b_dv * b_alpha[:, None])
        # The tile before the last is through with this one's place of dv.
        tma.store_wait(1)
        b_g, b_dv = warpgroup_mma_wait(0, deps=[b_g, b_dv])
        gl.thread_barrier()
        mbarrier.arrive(piece_empty.index(place))
        mbarrier.arrive(a_empty.index(b))
        mbarrier.arrive(m_empty.index(b))
        s_dv = all_out.index(place + zero)
        s_dv.store(b_dv.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(d_dv, [at[0], at[1], at[2], 64 * b], s_dv)
    return b_g


@gluon.jit
def _inner(all_a, all_m, bars, phase, zero):
    """dh vᵀ."""
    a_full, a_empty, m_full, m_empty, _, _ = bars
    b_g = gl.zeros([64, 64], gl.float32, _sums(64))
    for b in gl.static_range(4):
        mbarrier.wait(a_full.index(b), phase)
        mbarrier.wait(m_full.index(b), phase)
        b_g = _product(all_a.index(b + zero), all_m.index(b + zero).permute([1, 0]), b_g)
    b_g = warpgroup_mma_wait(0, deps=[b_g])
    gl.thread_barrier()
    for b in gl.static_range(4):
        mbarrier.arrive(a_empty.index(b))
        mbarrier.arrive(m_empty.index(b))
    return b_g


@gluon.jit
def _denominator(b_p, b_g, b_part, all_g, at, s_half, scale, NORM: gl.constexpr):
    """ds of every token and a β ds, of h·dh by the two sums that h is made of."""
    b_ds, b_beta = gl.zeros([64], gl.float32, _rows(64)), scale * all_g.index(at + 4).load(_rows(64))
    if NORM:
        b_sum = all_g.index(at + 3).load(_rows(64))
        b_ds = gl.where(b_sum > 0, -b_part, gl.where(b_sum < 0, b_part, 0.0)) * b_part
        b_ds *= gl.sum(b_p * b_g, 1) + b_beta * (s_half.index(0).load(_rows(64)) + s_half.index(1).load(_rows(64)))
    return b_ds, b_beta * b_ds


@gluon.jit
def _back(b_p, keys, all_g, at, made, tiles, blocks, keys_empty, d_dv, place, phase, zero):
    """(dnum Vᵀ + ds 1ᵀ)ᵀ, and dv on the way."""
    pieces, all_p, _, all_out, _, _, _ = made
    s_p = all_p.index(zero)
    b_part = 1.0 / all_g.index(at + 2).load(_columns(64))
    s_p.store((b_p * b_part[None, :]).to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    b_alpha = all_g.index(at + 5).load(_rows(64))
    b_g = _values(b_alpha, keys, tiles[2], tiles[3], pieces, s_p, all_out, d_dv, blocks, place, phase, zero)
    mbarrier.arrive(keys_empty)
    b_part = 1.0 / all_g.index(at + 2).load(_columns(64))
    return b_g * b_part[None, :] + all_g.index(at + 3).load(_columns(64))[None, :]


@gluon.jit
def _there(b_p, all_g, at, s_half, tiles, blocks, half_full, keys_empty, p_ds, scale, phase, zero, NORM: gl.constexpr):
    """dnum Vᵀ + ds 1ᵀ, and a β ds."""
    gl.thread_barrier()
    mbarrier.arrive(keys_empty)
    b_g = _inner(tiles[2], tiles[3], blocks, phase, zero)
    b_part = 1.0 / all_g.index(at + 2).load(_rows(64))
    if NORM:
        mbarrier.wait(half_full, phase)
    b_ds, b_wn = _denominator(b_p, b_g, b_part, all_g, at, s_half, scale, NORM)
    gl.store(p_ds + gl.arange(0, 64, _rows(64)), b_ds)
    return b_g * b_part[:, None] + b_ds[:, None], b_wn


@gluon.jit
def _scores(tiles, made, bars, d_dv, pointers, p_row, p_ds, p_document, scale, i_b, i_h, i_row, S, N,
            BACK: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """a dS of every chunk; ds, or dv."""
    all_x, all_y, all_g, s_wn = tiles[0], tiles[1], made[4], made[6]
    keys_full, keys_empty, g_full, g_empty, half_full, vectors_full = bars[0]
    start, i_first = N - 1 if BACK else 0, _first_chunk(i_row, S, N, CUT)
    _come_vectors(all_g, pointers, p_row, 0, i_row * N + start, i_row * (N + 1) + start + BACK)
    for i in range(N):
        zero = _anew(i * 0)
        i_n, phase = N - 1 - i if BACK else i, i & 1
        turn, at, i_c = phase + zero, 8 * (i % 3) + zero, i_row * N + i_n
        async_copy.wait_group(0)
        gl.thread_barrier()
        mbarrier.arrive(vectors_full.index(turn))
        # The keys are through with what stood there two chunks ago, or a dS of the last could not have been stored.
        after = gl.maximum(i_n - 1, 0) if BACK else gl.minimum(i_n + 1, N - 1)
        _come_vectors(
            all_g, pointers, p_row, 8 * ((i + 1) % 3) + zero, i_row * N + after, i_row * (N + 1) + after + BACK
        )
        keys = all_x.index(2 * turn), all_x.index(2 * turn + 1), all_y.index(2 * turn), all_y.index(2 * turn + 1)
        mbarrier.wait(keys_full.index(turn), i >> 1 & 1)
        b_p = _product(keys[0], keys[2].permute([1, 0]), gl.zeros([64, 64], gl.float32, _sums(64)))
        b_p = _product(keys[1], keys[3].permute([1, 0]), b_p)
        b_p = warpgroup_mma_wait(0, deps=[b_p])
        b_p *= _decay(all_g, at, p_document + i_c * 64, scale, BACK, RESET)
        if BACK:
            place = i_b, i_h, (i_first + i_n) * 64
            b_g = _back(b_p, keys, all_g, at, made, tiles, bars[1], keys_empty.index(turn), d_dv, place, phase, zero)
            mbarrier.wait(g_empty, phase ^ 1)
        else:
            b_g, b_wn = _there(b_p, all_g, at, made[5], tiles, bars[1], half_full, keys_empty.index(turn), p_ds + i_c * 64,
                               scale, phase, zero, NORM)  # fmt: skip
            mbarrier.wait(g_empty, phase ^ 1)
            s_wn.store(b_wn)
        b_g *= _decay(all_g, at, p_document + i_c * 64, scale, BACK, RESET)
        made[2].index(zero).store(b_g.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(g_full)
    tma.store_wait(0)
    async_copy.wait_group(0)


@gluon.jit
def _corner(i_row, G: gl.constexpr, B: gl.constexpr):
    """Offsets of the numbers in tile (G, B) of a memory (128, 256)."""
    o_k, o_v = _anew(gl.arange(0, 64, _rows(64))), _anew(gl.arange(0, 64, _columns(64)))
    return i_row * 32768 + (64 * G + o_k)[:, None] * 256 + (64 * B + o_v)[None, :]


@gluon.jit
def _first(p_c, i_row, G: gl.constexpr, B: gl.constexpr, EMPTY: gl.constexpr):
    if EMPTY:
        return gl.zeros([64, 64], gl.float32, _sums(64))
    return gl.load(p_c + _corner(i_row, G, B))


@gluon.jit
def _kept(i_c, G: gl.constexpr, B: gl.constexpr):
    """The same in a memory kept between the kernels, squares of 8 × 8 one after the other: a warp's numbers stand together."""
    o_k, o_v = gl.arange(0, 64, _rows(64)), gl.arange(0, 64, _columns(64))
    o_k, o_v = (o_k // 8) * 512 + (o_k % 8) * 8, (o_v // 8) * 64 + o_v % 8
    return i_c * 32768 + (4 * G + B) * 4096 + o_k[:, None] + o_v[None, :]


@gluon.jit
def _with_kept(p_kept, b_c, i_c, G: gl.constexpr, B: gl.constexpr):
    return gl.sum(gl.load(p_kept + _kept(i_c, G, B)).to(gl.float32) * b_c, 1)


@gluon.jit
def _read(b_dx, b_c, s_a, s_c, piece_full, piece_empty, a_full, a_empty, phase,
          B: gl.constexpr, BACK: gl.constexpr):  # fmt: skip
    """dx + A Cᵀ of tile B of C, begun; the tile before is through, whose place in A is `a_empty`."""
    if BACK:
        # The scores are through with what stood there.
        mbarrier.wait(piece_empty.index(B % 2), B // 2 ^ 1)
    s_c.store(b_c.to(gl.bfloat16))
    fence_async_shared()
    if B > 0:
        b_dx = warpgroup_mma_wait(0, deps=[b_dx])
    gl.thread_barrier()
    if B > 0:
        mbarrier.arrive(a_empty.index(B - 1))
    if BACK:
        mbarrier.arrive(piece_full.index(B % 2))
    mbarrier.wait(a_full.index(B), phase)
    return _product(s_a, s_c.permute([1, 0]), b_dx)


@gluon.jit
def _weights(all_g, at, scale, layout: gl.constexpr):
    """a β / den of a chunk's tokens."""
    return scale * all_g.index(at + 4).load(layout) / all_g.index(at + 2).load(layout)


@gluon.jit
def _weighted(s_y, s_w, all_g, at, scale, BACK: gl.constexpr):
    """Y as it goes into the memory."""
    ROWS: gl.constexpr = gl.SliceLayout(1, _lines())
    b_w = _weights(all_g, at, scale, ROWS) if BACK else all_g.index(at + 5).load(ROWS)
    s_w.store((s_y.load(_lines()).to(gl.float32) * b_w[:, None]).to(gl.bfloat16))


@gluon.jit
def _row_sums(s_x, b_dx):
    return gl.sum(s_x.load(_sums(64)).to(gl.float32) * b_dx, 1)


@gluon.jit
def _overlap(b_0, b_1, b_2, b_3, p_kept, p_n, p_dn, i_row, i_n, N, whole, G: gl.constexpr):
    """<C⁻, dC⁺> + <n⁻, dn⁺> of these rows and a chunk before which C was kept, else 0."""
    b_cdc = 0.0
    if whole:
        i_kept = i_row * ((N + 1) // 2) + i_n // 2
        b_sum = _with_kept(p_kept, b_0, i_kept, G, 0) + _with_kept(p_kept, b_1, i_kept, G, 1)
        b_sum += _with_kept(p_kept, b_2, i_kept, G, 2) + _with_kept(p_kept, b_3, i_kept, G, 3)
        o_n = (i_row * (N + 1) + i_n) * 128 + 64 * G + gl.arange(0, 64, _columns(64))
        b_cdc = gl.sum(b_sum, 0) + gl.sum(gl.load(p_n + o_n) * gl.load(p_dn + o_n + 128), 0)
    return b_cdc


@gluon.jit
def _keep(b_0, b_1, b_2, b_3, p_kept, i_row, i_n, N, G: gl.constexpr):
    """C before chunk i_n, where the walk back wants it."""
    i_kept = i_row * ((N + 1) // 2) + i_n // 2
    if (i_n % 2 == 1) & (i_n < N) | (i_n == N - 1):
        gl.store(p_kept + _kept(i_kept, G, 0), b_0.to(gl.bfloat16))
        gl.store(p_kept + _kept(i_kept, G, 1), b_1.to(gl.bfloat16))
        gl.store(p_kept + _kept(i_kept, G, 2), b_2.to(gl.bfloat16))
        gl.store(p_kept + _kept(i_kept, G, 3), b_3.to(gl.bfloat16))


@gluon.jit
def _reads(b_0, b_1, b_2, b_3, all_a, pieces, blocks, phase, zero, G: gl.constexpr, BACK: gl.constexpr):
    """A Cᵀ."""
    a_full, a_empty, _, _, piece_full, piece_empty = blocks
    b_dx, s_c, s_d = gl.zeros([64, 64], gl.float32, _sums(64)), pieces.index(G + zero), pieces.index(2 + G + zero)
    b_dx = _read(b_dx, b_0, all_a.index(zero), s_c, piece_full, piece_empty, a_full, a_empty, phase, 0, BACK)
    b_dx = _read(b_dx, b_1, all_a.index(zero + 1), s_d, piece_full, piece_empty, a_full, a_empty, phase, 1, BACK)
    b_dx = _read(b_dx, b_2, all_a.index(zero + 2), s_c, piece_full, piece_empty, a_full, a_empty, phase, 2, BACK)
    b_dx = _read(b_dx, b_3, all_a.index(zero + 3), s_d, piece_full, piece_empty, a_full, a_empty, phase, 3, BACK)
    return warpgroup_mma_wait(0, deps=[b_dx])


@gluon.jit
def _writes(b_0, b_1, b_2, b_3, b_gamma, s_w, all_m, blocks, phase, zero):
    """γ C + (weighted Y)ᵀ M."""
    _, _, m_full, m_empty, _, _ = blocks
    mbarrier.wait(m_full.index(0), phase)
    b_0 = _product(s_w.permute([1, 0]), all_m.index(zero), b_0 * b_gamma)
    mbarrier.wait(m_full.index(1), phase)
    b_1 = _product(s_w.permute([1, 0]), all_m.index(zero + 1), b_1 * b_gamma)
    mbarrier.wait(m_full.index(2), phase)
    b_2 = _product(s_w.permute([1, 0]), all_m.index(zero + 2), b_2 * b_gamma)
    mbarrier.wait(m_full.index(3), phase)
    b_3 = _product(s_w.permute([1, 0]), all_m.index(zero + 3), b_3 * b_gamma)
    b_0, b_1, b_2, b_3 = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2, b_3])
    gl.thread_barrier()
    for b in gl.static_range(4):
        mbarrier.arrive(m_empty.index(b))
    return b_0, b_1, b_2, b_3


@gluon.jit
def _from_memory(b_dx, s_x, s_wn, all_g, at, g_full, p_sums, i_c, scale, phase,
                 G: gl.constexpr, BACK: gl.constexpr, NORM: gl.constexpr):  # fmt: skip
    """What dX has from C and n, and Σ x · dx of it; a dS is there."""
    if BACK:
        b_dx += all_g.index(at + 6 + G).load(_columns(64))[None, :]
        b_dx *= all_g.index(at + 5).load(_rows(64))[:, None]
    else:
        b_dx *= _weights(all_g, at, scale, _rows(64))[:, None]
        mbarrier.wait(g_full, phase)
        if NORM:
            b_wn = s_wn.load(_rows(64))
            b_dx += b_wn[:, None] * all_g.index(at + 6 + G).load(_columns(64))[None, :]
            b_sums = gl.sum(s_x.load(_sums(64)).to(gl.float32) * b_wn[:, None], 0)
            gl.store(p_sums + i_c * 128 + 64 * G + gl.arange(0, 64, _columns(64)), b_sums)
    b_flow = gl.sum(_row_sums(s_x, b_dx), 0)
    if BACK:
        mbarrier.wait(g_full, phase)
    return b_dx, b_flow


@gluon.jit
def _last(p_last, b_0, b_1, b_2, b_3, i_row, S, G: gl.constexpr, CUT: gl.constexpr):
    final = i_row % S == 0 if CUT else True
    gl.store(p_last + _corner(i_row, G, 0), b_0, mask=final)
    gl.store(p_last + _corner(i_row, G, 1), b_1, mask=final)
    gl.store(p_last + _corner(i_row, G, 2), b_2, mask=final)
    gl.store(p_last + _corner(i_row, G, 3), b_3, mask=final)


@gluon.jit
def _tell(b_dx, s_x, s_half, half_full, a_empty, SILENT: gl.constexpr):
    """What the scores want of dh Cᵀ for ds; and that the last tile of A is through."""
    if not SILENT:
        s_half.store(_row_sums(s_x, b_dx))
    gl.thread_barrier()
    mbarrier.arrive(a_empty)
    if not SILENT:
        mbarrier.arrive(half_full)


@gluon.jit
def _keys(tiles, made, bars, d_dx, p_gamma, p_c, p_last, p_kept, p_n, p_dn, p_sums, p_flow, p_inflow, p_xdx, scale,
          i_b, i_h, i_row, rows, S, N,
          G: gl.constexpr, BACK: gl.constexpr, NORM: gl.constexpr, EMPTY: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """dX of 64 columns, and 64 rows of the memory, from chunk to chunk."""
    all_x, all_y, all_a, all_m = tiles
    pieces, all_w, all_ds, all_g, s_half, s_wn = made
    keys_full, keys_empty, g_full, g_empty, half_full, vectors_full = bars[0]
    b_0, b_1 = _first(p_c, i_row, G, 0, EMPTY), _first(p_c, i_row, G, 1, EMPTY)
    b_2, b_3 = _first(p_c, i_row, G, 2, EMPTY), _first(p_c, i_row, G, 3, EMPTY)
    if not BACK:
        _keep(b_0, b_1, b_2, b_3, p_kept, i_row, 0, N, G)
    i_first, p_part, p_sum, b_in = _first_chunk(i_row, S, N, CUT), G * rows + i_row * N, p_xdx + G * rows * 64, 0.0
    for i in range(N):
        zero = _anew(i * 0)
        i_n, phase = N - 1 - i if BACK else i, i & 1
        turn, at, i_c = phase + zero, 8 * (i % 3) + zero, i_row * N + i_n
        b_gamma, whole = gl.load(p_gamma + i_c), (i_n % 2 == 1) | (i_n == N - 1)
        if BACK:
            b_cdc = b_gamma * _overlap(b_0, b_1, b_2, b_3, p_kept, p_n, p_dn, i_row, i_n, N, whole, G)
        s_x, s_y, s_w = all_x.index(2 * turn + G), all_y.index(2 * turn + G), all_w.index(G + zero)
        mbarrier.wait(vectors_full.index(turn), i >> 1 & 1)
        mbarrier.wait(keys_full.index(turn), i >> 1 & 1)
        # The chunk before is through with the place of what is weighted, where dX went out.
        tma.store_wait(0)
        gl.thread_barrier()
        _weighted(s_y, s_w, all_g, at, scale, BACK)
        b_dx = _reads(b_0, b_1, b_2, b_3, all_a, pieces, bars[1], phase, zero, G, BACK)
        _tell(b_dx, s_x, s_half.index(G), half_full, bars[1][1].index(3), BACK or not NORM)
        b_0, b_1, b_2, b_3 = _writes(b_0, b_1, b_2, b_3, b_gamma, s_w, all_m, bars[1], phase, zero)
        if not BACK:
            # Of the chunk after this one.
            _keep(b_0, b_1, b_2, b_3, p_kept, i_row, i + 1, N, G)
        b_dx, b_flow = _from_memory(b_dx, s_x, s_wn, all_g, at, g_full, p_sums, i_c, scale, phase, G, BACK, NORM)
        if BACK:
            # <C⁺, dC⁺> is γ <C⁻, dC⁺> and what the keys wrote, <C⁻, dC⁻> the same and what the queries read.
            gl.store(p_inflow + p_part + i_n, gl.where(whole, b_cdc + b_flow, b_in))
            b_in = b_cdc + gl.load(p_flow + p_part + i_n)
        else:
            gl.store(p_flow + p_part + i_n, b_flow)
        b_dx = _product(all_ds.index(zero), s_y, b_dx)
        b_dx = warpgroup_mma_wait(0, deps=[b_dx])
        gl.store(p_sum + i_c * 64 + gl.arange(0, 64, _rows(64)), _row_sums(s_x, b_dx))
        s_w.store(b_dx.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(keys_empty.index(turn))
        mbarrier.arrive(g_empty)
        tma.async_copy_shared_to_global(d_dx, [i_b, i_h, (i_first + i_n) * 64, 64 * G], s_w)
    tma.store_wait(0)
    if BACK:
        _last(p_last, b_0, b_1, b_2, b_3, i_row, S, G, CUT)


@gluon.jit
def _places(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.bfloat16, [COUNT, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit(do_not_specialize=["S", "N"])
def mlstm_streams_kernel(d_x, d_y, d_a, d_m, d_dx, d_dv, p_c, p_last, p_kept, p_n, p_dn, p_sums, p_flow, p_inflow, p_xdx,
                         p_alpha, p_beta, p_gamma, p_u, p_top, p_document, p_den, p_s, p_ds, H, S, N, scale,
                         REGS: gl.constexpr, FEW: gl.constexpr, BACK: gl.constexpr, NORM: gl.constexpr,
                         RESET: gl.constexpr, EMPTY: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """dq, ds, C before every second chunk and Σ a β ds q of each; back, with what it wrote, dk, dv, dC and the inflows."""
    i_row = gl.program_id(0).to(gl.int64)
    i_bh = i_row
    if CUT:
        i_bh = i_row // S
        # n, dn and the last memory stand with those of the sequence.
        p_n += (i_bh - i_row) * 128
        p_dn += (i_bh - i_row) * 128
        p_last += (i_bh - i_row) * 32768
    i_b, i_h = (i_bh // H).to(gl.int32), (i_bh % H).to(gl.int32)
    tiles = _places(4), _places(4), _places(4), _places(4)
    pieces, all_w, all_ds, all_p, all_out = _places(4), _places(2), _places(1), _places(1), _places(2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    all_g = gl.allocate_shared_memory(gl.float32, [24, 64], FLAT)
    s_half = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    s_wn = gl.allocate_shared_memory(gl.float32, [64], FLAT)
    keys_full, keys_empty = _counters(2, 1), _counters(2, 3)
    a_full, a_empty, m_full, m_empty = _counters(4, 1), _counters(4, 3), _counters(4, 1), _counters(4, 3)
    piece_full, piece_empty = _counters(2, 2), _counters(2, 1)
    g_full, g_empty, half_full = _counters(1, 1), _counters(1, 2), _counters(1, 2)
    vectors_full = _counters(2, 1)
    chunk = keys_full, keys_empty, g_full.index(0), g_empty.index(0), half_full.index(0), vectors_full
    blocks = a_full, a_empty, m_full, m_empty, piece_full, piece_empty
    pointers = p_u, p_top, p_den, p_ds if BACK else p_s, p_beta, p_alpha
    made, shared = (pieces, all_p, all_ds, all_out, all_g, s_half, s_wn), (pieces, all_w, all_ds, all_g, s_half, s_wn)
    rows = (gl.num_programs(0) * N).to(gl.int64)
    gl.warp_specialize(
        [
            (_scores, (tiles, made, (chunk, blocks), d_dv, pointers, p_dn if BACK else p_n, p_ds, p_document, scale,
                       i_b, i_h, i_row, S, N, BACK, NORM, RESET, CUT)),
            (_keys, (tiles, shared, (chunk, blocks), d_dx, p_gamma, p_c, p_last, p_kept, p_n, p_dn, p_sums, p_flow, p_inflow,
                     p_xdx, scale, i_b, i_h, i_row, rows, S, N, 0, BACK, NORM, EMPTY, CUT)),
            (_keys, (tiles, shared, (chunk, blocks), d_dx, p_gamma, p_c, p_last, p_kept, p_n, p_dn, p_sums, p_flow, p_inflow,
                     p_xdx, scale, i_b, i_h, i_row, rows, S, N, 1, BACK, NORM, EMPTY, CUT)),
            (_bring, ((d_x, d_y, d_a, d_m), tiles, (keys_full, keys_empty, a_full, a_empty, m_full, m_empty),
                      i_b, i_h, i_row, S, N, BACK, CUT)),
        ],
        [4, 4, 4],
        [REGS, REGS, FEW],
    )  # fmt: skip


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    (dh, dc, dn), (h, den, s, ns, *_), L, S = grads, saved, plan.L, plan.S
    dq, dk, dv = padded(q, q.shape), padded(k, k.shape), padded(v, v.shape)
    qdq, kdk = call.vector(den, 2, call.tokens), call.vector(den, 2, call.tokens)
    flow, inflow = call.vector(den, 2, call.rows * call.N), call.vector(den, 2, call.rows * call.N)
    ds, first = call.vector(den), call.vector(den, call.rows, call.K, call.V)
    sums = call.vector(den, call.rows, call.N, call.K)
    if not call.flags["NORM"]:
        sums.zero_()
    kept = q.new_empty(call.rows * S * cdiv(call.N // S, 2), call.K, call.V)
    t_q, t_k, t_v, t_dh, t_dq, t_dk, t_dv = (heads(x, L, 64) for x in (q, k, v, dh, dq, dk, dv))
    vectors = (gates.alpha, gates.beta, gates.gamma, gates.u, gates.top, gates.document, den, s, ds)
    sizes = (call.H, S, call.N // S, call.scale)
    options = {"REGS": REGISTERS, "FEW": BRINGING, "CUT": S > 1, "num_warps": 4, **call.flags}
    start, _ = starts(call, S, k, v, gates, (c, None))
    mlstm_streams_kernel[(call.rows * S,)](
        t_q, t_k, t_dh, t_v, t_dq, t_dv, start, first, kept, ns, ns, sums, flow, inflow, qdq, *vectors, *sizes,
        BACK=False, EMPTY=False, **options,
    )  # fmt: skip
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    end, _ = ends(call, S, (q, h, dh), gates, (den, None), (dc, None))
    mlstm_streams_kernel[(call.rows * S,)](
        t_k, t_q, t_v, t_dh, t_dk, t_dv, first if end is None else end, first, kept, ns, dns, sums, flow, inflow, kdk,
        *vectors, *sizes, BACK=True, EMPTY=end is None, **options,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), (qdq, kdk, inflow), first, dns[:, 0].clone()
