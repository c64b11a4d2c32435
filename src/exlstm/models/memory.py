"""What an xLSTM shaped like nn.LSTM continues from: (h, c), and what scripts do with such a pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from exlstm.ops.backend import portable


class xLSTMMemory(NamedTuple):
    """What an xLSTM continues from, in the place of nn.LSTM's c_n: a state of every layer and direction, rows first.

    It takes what scripts do with c_n: `detach`, `data`, `clone`, `contiguous`, `to`, `cpu`, `cuda`, `index_select(1, rows)`,
    `c[:, rows]`, `repeat(1, n, 1)`, `repeat_interleave(n, 1)`, and `c * keep` with ones and zeros, which empties the memory of
    the rows that are multiplied by 0. It is tensors in tuples down to the last, () where there is none, so that a script may
    also walk through it and detach each.
    """

    layers: tuple
    emptied: Tensor | tuple = ()
    """(B,) bool: rows that are emptied before the next token; (): no row"""

    @classmethod
    def of(cls, states) -> xLSTMMemory:
        """The memory of a state, or None, of every layer and direction."""
        return cls(_stored(tuple(states)))

    def states(self) -> list:
        """A state, or None, of every layer and direction."""
        return [_told(layer) for layer in self.layers]

    @property
    def fresh(self) -> Tensor | None:
        """(B,) bool: rows that are emptied before the next token; None: no row."""
        return self.emptied if isinstance(self.emptied, Tensor) else None

    @property
    def rows(self) -> int:
        """How many rows it remembers."""
        return len(_first(self))

    @property
    def device(self) -> torch.device:
        return _first(self).device

    def detach(self) -> xLSTMMemory:
        return tree_map_only(Tensor, Tensor.detach, self)

    @property
    def data(self) -> xLSTMMemory:
        """As `detach`."""
        return self.detach()

    def clone(self) -> xLSTMMemory:
        return tree_map_only(Tensor, torch.clone, self)

    def contiguous(self) -> xLSTMMemory:
        return tree_map_only(Tensor, Tensor.contiguous, self)

    def cpu(self) -> xLSTMMemory:
        return self.to("cpu")

    def cuda(self, device=None) -> xLSTMMemory:
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def to(self, device=None, dtype=None, non_blocking: bool = False) -> xLSTMMemory:
        """On another device or in another floating dtype, never below float32: memories are kept in that or in float64."""
        device, dtype = (None, device) if isinstance(device, torch.dtype) else (device, dtype)
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)

        def move(t):
            return t.to(device=device, dtype=wide if t.is_floating_point() else None, non_blocking=non_blocking)

        return tree_map_only(Tensor, move, self)

    def index(self, rows) -> xLSTMMemory:
        """The memory of these rows: an index tensor, a list, a bool mask, a slice or one number."""
        rows = [rows] if isinstance(rows, int) else rows
        return tree_map_only(Tensor, lambda t: t[rows], self)

    def index_select(self, dim: int, index: Tensor) -> xLSTMMemory:
        if dim not in (1, -2):
            raise ValueError(f"dim is {dim}, wanted 1: rows are the only axis of a memory that can be chosen from")
        return self.index(index)

    def repeat(self, *times) -> xLSTMMemory:
        """All rows `n` times over, of times (1, n, 1)."""
        times = tuple(times[0]) if len(times) == 1 and isinstance(times[0], tuple | list) else times
        if len(times) != 3 or (times[0], times[2]) != (1, 1):
            raise ValueError(f"c.repeat{times} asks for more than rows, wanted c.repeat(1, n, 1)")
        return tree_map_only(Tensor, lambda t: t.repeat(times[1], *[1] * (t.ndim - 1)), self)

    def repeat_interleave(self, repeats, dim: int | None = None) -> xLSTMMemory:
        """Every row `repeats` times, one behind the other, as beams begin."""
        if dim not in (1, -2):
            raise ValueError(f"dim is {dim}, wanted 1: rows are the only axis of a memory that can be repeated")
        return tree_map_only(Tensor, lambda t: t.repeat_interleave(repeats, 0), self)

    def __getattr__(self, name: str):
        raise AttributeError(
            f"c is the memory of an xLSTM and no tensor, so it has no {name!r}; it can be detached, moved, repeated, multiplied "
            "by ones and zeros, and asked for rows as c[:, rows]"
        )

    def __setitem__(self, key, value):
        raise TypeError("c is a memory that is not written into; to empty rows take c * keep with ones and zeros")

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return tuple.__getitem__(self, key)
        if len(key) not in (2, 3) or any(part not in (slice(None), ...) for part in (key[0], *key[2:])):
            raise IndexError(f"c{list(key)} asks for more than rows, wanted c[:, rows]")
        return self.index(key[1])

    def __mul__(self, keep) -> xLSTMMemory:
        """With (1, B, 1), or any shape of B numbers, or one number: 1 keeps a row, 0 empties it."""
        rows, keep = self.rows, torch.as_tensor(keep)
        if keep.numel() not in (1, rows) or not ((keep == 0) | (keep == 1)).all():
            raise ValueError(
                f"a memory of {rows} rows is multiplied by {tuple(keep.shape)} numbers, wanted {rows} ones and zeros"
            )
        emptied = (keep.reshape(-1) == 0).to(self.device).expand(rows)
        return self._replace(emptied=emptied if self.fresh is None else self.fresh | emptied)

    __rmul__ = __mul__


def _stored(state):
    """A state with () in the place of None."""
    if state is None or isinstance(state, Tensor):
        return () if state is None else state
    inner = map(_stored, state)
    return type(state)(*inner) if hasattr(state, "_fields") else tuple(inner)


def _told(state):
    """The inverse of `_stored`."""
    if isinstance(state, Tensor):
        return state
    inner = [_told(part) for part in state]
    return None if not inner else type(state)(*inner) if hasattr(state, "_fields") else tuple(inner)


def _first(memory: xLSTMMemory) -> Tensor:
    return next(leaf for leaf in tree_leaves(memory.layers) if isinstance(leaf, Tensor))


class xLSTMState(NamedTuple):
    """(h, c) as nn.LSTM returns it: h (layers · directions, B, H_out), the last output of each, and the memory c.

    The next call goes on from c; h tells what came last, and stays that where a row has no further token.
    """

    h: Tensor
    c: xLSTMMemory

    def detach(self) -> xLSTMState:
        """The same without its past, for truncated backpropagation through time."""
        return xLSTMState(self.h.detach(), self.c.detach())

    def to(self, device=None, dtype=None) -> xLSTMState:
        device, dtype = (None, device) if isinstance(device, torch.dtype) else (device, dtype)
        return xLSTMState(self.h.to(device=device, dtype=dtype), self.c.to(device, dtype))

    def index(self, batch) -> xLSTMState:
        """The state of these rows of the batch: an index tensor, a list, a bool mask, a slice or one number."""
        if self.h.ndim != 3:
            raise ValueError(f"h has shape {tuple(self.h.shape)}, a state without a batch to choose from")
        return xLSTMState(self.h[:, [batch] if isinstance(batch, int) else batch], self.c.index(batch))


portable(xLSTMMemory, xLSTMState)
