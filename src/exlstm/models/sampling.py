"""How the next token is chosen from its logits, and what ends a row.

The random number of token t in row r is a function of (seed, r, t) alone: a row draws the same in every batch and on
every device, and a continuation draws what the uninterrupted run would have drawn.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

# Random numbers are drawn by this many at once.
BLOCK = 64

# What a rule can be in float32; more means the same.
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits: penalty, temperature, top k, top p, min p, one after the other."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        _number("temperature", self.temperature, lambda x: x >= 0, "of at least 0")
        check_whole("top_k", self.top_k)
        _number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and up to 1")
        _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        _number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def choose(self, logits: Tensor, seen: Tensor | None, uniform) -> Tensor:
        """Tokens (B,) for logits (B, V); `seen` (B, V) bool loses, `uniform()` gives numbers (B, 1) in [0, 1)."""
        if seen is not None:
            penalty = min(self.repetition_penalty, LARGEST)
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.greedy:
            return logits.argmax(-1)
        # The largest becomes 0 first: a temperature near 0 must not make inf - inf.
        logits = (logits - logits.amax(-1, keepdim=True)) / min(max(self.temperature, 1e-30), LARGEST)
        order = None
        if 0 < self.top_k < logits.shape[-1]:
            logits, order = _largest(logits, self.top_k)
        elif self.top_p < 1:
            logits, order = logits.sort(descending=True, stable=True)
        p = logits.softmax(-1)
        if self.top_p < 1:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0)
        below = p.cumsum(-1)  # (B, k or V)
        total = below[:, -1:].contiguous()
        index = torch.searchsorted(below, uniform().to(below.device) * total, right=True)
        # The product may round up to the total: the last token that has a probability is the end.
        index = torch.minimum(index, torch.searchsorted(below, total)).clamp(max=below.shape[-1] - 1)
        return (index if order is None else order.gather(-1, index)).squeeze(-1)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (B, V) and their places: equal ones in the order of their places, as a stable sort has them."""
    if logits.device.type != "cpu":
        values, places = logits.sort(descending=True, stable=True)
        return values[:, :count], places[:, :count]
    # A sort of all takes ten times as long. topk alone leaves open which of equal logits it takes, and 16 bits have many.
    last = logits.topk(count).values[:, -1:]
    reach = max(count, int((logits >= last).sum(-1).max()))
    places = logits.topk(reach).indices.sort(-1).values
    values, order = logits.gather(-1, places).sort(descending=True, stable=True)
    return values[:, :count], places.gather(-1, order[:, :count])


