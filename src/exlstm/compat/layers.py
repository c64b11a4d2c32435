"""Their layers and blocks on ours: `forward(x)` gives y, `step(x, **state)` gives y and the state in their shapes.

mlstm_state: c (B, H, D, D), n (B, H, D, 1), m (B, H, 1, 1), for keys over √D    slstm_state: h, c, n, m (4, B, H · D)
conv_state: a tuple of the last W inputs (B, W, ·)
"""

import torch
from torch import nn

from exlstm.compat.config import (
    FeedForwardConfig,
    hidden_width,
    mlstm_options,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    slstm_options,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
)
from exlstm.layers.basic import GatedGELU
from exlstm.models.config import StackConfig
from exlstm.models.stack import Block
from exlstm.ops.mlstm import MLSTMState
from exlstm.ops.slstm import SLSTMState


def to_theirs(state) -> dict:
    """A state of our mlstm_up or slstm block in their shapes."""
    conv, memory = state
    if isinstance(memory, MLSTMState):
        scale = memory.n.shape[-1] ** -0.5
        told = {"mlstm_state": (memory.c * scale, (memory.n * scale).unsqueeze(-1), memory.m[..., None, None])}
    else:
        told = {"slstm_state": torch.stack([part.flatten(1) for part in memory])}
    if conv is not None:
        # Theirs holds one input more, which the next step drops unread.
        told["conv_state"] = (nn.functional.pad(conv, (0, 0, 1, 0)),)
    return told


def to_ours(mixer, x, state: dict | None, is_step: bool):
    """Their state as ours; what is missing is empty: their steps begin at a stabiliser of 0, their forward at none."""
    state = {name: value for name, value in (state or {}).items() if value is not None}
    kind, name = (SLSTMState, "slstm_state") if hasattr(mixer, "r") else (MLSTMState, "mlstm_state")
    unknown = state.keys() - {"conv_state", name}
    if unknown:
        raise TypeError(f"{min(unknown)} is no part of this layer's state")
    shapes, dtype, conv = list(mixer.shapes), torch.promote_types(x.dtype, torch.float32), None
    if mixer.conv is not None:
        shape = shapes.pop(0)
        given = state.get("conv_state")
        given = given[0] if isinstance(given, tuple | list) else given
        conv = x.new_zeros(len(x), *shape) if given is None else given[:, given.shape[1] - shape[0] :]
    if name in state:
        parts = [part.reshape(len(x), *shape) for part, shape in zip(state[name], shapes, strict=True)]
        if kind is MLSTMState:
            scale = parts[1].shape[-1] ** 0.5
            parts = [parts[0] * scale, parts[1] * scale, parts[2]]
        return conv, kind(*parts)
    parts = [x.new_zeros(len(x), *shape, dtype=dtype) for shape in shapes]
    if kind is MLSTMState and not is_step:
        parts[2] = parts[2] + mixer.m_start
    return conv, kind(*parts)


def run(module, mixer, x, state: dict | None, is_step: bool):
    """y and the state in their shapes; `module` is the mixer or the block around it."""
    if is_step and x.shape[1] != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted one token (B, 1, D) for a step")
    y, after = module(x, to_ours(mixer, x, state, is_step))
    return y, to_theirs(after)


def _block(kind: str, width: int, heads: int, options) -> Block:
    if width < 1:
        raise ValueError(f"embedding_dim is {width}, wanted the width of the input")
    return Block(kind, StackConfig(d_model=width, n_layers=1, n_heads=heads, blocks=kind, **{kind: options}))


