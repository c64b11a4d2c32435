"""One token a row through a model on buffers of its own: the body of a decoding loop, in place and without a wait.

Where kernels run, blocks of their making (the mLSTM, feed-forwards) take few launches and write their state where it stands;
any other block runs its ordinary forward, and its new state is copied over the old one. Where none run, or somebody looks at
the calls of the modules around them, the model's own forward does. Attention writes into a room (AttentionRoom): with a window
it has its full size from the start, without one `size` places, which whoever drives the steps keeps large enough.
"""

from functools import partial

import torch
from torch import Tensor, nn

from exlstm.layers import basic
from exlstm.layers.attention import AttentionRoom, AttentionState, longer, packed
from exlstm.layers.mlstm import mLSTM
from exlstm.layers.token import as_built, hooked
from exlstm.models.reading import leaves, mapped
from exlstm.models.stack import Block
from exlstm.ops import backend as backends
from exlstm.ops import int8

# Places of a room to begin with: fewer are not worth recording a graph anew.
LEAST = 256


class Step:
    """One token for each of `rows` sequences of a model.

    `tokens` (B,) int64 are what is read next, `alive` (B,) bool whose rows read: the others keep state and logits. `state` is
    the stack's, `logits` (B, V) belong to the token that comes next. All are buffers that stay where they are, attention's
    until `resize`. Every row has to hold fewer than `size` places, and than `reach`, the first ones, at which a step looks; a
    place takes `place_bytes` in all rows. Where no room grows `size` is 0. `fixed` is False where some other state grows, which
    no step can take.
    """

    def __init__(self, model, rows: int):
        weight = model.embedding.weight
        self.model, self.rows = model, rows
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.alive = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        x, first = model.hidden(self.tokens[:1, None])
        second = model.hidden(self.tokens[:1, None], first)[1]
        states = [model.stack.filled(state) for state in (first, second)]
        self._grows = []
        self.state = list(mapped(partial(_empty, self._grows, rows), *states, kind=(Tensor, AttentionState)))
        self.size = self.reach = LEAST if any(self._grows) else 0
        self.place_bytes = self._place_bytes()
        plain = [leaves(mapped(lambda _: None, state, kind=AttentionState)) for state in states]
        self.fixed = all(a.shape == b.shape for a, b in zip(*plain, strict=True))
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
        self.logits[index] = backends.cast(logits, self.logits.dtype)
        _seat(index, self.state, layers)

    def check(self, layers):
        """ValueError where a state is not one of this model: behind an empty prompt no block has looked at it."""
        _check("state", self.state, layers)

    def held(self, layers) -> list[int]:
        """How many places of a room that grows each row of a state takes."""
        found = []
        mapped(lambda _, new: found.append((new[2] >= 0).sum(1)), self.state, layers, kind=AttentionRoom)
        found = [count for count, grows in zip(found, self._grows, strict=True) if grows]
        return torch.stack(found).amax(0).tolist() if found else []

    def resize(self, size: int):
        """Moves rooms that grow, one after the other, to others of `size` places: no graph holds the step any more."""
        grows = iter(self._grows)
        # Where there is no memory for one of them, all hold the smaller size still.
        self.size = self.reach = min(size, self.size)
        for i, state in enumerate(self.state):
            self.state[i] = mapped(lambda x: _resized(x, size) if next(grows) else x, state, kind=AttentionRoom)
        self.size = self.reach = size

    def _place_bytes(self) -> int:
        """What a place takes in all rooms that grow, of all rows."""
        found = []
        mapped(found.append, self.state, kind=AttentionRoom)
        return sum(x[:, 0].nbytes for room, grows in zip(found, self._grows, strict=True) if grows for x in room[:3])

    def reached(self):
        """The state as a step takes it."""
        if self.reach == self.size:
            return self.state
        grows = iter(self._grows)
        return mapped(lambda x: _reached(x, self.reach) if next(grows) else x, self.state, kind=AttentionRoom)

    def row(self, row: int) -> tuple:
        """The state of a row, of places only those that it sees."""
        own = mapped(lambda x: x[row : row + 1], tuple(self.state))
        return mapped(_value, own, kind=AttentionRoom)

    def room(self, name: str, *shape: int, dtype=None) -> Tensor:
        """A buffer by name that parts share one after the other."""
        key = name, shape, dtype or self.x.dtype
        if key not in self._rooms:
            self._rooms[key] = self.x.new_empty(self.rows, *shape, dtype=key[2])
        return self._rooms[key]

    def keep(self, new, old):
        """Overwrites `old` with `new` in the rows that are alive; what was written in place stays as it is."""
        if isinstance(old, Tensor) and new is not old:
            if old.shape != new.shape:
                raise ValueError(
                    f"a part of the state grew from {tuple(old.shape)} to {tuple(new.shape)}; only an AttentionState may"
                )
            alive = self.alive.view(-1, *[1] * (old.ndim - 1))
            torch.where(alive, backends.cast(new, old.dtype), old, out=old)
        elif isinstance(old, tuple | list):
            for a, b in zip(new, old, strict=True):
                self.keep(a, b)

    def _whole(self):
        """All of a step, by the model itself."""
        state = self.reached()
        x, new = self.model.hidden(self.tokens[:, None], tuple(state))
        self.keep(tuple(new), tuple(state))
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
        step, state = self.step, self.step.reached()[self.i]
        y, new = self.block.mixer(self.block.norm(step.x[:, None]), state)
        step.keep(new, state)
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
            options = {"mixed": mixed, "mixed_all": mixer.conv_all}
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
    if type(mixer) is not mLSTM or not as_built(mixer) or (mixer.i_gate, mixer.normalize) != ("exp", True):
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


