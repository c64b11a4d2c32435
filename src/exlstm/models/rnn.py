"""xLSTM in the shape of nn.LSTM: its arguments, defaults, results and errors, on blocks of any kind.

A layer, in each direction: x → map to hidden_size (where the width differs) → block → norm (behind the last) → map to proj_size
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from exlstm.layers.basic import RMSNorm, valid_mask
from exlstm.models.config import OPTIONS, StackConfig, from_dict, nearest
from exlstm.models.memory import xLSTMMemory, xLSTMState
from exlstm.models.stack import Block, scale_outputs
from exlstm.ops.backend import autocasts, blanked, check_tensors, elsewhere, traced

# A norm over one unit leaves nothing of it, so a layer of one unit works in this width inside and is mapped to one.
NARROWEST = 8
DIRECTIONS = {False: "", True: "concat", "concat": "concat", "sum": "sum"}


class Layer(nn.Module):
    """One layer in one direction: (B, T, d_in) -> (B, T, H_out)."""

    def __init__(self, kind: str, config: StackConfig, d_in: int, bias: bool, proj_size: int, is_last: bool, **new):
        super().__init__()
        width = config.d_model
        # The input has no norm in front of it and enters the residual stream: the first layer maps it in any case.
        self.enter = nn.Linear(d_in, width, bias=bias, **new) if d_in else None
        self.block = Block(kind, config, **new)
        self.norm = RMSNorm(width, **new) if is_last else None
        self.leave = nn.Linear(width, proj_size, bias=bias, **new) if proj_size else None
        self.start_maps()

    def start_maps(self):
        for linear in (self.enter, self.leave):
            if linear is not None:
                # Outputs of unit variance from inputs of unit variance, which is what a residual stream starts with.
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def reset_parameters(self):
        self.block.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.start_maps()

    def forward(self, x, state, mask, reset):
        x = x if self.enter is None else self.enter(x)
        x, state = self.block(x, state, mask=mask, reset=reset)
        x = x if self.norm is None else self.norm(x)
        return (x if self.leave is None else self.leave(x)), state


class xLSTM(nn.Module):
    """Extended LSTM in the place of nn.LSTM: the same arguments, shapes and results, with a state of its own inside.

    Args:
        input_size, hidden_size, num_layers, batch_first: as in nn.LSTM. A hidden_size of 1 is 8 units inside and a map to one:
            blocks have norms, and a norm over one unit leaves nothing of it.
        bias: a bias in the maps in front of and behind the blocks; gates have theirs in any case, they set how long is
            remembered.
        dropout: between layers, in training.
        bidirectional: False, True ("concat"), or "sum", in which the two directions are added instead of joined.
        proj_size: width of every layer's output, smaller than hidden_size; 0: hidden_size.
        blocks: kinds of block, repeated in turn over the layers: names of `exlstm.StackConfig`.
        n_heads: heads of every block; 0: 4, 2 or 1, as far as hidden_size divides into heads of at least 8.
        options: settings of the blocks by kind, as {"slstm": {"conv": 4}}; forget_bias of "slstm" is (5, -5) here, if not given.

    >>> net = xLSTM(10, 32, num_layers=2)
    >>> out, (h, c) = net(torch.randn(5, 3, 10))
    >>> out, (h, c) = net(torch.randn(5, 3, 10), (h, c))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool | str = False,
        proj_size: int = 0,
        blocks: tuple[str, ...] | str = ("slstm",),
        device=None,
        dtype=None,
        *,
        n_heads: int = 0,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        _check_numbers(input_size, hidden_size, num_layers, proj_size)
        _check_switches(bias, batch_first, dropout, bidirectional, num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        inside = NARROWEST if hidden_size == 1 else hidden_size
        leave = 1 if hidden_size == 1 else proj_size
        self.config = _config(inside, num_layers, blocks, n_heads, options)
        self.n_directions = 2 if bidirectional else 1
        joined = self.n_directions if DIRECTIONS[bidirectional] == "concat" else 1
        between = (leave or hidden_size) * joined
        layers = []
        for i, kind in enumerate(self.config.layers()):
            d_in = input_size if i == 0 else between if between != inside else 0
            last = {"is_last": i == num_layers - 1, "device": device, "dtype": dtype}
            layers += [Layer(kind, self.config, d_in, bias, leave, **last) for _ in range(self.n_directions)]
        # In nn.LSTM's order: layer by layer, forward before reverse.
        self.layers = nn.ModuleList(layers)
        scale_outputs([layer.block for layer in self.layers], num_layers)

    def reset_parameters(self):
        for layer in self.layers:
            layer.reset_parameters()
        scale_outputs([layer.block for layer in self.layers], self.num_layers)

    def flatten_parameters(self):
        """Nothing to be done: no weight of ours wants a place of its own. Scripts written for nn.LSTM call it."""

    def forward(self, input: Tensor | PackedSequence, hx=None, *, lengths=None, mask=None, reset=None):
        """Output and (h, c), an xLSTMState; shapes as in nn.LSTM.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), or a PackedSequence.
            hx: the state of the call before; None, or a pair of zeros in nn.LSTM's shapes, is a fresh one.
            lengths: (B,) valid tokens of right-padded rows, as a tensor or list; the output behind them is 0.
            mask: bool, False is padding, laid out as the input's first axes: (T, B), (B, T) or (T,).
            reset: bool, laid out as mask: the memory is emptied before the token.

        Raises:
            RuntimeError, ValueError: what nn.LSTM raises for inputs and states that do not fit.
        """
        if not isinstance(input, PackedSequence):
            return self._padded(input, hx, lengths, mask, reset)
        if lengths is not None or mask is not None or reset is not None:
            raise ValueError("a PackedSequence says itself which tokens there are, wanted no lengths, mask or reset")
        x, lengths = pad_packed_sequence(input, batch_first=True)
        self._check_input(x)
        y, state = self._run(x, self._memory(x, hx, True), valid_mask(lengths, None, *x.shape[:2], x.device), None)
        order = input.sorted_indices
        if order is not None:
            y, lengths = y.index_select(0, order), lengths[order.cpu()]
        return input._replace(data=pack_padded_sequence(y, lengths, batch_first=True).data), state

    def _padded(self, x, hx, lengths, mask, reset):
        given = {"input": x, "mask": mask, "reset": reset}
        check_tensors(**{name: t for name, t in given.items() if name == "input" or t is not None})
        if x.dim() not in (2, 3):
            raise ValueError(f"xLSTM: Expected input to be 2D or 3D, got {x.dim()}D instead")
        for name, t in {"mask": mask, "reset": reset}.items():
            if t is not None and (t.dtype, t.shape) != (torch.bool, x.shape[:-1]):
                axes = "(T,)" if x.dim() == 2 else "(B, T)" if self.batch_first else "(T, B)"
                came = f"{t.dtype} of shape {tuple(t.shape)}"
                raise ValueError(f"{name} is {came}, wanted bool of {axes} = {tuple(x.shape[:-1])}")
        is_batched, swap = x.dim() == 3, x.dim() == 3 and not self.batch_first
        x, mask, reset = (
            t if t is None else t.transpose(0, 1) if swap else t if is_batched else t.unsqueeze(0)
            for t in (x, mask, reset)
        )
        self._check_input(x)
        if lengths is not None and not is_batched:
            raise ValueError("lengths belong to a batch, and the input is a single sequence")
        before = self._memory(x, hx, is_batched)
        # Not its len: of that a compiler would make one number.
        if x.shape[0]:
            y, state = self._run(x, before, valid_mask(lengths, mask, *x.shape[:2], x.device), reset)
        else:
            # Blocks want a row, and nn.LSTM none: one of zeros says what shapes and gradients there are.
            y, state = self._run(x.new_zeros(1, *x.shape[1:]), self._memory(x, None, True), None, None)
            y, state = y[:0], state.index(slice(0))
        if not is_batched:
            return y.squeeze(0), state._replace(h=state.h.squeeze(1))
        # Scripts take a view of nn.LSTM's output.
        return (y.transpose(0, 1).contiguous() if swap else y), state

    def _run(self, x, before, mask, reset):
        """x (B, T, input_size) -> y (B, T, directions · H_out) and the state."""
        h_before, memory = before
        x = blanked(x, mask)
        resets = [_begin(reset, memory.fresh, x), _begin(_from_behind(reset), memory.fresh, x)]
        hs, states, held = [], [], memory.states()
        for i in range(self.num_layers):
            if i and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            ys = []
            for layer in self.layers[i * self.n_directions : (i + 1) * self.n_directions]:
                is_reverse, state = len(ys) == 1, held[len(states)]
                y, state = (
                    _reversed(layer, x, state, mask, resets[1]) if is_reverse else layer(x, state, mask, resets[0])
                )
                ys.append(y)
                states.append(state)
                hs.append(_last(y, mask, is_reverse, None if h_before is None else h_before[len(hs)]))
            x = sum(ys) if self.bidirectional == "sum" else torch.cat(ys, -1) if len(ys) > 1 else y
        return blanked(x, mask), xLSTMState(torch.stack(hs), xLSTMMemory.of(states))

    def _memory(self, x, hx, is_batched: bool):
        """(h or None, memory) of a state handed in."""
        depth, batch = len(self.layers), x.shape[0]
        if hx is None:
            return None, xLSTMMemory.of([None] * depth)
        if not isinstance(hx, tuple | list) or len(hx) != 2 or not isinstance(hx[0], Tensor):
            came = f"{len(hx)} parts" if isinstance(hx, tuple | list) else type(hx).__name__
            raise ValueError(f"hx is {came}, wanted the pair (h, c) of an earlier call, or of zeros")
        h, c = hx
        if isinstance(c, tuple | list) and not isinstance(c, xLSTMMemory) and len(c) == 2:
            # A script has walked through the memory, as those do that detach a state of unknown depth.
            c = xLSTMMemory(*c)
        _check_axes(h, c, is_batched)
        h = h if is_batched else h.unsqueeze(1)
        wanted = (depth, batch, self.proj_size or self.hidden_size)
        if h.shape != wanted:
            raise RuntimeError(f"Expected hidden[0] size {wanted}, got {list(h.shape)}")
        if isinstance(c, xLSTMMemory):
            rows, held = c.rows, len(c.layers)
            if (held, rows) != (depth, batch):
                raise RuntimeError(f"Expected hidden[1] to hold {depth} layers of {batch} rows, got {held} of {rows}")
            return h, c
        c = c if is_batched else c.unsqueeze(1)
        wanted = (depth, batch, self.hidden_size)
        if c.shape != wanted:
            raise RuntimeError(f"Expected hidden[1] size {wanted}, got {list(c.shape)}")
        # Who traces, or works without numbers, cannot ask for them.
        if not (traced() or c.is_meta) and (h.any() or c.any()):
            raise ValueError(
                "hx holds numbers that are no state of this network, wanted the pair (h, c) of an earlier call, or of zeros"
            )
        return None, xLSTMMemory.of([None] * depth)

    def _check_input(self, x):
        # A replica of DataParallel has weights and no parameters; a quantised map's weight may be a call.
        weight = self.layers[0].enter.weight
        wanted = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype
        if x.dtype != wanted and not autocasts(x.device):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({wanted}). "
                f"Convert input: input.to({wanted}), or convert model: model.to({x.dtype})"
            )
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.shape[1] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if elsewhere(weight, x):
            raise RuntimeError(
                f"Input and parameter tensors are not at the same device, found input tensor at {x.device} "
                f"and parameter tensor at {weight.device}"
            )

    def extra_repr(self):
        told = [f"{self.input_size}, {self.hidden_size}"]
        starts = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, start in {**starts, "proj_size": 0}.items():
            if getattr(self, name) != start:
                told.append(f"{name}={getattr(self, name)}")
        return ", ".join([*told, f"blocks={self.config.blocks}"])


