"""Muon: a matrix moves along its momentum with all singular values made equal.

Newton-Schulz after K. Jordan et al. (2024, kellerjordan.github.io/posts/muon), the size of an update and weight decay after
arXiv 2502.16982: the root mean square of an update is about .2, as AdamW's, so that both take one learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# p(s) = a s + b s³ + c s⁵, five times over, brings singular values between .0005 and 1 to between .7 and 1.2.
A, B, C, TURNS = 3.4445, -4.7750, 2.0315, 5
# Matrices of one shape are worked on together, as many as have this many numbers.
TOGETHER = 2**27


def orthogonalised(x: Tensor) -> Tensor:
    """U Vᵀ of x = U S Vᵀ, its singular values between .7 and 1.2; x (..., n, m) of any float dtype, n ≤ m is cheaper."""
    shape = x.shape
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).reshape(-1, *shape[-2:])
    for _ in range(TURNS):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=B, alpha=C), x, beta=A)
    return x.reshape(shape)


class Muon(torch.optim.Optimizer):
    """Muon over parameters of two and more axes; the last two are a matrix, the others count matrices.

    In a group with `axes` so many leading axes count matrices, and all between them and the last are rows of one.
    `lr` may be a tensor of one number on the parameters' device: a step can then be recorded as a CUDA graph. It computes in
    bfloat16 on a GPU, where such products are quickest, in the parameters' dtype on a CPU.
    """

    def __init__(self, params, lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "axes": None})

    def add_param_group(self, param_group: dict):
        """Adds a group with settings of its own. ValueError: a parameter of less than two axes, or settings out of range."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        told = [f"Muon moves matrices, a parameter has shape {tuple(p.shape)}" for p in group["params"] if p.ndim < 2]
        for name, below in (("lr", math.inf), ("momentum", 1), ("weight_decay", math.inf)):
            if not isinstance(group[name], Tensor) and not 0 <= group[name] < below:
                told.append(f"{name} is {group[name]}, wanted a number from 0 to below {below}")
        if told:
            self.param_groups.pop()
            raise ValueError(told[0])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _alike(group["params"], group["axes"]):
                self._move(parameters, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict):
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in parameters], [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = _ahead(grads, momenta, group["momentum"])
        n, m = matrix(parameters[0].shape, group["axes"])
        stacked = torch.cat([g.reshape(-1, n, m) for g in ahead])
        stacked = stacked.bfloat16() if stacked.is_cuda else stacked
        moved = orthogonalised(stacked.mT if n > m else stacked).to(parameters[0].dtype)
        moved = (moved.mT if n > m else moved) * (-0.2 * max(n, m) ** 0.5 * group["lr"])
        moved = moved.split([g.numel() // (n * m) for g in ahead])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, [_laid_as(p, u.reshape(p.shape)) for u, p in zip(moved, parameters)])


def _ahead(grads: list[Tensor], momenta: list[Tensor], momentum: float) -> list[Tensor]:
    """Where momentum leads; whole again if processes hold a part of each (FSDP): a matrix is turned as a whole."""
    if not hasattr(grads[0], "full_tensor"):
        return torch._foreach_lerp(grads, momenta, momentum)
    # Of tensors in parts older versions of PyTorch know this sum in place alone.
    parts = [g.clone() for g in grads]
    torch._foreach_lerp_(parts, momenta, momentum)
    return [p.full_tensor() for p in parts]


def _laid_as(parameter: Tensor, x: Tensor) -> Tensor:
    """x, which every process has whole, in the parts that the parameter is in."""
    if not hasattr(parameter, "full_tensor"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=parameter.placements
    )


def matrix(shape: tuple[int, ...], axes: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a parameter's matrices, which `axes` leading axes count; None: all but the last two."""
    return math.prod(shape[len(shape) - 2 if axes is None else axes : -1]), shape[-1]


def _alike(parameters: list[Tensor], axes: int | None) -> Iterator[list[Tensor]]:
    """Those that have a gradient, by the shape of their matrices, in portions of at most TOGETHER numbers."""
    groups = {}
    for p in parameters:
        if p.grad is not None:
            groups.setdefault((matrix(p.shape, axes), p.dtype, p.device), []).append(p)
    for group in groups.values():
        portion, numbers = [], 0
        for p in group:
            if portion and numbers + p.numel() > TOGETHER:
                yield portion
                portion, numbers = [], 0
            portion.append(p)
            numbers += p.numel()
        yield portion
