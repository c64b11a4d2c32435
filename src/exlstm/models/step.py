"""One token a row through a model on buffers of its own: the body of a decoding loop, in place and without a wait.

Where kernels run, blocks of their making (the mLSTM, feed-forwards) take few launches and write their state where it stands;
any other block runs its ordinary forward, and its new state is copied over the old one. Where none run, or somebody looks at
the calls of the modules around them, the model's own forward does. A window's state has its full size from the start; a state
that grows without end (attention's without a window) is replaced.
"""

from functools import partial

import torch
from torch import Tensor, nn

from exlstm.layers import basic
from exlstm.layers.mlstm import mLSTM
from exlstm.layers.token import hooked
from exlstm.models.reading import leaves, mapped
from exlstm.models.stack import Block
from exlstm.ops import backend as backends
from exlstm.ops import int8


class Step:
    """One token for each of `rows` sequences of a model.

    `tokens` (B,) int64 are what is read next, `alive` (B,) bool whose rows read: the others keep state and logits. `state` is
    the stack's, `logits` (B, V) belong to the token that comes next. All are buffers that stay where they are, but for the
    state of a block whose state grows: then `fixed` is False.
    """

    def __init__(self, model, rows: int):
        weight = model.embedding.weight
        self.model, self.rows = model, rows
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.alive = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        x, first = model.hidden(self.tokens[:1, None])
        second = model.hidden(self.tokens[:1, None], first)[1]
        filled = model.stack.filled
        self._places = [_flags(*pair) for pair in zip(first, second, strict=True)]
        self._grows = [_flags(*pair) for pair in zip(filled(first), filled(second), strict=True)]
        self.fixed = not any(map(any, self._grows))
        self._fresh, self.state = (
            list(filled([_empty(state, flags, n) for state, flags in zip(first, self._places, strict=True)]))
            for n in (1, rows)
        )
        logits = model.logits(x[:, 0])
        self.logits = logits.new_zeros(rows, logits.shape[1])
        self.x = weight.new_zeros(rows, weight.shape[1])
        self._rooms = {}
        self._apart = backends.kernels(weight) and _takes_apart(model)
        if self._apart:
            self._parts = [part for i, block in enumerate(model.stack.blocks) for part in self._of(i, block)]
            self._head = self._last()

    def __call__(self):
        """Reads `tokens` in the rows that are alive, and renews state and logits."""
        if not self._apart:
            self._whole()
            return
        torch.index_select(self.model.embedding.weight, 0, self.tokens, out=self.x)
        for part in self._parts:
            part()
        self._head()

    def seat(self, index: Tensor, layers, logits: Tensor):
        """State and logits of further rows, at the rows `index`."""
        self.logits[index] = logits
        for i, new in enumerate(self.model.stack.filled(layers)):
            fixed = not any(self._grows[i])
            self.state[i] = mapped(partial(_seated, index, fixed), self.state[i], new)

    def clear(self, row: int):
        """Forgets what a row holds of a growing state."""
        index = torch.tensor([row], device=self.tokens.device)
        for i, flags in enumerate(self._grows):
            if any(flags):
                self.state[i] = mapped(partial(_seated, index, False), self.state[i], self._fresh[i])
                self.state[i] = _trimmed(self.state[i], flags)

    def row(self, row: int) -> tuple:
        """The state of a row, of places only those that it sees."""
        own = (mapped(lambda x: x[row : row + 1], state) for state in self.state)
        return tuple(_trimmed(state, flags) for state, flags in zip(own, self._places, strict=True))

    def room(self, name: str, *shape: int, dtype=None) -> Tensor:
        """A buffer by name that parts share one after the other."""
        key = name, shape, dtype or self.x.dtype
        if key not in self._rooms:
            self._rooms[key] = self.x.new_empty(self.rows, *shape, dtype=key[2])
        return self._rooms[key]

    def keep(self, new, old):
        """`old`, overwritten with `new` in the rows that are alive; another tensor where the new one is longer."""
        if isinstance(old, Tensor):
            alive = self.alive.view(-1, *[1] * (old.ndim - 1))
            if old.shape != new.shape:
                return torch.where(alive, new, _longer(old, new.shape[1], front=False))
            return torch.where(alive, backends.cast(new, old.dtype), old, out=old)
        if isinstance(old, tuple | list):
            kept = [self.keep(a, b) for a, b in zip(new, old, strict=True)]
            return type(old)(*kept) if hasattr(old, "_fields") else type(old)(kept)
        return new

    def _whole(self):
        """All of a step, by the model itself."""
        x, new = self.model.hidden(self.tokens[:, None], tuple(self.state))
        self.state[:] = [self.keep(*pair) for pair in zip(new, self.state, strict=True)]
        self.keep(self.model.logits(x[:, 0]), self.logits)

    def _of(self, i, block):
        """What a block does, as calls without arguments."""
        yield _MLSTM(self, i, block) if _takes_mlstm(self, block) else _Mixer(self, i, block)
        if block.ffn is not None:
            yield _Gated(self, block) if _takes_ffn(self, block) else _Ffn(self, block)

    def _last(self):
        model = self.model
        weight, cap = model._head_weight(), model.config.logit_cap
        plain = type(model.norm) is basic.RMSNorm and type(model.stack.norm) is nn.Identity
        plain = plain and (model.head is None or type(model.head) is nn.Linear)
        if not (plain and _kernels(self.x, weight, model.norm.weight)):
            return self._plain_last
        from exlstm.ops import token_kernels as kernels

        if self.logits.dtype != torch.float32 or not kernels.takes(self.x.dtype, *weight.shape[1:]):
            return self._plain_last
        norm, logits = _norm(kernels, model.norm), self.room("logits", *self.logits.shape[1:], dtype=torch.float32)

        def head():
            kernels.linear(self.x, weight, logits, norm=norm, cap=cap, room=self.room("n", self.x.shape[1]))
            self.keep(logits, self.logits)

        return head

    def _plain_last(self):
        self.keep(self.model.logits(self.model.norm(self.model.stack.norm(self.x))), self.logits)


