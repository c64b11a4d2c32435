"""The laws of mlstm on its Triton kernels: here in Triton's interpreter, on a GPU with `pytest -m gpu`.

In the interpreter every law runs in float32, with plans cut so small that a few tokens are many chunks, blocks and tiles; on a
GPU in float32 and bfloat16, with the plans that a user gets.
"""

import re
from functools import partial
from itertools import product

import pytest
import torch
from torch.nn.functional import logsigmoid

import exlstm
import exlstm.ops.mlstm.plan as planning
import exlstm.ops.mlstm.triton as operator
from exlstm.ops.mlstm import MLSTMState, mlstm
from exlstm.ops.mlstm.plan import (
    Chain,
    Chunks,
    Columns,
    Fused,
    OnePass,
    Plan,
    Tiles,
    TwoPass,
    Walk,
    choose,
    power,
)
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
# ‖x - truth‖ / ‖truth‖ of h; of dq, dk, dv, di, c and what flows into the first memory; and of df.
# float16 is multiplied in tf32, which has its digits. The interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {F32: (2e-6, 1e-5, 1e-5), F16: (2e-3, 4e-3, 8e-3), BF16: (4e-3, 8e-3, 1.5e-2)}
if INTERPRETED:
    LIMITS[BF16] = (8e-3, 1.6e-2, 3e-2)
# L, BT, BJ of small plans: one block a chunk, several, and one-pass forwards that read scores or work them out.
SMALL = {"two": (16, 16, 16), "blocks": (64, 32, 16), "one": (16, 16, 16), "scores": (16, 16, 16)}
# The same in two segments and in four.
SMALL |= {"one cut": (16, 16, 16), "scores cut": (16, 16, 16)}
# A case of the laws: in the interpreter every row costs half a second, on a GPU it has what a one-pass forward wants.
SIZES = {"keys": 16, "values": 16} if INTERPRETED else {"keys": 64, "values": 128, "batch": 4, "heads": 8}
EACH = [(plan, F32) for plan in SMALL] if INTERPRETED else [("own", F32), ("own", BF16)]
ENDS = EACH[::3] if INTERPRETED else EACH
each = pytest.mark.parametrize(("plan", "dtype"), ENDS, ids=str, indirect=["plan"])
last = pytest.mark.parametrize(("plan", "dtype"), EACH[-1:] if INTERPRETED else EACH, ids=str, indirect=["plan"])


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


def cut(kind, q, v, chunk):
    """A small plan of `kind`, made from one for bfloat16 and many rows."""
    wide = [torch.empty(256, 1, 1, x.shape[-1], dtype=BF16, device="meta") for x in (q, v)]
    plan, (L, BT, BJ) = choose(*wide, 0), SMALL[kind]
    two = _narrow(plan.backward)._replace(L=L, BT=BT, BJ=BJ)
    if kind in ("two", "blocks"):
        return Plan(two, two)
    assert isinstance(plan.forward, OnePass)
    one = _narrow(plan.forward)._replace(L=L, BT=BT, BJ=BJ, SCORES="scores" in kind)
    if "cut" in kind:
        one = one._replace(S=4 if one.SCORES else 2)
    whole = one.forward._replace(BK=power(q.shape[-1]), BV=max(16, power(v.shape[-1]) // 2))
    # Its backward has chunks twice as long.
    return Plan(one._replace(forward=whole), two._replace(L=2 * L, BT=2 * BT))


def _narrow(plan):
    tiles = {name: x._replace(BK=16, BV=16) for name, x in plan._asdict().items() if isinstance(x, Tiles)}
    return plan._replace(**tiles)


@pytest.fixture(autouse=True)
def plan(request, monkeypatch):
    """Small plans in the interpreter, "two" unless a test names another; "own" is what the operator chooses."""
    kind = getattr(request, "param", "two" if INTERPRETED else "own")
    if kind != "own":
        monkeypatch.setattr(operator, "choose", partial(cut, kind))
    return kind


def case(steps, keys=16, values=16, batch=1, heads=1, dtype=F32, gate=1.0, bias=0.0, state=True):
    """q, k, v, log_i, log_f, and c, n and m of a memory unless `state` is False."""
    sizes = [(batch, steps, heads, *width) for width in ((keys,), (keys,), (values,), (), ())]
    q, k, v, i, f = (normal(*size, seed=seed) for seed, size in enumerate(sizes))
    memory = [normal(batch, heads, *size, seed=7 + i) for i, size in enumerate(((keys, values), (keys,), ()))]
    return [*(x.to(dtype) for x in (q, k, v)), gate * i + bias, logsigmoid(gate * f + 3), *(memory if state else ())]


def run(inputs, backend="triton", **options):
    """h, c, n, m, then the gradients of a weighted sum of h, c and n."""
    leaves = [x.detach().requires_grad_() for x in inputs[:7]]
    h, state = mlstm(*leaves[:5], memory(inputs, leaves), backend=backend, **options)
    return [h.detach(), *(x.detach() for x in state), *gradients(h, state, leaves)]


def memory(inputs, leaves=None):
    return MLSTMState(*(leaves or inputs)[5:7], inputs[7]) if len(inputs) > 5 else None


def gradients(h, state, leaves, **options):
    # Weights that every dtype holds exactly.
    weights = [normal(*x.shape, seed=20 + i, dtype=BF16).to(x.dtype) for i, x in enumerate((h, *state[:2]))]
    return torch.autograd.grad([h, *state[:2]], leaves, weights, **options)


def forward(inputs, backend="triton", **options):
    with torch.no_grad():
        h, state = mlstm(*inputs[:5], memory(inputs), backend=backend, **options)
    return [h, *state]


def truth(inputs, **options):
    """The same in float64, by the recurrence; in chunks where its autograd graph would not fit."""
    numbers = inputs[2].shape[:3].numel() * inputs[0].shape[-1] * inputs[2].shape[-1]
    return run(doubled(inputs), "reference" if numbers <= 1 << 24 else "cpu", **options)


def limits(dtype):
    h, most, forget = LIMITS[dtype]
    return [h, most, 5e-6, 2e-6, most, most, most, most, forget, most, most]


def holds(found, wanted, dtype):
    close(found, wanted, limits(dtype)[: len(wanted)])


def check(inputs, dtype, **options):
    with poisoned():
        found = run(inputs, **options)
    assert found[0].dtype == dtype and all(x.dtype == F32 for x in found[1:4])
    assert [x.dtype for x in found[4:]] == [x.dtype for x in inputs[:7]]
    options.pop("chunk", None)
    holds(found, truth(inputs, **options), dtype)
    return found


# Equal to the reference

STEPS = (1, 2, 15, 63, 64, 65)
if INTERPRETED:
    LENGTHS = [("two", F32, steps) for steps in STEPS] + [("blocks", F32, 66), ("one", F32, 40), ("scores", F32, 33)]
    LENGTHS += [("one cut", F32, 70), ("scores cut", F32, 100), ("scores cut", F32, 7)]
else:
    LENGTHS = [(*row, steps) for row, steps in product(EACH, (*STEPS, 1000))]


@law
@pytest.mark.parametrize(("plan", "dtype", "steps"), LENGTHS, ids=str, indirect=["plan"])
def test_equals_the_reference(plan, dtype, steps):
    check(case(steps, dtype=dtype, **SIZES), dtype)


if INTERPRETED:
    WIDTHS = [("two", 8, 12, F32), ("blocks", 24, 40, F32), ("scores", 24, 40, BF16), ("one", 40, 24, F16)]
    WIDTHS += [("own", 96, 192, F32), ("two", 2, 3, F32), ("one", 4, 8, BF16)]
else:
    pairs = [(8, 12), (16, 512), (24, 40), (64, 64), (64, 128), (96, 192), (128, 256), (192, 96), (256, 512), (512, 64)]
    WIDTHS = [("own", *widths, BF16) for widths in [*pairs, (512, 512), (2, 3), (4, 8)]]
    WIDTHS += [("own", *widths, dtype) for widths in pairs[2::2] for dtype in (F16, F32)]


@law
@pytest.mark.parametrize(("plan", "keys", "values", "dtype"), WIDTHS, ids=str, indirect=["plan"])
def test_equals_the_reference_at_every_width(plan, keys, values, dtype):
    check(case(18 if INTERPRETED else 300, keys, values, dtype=dtype, state=keys != 96), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(64, 128), (128, 256), (256, 512)])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 7), (16, 16)])
