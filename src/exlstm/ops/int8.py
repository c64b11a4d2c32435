"""Weights that torchao holds in int8, as kernels read them: W = scale ⊙ numbers, a scale a row."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """What a kernel reads of a weight (N, K)."""

    numbers: Tensor
    """(N, K): the weight itself, or int8"""
    scale: Tensor
    """(N, 1), or the weight again where it has no scale"""
    scaled: bool


def rows(weight: Tensor) -> Rows | None:
    """A weight as a kernel reads it, or None where it is neither a plain tensor nor int8 with a scale a row."""
    if type(weight) in (Tensor, nn.Parameter):
        return Rows(weight, weight, False)
    numbers, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if type(numbers) is not Tensor or type(scale) is not Tensor or numbers.dtype != torch.int8 or numbers.ndim != 2:
        return None
    others = [getattr(weight, name, None) for name in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")]
    by_rows = scale.numel() == len(numbers) and scale.is_contiguous() and numbers.is_contiguous()
    return Rows(numbers, scale, True) if by_rows and all(other is None for other in others) else None
