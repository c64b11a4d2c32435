"""What the models of a row learn from and are asked: the same batches for all of them, on the device where they are used."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from exlstm.bench.rows import TEXTS, Case
from exlstm.data.tasks import TASKS, TaskBatches, scaled_accuracy, scaled_error
from exlstm.data.tokenizer import TOKENIZERS
from exlstm.data.words import IGNORE, Draws

# Words of the tests come of seeds that training never takes, those on the way, which may end a run, of another than the
# last ones. Steps of a block of training batches, made at once.
CHECK_SEED, TEST_SEED, BLOCK = -3, -2, 16
# Words of a test on the way and of the last one, tokens of a text likewise, tokens worked on at once.
WORDS, ALL_WORDS, TOKENS, ALL_TOKENS, AT_ONCE, PIECE = 512, 2048, 1 << 19, 5 << 20, 1 << 18, 2048
LOGITS = 1 << 29
VOCABULARY = 16384


def open_feed(case: Case, batch: int, steps: int, seed: int, device, texts: dict[str, Text]):
    """The feed of a case: `batch(step)` is (inputs, targets), `part(step)` numbers its shape, `test(model)` scores."""
    if case.task in TEXTS:
        return Reading(texts[case.task], case, batch, seed, device)
    return Words(case, batch, steps, seed, device)


class Words:
    """Batches of a task and its tests."""

    def __init__(self, case: Case, batch: int, steps: int, seed: int, device):
        self.case, self.size, self.device, self.task = case, batch, device, TASKS[case.task]
        self.vocab_size, self.blocks, self.asked = self.task.vocab_size, {}, {}
        grow = (case.grow, max(1, steps // 2)) if case.grow else None
        self.parts = [
            TaskBatches(case.task, batch, low, high, seed, items=items, grow=grow, full=True, device=device)
            for low, high, items in case.train
        ]
        # Every part as often as its share, evenly spread.
        turns = [((i + 0.5) / share, part) for part, share in enumerate(case.shares) for i in range(share)]
        self.turns = [part for _, part in sorted(turns)]

    def part(self, step: int) -> int:
        return self.turns[step % len(self.turns)]

    def batch(self, step: int):
        """Inputs and targets of a step; a block of steps is made at once where all have one shape."""
        steps = BLOCK if len(self.parts) == 1 else 1
        key = step // steps
        if key not in self.blocks:
            made = self.parts[self.part(step)].rows(key * steps * self.size, steps * self.size)
            self.blocks[key] = (made.inputs, made.targets)
            while len(self.blocks) > 2 * BLOCK:
                del self.blocks[next(iter(self.blocks))]
        start = (step - key * steps) * self.size
        return [t[start : start + self.size] for t in self.blocks[key]]

    @torch.no_grad()
    def test(self, model, last: bool) -> dict[str, float]:
        """Scaled accuracy of every test, the score first; with `last` on more words, and on others."""
        scores = {}
        for low, high, items in self.case.test if last else self.case.test[:1]:
            name = f"{low}–{high}" if low < high else f"{low}"
            name += f", {items} items" if items else ""
            words, seed = (ALL_WORDS, TEST_SEED) if last else (WORDS, CHECK_SEED)
            scores[name] = self._score(model, (low, high, items), words, seed)
        return scores

    def _score(self, model, ends, words: int, seed: int) -> float:
        said, wanted = [], []
        for inputs, targets, asked in self._questions(ends, words, seed):
            said.append(model.answers(inputs, asked))
            wanted.append(targets[asked])
        score = scaled_error if self.task.features else scaled_accuracy
        return score(torch.cat(said), torch.cat(wanted), self.task.chance)

    def _questions(self, ends, words: int, seed: int) -> list[tuple]:
        """Batches of a test, and where they ask; kept, since every run of the case is asked the same."""
        low, high, items = ends
        # Long words have many questions or take long: fewer of them say as much.
        words = min(words, max(64, 8 * AT_ONCE // high))
        if (ends, words, seed) not in self.asked:
            rows = max(1, min(256, words, AT_ONCE // high, LOGITS // (high * max(1, self.vocab_size))))
            batches = TaskBatches(self.case.task, rows, low, high, seed, items=items, full=True, device=self.device)
            made = [batches.batch(step) for step in range(-(-words // rows))]
            real = self.task.features
            self.asked[ends, words, seed] = [
                (b.inputs, b.targets, ~b.targets.isnan() if real else b.targets != IGNORE) for b in made
            ]
        return self.asked[ends, words, seed]


class Text(NamedTuple):
    """A text as tokens in three parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    token_bytes: np.ndarray
    """(V,) bytes of every token"""
    unit: str
    """nats or bits a byte"""


