"""Look inside a running model: what the gates of every head do, how long it remembers, how far its stabiliser runs.

with record(model) as seen:       # every call of an operator leaves a Gates in `seen`; outside, nothing is different
    model(tokens)
for head in summary(seen): ...    # one Head per layer and head

Forget horizon: after `horizon` tokens a memory has faded to 1/e at the head's average pace, -1 / mean(log f), which is
1 / (1 - f) for f near 1. Blocks without a forget gate of ours (attention, lstm) leave nothing.
"""

from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from exlstm.models.stack import BLOCKS, Block, Stack
from exlstm.ops import backend as backends
from exlstm.ops import mlstm, slstm


class Gates(NamedTuple):
    """The gates of one layer over one call, (B, T, H) or, where every unit has its own, (B, T, H, D), in log space.

    Layers are numbered as they stand in the model, those without gates too; of a bidirectional xLSTM a number each direction.
    Padding stands as log_i = -inf, log_f = 0. m is the stabiliser after every token.
    """

    layer: int
    block: str
    log_i: Tensor
    log_f: Tensor
    m: Tensor


class Head(NamedTuple):
    """What one head did over a text."""

    layer: int
    block: str
    head: int
    forget: float
    """mean forget gate, 0 to 1"""
    horizon: float
    """tokens after which a memory has faded to 1/e, the median over the units of an sLSTM head; inf: never"""
    log_i: float
    """mean input gate, in nats"""
    log_i_std: float
    """its standard deviation over the text, in nats"""
    m: float
    """largest |m| of the stabiliser, in nats"""


@contextmanager
def record(model):
    """A list that receives one Gates for every operator call of `model` inside the block: a Stack, an xLSTM, a layer, or what
    holds any of them.

    The operators run on the implementation they would run on anyway, with the same results. Works on eager models.

    >>> stack = Stack(StackConfig(d_model=64, blocks=["mlstm", "slstm"]))
    >>> with torch.no_grad(), record(stack) as seen:
    ...     _ = stack(torch.randn(1, 100, 64))
    >>> longest = max(summary(seen), key=lambda head: head.horizon)
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no Stack, xLSTM or layer to look into")
    seen, running = [], [0, ""]

    def enter(index, block):
        def hook(*_):
            running[:] = index, block

        return hook

    rows = {mlstm: _watched_mlstm, slstm: _watched_slstm}
    chosen = backends.chosen(None)
    with ExitStack() as undo:
        for index, (block, kind) in enumerate(layers):
            undo.callback(block.register_forward_pre_hook(enter(index, kind)).remove)
        # A row of its own in the operators' tables sees every call and passes it on.
        name = f"record {id(seen):x}"
        for operator, watched in rows.items():
            table = operator.IMPLEMENTATIONS
            table[name] = watched(chosen, lambda *gates: seen.append(Gates(*running, *gates)))
            undo.callback(table.pop, name)
        undo.enter_context(backends.backend(name))
        yield seen


def _layers(model) -> list[tuple[torch.nn.Module, str]]:
    """The blocks of a model, and the mixers that stand in none, with their kinds, in the model's order."""
    inside, found = set(), []
    for module in model.modules():
        if id(module) in inside:
            continue
        here = []
        if isinstance(module, Stack):
            here = list(zip(module.blocks, module.config.layers(), strict=True))
        elif kinds := [k for k, row in BLOCKS.items() if isinstance(getattr(module, "mixer", module), row[0])]:
            here = [(module, kinds[0])] if isinstance(module, Block | BLOCKS[kinds[0]][0]) else []
        if here:
            found += here
            inside |= {id(part) for part in module.modules()}
    return found


def _watched_mlstm(chosen, keep):
    def run(*row):
        q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk = row
        memory, how = mlstm.MLSTMState(c, n, m), {"scale": scale, "normalize": normalize, "eps": eps, "chunk": chunk}
        h, memory = mlstm.mlstm(q, k, v, log_i, log_f, memory, reset=reset, backend=chosen, **how)
        with torch.no_grad():
            keep(log_i.detach(), log_f.detach(), _stabiliser(log_i, log_f, m, reset, torch.zeros_like(m)))
        return h, *memory

    return run


