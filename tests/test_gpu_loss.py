"""The loss in slices on its kernel under its laws: here in Triton's interpreter, on a GPU with `pytest -m gpu`.

The interpreter has to be asked for before triton is imported, so these laws run in a process of their own; what is left to
this one is to compile the kernel for the GPU it was written for.
"""

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import exlstm
from exlstm.ops.loss import linear_cross_entropy
from gpu import (
    DEVICE,
    INTERPRETED,
    close,
    compile_kernel,
    cost,
    equal,
    here,
    hold_in_the_interpreter,
    law,
    normal,
    poisoned,
)

# The interpreter cuts a bfloat16 off where a GPU rounds it.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])
caps = pytest.mark.parametrize("cap", [0.0, 3.0, 30.0])


@here
def test_the_laws_hold_in_the_interpreter():
    hold_in_the_interpreter(__file__)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a short row is many tiles."""
    from exlstm.ops import loss_kernels

    monkeypatch.setattr(loss_kernels, "TILE", (32, 1))


def ids(rows, vocabulary, ignored=True):
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(7))
    if ignored:
        targets[1::4] = -100
    return targets.to(DEVICE)


def loss_case(vocabulary, dtype=torch.float32, batch=2, time=5, width=8):
    """x, weight and targets; logits of some nats."""
    x, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(batch, time, width), (vocabulary, width)]))
    return x.requires_grad_(), (weight * 2).requires_grad_(), ids(batch * time, vocabulary).view(batch, time)


def differentiated(x, weight, targets, **options):
    """Losses, dx and dW of a weighted sum of them."""
    losses = linear_cross_entropy(x, weight, targets, **options)
    factor = normal(*losses.shape, seed=5, dtype=losses.dtype)
    return [losses.detach(), *torch.autograd.grad(losses, [x, weight], factor)]


def plainly(x, weight, targets, **options):
    """`differentiated` in float64 without kernels."""
    with exlstm.backend("cpu"):
        return differentiated(*(t.detach().double().requires_grad_() for t in (x, weight)), targets, **options)


# Logits as a product left them


def rows(logits, targets, cap=0.0, ignore=-100, scale=None, padding=5):
    """Losses and, with a scale, gradients of logits that stand in padded rows; what pads them is no number."""
    from exlstm.ops import loss_kernels

    count, vocabulary = logits.shape
    z = logits.new_full((count, (vocabulary + padding) // 16 * 16 + 16), torch.nan)[:, :vocabulary].copy_(logits)
    losses = torch.full((count,), torch.nan, device=DEVICE)
    loss_kernels._row_by_row(z, targets, scale, losses, cap, ignore)
    return losses, z


def true_rows(logits, targets, cap, scale):
    logits = logits.double().requires_grad_()
    z = cap * torch.tanh(logits / cap) if cap else logits
    losses = F.cross_entropy(z, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, logits, scale.double())


@law
@caps
@dtypes
@pytest.mark.parametrize("spread", [1e-3, 4.0, 60.0])
def test_rows_equal_the_plain_ones(cap, dtype, spread, small_tiles):
    for vocabulary in (1, 70):
        logits = (normal(4, vocabulary, seed=1) * spread).to(dtype)
        targets, scale = ids(4, vocabulary), normal(4, seed=2)
        wanted = true_rows(logits, targets, cap, scale)
        losses, found = rows(logits, targets, cap, scale=scale)
        assert found.dtype == dtype and not losses[targets < 0].any() and not found[targets < 0].any()
        # What stands beside losses of many nats is measured by them.
        assert (losses - wanted[0]).abs().max() <= 2e-6 * max(1.0, spread)
        if vocabulary > 1:
            close([found], wanted[1:], max(LIMITS[dtype], 2e-6 * (cap or spread)) if spread > 4 else LIMITS[dtype])
        alone, kept = rows(logits, targets, cap)
        equal([alone, kept], [losses, logits])


@law
@pytest.mark.parametrize("vocabulary", [300, pytest.param(2**18 - 1, marks=pytest.mark.gpu)])
def test_long_rows_equal_the_plain_ones(vocabulary):
    logits, targets, scale = normal(3, vocabulary, seed=1) * 5, ids(3, vocabulary), normal(3, seed=2)
    losses, found = rows(logits, targets, 30.0, scale=scale)
    close([losses, found], true_rows(logits, targets, 30.0, scale), 2e-6)
    equal(rows(logits, targets, 30.0, scale=scale), [losses, found])


@law
@caps
@dtypes
def test_what_is_no_number_stays_seen(cap, dtype, small_tiles):
    logits, targets, scale = normal(7, 40, seed=1).to(dtype), ids(7, 40, ignored=False), torch.ones(7, device=DEVICE)
    sound = rows(logits, targets, cap, scale=scale)
    broken = logits.clone()
    broken[1, 33], broken[2, targets[2]], broken[5] = torch.nan, torch.nan, torch.nan
    broken[3, 17], broken[4, 2], targets[5] = torch.inf, -torch.inf, -100
    targets[6] = 40
    losses, found = rows(broken, targets, cap, scale=scale)
    equal([losses[0], found[0]], [x[0] for x in sound])
    for row in (1, 2, 6):
        assert losses[row].isnan() and found[row].isnan().all()
    assert losses[5] == 0 and not found[5].any()
    for row in (3, 4):
        wanted = true_rows(broken[row, None], targets[row, None], cap, scale[:1])
        torch.testing.assert_close(losses[row, None].double(), wanted[0], rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found[row, None].double(), wanted[1], rtol=8e-3, atol=1e-5, equal_nan=True)


@law
def test_the_whole_row_may_be_shut(small_tiles):
    logits, targets = torch.full((2, 20), -torch.inf, device=DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE)
    logits[1, 0] = 3.0
    losses, found = rows(logits, targets, scale=torch.ones(2, device=DEVICE))
    assert losses[0].isnan() and found[0].isnan().all()
    # The logarithm of a sum of 1 is right to a rounding.
    assert abs(losses[1]) < 2e-7 and found[1].abs().max() < 2e-7


# The whole


@law
@reductions
@caps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loss_equals_the_plain_one(cap, reduction, dtype, small_tiles):
    case = loss_case(37, dtype)
    wanted = plainly(*case, cap=cap, reduction=reduction)
    for size in (None, 7):
        with poisoned():
            found = differentiated(*case, cap=cap, reduction=reduction, slice=size)
        assert [y.dtype for y in found] == [torch.float32, dtype, dtype]
        close(found, wanted, {torch.float32: 2e-6, torch.float16: 3e-3}[dtype])
    equal(differentiated(*case, cap=cap, reduction=reduction, slice=7), found)


@law
@reductions
def test_loss_is_as_good_as_the_plain_path_under_autocast(reduction, small_tiles):
    """Against float64, in the dtypes a model is trained with; the interpreter's products are the same as the CPU's."""
    case, dtype = loss_case(90, time=16, width=32), torch.float16 if INTERPRETED else torch.bfloat16
    options = {"cap": 30.0, "reduction": reduction}
    truth = plainly(*case, **options)
    with torch.autocast(DEVICE, dtype=dtype):
        found = differentiated(*case, slice=20, **options)
        with exlstm.backend("cpu"):
            plain = differentiated(*case, slice=20, **options)
    assert [y.dtype for y in found] == [torch.float32] * 3
    for a, b, wanted in zip(found, plain, truth, strict=True):
        assert (a - wanted).norm() <= 1.1 * (b - wanted).norm() + 2e-4 * wanted.norm()


@law
def test_loss_takes_what_comes(small_tiles):
    x, weight, targets = loss_case(37)
    wanted = plainly(x, weight, targets)
    with torch.no_grad():
        close([linear_cross_entropy(x, weight, targets.int())], wanted[:1], 2e-6)
    moved = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    close(differentiated(moved, turned, targets, slice=4), wanted, 2e-6)
    nothing = differentiated(x, weight, torch.full_like(targets, -100))
    assert not any(y.any() for y in nothing)
    mixed = differentiated(x.detach().half().requires_grad_(), weight, targets, slice=4)
    assert [y.dtype for y in mixed] == [torch.float32, torch.float16, torch.float32]
    close(mixed, plainly(x.detach().half(), weight, targets), 1e-3)


@law
@reductions
def test_loss_compiles_whole_and_is_differentiated_once(reduction, small_tiles):
    case = loss_case(37)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=False)
    losses, other = (f(*case, cap=3.0, reduction=reduction) for f in (compiled, linear_cross_entropy))
    equal([losses], [other])
    wanted = torch.autograd.grad(other.sum(), case[:2], retain_graph=True)
    equal(torch.autograd.grad(losses.sum(), case[:2]), wanted)
    equal(torch.autograd.grad(other.sum(), case[:2], retain_graph=True), wanted)
    (dx,) = torch.autograd.grad(other.sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        dx.square().sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [50304, 50257])
def test_loss_of_a_large_vocabulary_in_little_memory(vocabulary):
    """Beside what it returns: the head in the products' dtype and the logits of one slice."""
    from exlstm.ops import loss_kernels

    x, weight, targets = loss_case(vocabulary, batch=2, time=4096 + 100, width=256)
    with torch.no_grad():
        weight.mul_(0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, cap=30.0)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = torch.autograd.grad(loss, [x, weight])
    assert peak <= 4 * (x.numel() + weight.numel()) + 2 * weight.numel() + loss_kernels.BYTES * 1.02 + 2**24
    with exlstm.backend("cpu"):
        plain = linear_cross_entropy(x, weight, targets, cap=30.0)
        wanted = torch.autograd.grad(plain, [x, weight])
    close([loss.detach(), *gradients], [plain.double().detach(), *(g.double() for g in wanted)], [1e-3, 1e-2, 1e-2])


# Compiled for an H200


LOSS_TYPES = {"targets": "*i64", "scale": "*fp32", "losses": "*fp32", "cap": "fp32", "root": "fp32"}


@here
@pytest.mark.parametrize(("cap", "gradient"), list(product((True, False), repeat=2)))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loss_compiles_without_spills(dtype, cap, gradient):
    from exlstm.ops import loss_kernels as kernels

    constants = {"BV": kernels.TILE[0], "CAP": cap, "GRADIENT": gradient}
    types = LOSS_TYPES | {"logits": f"*{dtype}"}
    compiled = compile_kernel(kernels.cross_entropy_kernel, types, constants, kernels.TILE[1])
    registers, spilled = cost(compiled)
    # Four programs a multiprocessor at least, so that enough of a row is on its way.
    assert 16 < registers <= 64 and spilled == 0
    # A thread writes where it read itself: no tile goes through shared memory, only the sums of the warps.
    assert compiled.metadata.shared <= 4 * kernels.TILE[1]
    assert re.search(r"ld\.global[^;]*\.v4", compiled.asm["ptx"])
    assert not gradient or re.search(r"st\.global[^;]*\.v4", compiled.asm["ptx"])
