"""The engine's laws: a sequence writes what it writes alone, whoever comes, forks and goes beside it; graphs change nothing."""

import copy
import pickle
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exlstm.layers.attention import AttentionState, packed
from exlstm.models import engine as engines
from exlstm.models import step as steps
from exlstm.models.config import NORMS, AttentionOptions
from exlstm.models.engine import Engine
from exlstm.models.reading import leaves, mapped
from exlstm.models.sequence import Request, Sequence
from test_language import CONTINUED, KINDS, PROMPTS, build, tokens_of, writer

aten = torch.ops.aten
MIXES = [*KINDS, ("attention", "mlstm")]
each_kind = pytest.mark.parametrize("blocks", MIXES, ids="+".join)
# Blocks that read as many places as the longest row has.
GROWING = {"attention"}
RULES = {
    "greedy": {"temperature": 0},
    "drawn": {"seed": 3},
    "top k": {"seed": 3, "top_k": 5, "temperature": 0.8},
    "top p, penalty": {"seed": 4, "top_p": 0.9, "repetition_penalty": 1.3},
    "min p": {"seed": 5, "min_p": 0.1, "temperature": 1.2},
    "top k of all": {"seed": 6, "top_k": 1000, "top_p": 0.95},
    "likeliest": {"top_k": 1},
    "beyond float32": {"seed": 7, "temperature": 1e300, "repetition_penalty": 1e300},
}


def finish(engine):
    for _ in engine.run():
        pass


def packed_state(state):
    """Attention's tokens side by side, where a batch of unlike prompts leaves holes."""
    kept = state.positions >= 0
    return AttentionState(*packed(*state[:3], kept, kept.sum(1).max()), state.length)


