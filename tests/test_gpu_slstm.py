"""The laws of slstm on its Triton kernels: here in Triton's interpreter, on a GPU with `pytest -m gpu`.

In the interpreter programs run one after the other, so heads that several of them share go step by step, on the same words that
they exchange on a GPU.
"""

import re

import pytest
import torch

import exlstm
import exlstm.ops.slstm.triton as operator
from exlstm.ops.slstm import SLSTMState, slstm
from gpu import (
    DEVICE,
    INTERPRETED,
    close,
    compile_only,
    cost,
    doubled,
    equal,
    flags,
    here,
    hold_in_the_interpreter,
    law,
    normal,
    poisoned,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# ‖x - truth‖ / ‖truth‖ of h, of the memory, and of the gradients. float16 keeps for the backward what bfloat16 does, and the
# interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {F32: (2e-6, 2e-6, 1e-5), F16: (1e-3, 1e-3, 8e-3), BF16: (4e-3, 4e-3, 8e-3)}
if INTERPRETED:
    LIMITS[BF16], LIMITS[F16] = (8e-3, 8e-3, 1.6e-2), (1e-3, 1e-3, 1.6e-2)
# A head in one program, and one that several programs share.
WIDTHS = (16, 24) if INTERPRETED else (64, 192)
DTYPES = (F32,) if INTERPRETED else (F32, BF16)
each = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both = pytest.mark.parametrize("width", WIDTHS)
SIZES = {"batch": 2, "heads": 1} if INTERPRETED else {"batch": 19, "heads": 3}


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def cuts(monkeypatch):
    """In the interpreter a head of 24 units is two programs, with R on chip or, for 40, in slices."""
    if INTERPRETED:
        from exlstm.ops.slstm import kernels

        own = kernels.choose
        small = {24: kernels.Cut(16, 2, True, 32, 4, 1), 40: kernels.Cut(32, 2, True, 16, 4, 1)}
        monkeypatch.setattr(
            kernels, "choose", lambda width, *rest, **more: small.get(width) or own(width, *rest, **more)
        )


def case(steps, width=16, batch=1, heads=1, dtype=F32, gate=1.0, state=True):
    """x, r, and h, c, n, m of a memory unless `state` is False; gates i ~ N(0, 1) and f ~ N(3, 1), wider by `gate`."""
    x = gate * normal(batch, steps, heads, 4, width, seed=1)
    x[:, :, :, 1] += 3
    r = normal(heads, 4, width, width, seed=2) / width**0.5
    memory = [normal(batch, heads, width, seed=3 + i) for i in range(4)]
    memory[2] = memory[2].abs() + 0.1
    return [x.to(dtype), r.to(dtype), *(memory if state else ())]


def memory(inputs, leaves=None):
    return SLSTMState(*(leaves or inputs)[2:5], inputs[5]) if len(inputs) > 2 else None


def gradients(h, state, leaves, **options):
    # Weights that every dtype holds exactly.
    weights = [normal(*x.shape, seed=20 + i, dtype=BF16).to(x.dtype) for i, x in enumerate((h, *state[:3]))]
    return torch.autograd.grad([h, *state[:3]], leaves, weights, **options)


def run(inputs, backend="triton", **options):
    """h, then h, c, n, m after it, then the gradients of a weighted sum of all but m."""
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    h, state = slstm(*leaves[:2], memory(inputs, leaves), backend=backend, **options)
    return [h.detach(), *(x.detach() for x in state), *gradients(h, state, leaves)]


def forward(inputs, backend="triton", **options):
    with torch.no_grad():
        h, state = slstm(*inputs[:2], memory(inputs), backend=backend, **options)
    return [h, *state]


def truth(inputs, **options):
    return run(doubled(inputs), "reference", **options)


def holds(found, wanted, dtype):
    h, state, most = LIMITS[dtype]
    close(found, wanted, [h, *[state] * 4, *[most] * 5][: len(wanted)])


def check(inputs, dtype, **options):
    with poisoned():
        found = run(inputs, **options)
    assert found[0].dtype == dtype and all(x.dtype == F32 for x in found[1:5])
    assert [x.dtype for x in found[5:]] == [x.dtype for x in inputs[:5]]
    holds(found, truth(inputs, **options), dtype)
    return found


# Equal to the reference


@law
@both
@each
@pytest.mark.parametrize("steps", (1, 2, 5) if INTERPRETED else (1, 2, 15, 63, 64, 65, 300))
def test_equals_the_reference(steps, width, dtype):
    check(case(steps, width, dtype=dtype, **SIZES), dtype)


OTHERS = [(24, BF16), (16, F16), (40, F32), (80, F32)]
if not INTERPRETED:
    OTHERS = [(width, BF16) for width in (8, 16, 32, 40, 96, 100, 128, 256, 512, 768)]
    OTHERS += [(width, dtype) for width in (16, 32, 128, 256, 512) for dtype in (F32, F16)]


@law
@pytest.mark.parametrize(("width", "dtype"), OTHERS, ids=str)
def test_equals_the_reference_at_every_width(width, dtype):
    check(case(3 if INTERPRETED else 40, width, dtype=dtype, state=width != 80), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16, 17, 130])
