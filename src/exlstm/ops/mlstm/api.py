"""mlstm(...): the one call for training, prefill and a single step; checks its arguments and picks an implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.mlstm.cpu import cpu
from exlstm.ops.mlstm.reference import reference
from exlstm.ops.mlstm.triton import runs_on, triton


class MLSTMState(NamedTuple):
    """Memory of the mLSTM: c (B, H, K, V), n (B, H, K), m (B, H), the last in log space; float32 or float64.

    c and n are stabilised: the memory itself is exp(m)·c and exp(m)·n, and it holds k unscaled.
    """

    c: Tensor
    n: Tensor
    m: Tensor


backends.portable(MLSTMState)


# A forget gate as good as shut, in nats: -inf would make NaN of a prefix sum, and numbers far below leave it no digits.
SHUT = -1e5

IMPLEMENTATIONS = {"reference": reference, "cpu": cpu, "triton": triton}


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: MLSTMState | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MLSTMState]:
    """The matrix memory of xLSTM over a sequence (arXiv 2405.04517, equations 19 to 27), any T ≥ 1.

    Args:
        q, k: queries and keys (B, T, H, K), any strides with a contiguous last axis.
        v: values (B, T, H, V), of q's dtype.
        log_i, log_f: input and forget gates (B, T, H) in log space, in nats, finite, or -inf for a gate of 0: an exponential
            gate is the pre-activation itself, a sigmoid gate the logsigmoid of it. Computed in float32, or in float64 with
            float64 inputs.
        state: the memory before the first token; None is an empty one.
        reset: (B, T) bool, the memory is emptied before token t.
        mask: (B, T) bool, False is padding, whatever stands there: the memory passes by, and the output there is 0.
        scale: factor on q, K**-0.5 where None.
        normalize: divide by max(|q·n|, exp(-m)); False gives gated linear attention, RetNet and Mamba-2, unstabilised
            (outputs saturate where the memory exceeds e^60).
        eps: added to the stabilised denominator; only foreign checkpoints want it.
        chunk: tokens worked on at once by chunkwise implementations, chosen by itself where None. Does not change the result.
        backend: name of an implementation, see `exlstm.backend`.

    Returns:
        h (B, T, H, V) in v's dtype, and the memory after the last token. Gradients are exact, through h, c and n; m is detached.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, in one sentence.

    >>> q = k = v = torch.randn(2, 5, 4, 16)
    >>> h, state = mlstm(q, k, v, torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))
    >>> h, state = mlstm(q, k, v, torch.zeros(2, 5, 4), torch.zeros(2, 5, 4), state)
    """
    _check(q, k, v, log_i, log_f, reset, mask, chunk)
    # Plain PyTorch in chunks runs anywhere, and is the fastest there is where the kernels do not run.
    implementation = backends.pick(IMPLEMENTATIONS, backend, "triton" if runs_on(q) else "cpu")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    c, n, m = _memory(state, q, v, dtype)
    if state is not None and q.shape[1] > 1:
        # A single step reads nothing of what it forgets.
        c, n, m = (backends.emptied(x, reset) for x in (c, n, m))
    log_i, log_f = backends.cast(log_i, dtype), backends.cast(log_f, dtype).clamp(min=SHUT)
    if mask is not None:
        q, k, v = (backends.blanked(x, mask) for x in (q, k, v))
        log_i = log_i.masked_fill(~mask[..., None], float("-inf"))
        log_f = log_f.masked_fill(~mask[..., None], 0.0)
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale is a tensor that wants a gradient, and a number has none; multiply q by it")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    h, *memory = implementation(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, float(eps), chunk)
    return backends.blanked(h, mask), MLSTMState(*memory)


def _memory(state, q, v, dtype):
    batch, heads, keys, values = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    shapes = {"c": (batch, heads, keys, values), "n": (batch, heads, keys), "m": (batch, heads)}
    if state is None:
        return [q.new_zeros(shape, dtype=dtype) for shape in shapes.values()]
    backends.check_state(state, shapes, q.device)
    return [backends.cast(s, dtype) for s in state]


def _check(q, k, v, log_i, log_f, reset, mask, chunk):
    backends.check_tensors(q=q, k=k, v=v, log_i=log_i, log_f=log_f)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted (B, T, H, features) with no axis empty")
    if q.shape != k.shape:
        if q.shape[:3] == k.shape[:3]:
            raise ValueError(f"k has {k.shape[-1]} features a head, q has {q.shape[-1]}")
        raise ValueError(f"k has shape {tuple(k.shape)}, wanted q's {tuple(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has (B, T, H) = {tuple(v.shape[:3])}, q has {tuple(q.shape[:3])}")
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, wanted one floating dtype")
    for name, gate in (("log_i", log_i), ("log_f", log_f)):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} has shape {tuple(gate.shape)}, wanted (B, T, H) = {tuple(q.shape[:3])}")
        if not gate.dtype.is_floating_point:
            raise TypeError(f"{name} is {gate.dtype}, wanted a floating dtype")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk is {chunk!r}, wanted a whole number of at least 1 token")
    backends.check_companions(q, reset, mask, {"k": k, "v": v, "log_i": log_i, "log_f": log_f})
