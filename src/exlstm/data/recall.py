"""Tasks of memory: associative recall (Zoology, arXiv 2312.04927), copying (Mamba, arXiv 2312.00752, E.1), nearest neighbours.

The order of keys, places and queries comes of sorting random numbers, so that a GPU makes a batch in a few calls.
"""

import torch

from exlstm.data.words import IGNORE, Draws, TaskBatch, Wanted, ask

VOCABULARY, POWER = 8192, 0.01
SYMBOLS, NOISE, MANY = 15, 15, 16
# Angles of the nearest neighbours are whole numbers, so that every device finds the same one.
CIRCLE = 1 << 31


def mqar(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Pairs of keys and values, then each key once more: at the key, its value. Tokens between them are random.

    Keys are 1 to 4095, values 4096 to 8191, none twice; queries stand after gaps of a power law (exponent 0.01 - 1) on even
    places. Without `items` there are length / 16 pairs.
    """
    pairs = wanted.items or max(1, wanted.shortest // 16)
    if wanted.shortest < 4 * pairs:
        raise ValueError(
            f"mqar of {pairs} pairs wants lengths of at least {4 * pairs}, the shortest is {wanted.shortest}"
        )
    half, lengths = VOCABULARY // 2, wanted.lengths - wanted.lengths % 2
    if pairs >= half:
        raise ValueError(f"mqar has {half - 1} keys, none of them twice, for {pairs} pairs")
    keys = draw.bits(half - 1).topk(pairs, 1).indices + 1  # (B, pairs)
    values = draw.bits(half).topk(pairs, 1).indices + half
    room = (wanted.longest - 2 * pairs) // 2
    place = torch.arange(room, device=keys.device)
    # The order of arrival of exponential clocks is a draw without replacement by weight.
    clock = -((draw.bits(room).double() + 0.5) / 2**62).log() / (place + 1.0) ** (POWER - 1)
    clock = clock.masked_fill(place >= (lengths[:, None] - 2 * pairs) // 2, torch.inf)
    gaps = clock.topk(pairs, 1, largest=False).indices
    width = 2 * pairs + 2 * room
    inputs = draw.below(VOCABULARY, width)
    inputs[:, : 2 * pairs] = torch.stack((keys, values), 2).flatten(1)
    asked = 2 * pairs + 2 * gaps
    inputs.scatter_(1, asked, keys)
    targets = torch.full_like(inputs, IGNORE).scatter_(1, asked, values)
    inputs = inputs.masked_fill(~wanted.inside(lengths, width), 0)
    return TaskBatch(inputs, targets, lengths)


def copy(draw: Draws, wanted: Wanted) -> TaskBatch:
    """16 tokens, then noise (15) up to the length: the tokens once more."""
    items = _items(wanted)
    data = draw.below(SYMBOLS, items)
    word = torch.nn.functional.pad(data, (0, wanted.longest - items), value=NOISE)
    return ask(word, wanted.lengths, data, 16, wanted.longest + items)


def selective_copy(draw: Draws, wanted: Wanted) -> TaskBatch:
    """16 tokens at random places of a word of noise (15): the tokens in their order."""
    items = _items(wanted)
    data = draw.below(SYMBOLS, items)
    places = draw.bits(wanted.longest).masked_fill(~wanted.inside(), -1).topk(items, 1).indices.sort(1).values
    word = torch.full_like(wanted.lengths, NOISE)[:, None].repeat(1, wanted.longest).scatter(1, places, data)
    return ask(word, wanted.lengths, data, 16, wanted.longest + items)


def _items(wanted: Wanted) -> int:
    items = wanted.items or min(MANY, wanted.shortest)
    if items > wanted.shortest:
        raise ValueError(f"{items} tokens to copy want lengths of at least {items}, the shortest is {wanted.shortest}")
    return items


def nearest_neighbour(draw: Draws, wanted: Wanted) -> TaskBatch:
    """Unit vectors with a value each, (x, y, value): at each, the value of the one so far that is nearest to the first.

    The first vector is what is looked for, its value does not count, and nothing is asked there. Values are uniform in
    [0, 1); inputs and targets are real numbers, NaN where nothing is asked (arXiv 2405.04517, figure 2 and B.1).
    """
    if wanted.shortest < 2:
        raise ValueError(f"nearest_neighbour asks nothing of {wanted.shortest} vector, wanted lengths of at least 2")
    angle, value = draw.below(CIRCLE, wanted.longest), draw.below(1 << 24, wanted.longest)
    apart = (angle - angle[:, :1]).abs()
    apart = torch.minimum(apart, CIRCLE - apart)
    place = torch.arange(wanted.longest, device=angle.device)
    apart[:, 0] = CIRCLE
    nearest = (apart * wanted.longest + place).cummin(1).values % wanted.longest
    value = (value / (1 << 24)).float()
    inside = wanted.inside()
    turn = angle.double() * (2 * torch.pi / CIRCLE)
    first = torch.where(place == 0, 0, value)
    inputs = torch.stack((turn.cos().float(), turn.sin().float(), first), 2).masked_fill(~inside[..., None], 0)
    targets = value.gather(1, nearest).masked_fill(~inside | (place == 0), torch.nan)
    return TaskBatch(inputs, targets, wanted.lengths)