@pytest.mark.parametrize(("heads", "width"), [(12, 64), (4, 192), (4, 512)])
def test_equals_the_reference_for_few_rows_and_many(batch, heads, width):
    check(case(20, width, batch, heads, BF16), BF16)


@law
@both
@each
@pytest.mark.parametrize("kind", ["reset", "mask", "both", "every"])
def test_resets_and_padding(kind, width, dtype):
    steps, batch = 8 if INTERPRETED else 120, SIZES["batch"]
    options = {"reset": flags(batch, steps, density=1.0 if kind == "every" else 0.2, seed=1)} if kind != "mask" else {}
    options |= {"mask": flags(batch, steps, density=0.7, seed=2)} if kind in ("mask", "both") else {}
    check(case(steps, width, dtype=dtype, **SIZES), dtype, **options)


# Hard gates


@law
@both
@pytest.mark.parametrize("size", [4.0, 15.0, 40.0])
def test_hard_gates_are_as_exact_as_the_recurrence(size, width):
    """At most twice the error of the plain recurrence in float32."""
    inputs = case(8 if INTERPRETED else 60, width, gate=size, **SIZES)
    found, plain, exact = run(inputs), run(inputs, "reference"), truth(inputs)
    for i, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        error, usual = ((x.double() - c).norm() / c.norm().clamp(min=1e-12) for x in (a, b))
        assert error <= 2 * usual + 2e-6, (i, error.item(), usual.item())


@law
@both
@each
def test_extreme_gates_stay_finite(width, dtype):
    """Every gate at ±10,000 or 0, all of them at once or each by itself."""
    steps = 6 if INTERPRETED else 100
    inputs = case(steps, width, dtype=dtype, **SIZES)
    draw = torch.randint(3, inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for values in (draw - 1, torch.ones_like(draw), -torch.ones_like(draw), torch.zeros_like(draw)):
        inputs[0] = (1e4 * values).to(dtype)
        with poisoned():
            found = run(inputs)
        assert all(x.isfinite().all() for x in found)


@law
@both
def test_not_a_number_is_not_hidden(width):
    """A NaN in any gate is a NaN in what that unit gives."""
    for gate in range(4):
        inputs = case(3, width)
        inputs[0][:, 1, 0, gate, 2] = float("nan")
        h = forward(inputs)[0]
        assert h[0, 1, 0, 2].isnan() and h[0, 0].isfinite().all(), gate


# Time, rows, padding


@law
@both
@each
def test_a_split_changes_nothing(width, dtype):
    steps, at = (7, 3) if INTERPRETED else (90, 37)
    inputs = case(steps, width, dtype=dtype, **SIZES)
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    state, hs = memory(inputs, leaves), []
    for part in (slice(0, at), slice(at, steps)):
        h, state = slstm(leaves[0][:, part], leaves[1], state, backend="triton")
        hs.append(h)
    h = torch.cat(hs, 1)
    holds([h, *state, *gradients(h, state, leaves)], truth(inputs), dtype)


@law
@both
@each
def test_single_steps_equal_one_call(width, dtype):
    steps = 5 if INTERPRETED else 50
    inputs = case(steps, width, dtype=dtype, **SIZES)
    found, state = [], inputs[2:]
    for t in range(steps):
        h, *state = forward([inputs[0][:, t : t + 1], inputs[1], *state])
        found.append(h)
    wanted = truth(inputs)[:5]
    holds([torch.cat(found, 1), *state], wanted, dtype)
    holds(forward(inputs), wanted, dtype)


@law
@both
@each
def test_no_future_leaks_and_rows_are_alone(width, dtype):
    steps, at = (6, 3) if INTERPRETED else (80, 33)
    inputs = case(steps, width, dtype=dtype, state=False, **SIZES)
    changed = inputs[0].clone()
    changed[0, at:] += 1
    changed[1] += 1
    h, g = forward(inputs)[0], forward([changed, inputs[1]])[0]
    assert torch.equal(h[0, :at], g[0, :at]) and not torch.allclose(h[0, at:], g[0, at:])
    equal(forward([inputs[0][:1], inputs[1]])[:1], [h[:1]])


@law
@both
@each
def test_padding_changes_nothing(width, dtype):
    """Left, right or scattered: the tokens, the memory and all gradients are those of the tokens alone."""
    short, long = (4, 7) if INTERPRETED else (40, 70)
    inputs = case(short, width, dtype=dtype, heads=2)
    wanted = truth(inputs)
    scattered = torch.randperm(long, generator=torch.Generator().manual_seed(1))[:short].sort().values
    places = [torch.arange(short), torch.arange(long - short, long), scattered]
    for kept in (x.to(DEVICE) for x in places[2 if INTERPRETED else 0 :]):
        mask = torch.zeros(1, long, dtype=torch.bool, device=DEVICE)
        mask[:, kept] = True
        padded = inputs[0].new_full((1, long, *inputs[0].shape[2:]), 7.0).index_copy(1, kept, inputs[0])
        leaves = [x.requires_grad_() for x in (padded, *(x.detach().clone() for x in inputs[1:5]))]
        h, state = slstm(*leaves[:2], memory(inputs, leaves), mask=mask, backend="triton")
        assert not h[~mask].any()
        dx, *rest = gradients_at(kept, h, state, leaves)
        assert not dx[~mask].any()
        holds([h[:, kept], *state, dx[:, kept], *rest], wanted, dtype)


def gradients_at(kept, h, state, leaves):
    weights = [normal(*x.shape, seed=20 + i, dtype=BF16).to(x.dtype) for i, x in enumerate((h[:, kept], *state[:3]))]
    return torch.autograd.grad([h[:, kept], *state[:3]], leaves, weights)


@law
@both
def test_an_empty_row_keeps_its_state(width):
    inputs = case(4, width, batch=2)
    mask = torch.tensor([[False], [True]], device=DEVICE).expand(2, 4)
    h, *state = forward(inputs, mask=mask)
    assert not h[0].any()
    close([x[0] for x in state], doubled([x[0] for x in inputs[2:]]), 2e-7)
    assert not any(x.any() for x in forward(inputs[:2], mask=torch.zeros_like(mask)))


@law
@both
def test_zeros_are_an_empty_memory(width):
    inputs = case(4, width, state=False)
    equal(forward(inputs), forward([*inputs, *(torch.zeros(1, 1, width, device=DEVICE) for _ in range(4))]))


# What comes in and what goes out


@law
@both
@each
def test_strides_do_not_matter(width, dtype):
    """Gates before heads, units behind an odd offset, every other token, and a gradient that is one number expanded."""
    inputs = case(4 if INTERPRETED else 50, width, dtype=dtype, state=False, **SIZES)
    x, r = inputs
    odd = torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1:-2]
    views = [x.movedim(3, 2).contiguous().movedim(2, 3), odd, torch.stack([x, x], 2).flatten(1, 2)[:, ::2]]
    results = []
    for view in (x, *views):
        leaves = [y.detach().requires_grad_() for y in (view, r)]
        h, _ = slstm(*leaves, backend="triton")
        results.append([h, *torch.autograd.grad(h, leaves, h.new_ones(()).expand(h.shape))])
    for found in results[1:]:
        equal(found, results[0])