def _begin(reset, fresh, x):
    """`reset` (B, T) in the order of reading, and the rows that are emptied before the first token."""
    if fresh is None:
        return reset
    reset = torch.zeros_like(x[..., 0], dtype=torch.bool) if reset is None else reset
    return torch.cat([reset[:, :1] | fresh[:, None], reset[:, 1:]], 1)


def _from_behind(reset):
    """`reset` for the reverse direction: a document that begins at t ends, seen from behind, at t - 1."""
    return reset if reset is None else torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:].flip(1)], 1)


def _reversed(layer, x, state, mask, reset):
    """The layer from the last token to the first: padding passes by on whichever side it lies."""
    y, state = layer(x.flip(1), state, None if mask is None else mask.flip(1), reset)
    return y.flip(1), state


def _last(y, mask, is_reverse: bool, before):
    """The output (B, H_out) of the last valid token in the layer's direction; `before`, or 0, where there is none."""
    if mask is None:
        return y[:, 0] if is_reverse else y[:, -1]
    steps = torch.arange(mask.shape[1], device=y.device)
    place = mask.byte().argmax(1) if is_reverse else (mask * steps).amax(1)
    last = y[torch.arange(y.shape[0], device=y.device), place]
    return torch.where(mask.any(1)[:, None], last, torch.zeros_like(last) if before is None else before.to(last.dtype))


