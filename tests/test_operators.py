"""The laws of the two operators, over every implementation in their tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

import exlstm
from exlstm.ops.mlstm import IMPLEMENTATIONS as MLSTM
from exlstm.ops.mlstm import MLSTMState, mlstm
from exlstm.ops.slstm import IMPLEMENTATIONS as SLSTM
from exlstm.ops.slstm import SLSTMState, slstm

B, H, K, V, D = 2, 2, 8, 12, 8
# The rows that run anywhere and in float64; what needs a GPU has its laws in test_gpu_mlstm.py.
ROWS = [(op, name) for op, table in (("mlstm", MLSTM), ("slstm", SLSTM)) for name in table if name != "triton"]
every = pytest.mark.parametrize(("op", "backend"), ROWS, ids=lambda x: x)
fast = pytest.mark.parametrize(("op", "backend"), [row for row in ROWS if row[1] != "reference"], ids=lambda x: x)


class Case:
    """Random inputs of one operator in float64, and the calls the laws make of it."""

    def __init__(self, op, steps, seed=0, state=True, gate=1.0, batch=B, heads=H, sizes=None):
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.op, self.steps, self.batch = op, steps, batch
        if op == "mlstm":
            keys, values = sizes or (K, V)
            q, k, v = (normal(batch, steps, heads, d) for d in (keys, keys, values))
            log_i, log_f = normal(batch, steps, heads) * gate, logsigmoid(normal(batch, steps, heads) * gate + 3)
            self.inputs, self.weights = [q, k, v, log_i, log_f], []
            shapes = [(batch, heads, keys, values), (batch, heads, keys), (batch, heads)]
            self.out = normal(batch, steps, heads, values)
        else:
            width = sizes or D
            x = normal(batch, steps, heads, 4, width) * gate
            x[:, :, :, 1] += 3
            self.inputs, self.weights = [x], [normal(heads, 4, width, width) * width**-0.5]
            shapes = [(batch, heads, width)] * 4
            self.out = normal(batch, steps, heads, width)
        self.state = [normal(*shape) for shape in shapes] if state else None
        if state and op == "slstm":
            self.state[2] = self.state[2].abs() + 1
        self.out_state = [normal(*shape) for shape in shapes[:-1]]

    def tensors(self, dtype=torch.float64):
        """Leaves that require gradients: inputs, weights, state without m; and m."""
        leaves = [t.to(dtype).requires_grad_() for t in [*self.inputs, *self.weights, *(self.state or [])[:-1]]]
        return leaves, self.state and self.state[-1].to(dtype)

    def call(self, inputs, weights, state, backend, **options):
        if self.op == "mlstm":
            return mlstm(*inputs, state, backend=backend, **options)
        return slstm(*inputs, *weights, state, backend=backend, **options)

    def split(self, leaves, m):
        a, b = len(self.inputs), len(self.inputs) + len(self.weights)
        kind = MLSTMState if self.op == "mlstm" else SLSTMState
        return leaves[:a], leaves[a:b], None if m is None else kind(*leaves[b:], m)

    def loss(self, h, state):
        wanted = [self.out, *self.out_state]
        return sum((a.double() * b).sum() for a, b in zip([h, *state[:-1]], wanted, strict=True))

    def run(self, backend, dtype=torch.float64, **options):
        """[h, state..., gradients...] in one list."""
        leaves, m = self.tensors(dtype)
        h, state = self.call(*self.split(leaves, m), backend, **options)
        return [h, *state, *torch.autograd.grad(self.loss(h, state), leaves)]


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def same(found, wanted, limit=1e-10):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.isfinite().all()
        assert error(a, b) < limit, (i, error(a, b))


def flags(steps, seed, density, batch=B):
    return torch.rand(batch, steps, generator=torch.Generator().manual_seed(seed)) < density


LENGTHS = [1, 2, 15, 63, 64, 65, 200]


@fast
@pytest.mark.parametrize("steps", [*LENGTHS, 1000])
def test_equals_the_reference(op, backend, steps):
    case = Case(op, steps, seed=steps)
    same(case.run(backend), case.run("reference"))


@fast
@pytest.mark.parametrize("steps", [7, 130])
@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("kind", ["reset", "mask", "both", "every"])
def test_equals_the_reference_with_resets_and_padding(op, backend, steps, given_state, kind):
    case = Case(op, steps, seed=3, state=given_state)
    options = {"reset": flags(steps, 1, 1.0 if kind == "every" else 0.08)} if kind != "mask" else {}
    if kind in ("mask", "both"):
        options["mask"] = flags(steps, 2, 0.6)
    same(case.run(backend, **options), case.run("reference", **options))


@pytest.mark.parametrize("limit", [0, 1 << 60])
def test_both_products_of_the_slstm_equal_the_reference(limit, monkeypatch):
    for name in ("SMALL_PRODUCT", "SMALL_PRODUCTS"):
        monkeypatch.setattr(f"exlstm.ops.slstm.cpu.{name}", limit)
    case, options = Case("slstm", 40, seed=6), {"reset": flags(40, 1, 0.1), "mask": flags(40, 2, 0.6)}
    same(case.run("cpu", **options), case.run("reference", **options))


@fast
@pytest.mark.parametrize(
    "options", [{"normalize": False}, {"eps": 0.1}, {"scale": 0.3}, {"normalize": False, "scale": 1.0}], ids=str
)
def test_equals_the_reference_with_options(op, backend, options):
    if op == "slstm":
        options = {}
    case = Case(op, 90, seed=5)
    same(case.run(backend, **options), case.run("reference", **options))


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_at_ordinary_gates(op, backend, dtype):
    case = Case(op, 300, seed=11, sizes=(32, 32) if op == "mlstm" else 32)
    rounded = [t.to(dtype).double() for t in (*case.inputs[:3], *case.weights)]
    case.inputs[: len(rounded) - len(case.weights)] = rounded[: len(rounded) - len(case.weights)]
    case.weights = rounded[len(rounded) - len(case.weights) :]
    truth = case.run("reference")
    leaves, m = case.tensors()
    leaves = [t.detach() for t in leaves]
    count = 3 if op == "mlstm" else 2
    leaves = [(t.to(dtype) if i < count else t.float()).requires_grad_() for i, t in enumerate(leaves)]
    h, state = case.call(*case.split(leaves, m.float()), backend)
    assert h.dtype == dtype and all(s.dtype == torch.float32 for s in state)
    found = [h, *state, *torch.autograd.grad(case.loss(h, state), leaves)]
    exact = dtype == torch.float32
    limits = [2e-6 if exact else 4e-3] * (1 + len(state)) + [1e-5 if exact else 8e-3] * len(leaves)
    for i, (a, b, limit) in enumerate(zip(found, truth, limits, strict=True)):
        assert error(a, b) < limit, (i, error(a, b))


@fast
@pytest.mark.parametrize("gate", [4.0, 10.0])
def test_precision_at_hard_gates(op, backend, gate):
    """At most twice the error of the plain recurrence in the same precision."""
    case = Case(op, 200, seed=13, gate=gate)
    truth, plain, found = case.run("reference"), case.run("reference", torch.float32), case.run(backend, torch.float32)
    for i, (a, b, c) in enumerate(zip(found, plain, truth, strict=True)):
        assert error(a, c) <= 2 * error(b, c) + 2e-6, (i, error(a, c), error(b, c))


@pytest.mark.parametrize("backend", [name for op, name in ROWS if op == "mlstm"])
def test_chunk_length_does_not_matter(backend):
    case = Case("mlstm", 100, seed=17)
    reset = flags(100, 4, 0.05)
    wanted = case.run(backend, reset=reset)
    for chunk in (1, 2, 7, 64, 99, 100, 1000, 10**7):
        same(case.run(backend, reset=reset, chunk=chunk), wanted)


@every
@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=st.integers(2, 90), data=st.data())
def test_a_split_changes_nothing(op, backend, steps, data):
    """f(x) = f(x[:a]) then f(x[a:], state), in values and gradients, resets and padding included."""
    cut = data.draw(st.integers(1, steps - 1))
    case = Case(op, steps, seed=steps, state=data.draw(st.booleans()))
    options = {"reset": flags(steps, cut, 0.1), "mask": flags(steps, cut + 1, 0.8)} if data.draw(st.booleans()) else {}
    leaves, m = case.tensors()
    inputs, weights, state = case.split(leaves, m)
    hs = []
    for part in (slice(0, cut), slice(cut, steps)):
        pieces = [t[:, part] for t in inputs]
        h, state = case.call(pieces, weights, state, backend, **{k: v[:, part] for k, v in options.items()})
        hs.append(h)
    h = torch.cat(hs, 1)
    same([h, *state, *torch.autograd.grad(case.loss(h, state), leaves)], case.run(backend, **options))


@every
def test_single_steps_equal_one_call(op, backend):
    case = Case(op, 20, seed=19)
    leaves, m = case.tensors()
    inputs, weights, state = case.split(leaves, m)
    hs = []
    for t in range(20):
        h, state = case.call([x[:, t : t + 1] for x in inputs], weights, state, backend)
        hs.append(h)
    h = torch.cat(hs, 1)
    same([h, *state, *torch.autograd.grad(case.loss(h, state), leaves)], case.run(backend))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_state", [True, False])
def test_decoding_equals_one_call(op, backend, dtype, given_state):
    """Single steps without gradients, from tensors that want one, in the dtype of the inputs."""
    case = Case(op, 20, seed=20, state=given_state)
    leaves, m = case.tensors(torch.float32 if dtype == torch.bfloat16 else dtype)
    inputs, weights, state = case.split(leaves, m)
    if dtype == torch.bfloat16:
        inputs = [t.to(dtype) if t.ndim > 3 else t for t in inputs]
    with torch.no_grad():
        wanted, wanted_state = case.call(inputs, weights, state, "reference")
        hs = []
        for t in range(20):
            h, state = case.call([x[:, t : t + 1] for x in inputs], weights, state, backend)
            hs.append(h.clone())
            h.add_(1)
    assert h.dtype == wanted.dtype and [s.dtype for s in state] == [s.dtype for s in wanted_state]
    same([torch.cat(hs, 1), *state], [wanted.double(), *wanted_state], {4: 3e-6, 8: 1e-12, 2: 4e-3}[dtype.itemsize])


@pytest.mark.parametrize("backend", [name for op, name in ROWS if op == "mlstm"])
@pytest.mark.parametrize("shut", [-1e4, -1e30, -torch.inf])
@pytest.mark.parametrize("steps", [1, 70])
def test_a_shut_forget_gate_is_a_reset(backend, shut, steps):
    """Of a sigmoid of 0, however it was written; with the input gate shut as well nothing at all is left to read."""
    case, at = Case("mlstm", steps, seed=39), steps // 2
    reset = torch.zeros(B, steps, dtype=torch.bool)
    reset[:, at] = True
    closed, silent = (Case("mlstm", steps, seed=39) for _ in range(2))
    case.inputs[4][:, at] = -100.0
    for gate in (closed.inputs[4], *silent.inputs[3:]):
        gate[:, at] = shut
    same(closed.run(backend), case.run(backend, reset=reset), 1e-9)
    h, state = silent.call(silent.inputs, silent.weights, silent.state, backend)
    assert all(x.isfinite().all() for x in (h, *state)) and not h[:, at].any()


@every
@pytest.mark.parametrize("i", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("f", [-1e4, 0.0, 1e4])
def test_decoding_at_extreme_gates_stays_finite(op, backend, i, f):
    case = Case(op, 3, seed=21)
    if op == "mlstm":
        case.inputs[3].fill_(i)
        case.inputs[4].copy_(logsigmoid(torch.full_like(case.inputs[4], f)))
    else:
        case.inputs[0][:, :, :, 0] = i
        case.inputs[0][:, :, :, 1] = f
    for given_state in (None, [s.float() for s in case.state]):
        state = given_state
        with torch.no_grad():
            for t in range(3):
                inputs = [x[:, t : t + 1].float() for x in case.inputs]
                h, state = case.call(inputs, [w.float() for w in case.weights], state, backend)
                assert all(x.isfinite().all() for x in (h, *state))


@every
def test_no_future_leaks_and_rows_are_alone(op, backend):
    case = Case(op, 80, seed=23)
    h, _ = case.call(case.inputs, case.weights, None, backend)
    changed = [t.clone() for t in case.inputs]
    for t in changed:
        t[:, 50:] += 1
        t[1] += 1
    g, _ = case.call(changed, case.weights, None, backend)
    assert torch.equal(h[0, :50], g[0, :50])
    assert not torch.allclose(h[0, 50:], g[0, 50:])
    alone, _ = case.call([t[:1] for t in case.inputs], case.weights, None, backend)
    same([h[:1]], [alone], 1e-12)


@every
def test_padding_changes_nothing(op, backend):
    """Left, right and scattered padding: valid tokens, the state and all gradients are those of the tokens alone."""
    short, steps = Case(op, 30, seed=29, batch=1), 45
    for kept in (
        range(30),
        range(15, 45),
        sorted(torch.randperm(45, generator=torch.Generator().manual_seed(1))[:30].tolist()),
    ):
        kept = list(kept)
        mask = torch.zeros(1, steps, dtype=torch.bool)
        mask[:, kept] = True
        leaves, m = short.tensors()
        inputs, weights, state = short.split(leaves, m)
        padded = []
        for t in inputs:
            noise = torch.full((1, steps, *t.shape[2:]), torch.nan, dtype=t.dtype)
            padded.append(noise.index_copy(1, torch.tensor(kept), t))
        h, state = case_call = short.call(padded, weights, state, backend, mask=mask)
        assert case_call[0].isfinite().all()
        h = h[:, kept]
        same([h, *state, *torch.autograd.grad(short.loss(h, state), leaves)], short.run(backend))


@every
def test_an_empty_row_keeps_its_state(op, backend):
    case = Case(op, 12, seed=31)
    mask = torch.ones(B, 12, dtype=torch.bool)
    mask[0] = False
    leaves, m = case.tensors()
    inputs, weights, state = case.split(leaves, m)
    _, after = case.call(inputs, weights, state, backend, mask=mask)
    for a, b in zip(after, state, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-12)
    fresh = case.call(inputs, weights, None, backend, mask=torch.zeros_like(mask))
    assert fresh[0].isfinite().all() and not any(s.any() for s in fresh[1])


@every
def test_a_reset_is_a_fresh_start(op, backend):
    case = Case(op, 40, seed=37)
    reset = torch.zeros(B, 40, dtype=torch.bool)
    reset[:, 25] = True
    h, state = case.call(case.inputs, case.weights, case.state, backend, reset=reset)
    g, fresh = case.call([t[:, 25:] for t in case.inputs], case.weights, None, backend)
    same([h[:, 25:], *state], [g, *fresh], 1e-12)


@every
@pytest.mark.parametrize("i", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("f", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_gates_stay_finite(op, backend, i, f, normalize):
    for dtype in (torch.float32, torch.float64):
        for given_state in (True, False):
            case = Case(op, 70, seed=41, state=given_state)
            if op == "mlstm":
                case.inputs[3].fill_(i)
                case.inputs[4].copy_(logsigmoid(torch.full_like(case.inputs[4], f)))
                options = {"normalize": normalize}
            else:
                case.inputs[0][:, :, :, 0] = i
                case.inputs[0][:, :, :, 1] = f
                options = {}
            for t in case.run(backend, dtype, **options):
                assert t.isfinite().all()


@every
def test_mixed_extremes_and_zero_queries_stay_finite(op, backend):
    for seed in range(4):
        case = Case(op, 70, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        if op == "mlstm":
            case.inputs[3] = (torch.randint(-1, 2, case.inputs[3].shape, generator=rng) * 1e4).double()
            case.inputs[4] = logsigmoid((torch.randint(-1, 2, case.inputs[4].shape, generator=rng) * 1e4).double())
            case.inputs[0][:, ::3] = 0
        else:
            case.inputs[0] = (torch.randint(-1, 2, case.inputs[0].shape, generator=rng) * 1e4).double()
        for t in case.run(backend, torch.float32):
            assert t.isfinite().all()


@every
def test_strided_inputs(op, backend):
    case = Case(op, 33, seed=43)
    wanted, _ = case.call(case.inputs, case.weights, None, backend)
    wide = [torch.cat([t, t + 1], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, :H] for t in case.inputs]
    assert not any(t.is_contiguous() for t in wide)
    found, _ = case.call(wide, case.weights, None, backend)
    same([found], [wanted], 1e-12)


@every
def test_nothing_is_written_into_an_argument(op, backend):
    case = Case(op, 66, seed=47)
    before = [t.clone() for t in (*case.inputs, *case.weights, *case.state)]
    case.call(case.inputs, case.weights, tuple(case.state), backend, reset=flags(66, 1, 0.1), mask=flags(66, 2, 0.5))
    for a, b in zip(before, (*case.inputs, *case.weights, *case.state), strict=True):
        assert torch.equal(a, b)


@every
def test_same_inputs_same_bits(op, backend):
    case = Case(op, 130, seed=53)
    for a, b in zip(case.run(backend, torch.float32), case.run(backend, torch.float32), strict=True):
        assert torch.equal(a, b)


@fast
@pytest.mark.parametrize("with_flags", [False, True])
def test_compiled_equals_eager(op, backend, with_flags):
    case = Case(op, 20, seed=59)
    options = {"reset": flags(20, 1, 0.2), "mask": flags(20, 2, 0.8)} if with_flags else {}
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    leaves, m = case.tensors()
    h, state = compiled(*case.split(leaves, m), backend, **options)
    same([h, *state, *torch.autograd.grad(case.loss(h, state), leaves)], case.run(backend, **options))
    torch._dynamo.reset()


@fast
def test_double_backward_is_refused_in_one_sentence(op, backend):
    case = Case(op, 20)
    leaves, m = case.tensors()
    h, state = case.call(*case.split(leaves, m), backend)
    grads = torch.autograd.grad(case.loss(h, state), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        sum(g.sum() for g in grads).backward()


@fast
def test_meta_tensors_give_shapes(op, backend):
    case = Case(op, 20)
    h, state = case.call([t.to("meta") for t in case.inputs], [t.to("meta") for t in case.weights], None, backend)
    assert h.shape == case.out.shape and h.device.type == "meta"
    assert [s.shape for s in state[:-1]] == [s.shape for s in case.out_state]


@fast
def test_memory_for_backward_is_flat(op, backend):
    """Kept for the backward beside the inputs and the output: a few numbers a token and channel, whatever T."""
    kept = []
    for steps in (256, 1024):
        case = Case(op, steps, state=False, sizes=(16, 16) if op == "mlstm" else 16)
        leaves, m = case.tensors(torch.float32)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.setdefault(t.untyped_storage().data_ptr(), t) if t is not None else t,
            lambda t: t,
        ):
            h, _ = case.call(*case.split(leaves, m), backend)
        own = {t.untyped_storage().data_ptr() for t in (*leaves, h)}
        kept.append(sum(t.untyped_storage().nbytes() for p, t in sizes.items() if p not in own) / steps)
    assert kept[1] < 1.1 * kept[0]
    assert kept[1] < 4 * B * H * 16 * 6


@every
def test_backend_is_chosen_by_argument_then_context_then_environment(op, backend, monkeypatch):
    case = Case(op, 5)
    monkeypatch.setenv("EXLSTM_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense' is not one of"):
        case.call(case.inputs, case.weights, None, None)
    with exlstm.backend(backend):
        case.call(case.inputs, case.weights, None, None)
        with pytest.raises(ValueError, match="'other' is not one of"):
            case.call(case.inputs, case.weights, None, "other")
    monkeypatch.delenv("EXLSTM_BACKEND")
    case.call(case.inputs, case.weights, None, None)


def bad(op, **changes):
    case = Case(op, 5)
    names = ["q", "k", "v", "log_i", "log_f"] if op == "mlstm" else ["x", "r"]
    call = dict(zip(names, [*case.inputs, *case.weights], strict=True), state=None)
    for name, change in changes.items():
        call[name] = change(call.get(name)) if callable(change) else change
    (mlstm if op == "mlstm" else slstm)(**call)


BAD = [
    ("mlstm", {"k": lambda k: k[..., :-1]}, "k has 7 features a head, q has 8"),
    ("mlstm", {"q": lambda q: q[0]}, r"q has shape \(5, 2, 8\), wanted \(B, T, H, features\)"),
    ("mlstm", {"v": lambda v: v[:, :-1]}, r"v has \(B, T, H\) = \(2, 4, 2\), q has \(2, 5, 2\)"),
    ("mlstm", {"log_i": lambda x: x[..., None]}, r"log_i has shape \(2, 5, 2, 1\), wanted"),
    ("mlstm", {"log_f": lambda x: x.long()}, "log_f is torch.int64, wanted a floating dtype"),
    ("mlstm", {"v": lambda v: v.half()}, "wanted one floating dtype"),
    ("mlstm", {"q": lambda q: q[:, :0]}, "with no axis empty"),
    ("mlstm", {"q": [1.0]}, "q is list, wanted a tensor"),
    ("mlstm", {"log_f": None}, "log_f is NoneType, wanted a tensor"),
    ("mlstm", {"chunk": 0}, "chunk is 0, wanted a whole number of at least 1"),
    ("mlstm", {"scale": torch.ones(1, requires_grad=True)}, "scale is a tensor that wants a gradient"),
    ("mlstm", {"chunk": 2.5}, "chunk is 2.5, wanted a whole number of at least 1"),
    ("mlstm", {"state": (None, None, None)}, "state.c is NoneType, wanted a tensor"),
    ("mlstm", {"reset": [[True] * 5] * 2}, "reset is list, wanted a tensor"),
    ("slstm", {"r": 1.0}, "r is float, wanted a tensor"),
    ("mlstm", {"reset": torch.zeros(2, 5)}, "reset is torch.float32 of shape"),
    ("mlstm", {"mask": torch.zeros(2, 4, dtype=torch.bool)}, r"wanted bool of \(B, T\) = \(2, 5\)"),
    ("mlstm", {"state": (torch.zeros(2),)}, "wanted the 3 tensors c, n, m"),
    ("mlstm", {"state": (torch.zeros(2, 2, 8, 11), torch.zeros(2, 2, 8), torch.zeros(2, 2))}, "state.c has shape"),
    ("mlstm", {"k": lambda k: k.to("meta")}, "k is on meta, wanted cpu"),
    ("mlstm", {"backend": "cuda"}, "backend 'cuda' is not one of reference, cpu, triton, auto"),
    ("slstm", {"x": lambda x: x[:, :, :, :3]}, r"x has shape \(2, 5, 2, 3, 8\), wanted \(B, T, H, 4, D\)"),
    ("slstm", {"x": lambda x: x[:, :0]}, "with no axis empty"),
    ("slstm", {"x": lambda x: x.long()}, "wanted floating dtypes"),
    ("slstm", {"r": lambda r: r[:1]}, r"r has shape \(1, 4, 8, 8\), wanted"),
    ("slstm", {"r": lambda r: r.to("meta")}, "r is on meta, wanted cpu"),
    ("slstm", {"state": (torch.zeros(2, 2, 7),) * 4}, "state.h has shape"),
]


@pytest.mark.parametrize(("op", "changes", "sentence"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input_gets_one_sentence(op, changes, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        bad(op, **changes)
    assert "\n" not in str(caught.value)