class mLSTMBlock(nn.Module):
    """Their mLSTM block: x + layer(norm(x))."""

    config_class = mLSTMBlockConfig

    def __init__(self, config: mLSTMBlockConfig):
        super().__init__()
        self.config, layer = config, config.mlstm
        options = mlstm_options(layer, layer.embedding_dim)
        self.block = _block("mlstm_up", layer.embedding_dim, layer.num_heads, options)

    def reset_parameters(self):
        self.block.reset_parameters()

    def forward(self, x, *, mlstm_state=None, conv_state=None, return_last_state: bool = False):
        state = {"mlstm_state": mlstm_state, "conv_state": conv_state}
        y, state = run(self.block, self.block.mixer, x, state, is_step=False)
        return (y, state) if return_last_state else y

    def step(self, x, *, mlstm_state=None, conv_state=None):
        return run(
            self.block, self.block.mixer, x, {"mlstm_state": mlstm_state, "conv_state": conv_state}, is_step=True
        )


class mLSTMLayer(nn.Module):
    """Their mLSTM layer."""

    config_class = mLSTMLayerConfig

    def __init__(self, config: mLSTMLayerConfig):
        super().__init__()
        self.config = config
        self.layer = mLSTMBlock(mLSTMBlockConfig(config)).block.mixer

    def reset_parameters(self):
        self.layer.reset_parameters()

    def forward(self, x, *, mlstm_state=None, conv_state=None, return_last_state: bool = False):
        state = {"mlstm_state": mlstm_state, "conv_state": conv_state}
        y, state = run(self.layer, self.layer, x, state, is_step=False)
        return (y, state) if return_last_state else y

    def step(self, x, mlstm_state=None, conv_state=None):
        return run(self.layer, self.layer, x, {"mlstm_state": mlstm_state, "conv_state": conv_state}, is_step=True)


class sLSTMBlock(nn.Module):
    """Their sLSTM block: x + layer(norm(x)), then x + ffn(norm(x)) where there is a feed-forward."""

    config_class = sLSTMBlockConfig

    def __init__(self, config: sLSTMBlockConfig):
        super().__init__()
        self.config, layer = config, config.slstm
        options = slstm_options(config, layer.embedding_dim)
        self.block = _block("slstm", layer.embedding_dim, layer.num_heads, options)

    def reset_parameters(self):
        self.block.reset_parameters()

    def forward(self, x, *, conv_state=None, slstm_state=None, return_last_state: bool = False):
        state = {"slstm_state": slstm_state, "conv_state": conv_state}
        y, state = run(self.block, self.block.mixer, x, state, is_step=False)
        return (y, state) if return_last_state else y

    def step(self, x, *, conv_state=None, slstm_state=None):
        return run(
            self.block, self.block.mixer, x, {"slstm_state": slstm_state, "conv_state": conv_state}, is_step=True
        )


class sLSTMLayer(nn.Module):
    """Their sLSTM layer."""

    config_class = sLSTMLayerConfig

    def __init__(self, config: sLSTMLayerConfig):
        super().__init__()
        self.config = config
        self.layer = sLSTMBlock(sLSTMBlockConfig(config, None)).block.mixer

    def reset_parameters(self):
        self.layer.reset_parameters()

    def forward(self, x, conv_state=None, slstm_state=None, return_last_state: bool = False):
        state = {"slstm_state": slstm_state, "conv_state": conv_state}
        y, state = run(self.layer, self.layer, x, state, is_step=False)
        return (y, state) if return_last_state else y

    def step(self, x, conv_state=None, slstm_state=None):
        return run(self.layer, self.layer, x, {"slstm_state": slstm_state, "conv_state": conv_state}, is_step=True)


class GatedFeedForward(nn.Module):
    """Their feed-forward: down(gelu(gate(x)) · up(x))."""

    config_class = FeedForwardConfig

    def __init__(self, config: FeedForwardConfig):
        super().__init__()
        self.config = config
        if config.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {config.embedding_dim}, wanted the width of the input")
        self.ffn = GatedGELU(config.embedding_dim, hidden_width(config, config.embedding_dim))
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self):
        self.ffn.reset_parameters()

    def forward(self, x):
        return self.dropout(self.ffn(x))
