"""Runs our kernels in Gluon on the CPU, where Triton's interpreter knows none, and reports what a card would punish.

`with emulated(seed):` sends every launch of a Gluon kernel here. Its Python functions are executed as they stand, with a `gl` in
which tensors are torch tensors with a layout; gluon_machine.py has the groups, barriers and places. Not modelled: registers,
speed, banks, rounding of the special functions, clusters, races in global memory, and everything the compiler checks itself.
"""

import inspect
import math
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as real
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gluon_machine import Barrier, Fault, Group, Load, Machine, Memory, where

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
TYPES |= {"int1": torch.bool, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}
machine: Machine = None


def dtype_of(dtype):
    return dtype if isinstance(dtype, torch.dtype) else TYPES[str(dtype)]


# Numbers of a program


class Int(int):
    """An integer of the program, 32 or 64 bits wide; it divides as a card does, towards zero."""

    def __new__(cls, value, dtype=torch.int32):
        self = super().__new__(cls, value)
        self.dtype = dtype
        if not -(1 << 31) <= value < 1 << 31 and dtype == torch.int32:
            raise Fault(f"{value} does not fit into 32 bits; at {where()}")
        return self

    def to(self, dtype):
        dtype = dtype_of(dtype)
        return Tensor(torch.tensor(int(self), dtype=dtype)) if dtype.is_floating_point else Int(self, dtype)


def _wider(*xs):
    return torch.int64 if any(getattr(x, "dtype", None) == torch.int64 for x in xs) else torch.int32


def _towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integer(name, work):
    def method(self, other):
        if isinstance(other, Tensor | Pointer | float):
            return NotImplemented
        return Int(work(int(self), int(other)), _wider(self, other))

    def reflected(self, other):
        return Int(work(int(other), int(self)), _wider(self, other))

    setattr(Int, f"__{name}__", method)
    setattr(Int, f"__r{name}__", reflected)


for _name, _work in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _towards_zero,
    "mod": lambda a, b: a - b * _towards_zero(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "lshift": lambda a, b: a << b,
    "rshift": lambda a, b: a >> b,
}.items():
    _integer(_name, _work)
Int.__neg__ = lambda self: Int(-int(self), self.dtype)


class Tensor:
    """Numbers in registers: a torch tensor and where they stand; a scalar stands nowhere."""

    def __init__(self, data, layout=None):
        self.data, self.layout = data, layout if data.ndim else None

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def to(self, dtype):
        return Tensor(self.data.to(dtype_of(dtype)), self.layout)

    def __getitem__(self, index):
        axis = index.index(None)
        if self.data.ndim != 1 or index not in ((slice(None), None), (None, slice(None))):
            raise Fault(f"[{index}] of a tensor {self.shape}; at {where()}")
        if not isinstance(self.layout, real.SliceLayout) or self.layout.dim != axis:
            raise Fault(f"an axis {axis} for numbers that stand as {self.layout}; at {where()}")
        return Tensor(self.data[index], self.layout.parent)

    def __bool__(self):
        if self.data.ndim:
            raise Fault(f"a condition of {self.shape} numbers; at {where()}")
        return bool(self.data)

    def __neg__(self):
        return Tensor(-self.data, self.layout)

    def __invert__(self):
        return Tensor(~self.data, self.layout)


class Pointer:
    """Addresses: a flat tensor, where the tensor that was handed in lies in it, and offsets."""

    def __init__(self, flat, low, high, offset, layout=None):
        self.flat, self.low, self.high, self.offset, self.layout = flat, low, high, offset, layout

    def __add__(self, other):
        if isinstance(other, Tensor):
            layout = _common(self, other) if self.layout else other.layout
            return Pointer(self.flat, self.low, self.high, self.offset + other.data.long(), layout)
        return Pointer(self.flat, self.low, self.high, self.offset + int(other), self.layout)

    __radd__ = __add__

    def at(self, mask):
        """Offsets, layout and mask, where all that are wanted lie inside."""
        offset = self.offset if torch.is_tensor(self.offset) else torch.tensor(self.offset)
        wanted = mask.data if isinstance(mask, Tensor) else torch.tensor(bool(mask))
        offset, wanted = torch.broadcast_tensors(offset, wanted)
        outside = wanted & ((offset < self.low) | (offset >= self.high))
        if outside.any():
            raise Fault(f"an address {offset[outside][0] - self.low} of {self.high - self.low}; at {where()}")
        return offset.clamp(self.low, self.high - 1), wanted


