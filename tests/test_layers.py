"""The laws of layers, blocks and stacks, over every row of the block table."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from exlstm import layers
from exlstm.models.config import OPTIONS, StackConfig
from exlstm.models.stack import BLOCKS, Stack
from exlstm.ops.backend import backend
from exlstm.ops.mlstm import MLSTMState, mlstm

D = 32
VARIANTS = {
    **{kind: {} for kind in BLOCKS},
    "mlstm without convolution": {"blocks": "mlstm", "mlstm": OPTIONS["mlstm"](conv=0, gate_cap=0.0, qk_ratio=1.0)},
    "mlstm with all convolved": {"blocks": "mlstm", "mlstm": OPTIONS["mlstm"](conv_all=True)},
    "mlstm with a sigmoid gate": {"blocks": "mlstm", "mlstm": OPTIONS["mlstm"](i_gate="sigmoid")},
    "mlstm without normaliser": {"blocks": "mlstm", "mlstm": OPTIONS["mlstm"](normalize=False)},
    "mlstm_up with neither": {"blocks": "mlstm_up", "mlstm_up": OPTIONS["mlstm_up"](i_gate="sigmoid", normalize=False)},
    "slstm with convolution": {"blocks": "slstm", "slstm": OPTIONS["slstm"](conv=4)},
    "slstm dense": {"blocks": "slstm", "slstm": OPTIONS["slstm"](dense=True, ffn_ratio=0.0)},
    "attention with window": {"blocks": "attention", "attention": OPTIONS["attention"](window=5, sinks=2)},
    "mlstm beside a short window": {
        "blocks": "mlstm_window",
        "mlstm_window": OPTIONS["mlstm_window"](window=5, sinks=2, conv=0),
    },
    "attention with groups": {"blocks": "attention", "attention": OPTIONS["attention"](n_kv_heads=1, rope_base=0.0)},
    "attention with heads of its own": {
        "blocks": "attention",
        "attention": OPTIONS["attention"](n_heads=8, n_kv_heads=4),
    },
    "all": {"blocks": tuple(BLOCKS), "n_layers": len(BLOCKS)},
}
every = pytest.mark.parametrize("name", VARIANTS)


def build(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    options = {
        "d_model": D,
        "n_heads": 2,
        "n_layers": 1,
        "blocks": name,
        "mamba2": OPTIONS["mamba2"](d_state=8, head_dim=16),
    }
    stack = Stack(StackConfig(**{**options, **VARIANTS[name]}), dtype=dtype)
    with torch.no_grad():
        for p in stack.parameters():
            # Some maps start at zero: away from there every path carries something.
            p.add_(0.2 * torch.randn_like(p) / max(1, p.shape[-1] if p.ndim > 1 else 1) ** 0.5)
    return stack


def sample(batch, steps, seed=1, dtype=torch.float64):
    return torch.randn(batch, steps, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flags(batch, steps, density, seed):
    return torch.rand(batch, steps, generator=torch.Generator().manual_seed(seed)) < density


def gradients(stack, y, weight):
    return torch.autograd.grad((y * weight).sum(), list(stack.parameters()), allow_unused=True)


def assert_same(found, wanted, limit=1e-9):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= limit * b.norm() + 1e-12


def attend_to(part, change):
    """Attention with a state of which a part is changed."""
    mixer, x = build("attention").blocks[0].mixer, sample(2, 5)
    state = list(mixer(x)[1])
    state[part] = change(state[part])
    return mixer(x, state)


@every
@pytest.mark.parametrize("with_flags", [False, True])
def test_a_split_changes_nothing(name, with_flags):
    stack, x = build(name), sample(2, 30)
    options = {"reset": flags(2, 30, 0.1, 2), "mask": flags(2, 30, 0.8, 3)} if with_flags else {}
    valid = options.get("mask", torch.ones(2, 30, dtype=torch.bool))[..., None]
    whole, _ = stack(x, **options)
    wanted = gradients(stack, whole, x * valid)
    for cut in (1, 2, 13, 29):
        first, state = stack(x[:, :cut], **{k: v[:, :cut] for k, v in options.items()})
        second, _ = stack(x[:, cut:], state, **{k: v[:, cut:] for k, v in options.items()})
        y = torch.cat([first, second], 1)
        assert_same([y * valid], [whole * valid])
        assert_same(gradients(stack, y, x * valid), wanted)


@every
def test_single_steps_equal_one_call(name):
    stack, x = build(name), sample(2, 12)
    state, ys = None, []
    for t in range(12):
        y, state = stack(x[:, t : t + 1], state)
        ys.append(y)
    assert_same([torch.cat(ys, 1)], [stack(x)[0]])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_gradients_equal_one_call(name, dtype):
    """Where nobody asks for gradients, a layer takes a shorter way through a token."""
    stack, x = build(name, dtype), sample(2, 12, dtype=dtype)
    with torch.no_grad():
        (wanted, state), ys, held = stack(x), [], None
        for t in range(12):
            y, held = stack(x[:, t : t + 1], held)
            ys.append(y)
    limit = 2e-6 if dtype == torch.float32 else 1e-12
    assert_same([torch.cat(ys, 1)], [wanted], limit)
    for a, b in zip(tree_leaves(held), tree_leaves(state), strict=True):
        assert (a is None and b is None) or not a.is_floating_point() or (a - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_up"])
def test_the_gate_and_the_normaliser_are_those_asked_for(kind, monkeypatch):
    """The same weights with other options: the operator is given the logsigmoid of the gate, and whether to normalise."""
    calls = []

    def watched(*given, **options):
        calls.append((given[3], options["normalize"]))
        return mlstm(*given, **options)

    for module in (layers.mlstm, layers.mlstm_up):
        monkeypatch.setattr(module, "mlstm", watched)
    torch.manual_seed(0)
    sizes, x = {"d_model": D, "n_heads": 2, "n_layers": 1, "blocks": kind}, sample(2, 9)
    plain = Stack(StackConfig(**sizes), dtype=torch.float64)
    outputs = [plain(x)[0]]
    for options in ({"i_gate": "sigmoid"}, {"normalize": False}):
        other = Stack(StackConfig(**sizes, **{kind: OPTIONS[kind](**options)}), dtype=torch.float64)
        other.load_state_dict(plain.state_dict())
        outputs.append(other(x)[0])
    exp, sigmoid, without = calls
    assert torch.equal(sigmoid[0], torch.nn.functional.logsigmoid(exp[0])) and torch.equal(without[0], exp[0])
    assert [exp[1], sigmoid[1], without[1]] == [True, True, False]
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_up", "mlstm_window", "slstm"])
def test_forget_gates_start_where_they_are_told(kind):
    options = {kind: OPTIONS[kind](forget_bias=(1.0, 4.0))}
    mixer = Stack(StackConfig(d_model=D, n_heads=4, n_layers=1, blocks=kind, **options)).blocks[0].mixer
    for _ in range(2):
        start = mixer.b[:, 1] if kind == "slstm" else mixer.gate.bias[4:]
        torch.testing.assert_close(start, torch.linspace(1.0, 4.0, start.shape[-1]).expand_as(start))
        mixer.reset_parameters()


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_window"])
def test_at_the_start_a_head_norm_hears_what_is_read_and_the_stream_hardly(kind):
    torch.manual_seed(0)
    mixer = Stack(StackConfig(d_model=64, n_layers=1, blocks=kind), dtype=torch.float64).blocks[0].mixer
    x = torch.randn(4, 64, 64, dtype=torch.float64)
    y = mixer(x)[0]
    for part in mixer.children():
        if isinstance(part, layers.basic.HeadNorm):
            part.eps = 0.0
    wanted = mixer(x)[0]
    assert (y - wanted).norm() < 0.2 * wanted.norm()  # with an input bias of -10: 0.99
    assert y.std() < 0.1


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_window", "attention"])
def test_the_output_map_starts_as_large_as_told(kind):
    small, large = (
        Stack(StackConfig(d_model=64, blocks=kind, **{kind: OPTIONS[kind](out_start=size)})) for size in (0.01, 1.0)
    )
    for one, other in zip(small.blocks, large.blocks, strict=True):
        assert 0.009 < one.mixer.out.weight.std() / other.mixer.out.weight.std() < 0.011
        assert 0.9 < one.mixer.v.weight.std() / other.mixer.v.weight.std() < 1.1


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_up"])
def test_the_normaliser_cancels_in_the_norm_of_the_heads(kind):
    """A divisor a head and token: where what is read is large against the norm's eps, it changes nothing."""
    torch.manual_seed(0)
    sizes, x = {"d_model": D, "n_heads": 2, "n_layers": 1, "blocks": kind}, sample(2, 9)
    plain, other = (
        Stack(StackConfig(**sizes, **more), dtype=torch.float64)
        for more in ({}, {kind: OPTIONS[kind](normalize=False)})
    )
    with torch.no_grad():
        mixer = plain.blocks[0].mixer
        mixer.gate.bias[: mixer.n_heads] = 5.0
        for weight in (mixer.qkv,) if kind == "mlstm_up" else (mixer.q.weight, mixer.k.weight, mixer.v.weight):
            weight.mul_(30)
    other.load_state_dict(plain.state_dict())
    assert_same([other(x)[0]], [plain(x)[0]], 1e-5)


