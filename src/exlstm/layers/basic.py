"""What every block is made of: norms, feed-forwards, the short convolution, and the mask of lengths."""

import math
import warnings
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.layers.token import SMALL, array, hooked, is_light, parameter, project, silu, token_errors
from exlstm.ops import maps as joint
from exlstm.ops.backend import autocasts, cast, check_tensors, distributed, elsewhere, exact, kernels, traced, unseen
from exlstm.ops.conv import causal_conv, decode
from exlstm.ops.gated import gated
from exlstm.ops.norm import head_norm, row_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467), in float32, returned in x's dtype.

    Under autocast on a GPU it is returned in autocast's, so that no reader has to cast it.
    """

    def __init__(self, d: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Ones: the norm starts as the bare norm."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        found = row_norm(x, self.weight, eps=self.eps, centre=False) if kernels(x) else None
        return self._plain(x) if found is None else found[0]

    def after(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and x + y; y None adds nothing."""
        found = row_norm(x, self.weight, eps=self.eps, centre=False, y=y)
        if found is not None:
            return found
        x = x if y is None else x + y
        return self._plain(x), x

    def _plain(self, x):
        wide, weight = _wide(x), _wide(self.weight)
        # First of all, since a compiler would take the question for the size as a promise.
        if traced() or x.device.type != "cpu":
            return cast(F.rms_norm(wide, weight.shape, weight, self.eps), x.dtype)
        if x.numel() <= SMALL and unseen() and not distributed():
            return cast(_rms_norm(wide, weight, self.eps), x.dtype)
        return cast(_RMSNorm.apply(wide, weight, self.eps), x.dtype)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


def _rms_norm(x, weight, eps):
    """The same without gradients, where a call of torch costs more than the arithmetic."""
    x, weight = array(x), array(weight)
    scale = np.einsum("...d,...d->...", x, x)[..., None]
    scale *= 1 / x.shape[-1]
    scale += eps
    y = x / np.sqrt(scale, out=scale)
    y *= weight
    return torch.from_numpy(y)