def near(found, wanted):
    found, wanted = (leaves(mapped(packed_state, state, kind=AttentionState)) for state in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rules", RULES)
@each_kind
def test_the_default_device_and_dtype_change_nothing(blocks, rules):
    def written():
        engine = Engine(model, 2)
        sequences = engine.admit(*(Request(prompt, **settings) for prompt in prompts))
        finish(engine)
        return [sequence.tokens for sequence in sequences], model.generate(prompts, **settings)

    model, prompts = build(blocks), [[1, 2, 3], [4] * 70]
    settings = {"max_tokens": 6, "eos": 9, "seed": 1, **RULES[rules]}
    wanted = written()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = written()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == wanted
    assert written() == wanted


@each_kind
def test_a_slot_writes_what_generate_writes(blocks):
    """Every rule at once in one engine, prompts of unlike lengths read together."""
    model = build(blocks)
    engine = Engine(model, len(RULES))
    prompts = [PROMPTS[i % 3] for i in range(len(RULES))]
    requests = [Request(prompt, 12, **rules) for prompt, rules in zip(prompts, RULES.values(), strict=True)]
    sequences = engine.admit(*requests)
    finish(engine)
    for sequence, prompt, rules in zip(sequences, prompts, RULES.values(), strict=True):
        wanted, state = model.generate(prompt, 12, return_state=True, **rules)
        assert sequence.tokens == wanted, rules
        more = model.generate([2], 5, state=engine.state(sequence), **rules)
        assert more == model.generate([2], 5, state=state, **rules)


@each_kind
def test_whoever_comes_forks_and_goes(blocks):
    follow_a_schedule(build(blocks))


def follow_a_schedule(model, look=lambda engine: None):
    """A seeded one: at every moment some come, fork or are removed; each writes what it writes alone."""
    chance, known = random.Random(0), []
    engine = Engine(model, 3)
    for _ in range(60):
        if engine.free and chance.random() < 0.4:
            prompt = tokens_of(chance.randint(1, 9), seed=len(known)).tolist()
            rules = list(RULES.values())[len(known) % len(RULES)]
            known.append((engine.admit(Request(prompt, chance.randint(1, 12), **rules))[0], prompt, rules, []))
        living = [entry for entry in known if entry[0].slot is not None]
        if living and engine.free and chance.random() < 0.4:
            sequence, prompt, rules, before = chance.choice(living)
            fork = engine.fork(sequence)
            known.append((fork, prompt, rules, before + sequence.tokens))
        for sequence, *_ in living:
            if sequence.done or chance.random() < 0.02:
                engine.remove(sequence)
        engine.step()
        look(engine)
    finish(engine)
    assert sum(bool(before) for *_, before in known) > 1 and len(known) > 8
    for sequence, prompt, rules, before in known:
        written = before + sequence.tokens
        assert written == model.generate(prompt, len(written), **rules)
        assert sequence.done != "length" or len(sequence.tokens) == sequence.request.max_tokens


@pytest.mark.parametrize("blocks", [b for b in MIXES if not GROWING & {*b}], ids="+".join)
def test_a_row_does_not_see_its_neighbours(blocks):
    model, found = build(blocks), []
    for others in ((), (Request([3, 4], 4, seed=1, top_p=0.5), Request([9] * 20, 30, temperature=0))):
        engine = Engine(model, 3)
        (sequence,) = engine.admit(Request([5, 6, 7], 12, seed=2))
        for other in others:
            engine.admit(other)
        finish(engine)
        found.append((sequence.tokens, engine.state(sequence)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*(leaves(state) for _, state in found), strict=True))


@each_kind
@pytest.mark.parametrize("case", CONTINUED)
def test_forks_and_files_go_on_alike(blocks, case, tmp_path):
    model, rules = build(blocks), CONTINUED[case]
    whole = model.generate([5, 6, 7], 20, **rules)
    engine = Engine(model, 4)
    (first,) = engine.admit(Request([5, 6, 7], 20, **rules))
    while len(first.tokens) < 8:
        engine.step()
    engine.save(first, tmp_path / "state.safetensors")
    fork, short = engine.fork(first), engine.fork(first, max_tokens=3)
    loaded = engine.load(tmp_path / "state.safetensors", torch.tensor([2]), max_tokens=1, **rules)
    assert loaded.prompt == [2]
    engine.remove(loaded)
    loaded = engine.load(tmp_path / "state.safetensors", max_tokens=12, **rules)
    behind = model.generate([], 12, state=engine.state(first), **rules)
    finish(engine)
    assert first.tokens == whole
    assert fork.tokens == loaded.tokens == behind == whole[8:]
    assert short.tokens == whole[8:11] and short.done == "length"


STOPS = {
    "a text": lambda text, tokens: text[9:11],
    "the first to be complete": lambda text, tokens: [text[12:15], text[10:16]],
    "tokens": lambda text, tokens: tokens[7:9],
    "both": lambda text, tokens: [tokens[14:16], text[20:22]],
    "never": lambda text, tokens: "\0\0\0",
}


@pytest.mark.parametrize("case", STOPS)
def test_stops_are_those_of_generate(case):
    model, rules = writer(), {"seed": 1, "max_tokens": 30}
    stop = STOPS[case](model.generate("ab", **rules), model.generate([97, 98], **rules))
    engine = Engine(model, 3)
    text, tokens = engine.admit(Request("ab", stop=stop, **rules), Request([97, 98], stop=stop, **rules))
    engine.admit(Request("b", 50, seed=4))
    pieces, ones = "", []
    for came in engine.run():
        pieces += text.fresh() if text in came else ""
        ones += tokens.fresh() if tokens in came else []
    assert text.text == pieces == model.generate("ab", stop=stop, **rules)
    assert tokens.tokens == ones == model.generate([97, 98], stop=stop, **rules)
    assert text.done == tokens.done == ("length" if case == "never" else "stop")
    wanted = model.generate("ab", stop=stop, return_state=True, **rules)[1]
    near(engine.state(text), wanted)


def test_the_state_stands_after_the_result_wherever_a_row_ends():
    model = build()
    free = model.generate(PROMPTS[0], 12, temperature=0)
    many = [t for t in range(61) if t not in free] + [free[5]]
    for ends in ({"eos": free[4]}, {"stop": free[3:5]}, {"eos": many[-12:]}, {}):
        engine = Engine(model, 2)
        (sequence,) = engine.admit(Request(PROMPTS[0], 12, temperature=0, **ends))
        engine.admit(Request([1], 20, seed=0))
        finish(engine)
        wanted, state = model.generate(PROMPTS[0], 12, temperature=0, return_state=True, **ends)
        assert sequence.tokens == wanted and sequence.done == ("stop" if ends else "length")
        near(engine.state(sequence), state)


def writes_alike(model):
    engine = Engine(model, 2)
    (sequence,) = engine.admit(Request([5, 6, 7], 8, temperature=0))
    finish(engine)
    wanted, state = model.generate([5, 6, 7], 8, temperature=0, return_state=True)
    assert sequence.tokens == wanted
    near(engine.state(sequence), state)
    return state.logits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("out_norm", NORMS)
def test_a_slot_reads_through_the_norms_that_generate_reads_through(out_norm, norm):
    model = build(out_norm=out_norm, norm=norm, tie_embeddings=True)
    with torch.no_grad():
        for part in (model.stack.norm, model.norm):
            for weight in part.parameters():
                weight.normal_()
    writes_alike(model)


def doubled(module, args, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


HEARD = ["embedding", "stack", "stack.blocks.0", "stack.blocks.0.mixer", "stack.blocks.1.ffn_norm", "norm", "head"]


@pytest.mark.parametrize("name", HEARD)
def test_a_slot_hears_the_hooks_that_generate_hears(name):
    """Whoever steers or watches a model does so in a slot too."""
    plain = writes_alike(build())
    model = build()
    model.get_submodule(name).register_forward_hook(doubled)
    assert not torch.equal(writes_alike(model), plain)


@each_kind
def test_sixteen_bits_choose_alike(blocks):
    """Logits of 16 bits have equals: which of them are the likeliest k is the same in a slot and in generate."""
    model = build(blocks).bfloat16()
    rules = [{"seed": seed, "top_k": k, "top_p": p} for seed in range(4) for k, p in ((5, 1.0), (20, 0.9))]
    for settings in rules:
        engine = Engine(model, 1)
        (sequence,) = engine.admit(Request([5, 6, 7], 12, **settings))
        finish(engine)
        assert sequence.tokens == model.generate([5, 6, 7], 12, **settings)


@each_kind
def test_a_failed_step_ends_who_was_writing_and_the_engine_goes_on(blocks, monkeypatch):
    model, rules = build(blocks), {"seed": 3, "top_p": 0.9}
    whole = model.generate([5, 6, 7], 12, **rules)
    engine = Engine(model, 3)
    broken, ended = engine.admit(Request([5, 6, 7], 12, **rules), Request([1], 2, temperature=0))
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.stack.blocks[-1].mixer), "forward", lambda *_, **__: 1 / 0)
        patch.setattr(type(model.stack.blocks[-1].mixer), "_token", lambda *_, **__: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert (broken.done, ended.done, broken.tokens) == ("error", "length", whole[:4])
    assert list(engine.run()) == [] and engine.step() == []
    fork = engine.fork(broken)
    engine.remove(broken)
    (again,) = engine.admit(Request([5, 6, 7], 12, **rules))
    finish(engine)
    assert again.tokens == whole and fork.tokens == whole[4:]


# (object, method, at which call) of what takes part in seating
SEATING = {
    "reading": (engines, "read", 2),
    "a state": (steps.Step, "seat", 2),
    "rules": (engines.Chooser, "seat", 2),
    "rules of the first": (engines.Chooser, "seat", 1),
}


@pytest.mark.parametrize("case", SEATING)
def test_whoever_fails_half_way_to_a_seat_leaves_the_engine_as_it_was(case, monkeypatch):
    model, requests = build(), [Request([5, 6, 7], 6, seed=1, top_p=0.9), Request([1], 6, temperature=0)]
    engine, (place, name, bad) = Engine(model, 3), SEATING[case]
    (writing,) = engine.admit(Request([2, 3], 6, seed=2))
    sequences, calls, real = [Sequence(model, request) for request in requests], [], getattr(place, name)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == bad:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.enter(sequences)
    assert len(calls) == bad and engine.free == 2
    assert engine.step() == [writing]
    engine.enter(sequences)
    finish(engine)
    for sequence, request in zip((writing, *sequences), (writing.request, *requests), strict=True):
        wanted = model.generate(
            request.prompt, 6, temperature=request.temperature, seed=request.seed, top_p=request.top_p
        )
        assert sequence.tokens == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_of_another_dtype_takes_a_seat(dtype):
    model = build()
    _, state = copy.deepcopy(model).to(dtype).generate([1, 2, 3], 0, return_state=True)
    engine = Engine(model, 1)
    (sequence,) = engine.admit(Request([], 9, temperature=0, state=state))
    finish(engine)
    assert sequence.tokens == model.generate([], 9, temperature=0, state=state)


# Attention's rooms


@pytest.fixture(params=["the places in use", "all places"])
def small(request, monkeypatch):
    """Rooms that double from 4 places on and shrink at once; every place is looked at where a graph does so."""
    for module in (engines, steps):
        monkeypatch.setattr(module, "LEAST", 4)
    monkeypatch.setattr(engines, "IDLE_BYTES", 0)
    if request.param == "all places":
        monkeypatch.setattr(steps.Step, "reached", lambda step: step.state)


@pytest.mark.parametrize("blocks", [("attention",), ("mlstm_window", "attention")], ids="+".join)
def test_whoever_comes_forks_and_goes_while_rooms_grow_and_shrink(blocks, small):
    model, sizes = build(blocks), []
    follow_a_schedule(model, lambda engine: sizes.append(engine._step.size))
    assert {*sizes} == {4, 8, 16, 32}
    assert {a < b for a, b in pairwise(sizes) if a != b} == {True, False}


def test_rooms_double_and_shrink(small):
    model = build(("attention",))
    engine = Engine(model, 2)
    long, short = engine.admit(Request(list(range(40)), 4, temperature=0), Request([1, 2], 12, temperature=0))
    room = engine._step.state[0]
    assert len(room.keys[0]) == engine._step.size == 64
    finish(engine)
    assert engine._step.state[0].keys is room.keys
    assert short.tokens == model.generate([1, 2], 12, temperature=0)
    kept = engine.state(short)
    engine.remove(long)
    # 14 tokens are read.
    assert len(engine._step.state[0].keys[0]) == engine._step.size == 16
    assert all(torch.equal(a, b) for a, b in zip(leaves(engine.state(short)), leaves(kept), strict=True))
    engine.remove(short)
    assert len(engine._step.state[0].keys[0]) == engine._step.size == 4
    (again,) = engine.admit(Request([1, 2], 12, temperature=0))
    finish(engine)
    assert again.tokens == short.tokens


def test_rooms_that_find_no_memory_lose_nothing(small, monkeypatch):
    """To shrink, and then to grow: one layer has moved, and the other has not."""
    model, long = build(("attention",)), Request(list(range(40)), 9, temperature=0)
    engine, real, calls = Engine(model, 2), steps._resized, []
    first, short = engine.admit(long, Request([1, 2], 40, temperature=0))

    def scarce(*arguments):
        calls.append(1)
        return real(*arguments) if len(calls) % 2 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_resized", scarce)
        with pytest.raises(ZeroDivisionError):
            engine.remove(first)
        assert len(calls) == 2
        with pytest.raises(ZeroDivisionError):
            engine.admit(long)
    (again,) = engine.admit(long)
    finish(engine)
    for sequence in (short, again):
        assert sequence.tokens == model.generate(sequence.prompt, sequence.request.max_tokens, temperature=0)


def test_small_rooms_stay(monkeypatch):
    """What takes few bytes is not worth another graph."""
    for module in (engines, steps):
        monkeypatch.setattr(module, "LEAST", 4)
    engine = Engine(build(("attention",)), 2)
    for prompt in (40, 2):
        engine.remove(engine.admit(Request([1] * prompt, 2))[0])
        assert engine._step.size == 64


def test_rooms_grow_beneath_the_rows(small, graphs, tmp_path):
    """Across every growth a row is read, forked and saved, and a graph is recorded where buffers have moved, nowhere else."""
    model, given = build(("mlstm", "attention", "attention"), n_layers=3), {"temperature": 0}
    whole, other = (plainly(model, prompt, 60, **given) for prompt in ([5, 6, 7], PROMPTS[1]))
    graphs.clear()
    engine = Engine(model, 4)
    engine.captures, sizes, places, forks = True, [], [], []
    first, second = engine.admit(Request([5, 6, 7], 60, **given), Request(PROMPTS[1], 60, **given))
    while not first.done:
        written, before = len(first.tokens), engine._step.size
        engine.step()
        if engine._step.size > before and written:
            state = engine.state(first)
            wanted = plainly(model, [5, 6, 7], written + 1, return_state=True, **given)[1]
            near(state, wanted)
            assert state.layers[1].positions.tolist() == [list(range(3 + written + 1))]
            engine.save(first, tmp_path / f"{written + 1}.safetensors")
            forks.append((engine.fork(first, max_tokens=5), written + 1))
            while not forks[-1][0].done:
                engine.step()
            engine.remove(forks[-1][0])
        sizes.append(engine._step.size)
        places.append(addresses(engine))
    finish(engine)
    assert first.tokens == whole and second.tokens == other and len(forks) > 2
    assert sizes == sorted(sizes) and sizes[-1] == 64
    for (a, before), (b, after) in pairwise(zip(sizes, places, strict=True)):
        assert (a == b) == (before == after)
    # 4, 8, 16, 32, 64.
    assert sum(isinstance(call, steps.Step) for call in graphs) == 5
    for fork, written in forks:
        assert fork.tokens == whole[written : written + 5]
        loaded = engine.load(tmp_path / f"{written}.safetensors", max_tokens=5, **given)
        finish(engine)
        assert loaded.tokens == fork.tokens
        engine.remove(loaded)


def test_a_state_with_holes_takes_a_seat(small):
    """Of a state that was padded, reset or half forgotten the tokens that are seen are seated, whatever lies between them."""
    model, tokens = build(("attention", "mlstm_window")), tokens_of(3, 24)
    reset = torch.zeros(3, 24, dtype=torch.bool)
    reset[1, 20] = True
    with torch.no_grad():
        _, state = model(tokens, reset=reset, lengths=torch.tensor([24, 24, 2]))
    engine = Engine(model, 3)
    rows = [mapped(lambda x, i=i: x[i : i + 1], tuple(state)) for i in range(3)]
    sequences = engine.admit(*(Request([7], 9, temperature=0, state=row) for row in rows[1:]))
    assert engine._step.size == 8
    sequences = [*engine.admit(Request([7], 9, temperature=0, state=rows[0])), *sequences]
    assert engine._step.size == 32
    finish(engine)
    for sequence, row in zip(sequences, rows, strict=True):
        wanted, after = model.generate([7], 9, temperature=0, state=row, return_state=True)
        assert sequence.tokens == wanted
        near(engine.state(sequence), after)


class Waits(TorchDispatchMode):
    """Operations for which a GPU has to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select), function
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in _indices(function, args)), (
            function
        )
        return function(*args, **(kwargs or {}))


def _indices(function, args):
    return args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()


@pytest.mark.parametrize("window", [0, 5])
def test_a_step_of_attention_waits_for_nothing(window):
    step = steps.Step(build(("attention",), attention=AttentionOptions(window=window, sinks=window // 3)), 2)
    step.alive[0] = True
    with torch.inference_mode(), Waits():
        for _ in range(7):
            step()
    assert step.state[0].length.tolist() == [7, 0]
    with pytest.raises(AssertionError), Waits():
        step.row(0)


class Growing(torch.nn.Module):
    """A block of somebody who keeps all that it has read, in a way of its own."""

    def forward(self, x, state=None, *, mask=None, reset=None):
        state = x if state is None else torch.cat([state, x], 1)
        return x + state.mean(1, keepdim=True), state


def test_a_state_that_grows_otherwise_is_told(graphs):
    model = build()
    model.stack.blocks[0] = Growing()
    assert model.generate([5, 6], 7, temperature=0) == plainly(model, [5, 6], 7, temperature=0) and not graphs
    engine = Engine(model, 1)
    with pytest.raises(ValueError, match="a part of the state grew from"):
        engine.admit(Request([5], 3))
        engine.step()


class Around(torch.nn.Module):
    """A block of somebody that calls ours."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, state=None, **flags):
        return self.block(x, state, **flags)


@pytest.mark.parametrize("kind", ["attention", "mlstm_window"])
def test_a_block_inside_somebodys_has_its_room(kind, small):
    model = build((kind, "mlstm"))
    wanted = model.generate([5, 6, 7], 20, temperature=0)
    model.stack.blocks[0] = Around(model.stack.blocks[0])
    engine = Engine(model, 2)
    (sequence,) = engine.admit(Request([5, 6, 7], 20, temperature=0))
    finish(engine)
    assert sequence.tokens == wanted


HYBRIDS = {
    "whole": AttentionOptions(rope_base=0.0),
    "window": AttentionOptions(rope_base=0.0, window=5, sinks=2),
    "window with positions": AttentionOptions(window=5),
    "itself": AttentionOptions(window=1),
    "heads of its own": AttentionOptions(n_heads=4, n_kv_heads=2, window=5),
}


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_hybrid_writes_far_beyond_its_window(case, tmp_path):
    """Its buffers have one size whatever is read and written (LEAST tokens without a window); it writes what a forward says."""
    model, given = build(("mlstm", "mlstm", "attention"), n_layers=3, attention=HYBRIDS[case]), {"temperature": 0}
    whole = model.generate([5, 6, 7], 40, **given)
    assert whole == list(model.generate([5, 6, 7], 40, stream=True, **given))
    assert whole == model(torch.tensor([[5, 6, 7, *whole]]))[0][0, 2:-1].argmax(-1).tolist()
    engine = Engine(model, 4)
    assert engine._step.fixed
    sizes = [tuple(x.shape) for x in leaves(engine._step.state)]
    first, _ = engine.admit(Request([5, 6, 7], 40, **given), Request(list(range(30)), 40, seed=1))
    forks = []
    for written in (3, 20):
        while len(first.tokens) < written:
            engine.step()
        engine.save(first, tmp_path / f"{written}.safetensors")
        near(engine.state(first).layers, model.generate([5, 6, 7], written, return_state=True, **given)[1].layers)
        forks.append(engine.fork(first))
    finish(engine)
    assert first.tokens == whole and [fork.tokens for fork in forks] == [whole[3:], whole[20:]]
    assert sizes == [tuple(x.shape) for x in leaves(engine._step.state)]
    for written in (3, 20):
        state = model.load_state(tmp_path / f"{written}.safetensors")
        assert model.generate([], 40 - written, state=state, **given) == whole[written:]


BAD = {
    "no free slot": (
        lambda e, m: e.admit(*[Request([1])] * 3),
        "at most 2, the engine's free slots; a sequence that is done has",
    ),
    "a batch": (lambda e, m: e.admit(Request([[1], [2]])), "prompt holds 2 rows, wanted a single one"),
    "nothing": (lambda e, m: e.admit(Request([])), "prompt is empty"),
    "a foreign token": (lambda e, m: e.admit(Request([61])), "prompt holds token 61, wanted 0 to 60"),
    "a state of another width": (
        lambda e, m: e.admit(Request([1]), after(d_model=64)),
        "state.0.0 has shape (1, 3, 64)",
    ),
    "a state of one head": (
        lambda e, m: e.admit(Request([1]), after(n_heads=1)),
        "state.0.1.c has shape (1, 1, 16, 32)",
    ),
    "a state of fewer blocks": (lambda e, m: e.admit(after(blocks=["mlstm"], n_layers=1)), "state has 1 parts"),
    "a state of other blocks": (lambda e, m: e.admit(after(("attention", "slstm"))), "state.0 has 4 parts, wanted 2"),
    "half a token": (lambda e, m: e.admit(Request([1], 1.5)), "max_tokens is 1.5"),
    "a seed": (lambda e, m: e.admit(Request([1], seed="x")), "seed is 'x'"),
    "a rule": (lambda e, m: e.admit(Request([1], top_p=0)), "top_p is 0"),
    "a removed one": (lambda e, m: e.state(removed(e)), "the sequence has no slot in this engine"),
    "no text": (lambda e, m: e.admit(Request([1], 1))[0].text, "the sequence has no text"),
    "no request": (lambda e, m: e.admit([1, 2]), "the request is list, wanted a Request"),
    "one twice": (lambda e, m: e.enter([Sequence(m, Request([1], 2))] * 2), "a sequence came twice"),
    "one again": (lambda e, m: e.enter([removed(e)]), "a sequence came twice"),
    "no model": (lambda e, m: Engine(m.stack, 1), "model is Stack, wanted a LanguageModel"),
    "no sequence": (lambda e, m: e.remove("a"), "sequence is str, wanted a Sequence"),
    "no slots": (lambda e, m: Engine(m, 0), "slots is 0, wanted a whole number of at least 1"),
}


def after(*blocks, **settings):
    """A request that goes on from another model's state, with nothing to read before."""
    _, state = build(*blocks, **settings).generate([1], 0, return_state=True)
    return Request([], 3, state=state)


def removed(engine):
    (sequence,) = engine.admit(Request([1], 1))
    engine.remove(sequence)
    engine.remove(sequence)
    return sequence


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_sentence_and_seats_nobody(case):
    model = build()
    engine, (call, told) = Engine(model, 2), BAD[case]
    with pytest.raises((ValueError, TypeError)) as error:
        call(engine, model)
    assert told in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError):
        engine.admit(Request([1]), Request([99]))
    if case != "no text":
        assert engine.free == 2 and engine.step() == []