@every
def test_no_future_leaks_and_rows_are_alone(name):
    stack, x = build(name), sample(2, 20)
    changed = x.clone()
    changed[:, 11:] += 1
    changed[1] -= 2
    y, z = stack(x)[0], stack(changed)[0]
    assert_same([z[:1, :11], stack(x[:1])[0]], [y[:1, :11], y[:1]])
    assert not torch.allclose(z[:1, 11:], y[:1, 11:])


@every
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_changes_nothing(name, side):
    stack, x = build(name), sample(1, 11)
    kept = {"left": range(7, 18), "right": range(11), "scattered": [0, 2, 3, 5, 6, 7, 10, 11, 14, 16, 17]}[side]
    kept = torch.tensor(list(kept))
    mask = torch.zeros(1, 18, dtype=torch.bool).index_fill(1, kept, True)
    padded = torch.full((1, 18, D), torch.nan, dtype=x.dtype).index_copy(1, kept, x)
    y, state = stack(padded, mask=mask)
    wanted, wanted_state = stack(x)
    assert y.isfinite().all()
    assert_same([y[:, kept]], [wanted])
    assert_same(gradients(stack, y[:, kept], x), gradients(stack, wanted, x))
    after, _ = stack(x[:, :3], state)
    assert_same([after], [stack(x[:, :3], wanted_state)[0]])
    if side == "right":
        assert_same([stack(padded, lengths=torch.tensor([11]))[0][:, kept]], [wanted])


