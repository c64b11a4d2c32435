"""What the tests of Triton kernels share: where their laws run, random tensors, and the compiler for an H200.

Laws run in Triton's interpreter, which has to be asked for before triton is imported, so in a process of its own; and on a GPU
with `pytest -m gpu`.
"""

import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.quicken()
DEVICE = "cpu" if INTERPRETED else "cuda"
# NumPy warns of every overflow, and of how the interpreter counts its loops.
numpy = ("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
law = pytest.mark.filterwarnings(*numpy) if INTERPRETED else pytest.mark.gpu
here = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="wants triton, and as a compiler"
)


def hold_in_the_interpreter(file):
    """Every law in `file` holds in a process with Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def normal(*shape, seed, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def flags(*shape, density, seed):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


def close(found, wanted, limit):
    """Every tensor of `found` within `limit` of float64 truth, relative to its norm; nothing left unwritten."""
    limits = [limit] * len(wanted) if isinstance(limit, float) else limit
    for i, (a, b, limit) in enumerate(zip(found, wanted, limits, strict=True)):
        assert a.isfinite().all(), i
        error = (a.double() - b).norm()
        assert error <= limit * b.norm() + 1e-12, (i, (error / b.norm()).item())


@contextmanager
def poisoned():
    """New memory is filled with NaN, so that nothing may stay unwritten."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def equal(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def doubled(tensors):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tensors]


def compile_kernel(kernel, types, constants, warps):
    """A kernel built for sm_90 with aligned pointers, widths and strides; arguments without a type are integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [p.num for p in kernel.params if signature[p.name].startswith("*") or _multiple_of_16(p)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    with told_by_the_assembler() as said:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    kept(compiled, *said)
    return compiled


def _multiple_of_16(parameter):
    """Widths and the strides made of them are, in every model that is used."""
    return (parameter.name in ("D", "size") or parameter.name.startswith("stride_")) and not parameter.do_not_specialize


@contextmanager
def told_by_the_assembler():
    """The list of what it says of kernels that are compiled here; of one out of Triton's cache it says nothing."""
    from triton import knobs

    text, said = io.StringIO(), []
    with knobs.nvidia.scope(), redirect_stdout(text):
        knobs.nvidia.dump_ptxas_log = True
        yield said
    said.append(text.getvalue())


def kept(compiled, said=""):
    """What the assembler says of a kernel, kept where Triton keeps the kernel."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    beside, name = get_cache_manager(compiled.hash), "assembler.log"
    if said or not (path := beside.get_file(name)):
        if not said:
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(compiled.asm["ptx"])
                file.flush()
                command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        path = beside.put(said, name, binary=False)
    return Path(path).read_text()


def cost(compiled):
    """(registers a thread, bytes spilled) as the assembler counts them."""
    told = kept(compiled)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return int(re.search(r"Used (\d+) registers", told).group(1)), spilled


class Hopper:
    """As much of a driver as compiling for an H200 wants where there is none."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(monkeypatch):
    """From here kernels are compiled for sm_90 as they are launched, and not run; returns a list of (kernel, its binary)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def compile_it(self, *args, grid, warmup, **options):
        with told_by_the_assembler() as said:
            built = run(self, *args, grid=grid, warmup=True, **options)
        kept(built, *said)
        found.append((self, built))
        return built

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_it)
    return found
