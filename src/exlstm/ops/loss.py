"""Linear head, soft cap and cross-entropy in one, a slice of tokens at a time, so that the logits never stand whole.

l = W x      z = cap · tanh(l / cap)      loss = logsumexp(z) - z[target]
dl = (softmax(z) - onehot(target)) · (1 - (z / cap)²)      dx = Wᵀ dl      dW = Σ dl xᵀ
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from exlstm.ops import backend as backends

# Logits of a slice: on a CPU about what its cache holds, but never fewer tokens than keep the products at full speed.
CPU_LOGITS, ACCELERATOR_LOGITS, LEAST_TOKENS = 2**20, 2**27, 256
TWICE = "linear_cross_entropy has no second derivative: its gradients can be taken once only"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cap: float = 0.0,
    ignore: int = -100,
    reduction: str = "mean",
    slice: int | None = None,
) -> Tensor:
    """Cross-entropy of the targets under softmax(cap · tanh(x Wᵀ / cap)), in nats.

    Args:
        x: (B, T, D) or (N, D).
        weight: (V, D), the head; it may be the embedding.
        targets: (B, T) or (N,) whole numbers below V, or `ignore`.
        cap: soft cap of the logits in nats; 0 leaves it out.
        ignore: the target of tokens that do not count.
        reduction: "mean" over the tokens that count, 0 if none does, or "none": every loss, 0 at ignored tokens.
        slice: tokens worked on at once; chosen by itself where None.

    Returns:
        float32: a scalar, or the shape of `targets`. Under autocast the products run in its dtype, all else in float32.
        "mean" computes its gradients in the forward pass, "none" in the backward pass with the logits a second time.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; on a CPU also a target that is no id.

    >>> loss = linear_cross_entropy(torch.randn(2, 5, 8), torch.randn(256, 8), torch.randint(256, (2, 5)), cap=30.0)
    """
    _check(x, weight, targets, ignore, reduction, slice)
    products = torch.promote_types(x.dtype, weight.dtype)
    if backends.autocasts(x.device):
        products = torch.get_autocast_dtype(x.device.type)
    settings = (float(cap), ignore, slice or 0, products)
    flat, ids = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    if backends.transformed():
        return _plain(flat, weight, ids, *settings, reduction).view(targets.shape if reduction == "none" else ())
    if reduction == "none":
        return _tokens(flat, weight, ids, *settings).view(targets.shape)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total, _, _ = _total(flat, weight, ids, *settings, gradients)
    return total / (ids != ignore).sum().clamp(min=1)


def _plain(x, weight, targets, cap, ignore, slice, products, reduction):
    """The same with all logits at once, in operations that torch.func transforms."""
    with backends.exact(x.device):
        z = F.linear(x.to(products), weight.to(products)).to(_wide(products))
        z = cap * torch.tanh(z / cap) if cap else z
        losses = F.cross_entropy(z, targets, ignore_index=ignore, reduction="none")
    return losses if reduction == "none" else losses.sum() / (targets != ignore).sum().clamp(min=1)


# One opaque operator each, so that a compiler keeps the slices.
@torch.library.custom_op("exlstm::cross_entropy_total", mutates_args=())
def _total(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float,
    ignore: int,
    slice: int,
    products: torch.dtype,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and, if asked for, its gradients dx (N, D) and dW (V, D)."""
    scale = torch.ones(x.shape[0], device=x.device) if gradients else None
    losses, dx, dweight = _slices(x, weight, targets, scale, cap, ignore, slice, products)
    return losses.sum(), dx, dweight


@_total.register_fake
def _(x, weight, targets, cap, ignore, slice, products, gradients):
    shapes = (x.shape, weight.shape) if gradients else ((0,), (0,))
    return x.new_empty((), dtype=_wide(products)), x.new_empty(shapes[0]), weight.new_empty(shapes[1])


