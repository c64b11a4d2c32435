"""Text as tokens on disk, parted into training and held-out documents, and served as batches.

A corpus is prepared once: corpus.json says what it is, tokens-<key>.bin holds the tokens, those of training first, as
little-endian unsigned integers of 1, 2 or 4 bytes. It is memory-mapped, and made anew when the text or the settings
behind it change. A batch is a pure function of (seed, step, micro): nothing has to be remembered to go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from exlstm.data import files
from exlstm.data.config import DataConfig
from exlstm.data.files import Document
from exlstm.data.parts import Part, divide, rank
from exlstm.data.tokenizer import TOKENIZERS, tokenizer_from_dict

VERSION = 1
HEADER = "corpus.json"


class TextBatch(NamedTuple):
    """Rows of text for a language model."""

    inputs: torch.Tensor
    """(B, T) int64"""
    targets: torch.Tensor
    """(B, T) int64, the token after each input; -100 where none is to be predicted"""
    reset: torch.Tensor
    """(B, T) bool, true at the first token of a document"""


@dataclass(frozen=True, eq=False)
class Split:
    """The tokens of some documents, one document behind the other."""

    tokens: np.ndarray
    """(N,) unsigned integers"""
    counts: np.ndarray
    """(documents,) int64, tokens of each document, at least 2"""
    names: tuple[str, ...]
    """names of the documents"""
    tokenizer: Any
    """what the tokens mean"""
    ends: np.ndarray = field(init=False)
    """(documents,) int64, where each document ends"""
    starts: np.ndarray = field(init=False)
    """(documents,) int64, where each document begins"""

    def __post_init__(self):
        object.__setattr__(self, "ends", np.cumsum(self.counts))
        object.__setattr__(self, "starts", self.ends - self.counts)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def token_bytes(self) -> np.ndarray:
        """Bytes that each token stands for (vocab_size,): with them nats a token become bits a byte."""
        return np.array([len(piece) for piece in self.tokenizer.pieces])

    @property
    def n_bytes(self) -> int:
        """Length of the text in bytes."""
        sizes, some = self.token_bytes, 1 << 22
        # numpy would make 8 bytes of every token.
        parts = (self.tokens[i : i + some] for i in range(0, len(self), some))
        return sum(int(np.bincount(part, minlength=len(sizes)) @ sizes) for part in parts)

    def bytes(self) -> bytes:
        """The text, as UTF-8; as it was on disk if the tokens are bytes or the text was valid UTF-8."""
        return self.tokenizer.bytes(self.tokens)

    def head(self, n_bytes: int) -> Split:
        """The beginning of the split, at most `n_bytes` bytes; ValueError: not even two tokens of a document fit."""
        sizes = self.token_bytes[self.tokens[:n_bytes]]
        fit = np.searchsorted(np.cumsum(sizes), n_bytes, side="right")
        counts = np.clip(fit - self.starts, 0, self.counts)
        counts = counts[counts > 1]
        if not len(counts):
            raise ValueError(f"{n_bytes} bytes are too few, wanted at least two tokens of text")
        return Split(self.tokens[: counts.sum()], counts, self.names[: len(counts)], self.tokenizer)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text that is ready to learn from."""

    tokenizer: Any
    train: Split
    held_out: Split
    fingerprint: str
    """names and contents of the files; another one is another text"""
    notes: tuple[str, ...] = ()
    """what the user should know about it, in sentences"""