def test_more_tokens_than_anybody_can_count():
    model, settings = build(), {"max_tokens": 2**70, "seed": 8, "eos": [*range(0, 61, 3)]}
    engine = Engine(model, 1)
    (sequence,) = engine.admit(Request([1, 2], **settings))
    finish(engine)
    assert sequence.tokens == model.generate([1, 2], **settings) and sequence.done == "stop"


def test_weights_may_change_in_place():
    model = build()
    engine = Engine(model, 1)
    other = build(seed=1)
    model.load_state_dict(other.state_dict())
    (sequence,) = engine.admit(Request([1, 2], 9, temperature=0))
    finish(engine)
    assert sequence.tokens == other.generate([1, 2], 9, temperature=0)


def test_nan_stays_in_its_row():
    model = build()
    engine = Engine(model, 2)
    good, bad = engine.admit(Request([1, 2], 9, temperature=0), Request([3], 9, seed=0))
    with torch.inference_mode():
        for leaf in leaves(engine._step.state):
            leaf[bad.slot] = torch.nan
    finish(engine)
    assert good.tokens == model.generate([1, 2], 9, temperature=0) and len(bad.tokens) == 9
    engine.remove(bad)
    (again,) = engine.admit(Request([3], 9, temperature=0))
    finish(engine)
    assert again.tokens == model.generate([3], 9, temperature=0)


