"""The synthetic tasks: answers against plain Python, lengths as asked, rows of the seed alone, what guessing earns."""

import itertools
import math

import pytest
import torch

from exlstm.data.tasks import TASKS, TaskBatches, scaled_accuracy, scaled_error

# Questions behind the word; the others ask inside it.
INSIDE = ("s3", "a5", "s5", "mqar", "nearest_neighbour")
BEHIND = [name for name in TASKS if name not in INSIDE]
# Tokens of a row that the length does not count, and lengths that are rounded down.
SAID_BACK = ("bucket_sort", "repetition", "reverse_string", "odds_first", "set", "stack_manipulation")
LENGTHS = {"mqar": (48, 64), "listops": (4, 60), "copy": (20, 40), "selective_copy": (20, 40)}


def lengths_of(name):
    return LENGTHS.get(name, (6, 40))


def rows(name, count=256, lengths=None, **options):
    """(word, answer) of every row as lists, the questions cut off."""
    batch = TaskBatches(name, count, *(lengths or lengths_of(name)), **options).batch(2)
    for inputs, targets, length in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.lengths.tolist()):
        answer = [t for t in targets if t != -100]
        yield (inputs[: length - len(answer)] if name in BEHIND else inputs[:length]), answer, targets[:length]


# The answers by plain Python, each from the tokens of the word alone.


def cycle(word):
    place = 0
    for step in word:
        place = (place + {5: 0, 6: 1, 7: -1}[step]) % 5
    return [place]


SIGNS = {5: "+", 6: "-", 7: "*", 9: "(", 10: ")", 11: "x"}


def calculated(tokens, x=None):
    text = "".join(SIGNS.get(t, str(t)) for t in tokens)
    return eval(text.replace("x", str(x)), {}) % 5


def result(word):
    assert word[-1] == 8
    return [calculated(word[:-1])]


def solution(word):
    assert word[-1] == 12 and word[-3] == 8
    found = [x for x in range(5) if calculated(word[:-3], x) == word[-2]]
    assert len(found) == 1, "an equation has one solution"
    return found


def counted(word):
    return sorted(((word.count(t), -t) for t in set(word)), reverse=True)[0]


def duplicate(word):
    half = len(word) // 2
    hole = word.index(9)
    assert hole >= half and all(a == b for a, b in zip(word[:half], word[half:]) if b != 9)
    return [word[hole - half]]


def before(act, of):
    def answer(word):
        assert word[-1] == act
        return of(word[:-1])

    return answer


def stacked(word):
    stack, actions = [], False
    for token in word:
        actions |= token >= 4
        if token == 8:
            stack.pop()
        else:
            assert actions == (token >= 4)
            stack.append(token % 4)
    return stack[::-1]


