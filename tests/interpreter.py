"""Triton's interpreter with the same results in a third less time; tests/gpu.py asks for it where kernels are interpreted."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_launch, _patch, _kind = interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype
plain_scan, _tuple_type = interpreter.ScanOps.generic_scan, tl.core._type_for_tuple_values
_kinds, _shapes = {}, {}


def quicken():
    """A function that a kernel calls finds the language as it is, and a scan by a function works on whole rows."""
    patched = set()

    def patch_once(fn):
        # Triton looks through the whole language at every call, though nothing has changed since the launch.
        langs = frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)
        if langs in patched:
            return None
        patched.add(langs)
        return _patch(fn)

    def launch(self, *arguments, **options):
        patched.clear()
        return _launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
    interpreter.ScanOps.generic_scan = scan
    interpreter._get_np_dtype = kind
    tl.core._type_for_tuple_values = tuple_type


def kind(dtype):
    """NumPy's name of a dtype, for which Triton builds a table at every call."""
    name = dtype.scalar.name
    if name not in _kinds:
        _kinds[name] = _kind(dtype.scalar)
    return _kinds[name]


def tuple_type(values, fields=None):
    """The type of a shape, which Triton writes out in words for every tensor."""
    if fields or not all(type(x) is tl.constexpr and type(x.value) is int for x in values):
        return _tuple_type(values, fields)
    shape = tuple(x.value for x in values)
    if shape not in _shapes:
        _shapes[shape] = _tuple_type(values)
    return _shapes[shape]


def scan(self, inputs):
    """Everything joined with all before it in log2 n steps, as a GPU does it, where Triton calls the function an element."""
    found, axis, step = [x.handle.data for x in inputs], self.axis, 1
    places = np.arange(found[0].shape[axis]).reshape(-1, *[1] * (found[0].ndim - axis - 1))
    while step < len(places):
        before = [np.roll(data, step, axis) for data in found]
        tensors = [self.to_tensor(data, x.dtype) for data, x in zip(before + found, 2 * [*inputs])]
        joined = self.combine_fn.fn(*tensors)
        joined = joined if isinstance(joined, tuple) else (joined,)
        found = [np.where(places < step, data, new.handle.data) for data, new in zip(found, joined)]
        step *= 2
    return [self.to_tensor(data, x.dtype) for data, x in zip(found, inputs)]
