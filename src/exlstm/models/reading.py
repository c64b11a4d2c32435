"""Reading a prompt: batches of tokens become states, from which writing goes on."""

from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.layers.attention import AttentionState, longer
from exlstm.models.sampling import is_whole, token_list
from exlstm.ops.backend import portable

# Prompts are read in pieces, so that the activations of a long one never stand whole: tokens a row on a CPU, and in all rows.
PIECE, TOKENS = 8192, 32768


class GenerationState(NamedTuple):
    """What goes on: the state after every token of prompt and result, and what choosing the next one needs.

    `layers` is the state that the model's forward takes; forward also takes the whole.
    """

    layers: tuple
    logits: Tensor
    """of the token that comes next (B, V)"""
    seen: Tensor
    """tokens of prompt and result so far (B, V) bool, for the repetition penalty"""
    drawn: Tensor
    """number of tokens chosen so far (B,) int64: where the random numbers go on"""


portable(GenerationState)


def evaluating(model):
    """The model in eval mode, as modules of their own over the same parameters, buffers and hooks.

    The mode of `model` itself is left alone, also for a moment: another thread may train it, or write with it, meanwhile.
    """
    return _twin(model, {})


def _twin(module, twins):
    if module is None or module in twins:
        return twins.get(module)
    compiled = module._modules.get("_orig_mod")
    if compiled is not None and module.training:
        # A compiled call leads to the very module that was compiled, and would run in its mode.
        twins[module] = _twin(compiled, twins)
        return twins[module]
    twin = twins[module] = object.__new__(type(module))
    vars(twin).update(vars(module), training=False)
    vars(twin)["_modules"] = {name: _twin(child, twins) for name, child in module._modules.items()}
    if module.training:
        vars(twin)["_compiled_call_impl"] = None
    return twin


def read(model, rows: list[list[int]], state) -> GenerationState:
    """The state after further tokens of every row; a row may have none where `state` is one of generate."""
    before = state if isinstance(state, GenerationState) else None
    _check_rows(model, before, len(rows))
    layers = state if before is None else before.layers
    device, counts = model.embedding.weight.device, [len(row) for row in rows]
    longest = max(counts)
    if longest == 0:
        return before
    lengths = None if min(counts) == longest else torch.tensor(counts, device=device)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, T)
    last = None
    size = min(PIECE if device.type == "cpu" else TOKENS, max(64, TOKENS // len(rows)))
    for start in range(0, longest, size):
        piece = tokens[:, start : start + size]
        if lengths is None:
            x, layers = model.hidden(piece, layers)
            last = x[:, -1]  # (B, D)
            continue
        valid = (lengths - start).clamp(0, piece.shape[1])
        x, layers = model.hidden(piece, layers, lengths=valid)
        end = x[torch.arange(len(rows), device=device), (valid - 1).clamp(min=0)]
        last = end if last is None else torch.where((valid > 0)[:, None], end, last)
    logits = model.logits(last)
    if before is None:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        drawn = torch.zeros(len(rows), dtype=torch.int64, device=device)
    else:
        seen, drawn = before.seen, before.drawn
        if lengths is not None:
            logits = torch.where((lengths > 0)[:, None], logits, before.logits)
    return GenerationState(layers, logits, mark(seen, rows), drawn)


def mark(seen: Tensor, rows) -> Tensor:
    seen = seen.clone()
    for i, row in enumerate(rows):
        seen[i, torch.tensor(row, dtype=torch.int64, device=seen.device)] = True
    return seen


def _check_rows(model, state: GenerationState | None, count: int):
    if state is not None and state.logits.shape != (count, model.config.vocab_size):
        held, tokens = state.logits.shape
        wanted = f"{count} of the prompt over the model's {model.config.vocab_size}"
        raise ValueError(f"state holds {held} rows over {tokens} tokens, wanted {wanted}")


def read_prompt(model, prompt) -> tuple[bool, bool, list[list[int]]]:
    """Whether the prompt is text, whether it is a single one, and its rows of tokens."""
    if isinstance(prompt, Tensor):
        if not is_whole(prompt.dtype) or prompt.ndim not in (1, 2):
            came = f"{prompt.dtype} of shape {tuple(prompt.shape)}"
            raise ValueError(f"prompt is {came}, wanted whole numbers of (T,) or (B, T)")
        if prompt.ndim == 2 and len(prompt) == 0:
            raise ValueError("prompt holds no row")
        return False, prompt.ndim == 1, [prompt.tolist()] if prompt.ndim == 1 else prompt.tolist()
    texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list | tuple) else None
    if texts and all(isinstance(text, str) for text in texts):
        if model.tokenizer is None:
            raise ValueError("prompt is text, and model.tokenizer is None; set it, or give tokens as whole numbers")
        return True, isinstance(prompt, str), [list(model.tokenizer.encode(text)) for text in texts]
    rows = token_list(prompt)
    if rows is not None:
        return False, True, [rows]
    rows = None if texts is None else [token_list(row) for row in texts]
    if rows is None or None in rows:
        raise ValueError(f"prompt is {_shown(prompt)}, wanted text, tokens (a list or tensor), or a list of those")
    return False, False, rows


def _shown(prompt) -> str:
    if isinstance(prompt, list | tuple):
        return f"a list of {', '.join(sorted({type(p).__name__ for p in prompt}))}"
    return type(prompt).__name__


# States as trees of tensors


def leaves(state) -> list[Tensor]:
    """The tensors of a state in their order."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for item in state for leaf in leaves(item)] if isinstance(state, tuple | list) else []


def mapped(call, *states, kind=Tensor):
    """The state whose tensors, or what else is of this `kind`, are `call` of those of states of one structure."""
    first = states[0]
    if isinstance(first, kind):
        return call(*states)
    if isinstance(first, tuple | list):
        items = [mapped(call, *inner, kind=kind) for inner in zip(*states, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


def joined(states):
    """States of some rows as one of all; what attention remembers of fewer tokens gets places that nobody sees."""
    return mapped(_joined, *states, kind=(Tensor, AttentionState))


def _joined(*states):
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    size = max(state.keys.shape[1] for state in states)
    rows = ((*longer(*state[:3], size), state.length) for state in states)
    return AttentionState(*map(torch.cat, zip(*rows, strict=True)))


def released(state):
    """A copy of a state that may take part in training: tensors born in inference mode may not."""
    with torch.inference_mode(False):
        return mapped(Tensor.clone, state)
