"""Triton kernels beside the two large ones under their laws: here in Triton's interpreter, on a GPU with `pytest -m gpu`.

The interpreter has to be asked for before triton is imported, so these laws run in a process of their own; what is left to
this one is to compile every kernel for the GPU it was written for.
"""

import re
from itertools import product

import pytest
import torch
from torch.nn.functional import logsigmoid

import exlstm
from exlstm.ops.conv import causal_conv
from exlstm.ops.mlstm.reference import reference
from exlstm.ops.norm import head_norm
from gpu import (
    DEVICE,
    INTERPRETED,
    close,
    compile_kernel,
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

# The interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


# The decoding step


def step_case(keys, values, dtype=torch.float32, batch=2, heads=3, gate=1.0, reset=None):
    """Arguments of `step` up to reset: q, k, v and the gates are strided."""
    q, k = (normal(batch, 1, heads, 2 * keys, seed=i, dtype=dtype)[..., :keys] for i in (0, 1))
    v = normal(heads, batch, 1, values, seed=2, dtype=dtype).movedim(0, 2)
    log_i, log_f = (normal(batch, 1, 2 * heads, seed=3) * gate).chunk(2, -1)
    sizes = ((keys, values), (keys,), ())
    memory = [normal(batch, heads, *size, seed=4 + i) for i, size in enumerate(sizes)]
    return [q, k, v, log_i, logsigmoid(log_f + 3), *memory, reset]


def in_place(case, *settings, **options):
    """[h, c, n, m] of `step_` on copies of the memory, its output poisoned before."""
    from exlstm.ops.mlstm.step import step_

    *inputs, c, n, m, reset = case
    memory, h = [x.clone() for x in (c, n, m)], torch.full(case[2].shape, torch.nan, dtype=case[2].dtype, device=DEVICE)
    assert step_(*inputs, *memory, *settings, h, reset=reset, **options) is h
    return [h, *memory]


SIZES = [(24, 40, dtype) for dtype in LIMITS] + [(16, 16, torch.bfloat16), (192, 96, torch.float32)]
SIZES += [pytest.param(*size, marks=pytest.mark.gpu) for size in product((96, 512), (192, 512), LIMITS)]


@law
@pytest.mark.parametrize(("keys", "values", "dtype"), SIZES, ids=str)
def test_step_equals_the_reference(keys, values, dtype):
    from exlstm.ops.mlstm.step import step

    reset, heads = torch.tensor([[True], [False]], device=DEVICE), 3 if keys < 64 else 1
    for normalize, eps, given in ((True, 0.0, None), (True, 0.1, reset), (False, 0.0, reset)):
        case, settings = step_case(keys, values, dtype, heads=heads, reset=given), (0.3, normalize, eps)
        found, wanted = step(*case, *settings), reference(*doubled(case), *settings)
        assert found[0].dtype == dtype and all(x.dtype == torch.float32 for x in found[1:])
        close(found[:1], wanted[:1], LIMITS[dtype])
        close(found[1:], wanted[1:], 2e-6)
        equal(in_place(case, *settings), found)


@law
def test_step_beside_the_old_normaliser():
    case = step_case(64, 128)
    _, c, n, m = in_place(case, 0.3, True, 0.0)
    beside = [torch.full_like(x, torch.nan) for x in (n, m)]
    found = in_place(case, 0.3, True, 0.0, out=beside)
    equal([found[1], *beside, *found[2:]], [c, n, m, *case[6:8]])


@law
def test_step_does_not_write_to_its_arguments():
    from exlstm.ops.mlstm.step import step

    case = step_case(24, 40)
    before = [x.clone() for x in case[:-1]]
    equal(step(*case, 0.3, True, 0.0), step(*case, 0.3, True, 0.0))
    equal(before, case[:-1])
    with pytest.raises(ValueError, match=r"c has strides .* wanted a contiguous tensor to write to"):
        in_place([*case[:5], case[5].mT.contiguous().mT, *case[6:]], 0.3, True, 0.0)


@law
@pytest.mark.parametrize("fresh", [True, False])
def test_step_stays_finite_at_extreme_gates(fresh):
    from exlstm.ops.mlstm.step import step

    *inputs, c, n, m, _ = step_case(16, 24, batch=1, heads=2)
    memory = [x * (not fresh) for x in (c, n, m)]
    for log_i, log_f, normalize in product((-1e4, 0.0, 1e4, -torch.inf), (-1e4, 0.0), (True, False)):
        gates = (torch.full_like(inputs[3], value) for value in (log_i, log_f))
        case = [*inputs[:3], *gates, *memory]
        for _ in range(2):
            found = step(*case, None, 0.3, normalize, 0.0)
            wanted = reference(*case, None, 0.3, normalize, 0.0)
            close(found, doubled(wanted), 1e-4)
            case[5:] = found[1:]


@law
def test_steps_equal_the_reference_for_long_and_pass_padding():
    from exlstm.ops.mlstm.step import step

    case, found, wanted = step_case(16, 24, batch=1), [], []
    memory, truth = case[5:8], doubled(case[5:8])
    for t in range(24):
        inputs = [normal(1, 1, 3, 16, seed=9 + t), *(x + t * 1e-3 for x in case[1:5])]
        if t % 4 == 3:
            inputs[3], inputs[4] = torch.full_like(inputs[3], -torch.inf), torch.zeros_like(inputs[4])
            h, *after = step(*inputs, *memory, None, 0.25, True, 0.0)
            close(after, doubled(memory), 1e-7)
        h, *memory = step(*inputs, *memory, None, 0.25, True, 0.0)
        y, *truth = reference(*doubled(inputs), *truth, None, 0.25, True, 0.0)
        found.append(h), wanted.append(y)
    close([torch.cat(found), *memory], [torch.cat(wanted), *truth], 5e-6)


@law
def test_a_row_does_not_see_its_batch():
    from exlstm.ops.mlstm.step import step

    case = step_case(24, 40, batch=3)
    alone = step(*(x[1:2] for x in case[:-1]), None, 0.3, True, 0.0)
    equal([x[1:2] for x in step(*case, 0.3, True, 0.0)], alone)


@law
def test_step_compiles_whole():
    from exlstm.ops.mlstm.step import step

    case = step_case(16, 24)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        equal(compiled(*case, 0.3, True, 0.0), step(*case, 0.3, True, 0.0))


# The norm behind a memory, with its gate


def norm_case(name, shape, dtype=torch.float32):
    """(arguments and options of `head_norm`, the leaves): h and the gate are strided."""
    batch, time, heads, values = shape
    width = heads * values
    h = normal(batch, heads, time, values, seed=0, dtype=dtype).requires_grad_()
    wide = normal(batch, time, 2 * width, seed=1, dtype=dtype).requires_grad_()
    weight, skip = (normal(width, seed=i).requires_grad_() for i in (2, 3))
    c = normal(batch, time, width, seed=4, dtype=dtype).requires_grad_()
    leaves = {"bare": [h, weight], "sigmoid": [h, weight, wide], "skip": [h, weight, wide, skip, c]}[name]
    return leaves, {"eps": 1e-5, "activation": "silu" if name == "skip" else "sigmoid"}


def gated(leaves, options):
    """y and the gradients of a weighted sum of it."""
    (
        h,
        weight,
        *gate,
    ) = leaves[:3]
    gate = gate[0].chunk(2, -1)[1] if gate else None
    y = head_norm(h.transpose(1, 2), weight, gate, **options, skip=tuple(leaves[3:]) or None)
    factor = normal(*y.shape, seed=9, dtype=torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, factor)]


