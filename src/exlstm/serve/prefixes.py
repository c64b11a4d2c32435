"""States of prompts that were read, so that a prompt that begins alike is read from there on.

Prompts are read in pieces of PIECE tokens from their beginning, whoever reads them: a state that is found is, bit for bit, the
one that reading again would give.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

import torch

from exlstm.models.reading import GenerationState, leaves, mapped, read

PIECE = 512


class Prefixes:
    """The states behind whole pieces that were used last, of up to so many bytes together."""

    def __init__(self, size: int):
        self.size, self.used = size, 0
        self._states: OrderedDict[bytes, tuple[GenerationState, int]] = OrderedDict()

    def find(self, keys: list[bytes]) -> tuple[int, GenerationState | None]:
        """How many pieces of a prompt with these keys need not be read, and the state behind them."""
        for count in range(len(keys), 0, -1):
            if keys[count - 1] in self._states:
                self._states.move_to_end(keys[count - 1])
                return count, self._states[keys[count - 1]][0]
        return 0, None

    def keep(self, key: bytes, state: GenerationState):
        """Keeps a copy, and forgets what was not used for longest."""
        size = sum(x.numel() * x.element_size() for x in leaves(state))
        if key in self._states or size > self.size:
            return
        while self.used + size > self.size:
            _, (_, gone) = self._states.popitem(last=False)
            self.used -= gone
        self._states[key] = mapped(torch.clone, state), size
        self.used += size


class Reading:
    """A prompt on its way to its state, a piece at a time."""

    def __init__(self, reader, prompt: list[int], prefixes: Prefixes):
        self.reader, self.prompt, self.prefixes = reader, prompt, prefixes
        self.keys = chain(prompt) if prefixes.size else []
        count, self.state = prefixes.find(self.keys)
        self.at = self.found = count * PIECE

    @property
    def done(self) -> bool:
        return self.at >= len(self.prompt)

    def step(self):
        """Reads one more piece."""
        piece = self.prompt[self.at : self.at + PIECE]
        with torch.inference_mode():
            self.state = read(self.reader, [piece], self.state)
            self.at += len(piece)
            if self.keys and self.at % PIECE == 0:
                self.prefixes.keep(self.keys[self.at // PIECE - 1], self.state)


def chain(prompt: list[int]) -> list[bytes]:
    """A key for every whole piece and all that stands in front of it."""
    keys, last = [], b""
    for start in range(0, len(prompt) - PIECE + 1, PIECE):
        last = hashlib.sha256(last + array("q", prompt[start : start + PIECE]).tobytes()).digest()
        keys.append(last)
    return keys