def numbers_of(seed: int, row: int, block: int, generator: torch.Generator) -> Tensor:
    """The random numbers (BLOCK,) of tokens from block · BLOCK on; `generator` is only a tool."""
    digest = hashlib.sha256(f"{int(seed)} {row} {block}".encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(BLOCK, generator=generator, dtype=torch.float32, device="cpu")


class Uniform:
    """Random numbers in [0, 1), one stream a row, from position `drawn` on."""

    def __init__(self, seed: int, drawn: list[int]):
        self.seed, self.at = seed, drawn
        self.generator = torch.Generator("cpu")
        self.blocks = [self._block(row, at // BLOCK) for row, at in enumerate(drawn)]

    def _block(self, row, block) -> list[float]:
        return numbers_of(self.seed, row, block, self.generator).tolist()

    def __call__(self) -> Tensor:
        numbers = []
        for row, at in enumerate(self.at):
            numbers.append([self.blocks[row][at % BLOCK]])
            self.at[row] = at + 1
            if self.at[row] % BLOCK == 0:
                self.blocks[row] = self._block(row, self.at[row] // BLOCK)
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")


class Ends:
    """What ends a row and is left out of the result: `strings`, `sequences` of tokens, and single tokens `eos`."""

    def __init__(self, stop, eos, model):
        stops = [] if stop is None else [stop] if isinstance(stop, str) else _listed(stop)
        if stops is not None and stops and all(is_token(s) for s in stops):
            stops = [stops]
        if stops is None or not all(isinstance(s, str) or token_list(s) is not None for s in stops):
            raise ValueError(f"stop is {stop!r}, wanted a text or a list of tokens, or a list of those")
        if any(len(s) == 0 for s in stops):
            raise ValueError("stop holds an empty text or sequence, which would end before it began")
        self.strings = [s for s in stops if isinstance(s, str)]
        # Longest first: of those that end at the same token, the one that began first is left out.
        self.sequences = sorted((token_list(s) for s in stops if not isinstance(s, str)), key=len, reverse=True)
        if self.strings and model.tokenizer is None:
            raise ValueError("stop is text, and model.tokenizer is None; set it, or give stop as a list of tokens")
        eos = list(eos) if isinstance(eos, set | frozenset) else eos
        tokens = [] if eos is None else [eos] if is_token(eos) else token_list(eos)
        if tokens is None:
            raise ValueError(f"eos is {eos!r}, wanted a token or a list of tokens")
        self.eos = frozenset(tokens)
        check_range("eos", tokens, model)
        for sequence in self.sequences:
            check_range("stop", sequence, model)

    def __bool__(self):
        return bool(self.strings or self.sequences or self.eos)


class Row:
    """What one row has written: tokens, and their text where somebody asks for it."""

    def __init__(self, ends: Ends, decoder):
        self.ends, self.decoder = ends, decoder
        self.tokens, self.text, self.lengths = [], "", []
        self.done, self.cut = False, None

    def feed(self, token: int):
        if self.done:
            return
        if token in self.ends.eos:
            self.done = True
            return
        self.tokens.append(token)
        if self.decoder is not None:
            before = len(self.text)
            self.text += self.decoder.push(token)
            self.lengths.append(len(self.text))
            found = [(self.text.find(s, max(0, before - len(s) + 1)), s) for s in self.ends.strings]
            # The stop that is complete first ends the row, the longest of those: whatever the tokens are.
            found = [(start + len(s), start) for s, start in ((s, start) for start, s in found) if start >= 0]
            if found:
                self.done, self.cut = True, min(found)[1]
        for sequence in self.ends.sequences:
            if not self.done and self.tokens[-len(sequence) :] == sequence:
                self.done = True
                del self.tokens[-len(sequence) :]

    def kept(self, decode) -> list[int]:
        """The tokens of the result; one that holds a part of the stop text is not among them."""
        if self.cut is None:
            return self.tokens
        count = bisect_right(self.lengths, self.cut)
        while count and not self.text[: self.cut].startswith(decode(self.tokens[:count])):
            count -= 1
        return self.tokens[:count]

    def written(self, decode) -> str:
        return decode(self.tokens) if self.cut is None else self.text[: self.cut]

    def sure_tokens(self) -> int:
        """How many tokens stay in the result whatever comes."""
        sure = len(self.tokens) - _overlap(self.tokens, self.ends.sequences)
        if self.ends.strings:
            # A token may hold the beginning of a character that its text does not show yet.
            sure = min(sure, bisect_left(self.lengths, self._sure_text()))
        return sure

    def sure_characters(self) -> int:
        """How many characters stay in the result whatever comes."""
        tokens = len(self.tokens) - _overlap(self.tokens, self.ends.sequences)
        return min(self._sure_text(), self.lengths[tokens - 1] if tokens else 0)

    def _sure_text(self) -> int:
        return len(self.text) - _overlap(self.text, self.ends.strings)


def _overlap(written, stops) -> int:
    """The length of the longest end of `written` that begins one of `stops`."""
    sizes = (k for s in stops for k in range(1, min(len(s), len(written) + 1)) if written[-k:] == s[:k])
    return max(sizes, default=0)


def is_token(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def token_list(value) -> list[int] | None:
    """Plain whole numbers, or None when `value` is anything else."""
    if isinstance(value, Tensor) and value.ndim == 1 and is_whole(value.dtype):
        return value.tolist()
    value = _listed(value)
    return None if value is None or not all(map(is_token, value)) else [int(v) for v in value]


def _listed(value) -> list | None:
    return list(value) if isinstance(value, list | tuple) else None


def check_range(name: str, tokens: list[int], model):
    size = model.config.vocab_size
    wrong = next((t for t in tokens if not 0 <= t < size), None)
    if wrong is not None:
        raise ValueError(f"{name} holds token {wrong}, wanted 0 to {size - 1}")


def _number(name: str, value, fits, wanted: str):
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} is {value!r}, wanted a number {wanted}")


def check_whole(name: str, value):
    if not is_token(value) or value < 0:
        raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 0")
