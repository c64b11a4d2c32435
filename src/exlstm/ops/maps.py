"""Linear maps that read one x, together where kernels run: their gradients meet in one dx while it is multiplied.

y_j = W_j x      p = W x + b in float32      dx = Σ_j W_jᵀ dy_j + Wᵀ dp      dW_j = dy_j xᵀ
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlstm.ops import backend as backends


def maps(
    x: Tensor, weights: list[Tensor], wide: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...] | None:
    """W x for every one of `weights`, and in front of them, where `wide` is given, wide x + bias in float32.

    Args:
        x: (..., D).
        weights: (D', D) each, in the dtype of x or to be cast under autocast.
        wide: (N, D), N at most 128; the product is exact in float32 whatever x's dtype, bias (N,) with it.

    Returns:
        (..., D') each, as F.linear would, or None where kernels do not run, where a compiler sees to it, where nobody
        differentiates, or where dtypes do not fit.
    """
    if not backends.kernels(x) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # One cast for all, where x does not come in the right dtype already.
        x, weights = backends.cast(x, dtype), [backends.cast(w, dtype) for w in weights]
    if any(w.dtype != x.dtype for w in weights) or (wide is not None and not _fits(x, wide)):
        return None
    return _Maps.apply(x, wide, bias, *weights)


def _fits(x, wide):
    """Whether `wide` can be a part of the maps."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and wide.shape[0] <= 128 and x.numel() > 0


class _Maps(torch.autograd.Function):
    """(wide x + bias if there is a wide, W_1 x, W_2 x, ...) of x (..., D), all W_j in x's dtype."""

    @staticmethod
    def forward(ctx, x, wide, bias, *weights):
        ctx.save_for_backward(x, wide, *weights)
        with backends.exact(x.device):
            ys = [F.linear(x, w) for w in weights]
            return tuple(ys) if wide is None else (_wide(x, wide, bias), *ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, wide, *weights = ctx.saved_tensors
        flat, wanted = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dwide = dbias = None
        if wide is not None:
            dp, *dys = dys
            dbias = dp.sum(0) if wanted[2] else None
            # Here as exact as every other gradient in x's dtype.
            dp = backends.cast(dp, x.dtype)
            dwide = (dp.t() @ flat).to(wide.dtype) if wanted[1] else None
            dys, weights = [*dys, dp], [*weights, backends.cast(wide, x.dtype)]
        dx = None
        if wanted[0]:
            dx = dys[0] @ weights[0]
            for dy, w in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, w)
            dx = dx.view(x.shape)
        dweights = (dy.t() @ flat if needed else None for dy, needed in zip(dys, wanted[3:]))
        return dx, dwide, dbias, *dweights


def _wide(x, weight, bias):
    """x Wᵀ + b in float32."""
    weight, bias = backends.cast(weight, torch.float32), backends.cast(bias, torch.float32)
    if x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    from exlstm.ops import maps_kernels

    return maps_kernels.wide(x, weight, bias)
