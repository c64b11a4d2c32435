"""Kernels of the decoding step under their laws: here in Triton's interpreter, on a GPU with `pytest -m gpu`.

The interpreter has to be asked for before triton is imported, so these laws run in a process of their own; what is left to
this one is to compile every kernel for the GPU it was written for.
"""

import math

import pytest
import torch
from torch.nn import functional as F

import exlstm
from exlstm.models.config import AttentionOptions, LanguageConfig, MLSTMOptions, MLSTMWindowOptions
from exlstm.models.engine import Engine
from exlstm.models.language import LanguageModel
from exlstm.models.reading import leaves, mapped
from exlstm.models.sequence import Request
from exlstm.models.stack import BLOCKS
from exlstm.models.step import Step
from gpu import DEVICE, INTERPRETED, close, compile_only, cost, equal, here, hold_in_the_interpreter, law, normal

# The interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)
# One row, some, and as many as PyTorch's products take.
some = pytest.mark.parametrize("rows", [1, 3, 5], indirect=True)


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


@pytest.fixture
def rows(request, monkeypatch):
    from exlstm.ops import token_kernels as kernels

    monkeypatch.setattr(kernels, "WIDEST", 4)
    return request.param


def room(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


def normed(x, norm):
    x = x.double() - (x.double().mean(-1, keepdim=True) if norm.layer else 0)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()


@law
@some
@dtypes
def test_maps_equal_the_plain_ones(rows, dtype):
    from exlstm.ops import token_kernels as kernels

    x, w, more = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(rows, 48), (37, 48), (37, 48)]))
    for layer in (False, True):
        norm = kernels.Norm(normal(48, seed=3, dtype=dtype), 1e-3, layer)
        n, y, before = normed(x, norm), room(rows, 37, dtype=dtype), normal(rows, 37, seed=4, dtype=dtype)
        kernels.linear(x, w, y, norm=norm, room=room(rows, 48, dtype=dtype))
        close([y], [n @ w.double().t()], LIMITS[dtype])
        added = before.clone()
        kernels.linear(x, w, added, add=True)
        close([added], [before.double() + x.double() @ w.double().t()], LIMITS[dtype])
        capped = room(rows, 37)
        kernels.linear(x, w, capped, norm=norm, cap=2.0, room=room(rows, 48, dtype=dtype))
        close([capped], [2 * torch.tanh(n @ w.double().t() / 2)], LIMITS[dtype])
        for activation, act in (("silu", F.silu), ("gelu", F.gelu)):
            kernels.gated(x, w, more, y, norm=norm, activation=activation, room=room(rows, 48, dtype=dtype))
            close([y], [act(n @ w.double().t()) * (n @ more.double().t())], 2 * LIMITS[dtype])


def gate_case(rows, dtype, heads=3, keys=24, width=48):
    shapes = [(keys, width), (keys, width), (width, width), (width, width), (2 * heads, width), (2 * heads,)]
    weights = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    alive = (torch.arange(rows) != 1).to(DEVICE)
    outs = [room(rows, len(w), dtype=dtype) for w in weights[:4]] + [room(rows, 2 * heads)]
    return normal(rows, width, seed=9, dtype=dtype), weights, alive, outs


@law
@some
@dtypes
def test_maps_of_the_mlstm(rows, dtype):
    from exlstm.ops import token_kernels as kernels

    for cap in (0.0, 15.0):
        x, weights, alive, outs = gate_case(rows, dtype)
        norm, mixed = kernels.Norm(normal(48, seed=7, dtype=dtype), 1e-6), normal(rows, 48, seed=8, dtype=dtype)
        for options in ({"norm": norm}, {"mixed": mixed}, {"mixed": mixed, "mixed_all": True}):
            kernels.mlstm_maps(x, weights, alive, outs, cap=cap, room=room(rows, 48, dtype=dtype), **options)
            n = normed(x, norm) if "norm" in options else x.double()
            side = n if "norm" in options else mixed.double()
            late = side if "mixed_all" in options else n
            wanted = [a @ w.double().t() for a, w in zip((side, side, late, n), weights, strict=False)]
            close(outs[:4], wanted, LIMITS[dtype])
            pre = late @ weights[4].double().t() + weights[5].double()
            pre = cap * torch.tanh(pre / cap) if cap else pre
            log_i, log_f = pre[:, :3], F.logsigmoid(pre[:, 3:])
            close([outs[4][alive]], [torch.cat([log_i, log_f], 1)[alive]], LIMITS[dtype])
            assert (outs[4][~alive][:, :3] == -math.inf).all() and not outs[4][~alive][:, 3:].any()


