"""Writing on from a prompt: it is read once, then a batch gets one token a row at a time, whole or as a stream."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.models.sampling import (
    Ends,
    Row,
    Sampling,
    Uniform,
    check_range,
    check_whole,
    is_token,
    is_whole,
    token_list,
)

# Prompts are read in pieces, so that the activations of a long one never stand whole.
PIECE = 8192
# Fills rows of a tensor result that ended early; the loss takes it for "not predicted".
FILL = -100


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


class Writing:
    """One call of generate: everything is checked and the prompt is read when it is built."""

    def __init__(self, model, prompt, max_tokens, rules: Sampling, ends: Ends, seed, state):
        check_whole("max_tokens", max_tokens)
        if seed is not None and not is_token(seed):
            raise ValueError(f"seed is {seed!r}, wanted a whole number or None")
        self.model, self.rules, self.ends = model, rules, ends
        self.max_tokens = int(max_tokens)
        if seed is None and not rules.greedy:
            # Without a seed the draws still follow torch.manual_seed.
            seed = torch.randint(2**62, ()).item()
        self.seed = seed
        self.prompt = prompt
        self.is_text, self.is_one, rows = _read_prompt(model, prompt)
        for i, row in enumerate(rows):
            where = "prompt" if self.is_one else f"prompt {i}"
            check_range(where, row, model)
            if not row and not isinstance(state, GenerationState):
                raise ValueError(f"{where} is empty, wanted at least one token, or a state of generate to go on from")
        self.limit = model.tokenizer.vocab_size if self.is_text else model.config.vocab_size
        self.rows = [Row(ends, None) for _ in rows]
        with quiet(model):
            self.start = read(model, rows, state)
        if not self.start.logits.isfinite().all():
            raise ValueError("the logits after the prompt are not finite: weights or state hold NaN or infinities")

    def finish(self, return_state: bool):
        """The whole result, shaped like the prompt; with `return_state` and the state."""
        if self.ends.strings:
            self._decode_along()
        with quiet(self.model):
            for _ in self._steps(watch=bool(self.ends)):
                pass
            return (self.result(), self.state()) if return_state else self.result()

    def stream(self, return_state: bool) -> "Stream":
        """The result of a single prompt piece by piece: text, or tokens one by one."""
        if not self.is_one:
            raise ValueError(f"stream=True wants a single prompt, not a batch of {len(self.rows)}")
        if self.is_text or self.ends.strings:
            self._decode_along()
        return Stream(self, return_state)

    def _decode_along(self):
        for row in self.rows:
            row.decoder = self.model.tokenizer.decoder()

    def _steps(self, watch: bool):
        """Chooses and feeds tokens until all rows are done; yields after each one if somebody watches."""
        now, rules, chosen = self.start, self.rules, []
        seen = None if rules.repetition_penalty == 1 else now.seen.clone()
        uniform = None if rules.greedy else Uniform(self.seed, now.drawn.tolist())
        layers, logits, tokens, count = now.layers, now.logits, None, 0
        for count in range(self.max_tokens):
            if count:
                x, layers = self.model.hidden(tokens[:, None], layers)
                logits = self.model.logits(x[:, -1])
            said = None if seen is None else seen[:, : self.limit]
            tokens = rules.choose(logits[:, : self.limit], said, uniform)  # (B,)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            if watch:
                for row, token in zip(self.rows, tokens.tolist(), strict=True):
                    row.feed(token)
                yield
                if all(row.done for row in self.rows):
                    break
            else:
                chosen.append(tokens)
        # Unwatched tokens are fetched once, at the end: an accelerator is never waited for in between.
        if chosen:
            for row, tokens in zip(self.rows, torch.stack(chosen, 1).tolist(), strict=True):
                row.tokens = tokens
        self.last = layers, logits, count

    def _kept(self) -> list[list[int]]:
        decode = None if self.model.tokenizer is None else self.model.tokenizer.decode
        return [row.kept(decode) for row in self.rows]

    def result(self):
        """What was written, shaped like the prompt."""
        if self.is_text:
            texts = [row.written(self.model.tokenizer.decode) for row in self.rows]
            return texts[0] if self.is_one else texts
        rows = self._kept()
        if isinstance(self.prompt, Tensor):
            longest = max(map(len, rows))
            filled = [row + [FILL] * (longest - len(row)) for row in rows]
            result = torch.tensor(filled, dtype=torch.int64, device=self.prompt.device).view(len(rows), longest)
            return result[0] if self.is_one else result
        return rows[0] if self.is_one else rows

    def state(self) -> GenerationState:
        """The state after the result of every row."""
        kept, start = self._kept(), self.start
        layers, logits, count = self.last
        if all(len(row) >= count for row in kept):
            now = start._replace(layers=layers, logits=logits, seen=_mark(start.seen, [row[:count] for row in kept]))
            now = read(self.model, [row[count:] for row in kept], now)
        else:
            # A row ended before the others, or before its stop: the results are read again, from the end of the prompt.
            now = read(self.model, kept, start)
        drawn = start.drawn + torch.tensor([len(row) for row in kept], device=start.drawn.device)
        with torch.inference_mode(False):
            return _released(now._replace(drawn=drawn))


class Stream:
    """Iterator over the pieces of a result; `state` is the state after the last one, when it was asked for."""

    def __init__(self, writing: Writing, return_state: bool):
        self.state = None
        self._model = writing.model
        self._pieces = self._run(writing, return_state)

    def __iter__(self):
        return self

    def __next__(self):
        # Around every piece, not around the loop: nothing of it may reach the code that takes the pieces.
        with quiet(self._model):
            return next(self._pieces)

    def _run(self, writing, return_state):
        row, shown = writing.rows[0], 0
        for _ in writing._steps(watch=True):
            if row.done:
                continue
            sure = row.sure_characters() if writing.is_text else row.sure_tokens()
            if sure > shown:
                yield from _pieces(row.text if writing.is_text else row.tokens, shown, sure)
                shown = sure
        if return_state:
            self.state = writing.state()
        result = writing.result()
        yield from _pieces(result, shown, len(result))


def _pieces(written: str | list, start: int, end: int):
    """A text goes out whole, tokens one by one."""
    piece = written[start:end]
    return [piece] * bool(piece) if isinstance(written, str) else piece


@contextmanager
def quiet(model):
    """Inference alone, every module in eval mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        # A tenth to a fifth faster per token than no_grad, where layers are small.
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _released(value):
    """A copy of a state that may take part in training: tensors born in inference mode may not."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        inner = [_released(item) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


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
    for start in range(0, longest, PIECE):
        piece = tokens[:, start : start + PIECE]
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
    return GenerationState(layers, logits, _mark(seen, rows), drawn)


def _mark(seen: Tensor, rows) -> Tensor:
    seen = seen.clone()
    for i, row in enumerate(rows):
        seen[i, torch.tensor(row, dtype=torch.int64, device=seen.device)] = True
    return seen


def _check_rows(model, state: GenerationState | None, count: int):
    if state is not None and state.logits.shape != (count, model.config.vocab_size):
        held, tokens = state.logits.shape
        wanted = f"{count} of the prompt over the model's {model.config.vocab_size}"
        raise ValueError(f"state holds {held} rows over {tokens} tokens, wanted {wanted}")


def _read_prompt(model, prompt) -> tuple[bool, bool, list[list[int]]]:
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
