"""Causal depthwise convolution over time with carried state, resets and padding, and the activation behind it.

y_t = bias + sum over j < W of weight[:, W-1-j] · x_{t-j}, x_{t-j} the j-th valid token before t in its document, or 0.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exlstm.ops import backend as backends

ACTIVATIONS = {"silu": F.silu}


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each channel's own convolution over its last W tokens, any T ≥ 1.

    Args:
        x: inputs (B, T, D), any strides.
        weight: (D, W); the last column belongs to the token itself. Sums run in float32 or float64.
        bias: (D,), or None.
        state: the W-1 inputs before the first token (B, W-1, D), oldest first; None is zeros, a fresh start.
        reset: (B, T) bool, everything before token t is forgotten.
        mask: (B, T) bool, False is padding: left out, so that the valid tokens around it are neighbours; y is 0 there.
        activation: "silu", of y, or None.

    Returns:
        y (B, T, D) and the state after the last token (B, W-1, D), both in x's dtype; gradients flow through both.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, in one sentence.

    >>> y, state = causal_conv(torch.randn(2, 5, 8), torch.randn(8, 4))
    >>> y, state = causal_conv(torch.randn(2, 1, 8), torch.randn(8, 4), state=state)
    """
    _check(x, weight, bias, state, reset, mask, activation)
    time, past = x.shape[1], weight.shape[1] - 1
    history = x.new_zeros(x.shape[0], past, x.shape[2]) if state is None else state.to(x.dtype)
    history = history if state is None else backends.emptied(history, reset)
    if time == 1:
        return _step(x, weight, bias, history, mask, activation)
    # Tokens are of one document where they have as many resets behind them; the state belongs to document 0.
    document = None if reset is None else reset.cumsum(1)  # (B, T)
    last = None if reset is None else document[:, -1:]
    if mask is not None:
        # Valid tokens first, in their order: so neighbours stand side by side, and causality hides the padding.
        order = (~mask).byte().argsort(dim=1, stable=True)  # (B, T)
        x = _take(x.masked_fill(~mask[..., None], 0), order)
        document = None if document is None else document.gather(1, order)
    first = None
    if document is not None:
        document = F.pad(document, (past, 0))  # (B, W-1+T)
        first = F.pad(document[:, 1:] != document[:, :-1], (1, 0))
    y = _sequence(x, weight, bias, None if state is None else history, history, first, activation)
    if mask is None:
        # The last W-1 of history and x, without a copy of all, in a form that a graph of open length can hold.
        state = torch.cat([history, x[:, -past:]], 1)[:, -past:] if past else history
        document = None if document is None else document[:, time:]
    else:
        y = _take(y, (mask.cumsum(1) - 1).clamp(min=0)).masked_fill(~mask[..., None], 0)
        end = mask.sum(1, keepdim=True) + torch.arange(past, device=x.device)  # (B, W-1)
        state, document = _take(torch.cat([history, x], 1), end), None if document is None else document.gather(1, end)
    if document is not None:
        state = state.masked_fill((document != last)[..., None], 0)
    return y, state


def _sequence(x, weight, bias, state, history, first, activation):
    """y (B, T, D) of the tokens and their history, zeros where `state` is None; `first` as in `_convolve`."""
    kernels = _kernels(x, weight)
    if kernels is not None:
        first = None if first is None else first[:, weight.shape[1] - 1 :]
        return kernels.causal_conv(x, weight, bias, state, first, activation is not None)
    # A compiler fuses the sums and their gradient by itself.
    convolve = _convolve if backends.traced() else _Convolution.apply
    return _activate(convolve(torch.cat([history, x], 1), weight, bias, first), activation)


def _kernels(x, weight):
    """The module of kernels where they run on these tensors, else None."""
    if not backends.kernels(x):
        return None
    from exlstm.ops import conv_kernels

    return conv_kernels if conv_kernels.takes(x, weight) else None


def _activate(y, activation):
    return y if activation is None else ACTIVATIONS[activation](y)


def _take(x, index):
    """x (B, T, D) at the times `index` (B, N)."""
    batch, time, width = x.shape
    rows = index + time * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(-1, width).index_select(0, rows.flatten()).view(batch, -1, width)


