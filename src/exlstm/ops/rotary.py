"""Rotary positions (arXiv 2104.09864): the first half of a head is turned against the second by angles of the position."""

import torch
from torch import Tensor

from exlstm.ops import backend as backends


def turns(positions: Tensor, d_head: int, base: float, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin (..., D / 2) of pos · base^(-2i / D) for positions (...)."""
    half = d_head // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    angles = positions[..., None].to(dtype) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, D) turned by cos and sin (B or 1, T, D / 2); where kernels run, x is read once and nothing of it is kept.

    >>> rotate(torch.randn(2, 5, 4, 8), turns(torch.arange(5)[None], 8, 10000.0)).shape
    torch.Size([2, 5, 4, 8])
    """
    cos, sin = turn
    if backends.kernels(x):
        from exlstm.ops import rotary_kernels

        if rotary_kernels.takes(x, cos):
            return rotary_kernels.rotate(x, cos, sin)
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