def plainly(call, leaves, options):
    """`call` in float64 without kernels."""
    with exlstm.backend("cpu"):
        return call([x.detach().double().requires_grad_() for x in leaves], options)


@law
@pytest.mark.parametrize("name", ["bare", "sigmoid", "skip"])
@pytest.mark.parametrize("shape", [(2, 15, 3, 16), (1, 65, 1, 96), (2, 2, 1, 192), (3, 1, 2, 40)], ids=str)
def test_norm_equals_the_plain_one(name, shape):
    for dtype, limit in LIMITS.items():
        leaves, options = norm_case(name, shape, dtype)
        with poisoned():
            found = gated(leaves, options)
        wanted = plainly(gated, leaves, options)
        assert [x.dtype for x in found] == [dtype, *(x.dtype for x in leaves)]
        close(found, wanted, limit)
    equal(gated(leaves, options), found)


@law
def test_norm_stays_finite_and_takes_what_comes():
    leaves, options = norm_case("skip", (2, 3, 2, 16))
    with torch.no_grad():
        leaves[2].mul_(1e4)
        leaves[0][0] = 0.0
    close(gated(leaves, options), plainly(gated, leaves, options), 1e-5)
    h, weight, gate = leaves[0].detach().transpose(-1, -2), normal(6, seed=0), normal(2, 2, 16, 6, seed=1)
    with torch.no_grad():
        found = head_norm(h.reshape(2, 2, 16, 3, 1).expand(-1, -1, -1, -1, 2), weight, gate, eps=0.1)
    assert found.shape == (2, 2, 16, 6) and not found.any()
    y = gated_sum(leaves, options)
    (dh,) = torch.autograd.grad(y, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="head_norm has no second derivative on a GPU"):
        dh.square().sum().backward()