class _RMSNorm(torch.autograd.Function):
    """The same on a CPU, where PyTorch fuses only the LayerNorm.

    Forward and backward at (16, 256, 384), float32, one core, torch 2.13: 3.7 ms; F.rms_norm 17 ms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody differentiates twice: `scale` has to depend on x.
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
            n, g = x * scale, dy * weight
            dx = (g - n * (g * n).mean(-1, keepdim=True)) * scale
            return dx, (dy * n).reshape(-1, *weight.shape).sum(0), None
        # The LayerNorm's gradient with mean 0, less the part that came of subtracting the mean.
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        return dx.add_((dy @ weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1])), dweight, None


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with weight and, if asked for, bias, in float32, returned in x's dtype.

    Under autocast on a GPU it is returned in autocast's, so that no reader has to cast it.
    """

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = False, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Weight 1 and bias 0: the norm starts as the bare norm."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        found = row_norm(x, self.weight, self.bias, eps=self.eps, centre=True) if kernels(x) else None
        return self._plain(x) if found is None else found[0]

    def after(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and x + y; y None adds nothing."""
        found = row_norm(x, self.weight, self.bias, eps=self.eps, centre=True, y=y)
        if found is not None:
            return found
        x = x if y is None else x + y
        return self._plain(x), x

    def _plain(self, x):
        wide, weight, bias = _wide(x), self.weight, self.bias
        bias = None if bias is None else cast(bias, wide.dtype)
        y = torch.layer_norm(wide, weight.shape, cast(weight, wide.dtype), bias, self.eps)
        return cast(y, x.dtype)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


class HeadNorm(nn.Module):
    """LayerNorm of every head by itself: (..., H, D) -> (..., H·D), in float32, returned in x's dtype.

    What stands between the norm and the next map may come along, see `exlstm.ops.norm.head_norm`.
    """

    def __init__(self, n_heads: int, d_head: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__()
        if d_head == 1:
            warnings.warn(
                f"{n_heads} heads of 1 unit: a norm over one number is always 0, so they say nothing", stacklevel=3
            )
        self.n_heads, self.d_head, self.eps = n_heads, d_head, eps
        self.weight = nn.Parameter(torch.empty(n_heads * d_head, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Ones: the norm starts as the bare norm."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        activation: str = "sigmoid",
        skip: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (..., H, D), gate (..., H·D) or None, skip a pair whose product is added before the gate -> (..., H·D)."""
        return head_norm(x, self.weight, gate, eps=self.eps, activation=activation, skip=skip)

    def decode(self, x):
        """The same for an array of one token, (B, H, D) -> (B, H·D)."""
        y = torch.layer_norm(torch.from_numpy(x), (self.d_head,), None, None, self.eps).numpy().reshape(len(x), -1)
        return np.multiply(y, parameter(self, "weight"), out=y)

    def extra_repr(self):
        return f"{self.n_heads}, {self.d_head}, eps={self.eps}"


def _wide(x):
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def init_linear(weight: Tensor, gain: float = 1.0):
    """Normal with std gain · sqrt(2 / (5 · inputs)) (Nguyen and Salazar, arXiv 1910.05895), the start of every linear map.

    Inputs come from a norm with unit variance, so outputs start with std 0.63: no gate and no softmax saturates.
    """
    nn.init.normal_(weight, std=gain * (2 / (5 * weight.shape[-1])) ** 0.5)


def ends(forget_bias) -> tuple:
    """A bias at the first and at the last of several places. ValueError: these are not two."""
    if not isinstance(forget_bias, tuple | list) or len(forget_bias) != 2:
        raise ValueError(f"forget_bias is {forget_bias!r}, wanted two numbers: at the first place and at the last")
    return tuple(forget_bias)


def width(ratio: float, d_model: int, multiple: int = 64) -> int:
    """ratio · d_model, rounded up to a multiple (of what matrix units like)."""
    check_sizes(multiple=multiple)
    # Rounded first, so that 8/3 · 96 = 256.00000000000006 does not become 320.
    return math.ceil(round(ratio * d_model / multiple, 6)) * multiple


def maps(x: Tensor, *linears: nn.Module, wide: nn.Module | None = None) -> tuple[Tensor, ...]:
    """linear(x) of every one, and at the end wide(x), which is worked out in float32 whatever the autocast.

    On a GPU plain ones without bias run together in training, see `exlstm.ops.maps`: x is cast and kept once.
    """
    plain = kernels(x) and all(bare(linear) and linear.bias is None for linear in linears)
    if plain and (wide is None or bare(wide)):
        own = () if wide is None else (wide.weight, wide.bias)
        found = joint.maps(x, [linear.weight for linear in linears], *own)
        if found is not None:
            return found if wide is None else (*found[1:], found[0])
    ys = tuple(linear(x) for linear in linears)
    return ys if wide is None else (*ys, wide_map(wide, x))


def wide_map(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), worked out in float32 whatever the autocast."""
    with exact(x.device):
        dtype = torch.promote_types(x.dtype, torch.float32)
        if bare(linear):
            return F.linear(cast(x, dtype), cast(linear.weight, dtype), cast(linear.bias, dtype))
        # Somebody listens, or has put a layer of theirs in its place, as a LoRA adapter is, or a quantised map, whose weight
        # is a call.
        weight = getattr(linear, "weight", None)
        return cast(linear(cast(x, weight.dtype if isinstance(weight, Tensor) else dtype)), dtype)


def bare(linear: nn.Module) -> bool:
    """Whether it is a linear map and nobody listens to it."""
    return type(linear) is nn.Linear and not hooked(linear)


class SwiGLU(nn.Module):
    """out(silu(gate(x)) · up(x)) (arXiv 2002.05202): (..., d_model) -> (..., d_model)."""

    def __init__(self, d_model: int, d_hidden: int, *, device=None, dtype=None):
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(d_hidden, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        """As `init_linear` says."""
        for linear in (self.gate, self.up, self.out):
            init_linear(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if is_light(x, self.gate._parameters.get("weight")):
            return _light_gated(self, x, F.silu)
        return self.out(gated(*maps(x, self.gate, self.up)))


class GatedGELU(nn.Module):
    """out(gelu(gate(x)) · up(x)) (arXiv 2002.05202): (..., d_model) -> (..., d_model)."""

    def __init__(self, d_model: int, d_hidden: int, *, device=None, dtype=None):
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(d_hidden, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        """As `init_linear` says."""
        for linear in (self.gate, self.up, self.out):
            init_linear(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if is_light(x, self.gate._parameters.get("weight")):
            return _light_gated(self, x, F.gelu)
        return self.out(gated(*maps(x, self.gate, self.up), "gelu"))


@token_errors
def _light_gated(ffn, x, activation):
    """A feed-forward of few tokens, see `is_light`."""
    rows = array(x).reshape(-1, x.shape[-1])
    y = array(activation(torch.from_numpy(project(ffn.gate, rows))))
    y *= project(ffn.up, rows)
    return torch.from_numpy(project(ffn.out, y).reshape(x.shape))


class CausalConv(nn.Module):
    """Each channel's causal convolution over its last `width` tokens, see `exlstm.ops.conv.causal_conv`."""

    def __init__(self, d: int, width: int = 4, *, device=None, dtype=None):
        super().__init__()
        if width < 1:
            raise ValueError(f"the convolution's width is {width}, wanted at least 1 token")
        self.weight = nn.Parameter(torch.empty(d, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform in ±sqrt(1 / width), as nn.Conv1d: each channel mixes its tokens in its own way. Bias 0."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, width-1, D) or None -> y (B, T, D) and the next state."""
        return causal_conv(x, self.weight, self.bias, state, reset=reset, mask=mask, activation=activation)

    def decode(self, x, state):
        """The same for an array of one token: x (B, D) -> SiLU(y) (B, D), and the next state as a tensor."""
        y, state = decode(x, parameter(self, "weight"), parameter(self, "bias"), array(state))
        return silu(y), torch.from_numpy(state)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}"


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): x where it is small, never beyond ±cap; a cap of 0 leaves x as it is."""
    return cap * torch.tanh(x / cap) if cap else x


def check_sizes(**sizes):
    """ValueError where one of a layer's sizes is no whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}, wanted a whole number of at least 1")


def check_input(x: Tensor, d_model: int, reader: nn.Module | None = None, name: str = "weight"):
    """ValueError where a layer's input is not (B, T, d_model) with at least one row and token, or not on the device of the
    parameter `name` of `reader`, the first map of the layer; TypeError where their dtypes differ and no autocast helps."""
    check_tensors(x=x)
    if x.ndim != 3 or x.shape[-1] != d_model or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (B, T, {d_model}) with no axis empty")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, wanted a floating dtype")
    weight = None if reader is None else reader._parameters.get(name)
    if elsewhere(weight, x):
        raise ValueError(f"x is on {x.device} and the layer's weights are on {weight.device}, wanted one device")
    # Weights of whole numbers or of one byte belong to a quantised map, which reads what it likes.
    if weight is None or weight.dtype == x.dtype or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return
    if not autocasts(x.device):
        raise TypeError(f"x is {x.dtype} and the layer's weights are {weight.dtype}, wanted one dtype, or autocast")


