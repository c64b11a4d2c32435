"""A request to an engine, and the sequence that it becomes: what was asked, and what is written so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from exlstm.models.reading import GenerationState, read_prompt
from exlstm.models.sampling import Ends, Row, Sampling, check_range, check_whole, is_token


@dataclass(frozen=True)
class Request:
    """What a sequence is to write: the arguments of `LanguageModel.generate` for a single prompt."""

    prompt: Any
    max_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Any = None
    eos: Any = None
    seed: int | None = None
    state: Any = None
    """of `generate`, `forward`, or another sequence: what the prompt follows"""

    def rules(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


class Sequence:
    """A request in a slot and what it has written so far, prompt, stop and eos left out.

    `done` says why it ended: "stop", "length", "error" where a step failed, or None while it writes. `slot` is None once it
    was removed.
    """

    def __init__(self, model, request: Request, row: Row | None = None, stream: int = 0):
        check_whole("max_tokens", request.max_tokens)
        if request.seed is not None and not is_token(request.seed):
            raise ValueError(f"seed is {request.seed!r}, wanted a whole number or None")
        self.request, self.rules, self.stream = request, request.rules(), stream
        self.row = row or Row(Ends(request.stop, request.eos, model), None)
        self.is_text, is_one, rows = read_prompt(model, request.prompt)
        if not is_one:
            raise ValueError(f"prompt holds {len(rows)} rows, wanted a single one: a request is a sequence")
        (self.prompt,) = rows
        check_range("prompt", self.prompt, model)
        if not self.prompt and not isinstance(request.state, GenerationState):
            raise ValueError("prompt is empty, wanted at least one token, or a state of generate to go on from")
        self.limit = model.tokenizer.vocab_size if self.is_text else model.config.vocab_size
        self.seed = request.seed
        if self.seed is None and not self.rules.greedy:
            self.seed = torch.randint(2**62, (), device="cpu").item()
        self._tokenizer = model.tokenizer
        if row is None and (self.is_text or self.row.ends.strings):
            self.row.decoder = model.tokenizer.decoder()
        self.slot: int | None = None
        self.entered = False
        self.launched = self.shown = self.drawn = self.consumed = self.held = 0
        self.done: str | None = None if request.max_tokens else "length"

    def writes_text(self):
        """Text of the tokens that the tokenizer knows, whatever the prompt was; before the sequence enters an engine."""
        self.is_text, self.limit = True, self._tokenizer.vocab_size
        self.row.decoder = self.row.decoder or self._tokenizer.decoder()

    def decode_as(self, other: Sequence):
        """Text where the other one writes text, of the same tokens."""
        self.is_text, self.limit = other.is_text, other.limit
        if self.is_text and self.row.decoder is None:
            self.row.decoder = self._tokenizer.decoder()

    @property
    def tokens(self) -> list[int]:
        """The tokens of the result so far."""
        return list(self.row.kept(self._decode()))

    def _decode(self):
        return None if self._tokenizer is None else self._tokenizer.decode

    @property
    def text(self) -> str:
        """The text of the result so far."""
        if self._tokenizer is None:
            raise ValueError("the sequence has no text: model.tokenizer is None")
        return self.row.written(self._tokenizer.decode)

    def fresh(self):
        """What is sure since the last call: text where the prompt was text, else tokens. What may yet become a stop waits."""
        row, is_text = self.row, self.is_text
        if self.done:
            whole = self.text if is_text else self.tokens
            sure = len(whole)
        else:
            whole = row.text if is_text else row.tokens
            sure = row.sure_characters() if is_text else row.sure_tokens()
        piece = whole[self.shown : max(sure, self.shown)]
        self.shown = max(sure, self.shown)
        return piece