def gated_sum(leaves, options):
    h, weight, gate, *skip = leaves
    return head_norm(h.transpose(1, 2), weight, gate.chunk(2, -1)[1], **options, skip=tuple(skip)).square().sum()


@law
def test_norm_compiles_whole():
    leaves, options = norm_case("skip", (2, 3, 2, 16))
    torch._dynamo.reset()
    compiled = torch.compile(gated_sum, fullgraph=True, backend="aot_eager", dynamic=False)
    wanted = torch.autograd.grad(gated_sum(leaves, options), leaves)
    equal(torch.autograd.grad(compiled(leaves, options), leaves), wanted)


# The causal convolution and its activation


def conv_case(columns, time, kind, dtype=torch.float32, batch=2, width=20):
    """(leaves, options) of `causal_conv` on a strided x: with a state, resets or padding as `kind` names."""
    x = normal(batch, time, 2 * width, seed=0, dtype=dtype)
    leaves = [x, normal(width, columns, seed=1), normal(width, seed=2)]
    leaves += [normal(batch, columns - 1, width, seed=3, dtype=dtype)] if "state" in kind else []
    options = {"activation": "silu" if "silu" in kind else None}
    options |= {"reset": flags(batch, time, density=0.3, seed=4)} if "reset" in kind else {}
    options |= {"mask": flags(batch, time, density=0.6, seed=5)} if "mask" in kind else {}
    return [x.requires_grad_() for x in leaves], options


def convolved(leaves, options):
    """y, the next state, and the gradients of a weighted sum of both."""
    x, *others = leaves
    y, state = causal_conv(x.chunk(2, -1)[1], *others, **options)
    factors = [normal(*z.shape, seed=i, dtype=torch.bfloat16).to(z.dtype) for i, z in enumerate((y, state))]
    return [y.detach(), state.detach(), *torch.autograd.grad((y, state), leaves, factors)]


@pytest.fixture
def small_tiles(monkeypatch):
    """So that few tokens and channels are many tiles and segments."""
    from exlstm.ops import conv_kernels

    monkeypatch.setattr(conv_kernels, "FORWARD", (8, 16, 4))
    monkeypatch.setattr(conv_kernels, "BACKWARD", (8, 2, 16, 4))


KINDS = ["silu", "state reset", "silu mask", "silu state reset mask"]


@law
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "time"), [(4, 1), (4, 15), (2, 9), (3, 2)])
def test_conv_equals_the_plain_one(columns, time, kind, small_tiles):
    leaves, options = conv_case(columns, time, kind)
    with poisoned():
        found = convolved(leaves, options)
    close(found, plainly(convolved, leaves, options), 2e-6)


