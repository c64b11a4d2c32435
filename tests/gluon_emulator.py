"""Runs our kernels in Gluon on the CPU, where Triton's interpreter knows none, and reports what a card would punish.

`with emulated(seed):` sends every launch of a kernel in Gluon here. Its Python functions run as they stand, in a world whose `gl`
works on torch tensors (gluon_numbers.py) and on a machine with groups, barriers and shared memory (gluon_machine.py).
Not modelled: registers and their number, speed, banks, how special functions round, clusters, races in global memory,
whatever the compiler checks by itself, and what it does wrong. Barriers that the compiler puts between what a group's own
threads do to a place count; before anything asynchronous, or where another group is told, a kernel must say
`gl.thread_barrier()` itself.
"""

import inspect
import math
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

import gluon_numbers as numbers
from gluon_machine import Barrier, Fault, Ledger, Load, Machine, Memory, where
from gluon_numbers import Int, Pointer, Tensor, fault, typed

__all__ = ["Fault", "emulated"]

# Shared memory


class Place:
    """A part of an allocation in shared memory, as somebody looks at it."""

    def __init__(self, memory, data, layout, box, axes):
        # The span of every axis of the allocation, and which of them the axes of `data` are.
        self.memory, self.data, self.layout, self.box, self.axes = memory, data, layout, box, axes

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i):
        part = self.slice(i, 1)
        return Place(self.memory, part.data[0], self.layout, part.box, self.axes[1:])

    def slice(self, start, length, dim=0):
        start, axis = int(start), self.axes[dim]
        if not 0 <= start <= start + length <= self.shape[dim]:
            fault(f"part {start} … {start + length} of {self.shape}")
        first = self.box[axis][0] + start
        box = (*self.box[:axis], (first, first + length), *self.box[axis + 1 :])
        return Place(self.memory, self.data.narrow(dim, start, length), self.layout, box, self.axes)

    def permute(self, order):
        axes = [self.axes[axis] for axis in order]
        return Place(self.memory, self.data.permute(order), self.layout, self.box, axes)

    def touch(self, kind, **how):
        return self.memory.touch(self.box, Machine.now.current, kind, **how)

    def load(self, layout):
        self.touch("read", over=True)
        return Tensor(self.data.clone(), layout)

    def store(self, value):
        if value.shape != self.shape or value.dtype != self.dtype:
            fault(f"{value.dtype} {value.shape} into a place {self.dtype} {self.shape}")
        Machine.now.current.unfenced.append(self.touch("write", write=True, over=True))
        self.data.copy_(value.data)


class Barriers(list):
    def index(self, i):
        return self[int(i)] if 0 <= i < len(self) else fault(f"barrier {i} of {len(self)}")


def allocate(dtype, shape, layout, value=None):
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return Barriers(Barrier(f"barrier {i} of [{where()}]") for i in range(shape[0]))
    memory = Memory(shape, typed(dtype))
    Machine.now.allocate(memory.data.nbytes)
    place = Place(memory, memory.data, layout, tuple((0, n) for n in shape), list(range(len(shape))))
    if value is not None:
        place.store(value)
    return place


# The copy engine, and copies by the threads


class Descriptor:
    """A tensor in global memory as the copy engine sees it, in blocks."""

    def __init__(self, made):
        base = made.base.detach()
        self.data, self.dtype, self.flat = base.as_strided(made.shape, made.strides), base.dtype, numbers.flat(base)
        self.block_shape, self.layout = list(made.block_shape), made.layout
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block_shape) * base.element_size())

    def parts(self, at, place):
        """The block at `at` as far as it lies inside the tensor, and that part of `place`."""
        shape = self.block_shape[len(self.block_shape) - len(place.shape) :]
        if (place.dtype, place.shape) != (self.dtype, shape) or math.prod(shape) != math.prod(self.block_shape):
            fault(f"a block {self.dtype} {self.block_shape} and a place {place.dtype} {place.shape}")
        if place.layout.swizzle_byte_width != self.layout.swizzle_byte_width or len(at) != self.data.ndim:
            fault(f"a block as {self.layout} at {at} and a place as {place.layout}")
        at = [int(x) for x in at]
        spans = [(max(a, 0), max(a, 0, min(a + n, size))) for a, n, size in zip(at, self.block_shape, self.data.shape)]
        there = tuple(slice(a, b) for a, b in spans)
        here = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, at))
        strides = (self.flat.numel(), *self.data.stride())
        marks = Machine.now.ledger.of(self.flat).as_strided((4, *self.data.shape), strides, self.data.storage_offset())
        return self.data[there], place.data.view(self.block_shape)[here], marks[(slice(None), *there)]