def _empty(grows, rows, first, second):
    """Buffers of `rows` rows that have read nothing; what a state is after one token and after two says which of them grow."""
    if isinstance(first, Tensor):
        return first.new_zeros(rows, *first.shape[1:])
    grows.append(first.keys.shape[1] != second.keys.shape[1])
    # Beside all that a window remembers, a place for the next token.
    size = LEAST if grows[-1] else first.keys.shape[1] + 1
    none = (x.new_zeros(rows, 0, *x.shape[2:]) for x in first[:3])
    return AttentionRoom(*longer(*none, size), first.length.new_zeros(rows))


def _resized(room, size: int):
    """A room, or a state, with so many places; of what does not fit the last positions go."""
    parts = packed(*room[:3], room[2] >= 0, size) if room[2].shape[1] > size else room[:3]
    return AttentionRoom(*longer(*parts, size), room[3])


def _reached(room, size: int):
    """The first places of a room, in the same memory."""
    return AttentionRoom(*(x[:, :size] for x in room[:3]), room.length)


def _check(name: str, old, new, axis: int = 1):
    """ValueError where a state has not the parts of the buffers, or not their shape from `axis` on."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape[axis:] != old.shape[axis:] or new.device != old.device:
            came = f"shape {tuple(new.shape)} on {new.device}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"{name} has {came}, wanted {tuple(old.shape[axis:])} behind its rows, on {old.device}")
    elif isinstance(old, tuple | list):
        if not isinstance(new, tuple | list) or len(new) != len(old):
            came = f"{len(new)} parts" if isinstance(new, tuple | list) else type(new).__name__
            raise ValueError(f"{name} has {came}, wanted {len(old)} parts; it is of another model")
        for part, a, b in zip(getattr(old, "_fields", range(len(old))), old, new, strict=True):
            # Places of attention are as many as the text had tokens.
            _check(f"{name}.{part}", a, b, 2 if isinstance(old, AttentionRoom) else 1)


def _seat(index, old, new):
    """Writes rows of a state into the rows `index` of buffers."""
    if isinstance(old, Tensor):
        old[index] = backends.cast(new, old.dtype)
    elif isinstance(old, tuple | list):
        new = _resized(new, old.keys.shape[1]) if isinstance(old, AttentionRoom) else new
        for a, b in zip(old, new, strict=True):
            _seat(index, a, b)


def _value(room):
    """The state of a room of one row."""
    kept = room.positions >= 0
    return AttentionState(*packed(*room[:3], kept, int(kept.sum())), room.length)
