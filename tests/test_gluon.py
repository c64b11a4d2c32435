"""The kernels in Gluon on the CPU: the laws of mlstm in the emulator (gluon_emulator.py), and faults that it must report.

Every kernel runs with one row or two and few chunks, once with copies that land as late as they can, once with early ones.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import exlstm.ops.mlstm.hopper as hopper
import exlstm.ops.mlstm.plan as planning
import exlstm.ops.mlstm.triton as operator
from exlstm.ops.mlstm.gates import _add_since
from exlstm.ops.mlstm.plan import Chain, Chunks, Columns, Fused, Walk
from gluon_emulator import Fault, emulated
from gpu import INTERPRETED, equal, flags, hold_in_the_interpreter, normal, numpy
from test_gpu_mlstm import case, check, forward, holds, run, truth

BF16 = torch.bfloat16


# The laws


@pytest.mark.skipif(INTERPRETED, reason="wants a process of its own")
def test_the_laws_hold_in_the_emulator():
    hold_in_the_interpreter(__file__)


# The other kernels of a forward and a backward run in Triton's interpreter.
def law(test):
    test = pytest.mark.skipif(not INTERPRETED, reason="runs in test_the_laws_hold_in_the_emulator")(test)
    return functools.reduce(lambda test, text: pytest.mark.filterwarnings(text)(test), numpy, test)


# Keys, values, rows for which the plan is made, and what it must be.
KERNELS = {
    "walk, chunks": (128, 256, 128, Walk, Chunks),
    "walk in halves, chunks": (128, 256, 64, Walk, Chunks),
    "narrow walk, chunks": (128, 128, 128, Walk, Chunks),
    "walk in parts": (96, 192, 128, Walk, None),
    "columns, chunks": (256, 512, 128, Columns, Chunks),
    "few columns, chunks": (256, 128, 128, Columns, Chunks),
    "short columns, chunks": (128, 384, 128, Columns, Chunks),
    "chain": (64, 128, 128, None, Chain),
    "narrow chain": (64, 96, 128, None, Chain),
    "one by one": (64, 128, 1, None, Fused),
    "narrow one by one": (64, 64, 1, None, Fused),
}


@pytest.fixture
def sizes(request, monkeypatch):
    """Keys and values of a kernel, which from here runs for them as it would for many rows on a card."""
    keys, values, rows, there, back = KERNELS[request.param]
    wide = [torch.empty(rows, 1, 1, width, dtype=BF16, device="meta") for width in (keys, values)]
    monkeypatch.setattr(planning, "gluon", lambda device: True)
    plan = planning.choose(*wide, 0)
    assert all(kind is None or isinstance(part, kind) for part, kind in zip(plan, (there, back)))
    monkeypatch.setattr(operator, "choose", lambda q, v, chunk: plan)
    # Memories that the interpreter has in float32 are in bfloat16 on a card.
    matrices = hopper.matrices
    monkeypatch.setattr(hopper, "matrices", lambda x, rows, width: matrices(x.to(BF16), rows, width))
    return {"keys": keys, "values": values, "dtype": BF16}, back is not None


# Every way there and back, at widths that fill the tiles.
WHOLE = ("walk, chunks", "walk in halves, chunks", "narrow walk, chunks", "short columns, chunks", "columns, chunks")
WHOLE += ("chain", "one by one")


def kernels(*names):
    return pytest.mark.parametrize("sizes", names or KERNELS, indirect=True)


def right(sizes, steps, seed, options=None, **more):
    sizes, backward = sizes
    inputs, options = case(steps, **sizes, **more), options or {}
    with emulated(seed):
        if backward:
            return check(inputs, BF16, **options)
        found = forward(inputs, **options)
    return holds(found, truth(inputs, **options)[:4], BF16)


@law
@pytest.mark.parametrize(("steps", "seed"), [(2, 0), (128, 1), (180, 2), (300, 3)])
@kernels(*WHOLE)
def test_kernels_equal_the_reference(sizes, steps, seed):
    """One chunk, two, three and five."""
    right(sizes, steps, seed)


@law
@kernels("walk in parts", "few columns, chunks", "narrow chain", "narrow one by one")
def test_kernels_at_widths_inside_their_tiles(sizes):
    right(sizes, 130, 5, batch=1, heads=2)


@law
@pytest.mark.parametrize("seed", [0, 1])
@kernels(*WHOLE)
def test_kernels_with_resets_and_padding(sizes, seed):
    marks = {"reset": flags(2, 150, density=0.1, seed=1), "mask": flags(2, 150, density=0.7, seed=2)}
    right(sizes, 150, seed, marks, batch=2, state=seed == 0)


@law
@kernels(*WHOLE)
def test_kernels_without_normaliser(sizes):
    right(sizes, 130, 1, {"normalize": False, "scale": 1.0}, state=False)


@law
@kernels("walk, chunks", "short columns, chunks", "columns, chunks", "chain", "one by one")
def test_the_order_of_groups_changes_no_bit(sizes):
    inputs, found = case(200, **sizes[0]), []
    for seed in range(3):
        with emulated(seed):
            found.append(run(inputs))
    equal(found[0], found[1])
    equal(found[0], found[2])


# Segments forward and backward, as few rows of long sequences get them; a backward in two passes has none.
SEGMENTS = {"walk, chunks": (2, 2), "walk in parts": (2, 1), "columns, chunks": (2, 2), "narrow chain": (4, 4)}


def cut(name, monkeypatch):
    """The plan of a kernel in segments, from here on; and how long these are in a sequence that ends in the last but one."""
    (there, back), (S, R) = operator.choose(None, None, 0), SEGMENTS[name]
    there = there._replace(S=S, **({"BV": 128} if isinstance(there, Walk) else {}))
    plan = planning.Plan(there, back._replace(S=R) if R > 1 else back)
    monkeypatch.setattr(operator, "choose", lambda q, v, chunk: plan)
    return plan, planning.padded_length(plan, 1, True) // S


@law
@pytest.mark.parametrize("options", [{}, {"normalize": False, "scale": 1.0}], ids=str)
@pytest.mark.parametrize(("sizes", "name"), [(name, name) for name in SEGMENTS], indirect=["sizes"])
def test_segments_equal_the_reference(sizes, name, options, monkeypatch):
    """With resets where segments begin and a token to either side, and a row of padding alone; kept or not, the same bits."""
    (there, _), tokens = cut(name, monkeypatch)
    # Two chunks a segment, the last one short; or one token more than fills all of them, so that most of the last is empty.
    S, steps = there.S, 2 * there.S * tokens - 40 if not options else there.S * tokens + 1
    length = -(-steps // (S * tokens)) * tokens
    reset, mask = torch.zeros(2, steps, dtype=torch.bool), flags(2, steps, density=0.7, seed=2)
    reset[0, [0, length - 1, steps - 1]] = reset[1, [length - 2, min(length, steps - 1)]] = True
    mask[0] = not options
    inputs, marks = case(steps, **sizes[0], batch=2, state=not options), {"reset": reset, "mask": mask, **options}
    with emulated(1):
        equal(check(inputs, BF16, **marks)[:4], forward(inputs, **marks))


@law
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("segments", [False, True])
@kernels("walk, chunks", "walk in parts", "columns, chunks", "narrow chain", "one by one")
def test_a_call_of_shapes_alone_gives_the_shapes_of_a_real_one(sizes, segments, save, request, monkeypatch):
    """And their strides; whatever comes out is in memory of its own, and no larger."""
    name = request.node.callspec.params["sizes"]
    if segments and name in SEGMENTS:
        cut(name, monkeypatch)
    inputs = case(100, **sizes[0])
    arguments = (*inputs, None, 1.0, True, 0.0, 0, save)
    with emulated():
        real = operator._mlstm_triton(*arguments)
    compare(real, inputs, torch.ops.exlstm.mlstm_triton, arguments)
    if save and sizes[1]:
        h, c, _, _, *kept = real
        arguments = (None, torch.ones_like(c), None, *inputs, None, h, *kept, 1.0, True, 0)
        with emulated():
            real = operator._mlstm_triton_backward(*arguments)
        compare(real, inputs, torch.ops.exlstm.mlstm_triton_backward, arguments)


def compare(real, inputs, call, arguments):
    with FakeTensorMode() as mode:
        fakes = call(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments))
    for a, b in zip(real, fakes, strict=True):
        # The interpreter keeps memories in float32 that a card has in bfloat16.
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype.is_floating_point, (a.shape, b.shape)
        assert a.untyped_storage().nbytes() == a.numel() * a.itemsize
    own = [x.untyped_storage().data_ptr() for x in (*real, *inputs) if x.numel()]
    assert len(set(own)) == len(own)


@triton.jit
def scan_kernel(p_x, p_fresh, p_y, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    o = 16 * tl.arange(0, 8)[:, None] + tl.arange(0, 16)[None, :]
    y, _ = tl.associative_scan((tl.load(p_x + o), tl.load(p_fresh + o)), AXIS, _add_since, reverse=REVERSE)
    tl.store(p_y + o, y)


@law
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_on_whole_rows_equals_tritons_own(axis, reverse, monkeypatch):
    """Sums of whole numbers, which are exact in any order."""
    import interpreter

    x, fresh, found = normal(8, 16, seed=0).mul(9).round(), flags(8, 16, density=0.2, seed=1).int(), []
    for scan in (interpreter.scan, interpreter.plain_scan):
        monkeypatch.setattr(interpreter.interpreter.ScanOps, "generic_scan", scan)
        found.append(torch.zeros(8, 16))
        scan_kernel[(1,)](x, fresh, found[-1], axis, reverse)
    assert torch.equal(*found) and not torch.equal(found[0], x.cumsum(axis))


# The emulator


@gluon.constexpr_function
def _sums():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.jit
def _bring(d_x, places, full, empty, N, FAULT: gl.constexpr):
    SIZE: gl.constexpr = d_x.block_type.nbytes
    for i in range(N):
        if FAULT != "overwrites":
            mbarrier.wait(empty.index(i % 2), (i // 2 & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), 2 * SIZE if FAULT == "expects too much" else SIZE)
        tma.async_copy_global_to_shared(d_x, [64 * i, 0], full.index(i % 2), places.index(i % 2))
        if FAULT == "brings too much":
            tma.async_copy_global_to_shared(d_x, [64 * i, 0], full.index(i % 2), places.index(i % 2))


@gluon.jit
def _multiply(d_y, s_w, places, s_y, full, empty, N, FAULT: gl.constexpr):
    s_w.store(gl.full([64, 64], 0.5, gl.bfloat16, _sums()))
    if FAULT != "does not fence":
        fence_async_shared()
    gl.thread_barrier()
    if FAULT == "fences late":
        s_w.store(gl.full([64, 64], 0.5, gl.bfloat16, _sums()))
        gl.thread_barrier()
        fence_async_shared()
    for i in range(N):
        if FAULT != "does not wait for a load":
            mbarrier.wait(full.index(i % 2), (i // 2 & 1) ^ (FAULT == "waits for the wrong phase"))
        b_y = warpgroup_mma(s_w, places.index(i % 2), gl.zeros([64, 64], gl.float32, _sums()), is_async=True)
        if FAULT == "gives a place back too early":
            gl.thread_barrier()
            mbarrier.arrive(empty.index(i % 2))
        if FAULT != "does not wait for a product":
            b_y = warpgroup_mma_wait(0, deps=[b_y])
        if FAULT != "does not meet":
            gl.thread_barrier()
        if FAULT != "gives nothing back" and FAULT != "gives a place back too early":
            mbarrier.arrive(empty.index(i % 2))
        if FAULT == "gives back twice":
            mbarrier.arrive(empty.index(i % 2))
        if FAULT != "does not wait for a store":
            tma.store_wait(0)
        s_y.store(b_y.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(d_y, [64 * i, 0], s_y)
    if FAULT != "ends too early":
        tma.store_wait(0)


@gluon.jit
def multiply_kernel(d_x, d_y, N, FAULT: gl.constexpr):
    """Y = ½ 1 X of every 64 rows of X."""
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    places = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], WIDE)
    s_w = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WIDE)
    s_y = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WIDE)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_multiply, (d_y, s_w, places, s_y, full, empty, N, FAULT)),
            (_bring, (d_x, places, full, empty, N, FAULT)),
        ],
        [1],
        [24],
    )


def multiply(seed, fault=""):
    """X and Y (300, 60), which end within a block."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    y, layout = torch.zeros(300, 64, dtype=BF16), gl.NVMMASharedLayout(128, 16, rank=2)
    with emulated(seed):
        multiply_kernel[(1,)](
            *(TensorDescriptor(a, [300, 60], [64, 1], [64, 64], layout) for a in (x, y)), 5, fault, num_warps=4
        )
    return x, y


