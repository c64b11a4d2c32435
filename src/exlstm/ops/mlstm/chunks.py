"""A backward of the mLSTM on Hopper for keys of 128 or 256: dq and dk of every chunk of 128 tokens in one kernel.

    dS = (dh v_T / den + ds) ⊙ a D
    dq = aβ/den ⊙ (dh C_T) + a β ds ⊗ n + dS k          dk = α ⊙ (v dC_T + dn) + dS_T q

C before and dC behind every chunk come from columns.py, which makes dv as well. A program has a chunk and 128 of its keys and
goes through the values once. Four groups of warps: one brings the tiles and sums <C, dC>, one has dh v_T and makes dS of it,
which never leaves the chip, one has dq, one dk. Every tile is 64 × 64.
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

from exlstm.ops.mlstm import columns
from exlstm.ops.mlstm.columns import _come, _places
from exlstm.ops.mlstm.gates import padded
from exlstm.ops.mlstm.hopper import _anew, _columns, _fetch_vector, _product, _rows, _sums, heads, matrices
from exlstm.ops.mlstm.intra import denominator_gradient
from exlstm.ops.mlstm.walk import _counters

# Registers a thread: dh v_T; dq and dk. Who brings the tiles has what is left.
SCORES, KEYS = 136, 160
# Places of a tile of every kind.
STAGES = 3


@gluon.jit
def _bring_keys(d_q, d_k, tiles, full, at, i_k, WHICH: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr):
    """64 tokens of k to the places of C, of q to those of dC, behind the last tile of values."""
    _, _, all_c, all_dc = tiles
    turn: gl.constexpr = (TILES + WHICH) % STAGES
    mbarrier.expect(full.index(turn), 4 * d_q.block_type.nbytes)
    for e in gl.static_range(2):
        _come(d_k, [at[0], at[1], at[2] + 64 * WHICH, i_k + 64 * e], full.index(turn), all_c.index(2 * turn + e))
        _come(d_q, [at[0], at[1], at[2] + 64 * WHICH, i_k + 64 * e], full.index(turn), all_dc.index(2 * turn + e))


@gluon.jit
def _parts():
    return gl.zeros([16, 64], gl.float32, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _overlap(b_sum, s_c, s_dc):
    """b_sum + C ⊙ dC of a tile, 16 of its rows at a time."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in gl.static_range(4):
        b_c = s_c.slice(16 * i, 16).load(LINES).to(gl.float32)
        b_sum += b_c * s_dc.slice(16 * i, 16).load(LINES).to(gl.float32)
    return b_sum


