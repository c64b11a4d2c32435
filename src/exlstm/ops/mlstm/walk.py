"""The forward of the mLSTM on Hopper in one kernel of three groups of warps, which work on different chunks at the same time.

One group, the scores, works out what a chunk reads in itself, denominators and n, and lets q and k come; it runs a chunk ahead.
It is the one that the others wait for. The other two each keep half of a program's columns of C and need nothing of each other:
while one waits for its products, the other hands in its own.
Where a backward follows in chunks of 128 (chunks.py), scores and every second C, which stand in shared memory as the products
take them, go to memory as well. The equations stand in docs/math.md.
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
from exlstm.ops.mlstm.hopper import _anew, _columns, _product, _rows, _sums, heads, matrices
from exlstm.ops.mlstm.plan import cdiv, power
from exlstm.ops.mlstm.segments import starts

# Warps of the scores, and registers a thread of the two groups that keep C; the scores have what is left.
WARPS, REGISTERS = 4, 192
# The same of groups that keep one block of columns each.
NARROW = 144


@gluon.constexpr_function
def _scores_layout(W):
    """Where the matrix units leave scores, in W warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, 256 // W, 16])


@gluon.constexpr_function
def _tokens(W):
    """Where a vector stands that has a number for each row of the scores."""
    return gl.SliceLayout(1, _scores_layout(W))


@gluon.constexpr_function
def _lines(W):
    """Where q stands to be summed over features: those of a token in one warp, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])


@gluon.constexpr_function
def _features(W):
    """Where k stands to be summed over tokens: those of a feature in one warp, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [16, 2], [1, W], [0, 1])


@gluon.jit
def _first_chunk(i_row, S, N, CUT: gl.constexpr):
    """Where a row begins in its sequence, in chunks."""
    return (i_row % S).to(gl.int32) * N if CUT else 0


@gluon.jit
def _of_last(mask, i_row, S, CUT: gl.constexpr):
    """`mask` where a row is the last segment: what stands behind another is where the next one starts, which stores it."""
    return mask & (i_row % S == S - 1) if CUT else mask


