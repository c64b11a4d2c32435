"""`rotate` as a Triton kernel: x is moved once, and back by the opposite angles: nothing is saved but cos and sin.

y₁ = x₁ cos - x₂ sin      y₂ = x₁ sin + x₂ cos
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, rows_apart

# Numbers of half a tile, and warps of a program.
TILE, WARPS = 1024, 4
# Half a head at most.
LARGEST = 1024


@triton.jit(do_not_specialize=["rows", "T"])
def rotary_kernel(
    x, cos, sin, y, rows, T, H, stride_b, stride_t, stride_h, stride_p,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Programs (rows / BR · H,): BR tokens of head i_h; D is half its width, stride_p 0 where all rows have the same turns."""
    i_r, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_r, o_d = (i_r * BR + tl.arange(0, BR)).to(tl.int64)[:, None], tl.arange(0, BD)[None, :]
    keep = (o_r < rows) & (o_d < D)
    o_b, o_t = o_r // T, o_r % T
    p_x, o_p = x + o_b * stride_b + o_t * stride_t + i_h * stride_h + o_d, o_b * stride_p + o_t * D + o_d
    b_1, b_2 = tl.load(p_x, mask=keep, other=0.0).to(tl.float32), tl.load(p_x + D, mask=keep, other=0.0).to(tl.float32)
    b_c, b_s = tl.load(cos + o_p, mask=keep, other=0.0), tl.load(sin + o_p, mask=keep, other=0.0)
    if BACK:
        b_s = -b_s
    p_y = y + (o_r * H + i_h) * (2 * D) + o_d
    tl.store(p_y, (b_1 * b_c - b_2 * b_s).to(y.dtype.element_ty), mask=keep)
    tl.store(p_y + D, (b_1 * b_s + b_2 * b_c).to(y.dtype.element_ty), mask=keep)


def takes(x: Tensor, cos: Tensor) -> bool:
    """Whether the kernel runs on these arguments of `rotate`."""
    return x.dtype in DTYPES and cos.dtype == torch.float32 and cos.shape[-1] <= LARGEST and x.numel() > 0


def rotate(x, cos, sin):
    """`exlstm.ops.rotary.rotate` on a GPU."""
    # Without gradients an operator of torch would cost more than the kernel.
    known = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (_rotate if known else _turned)(x, cos, sin, False)


def _turned(x, cos, sin, back):
    x, half = rows_apart(x), cos.shape[-1]
    batch, time, heads, _ = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = max(1, TILE // triton.next_power_of_2(half))
    with backends.on(x.device):
        rotary_kernel[(triton.cdiv(batch * time, tile) * heads,)](
            x, cos.contiguous(), sin.contiguous(), y, batch * time, time, heads, *x.stride()[:3],
            time * half if len(cos) > 1 else 0,
            D=half, BR=tile, BD=triton.next_power_of_2(half), BACK=back, num_warps=WARPS,
        )  # fmt: skip
    return y


@torch.library.custom_op("exlstm::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return _turned(x, cos, sin, back)


@_rotate.register_fake
def _(x, cos, sin, back):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dy):
    # A rotation is linear: its backward is the rotation back, and may be differentiated again.
    return _rotate(dy, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_differentiate, setup_context=_setup_context)