def _step(x, weight, bias, history, mask, activation):
    """One token: the same sums without the machinery of a sequence."""
    joined = torch.cat([history, x], 1)  # (B, W, D)
    kernels = _kernels(x, weight)
    if kernels is not None:
        y = kernels.causal_conv(x, weight, bias, history, None, activation is not None)
    else:
        dtype = _wide(x, weight)
        y = (backends.cast(joined, dtype) * backends.cast(weight, dtype).t()).sum(1, keepdim=True)
        if bias is not None:
            y = y + backends.cast(bias, dtype)
        y = _activate(backends.cast(y, x.dtype), activation)
    state = joined[:, 1:]
    if mask is not None:
        y, state = y.masked_fill(~mask[..., None], 0), torch.where(mask[..., None], state, history)
    return y, state


def decode(x, weight, bias, history):
    """One token of arrays in one dtype, without gradients: x (B, D), history (B, W-1, D) -> y (B, D), the next history."""
    joined = np.concatenate((history, x[:, None]), 1)  # (B, W, D)
    y = np.add.reduce(joined * weight.T, 1)
    y += bias
    return y, joined[:, 1:]


def _wide(x, weight):
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _convolve(joined, weight, bias, first):
    """y (B, T, D) of the inputs with their history (B, W-1+T, D), one multiply-add a kernel column, oldest first.

    Where a column's token is the first of its document, `first` (B, W-1+T), what older columns gave is dropped.
    """
    dtype, columns = _wide(joined, weight), weight.shape[1]
    taps, time = weight.to(dtype).t().contiguous(), joined.shape[1] - columns + 1  # (W, D)
    y = joined[:, :time].to(dtype) * taps[0]
    for j in range(1, columns):
        if first is not None:
            y = _drop(y, first[:, j : j + time])
        y = y.addcmul_(joined[:, j : j + time].to(dtype), taps[j])
    if bias is not None:
        y = y.add_(bias.to(dtype))
    return y.to(joined.dtype)


class _Convolution(torch.autograd.Function):
    """`_convolve` with its gradient by hand.

    Forward and backward at (16, 256, 384), W 4, float32, one CPU core, torch 2.13: 9 ms; by autograd 25, conv1d 26 ms.
    """

    @staticmethod
    def forward(ctx, joined, weight, bias, first):
        ctx.save_for_backward(joined, weight, bias, first)
        return _convolve(joined, weight, bias, first)

    @staticmethod
    def backward(ctx, dy):
        joined, weight, bias, first = ctx.saved_tensors
        dtype, columns, time = _wide(joined, weight), weight.shape[1], dy.shape[1]
        taps, dy = weight.to(dtype).t().contiguous(), dy.to(dtype)
        dbias = None if bias is None else dy.sum((0, 1)).to(bias.dtype)
        # Of dy's kind, which may stand for many gradients at once: nothing in place then but what is so too.
        dx, dweight, apart = dy.new_zeros(joined.shape), [], torch.is_grad_enabled() or backends.batched(dy)
        if first is not None:
            dy = dy.clone(memory_format=torch.contiguous_format)  # `_drop` may write on it
        product = None if apart else torch.empty_like(dy, memory_format=torch.contiguous_format)
        for j in reversed(range(columns)):
            x = joined[:, j : j + time]
            dx[:, j : j + time].addcmul_(dy, taps[j])
            product = dy * x if apart else torch.mul(dy, x, out=product)
            dweight.append(product.sum((0, 1)) if apart else product.flatten(0, 1).sum(0))
            if first is not None:
                dy = _drop(dy, first[:, j : j + time])
        return dx.to(joined.dtype), torch.stack(dweight[::-1], -1).to(weight.dtype), dbias, None


def _drop(y, where):
    """y (B, T, D), perhaps overwritten, with 0 at the tokens `where` (B, T)."""
    if y.device.type != "cpu" or backends.traced() or torch.is_grad_enabled() or backends.batched(y):
        return y.masked_fill(where[..., None], 0)
    # Resets are rare: to write their rows costs nothing beside a pass over all.
    return y.view(-1, y.shape[-1]).index_fill_(0, where.flatten().nonzero().squeeze(1), 0).view(y.shape)


def _check(x, weight, bias, state, reset, mask, activation):
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (B, T, D) with no axis empty")
    batch, _, width = x.shape
    if weight.ndim != 2 or weight.shape[0] != width or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted (D, W) with D = {width} as x has")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, wanted (D,) = ({width},)")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} is {tensor.dtype}, wanted a floating dtype")
    if state is not None:
        backends.check_state((state,), {"conv": (batch, weight.shape[1] - 1, width)}, x.device)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}, None")
    others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    backends.check_companions(x, reset, mask, others)