@law
@both
@each
def test_same_inputs_same_bits_and_nothing_is_written_into_an_argument(width, dtype):
    inputs = case(5 if INTERPRETED else 100, width, dtype=dtype, **SIZES)
    before = [x.clone() for x in inputs]
    once = run(inputs)
    equal(run(inputs), once)
    equal(before, inputs)
    # Without gradients nothing is kept, and the divisions are put together otherwise.
    close(forward(inputs), doubled(once[:5]), 1e-6 if dtype == F32 else 4e-3)


@law
@both
def test_any_single_gradient(width):
    """Of h alone, of the last memory alone, and a memory that nobody differentiates."""
    inputs = case(4, width)
    for pick in (lambda h, state: h.sum(), lambda h, state: state.c.sum() + state.h.sum()):
        results = []
        for tensors, backend in ((inputs, "triton"), (doubled(inputs), "reference")):
            leaves = [y.detach().requires_grad_() for y in tensors[:2]]
            results.append(torch.autograd.grad(pick(*slstm(*leaves, memory(tensors), backend=backend)), leaves))
        close(*results, 1e-5)


@law
def test_double_backward_is_refused_in_one_sentence():
    inputs = case(3)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    h, state = slstm(*leaves[:2], memory(inputs, leaves), backend="triton")
    grads = gradients(h, state, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"slstm has no second derivative on backend 'triton'; .* has one"):
        sum(x.sum() for x in grads).backward()


def summed(inputs, reset, mask):
    h, state = slstm(*inputs[:2], memory(inputs), reset=reset, mask=mask, backend="triton")
    return h.float().square().sum() + state.c.sum() + state.n.sum()


