"""How the kernels cut the work up: chunk lengths, tiles and warps, by widths of heads, dtype and card; needs no Triton.

Nothing here depends on the length of a sequence, so a kernel is compiled once for a width of heads and serves every T; the number
of sequences and heads only decides between a few variants, where there are too few of them to fill the card.
Tiles were chosen on one H200 (docs/log.md).
"""

from typing import NamedTuple

import torch

# Programs that a card of some 132 multiprocessors wants to see at once.
FEW = 128


class Tiles(NamedTuple):
    """Block of K and of V that a program works on, its warps, and the loads it has in flight."""

    BK: int
    BV: int
    num_warps: int
    STAGES: int


class TwoPass(NamedTuple):
    """Chunk length L, rows a program, and the tiles of each kernel in two_pass.py."""

    L: int
    BT: int
    states: Tiles
    intra: Tiles
    outputs: Tiles
    intra_backward: Tiles
    dqdk: Tiles
    dv: Tiles


class OnePass(NamedTuple):
    """Chunk length L, chunks a segment, whether `forward` works the scores out itself, and the tiles of each kernel.

    For few columns of K the scores cost less there than a kernel of their own that writes them and reads them back.
    """

    L: int
    SEGMENT: int
    SCORES: bool
    intra: Tiles
    forward: Tiles
    intra_backward: Tiles
    dq: Tiles
    dv: Tiles
    dk: Tiles


def choose(q, v, chunk: int) -> TwoPass | OnePass:
    """The plan for q, k (B, T, H, K) and v (B, T, H, V), in chunks of `chunk` tokens where not 0."""
    (batch, time, heads, keys), values = q.shape, v.shape[-1]
    K, V, rows = power(keys), power(values), batch * heads
    large = q.dtype == torch.bfloat16 and _shared_memory(q.device) >= 160 << 10
    if large and not chunk and K <= 128 and V <= 256 and rows * V // 32 >= FEW:
        return _one_pass(K, V, rows, min(4, power(cdiv(time, 64), 1)))
    plan = _two_pass(min(K, 128), min(V, 128), q, large, rows * K * V)
    if chunk:
        length = min(256, max(16, 1 << chunk.bit_length() - 1))
        plan = plan._replace(L=length, BT=min(plan.BT, length))
    return plan


def padded_length(plan, time: int, save: bool) -> int:
    """Tokens of a row with what fills its last chunk, or where a backward follows, its last segment."""
    whole = plan.L * plan.SEGMENT if save and isinstance(plan, OnePass) else plan.L
    return cdiv(time, whole) * whole


def _one_pass(K, V, rows, segment):
    # Columns of a memory that a program keeps in registers: fewer where there are few sequences and heads.
    BV = min(V, 8192 // K)
    while BV > 32 and rows * V // BV < FEW:
        BV //= 2
    stages = 3 if K * V <= 8192 else 2
    small, wide, tall = Tiles(min(K, 64), min(V, 64), 4, 2), Tiles(K, BV, 4, 3), Tiles(max(16, min(K, 16384 // V)), V, 4, stages)
    return OnePass(64, segment, K <= 64, small, wide, small._replace(STAGES=3), tall, wide, tall)


def _two_pass(K, V, q, large, numbers):
    if q.dtype != torch.bfloat16:
        small = Tiles(min(K, 32), min(V, 32), 4, 1)
        states, dqdk = Tiles(min(K, 64), small.BV, 4, 1), Tiles(min(K, 64), small.BV, 4, 1)
        return TwoPass(64, 32, states, small, Tiles(small.BK, min(V, 64), 4, 1), small, dqdk, small)
    k64, v64 = min(K, 64), min(V, 64)
    block = Tiles(k64, v64, 4, 2)
    if not large:
        return TwoPass(64, 64, block, block, block, block, block, block)
    states = Tiles(K, v64, 4, 3)
    while states.BK * states.BV > 1024 and numbers < FEW * states.BK * states.BV:
        states = states._replace(BV=states.BV // 2) if states.BV > states.BK else states._replace(BK=states.BK // 2)
    wide = Tiles(k64, V, 4, 3)
    return TwoPass(256, 64, states, block, wide, block._replace(STAGES=3), Tiles(K, min(V, 32), 4, 4), wide)


def power(width, least=16):
    """The power of two that holds `width`, at least 16 as the matrix units want it."""
    return max(least, 1 << (width - 1).bit_length())


def cdiv(a, b):
    return -(-a // b)


def _shared_memory(device) -> int:
    """Bytes of shared memory that a program may have; of a Hopper card where there is none to ask."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
