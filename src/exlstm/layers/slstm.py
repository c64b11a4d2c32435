"""sLSTM layer (xLSTM, arXiv 2405.04517, figure 10): scalar memories whose gates see the last output of their head.

g̃ = W_g x (+ conv) + b_g + R_g h_{t-1} for g = i, f, z, o      y = norm_head(slstm(g̃))
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from exlstm.layers.basic import CausalConv, HeadNorm, check_input, check_sizes, ends, init_linear, parts, valid_mask
from exlstm.layers.token import array, is_token, parameter, token_errors
from exlstm.ops.backend import blanked
from exlstm.ops.slstm import SLSTMState, slstm
from exlstm.ops.slstm.cpu import decode, recurrent


class sLSTM(nn.Module):
    """Scalar memory with memory mixing over (B, T, d_model); state is (inputs of the convolution or None, SLSTMState).

    Args:
        d_model: width of input and output, d_model / n_heads a head.
        n_heads: heads; memory mixes inside a head only.
        conv: width of the causal convolution (SiLU behind it) that feeds the input and forget gates, 0 for none.
        dense: input maps over the whole width; False: one block a head, as in the paper.
        forget_bias: the forget gates' bias at the start, at the first unit of a head and at its last, even steps between.
            As it is, states are tracked in words of any length; (5, -5) finds sooner what has to be remembered untouched.
        recurrent_start: size of the recurrent maps at the start, times an orthogonal one (0: they have to grow first).

    >>> y, state = sLSTM(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        *,
        conv: int = 0,
        dense: bool = False,
        forget_bias: tuple[float, float] = (-2.0, -2.0),
        recurrent_start: float = 1.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if not 0 <= recurrent_start < float("inf"):
            raise ValueError(f"recurrent_start is {recurrent_start}, wanted a finite number of at least 0")
        head = d_model // n_heads
        self.d_model, self.n_heads, self.dense = d_model, n_heads, dense
        self.forget_bias, self.recurrent_start = ends(forget_bias), recurrent_start
        new = {"device": device, "dtype": dtype}
        self.conv = CausalConv(d_model, conv, **new) if conv else None
        # Rows: the gates i, f, z, o of a head, then the next head.
        self.w = nn.Parameter(torch.empty(n_heads, 4 * head, d_model if dense else head, **new))
        self.b = nn.Parameter(torch.empty(n_heads, 4, head, **new))
        self.r = nn.Parameter(torch.empty(n_heads, 4, head, head, **new))
        self.norm = HeadNorm(n_heads, head, eps=1e-5, **new)
        # The gates are rows of one map: of a head, or of all heads where they read the same.
        self.matrices = {"w": 0 if dense else 1, "r": 1}
        self.recurrent = ("r",)
        self.shapes = ((conv - 1, d_model),) * bool(conv) + ((n_heads, head),) * 4  # of a row's state
        self.reset_parameters()

    def reset_parameters(self):
        init_linear(self.w)
        # Recurrent maps that carry h on whole, and forget gates that start nearly shut: what is remembered then goes through
        # R h and does the same at step 1,000 as at step 10. A memory that only adds up, behind an open gate, weighs a step
        # by 1 / t: it learns the short words it is trained on and loses count in longer ones. R = 0 tracks no state at all,
        # and maps that start there find it later.
        with torch.no_grad():
            for gate in self.r.flatten(0, 1):
                gate.copy_(self.recurrent_start * nn.init.orthogonal_(torch.empty_like(gate, dtype=torch.float32)))
            nn.init.zeros_(self.b)
            self.b[:, 1].copy_(torch.linspace(*self.forget_bias, self.b.shape[-1], device=self.b.device))
        self.norm.reset_parameters()
        if self.conv is not None:
            self.conv.reset_parameters()

    def _project(self, x, w, b):
        """x (B, T, D) through rows w (H, R, D or D / H) and bias b (H, R): (B, T, H, R)."""
        if self.dense:
            return F.linear(x, w.flatten(0, 1), b.flatten()).unflatten(-1, b.shape)
        heads = x.unflatten(-1, (self.n_heads, -1)).flatten(0, 1).transpose(0, 1)  # (H, B·T, D / H)
        y = torch.baddbmm(b[:, None].to(w.dtype), heads, w.transpose(1, 2))  # (H, B·T, R)
        return y.unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)

    def pre_activations(self, x, conv=None, *, mask=None, reset=None):
        """Gates without their recurrent part (B, T, H, 4, D / H), and the convolution's state."""
        bias = self.b.flatten(1)
        if self.conv is None:
            return self._project(x, self.w, bias).unflatten(-1, (4, -1)), None
        c, conv = self.conv(x, conv, mask=mask, reset=reset, activation="silu")
        (w_if, w_zo), (b_if, b_zo) = self.w.chunk(2, 1), bias.chunk(2, 1)
        parts = self._project(c, w_if, b_if), self._project(x, w_zo, b_zo)
        return torch.cat(parts, -1).unflatten(-1, (4, -1)), conv

    @token_errors
    def _token(self, x, conv, memory):
        """`forward` for an array of one token (B, D), in NumPy."""
        w, h = parameter(self, "w"), array(memory[0])
        c, half = x, w.shape[1] // 2 if self.conv is not None else 0
        if self.conv is not None:
            c, conv = self.conv.decode(x, conv)
        c, x = (t if self.dense else t.reshape(h.shape).swapaxes(0, 1) for t in (c, x))  # (H, B, D / H)
        g = np.empty((self.n_heads, len(h), w.shape[1]), x.dtype)  # (H, B, R)
        np.matmul(c, w[:, :half].swapaxes(1, 2), out=g[..., :half])
        np.matmul(x, w[:, half:].swapaxes(1, 2), out=g[..., half:])
        g = g.reshape(self.n_heads, len(h), 4, -1)
        g += parameter(self, "b")[:, None]
        g += recurrent(h, parameter(self, "r"))
        memory = decode(g, *memory[1:])
        return torch.from_numpy(self.norm.decode(memory[0].numpy())[:, None]), (conv, SLSTMState(*memory))

    def forward(self, x, state=None, *, lengths=None, mask=None, reset=None):
        check_input(x, self.d_model, self, "w")
        mask = valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        conv, memory = parts(state, "conv", "memory")
        skipped, weight = (self.conv, self.norm), self._parameters.get("w")
        if is_token(x, weight, mask, reset, conv, memory, self, skipped=skipped):
            return self._token(array(x)[:, 0], conv, memory)
        g, conv = self.pre_activations(x, conv, mask=mask, reset=reset)
        h, memory = slstm(g, self.r, memory, reset=reset, mask=mask)
        return self.norm(h), (conv, memory)

    def extra_repr(self):
        return f"{self.d_model}, n_heads={self.n_heads}, dense={self.dense}"