@law
@pytest.mark.parametrize("time", [65, pytest.param(1000, marks=pytest.mark.gpu)])
@dtypes
def test_conv_equals_the_plain_one_for_long(time, dtype):
    leaves, options = conv_case(4, time, "silu state reset", dtype, batch=1)
    with poisoned():
        found = convolved(leaves, options)
    assert [x.dtype for x in found] == [dtype, dtype, *(x.dtype for x in leaves)]
    close(found, plainly(convolved, leaves, options), LIMITS[dtype])
    if dtype == torch.float32:
        equal(convolved(leaves, options), found)


@law
def test_conv_never_touches_padding_and_what_is_forgotten(small_tiles):
    leaves, options = conv_case(4, 12, "silu state reset mask")
    with torch.no_grad():
        options["reset"][:, 5] = options["mask"][:, 5] = True
        leaves[0].masked_fill_(~options["mask"][..., None], torch.nan)
        leaves[0][:, :5] = leaves[3][:] = torch.nan
    found, _ = causal_conv(leaves[0].chunk(2, -1)[1], *leaves[1:], **options)
    (dx,) = torch.autograd.grad(found[:, 5:].sum(), leaves[0])
    assert found[:, 5:].isfinite().all() and dx[:, 5:].isfinite().all() and not dx[:, :5].nan_to_num().any()


@law
def test_conv_compiles_whole_and_is_differentiated_once(small_tiles):
    leaves, options = conv_case(4, 5, "silu state reset", width=16)

    def loss(leaves, options):
        return causal_conv(*leaves, **options)[0].square().sum()

    leaves[0] = leaves[0].detach().chunk(2, -1)[1].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    wanted = torch.autograd.grad(loss(leaves, options), leaves, create_graph=True)
    equal(torch.autograd.grad(compiled(leaves, options), leaves), wanted)
    with pytest.raises(RuntimeError, match="causal_conv has no second derivative on a GPU"):
        wanted[0].square().sum().backward()


# Rotary positions


def rotary_case(half, dtype, rows=2, time=5, heads=3):
    from exlstm.ops.rotary import turns

    x = normal(rows, time, 2, heads, 2 * half, seed=0, dtype=dtype)[:, :, 1].requires_grad_()
    positions = torch.arange(time, device=DEVICE) + 1000 * torch.arange(rows, device=DEVICE)[:, None]
    return x, turns(positions, 2 * half, 10000.0)


@law
@dtypes
@pytest.mark.parametrize("half", [1, 24, 64])
def test_rotary_equals_the_formula_each_way(half, dtype):
    from exlstm.ops.rotary import rotate

    for rows in (1, 2):
        x, turn = rotary_case(half, dtype)
        turn = [z[:rows] for z in turn]
        exact, wide = x.detach().double().requires_grad_(), doubled(turn)
        with poisoned():
            found = rotate(x, turn)
            (dx,) = torch.autograd.grad((found * x.detach()).sum(), x)
        wanted = rotate(exact, wide)
        assert found.dtype == dx.dtype == dtype and wanted.dtype == torch.float64
        close([found, dx], [wanted, *torch.autograd.grad((wanted * exact.detach()).sum(), exact)], LIMITS[dtype])
        with torch.no_grad():
            equal([rotate(x, turn)], [found])