class Held:
    """A weight as torchao holds it: int8 and a scale a row."""

    def __init__(self, w):
        self.scale = w.float().abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        self.qdata = (w.float() / self.scale).round().to(torch.int8)
        self.scale, self.shape = self.scale.to(w.dtype), w.shape

    def __len__(self):
        return len(self.qdata)

    @classmethod
    def empty(cls, *shape):
        held = object.__new__(cls)
        held.qdata, held.scale, held.shape = torch.empty(shape, dtype=torch.int8), empty(shape[0], 1), torch.Size(shape)
        return held

    def plain(self):
        return self.qdata.double() * self.scale.double()


@law
@pytest.mark.parametrize("rows", [1, 3])
@dtypes
def test_maps_in_int8(rows, dtype):
    """Kernels read int8 weights and their scales as they read the weights that these stand for."""
    from exlstm.ops import token_kernels as kernels

    x, w, more = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(rows, 48), (37, 48), (37, 48)]))
    w, more, norm = Held(w), Held(more), kernels.Norm(normal(48, seed=3, dtype=dtype), 1e-3)
    n, y, space = normed(x, norm), room(rows, 37, dtype=dtype), room(rows, 48, dtype=dtype)
    kernels.linear(x, w, y, norm=norm, room=space)
    close([y], [n @ w.plain().t()], LIMITS[dtype])
    kernels.gated(x, w, more, y, norm=norm, room=space)
    close([y], [F.silu(n @ w.plain().t()) * (n @ more.plain().t())], 2 * LIMITS[dtype])
    x, weights, alive, outs = gate_case(rows, dtype)
    weights[:4] = [Held(w) for w in weights[:4]]
    norm = kernels.Norm(normal(48, seed=7, dtype=dtype), 1e-6)
    kernels.mlstm_maps(x, weights, alive, outs, cap=15.0, norm=norm, room=space)
    close(outs[:4], [normed(x, norm) @ w.plain().t() for w in weights[:4]], LIMITS[dtype])


@law
def test_gates_keep_their_digits():
    from exlstm.ops import token_kernels as kernels

    x, weights, alive, outs = gate_case(4, torch.float32)
    alive.fill_(True)
    weights[4].zero_()
    for bias in (-1e4, -100.0, -9.0, -1e-4, 0.0, 5.0, 14.0, 30.0, 1e4):
        weights[5].fill_(bias)
        kernels.mlstm_maps(x, weights, alive, outs, cap=0.0)
        torch.testing.assert_close(
            outs[4][:, 3:], F.logsigmoid(torch.full_like(outs[4][:, 3:], bias)), rtol=3e-6, atol=0
        )


@law
@dtypes
def test_conv_and_settle(dtype):
    from exlstm.ops import token_kernels as kernels
    from exlstm.ops.conv import causal_conv
    from exlstm.ops.norm import head_norm

    alive = torch.tensor([True, False, True], device=DEVICE)
    for columns in (1, 2, 4):
        x, weight, bias, history = (
            normal(*shape, seed=i, dtype=dtype)
            for i, shape in enumerate([(3, 20), (20, columns), (20,), (3, columns - 1, 20)])
        )
        with exlstm.backend("cpu"):
            wide = [t.double() for t in (x[:, None], weight, bias, history)]
            wanted, after = causal_conv(*wide, activation="silu")
        y, moved = room(3, 20, dtype=dtype), history.clone()
        kernels.conv_step(x, weight, bias, moved, alive, y)
        close([y], [wanted[:, 0]], 2 * LIMITS[dtype])
        equal([moved[alive], moved[~alive]], [after[alive].to(dtype), history[~alive]])
    h, o = normal(3, 1, 2, 24, seed=5, dtype=dtype), normal(3, 48, seed=6, dtype=dtype)
    weight, y = normal(48, seed=7, dtype=dtype), room(3, 48, dtype=dtype)
    new, old = [normal(3, 2, 16, seed=8), normal(3, 2, seed=9)], [room(3, 2, 16), room(3, 2)]
    kernels.settle(h, weight, o, y, new, old, 1e-5)
    with exlstm.backend("cpu"):
        wanted = head_norm(h[:, 0].double(), weight.double(), o.double(), eps=1e-5)
    close([y], [wanted], LIMITS[dtype])
    equal(old, new)


