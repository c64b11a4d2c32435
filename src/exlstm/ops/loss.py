"""Linear head, soft cap and cross-entropy in one, a slice of tokens at a time, so that the logits never stand whole.

l = W x      z = cap · tanh(l / cap)      loss = logsumexp(z) - z[target]
dl = (softmax(z) - onehot(target)) · (1 - (z / cap)²)      dx = Wᵀ dl      dW = Σ dl xᵀ
"""

import torch
from torch import Tensor

# Logits of a slice on a CPU: small enough to stay in its cache, many enough tokens for the products to run at full speed.
CPU_LOGITS, CPU_TOKENS = 2**18, 256
ACCELERATOR_LOGITS = 2**27


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
        reduction: "mean" over the tokens that count (0 where there are none), or "none": every token's loss, 0 at ignored ones.
        slice: tokens worked on at once; chosen by itself where None.

    Returns:
        float32: a scalar, or the shape of `targets`. Under autocast the products run in its dtype, all else in float32.
        "mean" computes its gradients in the forward pass; "none" computes the logits a second time in the backward pass.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; on a CPU also a target that is no id.

    >>> loss = linear_cross_entropy(torch.randn(2, 5, 8), torch.randn(256, 8), torch.randint(256, (2, 5)), cap=30.0)
    """
    _check(x, weight, targets, ignore, reduction)
    device = x.device.type
    products = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        products = torch.get_autocast_dtype(device)
    if slice is None:
        limit = max(CPU_LOGITS // weight.shape[0], CPU_TOKENS) if device == "cpu" else ACCELERATOR_LOGITS // weight.shape[0]
        slice = max(limit, 1)
    settings = (float(cap), ignore, slice, products)
    flat, ids = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    if reduction == "none":
        return _tokens(flat, weight, ids, *settings).view(targets.shape)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total, _, _ = _total(flat, weight, ids, *settings, gradients)
    return total / (ids != ignore).sum().clamp(min=1)


def _slices(x, weight, targets, scale, cap, ignore, size, products):
    """Losses (N,), and where `scale` (N,) is given also the gradients dx (N, D) and dW (V, D) of their sum weighted by it."""
    wide = torch.float64 if products == torch.float64 else torch.float32
    losses = x.new_empty(x.shape[0], dtype=wide)
    dx, dweight = (None, None) if scale is None else (torch.empty_like(x), torch.zeros_like(weight, dtype=wide))
    with torch.autocast(x.device.type, enabled=False):
        head = weight.to(products)
        for part in range(0, x.shape[0], size):
            part = slice(part, part + size)
            tokens, target = x[part].to(products), targets[part, None]
            valid = target != ignore  # (n, 1)
            target = target.masked_fill(~valid, 0)
            z = (tokens @ head.t()).to(wide)  # (n, V)
            if cap:
                capped = z.div_(cap).tanh_()
                z = capped * cap
            z = torch.log_softmax(z, -1)
            losses[part] = -z.gather(1, target).masked_fill(~valid, 0).squeeze(1)
            if scale is None:
                continue
            dz = z.exp_()
            dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            dz.mul_(scale[part, None] * valid)
            if cap:
                dz.addcmul_(dz * capped, capped, value=-1)
            dz = dz.to(products)
            dx[part] = dz @ head
            if products == wide:
                dweight.addmm_(dz.t(), tokens)
            else:
                dweight += dz.t() @ tokens
    return losses, dx, dweight
