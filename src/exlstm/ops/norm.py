"""Norms in one pass over each tensor where kernels run: behind a memory, with the gate behind them; and in front of a layer.

y = (LayerNorm_head(h) ⊙ weight + skip ⊙ c) ⊙ act(gate), statistics in float32; the skip and the gate may be absent.
n = RMSNorm or LayerNorm(x + y) ⊙ weight + bias
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from exlstm.ops import backend as backends

ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


def head_norm(
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float,
    activation: str = "sigmoid",
    skip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LayerNorm of every head by itself, times the gate: h (..., H, V) -> (..., H·V).

    Args:
        h: what the heads give (..., H, V).
        weight: (H·V,).
        gate: (..., H·V), before its activation; None for none.
        eps: added to the variance.
        activation: of the gate, "sigmoid" or "silu".
        skip: (weight (H·V,), c (..., H·V)), whose product is added before the gate.

    Returns:
        y in h's dtype, or in the wider one of the gate and c.

    >>> head_norm(torch.randn(2, 5, 4, 8), torch.ones(32), torch.randn(2, 5, 32), eps=1e-6).shape
    torch.Size([2, 5, 32])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if backends.kernels(h):
        from exlstm.ops import norm_kernels

        if norm_kernels.takes(h, gate, skip):
            return norm_kernels.head_norm(h, weight, gate, *(skip or (None, None)), eps, activation)
    wide = h if h.dtype == torch.float64 else backends.cast(h, torch.float32)
    # PyTorch's LayerNorm takes twice as long on a CPU where it is given no weight.
    y = F.layer_norm(wide, h.shape[-1:], wide.new_ones(h.shape[-1]), eps=eps).flatten(-2)  # (..., H·V)
    y = backends.cast(y * weight, h.dtype)
    y = y if skip is None else y + skip[0] * skip[1]
    return y if gate is None else y * ACTIVATIONS[activation](gate)


def row_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, centre: bool, y: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """RMSNorm, or LayerNorm where `centre`, of x + y, and x + y itself, where kernels run; None where they do not.

    Args:
        x: (..., D), the residual stream.
        weight, bias: (D,).
        eps: added to the mean square.
        centre: subtract the mean.
        y: (..., D), what is added to x in front of the norm; None for nothing.

    Returns:
        The norm in the dtype that its readers want, autocast's where there is one, else that of x + y; and x + y in the
        wider dtype of the two. Statistics in float32.
    """
    if not backends.kernels(x):
        return None
    from exlstm.ops import row_kernels

    if not row_kernels.takes(x, weight, y):
        return None
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    if backends.autocasts(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
    n, total = row_kernels.row_norm(x, y, weight, bias, eps, centre, dtype)
    return n, x if y is None else total
