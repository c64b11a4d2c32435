"""The state of our blocks as a transformers Cache: of one size whatever has been read, and exact under beam search."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# Later versions of transformers call the argument `cache`, earlier ones `past_key_values`.
CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


class BlockState(CacheLayerMixin):
    """The state of one block and how many tokens it has seen."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.state, self.seen = None, 0

    def set(self, state, count: int):
        self.state, self.seen, self.is_initialized = state, self.seen + count, True

    def _each(self, change):
        self.state = tree_map_only(Tensor, change, self.state)

    def reorder_cache(self, beam_idx: Tensor):
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor):
        self._each(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int):
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self):
        self.state, self.seen, self.is_initialized = None, 0, False

    def crop(self, max_length: int):
        if max_length < 0 or max_length < self.seen:
            raise ValueError(f"a recurrent state of {self.seen} tokens cannot go back to {max_length}")

    def offload(self):
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self):
        """Nothing to be done: a block moves its state to its inputs."""

    def get_seq_length(self, *_) -> int:
        return self.seen

    def get_max_cache_shape(self) -> int:
        return -1

    get_max_length = get_max_cache_shape

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + count, 0

    def lazy_initialization(self, *_):
        raise NotImplementedError("a recurrent block keeps no keys and values")

    def update(self, *_, **__):
        raise NotImplementedError("a recurrent block keeps no keys and values")


class ExlstmCache(Cache):
    """One BlockState a block; what `generate` makes for itself, and what `use_cache=True` returns.

    A cache that has been read on to is changed in place, as those of transformers are; `copy.deepcopy` keeps it.
    """

    def __init__(self, n_layers: int):
        super().__init__(layers=[BlockState() for _ in range(n_layers)])

    def states(self):
        """The state that our stack takes: a tuple with one entry a block, or None before the first token."""
        return tuple(layer.state for layer in self.layers) if self.layers[0].is_initialized else None

    def set(self, states, count: int):
        """The states after `count` further tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.set(state, count)