@pytest.mark.parametrize("seed", range(6))
def test_a_right_kernel_gives_right_numbers(seed):
    x, y = multiply(seed)
    for rows in x.split(64):
        wanted, y_rows, y = 0.5 * rows.float().sum(0).expand(len(rows), 64), y[: len(rows)], y[64:]
        assert torch.allclose(y_rows[:, :60].float(), wanted[:, :60], rtol=8e-3, atol=1e-2)
        assert not y_rows[:, 60:].any()


# What is told, by any seed: a race of two, or who waits for what.
UNKNOWN, STUCK = "which is over, but no barrier says so|which is not over", "nobody can go on:"
FAULTS = {
    "does not wait for a load": f"product.* races with .*load.*({UNKNOWN})|{STUCK}",
    "waits for the wrong phase": f"product.* races with .*load.*({UNKNOWN})|{STUCK}.*_multiply waits for parity 0 of",
    "overwrites": "_bring arrives 1 times",
    "gives a place back too early": f"load.* races with .*product.*({UNKNOWN})",
    "does not meet": "load.* races with .*product.* no barrier says so",
    "does not fence": "product.* races with .*write.*was not fenced",
    "fences late": "product.* races with .*write.*was fenced, but no barrier after the fence",
    "does not wait for a product": "the product begun at .* that was not waited for|load.* races with .*product.*is not over",
    "does not wait for a store": "write.* races with .*store to memory.*is not over",
    "ends too early": "ends with 1 stores",
    "gives nothing back": f"{STUCK}.*_multiply waits for parity 1 of .*_bring waits for parity 0 of .*lacks 1 of 1 arrivals",
    "gives back twice": f"{STUCK}|_bring arrives 1 times|load.* races with .*load",
    "expects too much": f"{STUCK}.*_multiply waits for parity 0 of .*lacks 0 of 1 arrivals and 8192 bytes",
    "brings too much": "load.* races with .*load.*is not over",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, seed):
    with pytest.raises(Fault, match=f"(?s){FAULTS[fault]}"):
        multiply(seed, fault)


