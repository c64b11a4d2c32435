"""Causal softmax attention as in Llama (arXiv 2302.13971): rotary positions, grouped queries, window and sink tokens.

y_t = W_out Σ_j softmax_j(q_t · k_j / sqrt(D)) v_j over t's document so far (its last `window`, first `sinks`).
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from exlstm.layers.basic import check_input, check_sizes, init_linear, maps, valid_mask
from exlstm.ops import backend as backends
from exlstm.ops.rotary import rotate, turns


class AttentionState(NamedTuple):
    """What attention remembers of S tokens: keys (rotated) and values (B, S, H, ·), positions (B, S), and length (B,).

    `positions` count the valid tokens of the document, -1 where a token is never seen again; `length` is the next one.
    S grows with every token; with a window it is at most window - 1 + sinks.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: Tensor


class AttentionRoom(NamedTuple):
    """The same on C places that stay where they are, for decoding: read and written in place, a token a row and call.

    Every position that is not -1 is seen by the next token. Each row keeps a place that is free: there the next token goes.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: Tensor


# A sequence is read in pieces of at least so many tokens where a window is shorter than it.
PIECE = 512

backends.portable(AttentionState)


class Attention(nn.Module):
    """Softmax attention over (B, T, d_model); state is an AttentionState.

    Args:
        d_model: width of input and output.
        n_heads: heads of queries, d_model / n_heads wide.
        n_kv_heads: heads of keys and values, a divisor of n_heads; 0: n_heads.
        rope_base: base of the rotary position embedding (arXiv 2104.09864), 0 for none.
        window: valid tokens of the document that a token sees, itself included; 0: all before it.
        sinks: first tokens of the document that stay visible beyond the window (arXiv 2309.17453).
        out_start: size of the output map at the start, over that of the other maps.
        dropout: share of the weights of the softmax that are dropped in training.

    >>> y, state = Attention(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        *,
        n_kv_heads: int = 0,
        rope_base: float = 10000.0,
        window: int = 0,
        sinks: int = 0,
        out_start: float = 1.0,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        n_kv_heads = n_kv_heads or n_heads
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}")
        head = d_model // n_heads
        self.d_model, self.n_heads, self.n_kv_heads, self.out_start = d_model, n_heads, n_kv_heads, out_start
        self.attend = Heads(head, rope_base, window, sinks, dropout)
        new = {"bias": False, "device": device, "dtype": dtype}
        self.q = nn.Linear(d_model, d_model, **new)
        self.k = nn.Linear(d_model, n_kv_heads * head, **new)
        self.v = nn.Linear(d_model, n_kv_heads * head, **new)
        self.out = nn.Linear(d_model, d_model, **new)
        self.reset_parameters()

    def reset_parameters(self):
        """As `init_linear` says: with queries and keys of std 0.63 attention starts close to a plain mean."""
        for linear in (self.q, self.k, self.v):
            init_linear(linear.weight)
        init_linear(self.out.weight, self.out_start)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        check_input(x, self.d_model, self.q)
        batch, time = x.shape[:2]
        mask = valid_mask(lengths, mask, batch, time, x.device)
        x = backends.blanked(x, mask)
        backends.check_companions(x, reset, None, {})
        q, *kv = maps(x, self.q, self.k, self.v)
        q = q.unflatten(-1, (self.n_heads, -1))  # (B, T, H, D)
        k, v = (y.unflatten(-1, (self.n_kv_heads, -1)) for y in kv)
        y, state = self.attend(q, k, v, state, mask=mask, reset=reset)
        return self.out(y.flatten(-2)), state

    def filled(self, state: AttentionState) -> AttentionState:
        return self.attend.filled(state)


