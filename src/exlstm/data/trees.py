"""Tasks whose words are trees: arithmetic with brackets and equations (arXiv 2207.02098), ListOps (arXiv 2011.04006, 1804.06028).

A tree grows level by level, all rows of a batch at once, and is worked out from its leaves back.
"""

import torch
from torch import Tensor

from exlstm.data.words import Draws, TaskBatch, Wanted, ask, mix, scaled, shifted, step_key

NUMBERS, PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE, UNKNOWN, ACT = 5, 5, 6, 7, 8, 9, 10, 11, 12
# ListOps: four operators of 2 to 10 arguments, at most 10 deep; an argument is again a list with probability 1/4.
MINIMUM, MEDIAN, SUM, END = 10, 12, 13, 14
DEPTH, ARGUMENTS, OPERATORS = 10, 10, 4
ATTEMPTS, ROUNDS = 64, 200


def bracket_arithmetic(draw: Draws, wanted: Wanted) -> TaskBatch:
    """n, -n, (n), (-n) or (tree operator tree) with the operators +, - and ×, then "=": the result modulo 5."""
    size = (wanted.lengths - 1).clamp(min=1)
    word, value, _ = _expression(draw, size, max(1, wanted.longest - 1))
    word = torch.nn.functional.pad(word, (0, 1)).scatter(1, size[:, None], EQUALS)
    return ask(word, size + 1, value[:, None], 11, max(2, wanted.longest) + 1)


def solve_equation(draw: Draws, wanted: Wanted) -> TaskBatch:
    """A tree of `bracket_arithmetic` with x in place of a number, "=", its result, [ACT]: what is x modulo 5?

    Where a product with 0 would leave x open, + stands for the ×.
    """
    size = (wanted.lengths - 3).clamp(min=1)
    word, value, solution = _expression(draw, size, max(1, wanted.longest - 3), unknown=True)
    word = torch.nn.functional.pad(word, (0, 3))
    for offset, token in enumerate((EQUALS, value[:, None], ACT)):
        place = size[:, None] + offset
        word = word.scatter(1, place, token)
    return ask(word, size + 3, solution[:, None], 13, max(4, wanted.longest) + 1)


