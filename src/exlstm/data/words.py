"""What every task is made of: rows with questions, and randomness that depends on seed and row number alone.

A number drawn is a hash (splitmix64's finaliser) of seed, row number, draw and place. So a row is the same whatever batch
it stands in, however wide that is, and whatever device makes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
# Odd constants of splitmix64 and of its relatives, as signed 64-bit numbers.
_STEP, _PLACE = 0x9E3779B97F4A7C15 - 2**64, 0xD1342543DE82EF95 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class TaskBatch(NamedTuple):
    """Rows of words with their questions, padded on the right."""

    inputs: Tensor
    """(B, T) int64 tokens, or (B, T, F) float32 where a task has real inputs"""
    targets: Tensor
    """(B, T) int64, the answers at the questions, -100 elsewhere; float32 and NaN for real answers"""
    lengths: Tensor
    """(B,) int64, tokens of each row: word and questions"""


class Wanted(NamedTuple):
    """What a task is asked to make."""

    lengths: Tensor
    """(B,) int64, length of every row"""
    shortest: int
    """no length is below"""
    longest: int
    """no length is above; the width of a batch follows from it"""
    items: int
    """things to remember (pairs of mqar, tokens of a copy); 0: as the task's protocol has it"""

    def inside(self, lengths: Tensor | None = None, size: int = 0) -> Tensor:
        """(B, size) bool: the places of each row's word rather than its padding."""
        lengths = self.lengths if lengths is None else lengths
        return torch.arange(size or self.longest, device=lengths.device) < lengths[:, None]


class Draws:
    """Random numbers for the rows `first` to `first + count - 1` of a seed; every call draws new ones."""

    def __init__(self, seed: int, first: int, count: int, device=None):
        start = torch.tensor(_signed(seed), device=device)
        rows = torch.arange(first, first + count, device=device)
        self.keys = mix(mix(start) + rows * _STEP)  # (B,)
        self.calls = 0

    def bits(self, size: int) -> Tensor:
        """(B, size) int64, uniform from 0 to 2⁶² - 1."""
        self.calls += 1
        keys = mix(self.keys + _signed(self.calls * _STEP))
        places = torch.arange(size, device=self.keys.device) * _PLACE
        return shifted(mix(keys[:, None] + places), 2)

    def below(self, n: int | Tensor, size: int) -> Tensor:
        """(B, size) int64, uniform from 0 to n - 1; n at most 2³¹, a number or (B, 1)."""
        return scaled(self.bits(size), n)


def _signed(number: int) -> int:
    """The number modulo 2⁶⁴, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: neighbouring numbers give unrelated ones."""
    x = (x ^ shifted(x, 30)) * _FIRST
    x = (x ^ shifted(x, 27)) * _SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, count: int) -> Tensor:
    """x moved right by `count` bits as if it had no sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def scaled(bits: Tensor, n) -> Tensor:
    """Uniform bits (62 of them) as whole numbers from 0 to n - 1."""
    return ((bits >> 31) * n) >> 31


def step_key(keys: Tensor, number) -> Tensor:
    """Keys of the children `number` of nodes with these keys: trees draw by their path."""
    return mix(keys + (number + 1) * _STEP)


def ask(word: Tensor, lengths: Tensor, answer: Tensor, pad: int, width: int, sizes: Tensor | None = None) -> TaskBatch:
    """Words (B, ·) of these lengths, behind each a question for every token of its answer (B, A), the first `sizes` of it.

    `width` is the width of the batch: the longest word and its answer fit into it.
    """
    sizes = torch.full_like(lengths, answer.shape[1]) if sizes is None else sizes
    place = torch.arange(width, device=word.device)
    inside = place < lengths[:, None]
    word = torch.nn.functional.pad(word, (0, max(0, width - word.shape[1])))[:, :width]
    inputs = torch.where(inside, word, pad)  # (B, T)
    number = place - lengths[:, None]
    said = answer.gather(1, number.clamp(0, answer.shape[1] - 1))
    targets = torch.where(~inside & (number < sizes[:, None]), said, IGNORE)
    return TaskBatch(inputs, targets, lengths + sizes)


def with_last(word: Tensor, lengths: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """The words (B, ·) with one token behind each, and their lengths."""
    word = torch.nn.functional.pad(word, (0, 1)).scatter(1, lengths[:, None], token)
    return word, lengths + 1
