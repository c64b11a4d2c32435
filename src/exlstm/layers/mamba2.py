"""Mamba-2 (arXiv 2405.21060, section 7): a gated state space layer, run on the mLSTM operator without normaliser.

z, x, B, C, dt = W_in u      x, B, C = SiLU(conv(x, B, C))      Δ = softplus(dt + bias)      A = -exp(A_log)
S_t = exp(Δ A) S_{t-1} + Δ B_t x_tᵀ      y_t = S_tᵀ C_t + D x_t      out = W_out RMSNorm(y ⊙ SiLU(z))

That is mlstm(q = C, k = B, v = x, log_i = log Δ, log_f = Δ A, scale = 1, normalize = False); all heads share B and C.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.layers.basic import (
    CausalConv,
    RMSNorm,
    check_input,
    check_sizes,
    init_linear,
    maps,
    parts,
    valid_mask,
    wide_map,
)
from exlstm.ops.backend import blanked, exact
from exlstm.ops.gated import gated
from exlstm.ops.mlstm import MLSTMState, mlstm

DT_LEAST, DT_MOST = 1e-3, 0.1


class Mamba2(nn.Module):
    """State space layer over (B, T, d_model); state is (inputs of the convolution or None, MLSTMState).

    Args:
        d_model: width of input and output.
        d_state: width of the state a channel.
        head_dim: channels that share one decay; where it does not divide the inner width, the largest divisor below it.
        expand: inner width over d_model.
        conv: width of the causal convolution over x, B and C; 0 for none.

    >>> y, state = Mamba2(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        head_dim: int = 64,
        expand: float = 2.0,
        conv: int = 4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, head_dim=head_dim)
        inner = round(expand * d_model)
        if inner < 1 or d_state < 1 or head_dim < 1:
            raise ValueError(
                f"expand {expand}, d_state {d_state} and head_dim {head_dim}, wanted at least one channel of each"
            )
        head_dim = next(d for d in range(min(head_dim, inner), 0, -1) if inner % d == 0)
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.inner, self.n_heads = inner, inner // head_dim
        new = {"device": device, "dtype": dtype}
        self.z = nn.Linear(d_model, inner, bias=False, **new)
        self.xbc = nn.Linear(d_model, inner + 2 * d_state, bias=False, **new)
        self.dt = nn.Linear(d_model, self.n_heads, **new)
        self.conv = CausalConv(inner + 2 * d_state, conv, **new) if conv else None
        self.a_log = nn.Parameter(torch.empty(self.n_heads, **new))
        self.d = nn.Parameter(torch.empty(self.n_heads, **new))
        self.norm = RMSNorm(inner, **new)
        self.out = nn.Linear(inner, d_model, bias=False, **new)
        self.reset_parameters()

    def reset_parameters(self):
        """Maps as `init_linear` says. As in the paper, heads start with memories of 1 to 1,000 tokens: A uniform in
        [-16, -1], and Δ, where its input adds 0, log-uniform in [0.001, 0.1]. D = 1 passes x through."""
        for linear in (self.z, self.xbc, self.dt, self.out):
            init_linear(linear.weight)
        with torch.no_grad():
            self.a_log.uniform_(1, 16).log_()
            dt = (
                torch.empty_like(self.dt.bias, dtype=torch.float32)
                .uniform_(math.log(DT_LEAST), math.log(DT_MOST))
                .exp_()
            )
            # The inverse of softplus.
            self.dt.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.ones_(self.d)
        self.norm.reset_parameters()
        if self.conv is not None:
            self.conv.reset_parameters()

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log Δ and Δ A (B, T, H) of u (B, T, d_model), in float32 even under autocast: Δ A adds up over steps."""
        dt = wide_map(self.dt, u)
        with exact(u.device):
            # softplus underflows far below zero, where its logarithm is dt itself.
            log_dt = torch.where(dt < -15, dt, F.softplus(dt.clamp(min=-15)).log())
            return log_dt, -log_dt.exp() * self.a_log.to(dt.dtype).exp()

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor | None, MLSTMState] | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, MLSTMState]]:
        check_input(x, self.d_model, self.xbc)
        mask = valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        conv, memory = parts(state, "conv", "memory")
        z, mixed = maps(x, self.z, self.xbc)
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, conv = self.conv(mixed, conv, mask=mask, reset=reset, activation="silu")
        v, k, q = mixed.split([self.inner, self.d_state, self.d_state], -1)
        v = v.unflatten(-1, (self.n_heads, -1))  # (B, T, H, head_dim)
        q, k = (s.unsqueeze(2).expand(-1, -1, self.n_heads, -1) for s in (q, k))  # (B, T, H, d_state)
        y, memory = mlstm(q, k, v, *self.gates(x), memory, reset=reset, mask=mask, scale=1.0, normalize=False)
        y = torch.addcmul(y, v, self.d.to(y.dtype)[:, None])
        return self.out(self.norm(gated(z, y.flatten(-2)))), (conv, memory)