class Heads(nn.Module):
    """Softmax attention of heads that have their queries, keys and values: positions, window, sinks, and what is remembered.

    Args:
        d_head: width of queries and keys.
        rope_base, window, sinks, dropout: as in Attention.
    """

    def __init__(self, d_head: int, rope_base: float = 10000.0, window: int = 0, sinks: int = 0, dropout: float = 0.0):
        super().__init__()
        if rope_base < 0 or (rope_base and d_head % 2):
            raise ValueError(
                f"rope_base is {rope_base} with heads of width {d_head}; rotary positions want an even width, 0 is none"
            )
        if window < 0 or sinks < 0 or (sinks and not window):
            raise ValueError(f"window is {window} and sinks {sinks}, wanted at least 0, and sinks only with a window")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, wanted a share from 0 to below 1")
        self.d_head, self.rope_base, self.window, self.sinks, self.dropout = d_head, rope_base, window, sinks, dropout

    def forward(self, q, k, v, state: AttentionState | None = None, *, mask=None, reset=None):
        """q (B, T, H, D), k (B, T, H', D), v (B, T, H', V), H' a divisor of H -> (B, T, H, V) and the state."""
        if isinstance(state, AttentionRoom):
            return self._in_place(q, k, v, state)
        batch, time = q.shape[:2]
        if state is not None:
            _check_state(state, k, v)
            state = AttentionState(*state)
        packed = state is None and mask is None and self._packs(q, v, reset)
        piece = max(PIECE, self._most() + 1)
        if self.window and not (packed or torch.compiler.is_compiling()) and time > 2 * piece:
            return self._in_pieces(piece, q, k, v, state, mask, reset)
        positions, document, length = _places(batch, time, state, mask, reset, q.device)
        q, k = self._turned(q, k, positions)
        stored = positions if mask is None else positions.masked_fill(~mask, -1)
        if state is not None:
            keys, values = (backends.emptied(x, reset) for x in state[:2])
            k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)  # (B, S, ...)
            stored = torch.cat([state.positions, stored.expand(batch, -1)], 1)
        if packed:
            y = _attend_packed(q, k, v, reset, self.window)
        else:
            plain = state is None and mask is None and reset is None and self._sees_all(time)
            visible = None if plain or (time == 1 and state is None) else self._visible(positions, stored, document)
            y = _attend(q, k, v, visible, self._dropped())
        if state is None and mask is None and reset is None and self._leaves(time):
            return y, AttentionState(*(self._ends(x) for x in (k, v, stored.expand(batch, -1))), length)
        return y, self._remember(k, v, stored.expand(batch, -1), document, length)

    def _in_place(self, q, k, v, room: AttentionRoom):
        """One token a row: its key and value are written into a free place, positions and length are new tensors.

        So whoever keeps the old positions and length of a row has its old state. No shape depends on what a row holds, and
        nothing waits; a row is read up to its last place, seen or not.
        """
        positions, place = room.length[:, None], room.positions.argmin(1, keepdim=True)  # (B, 1)
        q, k = self._turned(q, k, positions)
        for old, new in ((room.keys, k), (room.values, v)):
            old.scatter_(1, place[..., None, None].expand_as(new), backends.cast(new, old.dtype))
        positions, length = room.positions.scatter(1, place, positions), room.length + 1
        keys, values = (backends.cast(x, q.dtype) for x in room[:2])
        y = _attend(q, keys, values, (positions >= 0)[:, None, None])
        if self.window:
            positions = positions.masked_fill(~self._seen_again(positions, length), -1)
        return y, AttentionRoom(room.keys, room.values, positions, length)

    def _turned(self, q, k, positions):
        if not self.rope_base:
            return q, k
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        turn = turns(positions, self.d_head, self.rope_base, dtype)
        return rotate(q, turn), rotate(k, turn)

    def _in_pieces(self, size, q, k, v, state, mask, reset):
        # Work and memory grow with the text, and not with its square.
        ys = []
        for part in (slice(start, start + size) for start in range(0, q.shape[1], size)):
            flags = {name: flag[:, part] for name, flag in (("mask", mask), ("reset", reset)) if flag is not None}
            y, state = self(q[:, part], k[:, part], v[:, part], state, **flags)
            ys.append(y)
        return torch.cat(ys, 1), state

    def filled(self, state: AttentionState) -> AttentionState:
        """A state as long as a window lets it become, with places that nobody sees; without a window as it is."""
        return AttentionState(*longer(*state[:3], self._most()), state.length)

    def _dropped(self) -> float:
        return self.dropout if self.training else 0.0

    def _most(self) -> int:
        # As many tokens as can be seen again.
        return self.window - 1 + self.sinks if self.window else 0

    def _sees_all(self, time) -> bool:
        # A graph that is exported serves sequences within the window and beyond it.
        return self.window == 0 or (not torch.compiler.is_exporting() and self.window >= time)

    def _packs(self, q, v, reset) -> bool:
        """Whether a fused kernel takes documents one behind the other, and windows, as they are: no mask of T x T then."""
        if not q.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False  # How many documents there are is asked of the GPU, which a graph cannot.
        time, width = q.shape[1], q.shape[-1]
        wanted = time > 1 and not self.sinks and (reset is not None or 0 < self.window < time)
        fits = q.dtype in (torch.bfloat16, torch.float16) and v.shape[-1] == width <= 256 and width % 8 == 0
        return wanted and fits and not self._dropped() and not backends.traced()

    def _visible(self, positions, stored, document):
        """(B or 1, 1, T, S): which of the S tokens each of the T new ones sees."""
        time, total = positions.shape[1], stored.shape[1]
        new = torch.arange(total - time, total, device=stored.device)[:, None]
        old = torch.arange(total, device=stored.device)
        seen = (old <= new) & (stored >= 0)[:, None, :]  # (B, T, S)
        if document is not None:
            seen &= F.pad(document, (total - time, 0))[:, None, :] == document[:, :, None]
        if self.window:
            near = positions[:, :, None] < (stored + self.window)[:, None, :]
            seen &= near | (stored < self.sinks)[:, None, :] if self.sinks else near
        # A padding token sees itself, so that no softmax runs over nothing.
        return (seen | (old == new)).unsqueeze(1)

    def _remember(self, keys, values, positions, document, length):
        if document is not None:
            document = F.pad(document, (positions.shape[1] - document.shape[1], 0))
            positions = positions.masked_fill(document != document[:, -1:], -1)
        if self.window:
            size = self._most()
            if torch.compiler.is_exporting():
                keys, values, positions = longer(keys, values, positions, positions.shape[1] + size)
            elif positions.shape[1] <= size:
                return AttentionState(keys, values, positions, length)  # All of it is seen again.
            kept = (positions >= 0) & self._seen_again(positions, length)
            keys, values, positions = packed(keys, values, positions, kept, size)
        return AttentionState(keys, values, positions, length)

    def _leaves(self, time) -> bool:
        """Whether `time` tokens from nothing are more than can be seen again."""
        return not torch.compiler.is_exporting() and self.window > 0 and time > self._most()

    def _ends(self, x):
        """x (B, T, ...) at the sinks and at the last tokens of the window, as `packed` has it."""
        last = x[:, x.shape[1] - self.window + 1 :]
        if self.sinks:
            return torch.cat([x[:, : self.sinks], last], 1)
        # In training nobody keeps it, and a copy a layer costs time; elsewhere it must not hold the whole text.
        return last if torch.is_grad_enabled() else last.clone()

    def _seen_again(self, positions, length):
        return (positions > length[:, None] - self.window) | (positions < self.sinks)