@every
def test_a_reset_is_a_fresh_start(name):
    stack, x = build(name), sample(2, 20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 9] = True
    y, state = stack(x, reset=reset)
    fresh, fresh_state = stack(x[:1, 9:])
    assert_same([y[:1, 9:], y[1:]], [fresh, stack(x[1:])[0]])
    more = sample(2, 4, seed=5)
    assert_same([stack(more, state)[0][:1]], [stack(more[:1], fresh_state)[0]])


@every
@pytest.mark.parametrize("steps", [1, 9])
def test_a_reset_forgets_what_is_not_finite(name, steps):
    """A row that once read NaN goes on as a fresh one, in values and gradients."""
    stack, x = build(name), sample(2, 9)[:, :steps]
    _, state = stack(sample(2, 5, seed=3))
    lost = tree_map(lambda t: t if t is None or not t.is_floating_point() else torch.full_like(t, torch.nan), state)
    reset = torch.zeros(2, steps, dtype=torch.bool)
    reset[:, 0] = True
    (y, after), (fresh, wanted) = stack(x, lost, reset=reset), stack(x)
    assert_same([y], [fresh])
    assert_same(gradients(stack, y, x), gradients(stack, fresh, x))
    assert_same([stack(x, after)[0]], [stack(x, wanted)[0]])


@every
def test_lengths_of_zero_leave_the_state(name):
    stack, x = build(name), sample(2, 6)
    _, state = stack(x)
    y, after = stack(x, state, lengths=torch.tensor([0, 6]))
    assert y.isfinite().all()
    more = sample(2, 3, seed=5)
    assert_same([stack(more, after)[0][:1]], [stack(more, state)[0][:1]])


