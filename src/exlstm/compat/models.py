"""Their three models on ours. `load_state_dict` takes their weights, in any of their layouts, as well as ours."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from exlstm.compat.config import (
    large_config,
    stack_config,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from exlstm.compat.layers import to_ours, to_theirs
from exlstm.models import names
from exlstm.models.checkpoint import load_checkpoint
from exlstm.models.language import LanguageModel
from exlstm.models.stack import Stack
from exlstm.ops.mlstm import MLSTMState
from exlstm.train.optim import decayed


def _read(stack: Stack, x, state: dict | None, is_step: bool):
    """Their dict of states {"block_i": {...}} as ours, one entry a block; `x` tells batch, dtype and device."""
    if state is None and not is_step:
        return None
    state = state or {}
    unknown = state.keys() - {f"block_{i}" for i in range(len(stack.blocks))}
    if unknown:
        raise ValueError(f"state has {min(unknown)}, and the stack has {len(stack.blocks)} blocks from block_0 on")
    return tuple(to_ours(block.mixer, x, state.get(f"block_{i}"), is_step) for i, block in enumerate(stack.blocks))


def _tell(states) -> dict:
    return {f"block_{i}": to_theirs(state) for i, state in enumerate(states)}


def _load(module: nn.Module, inner: nn.Module, weights: Mapping, strict: bool, assign: bool):
    """Their weights into our module, or ours into the whole."""
    if names.recognise(weights) is None:
        return nn.Module.load_state_dict(module, weights, strict=strict, assign=assign)
    ours = load_checkpoint(weights, module.config).state_dict()
    return inner.load_state_dict(ours, strict=strict, assign=assign)


class xLSTMBlockStack(nn.Module):
    """Their stack of mLSTM and sLSTM blocks: y of x (B, T, D), any T.

    >>> stack = xLSTMBlockStack(xLSTMBlockStackConfig(slstm_block=sLSTMBlockConfig(), num_blocks=2))  # doctest: +SKIP
    >>> y, state = stack(x, return_last_state=True)  # doctest: +SKIP
    >>> y, state = stack.step(x[:, :1], state)  # doctest: +SKIP
    """

    config_class = xLSTMBlockStackConfig

    def __init__(self, config: xLSTMBlockStackConfig):
        super().__init__()
        self.config = config
        self.stack = Stack(stack_config(config))

    def reset_parameters(self):
        self.stack.reset_parameters()

    def forward(self, x: Tensor, state: dict | None = None, *, return_last_state: bool = False):
        y, state = self.stack(x, _read(self.stack, x, state, is_step=False))
        return (y, _tell(state)) if return_last_state else y

    def step(self, x: Tensor, state: dict | None = None):
        """y (B, 1, D) of one token, and the state {"block_i": {...}} in their shapes."""
        y, state = self.stack(x, _read(self.stack, x, state, is_step=True))
        return y, _tell(state)

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        return _load(self, self.stack, state_dict, strict, assign)


class xLSTMLMModel(nn.Module):
    """Their language model: logits (B, T, V) of tokens (B, T), any T."""

    config_class = xLSTMLMModelConfig

    def __init__(self, config: xLSTMLMModelConfig):
        super().__init__()
        self.config = config
        self.model = LanguageModel(stack_config(config))
        # Theirs drops the embedding only where it is told to.
        self.dropout = nn.Dropout(config.dropout) if config.add_embedding_dropout else nn.Identity()

    def reset_parameters(self):
        self.model.reset_parameters()

    def _run(self, idx, state, is_step: bool):
        x = self.dropout(self.model.embedding(idx))
        x, state = self.model.stack(x, _read(self.model.stack, x, state, is_step))
        return self.model.logits(self.model.norm(x)).to(x.dtype), _tell(state)

    def forward(self, idx: Tensor, state: dict | None = None, *, return_last_state: bool = False):
        logits, state = self._run(idx, state, is_step=False)
        return (logits, state) if return_last_state else logits

    def step(self, idx: Tensor, state: dict | None = None):
        """Logits (B, 1, V) of one token, and the state {"block_i": {...}} in their shapes."""
        return self._run(idx, state, is_step=True)

    def get_weight_decay_optim_group_param_names(self) -> tuple[list[str], list[str]]:
        """Names of what weight decay applies to and of what it does not, in the model's order."""
        rule = decayed(self)
        if self.config.weight_decay_on_embedding:
            rule["model.embedding.weight"] = True
        return [name for name in rule if rule[name]], [name for name in rule if not rule[name]]

    def get_weight_decay_optim_groups(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """The parameters of `get_weight_decay_optim_group_param_names`, in the same order in every process."""
        named = dict(self.named_parameters())
        decay, free = (
            tuple(named[name] for name in group) for group in self.get_weight_decay_optim_group_param_names()
        )
        return decay, free

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        return _load(self, self.model, state_dict, strict, assign)


class LargeOutput(NamedTuple):
    """(logits, state) of an xLSTMLarge with return_last_states; its `shape` is that of the logits, as their README has it."""

    logits: Tensor
    state: dict

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape


class xLSTMLarge(nn.Module):
    """Their architecture of xLSTM 7B: logits (B, T, V) of tokens (B, T), any T; state {i: (c, n, m)}, m (B, H, 1)."""

    config_class = xLSTMLargeConfig

    def __init__(self, config: xLSTMLargeConfig):
        super().__init__()
        self.config = config
        self.model = LanguageModel(large_config(config))

    def reset_parameters(self):
        self.model.reset_parameters()

    def forward(self, x: Tensor, state: dict | None = None):
        logits, state = self.model(x, _read_large(state))
        logits = logits.to(self.model.embedding.weight.dtype)
        return LargeOutput(logits, _tell_large(state)) if self.config.return_last_states else logits

    def generate(
        self, prefill_tokens: Tensor, max_length: int, sampling_type: str = "greedy", state: dict | None = None
    ):
        """The next tokens (B, max_length), each the likeliest, and the state after all of them."""
        if sampling_type != "greedy":
            raise ValueError(f"sampling_type is {sampling_type!r}, wanted 'greedy'; LanguageModel.generate samples")
        tokens, state = self.model.generate(
            prefill_tokens, max_length, temperature=0, state=_read_large(state), return_state=True
        )
        return tokens, _tell_large(state.layers)

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        return _load(self, self.model, state_dict, strict, assign)


def _read_large(state: dict | None):
    if state is None:
        return None
    return tuple((None, MLSTMState(c, n, m.squeeze(-1))) for c, n, m in (state[i] for i in range(len(state))))


def _tell_large(states) -> dict:
    return {i: (c, n, m.unsqueeze(-1)) for i, (_, (c, n, m)) in enumerate(states)}