@law
@both
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False] if INTERPRETED else [False, True])
@each
def test_compiled_equals_eager(width, dtype, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        summed, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor", dynamic=dynamic
    )
    for steps in (3,) if INTERPRETED else (33, 50, 1):
        inputs = case(steps, width, dtype=dtype, **SIZES)
        options = [flags(inputs[0].shape[0], steps, density=density, seed=i) for i, density in ((1, 0.1), (2, 0.7))]
        leaves = [x.requires_grad_() for x in inputs[:5]]
        wanted = torch.autograd.grad(summed([*leaves, inputs[5]], *options), leaves)
        found = torch.autograd.grad(compiled([*leaves, inputs[5]], *options), leaves)
        close(found, doubled(wanted), 1e-5 if dtype == F32 else 1e-2)
    torch._dynamo.reset()


# Which implementation runs


@here
def test_a_cpu_tensor_gets_one_sentence_or_the_row_for_a_cpu():
    inputs = torch.ones(1, 3, 1, 4, 16), torch.ones(1, 4, 16, 16)
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 and float32 on a GPU, x is torch\.float32 on cpu"):
        slstm(*inputs, backend="triton")
    equal(slstm(*inputs)[:1], slstm(*inputs, backend="cpu")[:1])


@here
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_meta_tensors_give_shapes(dtype):
    x, r = (torch.empty(size, device="meta", requires_grad=True) for size in ((2, 70, 3, 4, 24), (3, 4, 24, 24)))
    h, state = slstm(x.to(dtype), r, backend="triton")
    assert h.shape == (2, 70, 3, 24) and h.dtype == dtype and h.device.type == "meta"
    assert all(s.shape == (2, 3, 24) and s.dtype == F32 for s in state)
    assert [g.shape for g in torch.autograd.grad(h, (x, r), h)] == [x.shape, r.shape]


@law
def test_auto_picks_the_kernels_on_a_gpu_and_the_recurrence_for_float64(monkeypatch):
    called = []
    for name, row in exlstm.ops.slstm.IMPLEMENTATIONS.items():
        watched = lambda *args, name=name, row=row: called.append(name) or row(*args)  # noqa: E731
        monkeypatch.setitem(exlstm.ops.slstm.IMPLEMENTATIONS, name, watched)
    inputs = case(3)
    for x in (inputs, [x.bfloat16() for x in inputs[:2]] + inputs[2:], doubled(inputs)):
        forward(x, None)
    assert called == (["triton", "triton", "cpu"] if INTERPRETED else ["triton", "triton", "reference"])
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 and float32 on a GPU, x is torch\.float64 on"):
        forward(doubled(inputs))


# Compiled for an H200


@here
@pytest.mark.parametrize(
    ("heads", "width", "most"), [(12, 64, 0), (6, 128, 128), (4, 192, 64), (4, 256, 64), (4, 512, 64)]
)
def test_compiles_as_it_is_launched(heads, width, most, monkeypatch):
    """Every kernel of a forward and a backward in bfloat16: real code, matrix instructions, at most `most` bytes spilled."""
    from exlstm.ops.slstm import kernels

    monkeypatch.setattr(operator, "runs_on", lambda x: True)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    leaves = [
        torch.zeros(s, dtype=BF16).requires_grad_() for s in ((16, 64, heads, 4, width), (heads, 4, width, width))
    ]
    found = compile_only(monkeypatch)
    h, _ = slstm(*leaves, backend="triton")
    torch.autograd.grad(h, leaves, h)
    forward([x.detach() for x in leaves])
    assert len(found) == 3
    for kernel, built in found:
        name, ptx = kernel.__name__, built.asm["ptx"]
        registers, spilled = cost(built)
        assert len(re.findall(r"(?m)^\s+(?:@%p\d+ )?[a-z][\w.:]+ .*;$", ptx)) > 200, name
        assert "mma.sync" in ptx and "st.global" in ptx, name
        assert registers > 16 and spilled <= most, (name, registers, spilled)


# Only on a GPU


@pytest.mark.gpu
@both
def test_a_graph_replays_forward_and_backward(width):
    inputs = case(60, width, 19, 4, BF16)
    leaves = [x.requires_grad_() for x in inputs[:5]]

    def work():
        h, state = slstm(*leaves[:2], memory(inputs, leaves), backend="triton")
        return [h, *state, *torch.autograd.grad([h, *state[:3]], leaves, [torch.ones_like(x) for x in (h, *state[:3])])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    with torch.no_grad():
        leaves[0].copy_(leaves[0].flip(1))
    graph.replay()
    torch.cuda.synchronize()
    equal([x.detach() for x in found], [x.detach() for x in work()])


@pytest.mark.gpu
def test_two_streams_share_the_card():
    """Programs that wait for each other never wait for programs that cannot start."""
    inputs = case(400, 512, 16, 4, BF16)
    wanted, streams = forward(inputs), [torch.cuda.Stream() for _ in range(4)]
    found = []
    torch.cuda.synchronize()
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(forward(inputs))
    torch.cuda.synchronize()
    for result in found:
        equal(result, wanted)