def listed(word):
    stack = []
    for token in word:
        if token == 14:
            items = []
            while isinstance(stack[-1], int):
                items.append(stack.pop())
            operator, items = stack.pop(), sorted(items)
            middle = (items[(len(items) - 1) // 2] + items[len(items) // 2]) // 2
            stack.append({"MIN": items[0], "MAX": items[-1], "MED": middle, "SM": sum(items) % 10}[operator])
        else:
            stack.append(token if token < 10 else {10: "MIN", 11: "MAX", 12: "MED", 13: "SM"}[token])
    (value,) = stack
    return [value]


def running(things, even):
    """The products by composing the permutations themselves."""
    elements = sorted(itertools.permutations(range(things)))
    if even:
        elements = [p for p in elements if round(parity_of(p)) == 1]

    def answer(word):
        arranged, said = tuple(range(things)), []
        for token in word:
            arranged = tuple(elements[token][i] for i in arranged)
            said.append(elements.index(arranged))
        return said

    return answer


def parity_of(p):
    return torch.linalg.det(torch.eye(len(p), dtype=torch.float64)[list(p)]).item()


def only(word):
    """The commonest token, which no other is as common as."""
    (_, most), *rest = sorted(((word.count(t), t) for t in set(word)), reverse=True)
    assert not rest or rest[0][0] < word.count(most)
    return [most]


ANSWERS = {
    "parity": lambda word: [sum(word) % 2],
    "even_pairs": lambda word: [int(sum(a != b for a, b in itertools.pairwise(word)) % 2 == 0)],
    "cycle_navigation": cycle,
    "arithmetic": result,
    "bracket_arithmetic": result,
    "solve_equation": solution,
    "majority": lambda word: [-counted(word)[1]],
    "majority_unique": only,
    "majority_count": lambda word: [min(62, counted(word)[0])],
    "missing_duplicate": duplicate,
    "bucket_sort": sorted,
    "repetition": before(10, list),
    "reverse_string": before(10, lambda word: word[::-1]),
    "odds_first": before(10, lambda word: word[::2] + word[1::2]),
    "set": before(126, lambda word: list(dict.fromkeys(word))),
    "stack_manipulation": before(9, stacked),
    "a_n_b_n": lambda word: [int(word == [0] * (len(word) // 2) + [1] * (len(word) // 2))],
    "a_n_b_n_uniform": lambda word: [int(word == [0] * (len(word) // 2) + [1] * (len(word) // 2))],
    "s3": running(3, False),
    "a5": running(5, True),
    "s5": running(5, False),
    "copy": lambda word: [t for t in word if t != 15],
    "selective_copy": lambda word: [t for t in word if t != 15],
    "listops": listed,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_right(name):
    for word, answer, _ in rows(name, lengths=(3, 40) if name in BEHIND and name not in LENGTHS else None):
        assert answer == ANSWERS[name](word), word


@pytest.mark.parametrize(
    "name", [n for n in BEHIND if n not in SAID_BACK and n not in ("listops", "copy", "selective_copy")]
)
def test_the_shortest_and_the_longest_words_are_right_too(name):
    for lengths in ((1, 1), (1, 8), (256, 256)):
        for word, answer, _ in rows(name, 32, lengths):
            assert answer == ANSWERS[name](word), word


@pytest.mark.parametrize("name", SAID_BACK)
def test_what_is_said_back_is_right_at_any_length(name):
    for lengths in ((1, 1), (1, 8), (255, 256)):
        for word, answer, targets in rows(name, 32, lengths):
            assert answer == ANSWERS[name](word), word
            assert len(targets) <= max(lengths[1], 5)


def test_a_key_recalls_its_value():
    for word, answer, targets in rows("mqar", lengths=(48, 64)):
        memory = dict(zip(word[:6:2], word[1:6:2]))
        assert len(memory) == len(set(memory.values())) == len(answer) == 3
        assert all(0 < key < 4096 <= value < 8192 for key, value in memory.items())
        asked = {word[t]: target for t, target in enumerate(targets) if target != -100}
        assert asked == memory and all(t >= 6 for t, target in enumerate(targets) if target != -100)


def test_every_task_has_its_solver():
    assert {*ANSWERS, "mqar", "nearest_neighbour"} == set(TASKS)


def test_the_nearest_neighbour_is_the_nearest():
    batch = TaskBatches("nearest_neighbour", 64, 3, 40).batch(1)
    for inputs, targets, length in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.lengths.tolist()):
        assert math.isnan(targets[0]) and all(math.isnan(t) for t in targets[length:])
        best = []
        for t in range(1, length):
            best.append((math.dist(inputs[t][:2], inputs[0][:2]), inputs[t][2]))
            assert math.hypot(*inputs[t][:2]) == pytest.approx(1, abs=1e-6) and 0 <= inputs[t][2] < 1
            assert targets[t] == min(best)[1]


@pytest.mark.parametrize("name", TASKS)
def test_lengths_and_shapes_are_as_asked(name):
    task, (low, high) = TASKS[name], lengths_of(name)
    full = TaskBatches(name, 300, low, high, seed=2, full=True).batch(3)
    batch = TaskBatches(name, 300, low, high, seed=2).batch(3)
    width = int(batch.lengths.max())
    assert batch.inputs.shape[1] == width <= full.inputs.shape[1]
    kept = (full.inputs[:, :width], full.targets[:, :width])
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(batch[:2], kept))
    place = torch.arange(full.inputs.shape[1])
    asked = ~full.targets.isnan() if task.features else full.targets != -100
    assert not (asked & (place >= full.lengths[:, None])).any() and asked.any(1).all()
    counted = full.lengths - (asked.sum(1) if name in BEHIND and name not in SAID_BACK else 0)
    assert counted.max() <= high and counted.min() >= low - 1
    assert len(counted.unique()) > (high - low) / 4
    if task.features:
        assert full.inputs.shape[2] == task.features and full.inputs.dtype == full.targets.dtype == torch.float32
        return
    assert full.inputs.dtype == full.targets.dtype == full.lengths.dtype == torch.int64
    assert full.inputs.min() >= 0 and full.inputs.max() < task.vocab_size
    assert full.targets[asked].min() >= 0 and full.targets[asked].max() < task.vocab_size
    if name in BEHIND:
        assert (full.inputs[asked] == task.vocab_size - 1).all()
    if name != "mqar":
        assert (full.inputs[place >= full.lengths[:, None]] == task.vocab_size - 1).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_row_depends_on_seed_and_number_alone(name):
    def same(a, b):
        return all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(a, b, strict=True))

    ends = lengths_of(name)
    small, large = (TaskBatches(name, size, *ends, seed=4, full=True) for size in (8, 32))
    whole = large.batch(1)
    for part in range(4):
        assert same(small.batch(4 + part), [t[8 * part : 8 * part + 8] for t in whole])
    assert same(small.rows(32, 32), whole)
    others = [
        small.batch(0),
        small.batch(1),
        small.batch(0, 1),
        TaskBatches(name, 8, *ends, seed=5, full=True).batch(0),
    ]
    assert len({b.inputs.numpy().tobytes() for b in others}) == 4
    # Building one on another device would give the same numbers: nothing comes of a generator.
    torch.manual_seed(9)
    assert same(small.batch(1), others[1])


@pytest.mark.parametrize("name", TASKS)
def test_guessing_earns_what_the_table_says(name):
    task = TASKS[name]
    batch = TaskBatches(name, 512, *((3, 40) if name in BEHIND and name not in LENGTHS else lengths_of(name))).batch(0)
    generator = torch.Generator().manual_seed(0)
    if task.features:
        constant = torch.full_like(batch.targets, 0.5)
        values = batch.inputs[:, 1:, 2].flatten()
        assert (values[values > 0] - 0.5).square().mean().item() == pytest.approx(task.chance, rel=0.05)
        assert abs(scaled_error(constant, batch.targets, task.chance)) < 0.1
        return
    asked = batch.targets[batch.targets != -100]
    # As many answers as the chance says, and all of them occur (of the rare ones, most do).
    answers = round(1 / task.chance)
    low = 4096 if name == "mqar" else 0
    assert low <= asked.min() and asked.max() < low + answers
    if name not in ("majority_count", "mqar"):
        assert len(asked.unique()) > 0.9 * answers
    guess = low + torch.randint(answers, batch.targets.shape, generator=generator)
    assert abs(scaled_accuracy(guess, batch.targets, task.chance)) < 0.06
    if name in ("parity", "even_pairs", "cycle_navigation", "a_n_b_n", "a_n_b_n_uniform", "missing_duplicate", "s3"):
        # Nor does any constant earn more.
        assert asked.bincount().max().item() / len(asked) == pytest.approx(task.chance, abs=0.09)


def test_pairs_keys_and_places_of_mqar_are_those_of_zoology():
    batch = TaskBatches("mqar", 2000, 64, 64, items=4).batch(0)
    asked = batch.targets != -100
    assert (asked.sum(1) == 4).all() and batch.inputs.shape == (2000, 64)
    places = asked.nonzero()[:, 1]
    assert (places % 2 == 0).all() and places.min() == 8
    # Gaps g follow (g + 1) to the power of .01 - 1: the first is the commonest by far, twice as far is half as common.
    share = torch.bincount((places - 8) // 2, minlength=28) / 2000
    weight = torch.arange(1, 29.0) ** -0.99
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(weight.expand(20000, -1), 4, generator=generator).flatten()
    assert (share - torch.bincount(drawn, minlength=28) / 20000).abs().max() < 0.04


def test_lists_are_as_long_as_published():
    batch = TaskBatches("listops", 16, 500, 2000).batch(0)
    assert batch.lengths.min() >= 500 and batch.lengths.max() <= 2001 and batch.lengths.float().std() > 150


def test_a_curriculum_grows_with_the_steps():
    batches = TaskBatches("parity", 256, 3, 160, grow=(40, 100))
    longest = [int(batches.batch(step).lengths.max()) - 1 for step in (0, 50, 100, 1000)]
    assert 38 <= longest[0] <= 40 and 95 <= longest[1] <= 100 and 155 <= longest[2] <= 160 and 155 <= longest[3] <= 160


def test_scores_are_scaled():
    targets = torch.tensor([[-100, 1, -100], [-100, -100, 0]])
    assert scaled_accuracy(torch.tensor([[9, 1, 9], [9, 9, 0]]), targets, 0.5) == 1
    assert scaled_accuracy(torch.tensor([[9, 1, 9], [9, 9, 1]]), targets, 0.5) == 0
    assert scaled_accuracy(torch.tensor([[9, 0, 9], [9, 9, 1]]), targets, 0.2) == pytest.approx(-0.25)
    real = torch.tensor([[math.nan, 0.0], [1.0, math.nan]])
    assert scaled_error(torch.tensor([[7.0, 0.0], [1.0, 7.0]]), real, 1 / 12) == 1
    assert scaled_error(torch.tensor([[7.0, 0.5], [0.5, 7.0]]), real, 1 / 4) == 0


BAD_TASKS = [
    (("parrity", 4, 3, 40), {}, "unknown task 'parrity', did you mean 'parity'"),
    (("xor", 4, 3, 40), {}, "unknown task 'xor'; known: bucket_sort"),
    (("parity", 0, 3, 40), {}, "batch_size is 0"),
    (("parity", 4, 0, 40), {}, "lengths are 0 to 40"),
    (("parity", 4, 41, 40), {}, "lengths are 41 to 40"),
    (("mqar", 4, 64, 64), {"items": -1}, "items is -1"),
    (("parity", 4, 3, 40), {"grow": (2, 10)}, r"grow is \(2, 10\), wanted a length out of 3 to 40"),
    (("parity", 4, 3, 40), {"grow": (10, 0)}, "a number of steps above 0"),
]


@pytest.mark.parametrize(("arguments", "options", "sentence"), BAD_TASKS)
def test_bad_tasks_are_refused_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TaskBatches(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "items", "sentence"),
    [
        (("mqar", 4, 64, 64), 17, "mqar of 17 pairs wants lengths of at least 68, the shortest is 64"),
        (("mqar", 1, 16384, 16384), 4096, "mqar has 4095 keys, none of them twice, for 4096 pairs"),
        (("nearest_neighbour", 4, 1, 1), 0, "asks nothing of 1 vector, wanted lengths of at least 2"),
        (("copy", 4, 10, 40), 11, "11 tokens to copy want lengths of at least 11, the shortest is 10"),
        (("listops", 4, 2, 3), 0, "no list of 2 to 3 tokens"),
    ],
)
def test_what_does_not_fit_the_lengths_is_refused_in_a_sentence(arguments, items, sentence):
    with pytest.raises(ValueError, match=sentence):
        TaskBatches(*arguments, items=items).batch(0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_gpu_makes_the_same_rows(name):
    here, there = (TaskBatches(name, 64, *lengths_of(name), seed=4, device=d).batch(1) for d in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, equal_nan=True, rtol=0, atol=1e-6 if a.is_floating_point() else 0)