@gluon.constexpr_function
def _line(threads):
    return gl.BlockedLayout([1], [32], [threads], [0])


@gluon.jit
def numbers_kernel(p_x, N, FAULT: gl.constexpr):
    o = gl.arange(0, 64, _line(4))
    b_x = gl.load(p_x + o, mask=o < N, other=0.0)
    if FAULT == "layouts":
        b_x += gl.arange(0, 64, _line(2))
    if FAULT == "axis":
        b_x = b_x[:, None]
    if FAULT == "outside":
        gl.store(p_x + o, b_x)
    if FAULT == "shared":
        gl.allocate_shared_memory(gl.float32, [60000], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if FAULT == "empty":
        s_x = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        b_x = s_x.load(_line(4))
    gl.store(p_x + o, b_x + (-N) // 7 + (-N) % 7, mask=o < N)


def test_numbers_are_those_of_a_card():
    x = torch.arange(70.0)
    with emulated():
        numbers_kernel[(1,)](x[3:63], 60, "")
    assert torch.equal(x[3:63], torch.arange(3.0, 63.0) - 8 - 4) and torch.equal(x[:3], torch.arange(3.0))
    assert torch.equal(x[63:], torch.arange(63.0, 70.0))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("layouts", "numbers that stand as .* meet others that stand as"),
        ("axis", "a new axis 1 for"),
        ("outside", "number 60 of 60"),
        ("shared", "240000 bytes of shared memory"),
        ("empty", "where nobody has written anything"),
    ],
)
def test_wrong_numbers_are_reported(fault, told):
    with emulated(), pytest.raises(Fault, match=told):
        numbers_kernel[(1,)](torch.arange(70.0)[3:63], 60, fault)


def test_programs_that_write_the_same_numbers_are_reported():
    with emulated(), pytest.raises(Fault, match="group 0 reads global memory that was written by another program"):
        numbers_kernel[(2,)](torch.arange(70.0), 60, "")