class _Mixer:
    """x += mixer(norm(x)), whatever the mixer is."""

    def __init__(self, step, i, block):
        self.step, self.i, self.block = step, i, block

    def __call__(self):
        step, states = self.step, self.step.state
        y, new = self.block.mixer(self.block.norm(step.x[:, None]), states[self.i])
        states[self.i] = step.keep(new, states[self.i])
        step.x += y[:, 0]


class _Ffn:
    """x += ffn(norm(x))."""

    def __init__(self, step, block):
        self.step, self.block = step, block

    def __call__(self):
        self.step.x += self.block.ffn(self.block.ffn_norm(self.step.x))


class _MLSTM:
    """The mLSTM with its norm in four launches, two more with a convolution or with several rows."""

    def __init__(self, step, i, block):
        from exlstm.ops import token_kernels as kernels
        from exlstm.ops.mlstm.step import step_

        self.kernels, self.step_, self.step, self.mixer = kernels, step_, step, block.mixer
        self.norm, (self.conv, self.memory) = _norm(kernels, block.norm), step.state[i]

    def __call__(self):
        kernels, step, mixer = self.kernels, self.step, self.mixer
        heads, keys, values = self.memory.c.shape[1:]
        x, room, options = step.x, step.room("n", mixer.d_model), {"norm": self.norm}
        if self.conv is not None:
            kernels.normalise(x, self.norm, room)
            mixed = step.room("mixed", mixer.d_model)
            kernels.conv_step(room, mixer.conv.weight, mixer.conv.bias, self.conv, step.alive, mixed)
            options = {"mixed": mixed}
        q, k = step.room("q", 1, heads, keys), step.room("k", 1, heads, keys)
        v, o, h, y = (step.room(name, 1, heads, values) for name in "vohy")
        gates = step.room("gates", 1, 2, heads, dtype=torch.float32)
        maps = (mixer.q, mixer.k, mixer.v, mixer.o, mixer.gate)
        weights = [*(linear.weight for linear in maps), mixer.gate.bias]
        source = room if self.conv is not None else x
        kernels.mlstm_maps(
            source,
            weights,
            step.alive,
            [z.flatten(1) for z in (q, k, v, o, gates)],
            cap=mixer.gate_cap,
            room=room,
            **options,
        )
        n, m = (step.room(name, *old.shape[1:], dtype=old.dtype) for name, old in zip(("n⁺", "m⁺"), self.memory[1:]))
        log_i, log_f = gates.unbind(2)
        self.step_(q, k, v, log_i, log_f, *self.memory, keys**-0.5, True, mixer.eps, h, out=(n, m))
        kernels.settle(h, mixer.norm.weight, o, y, (n, m), self.memory[1:], mixer.norm.eps)
        kernels.linear(y.flatten(1), mixer.out.weight, x, add=True)


class _Gated:
    """A gated feed-forward with its norm in two launches, one more with several rows or a LayerNorm."""

    def __init__(self, step, block):
        from exlstm.ops import token_kernels as kernels

        self.kernels, self.step, self.ffn, self.norm = kernels, step, block.ffn, _norm(kernels, block.ffn_norm)

    def __call__(self):
        step, ffn = self.step, self.ffn
        hidden, room = step.room("hidden", ffn.gate.weight.shape[0]), step.room("n", step.x.shape[1])
        activation = ACTIVATIONS[type(ffn)]
        self.kernels.gated(
            step.x, ffn.gate.weight, ffn.up.weight, hidden, norm=self.norm, activation=activation, room=room
        )
        self.kernels.linear(hidden, ffn.out.weight, step.x, add=True)