@law
def test_rotary_compiles_whole_and_is_differentiated_twice():
    from exlstm.ops.rotary import rotate

    x, turn = rotary_case(8, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager", dynamic=False)
    equal([compiled(x, turn)], [rotate(x, turn)])
    weight = normal(*x.shape, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad((rotate(x, turn) * weight).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(dx.square().sum(), weight)
    # What is turned forth and back is as it was.
    close([twice], [2 * weight.double()], 2e-6)


# Compiled for an H200


STEP_TYPES = {
    **dict.fromkeys(("log_i", "log_f", "c", "n", "m", "c_out", "n_out", "m_out"), "*fp32"),
    **dict.fromkeys("qkvh", "*bf16"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
    "reset": "*u8",
}


@here
@pytest.mark.parametrize(("keys", "values"), [(16, 16), (96, 192), (256, 512), (512, 512)])
def test_step_compiles_without_spills(keys, values):
    from exlstm.ops.mlstm import step

    cut, height = step.tiles(keys, values), 1 << (keys - 1).bit_length()
    shared = {"K": keys, "BK": height, "HAS_RESET": True, "OVERLAP": True}
    own = {"V": values, "BV": cut.columns, "NORMALIZE": True, "WRITE_N": True, "EVICT": cut.evict}
    for kernel, constants, warps in (
        (step.mlstm_step_forward_kernel, shared | own, cut.warps),
        (step.mlstm_step_normaliser_kernel, shared, 1),
    ):
        compiled = compile_kernel(kernel, STEP_TYPES, constants, warps)
        registers, spilled = cost(compiled)
        assert 16 < registers <= 128 and spilled == 0
        assert kernel is not step.mlstm_step_forward_kernel or re.search(r"ld\.global[^;]*\.v4", compiled.asm["ptx"])


NORM_TYPES = {
    **dict.fromkeys(("h", "gate", "c", "y", "dy", "dh", "dgate", "dc"), "*bf16"),
    **dict.fromkeys(("weight", "skip", "dweight", "dskip"), "*fp32"),
    "eps": "fp32",
}


@here
@pytest.mark.parametrize(("values", "full"), [(512, True), (512, False), (96, False)])
def test_norm_compiles_without_spills(values, full):
    from exlstm.ops import norm_kernels as kernels

    what = {"HAS_GATE": True, "HAS_SKIP": full, "SILU": full}
    for kernel, tile in (
        (kernels.head_norm_forward_kernel, kernels.FORWARD),
        (kernels.head_norm_backward_kernel, kernels.BACKWARD),
    ):
        cut = kernels._cut(values, tile)
        warps = cut.pop("num_warps")
        registers, spilled = cost(compile_kernel(kernel, NORM_TYPES, cut | what, warps))
        assert 16 < registers <= 128 and spilled == 0


@here
@pytest.mark.parametrize("half", [32, 64, 80])
def test_rotary_compiles_without_spills(half):
    from exlstm.ops import rotary_kernels as kernels

    wide = 1 << (half - 1).bit_length()
    cut = {"D": half, "BR": kernels.TILE // wide, "BD": wide, "BACK": True}
    types = dict.fromkeys("xy", "*bf16") | dict.fromkeys(("cos", "sin"), "*fp32")
    registers, spilled = cost(compile_kernel(kernels.rotary_kernel, types, cut, kernels.WARPS))
    assert 16 < registers <= 64 and spilled == 0


CONV_TYPES = {
    **dict.fromkeys(("x", "state", "y", "dy", "dx", "dstate"), "*bf16"),
    **dict.fromkeys(("weight", "bias", "sums"), "*fp32"),
    "first": "*u8",
}


@here
@pytest.mark.parametrize(("columns", "full", "limit"), [(4, False, 128), (4, True, 168), (2, False, 128)])
def test_conv_compiles_without_spills(columns, full, limit):
    from exlstm.ops import conv_kernels as kernels

    what = {"W": columns, "HAS_BIAS": True, "HAS_STATE": full, "HAS_FIRST": full, "SILU": True}
    (tokens, channels, warps), (_, segments, wide, walkers) = kernels.FORWARD, kernels.BACKWARD
    for kernel, cut, count in (
        (kernels.causal_conv_forward_kernel, {"BT": tokens, "BD": channels}, warps),
        (kernels.causal_conv_backward_kernel, {"BS": segments, "BD": wide}, walkers),
    ):
        registers, spilled = cost(compile_kernel(kernel, CONV_TYPES, cut | what, count))
        assert 16 < registers <= limit and spilled == 0