def test_equals_the_reference_for_few_rows_and_many(keys, values, batch, heads):
    check(case(520, keys, values, batch, heads, BF16), BF16)


if INTERPRETED:
    # Resets take the interpreter seconds.
    FLAGS = [
        ("scores", F32, "reset"),
        ("one cut", F32, "both"),
        ("two", F32, "mask"),
        ("blocks", F32, "both"),
        ("two", F32, "every"),
    ]
else:
    FLAGS = [(*row, kind) for row, kind in product(EACH, ["reset", "mask", "both", "every"])]


@law
@pytest.mark.parametrize(("plan", "dtype", "kind"), FLAGS, ids=str, indirect=["plan"])
def test_resets_and_padding(plan, dtype, kind):
    sizes = (1, 34) if INTERPRETED else (SIZES["batch"], 700)
    options = {"reset": flags(*sizes, density=1.0 if kind == "every" else 0.1, seed=1)} if kind != "mask" else {}
    options |= {"mask": flags(*sizes, density=0.7, seed=2)} if kind in ("mask", "both") else {}
    check(case(sizes[1], dtype=dtype, **SIZES), dtype, **options)


OPTIONS = [{"normalize": False, "scale": 1.0}, {"eps": 0.1, "scale": 0.3}]


@law
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each
def test_options(plan, dtype, options):
    check(case(34 if INTERPRETED else 300, dtype=dtype, state=False, **SIZES), dtype, **options)


@law
@last
def test_small_input_gates(plan, dtype):
    """The bias of -10 that trained models start from: the floor exp(-m) is far above every q·n."""
    check(case(34 if INTERPRETED else 600, dtype=dtype, bias=-10.0, **SIZES), dtype)


@law
@pytest.mark.parametrize("plan", ["own"], indirect=True)
def test_chunk_length_does_not_matter(plan):
    inputs, chunks = case(40, **SIZES), (1000,) if INTERPRETED else (1, 16, 33, 64, 100, 128, 1000)
    for chunk in chunks:
        check(inputs, F32, chunk=chunk)


# Hard gates


def hard(kind, steps, **sizes):
    """Gates drawn `kind` times as wide, or all at ± `kind`."""
    if kind[0] != "±":
        return case(steps, gate=float(kind[1:]), **sizes)
    q, k, v, i, f, *memory = case(steps, **sizes)
    size = float(kind[1:])
    return [q, k, v, size * i.sign(), logsigmoid(size * f.sign()), *memory]


@law
@pytest.mark.parametrize("kind", ["×4", "×10"] + ["±15", "±40"] * (not INTERPRETED))
@pytest.mark.parametrize("plan", ["two"] if INTERPRETED else ["own"], indirect=True)
def test_hard_gates_are_as_exact_as_the_recurrence(plan, kind):
    """At most twice the error of the plain recurrence in float32."""
    inputs = hard(kind, 50, **SIZES) if INTERPRETED else hard(kind, 200, keys=32, values=64, batch=2, heads=4)
    found, plain, exact = run(inputs), run(inputs, "reference"), truth(inputs)
    for i, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        error, usual = ((x.double() - c).norm() / c.norm().clamp(min=1e-12) for x in (a, b))
        assert error <= 2 * usual + 2e-6, (i, error.item(), usual.item())