@gluon.jit
def _bring(descs, d_q, d_k, tiles, full, empty, p_gamma, p_n, p_dn, p_inflow, at, i_c, i_k,
           STAGES: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """dh, v, C and dC of the values, 64 at a time; k and q. γ (<C, dC> + <n, dn>) of these keys."""
    d_dh, d_v, d_c, d_dc = descs
    all_dh, all_v, all_c, all_dc = tiles
    SIZE: gl.constexpr = d_v.block_type.nbytes
    b_sum = _parts()
    for i in range(TILES + 2):
        turn = i % STAGES + _anew(i * 0)
        if i < TILES:
            # A barrier that nothing has arrived at yet lets pass who waits for phase 1.
            mbarrier.wait(empty.index(turn), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(turn), 8 * SIZE)
            for r in gl.static_range(2):
                _come(d_dh, [at[0], at[1], at[2] + 64 * r, 64 * i], full.index(turn), all_dh.index(2 * turn + r))
                _come(d_v, [at[0], at[1], at[2] + 64 * r, 64 * i], full.index(turn), all_v.index(2 * turn + r))
                _come(d_c, [i_c, i_k + 64 * r, 64 * i], full.index(turn), all_c.index(2 * turn + r))
                _come(d_dc, [i_c, i_k + 64 * r, 64 * i], full.index(turn), all_dc.index(2 * turn + r))
        if i >= 2:
            then = (i - 2) % STAGES + _anew(i * 0)
            mbarrier.wait(full.index(then), (i - 2) // STAGES & 1)
            b_sum = _overlap(b_sum, all_c.index(2 * then), all_dc.index(2 * then))
            b_sum = _overlap(b_sum, all_c.index(2 * then + 1), all_dc.index(2 * then + 1))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(then))
    mbarrier.wait(empty.index(TILES % STAGES), (TILES // STAGES & 1) ^ 1)
    _bring_keys(d_q, d_k, tiles, full, at, i_k, 0, STAGES, TILES)
    mbarrier.wait(empty.index((TILES + 1) % STAGES), ((TILES + 1) // STAGES & 1) ^ 1)
    _bring_keys(d_q, d_k, tiles, full, at, i_k, 1, STAGES, TILES)
    o_k = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    b_inflow = gl.sum(gl.sum(b_sum, 1), 0) + gl.sum(gl.load(p_n + o_k) * gl.load(p_dn + o_k), 0)
    gl.store(p_inflow, b_inflow * gl.load(p_gamma))


@gluon.jit
def _decay(all_g, p_document, scale, R: gl.constexpr, C: gl.constexpr, RESET: gl.constexpr):
    """a D of 64 reading tokens and 64 that they read."""
    o_r, o_c = gl.arange(0, 64, _rows(64)), gl.arange(0, 64, _columns(64))
    seen = (o_r[:, None] >= o_c[None, :]) | (R > C)
    if RESET:
        seen = seen & (gl.load(p_document + 64 * R + o_r)[:, None] == gl.load(p_document + 64 * C + o_c)[None, :])
    exponent = all_g.index(C).load(_columns(64))[None, :] - all_g.index(2 + R).load(_rows(64))[:, None]
    return scale * gl.exp2(gl.where(seen, exponent, -float("inf")))


@gluon.jit
def _store_scores(b_g, s_ds, all_g, p_document, scale, R: gl.constexpr, C: gl.constexpr, RESET: gl.constexpr):
    b_g = b_g * (1.0 / all_g.index(4 + R).load(_rows(64)))[:, None] + all_g.index(6 + R).load(_rows(64))[:, None]
    s_ds.store((b_g * _decay(all_g, p_document, scale, R, C, RESET)).to(gl.bfloat16))


@gluon.jit
def _scores(tiles, all_ds, all_g, full, empty, told, made, vectors, p_n, p_dn, p_document, at_t, scale,
            STAGES: gl.constexpr, TILES: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """a dS of the chunk; and the vectors of its tokens, for all."""
    all_dh, all_v, _, _ = tiles
    for i in gl.static_range(6):
        for r in gl.static_range(2):
            _fetch_vector(all_g.index(2 * i + r), vectors[i] + at_t + 64 * r, 64)
    for r in gl.static_range(2):
        _fetch_vector(all_g.index(12 + r), p_n + 64 * r, 64)
        _fetch_vector(all_g.index(14 + r), p_dn + 64 * r, 64)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.thread_barrier()
    mbarrier.arrive(told)
    b_0 = gl.zeros([64, 64], gl.float32, _sums(64))
    b_1, b_2 = b_0, b_0
    for i in range(TILES):
        turn = i % STAGES + _anew(i * 0)
        mbarrier.wait(full.index(turn), i // STAGES & 1)
        s_first, s_second = all_dh.index(2 * turn), all_dh.index(2 * turn + 1)
        b_0 = _product(s_first, all_v.index(2 * turn).permute([1, 0]), b_0)
        b_1 = _product(s_second, all_v.index(2 * turn).permute([1, 0]), b_1)
        b_2 = _product(s_second, all_v.index(2 * turn + 1).permute([1, 0]), b_2)
        b_0, b_1, b_2 = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(turn))
    _store_scores(b_0, all_ds.index(0), all_g, p_document, scale, 0, 0, RESET)
    _store_scores(b_1, all_ds.index(1), all_g, p_document, scale, 1, 0, RESET)
    _store_scores(b_2, all_ds.index(2), all_g, p_document, scale, 1, 1, RESET)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(made)


@gluon.jit
def _through(all_a, all_c, full, empty, STAGES: gl.constexpr, TILES: gl.constexpr):
    """A C_T: 2 × 2 tiles, of 64 tokens and 64 keys each."""
    b_a = gl.zeros([64, 64], gl.float32, _sums(64))
    b_b, b_c, b_d = b_a, b_a, b_a
    for i in range(TILES):
        turn = i % STAGES + _anew(i * 0)
        mbarrier.wait(full.index(turn), i // STAGES & 1)
        s_c, s_e = all_c.index(2 * turn).permute([1, 0]), all_c.index(2 * turn + 1).permute([1, 0])
        b_a = _product(all_a.index(2 * turn), s_c, b_a)
        b_b = _product(all_a.index(2 * turn), s_e, b_b)
        b_c = _product(all_a.index(2 * turn + 1), s_c, b_c)
        b_d = _product(all_a.index(2 * turn + 1), s_e, b_d)
        b_a, b_b, b_c, b_d = warpgroup_mma_wait(0, deps=[b_a, b_b, b_c, b_d])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(turn))
    return b_a, b_b, b_c, b_d


@gluon.jit
def _with_n(b_dq, all_g, scale, R: gl.constexpr, E: gl.constexpr):
    b_w = all_g.index(10 + R).load(_rows(64))
    b_wn = b_w * all_g.index(4 + R).load(_rows(64)) * all_g.index(6 + R).load(_rows(64))
    return b_dq * b_w[:, None] + b_wn[:, None] * all_g.index(12 + E).load(_columns(64))[None, :]


@gluon.jit
def _with_dn(b_dk, all_g, R: gl.constexpr, E: gl.constexpr):
    b_dk += all_g.index(14 + E).load(_columns(64))[None, :]
    return b_dk * all_g.index(8 + R).load(_rows(64))[:, None]


@gluon.jit
def _with(s_x, b_dx):
    """x · dx of every token, over 64 keys."""
    return gl.sum(s_x.load(_sums(64)).to(gl.float32) * b_dx, 1)


@gluon.jit
def _row_sums(p_out, all_x, b_a, b_b, b_c, b_d, F: gl.constexpr, S: gl.constexpr):
    """x · dx of every token over these keys, of 64 tokens in places from F and 64 from S on."""
    o_t = gl.arange(0, 64, _rows(64))
    gl.store(p_out + o_t, _with(all_x.index(F), b_a) + _with(all_x.index(F + 1), b_b))
    gl.store(p_out + 64 + o_t, _with(all_x.index(S), b_c) + _with(all_x.index(S + 1), b_d))


@gluon.jit
def _out(desc, at, i_k, all_x, b_a, b_b, b_c, b_d, read, F: gl.constexpr, S: gl.constexpr):
    """Four tiles to memory by way of places that nobody reads any more once both groups say so."""
    gl.thread_barrier()
    mbarrier.arrive(read)
    mbarrier.wait(read, 0)
    all_x.index(F).store(b_a.to(gl.bfloat16))
    all_x.index(F + 1).store(b_b.to(gl.bfloat16))
    all_x.index(S).store(b_c.to(gl.bfloat16))
    all_x.index(S + 1).store(b_d.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    for e in gl.static_range(2):
        tma.async_copy_shared_to_global(desc, [at[0], at[1], at[2], i_k + 64 * e], all_x.index(F + e))
        tma.async_copy_shared_to_global(desc, [at[0], at[1], at[2] + 64, i_k + 64 * e], all_x.index(S + e))
    tma.store_wait(0)


@gluon.jit
def _queries(tiles, all_ds, all_g, full, empty, told, made, read, d_dq, p_qdq, at, i_k, scale,
             STAGES: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """dq, and q · dq."""
    all_dh, _, all_c, all_dc = tiles
    F: gl.constexpr = 2 * (TILES % STAGES)
    S: gl.constexpr = 2 * ((TILES + 1) % STAGES)
    b_a, b_b, b_c, b_d = _through(all_dh, all_c, full, empty, STAGES, TILES)
    mbarrier.wait(told, 0)
    b_a, b_b = _with_n(b_a, all_g, scale, 0, 0), _with_n(b_b, all_g, scale, 0, 1)
    b_c, b_d = _with_n(b_c, all_g, scale, 1, 0), _with_n(b_d, all_g, scale, 1, 1)
    mbarrier.wait(made, 0)
    mbarrier.wait(full.index(F // 2), TILES // STAGES & 1)
    b_a = _product(all_ds.index(0), all_c.index(F), b_a)
    b_b = _product(all_ds.index(0), all_c.index(F + 1), b_b)
    b_c = _product(all_ds.index(1), all_c.index(F), b_c)
    b_d = _product(all_ds.index(1), all_c.index(F + 1), b_d)
    mbarrier.wait(full.index(S // 2), (TILES + 1) // STAGES & 1)
    b_c = _product(all_ds.index(2), all_c.index(S), b_c)
    b_d = _product(all_ds.index(2), all_c.index(S + 1), b_d)
    b_a, b_b, b_c, b_d = warpgroup_mma_wait(0, deps=[b_a, b_b, b_c, b_d])
    _row_sums(p_qdq, all_dc, b_a, b_b, b_c, b_d, F, S)
    _out(d_dq, at, i_k, all_c, b_a, b_b, b_c, b_d, read, F, S)


@gluon.jit
def _keys(tiles, all_ds, all_g, full, empty, told, made, read, d_dk, p_kdk, p_inflow, at, i_k,
          STAGES: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """dk, k · dk, and what the keys write of the memory behind the chunk."""
    _, all_v, all_c, all_dc = tiles
    F: gl.constexpr = 2 * (TILES % STAGES)
    S: gl.constexpr = 2 * ((TILES + 1) % STAGES)
    b_a, b_b, b_c, b_d = _through(all_v, all_dc, full, empty, STAGES, TILES)
    mbarrier.wait(told, 0)
    b_a, b_b = _with_dn(b_a, all_g, 0, 0), _with_dn(b_b, all_g, 0, 1)
    b_c, b_d = _with_dn(b_c, all_g, 1, 0), _with_dn(b_d, all_g, 1, 1)
    mbarrier.wait(full.index(F // 2), TILES // STAGES & 1)
    mbarrier.wait(full.index(S // 2), (TILES + 1) // STAGES & 1)
    b_in = _with(all_c.index(F), b_a) + _with(all_c.index(F + 1), b_b)
    b_in += _with(all_c.index(S), b_c) + _with(all_c.index(S + 1), b_d)
    gl.store(p_inflow, gl.sum(b_in, 0))
    mbarrier.wait(made, 0)
    b_a = _product(all_ds.index(0).permute([1, 0]), all_dc.index(F), b_a)
    b_b = _product(all_ds.index(0).permute([1, 0]), all_dc.index(F + 1), b_b)
    b_a = _product(all_ds.index(1).permute([1, 0]), all_dc.index(S), b_a)
    b_b = _product(all_ds.index(1).permute([1, 0]), all_dc.index(S + 1), b_b)
    b_c = _product(all_ds.index(2).permute([1, 0]), all_dc.index(S), b_c)
    b_d = _product(all_ds.index(2).permute([1, 0]), all_dc.index(S + 1), b_d)
    b_a, b_b, b_c, b_d = warpgroup_mma_wait(0, deps=[b_a, b_b, b_c, b_d])
    _row_sums(p_kdk, all_c, b_a, b_b, b_c, b_d, F, S)
    _out(d_dk, at, i_k, all_dc, b_a, b_b, b_c, b_d, read, F, S)


@gluon.jit(do_not_specialize=["N"])
def mlstm_chunks_kernel(d_q, d_k, d_v, d_dh, d_c, d_dc, d_dq, d_dk, p_n, p_dn, p_u, p_top, p_den, p_ds, p_alpha, p_w, p_gamma,
                        p_document, p_qdq, p_kdk, p_inflow, H, N, K, scale,
                        KEYS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, REGS: gl.constexpr,
                        MORE: gl.constexpr, RESET: gl.constexpr):  # fmt: skip
    """dq and dk of a chunk of 128 tokens and 128 keys; their parts of q · dq, k · dk and of what flows in behind the chunk."""
    part, i_c = gl.program_id(0) % KEYS, gl.program_id(0) // KEYS
    i_bh, i_n, i_k = i_c // N, i_c % N, 128 * part
    at = i_bh // H, i_bh % H, i_n * 128
    at_t, chunks = i_c.to(gl.int64) * 128, (gl.num_programs(0) // KEYS).to(gl.int64)
    tiles = _places(2 * STAGES), _places(2 * STAGES), _places(2 * STAGES), _places(2 * STAGES)
    all_ds = _places(3)
    all_g = gl.allocate_shared_memory(gl.float32, [16, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty, once = _counters(STAGES, 1), _counters(STAGES, 4), _counters(3, 1)
    read = _counters(1, 2).index(0)
    told, made = once.index(0), once.index(1)
    p_n += (i_bh.to(gl.int64) * (N + 1) + i_n) * K + i_k
    p_dn += (i_bh.to(gl.int64) * (N + 1) + i_n + 1) * K + i_k
    p_qdq += part * chunks * 128 + at_t
    p_kdk += part * chunks * 128 + at_t
    p_inflow += (part * chunks + i_c) * 2
    vectors = p_u, p_top, p_den, p_ds, p_alpha, p_w
    gl.warp_specialize(
        [
            (_bring, ((d_dh, d_v, d_c, d_dc), d_q, d_k, tiles, full, empty, p_gamma + i_c, p_n, p_dn, p_inflow, at, i_c, i_k,
                      STAGES, TILES)),
            (_scores, (tiles, all_ds, all_g, full, empty, told, made, vectors, p_n, p_dn, p_document + at_t, at_t, scale,
                       STAGES, TILES, RESET)),
            (_queries, (tiles, all_ds, all_g, full, empty, told, made, read, d_dq, p_qdq, at, i_k, scale, STAGES, TILES)),
            (_keys, (tiles, all_ds, all_g, full, empty, told, made, read, d_dk, p_kdk, p_inflow + 1, at, i_k, STAGES, TILES)),
        ],
        [4, 4, 4],
        [REGS, MORE, MORE],
    )  # fmt: skip


def backward(plan, call, grads, q, k, v, gates, c, saved):
    """dq, dk, dv, the sums that the gates' gradients are made of, dc and dn of the first memory."""
    (dh, dc, dn), (h, den, s, ns, cs, p), parts = grads, saved, call.K // 128
    short, fine = call.in_chunks(64)
    dv, dcs, first, flow = columns.values(short, plan.S, q, k, h, dh, p, fine, den, dc)
    w, ds, sums = denominator_gradient(call, q, h, dh, gates, den, s, flow)
    dns = call.normaliser_scan(sums, gates, dn, reverse=True)
    dq, dk = padded(q, q.shape), padded(k, k.shape)
    qdq, kdk = call.vector(den, parts, call.tokens), call.vector(den, parts, call.tokens)
    inflow = call.vector(den, parts, call.rows * call.N * 2)
    t_q, t_k, t_v, t_dh, t_dq, t_dk = (heads(x, 64, 64) for x in (q, k, v, dh, dq, dk))
    mlstm_chunks_kernel[(call.rows * call.N * parts,)](
        t_q, t_k, t_v, t_dh, matrices(cs, 64, 64), matrices(dcs, 64, 64), t_dq, t_dk, ns, dns, gates.u, gates.top, den, ds,
        gates.alpha, w, gates.gamma, gates.document, qdq, kdk, inflow, call.H, call.N, call.K, call.scale,
        KEYS=parts, STAGES=STAGES, TILES=call.V // 64, REGS=SCORES, MORE=KEYS, RESET=call.flags["RESET"], num_warps=4,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv, (qdq, kdk, inflow), first, dns[:, 0].clone()
