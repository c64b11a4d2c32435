"""What the Triton kernels of this room share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)) in five instructions: a division would take as many again. 0 where exp(-x) is infinite."""
    b_root = tl.rsqrt(1.0 + tl.exp2(b_x * -1.4426950408889634))
    return b_root * b_root


def rows_apart(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def room(*inputs: Tensor | None) -> list[Tensor]:
    """A contiguous tensor to be written for the gradient of every input, an empty one for None."""
    first = inputs[0]
    return [first.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