def model_of(conv, blocks=("mlstm", "slstm"), conv_all=False, **settings):
    torch.manual_seed(0)
    settings = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 41, "blocks": blocks, **settings}
    config = LanguageConfig(mlstm=MLSTMOptions(conv=conv, conv_all=conv_all), **settings)
    model = LanguageModel(config, device=DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@law
@pytest.mark.parametrize(
    ("conv", "conv_all", "rows"), [(0, False, 1), (4, False, 1), (4, False, 3), (4, True, 3)], indirect=["rows"]
)
def test_a_step_equals_the_models_forward(conv, conv_all, rows):
    from exlstm.models import step as steps

    model = model_of(conv, conv_all=conv_all)
    tokens = torch.randint(41, (rows, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        with exlstm.backend("reference"):
            start, state = model(tokens[:, :4])
            wanted, after = model(tokens[:, 4:], state)
        step = Step(model, rows)
        kinds = [type(part) for part in step._parts]
        assert kinds == [steps._MLSTM, steps._Gated, steps._Mixer, steps._Gated]
        step.seat(torch.arange(rows, device=DEVICE), state, start[:, -1])
        step.alive.fill_(True)
        for t in range(5):
            step.tokens.copy_(tokens[:, 4 + t])
            step()
            close([step.logits], [wanted[:, t].double()], 1e-5)
        close(leaves(step.state), [x.double() for x in leaves(after)], 1e-5)
        kept = [x.clone() for x in (*leaves(step.state), step.logits)]
        step.alive[0] = False
        step()
        now = [*leaves(step.state), step.logits]
        equal([x[:1] for x in now], [x[:1] for x in kept])
        assert rows == 1 or not torch.equal(now[-1][1:], kept[-1][1:])


@law
@pytest.mark.parametrize("heads", [(0, 0), (0, 1), (8, 2)], ids=str)
def test_a_step_of_attention_equals_the_models_forward(heads):
    """In rooms with a window and without, which move on the way; a row that is not alive keeps all that is seen of it."""
    from exlstm.models import step as steps

    options = {
        "attention": AttentionOptions(n_heads=heads[0], n_kv_heads=heads[1]),
        "mlstm_window": MLSTMWindowOptions(window=4, sinks=1),
    }
    model = model_of(4, ("mlstm", "attention", "mlstm_window"), n_layers=3, **options)
    tokens = torch.randint(41, (3, 15), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        with exlstm.backend("reference"):
            start, state = model(tokens[:, :3])
            wanted, after = model(tokens[:, 3:], state)
        step = Step(model, 3)
        assert [type(part) for part in step._parts[::2]] == [steps._MLSTM, steps._Mixer, steps._Mixer] and step.fixed
        step.resize(8)
        step.seat(torch.arange(3, device=DEVICE), state, start[:, -1])
        step.alive.fill_(True)
        for t in range(12):
            if t == 5:
                step.resize(32)
            step.tokens.copy_(tokens[:, 3 + t])
            step()
            close([step.logits], [wanted[:, t].double()], 1e-5)
        for row in range(3):
            mine = mapped(lambda x, row=row: x[row : row + 1], after)
            pairs = [(a, b) for a, b in zip(leaves(step.row(row)), leaves(mine), strict=True) if b.any()]
            close(*([x.double() for x in side] for side in zip(*pairs, strict=True)), 1e-5)
        kept, places = leaves(step.row(0)), [x.data_ptr() for x in leaves(step.state)]
        step.alive[0] = False
        step()
        equal(leaves(step.row(0)), kept)
        assert places == [x.data_ptr() for x in leaves(step.state)]
        assert step.state[1].length.tolist() == [15, 16, 16]


@law
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_in_int8_equals_the_models_forward(rows):
    from exlstm.models import step as steps
    from exlstm.models.quantized import int8

    model = int8(model_of(4, ("mlstm",)))
    tokens = torch.randint(41, (rows, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        with exlstm.backend("reference"):
            start, state = model(tokens[:, :3])
            wanted, after = model(tokens[:, 3:], state)
        step = Step(model, rows)
        assert {type(part) for part in step._parts} == {steps._MLSTM, steps._Gated}
        assert step._head != step._plain_last
        step.seat(torch.arange(rows, device=DEVICE), state, start[:, -1])
        step.alive.fill_(True)
        for t in range(3):
            step.tokens.copy_(tokens[:, 3 + t])
            step()
            close([step.logits], [wanted[:, t].double()], 1e-5)
        close(leaves(step.state), [x.double() for x in leaves(after)], 1e-5)


@law
@pytest.mark.parametrize("options", [{"i_gate": "sigmoid"}, {"normalize": False}], ids=str)
def test_other_gates_go_the_ordinary_way(options):
    from exlstm.models import step as steps

    torch.manual_seed(0)
    config = LanguageConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=41, mlstm=MLSTMOptions(**options))
    model = LanguageModel(config, device=DEVICE).eval()
    with torch.inference_mode():
        assert type(Step(model, 1)._parts[0]) is steps._Mixer


@law
def test_what_kernels_do_not_take_goes_the_ordinary_way():
    from exlstm.models import step as steps

    model, seen = model_of(4), []
    model.stack.blocks[0].mixer.q.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        assert type(Step(model, 2)._parts[0]) is steps._Mixer
        with exlstm.backend("reference"):
            # All of it is the model's own forward.
            assert not Step(model, 2)._apart
        assert type(Step(model.double(), 2)._parts[1]) is steps._Ffn


# Only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "blocks", [(kind,) for kind in BLOCKS] + [("mlstm",) * 7 + (last,) for last in ("slstm", "attention")], ids="+".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_change_nothing(blocks, dtype):
    """Engine and generate with graphs write what they write without, rule by rule."""
    model = model_of(4, blocks).to(dtype)
    rules = [
        {"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 7}, {"seed": 3, "top_p": 0.8, "repetition_penalty": 1.2}
    ]  # fmt: skip
    found = []
    for captures in (True, False):
        engine = Engine(model, 5)
        assert engine.captures
        engine.captures = captures
        sequences = engine.admit(*(Request([1, 2, 3 + i], 70, eos=40, **rule) for i, rule in enumerate(rules)))
        for _ in range(20):
            engine.step()
        sequences.append(engine.fork(sequences[1]))
        for _ in engine.run():
            pass
        found.append([[s.tokens for s in sequences], [engine.state(s) for s in sequences]])
    assert found[0][0] == found[1][0]
    equal(leaves(found[0][1]), leaves(found[1][1]))
    for i, rule in enumerate(rules):
        given = {"eos": 40, **rule}
        whole = model.generate([1, 2, 3 + i], 70, **given)
        assert whole == list(model.generate([1, 2, 3 + i], 70, stream=True, **given))
        model.held.take, take = (lambda *_: None), model.held.take
        plain = model.generate([1, 2, 3 + i], 70, **given)
        model.held.take = take
        assert dtype != torch.float32 or whole == plain


@pytest.mark.gpu
def test_a_long_loop_in_a_graph_equals_the_model():
    model = model_of(4)
    (tokens,) = model.generate([[1, 2, 3]], 500, temperature=0)
    logits, _ = model(torch.tensor([[1, 2, 3, *tokens]], device=DEVICE))
    likeliest = logits[0, 2:-1].argmax(-1).tolist()
    assert sum(a != b for a, b in zip(tokens, likeliest, strict=True)) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_hybrid_with_a_window_in_a_graph(sinks):
    window = AttentionOptions(window=9, sinks=sinks, rope_base=0.0)
    model = model_of(4, ("mlstm", "attention"), attention=window)
    assert Engine(model, 2).captures
    (tokens,) = model.generate([[1, 2, 3]], 100, temperature=0)
    logits, _ = model(torch.tensor([[1, 2, 3, *tokens]], device=DEVICE))
    likeliest = logits[0, 2:-1].argmax(-1).tolist()
    assert sum(a != b for a, b in zip(tokens, likeliest, strict=True)) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "blocks", [("attention",), ("mlstm", "attention"), ("mlstm_window", "attention")], ids="+".join
)
def test_attention_in_graphs_across_growths(blocks, monkeypatch):
    """Rows of unlike lengths, forks, those that come and go: the same out of graphs as without, one graph a size of the rooms."""
    from exlstm.models import engine as engines
    from exlstm.models import step as steps

    for module in (engines, steps):
        monkeypatch.setattr(module, "LEAST", 16)
    monkeypatch.setattr(engines, "IDLE_BYTES", 0)
    model, found = model_of(4, blocks), []
    for captures in (True, False):
        engine, recorded = Engine(model, 4), []
        assert engine.captures
        engine.captures = captures
        record = engine._capture
        engine._capture = lambda call, record=record, recorded=recorded: (recorded.append(call), record(call))[1]
        long, short = engine.admit(Request([*range(20)], 100, temperature=0), Request([1, 2], 150, seed=1, top_k=9))
        for _ in range(30):
            engine.step()
        fork = engine.fork(long, max_tokens=25)
        engine.remove(long)
        (late,) = engine.admit(Request([*range(40)], 90, seed=2))
        sizes = []
        for _ in engine.run():
            sizes.append(engine._step.size)
        assert {*sizes} == {64, 128, 256}
        sequences = [long, short, fork, late]
        found.append([[s.tokens for s in sequences], [engine.state(s) for s in sequences[1:]]])
        if captures:
            # The prompts want 32 places, what is written 64, 128, 256.
            assert sum(isinstance(call, Step) for call in recorded) == 4
        for s in sequences[1:]:
            engine.remove(s)
        assert engine._step.size == 16
    assert found[0][0] == found[1][0]
    equal(leaves(found[0][1]), leaves(found[1][1]))
    logits, _ = model(torch.tensor([[*range(20), *found[0][0][0], *found[0][0][2]]], device=DEVICE))
    likeliest = logits[0, 19:-1].argmax(-1).tolist()
    assert sum(a != b for a, b in zip(found[0][0][0] + found[0][0][2], likeliest, strict=True)) <= 1


@pytest.mark.gpu
def test_rows_of_unlike_lengths_are_joined():
    """generate out of a graph hands out one state of all rows, which goes on as that of each."""
    model = model_of(4, ("mlstm", "attention"))
    prompts = [[1, 2, 3], [4], [5] * 40]
    found, state = model.generate(prompts, 20, temperature=0, return_state=True)
    assert model.held._kept[0][0].captures
    more = model.generate([[], [7], []], 10, temperature=0, state=state)
    for prompt, first, then, second in zip(prompts, found, [[], [7], []], more, strict=True):
        tokens = [*prompt, *first, *then, *second]
        likeliest = model(torch.tensor([tokens], device=DEVICE))[0][0, :-1].argmax(-1).tolist()
        at = len(prompt) - 1
        assert first == likeliest[at : at + 20] and second == likeliest[-10:]


# Compiled for the GPU they were written for


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


@here
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(
    ("overlap", "weight", "width", "hidden", "heads"),
    [
        (overlap, weight, *shape)
        for overlap, weight in ((False, empty), (True, empty), (False, Held.empty))
        for shape in [(4096, 10944, 8), (1024, 2752, 4), (768, 2048, 6)]
    ],
)
def test_kernels_compile_without_spills(rows, overlap, weight, width, hidden, heads, monkeypatch):
    from exlstm.ops import token_kernels as kernels

    monkeypatch.setattr(kernels, "OVERLAP", overlap)
    found = compile_only(monkeypatch)
    x, y, norm = empty(rows, width), empty(rows, width), kernels.Norm(empty(width), 1e-6)
    shapes = [(width // 2, width)] * 2 + [(width, width)] * 2 + [(2 * heads, width), (2 * heads,)]
    weights = [weight(*shape) for shape in shapes[:4]] + [empty(*shape) for shape in shapes[4:]]
    alive = torch.ones(rows, dtype=torch.bool)
    outs = [empty(rows, len(w)) for w in weights[:4]] + [empty(rows, 2 * heads, dtype=torch.float32)]
    kernels.mlstm_maps(x, weights, alive, outs, cap=15.0, norm=norm, room=y)
    kernels.gated(x, weight(hidden, width), weight(hidden, width), empty(rows, hidden), norm=norm, room=y)
    kernels.linear(empty(rows, hidden), weight(width, hidden), x, add=True)
    kernels.linear(x, weight(1000, width), empty(rows, 1000, dtype=torch.float32), norm=norm, cap=30.0, room=y)
    kernels.conv_step(x, empty(width, 4), empty(width), empty(rows, 3, width), alive, y)
    n, m = (empty(rows, heads, *more, dtype=torch.float32) for more in ((width // heads // 2,), ()))
    kernels.settle(empty(rows, 1, heads, width // heads), empty(width), y, x, (n, m), (n, m), 1e-6)
    names = {kernel.__name__ for kernel, _ in found}
    assert len(names) == (6 if rows > 1 else 5)
    for kernel, built in {built.hash: (kernel, built) for kernel, built in found}.values():
        name, ptx = kernel.__name__, built.asm["ptx"]
        registers, spilled = cost(built)
        # Casts of int8 for a matrix product cost some.
        most = 128 if weight is empty else 160
        assert 16 < registers <= most and spilled == 0, (name, registers, spilled)
        assert ("griddepcontrol.wait" in ptx) == (overlap and rows == 1), name
        if name in ("map_kernel", "gated_kernel", "mlstm_maps_kernel"):
            # Weights in lines of 16 bytes a thread: into registers for one row, into shared memory for a matrix product.
            assert ("ld.global.L1::evict_first.v4" in ptx or ".v4.b32" in ptx) if rows == 1 else "cp.async.cg" in ptx, (
                name
            )
            assert rows == 1 or "mma" in ptx, name
