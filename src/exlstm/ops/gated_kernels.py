"""`gated` as Triton kernels: each tensor is moved once forward and once backward, and nothing is saved but g and u.

y = a(g) u      dg = dy u a'(g)      du = dy a(g)
silu: a = g σ(g), a' = σ(g) (1 + g (1 - σ(g)))      gelu: a = g Φ(g), a' = Φ(g) + g φ(g), the normal distribution
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, room, sigmoid

# Numbers of a program forward and backward, 8 warps each.
FORWARD, BACKWARD, WARPS = 4096, 2048, 8


@triton.jit
def _activate(b_g, SILU: tl.constexpr):
    """a(g) and a'(g)."""
    if SILU:
        b_s = sigmoid(b_g)
        return b_g * b_s, b_s * (1 + b_g * (1 - b_s))
    b_c = 0.5 + 0.5 * tl.erf(b_g * 0.7071067811865476)
    return b_g * b_c, b_c + b_g * 0.3989422804014327 * tl.exp2(b_g * b_g * -0.7213475204444817)


@triton.jit
def gated_forward_kernel(g, u, y, size, BN: tl.constexpr, SILU: tl.constexpr):
    """Programs (size / BN,), over `size` numbers without gaps."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    keep = o_n < size
    b_a, _ = _activate(tl.load(g + o_n, mask=keep, other=0.0).to(tl.float32), SILU)
    b_a *= tl.load(u + o_n, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + o_n, b_a.to(y.dtype.element_ty), mask=keep)


@triton.jit
def gated_backward_kernel(dy, g, u, dg, du, size, BN: tl.constexpr, SILU: tl.constexpr):
    """Programs (size / BN,), over `size` numbers without gaps."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    keep = o_n < size
    b_dy = tl.load(dy + o_n, mask=keep, other=0.0).to(tl.float32)
    b_a, b_da = _activate(tl.load(g + o_n, mask=keep, other=0.0).to(tl.float32), SILU)
    b_dg = b_dy * tl.load(u + o_n, mask=keep, other=0.0).to(tl.float32) * b_da
    tl.store(dg + o_n, b_dg.to(dg.dtype.element_ty), mask=keep)
    tl.store(du + o_n, (b_dy * b_a).to(du.dtype.element_ty), mask=keep)


def takes(g: Tensor, u: Tensor) -> bool:
    """Whether the kernels run on these arguments of `gated`."""
    return g.dtype in DTYPES and u.dtype in DTYPES and g.shape == u.shape and g.numel() > 0


def gated(g, u, activation):
    """`exlstm.ops.gated.gated` on a GPU."""
    # Without gradients an operator of torch would cost more than the kernel.
    known = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (_gated if known else _forward)(g, u, activation)


def _forward(g, u, activation):
    y = torch.empty(g.shape, dtype=torch.promote_types(g.dtype, u.dtype), device=g.device)
    with backends.on(g.device):
        gated_forward_kernel[(triton.cdiv(g.numel(), FORWARD),)](
            g.contiguous(), u.contiguous(), y, g.numel(), BN=FORWARD, SILU=activation == "silu", num_warps=WARPS
        )
    return y


@torch.library.custom_op("exlstm::gated", mutates_args=())
def _gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return _forward(g, u, activation)


@torch.library.custom_op("exlstm::gated_backward", mutates_args=())
def _backward(dy: Tensor, g: Tensor, u: Tensor, activation: str) -> list[Tensor]:
    """Gradients of g and u."""
    found = room(g, u)
    tensors = (x.contiguous() for x in (dy, g, u))
    with backends.on(g.device):
        gated_backward_kernel[(triton.cdiv(g.numel(), BACKWARD),)](
            *tensors, *found, g.numel(), BN=BACKWARD, SILU=activation == "silu", num_warps=WARPS
        )
    return found


@_gated.register_fake
def _(g, u, activation):
    return torch.empty(g.shape, dtype=torch.promote_types(g.dtype, u.dtype), device=g.device)


@_backward.register_fake
def _(dy, g, u, activation):
    return room(g, u)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    return *_backward(dy, *ctx.saved_tensors, ctx.activation), None


def _no_double_backward(ctx, *_):
    raise RuntimeError("gated has no second derivative on a GPU")


_gated.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
