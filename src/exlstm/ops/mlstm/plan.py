"""How the kernels cut the work up: chunk lengths, tiles and warps, by widths of heads, dtype and card; needs no Triton.

No kernel is compiled for a length of sequences, only for a width of heads, and serves every T; the number of sequences and heads
decides between a few variants, where there are too few of them to fill the card: for kernels that walk through a sequence, long
ones are then cut into segments (segments.py), as many as fill it.
Tiles were chosen on one H200, what hopper.py is for on one H100 (docs/log.md).
"""

from functools import cache
from typing import NamedTuple

import torch

from exlstm.ops import backend as backends

# Programs that a card of some 132 multiprocessors wants to see at once.
FEW = 128
# What the kernels of hopper.py are written for, and ran on: the matrix units of Hopper, and a Gluon whose names change from one
# Triton to the next. Elsewhere the backward goes in two passes, and nobody needs to know.
CAPABILITY, GLUON = (9, 0), "3.6."
# Multiprocessors of Hopper, how many in a hundred of them segments should keep busy, and the tokens of a segment at least: with
# fewer, finding where it starts is as much work as the segment.
PROCESSORS, BUSY, SHORT = 132, 70, 512


class Tiles(NamedTuple):
    """Block of K and of V that a program works on, its warps, and the loads it has in flight."""

    BK: int
    BV: int
    num_warps: int
    STAGES: int


class TwoPass(NamedTuple):
    """Chunk length L, rows a program, tokens that it reads at once, and the tiles of each kernel in two_pass.py and intra.py."""

    L: int
    BT: int
    BJ: int
    states: Tiles
    intra: Tiles
    outputs: Tiles
    intra_backward: Tiles
    dq: Tiles
    dk: Tiles
    dv: Tiles


class OnePass(NamedTuple):
    """Chunk length L (rows a program too), whether `forward` works the scores out itself, tiles and segments; see one_pass.py."""

    L: int
    BT: int
    BJ: int
    SCORES: bool
    intra: Tiles
    forward: Tiles
    S: int = 1


class Walk(NamedTuple):
    """Chunk length L of a forward in one kernel, the columns of a memory that a program keeps, and segments; see walk.py."""

    L: int
    BV: int
    S: int = 1


class Columns(NamedTuple):
    """Chunk length L of a forward of keys of 128 or 256, whose programs keep 128 columns each; see columns.py."""

    L: int
    S: int = 1


class Chunks(NamedTuple):
    """The same of its backward: dv comes of such programs, dq and dk of one a chunk and 128 keys; see chunks.py."""

    L: int
    S: int = 1


class Chain(NamedTuple):
    """Chunk length L of a backward that walks through all chunks of a segment, and these; see hopper.py."""

    L: int
    S: int = 1


class Fused(NamedTuple):
    """Chunk length L of a backward whose chunks go one by one, the values that a program reads at once, and those of `states`."""

    L: int
    BJ: int
    BV: int
    states: Tiles


class Plan(NamedTuple):
    """How the forward goes and how the backward."""

    forward: Walk | Columns | OnePass | TwoPass
    backward: Chain | Chunks | Fused | TwoPass


def choose(q, v, chunk: int) -> Plan:
    """The plan for q, k (B, T, H, K) and v (B, T, H, V), in chunks of `chunk` tokens where not 0."""
    keys, values, rows = q.shape[-1], v.shape[-1], q.shape[0] * q.shape[2]
    K, V = power(keys), power(values)
    large = q.dtype == torch.bfloat16 and backends.shared_memory(q.device) >= 160 << 10
    two = _two_pass(K, V, q, large, rows)
    if chunk:
        length = min(256, max(16, 1 << chunk.bit_length() - 1))
        two = two._replace(L=length, BT=min(two.BT, length), BJ=min(two.BJ, length))
    elif large and gluon(q.device) and (plan := _segmented(q, v, two)):
        return plan
    elif large and _in_columns(q, v) and rows * values // 128 >= FEW:
        return Plan(Columns(64), Chunks(128))
    elif large and K <= 128 and V <= 256 and rows * V // min(V, 128 if K <= 64 else 32) >= FEW:
        # Programs that also work out the scores want their memories whole.
        backward = Chain(64) if _on_hopper(q, v) else two
        walks = K == 128 and V >= 128 and rows * V // 128 >= FEW and gluon(q.device)
        if walks and _in_chunks(q, v):
            backward = Chunks(128)
        return Plan(_walk(V, rows) if walks else _one_pass(K, V, rows), backward)
    elif large and _on_hopper(q, v):
        return Plan(two, Fused(two.L, two.BJ, 64, two.states))
    return Plan(two, two)


def _walk(V, rows):
    """The walk; with all values in a program where these are enough."""
    return Walk(64, 256 if V > 128 and rows >= FEW else 128)


