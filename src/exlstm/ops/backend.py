"""Which implementation of an operator runs: argument > `with exlstm.backend(...)` > $EXLSTM_BACKEND > by device."""

import os
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils import _pytree

TRITON = find_spec("triton") is not None
# Asked for before triton is imported, or not at all; read once, as a step of decoding would feel it.
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Names of their own, as decoding asks often.
FAKE, PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY

# A plain global and no ContextVar: torch.compile traces it, and compiles anew when it changes.
_chosen: str | None = None


@contextmanager
def backend(name: str):
    """Operators inside the block, in every thread, run on implementation `name` ("reference", "cpu", ..., or "auto").

    >>> import exlstm
    >>> with exlstm.backend("reference"):
    ...     pass
    """
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen(argument: str | None) -> str:
    """The name in force: the call's argument, the surrounding `with`, $EXLSTM_BACKEND, or "auto"."""
    return argument or _chosen or os.environ.get("EXLSTM_BACKEND") or "auto"


def transformed() -> bool:
    """Whether a transform of torch.func, or forward differentiation, which no_grad leaves on, or torch.jit.trace wants plain
    operations."""
    if torch.compiler.is_compiling():
        return False
    recorded = torch._C._get_tracing_state() is not None
    return recorded or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def faked() -> bool:
    """Whether tensors have shapes and no numbers to ask for, whatever their device says: in FakeTensorMode, or where make_fx
    records what is done to them."""
    return torch._C._get_dispatch_mode(FAKE) is not None or torch._C._get_dispatch_mode(PROXY) is not None


def traced() -> bool:
    """Whether somebody looks through the operations, a compiler or a transform: no NumPy then, and no gradient by hand."""
    return torch.compiler.is_compiling() or transformed() or faked()


def unseen() -> bool:
    """Whether NumPy may stand in for operations of torch: nobody differentiates, traces or counts them (TorchDispatchMode)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # What makes tensors fake, or records them, stands on the stack, too.
    return not (torch._C._len_torch_dispatch_stack() or transformed())


def batched(x) -> bool:
    """Whether x stands for many tensors, as in a backward pass for many gradients at once (is_grads_batched)."""
    functorch = torch._C._functorch
    return x is not None and (functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x))


def portable(*states: type):
    """For the kinds of a state, NamedTuples: torch.load takes them without weights_only=False, and torch.export.save writes
    programs that give or take them."""
    torch.serialization.add_safe_globals(list(states))
    for kind in states:
        _pytree._register_namedtuple(kind, serialized_type_name=f"exlstm.{kind.__name__}")


def distributed() -> bool:
    """Whether processes work together: sharded weights are given back after every use, which storage seen by NumPy refuses."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def autocasts(device) -> bool:
    """Whether autocast is on for a device; the meta device knows of none, and would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def exact(device):
    """A context without autocast, at no cost where there is none: gates and state keep their precision."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def triton_runs(x) -> bool:
    """Whether Triton can work on x: on a GPU, or in its interpreter, which is asked for by TRITON_INTERPRET=1."""
    return (TRITON and x.is_cuda) or (INTERPRETED and x.device.type == "cpu")


def kernels(x) -> bool:
    """Whether Triton may work on x where nobody named an implementation: never in a `with` of "reference" or "cpu"."""
    return triton_runs(x) and chosen(None) not in ("reference", "cpu")


def on(device):
    """A context in which kernels start on `device`, at no cost where it is the current one."""
    current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)


def cast(x, dtype):
    """x in `dtype`; in decoding a call of `to` that changes nothing would cost as much as the arithmetic."""
    return x if x.dtype == dtype else x.to(dtype)


def blanked(x, mask):
    """x (B, T, ...) with 0 at the padding of a mask (B, T) or None: what stands there may be NaN, and so is 0 times NaN."""
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0)


def emptied(x, reset):
    """A memory x (B, ...) with 0 in rows that `reset` (B, T), or None, empties before the first token: what stood there may be
    NaN, which no factor of 0 takes away."""
    return x if reset is None else x.masked_fill(reset[:, 0].view(-1, *[1] * (x.ndim - 1)), 0)


def log_sigmoid(x):
    """logsigmoid. ONNX has it as the logarithm of a sigmoid only, which near 1 keeps no digit of a forget gate that remembers for
    long: there it is made of what loses none."""
    return -F.softplus(-x) if torch.onnx.is_in_onnx_export() else F.logsigmoid(x)


def pick(implementations: dict, argument: str | None, auto: str):
    """The implementation to run out of an operator's table; "auto" takes the one named `auto`, or the reference where a
    transform, or torch.onnx.export, wants its operations, any other name runs or raises."""
    name = chosen(argument)
    if name == "auto":
        name = "reference" if transformed() or torch.onnx.is_in_onnx_export() else auto
    if name not in implementations:
        raise ValueError(f"backend {name!r} is not one of {', '.join(implementations)}, auto")
    return implementations[name]


def check_tensors(**named):
    """TypeError where one of these is no tensor."""
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, wanted a tensor")


def elsewhere(weight, x) -> bool:
    """Whether a weight lies on another kind of device than the input x. Libraries that spread a model over cards bring the
    input along, and those that offload it a weight that is on meta; what is no tensor is a map of somebody's."""
    return isinstance(weight, torch.Tensor) and weight.device.type not in ("meta", x.device.type)


def check_companions(first, reset, mask, others: dict):
    """Devices of all tensors, and shape and dtype of `reset` and `mask`, against the operator's first tensor (B, T, ...)."""
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_tensors(**{name: flags})
            if flags.dtype != torch.bool or flags.shape != first.shape[:2]:
                raise ValueError(
                    f"{name} is {flags.dtype} of shape {tuple(flags.shape)}, wanted bool of (B, T) = {tuple(first.shape[:2])}"
                )
            others = {**others, name: flags}
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, wanted {first.device} as the first argument")


def check_state(state, shapes: dict, device):
    """A state handed in: as many tensors as `shapes` names, each of its shape, floating, on `device`."""
    if not isinstance(state, tuple | list) or len(state) != len(shapes):
        raise ValueError(f"state is {type(state).__name__}, wanted the {len(shapes)} tensors {', '.join(shapes)}")
    for tensor, (name, shape) in zip(state, shapes.items(), strict=True):
        check_tensors(**{f"state.{name}": tensor})
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state.{name} has shape {tuple(tensor.shape)}, wanted {shape}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"state.{name} is {tensor.dtype}, wanted a floating dtype")
        if tensor.device != device:
            raise ValueError(f"state.{name} is on {tensor.device}, wanted {device} as the inputs")


def shared_memory(device) -> int:
    """Bytes of shared memory that a program may have; of a Hopper card where there is none to ask."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
