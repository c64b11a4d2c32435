"""slstm(...): the one call for training, prefill and a single step; checks its arguments and picks an implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.slstm.cpu import cpu
from exlstm.ops.slstm.reference import reference
from exlstm.ops.slstm.triton import runs_on, triton


class SLSTMState(NamedTuple):
    """Memory of the sLSTM: h, c, n, m, each (B, H, D), m in log space; float32 or float64. n = 0 is an empty memory."""

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


backends.portable(SLSTMState)


IMPLEMENTATIONS = {"reference": reference, "cpu": cpu, "triton": triton}


def slstm(
    x: Tensor,
    r: Tensor,
    state: SLSTMState | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SLSTMState]:
    """The scalar memory of xLSTM with memory mixing over a sequence (arXiv 2405.04517, equations 8 to 18), any T ≥ 1.

    Args:
        x: pre-activations of the gates without their recurrent part (B, T, H, 4, D), in the order i, f, z, o: biases included,
            all finite.
        r: recurrent weights (H, 4, D out, D in), one block a head and gate.
        state: the memory before the first token; None, or n = 0, is an empty one.
        reset: (B, T) bool, the memory is emptied before token t.
        mask: (B, T) bool, False is padding, whatever stands there: the memory passes by, and the output there is 0.
        backend: name of an implementation, see `exlstm.backend`.

    Returns:
        h (B, T, H, D) in x's dtype, and the memory after the last token, float32 (float64 with float64 inputs).
        Gradients are exact, through h, c and n; m is detached.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, in one sentence.

    >>> h, state = slstm(torch.randn(2, 5, 4, 4, 16), torch.zeros(4, 4, 16, 16))
    """
    _check(x, r, reset, mask)
    auto = "triton" if runs_on(x) else "cpu" if x.device.type in ("cpu", "meta") else "reference"
    implementation = backends.pick(IMPLEMENTATIONS, backend, auto)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], x.shape[2], x.shape[4])
    if state is None:
        memory = [x.new_zeros(shape, dtype=dtype)] * 4
    else:
        backends.check_state(state, dict.fromkeys(SLSTMState._fields, shape), x.device)
        memory = [backends.emptied(backends.cast(s, dtype), reset) for s in state]
    h, *memory = implementation(backends.blanked(x, mask), r, *memory, reset, mask)
    return backends.blanked(h, mask), SLSTMState(*memory)


def _check(x, r, reset, mask):
    backends.check_tensors(x=x, r=r)
    if x.ndim != 5 or x.shape[3] != 4 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (B, T, H, 4, D) with no axis empty")
    heads, width = x.shape[2], x.shape[4]
    if r.shape != (heads, 4, width, width):
        raise ValueError(f"r has shape {tuple(r.shape)}, wanted (H, 4, D, D) = {(heads, 4, width, width)}")
    if not x.dtype.is_floating_point or not r.dtype.is_floating_point:
        raise TypeError(f"x and r are {x.dtype} and {r.dtype}, wanted floating dtypes")
    if r.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"r is {r.dtype} and x {x.dtype}, wanted float64 for both or neither")
    backends.check_companions(x, reset, mask, {"r": r})