def _attend(q, k, v, visible, dropped: float = 0.0):
    """q (B, T, H, D) over k (B, S, H', D), v (B, S, H', V), where `visible`, or as far as the token itself -> (B, T, H, V)."""
    groups, k, v = q.shape[2] // k.shape[2], k.transpose(1, 2), v.transpose(1, 2)
    # Fused kernels have no rule for a transform, no forward derivative, and no second one.
    plain = backends.transformed() or (backends.chosen(None) == "reference" and not torch.compiler.is_compiling())
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        if q.shape[1] == 1:
            # The queries of a group stand in line like tokens, so that keys and values need no copy.
            q = q.view(*k.shape[:2], groups, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropped)
            return y.reshape(y.shape[0], 1, -1, v.shape[-1])
        if groups > 1 and visible is not None:
            # No fused kernel takes groups and a mask at once.
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=visible, dropout_p=dropped, is_causal=visible is None,
            enable_gqa=bool(groups > 1),
        )  # fmt: skip
        return y.transpose(1, 2)


def _attend_packed(q, k, v, reset, window: int):
    """As `_attend`; a token sees the last `window` of its document, 0: all of it, and documents begin at `reset` (B, T)."""
    # What it brings along takes a second, of everybody who imports a model.
    from torch.nn.attention.varlen import varlen_attn

    (batch, time), groups = q.shape[:2], q.shape[2] // k.shape[2]
    if reset is None:
        ends = torch.arange(0, batch * time + 1, time, device=q.device, dtype=torch.int32)
    else:
        first = torch.arange(time, device=q.device) == 0
        ends = F.pad((reset | first).flatten().nonzero().flatten(), (0, 1), value=batch * time).int()
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    flat = (x.to(q.dtype).flatten(0, 1) for x in (q, k, v))
    return varlen_attn(*flat, ends, ends, time, time, window_size=(window - 1, 0)).unflatten(0, (batch, time))


