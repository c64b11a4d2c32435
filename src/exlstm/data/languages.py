"""Formal languages of xLSTM (arXiv 2405.04517, B.1.1) and of the Chomsky hierarchy (arXiv 2207.02098), counting, group words.

A word, then a question for each token of the answer. Tasks that say back as many tokens as the word has count both in the
length (and [ACT] between them), so that a row fits into the paper's context; all others count the word alone. A length that
no word can have becomes the one below it, or the task's shortest. The arithmetic of brackets stands in trees.py.
"""

from itertools import permutations

import torch
from torch import Tensor

from exlstm.data.words import IGNORE, Draws, TaskBatch, Wanted, ask, with_last

SYMBOLS, NUMBERS, MAJORITY, SET = 10, 5, 63, 126
PLUS, MINUS, TIMES, EQUALS = 5, 6, 7, 8


def parity(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Words of zeros and ones: is the number of ones odd?"""
    word = draw.below(2, wanted.longest)
    return ask(word, wanted.lengths, (word * wanted.inside()).sum(1, keepdim=True) % 2, 2, wanted.longest + 1)


def even_pairs(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Words of a and b: is the number of ab and ba together even (1)? It is where the word ends as it begins."""
    word = draw.below(2, wanted.longest)
    last = word.gather(1, wanted.lengths[:, None] - 1)
    return ask(word, wanted.lengths, (last == word[:, :1]).long(), 2, wanted.longest + 1)


def cycle_navigation(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Steps on a circle of 5 places, stay (5), on (6) and back (7), from place 0: where do they end?"""
    step = draw.below(3, wanted.longest)
    moves = torch.where(step == 2, -1, step) * wanted.inside()
    return ask(step + 5, wanted.lengths, moves.sum(1, keepdim=True) % 5, 8, wanted.longest + 1)


def arithmetic(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Numbers 0 to 4 joined by +, - and ×, then "=": the result modulo 5, products first."""
    count = (wanted.lengths // 2).clamp(min=1)
    most = max(1, wanted.longest // 2)
    number, operator = draw.below(NUMBERS, most), draw.below(3, most)
    word = torch.stack((number, operator + PLUS), 2).flatten(1)  # (B, 2 · most)
    word.scatter_(1, 2 * count[:, None] - 1, EQUALS)
    total, term = torch.zeros_like(count), number[:, 0]
    for j in range(1, most):
        n, o = number[:, j], operator[:, j - 1]
        going = j < count
        total = torch.where(going & (o < 2), total + term, total)
        term = torch.where(going, torch.where(o == 2, term * n, torch.where(o == 1, -n, n)) % NUMBERS, term)
    return ask(word, 2 * count, ((total + term) % NUMBERS)[:, None], 9, 2 * most + 1)


def majority(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Words over 63 tokens: the commonest one, the lowest of several."""
    word = draw.below(MAJORITY, wanted.longest)
    # Ties have to fall the same way on every device.
    rank = _counts(word, wanted) * MAJORITY - torch.arange(MAJORITY, device=word.device)
    return ask(word, wanted.lengths, rank.argmax(1, keepdim=True), MAJORITY, wanted.longest + 1)


def majority_unique(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Words over 63 tokens, one of them commoner than all others: where several were, one has another's place."""
    word, turn = draw.below(MAJORITY, wanted.longest), draw.below(MAJORITY, 1)
    counts = _counts(word, wanted)
    # Every rank and every place is another number, so that all devices choose alike.
    rank = counts * MAJORITY + (torch.arange(MAJORITY, device=word.device) + turn) % MAJORITY
    most = rank.argmax(1, keepdim=True)
    several = (counts == counts.amax(1, keepdim=True)).sum(1, keepdim=True) > 1
    order = draw.below(1 << 20, wanted.longest) * wanted.longest + torch.arange(wanted.longest, device=word.device)
    place = torch.where(wanted.inside() & (word != most), order, -1).argmax(1, keepdim=True)
    word = word.scatter(1, place, torch.where(several, most, word.gather(1, place)))
    return ask(word, wanted.lengths, most, MAJORITY, wanted.longest + 1)


def majority_count(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Words over 63 tokens: how often the commonest one occurs, 62 for more."""
    word = draw.below(MAJORITY, wanted.longest)
    most = _counts(word, wanted).amax(1, keepdim=True).clamp(max=MAJORITY - 1)
    return ask(word, wanted.lengths, most, MAJORITY, wanted.longest + 1)


def _counts(word: Tensor, wanted: Wanted) -> Tensor:
    """How often each of the 63 tokens occurs (B, 63)."""
    return torch.zeros_like(word[:, :1]).repeat(1, MAJORITY).scatter_add_(1, word, wanted.inside().long())


def a_n_b_n(draw: Draws, wanted: Wanted) -> TaskBatch:
    """aⁿ bᵐ of even length: are there as many a (0) as b (1)? Half are; of the others half miss by one of each."""
    return _a_n_b_m(draw, wanted, near=True)


def a_n_b_n_uniform(draw: Draws, wanted: Wanted) -> TaskBatch:
    """As a_n_b_n, but where there are not as many, every other n is as likely."""
    return _a_n_b_m(draw, wanted, near=False)


def _a_n_b_m(draw: Draws, wanted: Wanted, near: bool) -> TaskBatch:
    half, most = (wanted.lengths // 2).clamp(min=1), 2 * max(1, wanted.longest // 2)
    equal, close, up = (draw.below(2, 1)[:, 0] for _ in range(3))
    other = draw.below(2 * half[:, None], 1)[:, 0]
    other = other + (other >= half)
    if near:
        other = torch.where(close == 1, half + 2 * up - 1, other)
    n = torch.where(equal == 1, half, other)
    word = (torch.arange(most, device=n.device) >= n[:, None]).long()
    return ask(word, 2 * half, equal[:, None], 2, most + 1)


def missing_duplicate(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 9 tokens, and once more with one token masked (9): which one?"""
    size, most = (wanted.lengths // 2).clamp(min=1), max(1, wanted.longest // 2)
    word = draw.below(9, most)
    place = torch.arange(2 * most, device=word.device).expand(len(word), -1)
    twice = word.gather(1, (place - size[:, None] * (place >= size[:, None])).clamp(max=most - 1))
    hidden = draw.below(size[:, None], 1)
    twice = twice.scatter(1, size[:, None] + hidden, 9)
    return ask(twice, 2 * size, word.gather(1, hidden), 10, 2 * most + 1)


def bucket_sort(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 10 tokens: the same tokens in their order."""
    size, most = (wanted.lengths // 2).clamp(min=1), max(1, wanted.longest // 2)
    word = draw.below(SYMBOLS, most)
    ordered = word.masked_fill(~wanted.inside(size, most), SYMBOLS).sort(1).values
    return ask(word, size, ordered, SYMBOLS, 2 * most, size)


def repetition(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 10 tokens: the word once more."""
    word, size, width = _said_back(draw, wanted, SYMBOLS)
    return ask(*with_last(word, size, 10), word, 11, width, size)


def reverse_string(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 10 tokens: the word from its end."""
    word, size, width = _said_back(draw, wanted, SYMBOLS)
    place = size[:, None] - 1 - torch.arange(word.shape[1], device=word.device)
    return ask(*with_last(word, size, 10), word.gather(1, place.clamp(min=0)), 11, width, size)


def odds_first(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 10 tokens: its first, third, ... token, then its second, fourth, ..."""
    word, size, width = _said_back(draw, wanted, SYMBOLS)
    place, odds = torch.arange(word.shape[1], device=word.device), (size[:, None] + 1) // 2
    order = torch.where(place < odds, 2 * place, 2 * (place - odds) + 1).clamp(max=word.shape[1] - 1)
    return ask(*with_last(word, size, 10), word.gather(1, order), 11, width, size)


def ordered_set(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A word over 126 tokens: each token once, in the order in which they first occur."""
    word, size, width = _said_back(draw, wanted, SET)
    place = torch.arange(word.shape[1], device=word.device).expand(len(word), -1)
    inside = wanted.inside(size, word.shape[1])
    first = torch.full((len(word), SET), word.shape[1], device=word.device)
    first.scatter_reduce_(1, word, place.masked_fill(~inside, word.shape[1]), "amin")
    new = inside & (first.gather(1, word) == place)
    order = place.masked_fill(~new, word.shape[1]).sort(1).values.clamp(max=word.shape[1] - 1)
    return ask(*with_last(word, size, SET), word.gather(1, order), SET + 1, width, new.sum(1))


def _said_back(draw: Draws, wanted: Wanted, symbols: int) -> tuple[Tensor, Tensor, int]:
    """Words (B, most), their lengths, and the width that they, [ACT] and as many answers need."""
    most = max(1, (wanted.longest - 1) // 2)
    return draw.below(symbols, most), ((wanted.lengths - 1) // 2).clamp(min=1), 2 * most + 1


def stack_manipulation(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A stack of tokens 0 to 3 from its bottom, then pushes (4 to 7) and pops (8): the stack from its top.

    The stack at the start has any size that leaves an action; a pop never takes the last token.
    """
    most = max(2, (wanted.longest - 1) // 2)
    size = ((wanted.lengths - 1) // 2).clamp(min=2)
    start = 1 + draw.below(size[:, None] - 1, 1)[:, 0]
    symbol, action = draw.below(4, most), draw.below(5, most)
    place = torch.arange(most, device=size.device)
    stack, height, words = symbol.masked_fill(place >= start[:, None], 0), start.clone(), []
    for t in range(most):
        acts, inside = t >= start, t < size
        pops = acts & (action[:, t] == 4) & (height > 1)
        pushes = acts & inside & ~pops
        words.append(torch.where(acts, torch.where(pops, 8, symbol[:, t] + 4), symbol[:, t]))
        top = height.clamp(max=most - 1)[:, None]
        stack = stack.scatter(1, top, torch.where(pushes, symbol[:, t], stack.gather(1, top)[:, 0])[:, None])
        height = height + pushes.long() - (pops & inside).long()
    from_top = stack.gather(1, (height[:, None] - 1 - place).clamp(min=0))
    return ask(*with_last(torch.stack(words, 1), size, 9), from_top, 10, 2 * most + 1, height)


def group_words(permuted: int, even: bool) -> tuple[int, object]:
    """Size and maker of the word problem of a permutation group: at every element, the product of all so far.

    The elements are the permutations of `permuted` things (even ones only, if asked) in lexicographic order; p·q is first p,
    then q. The answer stands at the element itself, there is no question behind the word.
    """
    elements = [p for p in permutations(range(permuted)) if not even or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    rows = [[number[tuple(q[i] for i in p)] for q in elements] for p in elements]
    size, products = len(elements), torch.tensor(rows).flatten()

    def make(draw: Draws, wanted: Wanted) -> TaskBatch:
        word, table = draw.below(size, wanted.longest), products.to(wanted.lengths.device)
        running, reach = word, 1
        while reach < wanted.longest:
            # Hillis and Steele's scan: products over twice as many elements each time.
            joined = table[running[:, :-reach] * size + running[:, reach:]]
            running, reach = torch.cat((running[:, :reach], joined), 1), 2 * reach
        inside = wanted.inside()
        return TaskBatch(word.masked_fill(~inside, size), running.masked_fill(~inside, IGNORE), wanted.lengths)

    return size, make


def _is_even(p) -> bool:
    return sum(a > b for i, a in enumerate(p) for b in p[i + 1 :]) % 2 == 0
