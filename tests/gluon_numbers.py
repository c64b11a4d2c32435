"""The numbers of a kernel in Gluon on the CPU: integers of its program, tensors with a layout, pointers."""

import math

import torch
from triton.experimental.gluon import language as gl

from gluon_machine import Fault, Machine, where

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
TYPES |= {"int1": torch.bool, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}


def typed(dtype):
    return dtype if isinstance(dtype, torch.dtype) else TYPES[str(dtype)]


def fault(text):
    raise Fault(f"{text}; at {where()}")


class Int(int):
    """An integer known when the program runs, of 32 or 64 bits; it divides as a card does, towards zero."""

    def __new__(cls, value, dtype=torch.int32):
        self = super().__new__(cls, value)
        self.dtype = dtype
        if dtype == torch.int32 and not -(1 << 31) <= value < 1 << 31:
            fault(f"{value} does not fit into 32 bits")
        return self

    def to(self, dtype):
        dtype = typed(dtype)
        return Tensor(torch.tensor(int(self), dtype=dtype)) if dtype.is_floating_point else Int(self, dtype)

    def __neg__(self):
        return Int(-int(self), self.dtype)


def integer(value, *like):
    """`value`, as wide as the widest of the integers that it was made of."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return Int(value, torch.int64 if any(getattr(x, "dtype", None) == torch.int64 for x in like) else torch.int32)


def _quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


class Tensor:
    """Numbers in registers: a torch tensor and where they stand; a scalar stands nowhere."""

    __hash__ = None

    def __init__(self, data, layout=None):
        self.data, self.layout = data, layout if data.ndim else None

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def to(self, dtype):
        return Tensor(self.data.to(typed(dtype)), self.layout)

    def __getitem__(self, index):
        axis = index.index(None)
        if self.data.ndim != 1 or len(index) != 2 or getattr(self.layout, "dim", None) != axis:
            fault(f"a new axis {axis} for {self.shape} that stand as {self.layout}")
        return Tensor(self.data[index], self.layout.parent)

    def __bool__(self):
        return bool(self.data) if self.data.ndim == 0 else fault(f"{self.shape} numbers as a condition")

    def __neg__(self):
        return Tensor(-self.data, self.layout)

    def __invert__(self):
        return Tensor(~self.data, self.layout)


def flat(x):
    """All numbers of the storage of x."""
    return torch.empty(0, dtype=x.dtype).set_(
        x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.element_size(),)
    )


class Pointer:
    """Addresses of numbers in `flat`, of which those from `low` to `high` belong to the tensor that was handed in."""

    def __init__(self, flat, low, high, offset, layout=None):
        self.flat, self.low, self.high, self.offset, self.layout = flat, low, high, offset, layout

    @classmethod
    def of(cls, x):
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else -1
        low = x.storage_offset()
        return cls(flat(x), low, low + last + 1, torch.tensor(low))

    def __add__(self, other):
        more = other.data.long() if isinstance(other, Tensor) else int(other)
        return Pointer(self.flat, self.low, self.high, self.offset + more, common(self, other))

    __radd__ = __add__

    def at(self, mask, write=False):
        """Offsets, and which of them are wanted; those lie inside, and are in order with what others do."""
        wanted = mask.data if isinstance(mask, Tensor) else torch.tensor(bool(mask))
        offset, wanted = torch.broadcast_tensors(self.offset, wanted)
        outside = offset[wanted & ((offset < self.low) | (offset >= self.high))]
        if len(outside):
            fault(f"number {int(outside[0]) - self.low} of {self.high - self.low}")
        ledger, group, found = Machine.now.ledger, Machine.now.current, offset[wanted]
        marks = ledger.of(self.flat)
        marks[:, found] = ledger.touch(marks[:, found], group, write, group.epoch)
        return offset.clamp(self.low, max(self.low, self.high - 1)), wanted


def common(*xs):
    """The layout in which all of them stand that stand somewhere."""
    layouts = [x.layout for x in xs if getattr(x, "layout", None) is not None]
    if any(layout != layouts[0] for layout in layouts):
        fault(f"numbers that stand as {layouts[0]} meet others that stand as {layouts[1:]}")
    return layouts[0] if layouts else None


def data(*xs):
    """Their torch tensors in one type, as Triton promotes them."""
    for x in xs:
        if not isinstance(x, Tensor | int | float):
            fault(f"{x} is used as a number")
    types = [x.dtype for x in xs if isinstance(x, Tensor)] or [torch.int32]
    dtype = types[0]
    for other in types:
        dtype = torch.promote_types(dtype, other)
    if not dtype.is_floating_point and any(isinstance(x, float) for x in xs):
        dtype = torch.float32
    return [x.data.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in xs]


def elementwise(work, plain=None):
    """`work` on tensors and numbers; `plain` on numbers that are known."""

    def method(*xs):
        if plain and not any(isinstance(x, Tensor) for x in xs):
            return integer(plain(*xs), *xs)
        return Tensor(work(*data(*xs)), common(*xs))

    return method


def reduction(work):
    def method(x, axis):
        return Tensor(work(*data(x), axis), gl.SliceLayout(axis, x.layout) if x.data.ndim > 1 else None)

    return method


def where_(condition, x, y):
    if not isinstance(condition, Tensor):
        return x if condition else y
    return Tensor(torch.where(condition.data, *data(x, y)), common(condition, x, y))


def load(pointer, mask=True, other=math.nan, **_):
    """What is masked is NaN where nobody says what else."""
    (offset, wanted), dtype = pointer.at(mask), pointer.flat.dtype
    other = other.data if isinstance(other, Tensor) else torch.tensor(other)
    return Tensor(torch.where(wanted, pointer.flat[offset], other.to(dtype)), common(pointer, mask))


def store(pointer, value, mask=True, **_):
    common(pointer, value, mask)
    offset, wanted = pointer.at(mask, write=True)
    value = data(value)[0].to(pointer.flat.dtype)
    pointer.flat[offset[wanted]] = value.expand(offset.shape)[wanted]


BINARY = {
    "add": (torch.add, lambda a, b: a + b),
    "sub": (torch.sub, lambda a, b: a - b),
    "mul": (torch.mul, lambda a, b: a * b),
    "floordiv": (lambda a, b: torch.div(a, b, rounding_mode="trunc"), _quotient),
    "mod": (torch.fmod, lambda a, b: a - b * _quotient(a, b)),
    "and": (torch.bitwise_and, lambda a, b: a & b),
    "or": (torch.bitwise_or, lambda a, b: a | b),
    "xor": (torch.bitwise_xor, lambda a, b: a ^ b),
    "lshift": (torch.bitwise_left_shift, lambda a, b: a << b),
    "rshift": (torch.bitwise_right_shift, lambda a, b: a >> b),
}


def _install(name, work, plain=None):
    method = elementwise(work)

    def of_integers(self, other):
        known = isinstance(other, int)
        return integer(plain(int(self), int(other)), self, other) if known else NotImplemented

    def reflected(self, other):
        return integer(plain(int(other), int(self)), self, other)

    setattr(Tensor, f"__{name}__", method)
    setattr(Tensor, f"__r{name}__", lambda self, other: method(other, self))
    if plain:
        setattr(Int, f"__{name}__", of_integers)
        setattr(Int, f"__r{name}__", reflected)


for _name, _works in BINARY.items():
    _install(_name, *_works)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _install(_name, getattr(torch, _name))
_install("truediv", torch.div)