def load_corpus(
    config: DataConfig,
    cache: Path | str,
    tokenizer=None,
    *,
    expect: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """The corpus that `config` describes, from the folder `cache`, where it is prepared if it is not there yet.

    `tokenizer` is one that stands, of a model that is there, in place of the one that `config` would make of the text.
    `expect` is the fingerprint that the corpus had when a run began. `progress(done, total)` counts bytes of text.
    ValueError, OSError: files are missing, not text or too little of it, or not the ones expected; then nothing is
    written.
    """
    cache = Path(cache)
    documents, notes = files.find(config.files, cache, config.field)
    found = files.fingerprint(documents)
    if expect is not None and found != expect:
        told = _difference(cache, documents)
        raise ValueError(f"the corpus changed since this run began{told}: bring it back or choose another folder")
    settings = (VERSION, found, config.tokenizer, config.vocab_size, float(config.held_out), config.seed)
    # What a tokenizer that stands has learnt is of no text here.
    settings += (tokenizer.to_dict(),) if tokenizer else ()
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    try:
        corpus = open_corpus(cache, key)
    except ValueError:
        header = {"version": VERSION, "key": key, "fingerprint": found}
        _prepare(documents, config, cache, header, progress, tokenizer)
        corpus = open_corpus(cache, key)
    if config.context >= len(corpus.train):
        rows = len(corpus.train) - 1
        notes.append(f"a context of {config.context} is cut to {rows}, there are {rows + 1} tokens to train on")
    return Corpus(corpus.tokenizer, corpus.train, corpus.held_out, found, tuple(notes))


def open_corpus(cache: Path | str, key: str | None = None) -> Corpus:
    """The corpus that was prepared in `cache`, whatever has become of its files; with `key`, only that one.

    ValueError: there is none, it is damaged, or another one.
    """
    cache = Path(cache)
    try:
        header = json.loads((cache / HEADER).read_text(encoding="utf-8"))
        if header["version"] != VERSION or (key or header["key"]) != header["key"] or not header["key"].isalnum():
            raise ValueError("another corpus")
        tokens = np.asarray(np.memmap(_tokens(cache, header["key"]), np.dtype(header["dtype"]), "r"))
        if hashlib.sha256(tokens).hexdigest() != header["sha256"]:
            raise ValueError("damaged tokens")
        tokenizer = tokenizer_from_dict(header["tokenizer"])
        splits, begin = [], 0
        for part in (header["train"], header["held_out"]):
            counts = np.array(part["counts"], np.int64)
            names = (name for name, k in zip(part["names"], part.get("rows") or repeat(1)) for _ in range(k))
            splits.append(Split(tokens[begin : begin + counts.sum()], counts, tuple(names), tokenizer))
            begin += counts.sum()
        return Corpus(tokenizer, *splits, header["fingerprint"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{cache} holds no corpus that can be read ({type(error).__name__}: {error})") from None


def load_text(sources: str | Sequence[str], tokenizer, field: str = "text", limit: int = 0) -> Split:
    """All text behind files, folders or globs, in memory, as tokens of a tokenizer that stands; with a limit, as little more
    than so many tokens as it is read at once."""
    found, _ = files.find(sources, field=field)
    read, names, counts, total = [], [], [], 0
    pieces = ((d.name, *piece) for d in found for piece in _tokenized(Part(d, 0, d.size), tokenizer))
    for name, begins, tokens, _ in pieces:
        read.append(tokens)
        if begins:
            names.append(name)
            counts.append(0)
        counts[-1] += len(tokens)
        total += len(tokens)
        if limit and total >= limit:
            break
    if not read:
        raise ValueError(f"{found[0].path} has one token, wanted at least two: the first predicts the second")
    return Split(np.concatenate(read), np.array(counts), tuple(names), tokenizer)


def _tokenized(part: Part, tokenizer) -> Iterator[tuple[bool, np.ndarray, int]]:
    """The tokens of a part in pieces, each with whether a document begins there and with its bytes."""
    for begins, piece in part.pieces():
        tokens = tokenizer.array(piece)
        # One token alone predicts nothing.
        if len(tokens) > 1 or not begins:
            yield begins, tokens, len(piece)


def xz_bits_per_byte(data: bytes) -> float:
    """Bits a byte that xz (preset 6) needs for the text: what a model has to beat."""
    if not data:
        raise ValueError("there is no text to compress")
    return 8 * len(lzma.compress(data, preset=6)) / len(data)


def _tokens(cache: Path, key: str) -> Path:
    return cache / f"tokens-{key}.bin"


def _prepare(documents: Sequence[Document], config: DataConfig, cache: Path, header: dict, progress, tokenizer=None):
    """Writes the tokens and the header that describes them."""
    hashed, done, total = hashlib.sha256(), 0, sum(d.size for d in documents)
    progress = progress or (lambda done, total: None)
    progress(done, total)
    train, held = divide(documents, config.held_out, config.seed)
    tokenizer = tokenizer or _learnt(train, held, config)
    size = tokenizer.vocab_size
    dtype = np.dtype("u1" if size <= 1 << 8 else "<u2" if size <= 1 << 16 else "<u4")
    header |= {"dtype": dtype.str, "tokenizer": tokenizer.to_dict(), "sources": {d.name: d.digest for d in documents}}
    with _aside(cache) as folder:
        with open(folder / "tokens", "wb") as stream:
            for name, parts in (("train", train), ("held_out", held)):
                counts = {"names": [part.document.name for part in parts], "rows": [], "counts": []}
                for part in parts:
                    before = len(counts["counts"])
                    for begins, tokens, n_bytes in _tokenized(part, tokenizer):
                        tokens = tokens.astype(dtype, copy=False)
                        stream.write(tokens)
                        hashed.update(tokens)
                        counts["counts"] += [0] * begins
                        counts["counts"][-1] += len(tokens)
                        done += n_bytes
                        progress(done, total)
                    counts["rows"].append(len(counts["counts"]) - before)
                header[name] = counts
        if not (header["train"]["counts"] and header["held_out"]["counts"]):
            raise ValueError(
                f"{documents[0].path if len(documents) == 1 else 'the text'} is too short with {total} "
                f"byte{'s' * (total > 1)}: wanted at least two tokens to train on and two to hold out"
            )
        header["sha256"] = hashed.hexdigest()
        (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")
        (folder / "tokens").replace(_tokens(cache, header["key"]))
        (folder / HEADER).replace(cache / HEADER)
    for old in set(cache.glob("tokens-*.bin")) - {_tokens(cache, header["key"])}:
        # Windows keeps a file that is mapped.
        with contextlib.suppress(OSError):
            old.unlink()


def _learnt(train: Sequence[Part], held: Sequence[Part], config: DataConfig):
    """The tokenizer that `config` makes of a text in parts."""
    ranked = sorted(train, key=lambda part: rank(part.document.name, config.seed))
    texts = [
        (piece.decode("utf-8", "replace") for part in parts for _, piece in part.pieces()) for parts in (ranked, held)
    ]
    return TOKENIZERS[config.tokenizer].fit(texts[0], config.vocab_size, texts[1])


def _sweep(cache: Path):
    """Removes what preparations left behind that were killed: as much as the text itself takes, each time."""
    for left in cache.glob(".tmp-*"):
        # Windows has no signal that only asks.
        if left.name[5:].isdigit() and os.name != "nt":
            try:
                os.kill(int(left.name[5:]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except (OSError, OverflowError):
                continue


@contextlib.contextmanager
def _aside(cache: Path) -> Iterator[Path]:
    """A folder inside `cache` to write in; after a failure no trace of it is left, nor of folders made on the way."""
    _sweep(cache)
    made = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    aside = cache / f".tmp-{os.getpid()}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        yield aside
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(cache)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        # Only what is still empty goes.
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _difference(cache: Path, documents: Sequence[Document]) -> str:
    """What changed since the corpus in `cache` was prepared: ' (a.txt is another, b.txt is gone and 3 more)'."""
    try:
        old = json.loads((cache / HEADER).read_text(encoding="utf-8"))["sources"]
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    new = {d.name: d.digest for d in documents}
    told = [f"{n} is {'new' if n not in old else 'another'}" for n in new if new[n] != old.get(n)]
    told += [f"{n} is gone" for n in old if n not in new]
    return f" ({', '.join(told[:3])}{f' and {len(told) - 3} more' * (len(told) > 3)})" if told else ""


class TextBatches:
    """Training batches: `batch(step, micro)` is a pure function of its arguments and of what is given here.

    The split is a ring of len(split) - 1 places, a place a token that predicts the next one. In every epoch the ring
    is cut into windows of `context` places from another point on, and the windows are served in another order: each
    token is predicted once an epoch, the first one of a document never. Where the ring does not divide by `context`,
    one window has fewer targets. With `accumulate` micro batches a step, all of them are different windows.
    """

    def __init__(self, split: Split, context: int, batch_size: int, seed: int = 0, accumulate: int = 1):
        for name, value in (("context", context), ("batch_size", batch_size), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        self.split, self.batch_size, self.seed, self.accumulate = split, batch_size, seed, accumulate
        self.ring = len(split) - 1
        self.context = min(context, self.ring)
        self.windows = -(-self.ring // self.context)
        self._epochs = {}

    def batch(self, step: int, micro: int = 0) -> TextBatch:
        """The batch of a step, from 0 on."""
        if not 0 <= micro < self.accumulate or step < 0:
            raise ValueError(f"there is no batch {micro} of step {step}: steps begin at 0, with {self.accumulate} each")
        first = (step * self.accumulate + micro) * self.batch_size
        epochs, turns = np.divmod(np.arange(first, first + self.batch_size), self.windows)
        self._epochs = {e: self._epochs.get(e) or self._epoch(e) for e in map(int, np.unique(epochs))}
        begins, orders = zip(*(self._epochs[int(e)] for e in epochs), strict=True)
        windows = np.array([order[turn] for order, turn in zip(orders, turns, strict=True)])
        place = windows[:, None] * self.context + np.arange(self.context)  # (B, T)
        return _gather(self.split, (np.array(begins)[:, None] + place) % self.ring, place < self.ring)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Where the ring is cut first, and the order of the windows. The generator's raw words, unlike what numpy
        makes of them, stay the same in every version."""
        words = np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64)).random_raw(self.windows + 1)
        return int(words[0] % np.uint64(self.ring)), np.argsort(words[1:], kind="stable")


def windows(split: Split, context: int, batch_size: int, most: int = 0) -> Iterator[TextBatch]:
    """The split in windows of `context` tokens, one behind the other, for an evaluation with a fresh state a window.

    Every token is predicted once, except the first of each document. The last batch may have fewer rows. Of a split of more than
    `most` batches, where that is not 0, so many are made of windows evenly spread over it.
    """
    ring = len(split) - 1
    context = min(context, ring)
    begins = np.arange(0, ring, context)
    if most and len(begins) > most * batch_size:
        begins = begins[np.arange(most * batch_size) * len(begins) // (most * batch_size)]
    for i in range(0, len(begins), batch_size):
        place = begins[i : i + batch_size, None] + np.arange(context)
        yield _gather(split, place.clip(max=ring - 1), place < ring)


def documents(split: Split, context: int, batch_size: int) -> Iterator[TextBatch]:
    """The split with each document in rows of its own, for an evaluation by position with a fresh state a row.

    A document begins a row, and another one after every `context` tokens. Long rows come first, so that the rows of a
    batch are about equally long. Every token is predicted once, except the first of each document.
    """
    rows = [
        (b, min(context, end - 1 - b)) for s, end in zip(split.starts, split.ends) for b in range(s, end - 1, context)
    ]
    begins, lengths = np.array(sorted(rows, key=lambda row: -row[1])).T
    for i in range(0, len(begins), batch_size):
        length = lengths[i : i + batch_size, None]
        t = np.arange(length.max())
        yield _gather(split, begins[i : i + batch_size, None] + np.minimum(t, length - 1), t < length)


def _gather(split: Split, place: np.ndarray, counts: np.ndarray) -> TextBatch:
    """The tokens at `place` (B, T), and those behind them where `counts` says so and the document goes on."""
    first, last = (np.searchsorted(split.ends, place[:, t], side="right") for t in (0, -1))
    document = np.tile(first[:, None], place.shape[1])
    # Most rows lie in one document, and only the others are looked up place by place.
    mixed = (first != last) | (place[:, 0] > place[:, -1])
    document[mixed] = np.searchsorted(split.ends, place[mixed], side="right")
    targets = split.tokens[place + 1].astype(np.int64)
    targets[~counts | (place + 1 == split.ends[document])] = -100
    arrays = split.tokens[place].astype(np.int64), targets, place == split.starts[document]
    return TextBatch(*map(torch.from_numpy, arrays))
