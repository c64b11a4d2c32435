"""Which package a set of weights comes from, and what the maps from its names to ours are made of.

A map is a dict: name of a weight -> function that takes it out of the other side. `take(name, start, stop)` reads rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# What tells a family: a weight of its first block.
SIGNS = {"stack": "blocks.0.xlstm_norm.weight", "large": "backbone.blocks.0.norm_mlstm.weight"}
Take = Callable[..., Tensor]
Map = dict[str, Callable[[Take], Tensor]]


@dataclass(frozen=True)
class Family:
    """What a set of names is: "stack" or "large", what stands in front of its names, and which of its variants it is."""

    kind: str
    root: str
    """in front of every name"""
    is_lm: bool = True
    """with embedding and head"""
    is_fused: bool = False
    """xLSTMLarge with joined maps"""
    embedding: str = ""
    """name of the embedding"""

    def __str__(self):
        if self.kind == "stack":
            return "xLSTMLMModel" if self.is_lm else "xLSTMBlockStack"
        return "xLSTMForCausalLM" if "embeddings" in self.embedding else "xLSTMLarge"


def recognise(names: Iterable[str]) -> Family | None:
    """The family that these names are of, or None."""
    names = set(names)
    for kind, sign in SIGNS.items():
        first = min((name for name in names if f".{name}".endswith(f".{sign}")), default=None)
        if first is None:
            continue
        root = first.removesuffix(sign)
        if kind == "large":
            fused = f"{root}backbone.blocks.0.mlstm_layer.qkv_opreact.weight" in names
            hf = f"{root}backbone.embeddings.weight"
            return Family(kind, root, True, fused, hf if hf in names else f"{root}embedding.weight")
        outer = root.removesuffix("xlstm_block_stack.")
        is_lm = outer != root and f"{outer}token_embedding.weight" in names
        return Family(kind, outer if is_lm else root, is_lm, embedding=f"{outer}token_embedding.weight")
    return None


def depth(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are under `prefix`."""
    found = [re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def rounding(width: int) -> int:
    return 64 if width % 64 == 0 else 1


def agree(given: dict, told: dict):
    """ValueError where the configuration says another thing than the shapes of the weights."""
    for name, value in told.items():
        if given.get(name) is not None and given[name] != value:
            raise ValueError(f"the configuration says {name} {given[name]}, the weights have {value}")


def whole(name: str):
    return lambda take: take(name)


def rows(name: str, start: int, stop: int):
    return lambda take: take(name, start, stop)


def joined(*names: str):
    return lambda take: torch.cat([take(name) for name in names])