@pytest.mark.parametrize(
    ("name", "with_flags"), [*((kind, True) for kind in (*BLOCKS, "mlstm_up with neither")), ("all", False)]
)
def test_compiled_equals_eager(name, with_flags):
    stack, x = build(name), sample(2, 6)
    options = {"reset": flags(2, 6, 0.3, 2), "mask": flags(2, 6, 0.8, 3)} if with_flags else {}
    valid = options.get("mask", torch.ones(2, 6, dtype=torch.bool))[..., None]
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    y, z = compiled(x, **options)[0] * valid, stack(x, **options)[0] * valid
    assert_same([y], [z])
    assert_same(gradients(stack, y, x), gradients(stack, z, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mlstm", "mlstm_up", "slstm"])
def test_two_graphs_serve_every_length_in_training(name):
    stack, counter = build(name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, fullgraph=True, backend=counter, dynamic=True)
    for batch, time in ((2, 70), (3, 33), (2, 130), (4, 64), (2, 6)):
        x = sample(batch, time)
        y, z = compiled(x)[0], stack(x)[0]
        assert_same([y], [z])
        assert_same(gradients(stack, y, x), gradients(stack, z, x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@every
def test_autocast_keeps_state_in_float32_and_stays_close(name):
    stack, x = build(name, torch.float32), sample(2, 20, dtype=torch.float32)
    wanted, _ = stack(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = stack(x)
    assert (y - wanted).norm() < 0.05 * wanted.norm()
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters() if p.grad is not None)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_model_in_a_dtype(name, dtype):
    stack = build(name, torch.float32).to(dtype)
    y, state = stack(sample(2, 20, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()
    y, _ = stack(sample(2, 1, dtype=dtype), state)
    assert y.dtype == dtype and y.isfinite().all()


@every
def test_gradient_checkpointing_changes_nothing(name):
    stack, x = build(name), sample(2, 9)
    wanted = gradients(stack, stack(x)[0], x)
    stack.gradient_checkpointing = True
    assert_same(gradients(stack, stack(x)[0], x), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_drops_the_same_again(dropout):
    attention = OPTIONS["attention"](dropout=0.3)
    stack = Stack(StackConfig(D, 2, 2, ("attention",), dropout=dropout, attention=attention)).double()
    x, found = sample(2, 9), []
    for stack.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        found.append(gradients(stack, stack(x)[0], x))
    assert_same(*found)


@every
def test_training_leaves_the_memory_of_weights_free_to_go(name, monkeypatch):
    """Sharded training (FSDP) gives a block's whole weights back after every use, which storage seen by NumPy refuses."""
    stack = build(name, dtype=torch.float32)
    y, state = stack(sample(2, 9, dtype=torch.float32))
    y.square().sum().backward()
    # The samples of such a training, too.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        for steps in (9, 1):
            stack(sample(2, steps, dtype=torch.float32), state)
    assert all(p.untyped_storage().resizable() for p in stack.parameters())


@every
def test_meta_device_then_reset_parameters(name):
    config = build(name).config
    stack = Stack(config, device="meta")
    assert all(p.device.type == "meta" for p in stack.parameters())
    stack = stack.to_empty(device="cpu")
    with torch.no_grad():
        for p in stack.parameters():
            p.fill_(float("nan"))
    stack.reset_parameters()
    assert all(p.isfinite().all() for p in stack.parameters())
    assert stack(sample(2, 5, dtype=torch.float32))[0].isfinite().all()


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("record", ["jit", "fx"])
@torch.no_grad()
def test_what_is_recorded_once_holds_for_other_numbers(name, steps, record):
    """No shortcut leaves what it has worked out as a constant behind."""
    stack = build(name).requires_grad_(False)
    _, state = stack(sample(2, 6, seed=3))
    one, other = sample(2, steps), sample(2, steps, seed=5)

    def read(x):
        return stack(x, state)[0]

    found = make_fx(read)(one) if record == "fx" else torch.jit.trace(read, one)
    assert_same([found(other)], [read(other)], 1e-7)


@every
def test_operations_are_counted_without_gradients_too(name):
    stack, x, counts = build(name), sample(2, 1), []
    _, state = stack(sample(2, 6, seed=3))
    for grads in (False, True):
        with torch.set_grad_enabled(grads), FlopCounterMode(display=False) as counter:
            stack(x, state)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0 or name == "lstm"


class Carried(torch.nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x, state):
        return self.stack(x, state)


@every
@torch.no_grad()
def test_a_program_with_states_survives_save_and_load(name):
    stack, x = build(name), sample(2, 8)
    _, state = stack(x)
    exported, file = torch.export.export(Carried(stack), (x, state)), io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    (y, after), (wanted, state) = torch.export.load(file).module()(x, state), stack(x, state)
    assert_same([y, stack(x, after)[0]], [wanted, stack(x, state)[0]])


@every
def test_copies_pickles_and_state_dicts(name):
    stack, x = build(name), sample(2, 5)
    wanted, state = stack(x)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(other(x)[0], wanted)
    fresh = build(name, seed=9)
    fresh.load_state_dict(stack.state_dict())
    assert torch.equal(fresh(x)[0], wanted)
    file = io.BytesIO()
    torch.save(tree_map(lambda t: None if t is None else t.detach(), state), file)
    file.seek(0)
    assert torch.equal(stack(x, torch.load(file, weights_only=True))[0], stack(x, state)[0])


@every
def test_shapes_are_known_without_numbers(name):
    """On the meta device a forward tells the shapes and dtypes that it has on a CPU."""
    stack, config = build(name), build(name).config
    bare = Stack(config, device="meta", dtype=torch.float64)
    calls = ({}, {"lengths": torch.tensor([0, 9])}, {"reset": flags(2, 9, 0.3, 2)})
    for steps, options in ((9, calls[0]), (9, calls[1]), (9, calls[2]), (1, calls[0])):
        x, before = sample(2, steps), stack(sample(2, 3))[1]
        on_meta = {k: v.to("meta") for k, v in options.items() if k == "reset"}
        found = bare(x.to("meta"), to_meta(before), **{**options, **on_meta})
        wanted = stack(x, before, **options)
        for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            assert a is b is None or (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


@pytest.mark.parametrize("kind", BLOCKS)
def test_fake_tensors_go_all_the_way(kind):
    """As estimates of memory send them: tensors that say they are on a CPU and hold no numbers."""
    with FakeTensorMode():
        stack, x = Stack(StackConfig(d_model=D, n_heads=2, n_layers=1, blocks=kind)), torch.randn(2, 9, D)
        flag = torch.zeros(2, 9, dtype=torch.bool)
        y, state = stack(x, reset=flag, mask=flag)
        y.sum().backward()
        with torch.no_grad():
            step, _ = stack(x[:, :1], state)
    assert (y.shape, step.shape) == (x.shape, (2, 1, D)) and all(p.grad.shape == p.shape for p in stack.parameters())


def to_meta(state):
    return tree_map(lambda t: None if t is None else t.to("meta"), state)


@every
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_see_what_autograd_sees(name):
    """Gradients of every row by vmap of grad, and a step of many inputs from one state."""
    stack, x = build(name), sample(3, 7)
    parameters = dict(stack.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(stack, parameters, (row[None],))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()), allow_unused=True)
        assert_same(
            [g[i] for g in found.values()],
            [torch.zeros_like(p) if g is None else g for g, p in zip(wanted, parameters.values(), strict=True)],
        )
    with torch.no_grad():
        state, more = stack(x)[1], sample(3, 4, seed=3).unflatten(1, (4, 1)).transpose(0, 1)
        assert_same([torch.vmap(lambda t: stack(t, state)[0])(more)[2]], [stack(more[2], state)[0]])


@every
def test_the_reference_can_be_differentiated_twice(name):
    stack, x = build(name), sample(1, 3).requires_grad_()
    with backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: stack(x)[0], (x,), atol=1e-4, fast_mode=True)


@every
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_many_gradients_at_once_are_those_one_by_one(name):
    """As a Jacobian by `vectorize=True` asks for them."""
    stack, x = build(name), sample(2, 7).requires_grad_()
    y, _ = stack(x, reset=flags(2, 7, 0.2, 2), mask=flags(2, 7, 0.8, 3))
    inputs, wanted = (x, *stack.parameters()), sample(6, 7, seed=4).view(3, 2, 7, D)
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(y, inputs, wanted, is_grads_batched=True, **options)
    for i in range(3):
        assert_same([None if g is None else g[i] for g in found], torch.autograd.grad(y, inputs, wanted[i], **options))


class Adapter(torch.nn.Module):
    """A map with something learnt beside it, as LoRA puts it in place of a linear one; `weight` is still the old one."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.beside = torch.nn.Parameter(0.1 * torch.randn_like(linear.weight))

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + torch.nn.functional.linear(x, self.beside)


@every
def test_a_layer_of_somebody_in_place_of_a_linear_map_is_asked(name):
    """Every adapter is in the forward, in the single step, and has its gradient."""
    stack, x = build(name), sample(2, 7)
    adapted, adapters = copy.deepcopy(stack), []
    for path, linear in [(p, m) for p, m in stack.named_modules() if type(m) is torch.nn.Linear]:
        adapters.append(Adapter(linear))
        adapted.set_submodule(path, adapters[-1])
        with torch.no_grad():
            target = stack.get_submodule(path)
            adapters[-1].linear = copy.deepcopy(linear)
            target.weight += adapters[-1].beside
    wanted, (y, _) = stack(x)[0], adapted(x)
    assert_same([y], [wanted])
    if adapters:
        grads = torch.autograd.grad((y * x).sum(), [a.beside for a in adapters])
        assert all(g.abs().sum() > 0 for g in grads)
    state, ys = None, []
    with torch.no_grad():
        for t in range(7):
            y, state = adapted(x[:, t : t + 1], state)
            ys.append(y)
    assert_same([torch.cat(ys, 1)], [wanted])


def louder(module):
    """A module of a class of somebody's, which inherits from the module's own."""

    class Louder(type(module)):
        def forward(self, *args, **kwargs):
            y = super().forward(*args, **kwargs)
            return y + torch.sin(2 * y) if isinstance(y, torch.Tensor) else (y[0] + torch.sin(2 * y[0]), *y[1:])

    module = copy.copy(module)
    module.__class__ = Louder
    return module


def in_steps(stack, x):
    """Outputs of single steps without gradients."""
    state, ys = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = stack(x[:, t : t + 1], state)
            ys.append(y)
    return torch.cat(ys, 1)


@every
def test_a_class_that_inherits_has_the_say(name):
    """A norm, a convolution, a layer, ... with another forward, in a whole sequence and in single steps."""
    stack, x = build(name), sample(2, 4)
    plain, _ = stack(x)
    for path, module in stack.named_modules():
        if path and not isinstance(module, torch.nn.ModuleList | torch.nn.Identity):
            changed = copy.deepcopy(stack)
            changed.set_submodule(path, louder(changed.get_submodule(path)))
            y, _ = changed(x)
            assert not torch.allclose(y, plain, rtol=1e-3), path
            assert_same([in_steps(changed, x)], [y])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mlstm", "gates"),
        ("mlstm_up", "gates"),
        ("slstm", "pre_activations"),
        ("mlstm_window", "gates"),
        ("mamba2", "gates"),
    ],
)
@pytest.mark.parametrize("inherits", [True, False], ids=["in a class", "on the layer"])
def test_other_gates_are_the_gates(name, method, inherits):
    """Somebody tries another gate by one method of a layer, and finds it in single steps, too."""
    stack, x = build(name), sample(2, 4)
    (plain, _), mixer = stack(x), stack.blocks[0].mixer
    given = getattr(type(mixer), method)

    def half(*args, **kwargs):
        first, second = given(*args, **kwargs)
        return 0.5 * first, second

    if inherits:
        mixer.__class__ = type("Mine", (type(mixer),), {method: half})
    else:
        setattr(mixer, method, partial(half, mixer))
    y, _ = stack(x)
    assert not torch.allclose(y, plain, rtol=1e-3)
    assert_same([in_steps(stack, x)], [y])


@pytest.mark.parametrize("name", ["mlstm", "mlstm_up", "slstm", "mlstm_window"])
def test_modules_of_somebody_in_a_layer(name):
    """A norm of the heads and a map of the gates that are no classes of ours."""

    class Unit(torch.nn.Module):
        def forward(self, h, gate=None, **_):
            y = torch.nn.functional.normalize(h, dim=-1).flatten(-2)
            return y if gate is None else y * torch.sigmoid(gate)

    stack, x = build(name), sample(2, 4)
    mixer = stack.blocks[0].mixer
    for part in ("norm", "memory_norm", "window_norm"):
        if hasattr(mixer, part):
            setattr(mixer, part, Unit())
    if hasattr(mixer, "gate"):
        mixer.gate = torch.nn.Sequential(mixer.gate, torch.nn.Tanh())
    assert_same([in_steps(stack, x)], [stack(x)[0]])


@every
def test_a_long_stack_keeps_its_scale(name):
    """At the start neither the signal nor the gradient grows or dies with depth."""
    config = build(name).config
    torch.manual_seed(0)
    stack = Stack(StackConfig(**{**config.__dict__, "n_layers": 12}))
    x = sample(4, 40, dtype=torch.float32).requires_grad_()
    y, _ = stack(x)
    assert 0.5 < y.std() / x.std() < 4
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_heads_whose_norm_leaves_nothing_are_told(kind):
    with pytest.warns(UserWarning, match="4 heads of 1 unit: a norm over one number is always 0"):
        Stack(StackConfig(d_model=4, n_layers=1, blocks=kind, mlstm=OPTIONS["mlstm"](qk_ratio=1.0)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: StackConfig(d_model=30, n_heads=4), "d_model 30 is not divisible by n_heads 4"),
        (
            lambda: Stack(
                StackConfig(d_model=30, n_heads=2, blocks="attention", attention=OPTIONS["attention"](n_heads=4))
            ),
            "d_model 30 is not divisible by n_heads 4",
        ),
        (
            lambda: Stack(StackConfig(blocks="attention", attention=OPTIONS["attention"](n_heads=2, n_kv_heads=4))),
            "n_heads 2 is not divisible by n_kv_heads 4",
        ),
        (lambda: StackConfig(attention=OPTIONS["attention"](n_heads=-1)), "attention.n_heads is -1, wanted a finite"),
        (lambda: StackConfig(blocks=["mlsmt"]), "unknown block 'mlsmt', did you mean 'mlstm'"),
        (lambda: StackConfig(blocks=[]), "blocks is empty"),
        (lambda: StackConfig(n_layers=0), "n_layers is 0, wanted a whole number of at least 1"),
        (lambda: StackConfig(dropout=1.0), "dropout is 1.0"),
        (lambda: Stack(StackConfig(mlstm=OPTIONS["mlstm"](i_gate="exq"))), "i_gate is 'exq', wanted exp or sigmoid"),
        *(
            (
                lambda kind=kind, size=size: BLOCKS[kind][0](size),
                f"d_model is {size}, wanted a whole number of at least 1",
            )
            for kind in BLOCKS
            for size in (0, -8, 8.0)
        ),
        *(
            (lambda kind=kind: BLOCKS[kind][0](8, 0), "n_heads is 0, wanted a whole number of at least 1")
            for kind in BLOCKS
            if BLOCKS[kind][1]
        ),
        (lambda: build("mlstm")(sample(2, 5)[..., :-1]), r"x has shape \(2, 5, 31\), wanted \(B, T, 32\)"),
        (lambda: build("slstm")(sample(2, 5)[:, :0]), "with no axis empty"),
        (lambda: build("mlstm")(sample(2, 5)[0]), r"x has shape \(5, 32\)"),
        *(
            (
                lambda kind=kind: Stack(StackConfig(blocks=kind, **{kind: OPTIONS[kind](forget_bias=3.0)})),
                "wanted two numbers",
            )
            for kind in BLOCKS
            if hasattr(OPTIONS[kind], "forget_bias")
        ),
        (lambda: Stack({"d_model": 32}), "config is dict, wanted a StackConfig"),
        (lambda: build("mlstm")([[1.0]]), "x is list, wanted a tensor"),
        (lambda: build("mlstm")(sample(2, 5), mask=[[True] * 5] * 2), "mask is list, wanted a tensor"),
        (lambda: build("slstm")(sample(2, 5), reset=[[True] * 5] * 2), "reset is list, wanted a tensor"),
        (
            lambda: build("slstm")(sample(2, 5), lengths="ab"),
            "lengths is str, wanted a tensor or list of whole numbers",
        ),
        *(
            (lambda kind=kind, state=state: build(kind).blocks[0].mixer(sample(2, 5), state), "state is|state.h is")
            for kind in BLOCKS
            for state in (
                torch.zeros(2, 3),
                MLSTMState(*[torch.zeros(2, 2)] * 3)[:1],
                "ab",
                {"h": 1},
                (1.0, 2, 3, 4, 5),
            )
        ),
        (lambda: build("lstm")(sample(2, 5), ((None, None),)), "state.h is NoneType, wanted a tensor"),
        (lambda: build("lstm")(sample(2, 5), lengths=[None, 1]), "lengths is list, wanted a tensor or list of whole"),
        (
            lambda: build("lstm")(sample(2, 5), lengths=[[1], [2, 3]]),
            "lengths is list, wanted a tensor or list of whole",
        ),
        *(
            (lambda part=part, change=change: attend_to(part, change), sentence)
            for part, change, sentence in (
                (0, lambda _: None, "state.keys is NoneType, wanted a tensor"),
                (0, torch.Tensor.tolist, "state.keys is list, wanted a tensor"),
                (0, torch.Tensor.long, "state.keys is torch.int64, wanted a floating dtype"),
                (1, lambda _: 3.0, "state.values is float, wanted a tensor"),
                (1, lambda x: x + 1j, "state.values is torch.complex128, wanted a floating dtype"),
                (2, torch.Tensor.double, "state.positions is torch.float64, wanted whole numbers"),
                (3, torch.Tensor.double, "state.length is torch.float64, wanted whole numbers"),
            )
        ),
        (lambda: build("mlstm")(sample(2, 5), ()), "state has 0 entries, wanted one entry for each of the 1 blocks"),
        (lambda: build("mlstm")(sample(2, 5), lengths=torch.tensor([6, 1])), "lengths go from 1 to 6"),
        (lambda: build("mlstm")(sample(2, 5), lengths=torch.tensor([1])), "lengths is torch.int64 of shape"),
        (lambda: build("mlstm")(sample(2, 5), mask=torch.ones(2, 5)), "mask is torch.float32"),
        (
            lambda: build("slstm")(sample(2, 5), reset=torch.ones(2, 4, dtype=torch.bool)),
            "reset is torch.bool of shape",
        ),
        *(
            (lambda kind=kind: build(kind)(sample(2, 5).long()), "x is torch.int64, wanted a floating")
            for kind in BLOCKS
        ),
        *(
            (
                lambda kind=kind: build(kind)(sample(2, 5, dtype=torch.float32)),
                "x is torch.float32 and the layer's weights are torch.float64, wanted one dtype, or autocast",
            )
            for kind in BLOCKS
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, in its forward derivatives
def test_forward_derivatives_do_not_need_gradients_on(kind, steps):
    """no_grad leaves forward differentiation on, and NumPy would drop its tangents."""
    stack = Stack(StackConfig(d_model=D, n_heads=2, n_layers=1, blocks=kind), dtype=torch.float64)
    x, away, step = sample(2, steps), sample(2, steps, seed=3), 1e-6
    with torch.no_grad():
        state = stack(sample(2, 3, seed=2))[1]
        for before in (None, state):
            wanted = (stack(x + step * away, before)[0] - stack(x - step * away, before)[0]) / (2 * step)
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(stack(forward_ad.make_dual(x, away), before)[0]).tangent.clone()
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ffn", [layers.basic.SwiGLU, layers.basic.GatedGELU])
def test_few_tokens_overflow_as_many_do(ffn):
    """Without gradients few tokens go through NumPy, which would warn where torch is silent."""
    part = ffn(16, 32)
    for scale, finite in ((1.0, True), (1e20, False)):
        with torch.no_grad():
            for weight in part.parameters():
                weight.mul_(scale)
        x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
        wanted = part(x).detach()
        with torch.no_grad():
            found = part(x)
        assert wanted.isfinite().all() == finite
        torch.testing.assert_close(found, wanted, equal_nan=True)