# generate out of graphs; here a graph is the call itself


def addresses(engine):
    step = engine._step
    return [x.data_ptr() for x in (*leaves(step.state), step.tokens, step.alive, step.logits)]


@pytest.fixture
def graphs(monkeypatch):
    """Lets generate take its engine on this CPU; the list of calls that were captured. A graph knows where the buffers were."""
    captured = []

    def capture(self, call):
        captured.append(call)
        before = addresses(self)

        def replay():
            # Choosing reads no room.
            assert before == addresses(self) or not isinstance(call, steps.Step)
            call()

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(engines, "capturable", lambda model: True)
    monkeypatch.setattr(Engine, "_capture", capture)
    return captured


def plainly(model, *arguments, **settings):
    """generate without an engine."""
    plain = copy.deepcopy(model)
    plain.held.take = lambda *_: None
    return plain.generate(*arguments, **settings)


@each_kind
def test_generate_out_of_graphs_is_generate(blocks, graphs):
    model, eos = build(blocks), {"eos": [7, 9], "stop": [[3, 4]]}
    for rules in [*RULES.values(), {**RULES["drawn"], **eos}]:
        found, state = model.generate(PROMPTS, 11, return_state=True, **rules)
        wanted, truth = plainly(model, PROMPTS, 11, return_state=True, **rules)
        assert found == wanted
        near(state, truth)
        more = [[7, 7], [], [1, 2, 3]]
        assert model.generate(more, 5, state=state, **rules) == plainly(model, more, 5, state=truth, **rules)
        assert list(model.generate([4], 6, stream=True, **rules)) == plainly(model, [4], 6, **rules)
    assert model.generate([4], 0) == []
    assert graphs


