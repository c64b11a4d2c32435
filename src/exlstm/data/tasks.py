"""Synthetic tasks with exact answers: formal languages as in xLSTM (arXiv 2405.04517, appendix B.1.1).

A row is a word, and behind it a question for each token of the answer: the pad token stands where the answer would,
and the model is to say the answer there. Only there is a target. Training and test draw words of uniformly random
lengths, in the paper 3 to 40 and 40 to 256. Scores are scaled: (accuracy − chance) / (1 − chance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TaskBatch(NamedTuple):
    """Rows of words with their questions, padded on the right."""

    inputs: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64, the answers at the questions, -100 elsewhere"""
    lengths: Tensor
    """(B,) int64, tokens of each row: word and questions"""


class Task(NamedTuple):
    """A task: how its words are made, and what guessing earns."""

    make: Callable[..., TaskBatch]
    """(generator, lengths (B,), device=None) -> TaskBatch with words of these lengths"""
    vocab_size: int
    """tokens of words, answers and padding; the last one is the padding"""
    chance: float
    """accuracy of a guess"""


def parity(generator: torch.Generator, lengths: Tensor, device=None) -> TaskBatch:
    """Words of zeros and ones: is the number of ones odd?"""
    word, inside = _draw(generator, lengths, 2)
    return _ask(word, lengths, (word * inside).sum(1, keepdim=True) % 2, TASKS["parity"], device)


# A task of your own: a function as above, and a row here.
TASKS = {
    "parity": Task(parity, vocab_size=3, chance=1 / 2),
}


class TaskBatches:
    """Endless batches of a task, `batch(step, micro)` a pure function: words of min_length to max_length tokens."""

    def __init__(self, task: str, batch_size: int, min_length: int, max_length: int, seed: int = 0):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted at least 1")
        if not 1 <= min_length <= max_length:
            raise ValueError(f"lengths are {min_length} to {max_length}, wanted 1 ≤ min_length ≤ max_length")
        self.task, self.batch_size, self.seed = TASKS[task], batch_size, seed
        self.min_length, self.max_length = min_length, max_length

    def batch(self, step: int, micro: int = 0) -> TaskBatch:
        """The batch of a step, from 0 on."""
        words = np.random.Philox(key=np.array([self.seed % 2**64, step], np.uint64), counter=micro)
        generator = torch.Generator().manual_seed(int(words.random_raw()) >> 1)
        lengths = torch.randint(self.min_length, self.max_length + 1, (self.batch_size,), generator=generator)
        return self.task.make(generator, lengths)


def scaled_accuracy(predictions: Tensor, targets: Tensor, chance: float) -> float:
    """Share of the targets (B, T) that the predictions (B, T) hit, moved so that guessing is 0 and all right is 1."""
    asked = targets != -100
    right = (predictions[asked] == targets[asked]).double().mean().item()
    return (right - chance) / (1 - chance)


def _draw(generator: torch.Generator, lengths: Tensor, symbols: int) -> tuple[Tensor, Tensor]:
    """Uniformly random words (B, L) over the first `symbols` tokens, and where they are (B, L) rather than padding."""
    longest = int(lengths.max())
    word = torch.randint(symbols, (len(lengths), longest), generator=generator, device=generator.device)
    return word, torch.arange(longest, device=word.device) < lengths.to(word.device)[:, None]


def _ask(word: Tensor, lengths: Tensor, answer: Tensor, task: Task, device) -> TaskBatch:
    """Words (B, L) of these lengths with questions behind them, a question a token of the answer (B, A)."""
    pad, lengths = task.vocab_size - 1, lengths.to(word.device)
    size, width = answer.shape[1], word.shape[1] + answer.shape[1]
    place = torch.arange(width, device=word.device)
    inputs = torch.nn.functional.pad(word, (0, size)).masked_fill(place >= lengths[:, None], pad)  # (B, T)
    questions = lengths[:, None] + place[:size]  # (B, A)
    targets = torch.full_like(inputs, -100).scatter(1, questions, answer)
    return TaskBatch(*(x.to(device) for x in (inputs, targets, lengths + size)))
