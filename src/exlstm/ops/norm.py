"""The norm behind a memory and the gate behind the norm, in one pass over each tensor where kernels run.

y = (LayerNorm_head(h) ⊙ weight + skip ⊙ c) ⊙ act(gate), statistics in float32; the skip and the gate may be absent.
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