@gluon.jit
def _come_keys(descs, places, bar, i_b, i_h, i_first, i_n, N, at, L: gl.constexpr):
    """q and k of chunk i_n, if there is one, on their way to place `at`."""
    there = i_n < N
    mbarrier.expect(bar, descs[0].block_type.nbytes + descs[1].block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(descs[0], [i_b, i_h, (i_first + i_n) * L, 0], bar, places[0].index(at), pred=there)
    tma.async_copy_global_to_shared(descs[1], [i_b, i_h, (i_first + i_n) * L, 0], bar, places[1].index(at), pred=there)


@gluon.jit
def _come_values(d_v, all_v, bar, i_b, i_h, i_first, i_v, i_n, N, place, L: gl.constexpr, BLOCKS: gl.constexpr):
    """BLOCKS blocks of 64 values of chunk i_n, if there is one, on their way to places from `place` on."""
    there = i_n < N
    mbarrier.expect(bar, BLOCKS * d_v.block_type.nbytes, pred=there)
    for i in gl.static_range(BLOCKS):
        at = [i_b, i_h, (i_first + i_n) * L, i_v + 64 * i]
        tma.async_copy_global_to_shared(d_v, at, bar, all_v.index(place + i), pred=there)


@gluon.jit
def _come_weights(s_alpha, s_u, p_alpha, p_u, i_c, L: gl.constexpr, W: gl.constexpr):
    """α and u of a chunk on their way."""
    o = i_c * L + gl.arange(0, L, gl.BlockedLayout([4], [32], [W], [0]))
    async_copy.async_copy_global_to_shared(s_alpha, p_alpha + o)
    async_copy.async_copy_global_to_shared(s_u, p_u + o)
    async_copy.commit_group()


@gluon.jit
def _tokens_weights(pointers, i_c, L: gl.constexpr, W: gl.constexpr):
    """β, M and the floor of the tokens of a chunk."""
    o = i_c * L + gl.arange(0, L, _tokens(W))
    return gl.load(pointers[1] + o), gl.load(pointers[3] + o), gl.load(pointers[4] + o)


@gluon.jit
def _begin(places, at, L: gl.constexpr, W: gl.constexpr):
    """The products of queries and keys, begun."""
    s_k = places[1].index(at).permute([1, 0])
    return _product(places[0].index(at), s_k, gl.zeros([L, L], gl.float32, _scores_layout(W)))


@gluon.jit
def _store_sums(p_den, p_s, b_den, b_s, i_c, i_v, L: gl.constexpr, W: gl.constexpr):
    o_t = i_c * L + gl.arange(0, L, _tokens(W))
    gl.store(p_den + o_t, b_den, mask=i_v == 0)
    gl.store(p_s + o_t, b_s, mask=i_v == 0)


@gluon.jit
def _decayed(b_p, s_u, b_top, p_document, L: gl.constexpr, RESET: gl.constexpr, W: gl.constexpr):
    """P / a of the products of queries and keys."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, _scores_layout(W))
    o_t, o_j = gl.arange(0, L, _tokens(W)), gl.arange(0, L, COLUMNS)
    seen = o_t[:, None] >= o_j[None, :]
    if RESET:
        seen = seen & (gl.load(p_document + o_t)[:, None] == gl.load(p_document + o_j)[None, :])
    return b_p * gl.exp2(gl.where(seen, s_u.load(COLUMNS)[None, :] - b_top[:, None], -float("inf")))


@gluon.jit
def _denominator(b_p, b_qn, b_beta, b_den, scale, eps, NORM: gl.constexpr):
    """den of every token, out of its floor, and the signed sum in it where that counts, else 0."""
    b_s = gl.zeros_like(b_den)
    if NORM:
        b_sum = scale * (gl.sum(b_p, 1) + b_beta * b_qn)
        b_s = gl.where(gl.abs(b_sum) > b_den, b_sum, 0.0)
        b_den = gl.maximum(gl.abs(b_sum), b_den) + eps
    return b_den, b_s


@gluon.jit
def _with_n(s_q, s_n, W: gl.constexpr):
    b_q = s_q.load(_lines(W)).to(gl.float32) * s_n.load(gl.SliceLayout(0, _lines(W)))[None, :]
    return gl.convert_layout(gl.sum(b_q, 1), _tokens(W))


@gluon.jit
def _weigh(s_k, s_n, b_n, b_gamma, s_alpha, W: gl.constexpr):
    """k times α in its place; n behind the chunk, which goes to its place too."""
    b_k = s_k.load(_features(W)).to(gl.float32) * s_alpha.load(gl.SliceLayout(1, _features(W)))[:, None]
    s_k.store(b_k.to(gl.bfloat16))
    b_n = b_n * b_gamma + gl.sum(b_k, 0)
    s_n.store(b_n)
    return b_n


@gluon.jit
def _scores(descs, places, vectors, bars, pointers, outs, p_n0, p_document, scale, eps, i_b, i_h, i_row, i_v, S, N, K,
            L: gl.constexpr, BK: gl.constexpr, NORM: gl.constexpr, RESET: gl.constexpr, W: gl.constexpr,
            CUT: gl.constexpr):  # fmt: skip
    """For every chunk P / den and a β / den, k times α in the place of k, den and n; and q and k of all chunks."""
    full, ready, done, _ = bars
    all_p, all_w, all_a, all_u, s_n = vectors
    p_n, p_den, p_s, p_gamma = outs
    i_first, last = _first_chunk(i_row, S, N, CUT), i_row * N + N - 1
    for i in gl.static_range(3):
        _come_keys(descs, places, full.index(i), i_b, i_h, i_first, i, N, i, L)
    _come_weights(all_a.index(0), all_u.index(0), pointers[0], pointers[2], i_row * N, L, W)
    _come_weights(all_a.index(1), all_u.index(1), pointers[0], pointers[2], gl.minimum(i_row * N + 1, last), L, W)
    b_beta, b_top, b_floor = _tokens_weights(pointers, i_row * N, L, W)
    o_n = gl.arange(0, BK, gl.SliceLayout(0, _features(W)))
    kept, b_n = (o_n < K) & (i_v == 0), gl.load(p_n0 + i_row * K + o_n, mask=o_n < K, other=0.0)
    s_n.store(b_n)
    mbarrier.wait(full.index(0), 0)
    b_x = _begin(places, 0, L, W)
    for i in range(N):
        at, turn = i % 3 + _anew(i * 0), (i & 1) + _anew(i * 0)
        i_c, then = i_row * N + i, (i + 1) % 3
        b_gamma = gl.load(p_gamma + i_c)
        gl.store(p_n + (i_c + i_row) * K + o_n, b_n, mask=kept)
        b_qn = _with_n(places[0].index(at), s_n, W)
        b_p = warpgroup_mma_wait(0, deps=[b_x])
        async_copy.wait_group(1)
        # Everybody's products are through with k as it was, and the weights are there.
        gl.thread_barrier()
        b_p = _decayed(b_p, all_u.index(turn), b_top, p_document + i_c * L, L, RESET, W)
        b_den, b_s = _denominator(b_p, b_qn, b_beta, b_floor, scale, eps, NORM)
        b_part = scale / b_den
        all_p.index(turn).store((b_p * b_part[:, None]).to(gl.bfloat16))
        all_w.index(turn).store(b_beta * b_part)
        b_beta, b_top, b_floor = _tokens_weights(pointers, gl.minimum(i_c + 1, last), L, W)
        _store_sums(p_den, p_s, b_den, b_s, i_c, i_v, L, W)
        b_n = _weigh(places[1].index(at), s_n, b_n, b_gamma, all_a.index(turn), W)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready.index(at))
        _come_weights(all_a.index(turn), all_u.index(turn), pointers[0], pointers[2], gl.minimum(i_c + 2, last), L, W)
        if i > 0:
            # The columns are through with the chunk before: its places, P and weights may be written again.
            before = (i + 2) % 3
            mbarrier.wait(done.index(before), (i - 1) // 3 & 1)
            _come_keys(descs, places, full.index(before), i_b, i_h, i_first, i + 2, N, before, L)
        # The products of the next chunk run beside what follows; behind the last one nobody wants them.
        mbarrier.wait(full.index(then), (i + 1) // 3 & 1, pred=i + 1 < N)
        b_x = _begin(places, then, L, W)
    warpgroup_mma_wait(0, deps=[b_x])
    async_copy.wait_group(0)
    gl.store(p_n + (i_row * (N + 1) + N) * K + o_n, b_n, mask=_of_last(kept, i_row, S, CUT))


@gluon.jit
def _corner(i_row, i_v, K, V, BK: gl.constexpr):
    """Offsets of the numbers in 64 columns of a memory, and which of them are there."""
    # Made anew where they are wanted: kept over the loop they would not fit into the registers.
    o_k, o_v = _anew(gl.arange(0, BK, _rows(64))), i_v + _anew(gl.arange(0, 64, _columns(64)))
    return i_row * K * V + o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@gluon.jit
def _first(p_c0, i_row, i_v, K, V, BK: gl.constexpr):
    o_c, inside = _corner(i_row, i_v, K, V, BK)
    return gl.load(p_c0 + o_c, mask=inside, other=0.0)


@gluon.jit
def _last(p_c_last, b_c, i_row, i_v, S, K, V, BK: gl.constexpr, CUT: gl.constexpr):
    o_c, inside = _corner(i_row, i_v, K, V, BK)
    gl.store(p_c_last + o_c, b_c, mask=_of_last(inside, i_row, S, CUT))


@gluon.jit
def _block(b_c, b_gamma, s_q, s_k, s_v, s_p, s_w, s_c, d_kept, i_c, i_v, L: gl.constexpr, KEEP: gl.constexpr):
    """h of 64 values, and their C behind the chunk. Nobody reads the place of C."""
    s_c.store(b_c.to(gl.bfloat16))
    b_c = b_c * b_gamma
    fence_async_shared()
    gl.thread_barrier()
    if KEEP:
        _keep_memory(d_kept, s_c, i_c, i_v)
    b_h = _product(s_q, s_c, gl.zeros([L, 64], gl.float32, _sums(64)))
    b_c = _product(s_k.permute([1, 0]), s_v, b_c)
    b_h = warpgroup_mma_wait(1, deps=[b_h])
    b_h = _product(s_p, s_v, b_h * s_w.load(_rows(64))[:, None])
    b_h, b_c = warpgroup_mma_wait(0, deps=[b_h, b_c])
    return b_h, b_c


@gluon.jit
def _keep_scores(d_p, s_p, i_row, i_v, i, L: gl.constexpr):
    """The scores of a chunk to memory, by one program of a row; `_out` waits until they have left their place."""
    if i_v == 0:
        tma.async_copy_shared_to_global(d_p, [i_row.to(gl.int32), i * L, 0], s_p)


@gluon.jit
def _keep_memory(d_kept, s_c, i_c, i_v):
    """C before every second chunk to memory; a row has an even number of them."""
    if i_c % 2 == 0:
        tma.async_copy_shared_to_global(d_kept, [i_c // 2, 0, i_v], s_c)


@gluon.jit
def _out(d_h, b_h, s_h, i_b, i_h, i_t, i_v):
    """h of 64 values to memory, as soon as its place is free."""
    tma.store_wait(0)
    gl.thread_barrier()
    s_h.store(b_h.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(d_h, [i_b, i_h, i_t, i_v], s_h)


@gluon.jit
def _values(d_v, d_h, d_p, d_kept, places, vectors, own, bars, p_gamma, p_c0, p_c_last, i_b, i_h, i_row, i_v, S, N, K, V,
            WHICH: gl.constexpr, L: gl.constexpr, BK: gl.constexpr, COLS: gl.constexpr, CUT: gl.constexpr,
            KEEP: gl.constexpr):  # fmt: skip
    """h of half of the columns, in one block of 64 or in two, and their last C."""
    full, ready, done, values = bars
    BLOCKS: gl.constexpr = COLS // 2
    i_first = _first_chunk(i_row, S, N, CUT)
    i_v += 64 * WHICH * BLOCKS
    for i in gl.static_range(2):
        first = (2 * WHICH + i) * BLOCKS
        _come_values(d_v, places[2], values.index(2 * WHICH + i), i_b, i_h, i_first, i_v, i, N, first, L, BLOCKS)
    b_c = _first(p_c0, i_row, i_v, K, V, BK)
    b_e = b_c
    if BLOCKS == 2:
        b_e = _first(p_c0, i_row, i_v + 64, K, V, BK)
    b_gamma = gl.load(p_gamma + i_row * N)
    for i in range(N):
        # Addresses are made anew in every turn: kept over the loop they would not fit into the registers.
        zero = _anew(i * 0)
        at, turn = i % 3 + zero, (i & 1) + zero
        s_q, s_k, s_p, s_w = places[0].index(at), places[1].index(at), vectors[0].index(turn), vectors[1].index(turn)
        i_x, s_c, s_h = (2 * WHICH + turn) * BLOCKS, own[0].index(WHICH + zero), own[1].index(WHICH + zero)
        b_next = gl.load(p_gamma + i_row * N + gl.minimum(i + 1, N - 1))
        mbarrier.wait(full.index(at), i // 3 & 1)
        wanted, turns = (values.index(2 * WHICH + turn), ready.index(at)), (i // 2 & 1, i // 3 & 1)
        mbarrier.wait(wanted[0], turns[0])
        mbarrier.wait(wanted[1], turns[1])
        i_c = i_row.to(gl.int32) * N + i
        if KEEP and WHICH == 0:
            _keep_scores(d_p, s_p, i_row, i_v, i, L)
        b_h, b_c = _block(b_c, b_gamma, s_q, s_k, places[2].index(i_x), s_p, s_w, s_c, d_kept, i_c, i_v, L, KEEP)
        if BLOCKS == 2:
            _out(d_h, b_h, s_h, i_b, i_h, (i_first + i) * L, i_v)
            s_v = places[2].index(i_x + 1)
            b_h, b_e = _block(b_e, b_gamma, s_q, s_k, s_v, s_p, s_w, s_c, d_kept, i_c, i_v + 64, L, KEEP)
        # After its barriers nobody of this group reads the tiles any more.
        _out(d_h, b_h, s_h, i_b, i_h, (i_first + i) * L, i_v + 64 * (BLOCKS - 1))
        mbarrier.arrive(done.index(at))
        _come_values(d_v, places[2], values.index(2 * WHICH + turn), i_b, i_h, i_first, i_v, i + 2, N, i_x, L, BLOCKS)
        b_gamma = b_next
    tma.store_wait(0)
    _last(p_c_last, b_c, i_row, i_v, S, K, V, BK, CUT)
    if BLOCKS == 2:
        _last(p_c_last, b_e, i_row, i_v + 64, S, K, V, BK, CUT)


@gluon.jit
def _counters(PLACES: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit(do_not_specialize=["S", "N"])
def mlstm_walk_kernel(d_q, d_k, d_v, d_h, d_p, d_kept, p_c0, p_n0, p_c_last, p_n, p_alpha, p_beta, p_gamma, p_u, p_top, p_floor,
                        p_document, p_den, p_s, H, S, N, K, V, scale, eps,
                        L: gl.constexpr, BK: gl.constexpr, COLS: gl.constexpr, REGS: gl.constexpr, W: gl.constexpr,
                        NORM: gl.constexpr, RESET: gl.constexpr, CUT: gl.constexpr, KEEP: gl.constexpr):  # fmt: skip
    """h of 64 · COLS columns of a sequence or of its segments, the last memory, denominators, and n of every chunk."""
    tiles_v = (V + 64 * COLS - 1) // (64 * COLS)
    i_row, i_v = (gl.program_id(0) // tiles_v).to(gl.int64), (gl.program_id(0) % tiles_v) * (64 * COLS)
    i_bh = i_row
    if CUT:
        i_bh = i_row // S
        # n and the last memory stand with those of the sequence.
        p_n += (i_bh - i_row) * K
        p_c_last += (i_bh - i_row) * K * V
    i_b, i_h = (i_bh // H).to(gl.int32), (i_bh % H).to(gl.int32)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    all_q = gl.allocate_shared_memory(gl.bfloat16, [3, L, BK], WIDE)
    all_k = gl.allocate_shared_memory(gl.bfloat16, [3, L, BK], WIDE)
    all_v = gl.allocate_shared_memory(gl.bfloat16, [2 * COLS, L, 64], WIDE)
    all_p = gl.allocate_shared_memory(gl.bfloat16, [2, L, L], WIDE)
    all_c = gl.allocate_shared_memory(gl.bfloat16, [2, BK, 64], WIDE)
    all_h = gl.allocate_shared_memory(gl.bfloat16, [2, L, 64], WIDE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    all_w = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    all_a = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    all_u = gl.allocate_shared_memory(gl.float32, [2, L], FLAT)
    s_n = gl.allocate_shared_memory(gl.float32, [BK], FLAT)
    # q and k are there; what the scores make of them is; both groups of columns are through with a chunk; v of either is there.
    bars = _counters(3, 1), _counters(3, 1), _counters(3, 2), _counters(4, 1)
    places, vectors, own = (all_q, all_k, all_v), (all_p, all_w, all_a, all_u, s_n), (all_c, all_h)
    pointers, outs = (p_alpha, p_beta, p_u, p_top, p_floor), (p_n, p_den, p_s, p_gamma)
    gl.warp_specialize(
        [
            (_scores, ((d_q, d_k), places, vectors, bars, pointers, outs, p_n0, p_document, scale, eps,
                       i_b, i_h, i_row, i_v, S, N, K, L, BK, NORM, RESET, W, CUT)),
            (_values, (d_v, d_h, d_p, d_kept, places, vectors, own, bars, p_gamma, p_c0, p_c_last,
                       i_b, i_h, i_row, i_v, S, N, K, V, 0, L, BK, COLS, CUT, KEEP)),
            (_values, (d_v, d_h, d_p, d_kept, places, vectors, own, bars, p_gamma, p_c0, p_c_last,
                       i_b, i_h, i_row, i_v, S, N, K, V, 1, L, BK, COLS, CUT, KEEP)),
        ],
        [4, 4],
        [REGS, REGS],
    )  # fmt: skip
    for i in gl.static_range(3):
        mbarrier.invalidate(bars[0].index(i))
        mbarrier.invalidate(bars[1].index(i))
        mbarrier.invalidate(bars[2].index(i))
    for i in gl.static_range(4):
        mbarrier.invalidate(bars[3].index(i))


def forward(plan, call, q, k, v, gates, c, n, eps, every):
    """h, the last C, n of every chunk, den and s; where `every` asks, C before every second chunk and P/den."""
    L, S, K, COLS, keep = plan.L, plan.S, power(call.K), plan.BV // 64, every > 0
    c, n = starts(call, S, k, v, gates, (c, n))
    ns = call.vector(n, call.rows, call.N + 1, call.K)
    den, s, c_last = call.vector(ns), call.vector(ns), call.vector(ns, call.rows, call.K, call.V)
    h, registers = padded(v, v.shape), REGISTERS if COLS == 4 else NARROW
    p = q.new_empty((call.rows * S, call.N // S * L, L) if keep else (1, L, L))
    kept = q.new_empty((call.rows * call.N // 2, call.K, call.V) if keep else (1, K, 64))
    mlstm_walk_kernel[(call.rows * S * cdiv(call.V, plan.BV),)](
        heads(q, L, K), heads(k, L, K), heads(v, L, 64), heads(h, L, 64), matrices(p, L, L),
        matrices(kept, K, 64), c, n, c_last, ns,
        gates.alpha, gates.beta, gates.gamma, gates.u, gates.top, gates.floor, gates.document, den, s,
        call.H, S, call.N // S, call.K, call.V, call.scale, eps, L=L, BK=K, COLS=COLS, REGS=registers, W=WARPS,
        CUT=S > 1, KEEP=keep, num_warps=WARPS, **call.flags,
    )  # fmt: skip
    return h.contiguous(), c_last, ns, den, s, kept, p.view(call.rows, -1, L) if keep else p