def copy_in(desc, at, barrier, place, pred=True):
    if not pred:
        return
    barrier.alive()
    there, here, marks = desc.parts(at, place)
    Machine.now.ledger.touch(marks, Machine.now.current, False, Ledger.NEVER)
    access = place.touch("load", write=True, asynchronous=True)
    place.data.fill_(math.nan)

    def copy():
        place.data.zero_()
        here.copy_(there)

    Machine.now.loads.append(Load(barrier, access, place.data.nbytes, copy))


def copy_out(desc, at, place):
    there, here, marks = desc.parts(at, place)
    Machine.now.ledger.touch(marks, Machine.now.current, True, Ledger.NEVER)
    group, access = Machine.now.current, place.touch("store to memory", asynchronous=True)

    def copy():
        there.copy_(here)
        access.epoch = group.epoch

    group.stores.append(copy)


def copy_by_threads(place, pointer, mask=True):
    offset, wanted = pointer.at(mask)
    if place.shape != list(offset.shape) or place.dtype != pointer.flat.dtype:
        fault(f"a copy of {pointer.flat.dtype} {list(offset.shape)} to a place {place.dtype} {place.shape}")
    group, access = Machine.now.current, place.touch("copy by threads", write=True)
    place.data.fill_(math.nan)

    def copy():
        place.data.copy_(pointer.flat[offset]).mul_(wanted)
        access.epoch = group.epoch
        group.unfenced.append(access)

    group.copies.append(copy)


def commit_group():
    group = Machine.now.current
    copies, group.copies = group.copies, []
    group.committed.append(lambda: [copy() for copy in copies])


def waits_for(name):
    def wait(pendings=0):
        Machine.now.current.retire(getattr(Machine.now.current, name), pendings)
        # The compiler lets the threads of a group meet behind such a wait.
        Machine.now.current.meet()

    return wait


# Products


