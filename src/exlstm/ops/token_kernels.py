"""One token a row through the maps of a block as Triton kernels, for decoding: weights are read once, and little else is moved.

n = norm(x) ⊙ w, RMSNorm or LayerNorm      y_j = W_j n     gates = cap·tanh((W n + b) / cap), the second half through logsigmoid
hidden = act(G n) ⊙ (U n)            x += W y         memory's end: y = LayerNorm_head(h) ⊙ w ⊙ sigmoid(o)

A single row: a program holds whole rows of W, all of its loads in flight at once, and the norm is a factor on its sums. Some
rows: the weights are the left side of a matrix product. Many: PyTorch's products, with the same kernels between them. All write
into tensors of the caller, wait for nothing and allocate nothing up to WIDEST rows, so that a CUDA graph may hold them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from exlstm.ops import backend as backends
from exlstm.ops import int8
from exlstm.ops.kernels import DTYPES, sigmoid

# Features of an input up to which a program holds a whole row of weights, and of a row that is normalised.
LARGEST = 32768
# Rows up to which the kernels' own matrix products run.
WIDEST = 64
# Numbers of weights a program and a thread when there is a single row.
SINGLE, THREAD = 16384, 64
# Rows of weights a program when there are some rows, the largest of which there are PROGRAMS; columns of a single matrix and of
# two at once, warps, and loads in flight.
HEIGHTS, PROGRAMS, WIDTHS, WARPS, STAGES = (64, 32, 16), 96, (256, 128), 4, 4
# Whether, for a single row, a kernel starts while the one before it ends; its weights are then on their way before its input
# is there. It takes 7 % off there, and adds 20 % with 32 rows, whose products fill the card. Off: on a card shared by many
# processes laws of decoding failed with it that passed without (docs/log.md).
OVERLAP = False
# Triton's interpreter multiplies no bfloat16.
WIDE = tl.constexpr(backends.INTERPRETED)


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Behind it, what earlier kernels wrote is there."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _whole(w, o_n, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Rows o_n of w (N, K), whole."""
    o_k = tl.arange(0, BK)
    keep = (o_n < N)[:, None] & (o_k < K)[None, :]
    return tl.load(
        w + o_n.to(tl.int64)[:, None] * K + o_k[None, :], mask=keep, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def _input(x, norm, eps, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """The single row of x in float32, times the norm's weight, and the factor that is still missing."""
    o_k = tl.arange(0, BK)
    b_x = tl.load(x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_r = 1.0
    if NORM:
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps)
        b_x *= tl.load(norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return b_x, b_r


@triton.jit
def _dot(b_w, b_x, b_y):
    """b_y + b_w b_x; b_w may be int8."""
    if WIDE:
        b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
    else:
        b_w = b_w.to(b_x.dtype)
    return tl.dot(b_w, b_x, b_y, input_precision="ieee")


@triton.jit
def _dots(x, w, o_n, rows, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Rows o_n of w (N, K) times the rows of x (B, K): (BN, BB)."""
    o_b, o_k = tl.arange(0, BB), tl.arange(0, BK)
    p_w, p_x = w + o_n.to(tl.int64)[:, None] * K + o_k[None, :], x + o_b[None, :] * K + o_k[:, None]
    keep_n, keep_b = (o_n < N)[:, None], (o_b < rows)[None, :]
    b_y = tl.zeros((BN, BB), tl.float32)
    for start in range(0, K, BK):
        keep_k = o_k < K - start
        b_w = tl.load(p_w + start, mask=keep_n & keep_k[None, :], other=0.0, eviction_policy="evict_first")
        b_x = tl.load(p_x + start, mask=keep_b & keep_k[:, None], other=0.0)
        b_y = _dot(b_w, b_x, b_y)
    return b_y


@triton.jit
def _scaled(b_y, s, o_n, N: tl.constexpr, SCALED: tl.constexpr):
    """(BN, BB) times the scales of its rows, where weights are int8."""
    if SCALED:
        b_y *= tl.load(s + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    return b_y


@triton.jit
def _product(
    x, norm, w, s, o_n, rows, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows o_n of w, which are times s where SCALED, times x, normalised where NORM: (BN, BB)."""
    if BB == 1:
        b_w = _whole(w, o_n, N, K, BK)
        _wait(OVERLAP)
        b_x, b_r = _input(x, norm, eps, K, BK, NORM)
        b_y = (tl.sum(b_w.to(tl.float32) * b_x[None, :], 1) * b_r)[:, None]
    else:
        _wait(OVERLAP)
        b_y = _dots(x, w, o_n, rows, N, K, BN, BB, BK)
    return _scaled(b_y, s, o_n, N, SCALED)


@triton.jit
def _tanh(b_x):
    """1 - 2 / (exp(2x) + 1), for every finite x."""
    return 1.0 - 2.0 / (tl.exp(2.0 * b_x) + 1.0)


@triton.jit
def _log_sigmoid(b_x):
    """-log(1 + exp(-x)), to the last digit where it is near 0."""
    b_e = tl.exp(-tl.abs(b_x))
    b_u = 1.0 + b_e
    b_log = tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    return tl.minimum(b_x, 0.0) - b_log


@triton.jit
def _store(y, b_y, o_n, rows, N: tl.constexpr, BB: tl.constexpr):
    """(BN, BB) into y (B, N)."""
    o_b = tl.arange(0, BB)[None, :]
    o_n = o_n[:, None]
    tl.store(y + o_b * N + o_n, b_y.to(y.dtype.element_ty), mask=(o_n < N) & (o_b < rows))


@triton.jit
def map_kernel(
    x, norm, w, s, y, rows, eps, cap, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, CAP: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (N / BN,): y = W n, W = s ⊙ w where SCALED, soft-capped where CAP, added to what y holds where ADD."""
    _begin(OVERLAP)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_y = _product(x, norm, w, s, o_n, rows, eps, N, K, BN, BB, BK, NORM, SCALED, OVERLAP)
    if CAP:
        b_y = cap * _tanh(b_y / cap)
    if ADD:
        o_b = tl.arange(0, BB)[None, :]
        keep = (o_n < N)[:, None] & (o_b < rows)
        # Rounded before the sum, as the layers do.
        b_y = b_y.to(y.dtype.element_ty).to(tl.float32)
        b_y += tl.load(y + o_b * N + o_n[:, None], mask=keep, other=0.0).to(tl.float32)
    _store(y, b_y, o_n, rows, N, BB)


@triton.jit
def gated_kernel(
    x, norm, gate, up, s_g, s_u, y, rows, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (N / BN,): y = act(G n) ⊙ (U n)."""
    _begin(OVERLAP)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    if BB == 1:
        b_wg, b_wu = _whole(gate, o_n, N, K, BK), _whole(up, o_n, N, K, BK)
        _wait(OVERLAP)
        b_x, b_r = _input(x, norm, eps, K, BK, NORM)
        b_g = (tl.sum(b_wg.to(tl.float32) * b_x[None, :], 1) * b_r)[:, None]
        b_u = (tl.sum(b_wu.to(tl.float32) * b_x[None, :], 1) * b_r)[:, None]
    else:
        _wait(OVERLAP)
        o_b, o_k = tl.arange(0, BB), tl.arange(0, BK)
        o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        p_x = x + o_b[None, :] * K + o_k[:, None]
        b_g, b_u = tl.zeros((BN, BB), tl.float32), tl.zeros((BN, BB), tl.float32)
        for start in range(0, K, BK):
            keep_k = o_k < K - start
            keep = (o_n < N)[:, None] & keep_k[None, :]
            b_x = tl.load(p_x + start, mask=(o_b < rows)[None, :] & keep_k[:, None], other=0.0)
            b_wg = tl.load(gate + o_w + start, mask=keep, other=0.0, eviction_policy="evict_first")
            b_wu = tl.load(up + o_w + start, mask=keep, other=0.0, eviction_policy="evict_first")
            b_g = _dot(b_wg, b_x, b_g)
            b_u = _dot(b_wu, b_x, b_u)
    b_g, b_u = _scaled(b_g, s_g, o_n, N, SCALED), _scaled(b_u, s_u, o_n, N, SCALED)
    if ACTIVATION == "silu":
        b_g *= sigmoid(b_g)
    else:
        b_g *= 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))
    _store(y, b_g * b_u, o_n, rows, N, BB)


@triton.jit
def mlstm_maps_kernel(
    mixed, late, x, norm, w_q, w_k, w_v, w_o, w_g, s_q, s_k, s_v, s_o, bias, alive, q, k, v, o, gates, rows, eps, cap,
    H: tl.constexpr, NK: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, CAP: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (2 NK / BN + 2 K / BN + 2 H / BN,): rows of q and k out of `mixed`, of v and the gates out of `late`, of o
    out of x."""
    _begin(OVERLAP)
    keys: tl.constexpr = (NK + BN - 1) // BN
    values: tl.constexpr = (K + BN - 1) // BN
    i, o_n = tl.program_id(0), tl.arange(0, BN)
    if i < keys:
        o_n += i * BN
        b_y = _product(mixed, norm, w_q, s_q, o_n, rows, eps, NK, K, BN, BB, BK, NORM, SCALED, OVERLAP)
        _store(q, b_y, o_n, rows, NK, BB)
    elif i < 2 * keys:
        o_n += (i - keys) * BN
        b_y = _product(mixed, norm, w_k, s_k, o_n, rows, eps, NK, K, BN, BB, BK, NORM, SCALED, OVERLAP)
        _store(k, b_y, o_n, rows, NK, BB)
    elif i < 2 * keys + values:
        o_n += (i - 2 * keys) * BN
        b_y = _product(late, norm, w_v, s_v, o_n, rows, eps, K, K, BN, BB, BK, NORM, SCALED, OVERLAP)
        _store(v, b_y, o_n, rows, K, BB)
    elif i < 2 * keys + 2 * values:
        o_n += (i - 2 * keys - values) * BN
        b_y = _product(x, norm, w_o, s_o, o_n, rows, eps, K, K, BN, BB, BK, NORM, SCALED, OVERLAP)
        _store(o, b_y, o_n, rows, K, BB)
    else:
        o_n += (i - 2 * keys - 2 * values) * BN
        b_g = _product(late, norm, w_g, w_g, o_n, rows, eps, 2 * H, K, BN, BB, BK, NORM, False, OVERLAP)
        b_g += tl.load(bias + o_n, mask=o_n < 2 * H, other=0.0).to(tl.float32)[:, None]
        _store(
            gates, _gates(b_g, alive, o_n[:, None], tl.arange(0, BB)[None, :], rows, cap, H, CAP), o_n, rows, 2 * H, BB
        )


@triton.jit
def _gates(b_g, alive, o_n, o_b, rows, cap, H: tl.constexpr, CAP: tl.constexpr):
    """log_i and log_f out of their pre-activations; a row that is not alive lets its memory pass by."""
    if CAP:
        b_g = cap * _tanh(b_g / cap)
    b_lives = tl.load(alive + o_b, mask=o_b < rows, other=0) != 0
    return tl.where(o_n < H, tl.where(b_lives, b_g, float("-inf")), tl.where(b_lives, _log_sigmoid(b_g), 0.0))


@triton.jit
def gates_kernel(pre, alive, gates, rows, cap, H: tl.constexpr, BH: tl.constexpr, CAP: tl.constexpr):
    """Programs (B,): log_i and log_f (B, 2 H) out of their pre-activations."""
    o_b, o_n = tl.program_id(0), tl.arange(0, BH)
    keep = o_n < 2 * H
    b_g = tl.load(pre + o_b * 2 * H + o_n, mask=keep, other=0.0).to(tl.float32)
    tl.store(gates + o_b * 2 * H + o_n, _gates(b_g, alive, o_n, o_b, rows, cap, H, CAP), mask=keep)


@triton.jit
def norm_kernel(x, weight, y, eps, K: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, OVERLAP: tl.constexpr):
    """Programs (B,): y = x / sqrt(mean x² + eps) ⊙ weight, of x less its mean where LAYER."""
    _begin(OVERLAP)
    o_b, o_k = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    keep = o_k < K
    b_w = tl.load(weight + o_k, mask=keep, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    b_x = tl.load(x + o_b * K + o_k, mask=keep, other=0.0).to(tl.float32)
    if LAYER:
        b_x = tl.where(keep, b_x - tl.sum(b_x, 0) / K, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps)
    tl.store(y + o_b * K + o_k, (b_x * b_w).to(y.dtype.element_ty), mask=keep)


@triton.jit
def conv_step_kernel(x, weight, bias, history, alive, y, D, W: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr):
    """Programs (D / BD, B): y = SiLU of the convolution at a token x; its history (B, W-1, D) moves on by one where alive."""
    _begin(OVERLAP)
    o_b, o_d = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD)
    keep = o_d < D
    b_y = tl.load(bias + o_d, mask=keep, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    b_lives = tl.load(alive + o_b) != 0
    b_x = tl.load(x + o_b * D + o_d, mask=keep, other=0.0)
    p_h = history + o_b * (W - 1) * D + o_d
    for j in tl.static_range(W - 1):
        b_h = tl.load(p_h + j * D, mask=keep, other=0.0)
        b_y += b_h.to(tl.float32) * tl.load(weight + o_d * W + j, mask=keep, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(p_h + (j - 1) * D, b_h, mask=keep & b_lives)
    b_y += b_x.to(tl.float32) * tl.load(weight + o_d * W + W - 1, mask=keep, other=0.0).to(tl.float32)
    if W > 1:
        tl.store(p_h + (W - 2) * D, b_x, mask=keep & b_lives)
    # Rounded before the activation, as the layers do.
    b_y = b_y.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + o_b * D + o_d, (b_y * sigmoid(b_y)).to(y.dtype.element_ty), mask=keep)


@triton.jit
def settle_kernel(
    h, weight, o, y, n_new, m_new, n, m, eps, H, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (B·H,): y = LayerNorm(h) ⊙ weight ⊙ sigmoid(o) of a head; its new n and m become the ones that stand."""
    _begin(OVERLAP)
    i_bh = tl.program_id(0).to(tl.int64)
    o_v, o_k = tl.arange(0, BV), tl.arange(0, BK)
    keep, keep_k = o_v < V, o_k < K
    b_w = tl.load(weight + (i_bh % H) * V + o_v, mask=keep, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    tl.store(n + i_bh * K + o_k, tl.load(n_new + i_bh * K + o_k, mask=keep_k), mask=keep_k)
    tl.store(m + i_bh, tl.load(m_new + i_bh))
    b_h = tl.load(h + i_bh * V + o_v, mask=keep, other=0.0).to(tl.float32)
    b_o = tl.load(o + i_bh * V + o_v, mask=keep, other=0.0).to(tl.float32)
    b_x = tl.where(keep, b_h - tl.sum(b_h, 0) / V, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / V + eps)
    tl.store(y + i_bh * V + o_v, (b_x * b_w * sigmoid(b_o)).to(y.dtype.element_ty), mask=keep)


def takes(dtype: torch.dtype, *widths: int) -> bool:
    """Whether the kernels run on inputs of these widths."""
    return dtype in DTYPES and max(widths) <= LARGEST


def _cut(rows: int, count: int, features: int, matrices: int = 1, scaled: bool = False) -> dict:
    """Tiles and warps of a product of `rows` rows with `count` rows of weights of `features` columns, `matrices` at once."""
    width = triton.next_power_of_2(features)
    if rows == 1:
        height = max(1, SINGLE // (width * matrices))
        warps = max(1, min(16, height * width * matrices // (32 * THREAD)))
        return {"BN": height, "BB": 1, "BK": width, "num_warps": warps}
    height = next((h for h in HEIGHTS if count >= PROGRAMS * h), HEIGHTS[-1])
    width = max(16, min(WIDTHS[matrices - 1], width))
    batch = max(16, triton.next_power_of_2(rows))
    # int8 passes through registers on its way into a product.
    warps = 2 * WARPS if scaled else WARPS
    return {"BN": height, "BB": batch, "BK": width, "num_warps": warps, "num_stages": STAGES}


def _launch(kernel, grid, *arguments, **options):
    """A launch on the first tensor's device, behind the kernel before it or over its end."""
    overlap = OVERLAP and len(arguments[0]) == 1 and not backends.INTERPRETED
    if overlap:
        options["launch_pdl"] = True
    with backends.on(arguments[0].device):
        kernel[grid](*arguments, OVERLAP=overlap, **options)


class Norm(NamedTuple):
    """A norm in front of a product: its weight (K,) and eps, and whether it is a LayerNorm, else an RMSNorm."""

    weight: Tensor
    eps: float
    layer: bool = False


def normalise(x: Tensor, norm: Norm, y: Tensor):
    """y (B, K) becomes x (B, K), normalised."""
    width = triton.next_power_of_2(x.shape[-1])
    _launch(
        norm_kernel, (len(x),), x, norm.weight, y, norm.eps,
        K=x.shape[-1], BK=width, LAYER=norm.layer, num_warps=max(1, min(16, width // 512)),
    )  # fmt: skip


def _normed(x, norm, room):
    """(input, norm's weight, eps, whether the product normalises); what a norm of its own gives goes to `room`."""
    if norm is None:
        return x, x, 0.0, False
    if len(x) == 1 and not norm.layer:
        return x, norm.weight, norm.eps, True
    normalise(x, norm, room)
    return room, x, 0.0, False


def linear(
    x: Tensor, w: Tensor, y: Tensor, *, norm=None, cap: float = 0.0, add: bool = False, room: Tensor | None = None
):
    """y (B, N) becomes, or with `add` gains, w (N, K) times x (B, K), or times Norm(x), which wants `room` like x."""
    x, weight, eps, fused = _normed(x, norm, room)
    rows, (count, features) = len(x), w.shape
    if rows > WIDEST:
        product = F.linear(x, w)
        y.copy_(y + product if add else cap * torch.tanh(product.float() / cap) if cap else product)
        return
    w, scale, scaled = int8.rows(w)
    cut = _cut(rows, count, features, 1, scaled)
    _launch(
        map_kernel, (triton.cdiv(count, cut["BN"]),), x, weight, w, scale, y, rows, eps, cap or 1.0,
        N=count, K=features, NORM=fused, CAP=bool(cap), ADD=add, SCALED=scaled, **cut,
    )  # fmt: skip


def gated(x: Tensor, gate: Tensor, up: Tensor, y: Tensor, *, norm, activation: str = "silu", room: Tensor):
    """y (B, N) becomes act(gate n) ⊙ (up n), n the normalised x (B, K)."""
    x, weight, eps, fused = _normed(x, norm, room)
    rows, (count, features) = len(x), gate.shape
    if rows > WIDEST:
        act = F.silu if activation == "silu" else F.gelu
        torch.mul(act(F.linear(x, gate)), F.linear(x, up), out=y)
        return
    (gate, s_g, scaled), (up, s_u, _) = int8.rows(gate), int8.rows(up)
    cut = _cut(rows, count, features, 2, scaled)
    _launch(
        gated_kernel, (triton.cdiv(count, cut["BN"]),), x, weight, gate, up, s_g, s_u, y, rows, eps,
        N=count, K=features, NORM=fused, ACTIVATION=activation, SCALED=scaled, **cut,
    )  # fmt: skip


def mlstm_maps(
    x: Tensor, weights, alive: Tensor, outs, *, cap: float, norm=None, mixed=None, mixed_all=False, room=None
):
    """q, k, v, o and the gates (B, 2 H) of an mLSTM into `outs`, all of x (B, K), or q and k of `mixed` (B, K), and with
    `mixed_all` all but o.

    `weights` are W_q, W_k, W_v, W_o, W_gate and the gates' bias. A norm of x goes without `mixed`, and wants `room`.
    """
    x, weight, eps, fused = _normed(x, norm, room)
    mixed, alive = x if mixed is None else mixed, alive.view(torch.uint8)
    late = mixed if mixed_all else x
    rows, features, keys, heads = len(x), x.shape[-1], len(weights[0]), len(weights[4]) // 2
    if rows > WIDEST:
        for source, w, y in zip((mixed, mixed, late, x), weights, outs, strict=False):
            torch.mm(source, w.t(), out=y) if type(w) in (Tensor, nn.Parameter) else y.copy_(F.linear(source, w))
        pre = torch.addmm(weights[5].float(), late.float(), weights[4].float().t())
        with backends.on(x.device):
            size = triton.next_power_of_2(2 * heads)
            gates_kernel[(rows,)](pre, alive, outs[4], rows, cap or 1.0, H=heads, BH=size, CAP=bool(cap))
        return
    counts = (keys, keys, features, features, 2 * heads)
    held = [int8.rows(w) for w in weights[:4]]
    cut = _cut(rows, sum(counts), features, 1, held[0].scaled)
    programs = sum(triton.cdiv(n, cut["BN"]) for n in counts)
    _launch(
        mlstm_maps_kernel, (programs,), mixed, late, x, weight, *(w.numbers for w in held), weights[4],
        *(w.scale for w in held), weights[5], alive, *outs, rows, eps, cap or 1.0,
        H=heads, NK=keys, K=features, NORM=fused, CAP=bool(cap), SCALED=held[0].scaled, **cut,
    )  # fmt: skip


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, alive: Tensor, y: Tensor):
    """y (B, D) becomes SiLU of the causal convolution at the token x (B, D); `history` (B, W-1, D) moves on where alive."""
    rows, features = x.shape
    _launch(
        conv_step_kernel, (triton.cdiv(features, 256), rows), x, weight, bias, history, alive.view(torch.uint8), y, features,
        W=weight.shape[1], BD=256, num_warps=2,
    )  # fmt: skip


def settle(h: Tensor, weight: Tensor, o: Tensor, y: Tensor, new, old, eps: float):
    """y (B, H·V) becomes the normalised h (B, 1, H, V) under its gate o, and `old` (n, m) becomes `new`."""
    heads, values = h.shape[2:]
    keys = old[0].shape[-1]
    width = triton.next_power_of_2(values)
    _launch(
        settle_kernel, (len(h) * heads,), h, weight, o, y, *new, *old, eps, heads, V=values, K=keys,
        BV=width, BK=triton.next_power_of_2(keys), num_warps=max(1, min(8, width // 128)),
    )  # fmt: skip
