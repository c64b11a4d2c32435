"""Synthetic tasks with exact answers, made on the fly on any device: the table, its batches and its score.

A row is a word, and behind it a question for each token of the answer: the pad token stands where the answer would,
and the model is to say the answer there. Only there is a target. Training and test draw words of uniformly random
lengths, in the paper 3 to 40 and 40 to 256. Scores are scaled: (accuracy − chance) / (1 − chance).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.data import languages, recall, trees
from exlstm.data.words import IGNORE, Draws, TaskBatch, Wanted


class Task(NamedTuple):
    """A task: how its words are made, and what guessing earns."""

    make: Callable[[Draws, Wanted], TaskBatch]
    """rows of the lengths wanted, as wide as the longest possible one"""
    vocab_size: int
    """tokens of words, answers and padding; the last one is the padding (mqar fills with random tokens and has none)"""
    chance: float
    """accuracy of a uniform guess among the answers; mean square error of the best constant where answers are real"""
    features: int = 0
    """numbers an input where inputs are real, 0: they are tokens"""


_S3, _A5, _S5 = languages.group_words(3, False), languages.group_words(5, True), languages.group_words(5, False)

# A task of your own: a function of Draws and Wanted, and a row here.
TASKS = {
    "bucket_sort": Task(languages.bucket_sort, 11, 1 / 10),
    "cycle_navigation": Task(languages.cycle_navigation, 9, 1 / 5),
    "even_pairs": Task(languages.even_pairs, 3, 1 / 2),
    "majority": Task(languages.majority, 64, 1 / 63),
    "majority_unique": Task(languages.majority_unique, 64, 1 / 63),
    "majority_count": Task(languages.majority_count, 64, 1 / 63),
    "missing_duplicate": Task(languages.missing_duplicate, 11, 1 / 9),
    "arithmetic": Task(languages.arithmetic, 10, 1 / 5),
    "bracket_arithmetic": Task(trees.bracket_arithmetic, 12, 1 / 5),
    "odds_first": Task(languages.odds_first, 12, 1 / 10),
    "parity": Task(languages.parity, 3, 1 / 2),
    "repetition": Task(languages.repetition, 12, 1 / 10),
    "reverse_string": Task(languages.reverse_string, 12, 1 / 10),
    "stack_manipulation": Task(languages.stack_manipulation, 11, 1 / 4),
    "set": Task(languages.ordered_set, 128, 1 / 126),
    "solve_equation": Task(trees.solve_equation, 14, 1 / 5),
    "s3": Task(_S3[1], 7, 1 / 6),
    "a5": Task(_A5[1], 61, 1 / 60),
    "s5": Task(_S5[1], 121, 1 / 120),
    "a_n_b_n": Task(languages.a_n_b_n, 3, 1 / 2),
    "a_n_b_n_uniform": Task(languages.a_n_b_n_uniform, 3, 1 / 2),
    "mqar": Task(recall.mqar, recall.VOCABULARY, 1 / 4096),
    "copy": Task(recall.copy, 17, 1 / 15),
    "selective_copy": Task(recall.selective_copy, 17, 1 / 15),
    "nearest_neighbour": Task(recall.nearest_neighbour, 0, 1 / 12, features=3),
    "listops": Task(trees.listops, 16, 1 / 10),
}


class TaskBatches:
    """Endless batches of a task, `batch(step, micro)` a pure function: words of min_length to max_length tokens.

    Row r of step s is row s · batch_size + r of the seed, and no other number of the batch enters it.

    Args:
        task: a name in TASKS.
        batch_size: rows a batch.
        min_length, max_length: ends of the words' lengths, both included; see the tasks for what they count.
        seed: any whole number.
        items: things to remember, see Wanted.
        grow: (length, steps): the longest words grow evenly from `length` at step 0 to max_length after `steps`, a curriculum.
        full: every batch is as wide as a row can be, so that all have one shape; otherwise as wide as its longest row.
        device: where batches are made.
    """

    def __init__(
        self,
        task: str,
        batch_size: int,
        min_length: int,
        max_length: int,
        seed: int = 0,
        *,
        items: int = 0,
        grow: tuple[int, int] | None = None,
        full: bool = False,
        device=None,
    ):
        if task not in TASKS:
            close = difflib.get_close_matches(str(task), TASKS, n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(TASKS)}"
            raise ValueError(f"unknown task {task!r}{hint}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted at least 1")
        if not 1 <= min_length <= max_length:
            raise ValueError(f"lengths are {min_length} to {max_length}, wanted 1 ≤ min_length ≤ max_length")
        if items < 0:
            raise ValueError(f"items is {items}, wanted a number of things to remember, or 0 for the task's own")
        if grow is not None and not (min_length <= grow[0] <= max_length and grow[1] > 0):
            ends = f"{min_length} to {max_length}"
            raise ValueError(f"grow is {grow}, wanted a length out of {ends} and a number of steps above 0")
        self.task, self.batch_size, self.seed = TASKS[task], batch_size, seed
        self.min_length, self.max_length = min_length, max_length
        self.items, self.grow, self.full, self.device = items, grow, full, device

    def batch(self, step: int, micro: int = 0) -> TaskBatch:
        """The batch of a step, from 0 on."""
        return self.rows(step * self.batch_size, self.batch_size, micro)

    def rows(self, first: int, count: int, micro: int = 0) -> TaskBatch:
        """`count` rows from row `first` on: several batches at once where there are more than batch_size."""
        # Another micro batch is another seed; a large odd step keeps it away from the seeds that anybody chooses.
        draw = Draws(self.seed + micro * 0x5851F42D4C957F2D, first, count, self.device)
        longest = self.max_length
        if self.grow is not None:
            start, steps = self.grow
            step = torch.arange(first, first + count, device=self.device)[:, None] // self.batch_size
            longest = start + (self.max_length - start) * step.clamp(max=steps) // steps
        lengths = self.min_length + draw.below(longest - self.min_length + 1, 1)[:, 0]
        batch = self.task.make(draw, Wanted(lengths, self.min_length, self.max_length, self.items))
        if self.full:
            return batch
        width = int(batch.lengths.max())
        return TaskBatch(batch.inputs[:, :width], batch.targets[:, :width], batch.lengths)


def scaled_accuracy(predictions: Tensor, targets: Tensor, chance: float) -> float:
    """Share of the targets (B, T) that the predictions (B, T) hit, moved so that guessing is 0 and all right is 1."""
    asked = targets != IGNORE
    right = (predictions[asked] == targets[asked]).double().mean().item()
    return (right - chance) / (1 - chance)


def scaled_error(predictions: Tensor, targets: Tensor, chance: float) -> float:
    """The same of real answers: 1 less the mean square error over that of the best constant; NaN is no target."""
    asked = ~targets.isnan()
    return 1 - (predictions[asked] - targets[asked]).double().square().mean().item() / chance