def _common(*xs):
    layouts = [x.layout for x in xs if getattr(x, "layout", None) is not None]
    if any(layout != layouts[0] for layout in layouts):
        raise Fault(f"numbers that stand as {layouts[0]} meet others as {layouts[1:]}; at {where()}")
    return layouts[0] if layouts else None


def _values(xs):
    """Torch tensors or numbers in one type, as Triton promotes them."""
    for x in xs:
        if isinstance(x, Pending):
            raise Fault(f"a product is read before it is waited for; at {where()}")
    tensors = [x for x in xs if isinstance(x, Tensor)]
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if not dtype.is_floating_point and any(isinstance(x, float) for x in xs):
        dtype = torch.float32
    return [x.data.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in xs]


def _elementwise(work, plain=None):
    def method(*xs):
        if not any(isinstance(x, Tensor) for x in xs) and plain:
            found = plain(*xs)
            return Int(found, _wider(*xs)) if isinstance(found, int) and not isinstance(found, bool) else found
        return Tensor(work(*_values(xs)), _common(*xs))

    return method


for _name, _work in {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}.items():
    _method = _elementwise(_work)
    setattr(Tensor, f"__{_name}__", _method)
    setattr(Tensor, f"__r{_name}__", lambda self, other, method=_method: method(other, self))
Tensor.__hash__ = None


# Shared memory


class Place:
    """A part of an allocation in shared memory, as somebody looks at it."""

    def __init__(self, memory, data, box, layout):
        self.memory, self.data, self.box, self.layout = memory, data, box, layout

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i):
        if not 0 <= i < self.data.shape[0]:
            raise Fault(f"place {i} of {self.data.shape[0]}; at {where()}")
        rank = len(self.box) - self.data.ndim
        box = (*self.box[:rank], (int(i), int(i) + 1), *self.box[rank + 1 :])
        return Place(self.memory, self.data[int(i)], box, self.layout)

    def slice(self, start, length, dim=0):
        axis = len(self.box) - self.data.ndim + dim
        first = self.box[axis][0] + int(start)
        box = (*self.box[:axis], (first, first + int(length)), *self.box[axis + 1 :])
        return Place(self.memory, self.data.narrow(dim, int(start), int(length)), box, self.layout)

    def permute(self, order):
        return Place(self.memory, self.data.permute(order), self.box, self.layout)

    def touch(self, kind, write, asynchronous, epoch=None):
        return self.memory.touch(self.box, machine.current, kind, write, asynchronous, epoch)

    def load(self, layout):
        self.touch("read", False, False, machine.current.epoch)
        return Tensor(self.data.clone(), layout)

    def store(self, value):
        if value.shape != self.shape or value.dtype != self.dtype:
            raise Fault(f"{value.dtype} {value.shape} into a place {self.dtype} {self.shape}; at {where()}")
        machine.current.unfenced.append(self.touch("write", True, False, machine.current.epoch))
        self.data.copy_(value.data)


class Bars:
    """Barriers in shared memory."""

    def __init__(self, barriers):
        self.barriers = barriers

    def index(self, i):
        if not 0 <= i < len(self.barriers):
            raise Fault(f"barrier {i} of {len(self.barriers)}; at {where()}")
        return self.barriers[int(i)]


def allocate_shared_memory(dtype, shape, layout, value=None):
    line = where()
    if str(dtype) == "int64":
        return Bars([Barrier(f"barrier {i} of [{line}]") for i in range(shape[0])])
    memory = Memory(shape, dtype_of(dtype), line)
    machine.allocate(memory)
    place = Place(memory, memory.data, tuple((0, n) for n in shape), layout)
    if value is not None:
        place.store(value)
    return place