@law
@pytest.mark.parametrize("normalize", [True, False])
@each
def test_extreme_gates_stay_finite(plan, dtype, normalize):
    """Every pair of extremes in a head of its own, all open and all closed among them, and queries that are zero."""
    if INTERPRETED and normalize != (plan == "two"):
        pytest.skip("one way each will do in the interpreter")
    pairs = list(product((-1e4, 0.0, 1e4), repeat=2))[:: (2 if normalize else 4) if INTERPRETED else 1]
    i, f = (torch.tensor(x, device=DEVICE) for x in zip(*pairs))
    inputs = case(18 if INTERPRETED else 300, heads=len(pairs), dtype=dtype, state=normalize)
    inputs[0][:, ::3] = 0
    inputs[3][:], inputs[4][:] = i, logsigmoid(f)
    if not INTERPRETED:
        # Heads whose gates stay, and heads whose gates jump.
        inputs[3][:, 1::2, ::2] = i.flip(0)[::2]
        inputs[4][:, 2::3, ::2] = logsigmoid(f.flip(0))[::2]
    with poisoned():
        found = run(inputs, normalize=normalize)
    assert all(x.isfinite().all() for x in found)


# Time, rows, padding


@law
@each
def test_a_split_changes_nothing(plan, dtype):
    steps, at = (40, 19) if INTERPRETED else (300, 113)
    inputs = case(steps, dtype=dtype, **SIZES)
    leaves = [x.detach().requires_grad_() for x in inputs[:7]]
    state, hs = memory(inputs, leaves), []
    for part in (slice(0, at), slice(at, steps)):
        h, state = mlstm(*(x[:, part] for x in leaves[:5]), state, backend="triton")
        hs.append(h)
    h = torch.cat(hs, 1)
    holds([h, *state, *gradients(h, state, leaves)], truth(inputs), dtype)


@law
@each
def test_single_steps_equal_one_call(plan, dtype):
    steps = 7 if INTERPRETED else 70
    inputs = case(steps, dtype=dtype, **SIZES)
    found, state = [], memory(inputs)
    for t in range(steps):
        h, *state = forward([*(x[:, t : t + 1] for x in inputs[:5]), *state])
        found.append(h)
    holds([torch.cat(found, 1), *state], truth(inputs)[:4], dtype)
    holds(forward(inputs), truth(inputs)[:4], dtype)


@law
@each
def test_no_future_leaks_and_rows_are_alone(plan, dtype):
    steps, at = (34, 19) if INTERPRETED else (300, 131)
    inputs = case(steps, dtype=dtype, state=False, **{**SIZES, "batch": 2 if INTERPRETED else 4})
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, at:] += 1
        x[1] += 1
    (h, *_), (g, *_) = forward(inputs), forward(changed)
    assert torch.equal(h[0, :at], g[0, :at]) and not torch.allclose(h[0, at:], g[0, at:])
    alone = forward([x[:1] for x in inputs])
    if dtype == F32:
        equal(alone[:1], [h[:1]])
    else:
        # Fewer rows may be cut into other tiles, which round differently.
        holds(alone, truth([x[:1] for x in inputs])[:4], dtype)


@law
@each
def test_padding_changes_nothing(plan, dtype):
    """Left, right or scattered: the tokens, the memory and all gradients are those of the tokens alone."""
    short, long = (12, 20) if INTERPRETED else (200, 290)
    inputs = case(short, dtype=dtype, **SIZES | {"batch": 1})
    wanted = truth(inputs)
    scattered = torch.randperm(long, generator=torch.Generator().manual_seed(1))[:short].sort().values
    places = [scattered] if INTERPRETED else [torch.arange(short), torch.arange(long - short, long), scattered]
    for kept in (x.to(DEVICE) for x in places):
        mask = torch.zeros(1, long, dtype=torch.bool, device=DEVICE)
        mask[:, kept] = True
        padded = [x.new_full((1, long, *x.shape[2:]), 7.0).index_copy(1, kept, x) for x in inputs[:5]]
        leaves = [x.requires_grad_() for x in (*padded, *(x.detach().clone() for x in inputs[5:7]))]
        h, state = mlstm(*leaves[:5], memory(inputs, leaves), mask=mask, backend="triton")
        assert not h[~mask].any()
        h = h[:, kept]
        grads = gradients(h, state, leaves)
        assert not any(x[~mask].any() for x in grads[:5])
        holds([h, *state, *(x[:, kept] for x in grads[:5]), *grads[5:]], wanted, dtype)


@law
def test_an_empty_row_keeps_its_state():
    inputs = case(18, batch=2)
    mask = torch.tensor([[False], [True]], device=DEVICE).expand(2, 18)
    h, *state = forward(inputs, mask=mask)
    assert not h[0].any()
    close([x[0] for x in state], doubled([x[0] for x in inputs[5:]]), 2e-7)
    h, *state = forward(inputs[:5], mask=torch.zeros_like(mask))
    assert not any(x.any() for x in (h, *state))


@law
@each
def test_a_reset_is_a_fresh_start(plan, dtype):
    steps, at = (20, 9) if INTERPRETED else (300, 150)
    inputs = case(steps, dtype=dtype, **SIZES)
    reset = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=DEVICE)
    reset[:, at] = True
    h, *state = forward(inputs, reset=reset)
    holds([h[:, at:], *state], truth([x[:, at:] for x in inputs[:5]])[:4], dtype)
    holds([h[:, :at]], truth([x[:, :at] for x in inputs[:5]] + inputs[5:])[:1], dtype)


