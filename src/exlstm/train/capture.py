"""Batches on their way to a model, and a loss with its gradients out of a CUDA graph, whose steps wait for no launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

# Runs before a recording, in which kernels are compiled and libraries take their workspaces.
WARM = 2


def mapped(call: Callable, batch: Any):
    """The batch, a tensor or any nesting of tensors, with `call` of every tensor."""
    if isinstance(batch, torch.Tensor):
        return call(batch)
    if isinstance(batch, dict):
        return {k: mapped(call, v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        made = [mapped(call, v) for v in batch]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)
    return batch


def tokens(batch) -> int:
    """Rows times positions of the first tensor."""
    return next((t.shape[:2].numel() for t in tensors(batch) if t.shape[:2].numel()), 0)


def tensors(batch) -> list[torch.Tensor]:
    """Every tensor of a batch, in order."""
    found = []
    mapped(found.append, batch)
    return found


class Captured:
    """`loss(batch)` and its gradients, recorded once for every form of a batch and then replayed.

    Calling it gives the loss, detached, and every parameter its gradient, in the place of the one it had. `loss` must not wait
    for the GPU, must give a scalar, and must do the same for every batch of one form; what it reads beside the batch has to stay
    where it is (parameters do, as long as nobody replaces them). Autocast around the call holds as it did when it was recorded.

    >>> step = Captured(model.loss, model.parameters())  # doctest: +SKIP
    >>> loss = step(batch)  # doctest: +SKIP
    """

    def __init__(self, loss: Callable, parameters):
        self.loss, self.parameters = loss, [p for p in parameters if p.requires_grad]
        if not self.parameters or not self.parameters[0].is_cuda:
            where = self.parameters[0].device if self.parameters else "nowhere"
            raise ValueError(f"a CUDA graph wants parameters on an NVIDIA GPU, they are on {where}")
        self.recorded = {}

    def __call__(self, batch):
        given = tensors(batch)
        form = tuple((t.shape, t.dtype) for t in given)
        if form not in self.recorded:
            self.recorded[form] = self._record(batch)
        graph, held, loss, gradients = self.recorded[form]
        for old, new in zip(held, given, strict=True):
            old.copy_(new, non_blocking=True)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    def _record(self, batch):
        device = self.parameters[0].device
        held = mapped(lambda t: t.to(device, copy=True), batch)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._run(held)
        torch.cuda.current_stream(device).wait_stream(side)
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        # Nothing that a collection sets free may call the driver while the graph is recorded.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = self._run(held)
        finally:
            if collects:
                gc.enable()
        gradients = [p.grad for p in self.parameters]
        return graph, tensors(held), loss, gradients

    def _run(self, batch):
        for parameter in self.parameters:
            parameter.grad = None
        # Weights that autocast has cast elsewhere would be read by every replay, and never cast again.
        torch.clear_autocast_cache()
        loss = self.loss(batch)
        if loss.ndim:
            raise ValueError(f"the loss has shape {tuple(loss.shape)}, wanted a scalar")
        # Autocast is for the forward: in the backward it would round what the forward kept in float32.
        with torch.autocast(self.parameters[0].device.type, enabled=False):
            loss.backward()
        torch.clear_autocast_cache()
        return loss.detach()