# The copy engine, and copies of threads


class Descriptor:
    """A tensor in global memory as the copy engine sees it."""

    def __init__(self, made):
        base = made.base.detach()
        self.data = base.as_strided(made.shape, made.strides)
        self.block_shape, self.layout, self.dtype = list(made.block_shape), made.layout, base.dtype
        self.block_type = SimpleNamespace(
            nbytes=math.prod(made.block_shape) * base.element_size(), shape=made.block_shape
        )

    def parts(self, at, place):
        """The block at `at` inside the tensor, and the part of `place` that it is."""
        if place.dtype != self.dtype or math.prod(place.shape) != math.prod(self.block_shape):
            raise Fault(f"a block {self.dtype} {self.block_shape}, a place {place.dtype} {place.shape}; at {where()}")
        if place.layout.swizzle_byte_width != self.layout.swizzle_byte_width or len(at) != self.data.ndim:
            raise Fault(f"a block as {self.layout} at {list(at)}, a place as {place.layout}; at {where()}")
        spans = [(max(a, 0), min(a + n, size)) for a, n, size in zip(at, self.block_shape, self.data.shape)]
        empty = any(a >= b for a, b in spans)
        there = tuple(slice(0, 0) if empty else slice(a, b) for a, b in spans)
        here = tuple(slice(0, 0) if empty else slice(a - o, b - o) for (a, b), o in zip(spans, at))
        return self.data[there], place.data.view(self.block_shape)[here]


def _copy_in(desc, at, barrier, place, pred=True):
    if not pred:
        return
    barrier.alive()
    there, here = desc.parts([int(x) for x in at], place)
    access = place.touch("load", True, True)
    place.data.fill_(math.nan)

    def copy():
        place.data.zero_()
        here.copy_(there)

    machine.loads.append(Load(barrier, access, math.prod(place.shape) * place.data.element_size(), copy))


def _copy_out(desc, at, place):
    there, here = desc.parts([int(x) for x in at], place)
    group, access = machine.current, place.touch("store to memory", False, True)

    def copy():
        there.copy_(here)
        access.epoch = group.epoch

    group.stores.append(copy)


def _store_wait(pendings):
    _waited(machine.current, machine.current.stores, pendings)


def _waited(group, queue, pendings):
    group.retire(queue, pendings)
    # The compiler lets the threads of a group meet behind such a wait.
    group.barrier()


def _copy_by_threads(place, pointer, mask=True):
    if pointer.layout is None or place.shape != list(pointer.offset.shape):
        raise Fault(f"a copy of {pointer.offset} to a place {place.shape}; at {where()}")
    offset, wanted = pointer.at(mask)
    group, access = machine.current, place.touch("copy by threads", True, False)
    place.data.fill_(math.nan)

    def copy():
        place.data.copy_(torch.where(wanted, pointer.flat[offset], torch.zeros((), dtype=pointer.flat.dtype)))
        access.epoch = group.epoch
        group.unfenced.append(access)

    group.copies.append(copy)


def _commit():
    group = machine.current
    copies, group.copies = group.copies, []
    group.committed.append(lambda: [copy() for copy in copies])


# Products