# What comes in and what goes out


@law
@last
def test_strides_do_not_matter(plan, dtype):
    """Heads first, features behind an odd offset, and a gradient that is one number expanded."""
    inputs = case(20 if INTERPRETED else 200, dtype=dtype, state=False, **SIZES)
    q, k, v, i, f = inputs
    odd = torch.cat([k[..., :1], k, k[..., :2]], -1)[..., 1:-2]
    strided = [q.transpose(1, 2).contiguous().transpose(1, 2), odd, torch.stack([v, v], 3)[:, :, :, 1]]
    strided += [x.movedim(1, 2).contiguous().movedim(2, 1) for x in (i, f)]
    results = []
    for tensors in (inputs, strided):
        leaves = [x.detach().requires_grad_() for x in tensors]
        h, _ = mlstm(*leaves, backend="triton")
        results.append([h, *torch.autograd.grad(h, leaves, h.new_ones(()).expand(h.shape))])
    equal(*results)


@law
@last
def test_same_inputs_same_bits_and_nothing_is_written_into_an_argument(plan, dtype):
    inputs = case(20 if INTERPRETED else 600, dtype=dtype, **SIZES)
    before = [x.clone() for x in inputs]
    once = run(inputs)
    equal(run(inputs), once)
    equal(before, inputs)
    # Without gradients nothing is kept, and the result is the same.
    equal(forward(inputs), once[:4])


