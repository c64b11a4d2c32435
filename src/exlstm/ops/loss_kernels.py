"""The loss of a slice of logits as one Triton kernel that leaves their gradient in their place, and the products beside it.

z = cap tanh(l / cap)      m = max z      s = Σ exp(z - m)      loss = log s - (z[target] - m)
dl = (exp(z - m) / s - onehot(target)) (1 - (z / cap)²) scale

A program walks along a row twice: forward for m and s, then back, so that it meets what the caches still hold, for dl. The
arithmetic is float32. A logit that is no number makes all of its row NaN, as does a target that is no id; an ignored row is
not read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES

# Logits of a row in a program's hands at once, and its warps: eight a thread, 16 to 32 bytes, with as many on their way.
TILE = (2048, 8)
# Exponentials are powers of two.
LOG2E = math.log2(math.e)
# A padded row starts where vectors can be loaded.
ALIGNED = 16
# Of the logits that stand at once. A power of two of tokens is a whole number of the tiles of a product.
BYTES, LEAST_TOKENS = 2**29, 256


@triton.jit
def _bits(b_l, cap, root, CAP: tl.constexpr):
    """z in bits and, where there is a cap, dz/dl / 4: `cap` comes times log2(e), or as log2(e); `root` is 2 log2(e) / cap."""
    b_t, b_slope = b_l, b_l
    if CAP:
        b_u = tl.abs(b_l) * root
        b_half = tl.rsqrt(1.0 + tl.exp2(b_u))
        b_r = b_half * b_half  # (1 - |z| / cap) / 2, for less than a division takes
        b_slope = b_r - b_r * b_r
        # Near 0 the difference 1 - 2r would lose digits; the polynomial, fitted to tanh up to 0.4, errs by 6e-9.
        b_x = b_l * (root * 0.34657359027997264)
        b_s = b_x * b_x
        b_p = -0.333333294 + b_s * (0.13332539 + b_s * (-0.0537162663 + b_s * 0.0192728033))
        b_t = 1.0 - 2.0 * b_r
        b_t = tl.where(b_u < 1.15, b_x + b_x * (b_s * b_p), tl.where(b_l < 0.0, -b_t, b_t))
    return b_t * cap, b_slope


@triton.jit
def _largest_and_sum(p_row, V, stride_l, cap, root, BV: tl.constexpr, CAP: tl.constexpr):
    """m in bits and s of a row, gathered column by column of its tiles, so that the walk waits for nobody."""
    o_v = tl.arange(0, BV)
    b_m, b_s = tl.full((BV,), -3.4028234663852886e38, tl.float32), tl.zeros((BV,), tl.float32)
    b_next = tl.load(p_row + o_v, mask=o_v < stride_l, other=0.0)
    for i_v in range(tl.cdiv(V, BV)):
        o_l = i_v * BV + o_v
        b_z = b_next.to(tl.float32)
        # The next tile is on its way while this one is worked on.
        b_next = tl.load(p_row + o_l + BV, mask=o_l + BV < stride_l, other=0.0)
        b_z, _ = _bits(b_z, cap, root, CAP)
        b_z = tl.where(o_l < V, b_z, -float("inf"))
        b_d = b_z - b_m
        b_e = tl.exp2(-tl.abs(b_d))
        b_s = tl.where(b_d > 0.0, b_s * b_e + 1.0, b_s + b_e)
        b_m = tl.where(b_d > 0.0, b_z, b_m)
    b_largest = tl.max(b_m, 0)
    return b_largest, tl.sum(b_s * tl.exp2(b_m - b_largest), 0)


@triton.jit
def _differentiate(p_row, b_target, b_m, b_scale, b_part, V, stride_l, cap, root, BV: tl.constexpr, CAP: tl.constexpr):
    """dl in the place of l, from the last tile to the first; `b_part` is scale / s."""
    o_v, tiles = tl.arange(0, BV), tl.cdiv(V, BV)
    o_l = (tiles - 1) * BV + o_v
    b_next = tl.load(p_row + o_l, mask=o_l < stride_l, other=0.0)
    for i_v in range(tiles):
        o_l = (tiles - 1 - i_v) * BV + o_v
        b_z = b_next.to(tl.float32)
        b_next = tl.load(p_row + o_l - BV, mask=(o_l >= BV) & (o_l - BV < stride_l), other=0.0)
        b_z, b_slope = _bits(b_z, cap, root, CAP)
        b_d = tl.exp2(b_z - b_m) * b_part
        b_d = tl.where(o_l == b_target, b_d - b_scale, b_d)
        if CAP:
            b_d *= b_slope
        tl.store(p_row + o_l, b_d.to(p_row.dtype.element_ty), mask=o_l < stride_l)


@triton.jit(do_not_specialize=["V", "ignore"])
def cross_entropy_kernel(
    logits, targets, scale, losses, V, stride_l, cap, root, ignore,
    BV: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Programs (n,): the loss of row i_r, and where GRADIENT its logits become their gradient."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row = logits + i_r * stride_l
    b_target = tl.load(targets + i_r)
    if b_target == ignore:
        tl.store(losses + i_r, 0.0)
        if GRADIENT:
            for i_v in range(tl.cdiv(V, BV)):
                o_l = i_v * BV + tl.arange(0, BV)
                tl.store(p_row + o_l, tl.zeros((BV,), tl.float32).to(logits.dtype.element_ty), mask=o_l < stride_l)
    else:
        known = (b_target >= 0) & (b_target < V)
        b_z = tl.load(p_row + b_target, mask=known, other=float("nan")).to(tl.float32)
        b_z, _ = _bits(b_z, cap, root, CAP)
        b_m, b_s = _largest_and_sum(p_row, V, stride_l, cap, root, BV, CAP)
        b_m = tl.where(known, b_m, float("nan"))
        tl.store(losses + i_r, tl.log(b_s) - (b_z - b_m) * 0.6931471805599453)
        if GRADIENT:
            b_scale = tl.load(scale + i_r) * (4.0 if CAP else 1.0)
            _differentiate(p_row, b_target.to(tl.int32), b_m, b_scale, b_scale / b_s, V, stride_l, cap, root, BV, CAP)


def takes(products: torch.dtype) -> bool:
    """Whether the kernel runs on logits of this dtype."""
    return products in DTYPES


def tokens(vocabulary: int, products: torch.dtype) -> int:
    """Tokens of a slice."""
    return max(1 << (BYTES // (vocabulary * products.itemsize)).bit_length() >> 1, LEAST_TOKENS)


def slices(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None,
    cap: float, ignore: int, size: int, products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (N,), and where `scale` (N,) is given the gradients dx (N, D) and dW (V, D) of their sum so weighted."""
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if scale is not None:
        dx, dweight = torch.empty_like(x), torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    size = size or tokens(weight.shape[0], products)
    head, targets = weight.to(products), targets.contiguous()
    # On a CPU, where the interpreter runs, products in 16 bits read one number behind an odd row and multiply it by 0.
    new = head.new_empty if head.is_cuda else head.new_zeros
    logits = new(min(size, x.shape[0]), triton.cdiv(weight.shape[0], ALIGNED) * ALIGNED)
    for start in range(0, x.shape[0], size):
        part = slice(start, start + size)
        rows = x[part].to(products)  # (n, D)
        z = logits[: rows.shape[0], : weight.shape[0]]  # (n, V)
        torch.mm(rows, head.t(), out=z)
        _row_by_row(z, targets[part], None if scale is None else scale[part], losses[part], cap, ignore)
        if scale is not None:
            _product(dx[part], z, head, add=False)
            _product(dweight, z.t(), rows, add=start > 0)
    return losses, dx, dweight.to(weight.dtype)


def _row_by_row(z, targets, scale, losses, cap, ignore):
    """Losses of the rows of z, whose gradient takes the place of z where there is a scale."""
    width = min(TILE[0], triton.next_power_of_2(z.shape[1]))
    warps = max(1, TILE[1] * width // TILE[0])
    with backends.on(z.device):
        cross_entropy_kernel[(z.shape[0],)](
            z, targets, losses if scale is None else scale, losses, z.shape[1], z.stride(0),
            LOG2E * (cap or 1.0), LOG2E * 2 / cap if cap else 0.0, ignore,
            BV=width, CAP=cap != 0, GRADIENT=scale is not None, num_warps=warps,
        )  # fmt: skip


def _product(out, a, b, add):
    """a b into out, or onto it: float32 if out is, also where a and b are not, without a copy of the product."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        # Operators of torch that only a GPU has.
        wide = {"out_dtype": torch.float32, "out": out}
        torch.addmm(out, a, b, **wide) if add else torch.mm(a, b, **wide)
    else:
        # Triton's interpreter, and models whose activations are narrower than the products.
        wide = torch.promote_types(a.dtype, out.dtype)
        product = a.to(wide) @ b.to(wide)
        out.add_(product) if add else out.copy_(product)