def _keep_total(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _total_backward(ctx, dtotal, ddx, ddweight):
    if ddx is not None or ddweight is not None:
        raise RuntimeError(TWICE)
    dx, dweight = ctx.saved_tensors
    if dtotal is None:
        return (None,) * 8
    return (dx * dtotal).to(dx.dtype), (dweight * dtotal).to(dweight.dtype), *(None,) * 6


_total.register_autograd(_total_backward, setup_context=_keep_total)


@torch.library.custom_op("exlstm::cross_entropy_tokens", mutates_args=())
def _tokens(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore: int, slice: int, products: torch.dtype
) -> Tensor:
    """Every token's loss (N,)."""
    return _slices(x, weight, targets, None, cap, ignore, slice, products)[0]


@_tokens.register_fake
def _(x, weight, targets, cap, ignore, slice, products):
    return x.new_empty(x.shape[0], dtype=_wide(products))


def _keep_tokens(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _tokens_backward(ctx, dlosses):
    return *_gradients(*ctx.saved_tensors, dlosses.contiguous(), *ctx.settings), *(None,) * 5


_tokens.register_autograd(_tokens_backward, setup_context=_keep_tokens)


@torch.library.custom_op("exlstm::cross_entropy_gradients", mutates_args=())
def _gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dlosses: Tensor,
    cap: float,
    ignore: int,
    slice: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dx (N, D) and dW (V, D) of the losses weighted by `dlosses` (N,)."""
    return _slices(x, weight, targets, dlosses, cap, ignore, slice, products)[1:]


@_gradients.register_fake
def _(x, weight, targets, dlosses, cap, ignore, slice, products):
    return torch.empty_like(x), torch.empty_like(weight)


def _refuse(ctx, *_):
    raise RuntimeError(TWICE)


_gradients.register_autograd(_refuse)


def _wide(products):
    return torch.float64 if products == torch.float64 else torch.float32


def _slices(x, weight, targets, scale, cap, ignore, size, products):
    """Losses (N,), and where `scale` (N,) is given the gradients dx (N, D) and dW (V, D) of their sum so weighted.

    `size` is the tokens of a slice, 0 for what suits the device.
    """
    if backends.kernels(x):
        from exlstm.ops import loss_kernels

        if loss_kernels.takes(products):
            with backends.exact(x.device):
                return loss_kernels.slices(x, weight, targets, scale, cap, ignore, size, products)
    size = size or max((CPU_LOGITS if x.device.type == "cpu" else ACCELERATOR_LOGITS) // weight.shape[0], LEAST_TOKENS)
    wide = _wide(products)
    losses = x.new_empty(x.shape[0], dtype=wide)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if scale is not None:
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        head = weight.to(products)
        for start in range(0, x.shape[0], size):
            part = slice(start, start + size)
            tokens, target = x[part].to(products), targets[part, None]  # (n, D), (n, 1)
            ignored = target == ignore
            target = target.masked_fill(ignored, 0)
            z = (tokens @ head.t()).to(wide)  # (n, V)
            if cap:
                capped = z.div_(cap).tanh_()
                z = capped * cap
            z = torch.log_softmax(z, -1)
            losses[part] = (-z.gather(1, target)).masked_fill(ignored, 0).squeeze(1)
            if scale is None:
                continue
            dz = z.exp_()
            dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            dz.mul_(scale[part, None].masked_fill(ignored, 0))
            if cap:
                dz.mul_(capped.square_().neg_().add_(1))
            dz = dz.to(products)
            dx[part] = dz @ head
            if products == wide:
                dweight.addmm_(dz.t(), tokens)
            else:
                dweight += dz.t() @ tokens
    return losses, dx, dweight.to(weight.dtype)


def _check(x, weight, targets, ignore, reduction, slice):
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (B, T, D) or (N, D) with no axis empty")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted (V, D) with D = {x.shape[-1]} as x has")
    if not x.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise TypeError(f"x and weight are {x.dtype} and {weight.dtype}, wanted floating dtypes")
    if targets.shape != x.shape[:-1] or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}, wanted ids of {tuple(x.shape[:-1])}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}, wanted 'mean' or 'none'")
    if slice is not None and slice < 1:
        raise ValueError(f"slice is {slice}, wanted at least 1 token")
    if targets.device.type == "cpu" and not backends.traced():
        # Read on a CPU only: an accelerator would have to wait for the answer.
        wrong = targets[(targets != ignore) & ((targets < 0) | (targets >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(
                f"target {wrong[0].item()} is no id of a vocabulary of {weight.shape[0]} (ignored: {ignore})"
            )