def _expression(draw: Draws, size: Tensor, most: int, unknown: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random trees of `size` (B,) tokens as words (B, most), their values (B,), and what x is where one is unknown."""
    number, operator, split = draw.below(NUMBERS, most), draw.below(3, most), draw.bits(most)
    word, value = torch.zeros_like(number), torch.zeros_like(number)
    levels, is_number = [], torch.zeros_like(number, dtype=torch.bool)
    row, start, length = torch.arange(len(size), device=size.device), torch.zeros_like(size), size
    # Every tree has a first place of its own, so what is drawn for it stands there.
    while len(row):
        bracket, negative = length >= 3, (length == 2) | (length == 4)
        word[row[bracket], start[bracket]] = OPEN
        word[row[bracket], (start + length - 1)[bracket]] = CLOSE
        leaf = length < 5
        r, s, minus = row[leaf], start[leaf], negative[leaf]
        at = s + bracket[leaf].long()
        word[r[minus], at[minus]] = MINUS
        at = at + minus.long()
        word[r, at], is_number[r, at] = number[r, s], True
        value[r, s] = torch.where(minus, -number[r, s], number[r, s]) % NUMBERS
        row, start, length = row[~leaf], start[~leaf], length[~leaf]
        left = 1 + scaled(split[row, start], length - 4)
        middle = start + 1 + left
        levels.append((row, start, middle, length))
        row, start = torch.cat((row, row)), torch.cat((start + 1, middle + 1))
        length = torch.cat((left, length - left - 3))
    solution = place = None
    if unknown:
        place = draw.bits(most).masked_fill(~is_number, -1).argmax(1)  # (B,)
        solution = word.gather(1, place[:, None])[:, 0]
    for row, start, middle, length in reversed(levels):
        a, b, o = value[row, start + 1], value[row, middle + 1], operator[row, start]
        if unknown:
            x = place[row]
            other = torch.where(x > middle, a, b)
            o = torch.where((x >= start) & (x < start + length) & (o == 2) & (other == 0), 0, o)
        word[row, middle] = PLUS + o
        value[row, start] = torch.where(o == 2, a * b, torch.where(o == 1, a - b, a + b)) % NUMBERS
    if unknown:
        word = word.scatter(1, place[:, None], UNKNOWN)
    return word, value[:, 0], solution


def listops(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Nested lists [MIN, [MAX, [MED or [SM (sum modulo 10) of digits: their value.

    Trees are drawn as published until their length is one of those asked for, whichever: long ones are rare among them.
    """
    keys, count = draw.keys, len(draw.keys)
    inputs = torch.zeros(count, wanted.longest, dtype=torch.long, device=keys.device)
    lengths, values = torch.zeros_like(keys), torch.zeros_like(keys)
    waiting = torch.arange(count, device=keys.device)
    for attempt in range(ROUNDS):
        tries = attempt * ATTEMPTS + torch.arange(ATTEMPTS, device=keys.device)
        roots = step_key(mix(keys[waiting, None]), tries).flatten()
        levels, sizes = _trees(roots, wanted.shortest > 1, wanted.longest)
        fits = ((sizes >= wanted.shortest) & (sizes <= wanted.longest)).view(-1, ATTEMPTS)
        first = fits.long().argmax(1) + torch.arange(len(waiting), device=keys.device) * ATTEMPTS
        found = fits.any(1)
        # Where the trees that fit stand in the batch, -1 elsewhere.
        home = torch.full_like(sizes, -1)
        home[first[found]] = waiting[found]
        lengths[waiting[found]] = sizes[first[found]]
        _write(levels, home, inputs, values)
        waiting = waiting[~found]
        if not len(waiting):
            return ask(inputs, lengths, values[:, None], 15, wanted.longest + 1)
    tried = ROUNDS * ATTEMPTS
    raise ValueError(
        f"no list of {wanted.shortest} to {wanted.longest} tokens among {tried}: wanted a wider range of lengths"
    )


def _trees(keys: Tensor, is_list: bool, longest: int) -> tuple[list[tuple], Tensor]:
    """Random trees of these keys, a level at a time from the root, and the tokens of each; beyond `longest` they stop growing.

    A level is (tree, parent in the level above, first child in the level below, arguments, token), a row a node.
    """
    tree, parent = torch.arange(len(keys), device=keys.device), torch.zeros_like(keys)
    sizes, levels = torch.zeros_like(keys), []
    for depth in range(1, DEPTH + 1):
        bits = mix(keys)
        nests = (shifted(bits, 62) == 0) if depth < DEPTH else torch.zeros_like(bits, dtype=torch.bool)
        if depth == 1 and is_list:
            nests = torch.ones_like(nests)
        nests &= sizes[tree] <= longest
        draws = [scaled(shifted(mix(bits + i), 2), n) for i, n in enumerate((10, OPERATORS, ARGUMENTS - 1))]
        arguments = torch.where(nests, draws[2] + 2, 0)
        token = torch.where(nests, draws[1] + MINIMUM, draws[0])
        sizes = sizes.scatter_add(0, tree, 1 + nests.long())
        levels.append((tree, parent, arguments.cumsum(0) - arguments, arguments, token))
        parent = torch.repeat_interleave(arguments)
        number = torch.arange(len(parent), device=keys.device) - levels[-1][2][parent]
        keys, tree = step_key(keys[parent], number), tree[parent]
        if not len(parent):
            break
    return levels, sizes


def _write(levels: list[tuple], home: Tensor, inputs: Tensor, values: Tensor):
    """The tokens and the values of the trees with a home into their rows of inputs (B, T) and values (B,)."""
    sizes, below = [], None
    for _, _, first, arguments, token in reversed(levels):
        size, value = torch.ones_like(token), token.clone()
        lists = (arguments > 0).nonzero().squeeze(1)
        if len(lists):
            first, count, operator = first[lists], arguments[lists], token[lists]
            parent, child_value, child_size = below
            size[lists] += 1 + torch.zeros_like(size).scatter_add(0, parent, child_size)[lists]
            ordered = (parent * 10 + child_value).sort().values % 10
            least, most = ordered[first], ordered[first + count - 1]
            median = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
            total = torch.zeros_like(value).scatter_add(0, parent, child_value)[lists] % 10
            value[lists] = torch.where(operator == MINIMUM, least, torch.where(operator == MEDIAN, median, most))
            value[lists] = torch.where(operator == SUM, total, value[lists])
        sizes.append(size)
        index = levels[len(levels) - len(sizes)][1]
        below = index, value, size
    tree = levels[0][0]
    values[home[home >= 0]] = value[home >= 0]
    start = torch.zeros_like(tree)
    for depth, (size, (tree, _, first, arguments, token)) in enumerate(zip(reversed(sizes), levels)):
        row = home[tree]
        kept, lists = row >= 0, (row >= 0) & (arguments > 0)
        inputs[row[kept], start[kept]] = token[kept]
        inputs[row[lists], (start + size - 1)[lists]] = END
        if depth + 1 < len(levels):
            parent, below = levels[depth + 1][1], sizes[len(levels) - depth - 2]
            before = torch.cat((below.new_zeros(1), below.cumsum(0)))
            start = start[parent] + 1 + before[:-1] - before[first[parent]]