def test_graphs_are_kept_while_nothing_changes(graphs):
    model = build()
    first = model.generate([1, 2], 8, temperature=0)
    count = len(graphs)
    assert count == 2
    assert model.generate([1, 2], 8, temperature=0) == first and model.generate([9] * 30, 20, temperature=0)
    assert len(graphs) == count
    model.generate([1, 2], 8, seed=0)
    assert len(graphs) == count + 1
    model.generate([[1, 2]] * 2, 8, temperature=0)
    assert len(graphs) == count + 3
    other = build(seed=1)
    model.load_state_dict(other.state_dict())
    assert model.generate([[1, 2]] * 2, 8, temperature=0)[0] == plainly(other, [1, 2], 8, temperature=0)
    assert len(graphs) == count + 3
    model.head.weight = torch.nn.Parameter(build(seed=2).head.weight.detach().clone())
    assert model.generate([[1, 2]] * 2, 8, temperature=0) == plainly(model, [[1, 2]] * 2, 8, temperature=0)
    assert len(graphs) == count + 5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate([1], 5, temperature=0) == model.generate([1], 5, temperature=0)


def test_generate_inside_a_stream(graphs):
    model, pieces = build(), []
    whole = model.generate([1, 2], 8, temperature=0)
    for token in model.generate([1, 2], 8, temperature=0, stream=True):
        pieces.append(token)
        assert model.generate([1, 2], 8, temperature=0) == whole
    assert pieces == whole
    left = model.generate([1, 2], 8, temperature=0, stream=True)
    next(left)
    del left
    assert model.generate([1, 2], 8, temperature=0) == whole


def test_text_out_of_graphs(graphs):
    model = writer()
    for settings in ({"temperature": 0}, {"seed": 1, "stop": ["e", "th"]}):
        assert model.generate(["ab", "c"], 20, **settings) == plainly(model, ["ab", "c"], 20, **settings)
        assert "".join(model.generate("ab", 20, stream=True, **settings)) == plainly(model, "ab", 20, **settings)