class Product:
    """A product that was begun: its result counts once it was waited for."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.layout, self.shape, self.found = a, b, acc, acc.layout, acc.shape, None
        self.group, self.line = Machine.now.current, where()
        self.accesses = [x.touch("product", asynchronous=True) for x in (a, b) if isinstance(x, Place)]
        self.group.products.append(self.finish)

    def finish(self):
        acc = self.acc.found if isinstance(self.acc, Product) else self.acc.data
        self.found = acc + self.a.data.float() @ self.b.data.float()
        for access in self.accesses:
            access.epoch = self.group.epoch

    def __repr__(self):
        return f"the product begun at {self.line} that was not waited for"

    def __getattr__(self, name):
        return fault(f"{self} is used")


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False, **_):
    if not use_acc:
        acc = Tensor(torch.zeros(acc.shape), acc.layout)
    wanted = gl.DotOperandLayout(0, acc.layout, 2)
    if isinstance(a, Tensor) and a.layout != wanted:
        fault(f"a first operand that stands as {a.layout}, wanted {wanted}")
    fits = [a.shape[0], b.shape[1], b.shape[0]] == [*acc.shape, a.shape[1]]
    if not fits or a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or not isinstance(b, Place):
        fault(f"a product of {a.dtype} {a.shape} and {b.dtype} {b.shape} on {acc.shape}")
    product = Product(a, b, acc)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    Machine.now.current.retire(Machine.now.current.products, num_outstanding)
    found = [Tensor(x.found, x.layout) if isinstance(x, Product) and x.found is not None else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


# Barriers


def wait(barrier, phase, pred=True, deps=()):
    if pred:
        Machine.now.wait(barrier, int(phase))


def arrive(barrier, *, count=1, pred=True):
    if pred:
        barrier.arrive(Machine.now.current, count)
        Machine.now.pause()


def expect(barrier, bytes, pred=True):
    if pred:
        barrier.bytes += bytes
        barrier.arrive(Machine.now.current, 1)


def invalidate(barrier):
    barrier.count = None


# gl


def arange(start, end, layout):
    return Tensor(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape, value, dtype, layout=None):
    return Tensor(torch.full(list(shape), 0, dtype=typed(dtype)) + value, layout)


def moved(asm, constraints, args, dtype, is_pure, pack):
    if asm != "mov.b32 $0, $1;" or args[0].dtype.itemsize != 4:
        raise NotImplementedError(f"assembly {asm!r} of {args[0].dtype}")
    return args[0]


class Language:
    """`gl`: layouts and types as they are, and what is emulated."""

    def __init__(self):
        self.allocate_shared_memory, self.arange, self.full, self.where = allocate, arange, full, numbers.where_
        self.load, self.store, self.inline_asm_elementwise, self.static_range = (
            numbers.load,
            numbers.store,
            moved,
            range,
        )
        self.program_id, self.num_programs = (lambda axis, i=i: Machine.now.grid[axis][i] for i in range(2))
        self.zeros = lambda shape, dtype, layout=None: full(shape, 0, dtype, layout)
        self.zeros_like = lambda x: Tensor(torch.zeros_like(x.data), x.layout)
        self.convert_layout = lambda x, layout, assert_trivial=False: Tensor(*numbers.data(x), layout)
        self.thread_barrier = lambda: Machine.now.current.meet()
        self.warp_specialize = lambda partitions, warps, registers=None: Machine.now.specialize(partitions)
        self.minimum, self.maximum = (
            numbers.elementwise(*works) for works in ((torch.minimum, min), (torch.maximum, max))
        )
        for name in ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "floor"):
            setattr(self, name, numbers.elementwise(getattr(torch, name)))
        for name, work in {"sum": torch.sum, "max": torch.amax, "min": torch.amin}.items():
            setattr(self, name, numbers.reduction(work))

    def __getattr__(self, name):
        found = getattr(gl, name)
        if isinstance(found, JITFunction) or hasattr(found, "__triton_builtin__"):
            raise NotImplementedError(f"gl.{name} is not emulated")
        return found


STANDS_FOR = {
    gl: Language(),
    hopper.tma: SimpleNamespace(
        async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=waits_for("stores")
    ),
    hopper.mbarrier: SimpleNamespace(
        init=Barrier.init, wait=wait, arrive=arrive, expect=expect, invalidate=invalidate,
        MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    ),
    hopper.async_copy: SimpleNamespace(
        async_copy_global_to_shared=copy_by_threads, commit_group=commit_group, wait_group=waits_for("committed")
    ),
    hopper.fence_async_shared: lambda cluster=False: Machine.now.current.fence(),
    hopper.warpgroup_mma: warpgroup_mma,
    hopper.warpgroup_mma_wait: warpgroup_mma_wait,
}  # fmt: skip


# Launches


def emulated_function(kernel, known):
    """The Python function of a kernel, in a world where everything in Gluon is emulated."""
    if kernel not in known:
        world = {"__gluon__": True}
        known[kernel] = FunctionType(kernel.fn.__code__, world, kernel.fn.__name__, kernel.fn.__defaults__)
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, GluonJITFunction):
                value = emulated_function(value, known)
            elif getattr(value, "__hash__", None):
                value = STANDS_FOR.get(value, value)
            world[name] = value
        world["range"] = lambda *ends: map(Int, range(*ends))
    return known[kernel]


def argument(x, constant):
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if torch.is_tensor(x):
        return Pointer.of(x.detach())
    return Int(x, torch.int64 if abs(x) >> 31 else torch.int32) if type(x) is int and not constant else x


def launch(kernel, grid, seed, arguments, options):
    """All programs of `kernel`, one after the other."""
    named = {name: x for name, x in options.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*arguments, **named).arguments
    constants = {kernel.arg_names[i] for i in kernel.constexprs}
    values = [argument(x, name in constants) for name, x in bound.items()]
    work = emulated_function(kernel, {})
    ledger = Ledger()
    for i in range(grid[0]):
        Machine.now = Machine(i, seed, ledger)
        Machine.now.grid = [(Int(i), Int(grid[0]))]
        Machine.now.run(lambda: work(*values))


@contextmanager
def emulated(seed=0):
    """Kernels in Gluon run here in this block, groups in the order that `seed` draws; raises a Fault for what is wrong."""
    run = vars(GluonJITFunction).get("run")

    def emulate(self, *arguments, grid, warmup, **options):
        launch(self, grid, seed, arguments, options)

    GluonJITFunction.run = emulate
    try:
        yield
    finally:
        # Inherited where it is not its own: left in the class, it would hide what is done to the parent's later.
        if run:
            GluonJITFunction.run = run
        else:
            del GluonJITFunction.run