def _config(hidden_size, num_layers, blocks, n_heads, options) -> StackConfig:
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"options are {type(options).__name__}, wanted settings by kind of block, as {{'slstm': {{'conv': 4}}}}"
        )
    options = dict(options or {})
    for kind in options:
        if kind not in OPTIONS:
            raise ValueError(f"options name the unknown block {kind!r}{nearest(kind, OPTIONS)}")
    # In nn.LSTM's place a network has to remember before anything else, so memories of every length stand side by side at the
    # start. With the layer's own, nearly shut, the first of 20 symbols is not learnt in 300 steps; with these, in 150.
    own = options.get("slstm", {})
    options["slstm"] = {"forget_bias": (5.0, -5.0), **own} if isinstance(own, Mapping) else own
    n_heads = n_heads or next(n for n in (4, 2, 1) if n == 1 or (hidden_size % n == 0 and hidden_size // n >= 8))
    values = {"d_model": hidden_size, "n_layers": num_layers, "n_heads": n_heads, "blocks": blocks, **options}
    return from_dict(StackConfig, values)


def _check_numbers(input_size, hidden_size, num_layers, proj_size):
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, value in {**sizes, "proj_size": proj_size}.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")


def _check_switches(bias, batch_first, dropout, bidirectional, num_layers):
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout lies between layers, so dropout={dropout} wants more than num_layers={num_layers}", stacklevel=3
        )
    for name, value in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    if not isinstance(bidirectional, bool | str) or bidirectional not in DIRECTIONS:
        raise ValueError(f'bidirectional is {bidirectional!r}, wanted False, True, "concat" or "sum"')


def _check_axes(h, c, is_batched: bool):
    """Both parts of a state with the axes of the input; a memory has rows in any case."""
    axes = 3 if is_batched else 2
    if not isinstance(c, Tensor | xLSTMMemory):
        raise ValueError(f"c is {type(c).__name__}, wanted the memory of an earlier call, or zeros")
    if h.dim() != axes or (isinstance(c, Tensor) and c.dim() != axes):
        came = f"({h.dim()}-D, {c.dim() if isinstance(c, Tensor) else axes}-D)"
        kind = "batched 3-D" if is_batched else "unbatched 2-D"
        raise RuntimeError(f"For {kind} input, hx and cx should also be {axes}-D but got {came} tensors")