def _segmented(q, v, two) -> Plan | None:
    """The plan for few rows of long sequences, None where there are many, or where they are short."""
    (_, tokens, _, keys), values, rows = q.shape, v.shape[-1], q.shape[0] * q.shape[2]
    K, V = power(keys), power(values)
    if rows >= FEW:
        return None
    if _on_hopper(q, v):
        # Two programs stand on a multiprocessor.
        S = segments(rows, tokens, 2 * PROCESSORS)
        return Plan(_one_pass(K, V, rows * S)._replace(S=S), Chain(64, S)) if S else None
    if _in_columns(q, v):
        S = segments(rows * values // 128, tokens, PROCESSORS)
        return Plan(Columns(64, S), Chunks(128, S)) if S else None
    if K != 128 or not 128 <= V <= 256:
        return None
    S = 1 if rows * V // 128 >= FEW else segments(rows * V // 128, tokens, PROCESSORS)
    return Plan(Walk(64, 128, S), Chunks(128, S) if _in_chunks(q, v) else two) if S else None


def segments(programs, tokens, places) -> int:
    """Segments of a sequence, a power of two, where there are `programs` without them; 0 where sequences are too short."""
    S = 1
    while 100 * programs * S < BUSY * cdiv(programs * S, places) * places:
        S *= 2
        if tokens < S * SHORT:
            return 0
    return S


def parts(programs, chunks) -> int:
    """Parts of a segment of `chunks`, where there are `programs` without them: two on a multiprocessor, of 8 chunks at least."""
    P = 1
    while programs * P < 2 * FEW and chunks >= 16 * P:
        P *= 2
    return P


def sums(keys, values) -> Tiles:
    """The tile of a memory that a program of segments.py sums, so small that two or three programs stand on a multiprocessor."""
    K, V = power(keys), power(values)
    return Tiles(128 if K > 128 else min(64, K), min(128, V), 8, 3)


def _in_chunks(q, v) -> bool:
    """Whether chunks.py takes these widths, and runs here."""
    return q.shape[-1] in (128, 256) and v.shape[-1] % 128 == 0 and gluon(q.device)


def _in_columns(q, v) -> bool:
    """Whether the forward before it is that of columns.py, for the walk holds no such widths."""
    return _in_chunks(q, v) and (q.shape[-1] == 256 or v.shape[-1] > 256)


def _on_hopper(q, v) -> bool:
    """Whether hopper.py has a backward for these widths, all that it ran with on a card, and whether that runs here."""
    return q.shape[-1] == 64 and v.shape[-1] in (64, 96, 128) and gluon(q.device)


@cache
def gluon(device) -> bool:
    """Whether the kernels written in Gluon run on `device`."""
    if not backends.TRITON or backends.INTERPRETED or device.type != "cuda":
        return False
    import triton

    return torch.cuda.get_device_capability(device) == CAPABILITY and triton.__version__.startswith(GLUON)


def padded_length(plan: Plan, time: int, save: bool) -> int:
    """Tokens of a row with what fills its last chunk, of the backward too where one follows, in segments of equal length."""
    forward, backward = (x.L * getattr(x, "S", 1) for x in plan)
    # Where segments end must not depend on whether a backward follows, nor what n is rounded to. All these are powers of two.
    always = forward > plan.forward.L or isinstance(plan.forward, Columns)
    length = max(forward, backward) if save or always else forward
    return cdiv(time, length) * length


def memories(count: int, keys: int, values: int, dtype) -> tuple[int, int, int]:
    """Shape of `count` memories between the kernels: rows start at multiples of 16 bytes, as the copy engine wants them."""
    whole = 16 // dtype.itemsize
    return count, keys, cdiv(values, whole) * whole


def _one_pass(K, V, rows):
    # Columns of a memory that a program keeps in registers: fewer where there are few sequences and heads.
    BV = min(V, 8192 // K)
    while BV > 32 and rows * V // BV < FEW:
        BV //= 2
    # With one program on a multiprocessor, only its own loads can hide the memory's latency.
    stages = 2 if rows * V // BV >= 2 * FEW else 3
    return OnePass(64, 64, 64, K <= 64, Tiles(min(K, 64), 64, 4, 2), Tiles(K, BV, 4, stages))


def _two_pass(K, V, q, large, rows):
    k64, v64, k128, v128 = min(K, 64), min(V, 64), min(K, 128), min(V, 128)
    if q.dtype != torch.bfloat16:
        # Products in float32 run outside the matrix units and want their operands in registers.
        small = Tiles(min(K, 32), min(V, 32), 4, 1)
        states, wide, tall = Tiles(k64, small.BV, 4, 1), Tiles(small.BK, v64, 4, 1), Tiles(k64, small.BV, 4, 1)
        return TwoPass(64, 32, 32, states, small, wide, small, tall, small, small)
    block = Tiles(k64, v64, 4, 2)
    if not large:
        return TwoPass(64, 64, 64, *[block] * 7)
    if K <= 64:
        # What happens inside the chunks is most of the work, and grows with their length.
        wide = Tiles(K, v128, 4, 2)
        return TwoPass(64, 64, 64, _spread(Tiles(K, v128, 8, 3), rows * K * V), block, wide, wide, block, block, wide)
    states = _spread(Tiles(k128, v64, 4, 4), rows * K * V)
    wide, tall = Tiles(k64, v128, 8, 3), Tiles(k128, v64, 8, 3)
    # The wider a head, the more its memories weigh, and the longer the chunks should be.
    return TwoPass(128 if K <= 128 else 256, 128, 64, states, block, wide, block._replace(STAGES=3), tall, tall, wide)


def _spread(tiles, numbers):
    """Smaller tiles of a memory where `numbers` in all memories would keep too few programs busy."""
    while tiles.BK * tiles.BV > 1024 and numbers < FEW * tiles.BK * tiles.BV:
        wider = tiles.BV > tiles.BK
        tiles = tiles._replace(BV=tiles.BV // 2) if wider else tiles._replace(BK=tiles.BK // 2)
    return tiles._replace(num_warps=min(tiles.num_warps, 4)) if tiles.BK * tiles.BV < 8192 else tiles


def power(width, least=16):
    """The power of two that holds `width`, at least 16 as the matrix units want it."""
    return max(least, 1 << (width - 1).bit_length())


def cdiv(a, b):
    return -(-a // b)