def _check_state(state, keys, values):
    """A state handed in: four tensors, as AttentionState says, that fit the new keys (B, T, H, D) and values (B, T, H, V)."""
    if not isinstance(state, tuple | list) or len(state) != 4 or getattr(state[0], "ndim", 4) != 4:
        raise ValueError(
            "state is not an AttentionState, wanted keys (B, S, H, D), values, positions (B, S), length (B,)"
        )
    named = {f"state.{name}": tensor for name, tensor in zip(AttentionState._fields, state, strict=True)}
    backends.check_tensors(**named)
    size = (keys.shape[0], state[0].shape[1])
    wanted = AttentionState((*size, *keys.shape[2:]), (*size, *values.shape[2:]), size, size[:1])
    for (name, tensor), shape in zip(named.items(), wanted, strict=True):
        if tensor.shape != shape or tensor.device != keys.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}, wanted {shape} on {keys.device}"
            )
        floats = len(shape) == 4
        if tensor.is_floating_point() != floats or tensor.is_complex():
            raise TypeError(f"{name} is {tensor.dtype}, wanted {'a floating dtype' if floats else 'whole numbers'}")


def _places(batch, time, state, mask, reset, device):
    """Position of every token in its document (B or 1, T), its document (B, T) or None, and the next position (B,)."""
    length = torch.zeros(batch, dtype=torch.long, device=device) if state is None else state.length
    if mask is None and reset is None:
        steps = torch.arange(time, device=device)[None]
        return (steps if state is None else length[:, None] + steps), None, length + time
    valid = torch.ones(batch, time, dtype=torch.long, device=device) if mask is None else mask.long()
    before = valid.cumsum(1) - valid  # valid tokens before t in this call
    start = -length[:, None]
    if reset is not None:
        start = torch.where(reset, before, start).cummax(1).values
    after = before[:, -1] + valid[:, -1] - start[:, -1]
    return before - start, None if reset is None else reset.cumsum(1), after


def longer(keys, values, positions, size: int):
    """Keys, values (B, S, H, ·) and positions (B, S) with places behind that nobody sees, up to `size`."""
    missing = size - positions.shape[1]
    if missing <= 0:
        return keys, values, positions
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (keys, values))
    return keys, values, F.pad(positions, (0, missing), value=-1)


def packed(keys, values, positions, kept, size: int):
    """The same of the `kept` tokens (B, S), which move to the front by position: `size` places, where nobody sees the rest."""
    # ONNX knows no stable sort; in what order the others stand does not matter.
    order = positions.masked_fill(~kept, torch.iinfo(positions.dtype).max).argsort(dim=1)[:, :size]  # (B, S)
    kept = kept.gather(1, order)
    positions = positions.gather(1, order).masked_fill(~kept, -1)
    keys, values = (_take(x, order).masked_fill(~kept[..., None, None], 0) for x in (keys, values))
    return keys, values, positions


def _take(x, index):
    """x (B, S, H, D) at the tokens `index` (B, N)."""
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)