@law
def test_double_backward_is_refused_in_one_sentence():
    inputs = case(18)
    leaves = [x.requires_grad_() for x in inputs[:7]]
    h, state = mlstm(*leaves[:5], memory(inputs, leaves), backend="triton")
    grads = gradients(h, state, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mlstm has no second derivative on backend 'triton'; .* has one"):
        sum(x.sum() for x in grads).backward()


def summed(inputs, reset, mask):
    h, state = mlstm(*inputs[:5], memory(inputs), reset=reset, mask=mask, backend="triton")
    return h.float().square().sum() + state.c.sum() + state.n.sum()


@law
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize("dtype", [F32] if INTERPRETED else [F32, BF16])
def test_compiled_equals_eager(dtype, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        summed, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor", dynamic=dynamic
    )
    for steps in (18,) if INTERPRETED else (130, 200, 1):
        inputs = case(steps, dtype=dtype, **SIZES)
        batch = inputs[0].shape[0]
        options = [None, None] if INTERPRETED else [flags(batch, steps, density=0.1, seed=i) for i in (1, 2)]
        leaves = [x.requires_grad_() for x in inputs[:7]]
        wanted = torch.autograd.grad(summed([*leaves, inputs[7]], *options), leaves)
        found = torch.autograd.grad(compiled([*leaves, inputs[7]], *options), leaves)
        close(found, doubled(wanted), 1e-5 if dtype == F32 else 1e-2)
    torch._dynamo.reset()


# Which implementation runs


@here
def test_a_cpu_tensor_gets_one_sentence_or_the_row_for_a_cpu():
    inputs = [x.cpu() for x in (torch.ones(1, 3, 1, 16),) * 3] + [torch.zeros(1, 3, 1)] * 2
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 and float32 on a GPU, q is torch\.float32 on cpu"):
        mlstm(*inputs, backend="triton")
    equal(mlstm(*inputs)[:1], mlstm(*inputs, backend="cpu")[:1])


@here
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_meta_tensors_give_shapes(dtype):
    q, v, gate = (torch.empty(2, 70, 3, *width, device="meta", requires_grad=True) for width in ((24,), (40,), ()))
    h, state = mlstm(q.to(dtype), q.to(dtype), v.to(dtype), gate, gate, backend="triton")
    assert h.shape == v.shape and h.dtype == dtype and h.device.type == "meta"
    assert [x.shape for x in state] == [(2, 3, 24, 40), (2, 3, 24), (2, 3)]
    assert [x.shape for x in torch.autograd.grad(h, (q, v, gate), h)] == [q.shape, v.shape, gate.shape]


@law
def test_auto_picks_the_kernels_and_float64_the_row_for_a_cpu(monkeypatch):
    called = []
    for name, row in exlstm.ops.mlstm.IMPLEMENTATIONS.items():
        watched = lambda *args, name=name, row=row: called.append(name) or row(*args)  # noqa: E731
        monkeypatch.setitem(exlstm.ops.mlstm.IMPLEMENTATIONS, name, watched)
    inputs = case(3)
    for x in (inputs, [x.bfloat16() for x in inputs[:3]] + inputs[3:], doubled(inputs)):
        forward(x, None)
    with exlstm.backend("cpu"):
        forward(inputs, None)
    assert called == ["triton", "triton", "cpu", "cpu"]
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 and float32 on a GPU, q is torch\.float64 on"):
        forward(doubled(inputs))


# Compiled for an H200

# Bytes that a kernel may write and read again where it is more than 64: for heads of 64 / 128, 150 each way, with n on chip
# as well, which takes 0.53 ms where n from a pass of its own took 0.59.
# The backward in one walk: 296 bytes in all, with resets 356, in segments 372, where Triton's own pipeline had thousands.
SPILLS = {("mlstm_forward_kernel", 64): 320, ("mlstm_backward_kernel", 64): 372}
# Numbers that stand for addresses, outside of the products; with resets most.
SPILLS |= {("mlstm_walk_kernel", 128): 896, ("mlstm_chunks_kernel", 128): 464, ("mlstm_chunks_kernel", 256): 464}
# Kernels in Gluon: their warps, and the shared memory that leaves room for as many programs as are meant to stand side by side.
GLUON = {"mlstm_walk_kernel": (12, 227), "mlstm_backward_kernel": (4, 113), "mlstm_gradients_kernel": (4, 113)}
GLUON |= {"mlstm_columns_kernel": (12, 227), "mlstm_chunks_kernel": (16, 227)}


@here
@pytest.mark.parametrize(
    ("heads", "keys", "values", "with_reset", "hopper"),
    [
        (8, 256, 512, False, ()),
        (16, 128, 256, True, ()),
        (16, 128, 64, False, ()),
        (32, 64, 128, False, ()),
        (8, 256, 512, False, ("mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (8, 256, 512, True, ("mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (16, 128, 192, False, ("mlstm_walk_kernel",)),
        (8, 128, 256, True, ("mlstm_walk_kernel", "mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (4, 128, 256, False, ("mlstm_walk_kernel", "mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (16, 128, 128, True, ("mlstm_walk_kernel", "mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (8, 128, 384, True, ("mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (4, 256, 256, False, ("mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (4, 128, 192, True, ("mlstm_walk_kernel",)),
        (4, 64, 128, True, ("mlstm_backward_kernel",)),
        (16, 128, 256, False, ("mlstm_walk_kernel", "mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (16, 128, 256, True, ("mlstm_walk_kernel", "mlstm_columns_kernel", "mlstm_chunks_kernel")),
        (32, 64, 128, False, ("mlstm_backward_kernel",)),
        (32, 64, 128, True, ("mlstm_backward_kernel",)),
        (8, 64, 128, False, ("mlstm_gradients_kernel",)),
        (8, 64, 96, True, ("mlstm_gradients_kernel",)),
    ],
)
def test_compiles_as_it_is_launched(heads, keys, values, with_reset, hopper, monkeypatch):
    """Every kernel of a forward and a backward in bfloat16: real code, matrix instructions where matrices meet, few spills.

    Few heads are those of long sequences, which are cut into segments.
    """
    import triton

    from exlstm.ops.mlstm import gates

    init = gates.Call.__init__

    def as_on_a_gpu(self, q, *rest):
        init(self, q, *rest)
        self.dtype, self.dot = BF16, triton.language.bfloat16

    monkeypatch.setattr(gates.Call, "__init__", as_on_a_gpu)
    monkeypatch.setattr(operator, "runs_on", lambda q: True)
    monkeypatch.setattr(planning, "gluon", lambda device: bool(hopper))
    steps = 4096 if heads == 4 else 1024
    reset = torch.zeros(8, steps, dtype=torch.bool) if with_reset else None
    sizes = [(8, steps, heads, *width) for width in ((keys,), (keys,), (values,), (), ())]
    leaves = [torch.zeros(size, dtype=BF16 if len(size) > 3 else F32).requires_grad_() for size in sizes]
    found = compile_only(monkeypatch)
    h, state = mlstm(*leaves, reset=reset, backend="triton")
    torch.autograd.grad([h, *state[:2]], leaves, [h, *state[:2]])
    names = {kernel.__name__ for kernel, _ in found}
    assert len(found) > (5 if hopper else 10)
    assert names & set(GLUON) == set(hopper) & set(GLUON)
    back = {"mlstm_backward_kernel", "mlstm_gradients_kernel", "mlstm_chunks_kernel"}
    assert ("mlstm_segment_sums_kernel" in names) == (heads == 4)
    assert ("mlstm_dq_kernel" in names) == (not back & set(hopper))
    for kernel, built in {built.hash: (kernel, built) for kernel, built in found}.values():
        name, ptx = kernel.__name__, built.asm["ptx"]
        registers, spilled = cost(built)
        assert len(re.findall(r"(?m)^\s+(?:@%p\d+ )?[a-z][\w.:]+ .*;$", ptx)) > 50, name
        assert re.search(r"st\.global|bulk\.tensor.*\.global\.shared", ptx), name
        assert ("tl.dot(" in kernel.src or name in GLUON) == ("wgmma.mma_async" in ptx), name
        warps, shared = GLUON.get(name, (built.metadata.num_warps, 227))
        assert built.metadata.num_warps == warps and built.metadata.shared <= shared << 10, name
        assert registers > 16 and spilled <= SPILLS.get((name, keys), 64), (name, registers, spilled)


@here
def test_kernels_in_gluon_are_only_chosen_where_they_run(monkeypatch):
    """At the widths and in the dtype that they ran with; many rows in one walk, few chunk by chunk."""

    def backward(rows, keys=64, values=128, dtype=BF16, chunk=0):
        q, v = (torch.empty(rows, 1, 1, width, dtype=dtype, device="meta") for width in (keys, values))
        return type(choose(q, v, chunk).backward)

    assert not planning.gluon(torch.device("cpu")) and backward(128) is TwoPass
    monkeypatch.setattr(planning, "gluon", lambda device: True)
    assert [backward(rows) for rows in (1, 127, 128, 4096)] == [Fused, Fused, Chain, Chain]
    assert [backward(128, values=width) for width in (64, 96, 128, 256)] == [Chain, Chain, Chain, TwoPass]
    assert {backward(128, keys=width) for width in (16, 32, 60)} == {TwoPass}
    assert [backward(rows, 128, 256) for rows in (46, 47, 128)] == [TwoPass, Chunks, Chunks]
    assert [backward(rows, 256, 512) for rows in (23, 24, 4096)] == [TwoPass, Chunks, Chunks]
    assert {backward(128, 256, width) for width in (128, 256, 384, 1024)} == {Chunks}
    assert {backward(128, 128, width) for width in (128, 256, 384)} == {Chunks}
    assert {backward(128, 256, 192), backward(128, 192, 512), backward(128, 256, 512, F16)} == {TwoPass}
    assert (backward(512, 64, 64), backward(512, 128, 64)) == (Chain, TwoPass)
    assert {backward(128, 96, 256), backward(128, 128, 192), backward(128, 128, 256, F16)} == {TwoPass}
    assert {backward(128, dtype=F16), backward(8, dtype=F32), backward(128, chunk=64)} == {TwoPass}

    def walks(rows, keys, values, **more):
        q, v = (torch.empty(rows, 1, 1, width, dtype=BF16, device="meta") for width in (keys, values))
        return isinstance(choose(q, v, more.get("chunk", 0)).forward, Walk)

    assert [walks(rows, 128, 256) for rows in (46, 47, 64, 128, 4096)] == [False, True, True, True, True]
    assert walks(128, 96, 192) and walks(128, 128, 128) and not walks(128, 128, 64) and not walks(128, 64, 128)
    assert (
        not walks(128, 256, 512)
        and not walks(127, 64, 128)
        and not walks(128, 32, 128)
        and not walks(128, 128, 256, chunk=64)
    )


@here
def test_few_long_sequences_are_cut_into_segments(monkeypatch):
    """As many as fill the card, none of them short; many rows, short ones and other widths go as they always do."""

    def cut(rows, steps, keys, values):
        q, v = (torch.empty(rows, steps, 1, width, dtype=BF16, device="meta") for width in (keys, values))
        return choose(q, v, 0)

    few = cut(32, 65536, 128, 256)
    monkeypatch.setattr(planning, "gluon", lambda device: True)
    assert cut(32, 65536, 128, 256) != few and cut(32, 65536, 256, 512) == cut(32, 64, 256, 512)
    found = [cut(rows, 65536, 256, 512) for rows in (1, 8, 16, 32, 128)]
    assert found == [Plan(Columns(64, S), Chunks(128, S)) for S in (32, 4, 2, 1, 1)]
    found = {rows: cut(rows, 65536, 128, 256) for rows in (2, 8, 16, 32, 48, 64, 96, 128)}
    assert [plan.forward.S for plan in found.values()] == [32, 8, 4, 2, 1, 1, 1, 1]
    assert [plan.backward.S for plan in found.values()] == [32, 8, 4, 2, 1, 1, 1, 1]
    found = [cut(rows, 65536, 64, 128) for rows in (16, 32, 64, 100, 128)]
    assert [(plan.forward.S, plan.backward.S) for plan in found] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert [type(cut(32, steps, 128, 256).forward) for steps in (1023, 1024)] == [OnePass, Walk]
    assert [type(cut(32, steps, 128, 256).backward) for steps in (1023, 1024)] == [TwoPass, Chunks]
    assert [type(cut(64, steps, 64, 128).backward) for steps in (2047, 2048)] == [Fused, Chain]
    assert cut(32, 65536, 128, 192) == Plan(Walk(64, 128, 2), few.backward)
    for rows, steps in product(range(1, 128), (1, 1000, 4096, 65536)):
        S = planning.segments(rows, steps, 132)
        assert S & (S - 1) == 0 and (S < 2 or steps >= S * 512)
        assert not S or rows * S >= 0.7 * planning.cdiv(rows * S, 132) * 132
        # All of a sequence, in segments of as many chunks each, forward and backward, whatever follows.
        plan = cut(rows, steps, 128, 256)
        if isinstance(plan.backward, Chunks):
            tokens = planning.padded_length(plan, steps, True)
            assert steps <= tokens < steps + max(512, steps // 4)
            assert not any(tokens % (part.S * part.L) for part in plan)
            assert plan.forward.S == 1 or planning.padded_length(plan, steps, False) == tokens


@law
@pytest.mark.parametrize(("options", "parts"), [({}, 1), ({"normalize": False}, 2), ({"eps": 0.1}, 3)], ids=str)
def test_segments_start_and_end_where_the_sequence_stands(options, parts, monkeypatch):
    """C and n at every border, and their gradients, against the recurrence up to there and from there on."""
    from exlstm.ops.mlstm import gates, segments

    monkeypatch.setattr(segments, "parts", lambda programs, chunks: parts)
    L, S, N, keys, values = 16, 3, 4, 24, 40
    tokens = S * N * L
    inputs = case(tokens, keys, values, heads=2)
    reset = flags(1, tokens, density=0.02, seed=3)
    reset[:, N * L], reset[:, 2 * N * L + 5] = True, True
    normalize, eps, scale = options.get("normalize", True), options.get("eps", 0.0), keys**-0.5
    q, k, v, i, f, c, n, m = inputs
    h, _, _, _, den, s, *_ = operator._forward(*inputs, reset, scale, normalize, eps, L, True)
    dh, dc, dn = (normal(*x.shape, seed=20 + i) for i, x in enumerate((h, c, n)))
    call = gates.Call(q, v, reset, scale, normalize, L, tokens)
    found = call.gates(i, f, m)
    with poisoned():
        cs, ns = segments.starts(call, S, k, v, found, (c, n))
        dcs, dns = segments.ends(call, S, (q, h, dh), found, (den, s), (dc, dn))
        alone = segments.starts(call, S, k, v, found, (c, None))[0]
        fresh = segments.ends(call, S, (q, h, dh), found, (den, s), (None, None))
    equal([alone], [cs])
    # The same in small tiles.
    monkeypatch.setattr(segments, "sums", lambda *widths: Tiles(16, 16, 4, 1))
    small = (
        segments.starts(call, S, k, v, found, (c, n)),
        segments.ends(call, S, (q, h, dh), found, (den, None), (dc, None)),
    )
    close([*small[0], small[1][0]], doubled([cs, ns, dcs]), 2e-6)
    cs, ns, dcs, dns = (x.view(2, S, *x.shape[1:]) for x in (cs, ns, dcs, dns))
    state, x = MLSTMState(*doubled((c, n, m))), doubled(inputs[:5])
    for at in range(S):
        close([cs[:, at], ns[:, at]], [state.c[0], state.n[0]], [5e-6, 2e-6])
        part = slice(at * N * L, (at + 1) * N * L)
        _, state = mlstm(*(y[:, part] for y in x), state, reset=reset[:, part], backend="reference", **options)
        leaves, part = [y.detach().requires_grad_() for y in state[:2]], slice((at + 1) * N * L, None)
        if at == S - 1:
            equal([dcs[:, at], dns[:, at]], [dc[0], dn[0]])
            equal([y.view(2, S, -1)[:, at] for y in fresh], [torch.zeros_like(y).view(2, -1) for y in (c, n)])
            break
        rest = MLSTMState(*leaves, state.m)
        out, last = mlstm(*(y[:, part] for y in x), rest, reset=reset[:, part], backend="reference", **options)
        wanted = torch.autograd.grad([out, *last[:2]], leaves, doubled((dh[:, part], dc, dn)))
        close([dcs[:, at], dns[:, at]], [y[0] for y in wanted], 1e-5)


@here
@pytest.mark.parametrize(
    ("capability", "version", "runs"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.5.1", False), ((9, 0), "3.7.0", False), ((8, 0), "3.6.0", False)],
)
def test_gluon_wants_hopper_and_the_triton_it_was_written_for(capability, version, runs, monkeypatch):
    import triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    assert planning.gluon.__wrapped__(torch.device("cuda", 0)) == runs


# Only on a GPU


# Backwards in Gluon where they run, with as many rows and as few as they are for; two passes elsewhere, or where `chunk` asks.
ROWS = [(8, 16, None), (1, 8, None), (8, 16, 64)]
NARROW = [
    ({"steps": 64}, {}),
    ({"steps": 200}, {}),
    ({"steps": 300, "state": False}, {}),
    ({"steps": 300, "bias": -10.0}, {}),
    ({"steps": 130}, {"normalize": False, "scale": 1.0}),
    ({"steps": 130, "state": False}, {"eps": 0.1, "scale": 0.3}),
    ({"steps": 130, "values": 96}, {}),
    ({"steps": 130, "values": 64}, {}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads", "chunk"), ROWS, ids=str)
@pytest.mark.parametrize(("sizes", "options"), NARROW, ids=str)
def test_narrow_heads_whatever_their_backward(sizes, options, batch, heads, chunk):
    inputs = case(**{"keys": 64, "values": 128, "batch": batch, "heads": heads, "dtype": BF16, **sizes})
    equal(check(inputs, BF16, chunk=chunk, **options), run(inputs, chunk=chunk, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads", "chunk"), ROWS, ids=str)
def test_narrow_heads_with_resets_and_padding(batch, heads, chunk):
    inputs = case(200, 64, 128, batch, heads, BF16)
    marks = {"reset": flags(batch, 200, density=0.1, seed=1), "mask": flags(batch, 200, density=0.7, seed=2)}
    equal(check(inputs, BF16, chunk=chunk, **marks), run(inputs, chunk=chunk, **marks))


# The walk forward, and at 128/256 the two walks back, with as many rows as they are for: widths at the tiles and inside of them.
WALKS = [
    ({"steps": 2}, {}),
    ({"steps": 64}, {}),
    ({"steps": 130, "state": False}, {}),
    ({"steps": 700}, {}),
    ({"steps": 300, "bias": -10.0}, {}),
    ({"steps": 130}, {"normalize": False, "scale": 1.0}),
    ({"steps": 130, "state": False}, {"eps": 0.1, "scale": 0.3}),
    ({"steps": 200, "keys": 96, "values": 192}, {}),
    ({"steps": 200, "keys": 120, "values": 136}, {}),
    ({"steps": 200, "values": 128}, {}),
]
# Heads of 256: a walk in columns of C, and chunks of 128 by themselves behind it.
BLOCK = {"keys": 256, "values": 512, "heads": 8}
COLUMNS = [
    ({"steps": 64, "batch": 4}, {}),
    ({"steps": 1000, "batch": 5}, {}),
    ({"steps": 700, "batch": 16}, {}),
    ({"steps": 129, "batch": 4, "state": False}, {"eps": 0.1, "scale": 0.3}),
    ({"steps": 200, "batch": 4, "state": False, "bias": -10.0}, {}),
    ({"steps": 333, "batch": 4}, {"normalize": False, "scale": 1.0}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "options"), [*WALKS, *((BLOCK | sizes, more) for sizes, more in COLUMNS)], ids=str)
def test_wide_heads_in_one_walk(sizes, options):
    inputs = case(**{"keys": 128, "values": 256, "batch": 8, "heads": 16, "dtype": BF16, **sizes})
    found = check(inputs, BF16, **options)
    equal(found, run(inputs, **options))
    equal(forward(inputs, **options), found[:4])


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(128, 256), (256, 512)])
def test_wide_heads_in_one_walk_with_resets_and_padding(keys, values):
    inputs = case(200, keys, values, 8, 16, BF16)
    marks = {"reset": flags(8, 200, density=0.1, seed=1), "mask": flags(8, 200, density=0.7, seed=2)}
    equal(check(inputs, BF16, **marks), run(inputs, **marks))


# Few sequences and heads, so long that they are cut into segments; and so short that these get fewer, or none.
LONG = [
    ({"batch": 1, "heads": 16, "steps": 8192}, {}),
    ({"batch": 2, "heads": 16, "steps": 4096, "state": False}, {}),
    ({"batch": 2, "heads": 16, "steps": 4100, "bias": -10.0}, {}),
    ({"batch": 4, "heads": 16, "steps": 2049}, {}),
    ({"batch": 3, "heads": 16, "steps": 2500}, {"normalize": False, "scale": 1.0}),
    ({"batch": 1, "heads": 7, "steps": 9000, "state": False}, {"eps": 0.1, "scale": 0.3}),
    ({"batch": 2, "heads": 16, "steps": 2047}, {}),
    ({"batch": 2, "heads": 16, "steps": 1023}, {}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(64, 128), (64, 96), (128, 256), (96, 192), (256, 512)])
@pytest.mark.parametrize(("sizes", "options"), LONG, ids=str)
def test_few_long_sequences(sizes, options, keys, values):
    inputs = case(**{"keys": keys, "values": values, "dtype": BF16, **sizes})
    found = check(inputs, BF16, **options)
    equal(found, run(inputs, **options))
    equal(forward(inputs, **options), found[:4])


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(64, 128), (128, 256), (256, 512)])
def test_few_long_sequences_with_resets_and_padding(keys, values):
    inputs = case(4200, keys, values, 2, 16, BF16)
    reset = flags(2, 4200, density=0.002, seed=1)
    # Where segments end, of four and of eight, and a token to either side.
    reset[0, [1087, 1088, 1089]] = reset[1, [576, 2176]] = True
    marks = {"reset": reset, "mask": flags(2, 4200, density=0.7, seed=2)}
    equal(check(inputs, BF16, **marks), run(inputs, **marks))


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(64, 128), (128, 256), (256, 512)])
def test_a_graph_replays_forward_backward_and_step(keys, values):
    inputs = case(300, keys, values, 4, 8, BF16)
    token = [x[:, :1].contiguous() for x in inputs[:5]]
    leaves = [x.requires_grad_() for x in inputs[:7]]

    def work():
        h, state = mlstm(*leaves[:5], memory(inputs, leaves), backend="triton")
        return [h, *state, *gradients_of_ones(h, state, leaves), *forward([*token, *(x.detach() for x in state)])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    with torch.no_grad():
        for x in (*leaves, *token):
            x.mul_(0.9)
    wanted = [x.clone() for x in work()]
    for x in found:
        x.detach().fill_(torch.nan)
    graph.replay()
    equal(found, wanted)


def gradients_of_ones(h, state, leaves):
    return torch.autograd.grad([h, *state[:2]], leaves, [torch.ones_like(x) for x in (h, *state[:2])])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_leaves_the_gates_alone(dtype):
    inputs = case(300, dtype=dtype, **SIZES)
    wanted = run(inputs)
    with torch.autocast("cuda", torch.bfloat16):
        equal(run(inputs), wanted)
        equal(forward([x[:, :1] for x in inputs[:5]]), forward([x[:, :1].contiguous() for x in inputs[:5]]))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [32, 8], ids=["many rows", "few"])
def test_memory_for_the_backward_is_flat(heads):
    """Kept beside the inputs and h: two numbers a token and head, n of every chunk, and c in 16 bits where the plan keeps it.

    Where a forward in one pass keeps none, its backward in two passes works it out again; one walk back cannot.
    """
    wide = [torch.empty(SIZES["batch"], 1, heads, SIZES[x], dtype=BF16, device=DEVICE) for x in ("keys", "values")]
    most, kept = 64 + 64 * 128 * 2 / 64 * operator.keeps(choose(*wide, 0)), []
    for steps in (1024, 4096):
        sizes = SIZES | {"heads": heads}
        leaves = [x.requires_grad_() for x in case(steps, dtype=BF16, state=False, **sizes)]
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.setdefault(x.untyped_storage().data_ptr(), x) if x is not None else x,
            lambda x: x,
        ):
            h, _ = mlstm(*leaves, backend="triton")
        own = {x.untyped_storage().data_ptr() for x in (*leaves, h)}
        kept.append(sum(x.untyped_storage().nbytes() for at, x in sizes.items() if at not in own) / leaves[3].numel())
    assert kept[1] < 1.05 * kept[0] and kept[1] < most


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "steps", "heads", "keys", "values", "backward"),
    [(2, 131_200, 32, 64, 256, True), (2, 131_200, 32, 256, 256, False), (4400, 3, 16, 16, 16, True)],
    ids=["2^31 values", "2^31 keys", "70,400 rows"],
)
def test_large_tensors(batch, steps, heads, keys, values, backward):
    """Beyond 2^31 numbers, and beyond 65,535 programs: the last row is what it is alone."""
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = [(batch, steps, heads, *width) for width in ((keys,), (keys,), (values,), (), ())]
    inputs = [
        torch.randn(size, device="cuda", dtype=BF16 if len(size) > 3 else F32, generator=draw, requires_grad=backward)
        for size in sizes
    ]
    last = [x.detach()[-1:, :, -1:].clone().requires_grad_(backward) for x in inputs]
    results = []
    for q, k, v, i, f in (inputs, last):
        h, (c, n, m) = mlstm(q, k, v, i, logsigmoid(f + 3), backend="triton")
        grads = torch.autograd.grad(h, (q, k, v, i, f), torch.ones_like(h)) if backward else []
        results.append([x[-1:, :, -1:] for x in (h, *grads)] + [x[-1:, -1:] for x in (c, n, m)])
        del h, c, n, m, grads
    close(results[0], doubled(x.detach() for x in results[1]), 3e-2)
    torch.cuda.empty_cache()
