"""One token on a CPU, in NumPy: what the layers' `_token` is made of, since a call of torch costs more than its arithmetic."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.ops.backend import chosen, traced


def is_token(x: Tensor, weight: Tensor, mask, reset, conv, memory, shapes) -> bool:
    """Whether the call is one token on a CPU that nobody differentiates, with a state of tensors of those `shapes` a row, all
    in the dtype of x and of the layer's `weight`: then NumPy may do what stands between the layer's projections, since a call
    of torch costs more than the arithmetic of a token. Whatever else comes takes the way that checks and casts."""
    batch, steps, _ = x.shape
    if steps != 1 or mask is not None or reset is not None or not isinstance(memory, tuple | list):
        return False
    if torch.is_grad_enabled() or traced() or torch.is_autocast_enabled("cpu"):
        return False
    dtype, state = x.dtype, memory if conv is None else (conv, *memory)
    if len(state) != len(shapes) or type(x) is not Tensor or type(weight) is not nn.Parameter:
        return False
    for tensor, shape in zip(state, shapes):
        if type(tensor) is not Tensor or tensor.shape != (batch, *shape) or tensor.dtype != dtype or not tensor.is_cpu:
            return False
    fits = x.is_cpu and weight.dtype == dtype and (dtype == torch.float32 or dtype == torch.float64)
    return fits and chosen(None) in ("auto", "cpu")


# Parts of a layer for one token: functions of arrays, called inside `token_errors`.
token_errors = np.errstate(over="ignore", under="ignore")


def array(x: Tensor):
    """The NumPy array over the memory of a tensor, without its gradient."""
    return x.detach().numpy()


def parameter(module: nn.Module, name: str):
    """The array of a module's parameter; a module's own look-up would take as long as the arithmetic."""
    held = module._parameters.get(name)
    return array(getattr(module, name) if held is None else held)


def project(linear: nn.Module, x):
    """linear(x) for x (B, D): by torch, whose threads NumPy's would fight; a plain one without the detour of a module's call."""
    x, held = torch.from_numpy(x), linear._parameters
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or len(held) != 2:
        return array(linear(x))
    return array(F.linear(x, held["weight"], held["bias"]))


def silu(x):
    """x · sigmoid(x)."""
    y = np.exp(-x)
    y += 1
    return np.divide(x, y, out=y)
