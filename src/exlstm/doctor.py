"""What is here: versions, devices, which implementation of an operator runs and why, and whether each is right."""

import os
import platform
from functools import cache, partial
from importlib import metadata

import torch
from torch.nn.functional import logsigmoid

from exlstm import __version__
from exlstm.ops import backend as backends
from exlstm.ops import mlstm, slstm

PACKAGES = ("numpy", "safetensors", "tyro", "rich", "tokenizers", "matplotlib", "triton")
# ‖x - reference‖ / ‖reference‖ of outputs and gradients that rounding can explain: of every product in float32, and of the
# operands of matrix products, of what they give, and of what is kept for the backward in bfloat16.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def report() -> int:
    """Prints the report; 0 when every implementation computes what the reference does, else 1."""
    print(f"exlstm {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    print(f"torch {torch.__version__}, " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    devices = _devices()
    print(f"CPU threads: {torch.get_num_threads()} of {os.cpu_count()} cores; devices: {', '.join(devices)}")
    good = True
    for device in devices:
        for name, operator, case in (("mlstm", mlstm, _mlstm_case), ("slstm", slstm, _slstm_case)):
            told, fine = _choice(operator.IMPLEMENTATIONS, case, device)
            good &= fine
            print(f"\n{name} on {device}: {told}")
            for implementation in operator.IMPLEMENTATIONS:
                verdict, fine = _verdict(case, implementation, device)
                good &= fine
                print(f"  {implementation:10} {verdict}")
    print("\nok" if good else "\nnot ok, see above")
    return 0 if good else 1


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices():
    found = ["cpu"]
    if torch.accelerator.is_available():
        found.append(torch.accelerator.current_accelerator().type)
    return found


def _choice(table, case, device):
    """Which row of an operator's table runs on `device` and why, seen by running it, and whether one does."""
    rows, called = dict(table), []

    def watched(name):
        def run(*arguments):
            called.append(name)
            return rows[name](*arguments)

        return run

    asked = backends.chosen(None)
    try:
        table.update({name: watched(name) for name in rows})
        case(None, device, torch.float32)
    except (ValueError, RuntimeError, ImportError) as error:
        return f"none runs, {asked} was asked for: {_line(error)}", False
    finally:
        table.update(rows)
    return f"{called[0]} runs, {'chosen by itself' if asked == 'auto' else f'{asked} was asked for'}", True


def _line(error) -> str:
    return " ".join(str(error).split())


def _verdict(case, implementation, device):
    """'ok, ...' with the distances from the float64 reference, or what is wrong, and whether that is fine."""
    told, fine = [], True
    for dtype, tolerance in TOLERANCES.items():
        truth = _truth(case, dtype)
        try:
            values = case(implementation, device, dtype)
        except (ValueError, RuntimeError, ImportError) as error:
            # An implementation for another device says in one sentence that this is not its place.
            return f"not here: {_line(error)}", isinstance(error, ValueError)
        error = max(((v.cpu().double() - t).norm() / t.norm()).item() for v, t in zip(values, truth, strict=True))
        # Not a number is not fine.
        fine &= error < tolerance
        told.append(f"{error:.0e} in {str(dtype).removeprefix('torch.')}")
    return f"{'ok' if fine else 'WRONG'}, outputs and gradients off by {', '.join(told)}", fine


@cache
def _truth(case, dtype):
    """What the reference makes in float64 of inputs that `dtype` holds."""
    return case("reference", "cpu", torch.float64, rounded_to=dtype)


def _mlstm_case(implementation, device, dtype, rounded_to=None):
    """Outputs and input gradients of small cases with a reset, always the same ones, in several chunks.

    On a GPU heads of 64 may have a backward for few sequences, one for many, and one where a chunk length is given.
    """
    run = partial(_mlstm_run, implementation, (device, dtype, rounded_to or dtype))
    wide = run(130, 64, 128)
    others = [run(130, 64, 128, copies=32), run(130, 64, 128, chunk=64)] if implementation == "triton" else [wide, wide]
    return [*run(300, 32, 32), *wide, *others[0], *others[1]]


def _mlstm_run(implementation, where, steps, keys, values, copies=1, chunk=None):
    """The same whatever the number of `copies`, which share the weight in the gradients and of which the first are seen."""
    shapes = [(2, steps, 2, keys)] * 2 + [(2, steps, 2, values)] + [(2, steps, 2)] * 2
    inputs = _inputs(shapes, *where, wide=3)
    q, k, v, i, f = (x.repeat(copies, *[1] * (x.dim() - 1)) for x in inputs)
    reset = _reset(steps, where[0]).repeat(copies, 1)
    h, _ = mlstm.mlstm(q, k, v, i, logsigmoid(f + 3), reset=reset, chunk=chunk, backend=implementation)
    weights = (_weights(h[:2]) / copies).repeat(copies, 1, 1, 1)
    return [h[:2].detach(), *torch.autograd.grad((h * weights).sum(), inputs)]


def _slstm_case(implementation, device, dtype, rounded_to=None):
    inputs = _inputs([(2, 70, 2, 4, 8), (2, 4, 8, 8)], device, dtype, rounded_to or dtype, wide=2)
    h, _ = slstm.slstm(*inputs, reset=_reset(70, device), backend=implementation)
    return [h.detach(), *torch.autograd.grad((h * _weights(h)).sum(), inputs)]


def _inputs(shapes, device, dtype, rounded_to, wide):
    """The same numbers every time, the first `wide` tensors in `dtype` and the gates at least in float32."""
    generator = torch.Generator().manual_seed(0)
    drawn = [0.7 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn = [x.to(rounded_to) for x in drawn[:wide]] + [x.float() for x in drawn[wide:]]
    gates = torch.promote_types(dtype, torch.float32)
    return [x.to(device, dtype if n < wide else gates).requires_grad_() for n, x in enumerate(drawn)]


def _weights(h):
    """One gradient of h for every dtype: numbers that bfloat16 holds."""
    drawn = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    return drawn.bfloat16().to(h.device, h.dtype)


def _reset(length, device):
    reset = torch.zeros(2, length, dtype=torch.bool, device=device)
    reset[0, length // 3] = True
    return reset