class Pending:
    """A product that was begun: its result counts once it is waited for."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.found = a, b, acc, None
        self.layout, self.shape = acc.layout, acc.shape
        group = machine.current
        self.accesses = [x.touch("product", False, True) for x in (a, b) if isinstance(x, Place)]
        self.group = group
        group.products.append(self.finish)

    def finish(self):
        acc = self.acc.found if isinstance(self.acc, Pending) else self.acc.data
        self.found = acc + self.a.data.float() @ self.b.data.float()
        for access in self.accesses:
            access.epoch = self.group.epoch


def _product(a, b, acc, *, use_acc=True, is_async=False, **_):
    if not use_acc:
        acc = Tensor(torch.zeros(acc.shape), acc.layout)
    if isinstance(a, Tensor):
        wanted = real.DotOperandLayout(0, acc.layout, 2)
        if a.layout != wanted:
            raise Fault(f"the first operand stands as {a.layout}, wanted {wanted}; at {where()}")
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or [*a.shape[:1], *b.shape[1:]] != acc.shape:
        raise Fault(f"a product of {a.dtype} {a.shape} and {b.dtype} {b.shape} on {acc.shape}; at {where()}")
    if a.shape[1] != b.shape[0] or not isinstance(acc.layout, real.NVMMADistributedLayout):
        raise Fault(f"a product of {a.shape} and {b.shape} that stands as {acc.layout}; at {where()}")
    pending = Pending(a, b, acc)
    return pending if is_async else _product_wait(0, [pending])


def _product_wait(num_outstanding=0, deps=None):
    machine.current.retire(machine.current.products, num_outstanding)
    found = [Tensor(x.found, x.layout) if isinstance(x, Pending) and x.found is not None else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


# Barriers


def _wait(barrier, phase, pred=True, deps=()):
    if pred:
        machine.wait(barrier, int(phase))


def _arrive(barrier, *, count=1, pred=True):
    if pred:
        barrier.arrive(machine.current, count)
        machine.pause()


def _expect(barrier, size, pred=True):
    if pred:
        barrier.bytes += size
        barrier.arrive(machine.current)


def _invalidate(barrier):
    barrier.count = None


# gl


def _load(pointer, mask=True, other=math.nan, **_):
    offset, wanted = pointer.at(mask)
    _common(pointer, mask)
    found, dtype = pointer.flat[offset], pointer.flat.dtype
    other = other.data if isinstance(other, Tensor) else torch.tensor(other if dtype.is_floating_point else 12345)
    return Tensor(torch.where(wanted, found, other.to(dtype)), pointer.layout)


def _store(pointer, value, mask=True, **_):
    offset, wanted = pointer.at(mask)
    _common(pointer, value, mask)
    (data,) = _values([value]) if isinstance(value, Tensor) else (torch.tensor(value),)
    data = data.to(pointer.flat.dtype).expand(offset.shape)
    pointer.flat[offset[wanted]] = data[wanted]


def _reduce(work):
    def reduced(x, axis):
        (data,) = _values([x])
        return Tensor(work(data, axis), None if data.ndim == 1 else real.SliceLayout(axis, x.layout))

    return reduced


def _convert(x, layout, assert_trivial=False):
    (data,) = _values([x])
    return Tensor(data, layout)


def _moved(asm, constraints, args, dtype, is_pure, pack):
    if asm != "mov.b32 $0, $1;" or args[0].dtype.itemsize != 4:
        raise NotImplementedError(f"assembly {asm!r} of {args[0].dtype}")
    return args[0]


def _program(at):
    return lambda axis: machine.grid[at] if axis == 0 else Int(at)


def _identity(x, *_):
    return x


class Language:
    """`gl`: what is emulated, and layouts and types as they are."""

    allocate_shared_memory = staticmethod(allocate_shared_memory)
    program_id, num_programs = (staticmethod(_program(at)) for at in (0, 1))
    minimum, maximum = (staticmethod(_elementwise(*x)) for x in ((torch.minimum, min), (torch.maximum, max)))
    load, store, convert_layout = staticmethod(_load), staticmethod(_store), staticmethod(_convert)
    sum, max, min = (staticmethod(_reduce(work)) for work in (torch.sum, torch.amax, torch.amin))
    static_range, inline_asm_elementwise = staticmethod(range), staticmethod(_moved)
    abs, exp2, exp, log2, sqrt = (
        staticmethod(_elementwise(x)) for x in (torch.abs, torch.exp2, torch.exp, torch.log2, torch.sqrt)
    )
    static_assert = multiple_of = max_contiguous = assume = staticmethod(_identity)

    @staticmethod
    def arange(start, end, layout):
        return Tensor(torch.arange(start, end, dtype=torch.int32), layout)

    @staticmethod
    def full(shape, value, dtype, layout=None):
        value = value.data if isinstance(value, Tensor) else value
        return Tensor(torch.zeros(list(shape), dtype=dtype_of(dtype)) + value, layout)

    @staticmethod
    def zeros(shape, dtype, layout=None):
        return Tensor(torch.zeros(list(shape), dtype=dtype_of(dtype)), layout)

    @staticmethod
    def zeros_like(x):
        return Tensor(torch.zeros_like(x.data), x.layout)

    @staticmethod
    def where(condition, x, y):
        if not isinstance(condition, Tensor):
            return x if condition else y
        a, b = _values([x, y]) if any(isinstance(v, Tensor) for v in (x, y)) else map(torch.tensor, (x, y))
        return Tensor(torch.where(condition.data, a, b), _common(condition, x, y))

    @staticmethod
    def thread_barrier():
        machine.current.barrier()

    @staticmethod
    def warp_specialize(partitions, warps, registers=None):
        machine.specialize(partitions)

    def __getattr__(self, name):
        found = getattr(real, name)
        if isinstance(found, JITFunction) or hasattr(found, "__triton_builtin__"):
            raise NotImplementedError(f"gl.{name} is not emulated")
        return found


STANDS_FOR = {
    real: Language(),
    hopper.tma: SimpleNamespace(
        async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=_store_wait
    ),
    hopper.mbarrier: SimpleNamespace(
        init=Barrier.init, wait=_wait, arrive=_arrive, expect=_expect, invalidate=_invalidate,
        MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    ),
    hopper.async_copy: SimpleNamespace(
        async_copy_global_to_shared=_copy_by_threads,
        commit_group=_commit,
        wait_group=lambda pendings=0: _waited(machine.current, machine.current.committed, pendings),
    ),
    hopper.fence_async_shared: lambda cluster=False: machine.current.fence(),
    hopper.warpgroup_mma: _product,
    hopper.warpgroup_mma_wait: _product_wait,
}  # fmt: skip


# Launches


def _function(kernel, known):
    """The Python function of a kernel, in a world where `gl` is emulated."""
    if kernel not in known:
        world = {"__gluon__": True}
        known[kernel] = FunctionType(kernel.fn.__code__, world, kernel.fn.__name__, kernel.fn.__defaults__)
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, GluonJITFunction):
                world[name] = _function(value, known)
            elif getattr(value, "__hash__", None) and value in STANDS_FOR:
                world[name] = STANDS_FOR[value]
            else:
                world[name] = value
        world["range"] = lambda *ends: map(Int, range(*ends))
    return known[kernel]


def _argument(x, constant):
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if torch.is_tensor(x):
        x = x.detach()
        size = x.untyped_storage().nbytes() // x.element_size()
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (size,))
        low = x.storage_offset()
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
        return Pointer(flat, low, low + span, low)
    return Int(x, torch.int64 if abs(x) >> 31 else torch.int32) if type(x) is int and not constant else x


OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def launch(kernel, grid, *args, seed=0, **options):
    """All programs of `kernel`, one after the other; raises a Fault for what a card would punish."""
    global machine
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k not in OPTIONS})
    constants = {kernel.arg_names[i] for i in kernel.constexprs}
    values = [_argument(x, name in constants) for name, x in bound.arguments.items()]
    work = _function(kernel, {})
    for at in range(grid[0]):
        machine = Machine(seed)
        machine.grid = Int(at), Int(grid[0])
        machine.run(lambda: work(*values))


@contextmanager
def emulated(seed=0):
    """Kernels in Gluon run here in this block, in the order that `seed` draws; an odd seed lets copies land early."""
    run = GluonJITFunction.run
    GluonJITFunction.run = lambda self, *args, grid, warmup, **options: launch(self, grid, *args, seed=seed, **options)
    try:
        yield
    finally:
        GluonJITFunction.run = run