def _watched_slstm(chosen, keep):
    def run(x, r, h, c, n, m, reset, mask):
        hs, memory = slstm.slstm(x, r, slstm.SLSTMState(h, c, n, m), reset=reset, mask=mask, backend=chosen)
        with torch.no_grad():
            before = _previous(h, hs.to(h.dtype), reset, mask)
            g = x.to(m.dtype) + torch.einsum("hgoi,bthi->bthgo", r.to(m.dtype), before)
            log_i, log_f = g[..., 0, :], logsigmoid(g[..., 1, :])  # (B, T, H, D)
            if mask is not None:
                log_i = log_i.masked_fill(~mask[..., None, None], float("-inf"))
                log_f = log_f.masked_fill(~mask[..., None, None], 0.0)
            empty = torch.full_like(m, float("-inf"))
            keep(log_i, log_f, _stabiliser(log_i, log_f, torch.where(n > 0, m, empty), reset, empty))
        return hs, *memory

    return run


def _previous(h, hs, reset, mask):
    """h_{t-1} (B, T, H, D): the output at the last token that was no padding; before it the first h, 0 after a reset."""
    steps = torch.arange(hs.shape[1], device=hs.device).expand(hs.shape[:2])
    last = steps if mask is None else torch.where(mask, steps, -1).cummax(1).values
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)  # before t
    history = torch.cat([h[:, None], hs], 1)  # (B, 1 + T, H, D)
    previous = history[torch.arange(len(hs), device=hs.device)[:, None], last + 1]
    if reset is None:
        return previous
    # Padding may be reset, too: the next token finds nothing.
    emptied = torch.where(reset, steps, -1).cummax(1).values > last
    return previous.masked_fill(emptied[..., None, None], 0)


def _stabiliser(log_i, log_f, m, reset, empty):
    """m_t = max(log_f_t + m_{t-1}, log_i_t) of every token, shaped like the gates."""
    steps = []
    for t in range(log_i.shape[1]):
        if reset is not None:
            m = torch.where(reset[:, t].view(-1, *[1] * (m.ndim - 1)), empty, m)
        m = torch.maximum(log_f[:, t] + m, log_i[:, t])
        steps.append(m)
    return torch.stack(steps, 1)


def summary(seen: list[Gates]) -> list[Head]:
    """One Head per layer and head over all recorded calls, padding left out."""
    heads = []
    for layer in sorted({gates.layer for gates in seen}):
        calls = [gates for gates in seen if gates.layer == layer]
        log_i, log_f, m = (_flat([getattr(gates, name) for gates in calls]) for name in ("log_i", "log_f", "m"))
        valid = log_i > float("-inf")
        count = valid.sum(0).clamp(min=1)
        pace = log_f.where(valid, 0).sum(0).abs() / count  # (H, D)
        mean = log_i.where(valid, 0).sum(0) / count
        spread = ((log_i - mean).square().where(valid, 0).sum(0) / count).sqrt()
        forget = log_f.exp().where(valid, 0).sum(0) / count
        horizon = 1 / pace.quantile(0.5, -1)
        reach = m.abs().where(m.isfinite(), 0).amax((0, 2))
        for h in range(pace.shape[0]):
            numbers = forget[h].mean(), horizon[h], mean[h].mean(), spread[h].mean(), reach[h]
            heads.append(Head(layer, calls[0].block, h, *(number.item() for number in numbers)))
    return heads


def _flat(tensors):
    """(tokens, H, D or 1) in float64 of tensors (B, T, H) or (B, T, H, D)."""
    return torch.cat([t.flatten(0, 1).reshape(t.shape[0] * t.shape[1], t.shape[2], -1).double() for t in tensors])
