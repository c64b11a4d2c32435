"""A layer for one token, or few, without gradients: NumPy arrays, since a call of torch costs more than their arithmetic."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exlstm.ops.backend import chosen, distributed, unseen

# Numbers in a tensor up to which NumPy is the faster one, and multiplications in a product: beyond these it would call threads
# of its own, which torch's would fight.
SMALL, SMALL_PRODUCT = 1 << 13, 1 << 18


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or has given it a forward of their own, as libraries do that bring its
    weights from elsewhere: then it has to be called, whatever else gives the same numbers."""
    forward = module._forward_hooks or module._forward_pre_hooks
    if forward or module._backward_hooks or module._backward_pre_hooks:
        return True
    # The wrapper of torch.compile has one, too, and stands for what it wraps.
    return "forward" in module.__dict__ and "_orig_mod" not in module._modules


def as_built(module: nn.Module) -> bool:
    """Whether NumPy's way through a module, its `_token` or `decode`, belongs to its forward: to a class that inherits it another
    forward may belong, or other gates, and so to a method that was put in the place of its own."""
    own = vars(type(module))
    return ("_token" in own or "decode" in own or type(module) is nn.Linear) and METHODS.isdisjoint(vars(module))


# What a layer's forward asks of itself, and `_token` does not.
METHODS = frozenset(("gates", "pre_activations", "heads", "maps"))


def is_token(x: Tensor, weight: Tensor, mask, reset, conv, memory, layer, *, skipped=()) -> bool:
    """Whether the call is one token on a CPU that nobody differentiates, with a state of tensors of the `shapes` of the layer a
    row, all in the dtype of x and of the layer's `weight`: then NumPy may do what stands between the layer's projections, since
    a call of torch costs more than the arithmetic of a token. Whatever else comes takes the way that checks and casts, as does a
    layer that is not as it was built, or to whose modules `skipped`, which this way never calls, somebody listens."""
    (batch, steps, _), shapes = x.shape, layer.shapes
    if steps != 1 or mask is not None or reset is not None or not isinstance(memory, tuple | list):
        return False
    dtype, state = x.dtype, memory if conv is None else (conv, *memory)
    if len(state) != len(shapes) or not _bare_arrays(x, weight):
        return False
    for tensor, shape in zip(state, shapes):
        if type(tensor) is not Tensor or tensor.shape != (batch, *shape) or tensor.dtype != dtype or not tensor.is_cpu:
            return False
    if chosen(None) not in ("auto", "cpu") or not as_built(layer):
        return False
    return all(part is None or (as_built(part) and not hooked(part)) for part in skipped)


def is_light(x: Tensor, weight: Tensor) -> bool:
    """Whether x is so small that NumPy is the faster one, on a CPU where nobody differentiates, in the dtype of `weight`."""
    return _bare_arrays(x, weight) and x.numel() <= SMALL


def _bare_arrays(x, weight):
    """Whether x and a layer's weight may be worked on as arrays."""
    if not unseen() or distributed() or torch.is_autocast_enabled("cpu"):
        return False
    plain = type(x) is Tensor and type(weight) is nn.Parameter and x.is_cpu and weight.is_cpu
    return plain and weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)


# Parts of a layer for one token: functions of arrays, called inside `token_errors`.
token_errors = np.errstate(over="ignore", under="ignore", invalid="ignore")


def array(x: Tensor):
    """The NumPy array over the memory of a tensor, without its gradient."""
    return x.numpy(force=True)


def parameter(module: nn.Module, name: str):
    """The array of a module's parameter; a module's own look-up would take as long as the arithmetic."""
    held = module._parameters.get(name)
    return array(getattr(module, name) if held is None else held)


def project(linear: nn.Module, x):
    """linear(x) for x (B, D); a plain one without the detour of a module's call, and a small one by NumPy, on one core."""
    held = linear._parameters
    if type(linear) is not nn.Linear or hooked(linear) or len(held) != 2:
        return array(linear(torch.from_numpy(x)))
    weight, bias = held["weight"], held["bias"]
    if type(weight) is not nn.Parameter or len(x) * weight.numel() > SMALL_PRODUCT:
        return array(F.linear(torch.from_numpy(x), weight, bias))
    y = np.matmul(x, array(weight).T)
    if bias is not None:
        y += array(bias)
    return y


def silu(x):
    """x · sigmoid(x)."""
    y = np.exp(-x)
    y += 1
    return np.divide(x, y, out=y)