class Reading:
    """Random windows of a text, and losses of its held-out parts read in windows of several lengths."""

    def __init__(self, text: Text, case: Case, batch: int, seed: int, device):
        self.text, self.case, self.size, self.seed, self.device = text, case, batch, seed, device
        self.context, self.vocab_size, self.turns = case.train[0][0], len(text.token_bytes), [0]
        if len(text.train) <= self.context + 1 or len(text.validation) <= self.context:
            raise ValueError(f"the text of {case.task} is too short for a context of {self.context} tokens")
        self.tokens = torch.from_numpy(text.train).to(device)
        self.offsets = torch.arange(self.context + 1, device=device)

    def part(self, step: int) -> int:
        return 0

    def batch(self, step: int):
        """The windows of a step: `size` of them begin anywhere, as in nanoGPT."""
        draw = Draws(self.seed, step * self.size, self.size, self.device)
        rows = self.tokens[draw.below(len(self.tokens) - self.context, 1) + self.offsets].long()  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    @torch.no_grad()
    def test(self, model, last: bool) -> dict[str, float]:
        """Loss of the validation part, on the way and at the end of the same tokens, so that one is comparable with the other;
        with `last` also of the test part in every context."""
        scores = {"validation": self._loss(model, self.text.validation, self.context, TOKENS)}
        if last:
            for context, _, before in self.case.test:
                if len(self.text.test) > context and (context == self.context or hasattr(model, "remember")):
                    name = f"test, context {context}" + (f", {before} of it before" if before else "")
                    scores[name] = self._loss(model, self.text.test, context, ALL_TOKENS, before)
        return scores

    def _loss(self, model, tokens: np.ndarray, context: int, limit: int, before: int = 0) -> float:
        """Of the first `limit` tokens in windows one behind the other; all but the first window begin `before` tokens earlier,
        and those tokens are only read."""
        sizes = torch.from_numpy(self.text.token_bytes).to(self.device)
        nats, size = torch.zeros((), dtype=torch.float64, device=self.device), 0
        # A piece at a time, the state handed on: the logits and masks of long windows would not fit.
        rows = max(1, AT_ONCE // 4 // min(context, 4 * PIECE))
        for number, windows in enumerate(_windows(tokens[: limit + 1], context, context - before, rows)):
            state = None
            for start in range(0, context, PIECE):
                piece = [torch.from_numpy(t[:, start : start + PIECE]).to(self.device).long() for t in windows]
                losses, state = model.read(*piece, state)
                told = torch.arange(start, start + losses.shape[1], device=self.device) >= before  # (T,)
                told = told.expand_as(losses).clone()
                if number == 0:
                    told[0] = True
                nats += losses[told].double().sum()
                size += (sizes[piece[1][told]] if self.text.unit != "nats" else told).sum()
        return nats.item() / int(size) / (1 if self.text.unit == "nats" else math.log(2))


def _windows(tokens: np.ndarray, context: int, step: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets (rows, context) of whole windows, each `step` tokens behind the other."""
    inputs, targets = (np.lib.stride_tricks.sliding_window_view(t, context)[::step] for t in (tokens[:-1], tokens[1:]))
    for start in range(0, len(inputs), rows):
        yield tuple(np.array(t[start : start + rows]) for t in (inputs, targets))


def open_text(name: str, path: Path, cache: Path) -> Text:
    """tinyshakespeare by characters (90 and 10 %), enwik8 by bytes (90, 5 and 5 %), code by a BPE (the file, and FILE.val)."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a file with the text of {name}")
    if not path.is_file():
        raise ValueError(f"there is no file {path} with the text of {name}")
    if name == "enwik8":
        whole = np.fromfile(path, np.uint8)
        cuts = len(whole) * 90 // 100, len(whole) * 95 // 100
        return Text(*np.split(whole, cuts), np.ones(256, np.int64), "bits a byte")
    if name == "tinyshakespeare":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text in UTF-8") from None
        tokenizer = TOKENIZERS["characters"].fit([text])
        whole = tokenizer.array(text).astype(np.int32)
        train, held = np.split(whole, [int(0.9 * len(whole))])
        return Text(train, held, held, np.ones(tokenizer.vocab_size, np.int64), "nats")
    held = path.with_name(path.name + ".val")
    if not held.is_file():
        raise ValueError(f"there is no file {held} with the held-out part of {path}")
    # Another text may have the same name and size.
    sums = (f"{zlib.crc32(file.read_bytes()):08x}" for file in (path, held))
    store = cache / f"{path.name}-{'-'.join(sums)}.npz"
    if not store.is_file():
        train, test = (file.read_text(encoding="utf-8", errors="replace") for file in (path, held))
        tokenizer = TOKENIZERS["bpe"].fit([train], VOCABULARY)
        parts = [tokenizer.array(part).astype(np.uint16).view(np.int16) for part in (train, test)]
        cache.mkdir(parents=True, exist_ok=True)
        aside = store.with_suffix(".part.npz")
        np.savez(aside, train=parts[0], test=parts[1], sizes=np.array([len(p) for p in tokenizer.pieces], np.int64))
        aside.replace(store)
    kept = np.load(store)
    test = kept["test"]
    # The score on the way and the last one come of different packages: the held-out part is cut in the middle.
    return Text(kept["train"], test[: len(test) // 4], test[len(test) // 4 :], kept["sizes"], "bits a byte")
