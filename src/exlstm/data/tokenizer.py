"""Text to tokens and back: bytes, characters, or a byte-level BPE trained on the text.

Every token stands for a fixed piece of UTF-8, `pieces[id]`: the bytes of a text are the pieces of its tokens in a row,
and a multi-byte character may be spread over several tokens. Neither numpy nor tokenizers is imported before it is
used, so that a config can look its tokenizer up for nothing.
"""

from __future__ import annotations

import codecs
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence

BPE_SIZE = 4096
# A text is given to the BPE in slices of about this many characters: bounded memory, and work for every core.
SLICE = 1 << 16
LINE_END = re.compile(r"(?<=\S)\r?\n")
# Characters that a BPE learns from: more teach it little.
FIT = 1 << 26
PROBE = "für 2 €\n\n  x"


class Decoder:
    """Tokens one at a time into text; a character comes out whole, as soon as its last byte is there."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        return self.utf8.decode(_join(self.pieces, [token]))

    def flush(self) -> str:
        """What an unfinished character at the end stands for: U+FFFD, or nothing. The decoder is then as new."""
        rest = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return rest


class Bytes:
    """The 256 bytes of UTF-8: no vocabulary to learn, no text that it cannot take."""

    def __init__(self):
        self.pieces = [bytes([i]) for i in range(256)]

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int = 0, held_out: Iterable[str] = ()) -> Bytes:
        """The same for every text."""
        return cls()

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text."""
        return list(_bytes(text))

    def array(self, text: str | bytes):
        """The tokens as a numpy array (N,)."""
        import numpy as np

        return np.frombuffer(_bytes(text), np.uint8)

    def bytes(self, tokens: Iterable[int]) -> bytes:
        """The UTF-8 of tokens."""
        return _join(self.pieces, tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.bytes(tokens).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """Decodes one token at a time."""
        return Decoder(self.pieces)

    def to_dict(self) -> dict:
        """What JSON keeps of it."""
        return {"kind": "bytes"}

    @classmethod
    def from_dict(cls, values: dict) -> Bytes:
        """The tokenizer of `to_dict`."""
        _check(values, "bytes")
        return cls()


class Characters:
    """One token a character (Unicode code point) of the text that it was made from, in their order."""

    def __init__(self, characters: str):
        if not isinstance(characters, str) or not characters:
            raise ValueError(f"characters is {characters!r}, wanted a text with at least one character")
        self.characters = "".join(sorted(set(characters)))
        self.pieces = [c.encode() for c in self.characters]

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int = 0, held_out: Iterable[str] = ()) -> Characters:
        """All characters of the texts, the held-out ones among them: it knows no other way to write them."""
        found = set()
        for text in itertools.chain(texts, held_out):
            found |= set(text)
        return cls("".join(found))

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text. ValueError: a character that is not among them."""
        return self.array(text).tolist()

    def array(self, text: str | bytes):
        """The tokens as a numpy array (N,). ValueError: a character that is not among them."""
        import numpy as np

        text = _text(text)
        known, codes = (np.frombuffer(t.encode("utf-32-le"), "<u4") for t in (self.characters, text))
        tokens = np.searchsorted(known, codes).clip(max=len(known) - 1)
        unknown = known[tokens] != codes
        if unknown.any():
            strange = text[int(unknown.argmax())]
            few = "".join(c for c in self.characters if c.isprintable())[:60]
            raise ValueError(
                f"the character {strange!r} (U+{ord(strange):04X}) is not among the {self.vocab_size} known ones: {few}"
            )
        return tokens

    def bytes(self, tokens: Iterable[int]) -> bytes:
        """The UTF-8 of tokens."""
        return _join(self.pieces, tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        return self.bytes(tokens).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """Decodes one token at a time."""
        return Decoder(self.pieces)

    def to_dict(self) -> dict:
        """What JSON keeps of it."""
        return {"kind": "characters", "characters": self.characters}

    @classmethod
    def from_dict(cls, values: dict) -> Characters:
        """The tokenizer of `to_dict`."""
        return cls(_check(values, "characters", "characters"))


class BPE:
    """Byte-pair encoding over bytes (arXiv 1508.07909, as in GPT-2): takes every text, and gives it back exactly."""

    def __init__(self, definition: str):
        tokenizers = _tokenizers()
        try:
            self.inner = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:
            raise ValueError(f"this is not a BPE that the package tokenizers can read: {error}") from None
        letters = byte_letters()
        vocabulary = self.inner.get_vocab()
        names = sorted(vocabulary, key=vocabulary.get)
        # Added tokens, as GPT-NeoX's runs of spaces, are spelt as they stand in the text.
        added = {token.content for token in self.inner.get_added_tokens_decoder().values()}
        spelt = {c for name in names if name not in added for c in name}
        if spelt != letters.keys() or vocabulary[names[-1]] != len(names) - 1:
            raise ValueError("this tokenizer is not a byte-level BPE: its tokens do not stand for bytes")
        self.pieces = [name.encode() if name in added else bytes(letters[c] for c in name) for name in names]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(f"this tokenizer does not give a text back as it was: {PROBE!r} changes")

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int = 0, held_out: Iterable[str] = ()) -> BPE:
        """Learns up to `vocab_size` tokens (0: BPE_SIZE) from the texts, FIT characters of them; few give fewer."""
        tokenizers = _tokenizers()
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size or BPE_SIZE,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(_first(texts, FIT), trainer)
        return cls(inner.to_str())

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text."""
        return [token for part in self._parts(text) for token in part]

    def array(self, text: str | bytes):
        """The tokens as a numpy array (N,)."""
        import numpy as np

        return np.concatenate([np.asarray(part, np.uint32) for part in self._parts(text)])

    def _parts(self, text: str | bytes) -> Iterator[list[int]]:
        """The tokens of the text's slices, some at once on all cores."""
        slices = _slices(_text(text))
        while some := list(itertools.islice(slices, 16)):
            for part in self.inner.encode_batch_fast(some, add_special_tokens=False):
                yield part.ids

    def bytes(self, tokens: Iterable[int]) -> bytes:
        """The UTF-8 of tokens."""
        return _join(self.pieces, tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.bytes(tokens).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """Decodes one token at a time."""
        return Decoder(self.pieces)

    def to_dict(self) -> dict:
        """What JSON keeps of it: the tokenizer.json of the package tokenizers."""
        return {"kind": "bpe", "definition": json.loads(self.inner.to_str())}

    @classmethod
    def from_dict(cls, values: dict) -> BPE:
        """The tokenizer of `to_dict`."""
        return cls(json.dumps(_check(values, "bpe", "definition")))


# A tokenizer of your own: a class with these methods, and a row here.
TOKENIZERS = {"bytes": Bytes, "characters": Characters, "bpe": BPE}


def tokenizer_from_dict(values: dict) -> Bytes | Characters | BPE:
    """The tokenizer that `to_dict` described. ValueError: these values describe none."""
    kind = values.get("kind") if isinstance(values, dict) else None
    check_kind(kind)
    return TOKENIZERS[kind].from_dict(values)


def check_kind(kind):
    """ValueError, with the nearest of the known names or all of them, where `kind` names no tokenizer."""
    if isinstance(kind, str) and kind in TOKENIZERS:
        return
    close = difflib.get_close_matches(str(kind), TOKENIZERS, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(TOKENIZERS)}"
    raise ValueError(f"unknown tokenizer {kind!r}{hint}")


def _check(values: dict, kind: str, field: str = ""):
    """The value of `field` (none without one) in a description that has it and nothing else beside its kind."""
    wanted = {"kind", field} - {""}
    if not isinstance(values, dict) or set(values) != wanted or values["kind"] != kind:
        raise ValueError(
            f"this is not a description of a {kind} tokenizer, which has the keys {', '.join(sorted(wanted))}"
        )
    return values[field] if field else None


def _join(pieces: Sequence[bytes], tokens: Iterable[int]) -> bytes:
    """The pieces of tokens in a row."""
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    found = []
    for token in tokens:
        if not 0 <= token < len(pieces):
            raise ValueError(f"token {int(token)} does not exist, this tokenizer has {len(pieces)}")
        found.append(pieces[token])
    return b"".join(found)


def _bytes(text: str | bytes) -> bytes:
    """UTF-8 of a text. What the shell could not decode comes back as the bytes it was; half a surrogate pair is a ?."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, wanted str or bytes")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _text(text: str | bytes) -> str:
    """A text as valid Unicode: bytes that are no UTF-8 become U+FFFD."""
    return _bytes(text).decode("utf-8", "replace")


def _slices(text: str) -> Iterator[str]:
    """A text in slices that end before a line break behind a visible character: there the pre-tokenizer of a BPE parts
    the text in any case, so that the tokens of the slices are those of the whole."""
    begin = 0
    while found := LINE_END.search(text, begin + SLICE):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The texts up to so many characters together."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ValueError("the bpe tokenizer needs the package tokenizers: pip install 'exlstm[hf]'") from None
    return tokenizers


def byte_letters() -> dict[str, int]:
    """The byte behind every letter of a byte-level vocabulary, GPT-2's table: visible Latin-1 characters stand for
    themselves, the other bytes in turn for the code points from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