ACTIVATIONS = {basic.SwiGLU: "silu", basic.GatedGELU: "gelu"}


def _norm(kernels, norm):
    return kernels.Norm(norm.weight, norm.eps, type(norm) is basic.LayerNorm)


def _kernels(x, *weights) -> bool:
    """Whether kernels may read these weights as they are."""
    return backends.kernels(x) and all(_reads(x, w) for w in weights)


def _reads(x, weight) -> bool:
    rows = int8.rows(weight)
    fits = rows is not None and weight.dtype == x.dtype and weight.device == x.device
    return fits and rows.numbers.is_contiguous()


def _alike(*linears) -> bool:
    """Whether all of these maps are in int8, or none."""
    return len({int8.rows(linear.weight).scaled for linear in linears}) == 1


def _plain(x, module, norm) -> bool:
    """Whether a module and its norm are what they were built as: no hook, no other class of map, a norm without bias."""
    if type(norm) not in (basic.RMSNorm, basic.LayerNorm) or getattr(norm, "bias", None) is not None:
        return False
    parts = [*module.modules(), norm]
    kinds = (nn.Linear, basic.HeadNorm, basic.CausalConv, type(module), type(norm))
    fits = all(type(part) in kinds and not hooked(part) for part in parts)
    return fits and _kernels(x, *module.parameters(), norm.weight)


def _takes_apart(model) -> bool:
    """Whether the modules around mixers and feed-forwards are what they were built as, so that nobody misses their calls."""
    stack = model.stack
    around = (model.embedding, stack, *stack.blocks, stack.norm, model.norm, model.head)
    built = all(type(getattr(block, "_orig_mod", block)) is Block for block in stack.blocks)
    built = built and type(model.embedding) is nn.Embedding
    return built and not any(part is not None and hooked(part) for part in around)


def _takes_ffn(step, block) -> bool:
    if type(block.ffn) not in ACTIVATIONS or not _plain(step.x, block.ffn, block.ffn_norm):
        return False
    from exlstm.ops import token_kernels as kernels

    ffn = block.ffn
    return kernels.takes(step.x.dtype, *ffn.gate.weight.shape) and _alike(ffn.gate, ffn.up)


def _takes_mlstm(step, block) -> bool:
    mixer = block.mixer
    # The kernels have the exponential gate and the normaliser only; whatever else there is takes the layer's forward.
    if type(mixer) is not mLSTM or (mixer.i_gate, mixer.normalize) != ("exp", True):
        return False
    if not _plain(step.x, mixer, block.norm):
        return False
    from exlstm.ops import token_kernels as kernels
    from exlstm.ops.mlstm.step import LARGEST

    head = mixer.d_model // mixer.n_heads
    layer = type(block.norm) is basic.LayerNorm
    return (
        kernels.takes(step.x.dtype, mixer.d_model)
        and _alike(mixer.q, mixer.k, mixer.v, mixer.o)
        and not int8.rows(mixer.gate.weight).scaled
        and max(head, len(mixer.q.weight) // mixer.n_heads) <= LARGEST
        and not layer
    )


# Rows of a state


def _flags(first, second) -> list[bool]:
    """Which tensors of a state have places for tokens, by what they are after one token and after two."""
    return [a.shape != b.shape for a, b in zip(leaves(first), leaves(second), strict=True)]


def _empty(first, flags, rows: int):
    """The state of `rows` rows that have read nothing."""
    grows = iter(flags)
    return mapped(lambda x: x.new_zeros(rows, *([0] * next(grows) or x.shape[1:2]), *x.shape[2:]), first)


def _seated(index, fixed, old, new):
    """`old` with the rows `new` at `index`, in place where it is `fixed`."""
    if fixed:
        old[index] = new
        return old
    size = max(old.shape[1:2] + new.shape[1:2], default=0)
    return _longer(old, size).index_copy(0, index, _longer(new, size).to(old.dtype))


def _longer(x, size, front=True):
    """x (B, S, ...) with places that nobody sees, in front or behind, up to `size`."""
    missing = size - x.shape[1] if x.ndim > 1 else 0
    if not missing:
        return x
    fill = 0 if x.dtype.is_floating_point else -1
    places = x.new_full((len(x), missing, *x.shape[2:]), fill)
    return torch.cat([places, x] if front else [x, places], 1)


def _trimmed(state, flags):
    """A state without the places in front and behind that no row sees."""
    places = next((x for x, grows in zip(leaves(state), flags) if grows and not x.dtype.is_floating_point), None)
    if places is None:
        return state
    used = (places >= 0).any(0).nonzero().flatten().tolist()
    start, end = (used[0], used[-1] + 1) if used else (0, 0)
    grows = iter(flags)
    return mapped(lambda x: x[:, start:end] if next(grows) else x, state)
