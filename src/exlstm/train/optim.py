"""AdamW (arXiv 1711.05101), or Muon for the matrices; weight decay on matrices only, a rate that depends on the step alone.

lr(s) = lr · (s + 1) / w                                            s < w, the warm-up
lr(s) = lr · (f + (1 - f) · (1 + cos π(s + 1 - w) / (S - w)) / 2)   otherwise, S steps, f the final ratio
"""

from __future__ import annotations

import math

import torch
from torch import nn

from exlstm.train.config import TrainConfig
from exlstm.train.muon import Muon, matrix

_FREE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of update `step` (counted from 0) in a run of `steps`; the last one is exactly final_lr · lr."""
    warm = min(round(config.warmup * steps), steps - 1)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = min(1.0, (step + 1 - warm) / (steps - warm))
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def decayed(model: nn.Module) -> dict[str, bool]:
    """Name of every trainable parameter, in the model's order, and whether weight decay applies to it.

    It applies to parameters of two and more axes, except embeddings, norms, biases (named `b` or `...bias`) and
    those whose module names them in an attribute `no_decay: tuple[str, ...]`.
    """
    free = set()
    for module in model.modules():
        listed = getattr(module, "no_decay", ())
        for name, parameter in module.named_parameters(recurse=False):
            spared = isinstance(module, _FREE) or name in listed
            if spared or parameter.ndim < 2 or name == "b" or name.endswith("bias"):
                free.add(id(parameter))
    return {name: id(p) not in free for name, p in model.named_parameters() if p.requires_grad}


def orthogonal(model: nn.Module) -> dict[str, int | None]:
    """Names of the parameters that Muon moves, and how many of their leading axes count matrices (None: all but two): those that
    decay, whose matrices have at least 16 rows and columns.

    Taps of convolutions and maps to a few gates are narrower; a map to the vocabulary (a module named head or lm_head) is an
    embedding read backwards. A module says in an attribute `matrices: dict[str, int]` which axes are rows of one map.
    """
    wide, shapes = decayed(model), {name: p.shape for name, p in model.named_parameters()}
    axes = {}
    for place, module in model.named_modules():
        axes |= {f"{place}.{name}" if place else name: k for name, k in getattr(module, "matrices", {}).items()}
    heads = {"head", "lm_head"}
    names = [n for n, yes in wide.items() if yes and not heads & set(n.split("."))]
    return {n: axes.get(n) for n in names if min(matrix(shapes[n], axes.get(n))) >= 16}


def recurrent(model: nn.Module) -> set[str]:
    """Names of the recurrent maps: those that a module lists in an attribute `recurrent: tuple[str, ...]`."""
    # Elsewhere a layer may have that name.
    listed = ((place, getattr(module, "recurrent", ())) for place, module in model.named_modules())
    listed = ((place, names) for place, names in listed if isinstance(names, tuple))
    return {f"{place}.{name}" if place else name for place, names in listed for name in names}


class Optimizer:
    """AdamW over a model's trainable parameters, or Muon over its matrices and AdamW over the others: `step(lr)`, and a state
    of flat names for safetensors. A group's `scale` is its learning rate over `lr`."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        named = dict(model.named_parameters())
        rule = decayed(model)
        if not rule:
            raise ValueError(f"{type(model).__name__} has no trainable parameter")
        turned = orthogonal(model) if config.optimizer == "muon" else {}
        # With a rate of their own recurrent maps are groups of their own.
        scales = dict.fromkeys(recurrent(model) if config.recurrent_lr != 1 else (), config.recurrent_lr)
        if config.recurrent_lr != 1 and not scales:
            raise ValueError(f"recurrent_lr is {config.recurrent_lr:g}, and the model has no recurrent maps")
        self.names = [n for n in rule if rule[n]] + [n for n in rule if not rule[n]]
        self.parameters = [named[n] for n in self.names]
        ways = {n: (config.weight_decay if rule[n] else 0.0, scales.get(n, 1.0)) for n in self.names if n not in turned}
        groups = [
            {"params": [named[n] for n in ways if ways[n] == way], "weight_decay": way[0], "scale": way[1]}
            for way in dict.fromkeys(ways.values())
        ]
        # One fused kernel a tensor: 4 times faster than foreach on a CPU (60 matrices of 96 x 96: 0.6 against 2.4 ms).
        fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for p in self.parameters)
        kind = {"fused": True} if fused else {"foreach": True}
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, **kind) if groups else None
        ways = {n: (axes, scales.get(n, 1.0)) for n, axes in turned.items()}
        matrices = [
            {"params": [named[n] for n in ways if ways[n] == way], "axes": way[0], "scale": way[1]}
            for way in dict.fromkeys(ways.values())
        ]
        settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.muon = Muon(matrices, **settings) if matrices else None
        self.both = [optimizer for optimizer in (self.adamw, self.muon) if optimizer is not None]

    def grads(self) -> list[torch.Tensor]:
        """The gradients that stand, in the order of the parameters."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def step(self, lr: float | None = None):
        """One update with learning rate `lr`, or that of the tensor given to `follow`."""
        for optimizer in self.both:
            for group in optimizer.param_groups:
                if lr is not None:
                    group["lr"] = lr * group["scale"]
                elif group["scale"] != 1:
                    group["lr"].copy_(self.rate).mul_(group["scale"])
            optimizer.step()

    def follow(self, rate: torch.Tensor):
        """From now on the learning rate is the number in `rate`, on the parameters' GPU: a CUDA graph can hold a step."""
        self.rate = rate
        for optimizer in self.both:
            for group in optimizer.param_groups:
                own = rate if group["scale"] == 1 else rate.clone()
                group.update(lr=own, **({"capturable": True} if optimizer is self.adamw else {}))

    def zero_grad(self):
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none=True)

    def _entries(self) -> dict[int, dict]:
        """What is kept of every parameter, by its id."""
        return {id(p): entry for optimizer in self.both for p, entry in optimizer.state.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """The moments under flat names, `<parameter>.exp_avg` and so on, in their own dtype."""
        kept = self._entries()
        return {f"{n}.{k}": v for n, p in zip(self.names, self.parameters) for k, v in kept.get(id(p), {}).items()}

    def load(self, state: dict[str, torch.Tensor]):
        """Takes the values of `state()`; a name or shape of another model, or moments of another optimizer, is a ValueError."""
        index = dict(zip(self.names, self.parameters))
        entries: dict[int, dict] = {}
        turned = {id(p) for group in (self.muon.param_groups if self.muon else ()) for p in group["params"]}
        for flat, value in state.items():
            name, _, key = flat.rpartition(".")
            if name not in index:
                raise ValueError(f"the optimizer's state has {flat!r}, a parameter that the model lacks")
            wanted = index[name].shape
            if value.ndim and value.shape != wanted:
                raise ValueError(f"the optimizer's {flat!r} has shape {tuple(value.shape)}, the model {tuple(wanted)}")
            if (key == "momentum_buffer") != (id(index[name]) in turned):
                raise ValueError(f"the optimizer's state has {flat!r}, which is of another optimizer")
            # A copy in memory that torch laid out: a mapped file may be aligned otherwise, and vanish.
            entries.setdefault(id(index[name]), {})[key] = value.clone()
        for optimizer in self.both:
            ordered = [p for group in optimizer.param_groups for p in group["params"]]
            found = {i: entries[id(p)] for i, p in enumerate(ordered) if id(p) in entries}
            optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})

    def clear(self):
        """Forgets the moments, as if no step had been taken."""
        for optimizer in self.both:
            optimizer.state.clear()