def valid_mask(lengths, mask: Tensor | None, batch: int, time: int, device) -> Tensor | None:
    """The mask (B, T) of the valid tokens, from `lengths` (B,) of right-padded rows, a mask, both or neither.

    Raises:
        ValueError: lengths that are not B whole numbers from 0 to T (their range is read on a CPU only: an accelerator
            would have to wait for it), or a mask that is not bool of (B, T) on `device`.
    """
    if mask is not None:
        check_tensors(mask=mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, time) or mask.device != device):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}, "
            f"wanted bool of (B, T) = {(batch, time)} on {device}"
        )
    if lengths is None:
        return mask
    try:
        lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"lengths is {type(lengths).__name__}, wanted a tensor or list of whole numbers (B,)") from None
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}, wanted whole numbers of (B,) = ({batch},)"
        )
    if lengths.device.type == "cpu" and not traced():
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > time:
            raise ValueError(f"lengths go from {low} to {high}, wanted 0 to T = {time}")
    valid = torch.arange(time, device=device) < lengths.to(device)[:, None]  # (B, T)
    return valid if mask is None else valid & mask


def parts(state, *names: str) -> tuple | list:
    """The parts of a layer's state by their number, Nones where it is None. ValueError: it is no state of this layer."""
    if state is None:
        return (None,) * len(names)
    if not isinstance(state, tuple | list) or len(state) != len(names):
        raise ValueError(
            f"state is {type(state).__name__}, wanted the {len(names)} parts {', '.join(names)} of an earlier call"
        )
    return state
