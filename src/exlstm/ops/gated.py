"""The product between the two halves of a gated feed-forward, y = act(g) ⊙ u (arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from exlstm.ops import backend as backends

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def gated(g: Tensor, u: Tensor, activation: str = "silu") -> Tensor:
    """act(g) · u, (..., D) each; where kernels run, only g and u are kept for the backward, and each is moved once.

    Args:
        g, u: (..., D), the gate before its activation and what it gates.
        activation: "silu" or "gelu" (the exact one, of the error function).

    >>> gated(torch.randn(2, 5, 8), torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if backends.kernels(g):
        from exlstm.ops import gated_kernels

        if gated_kernels.takes(g, u):
            return gated_kernels.gated(g, u, activation)
    return ACTIVATIONS[activation](g) * u
