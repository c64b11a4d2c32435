"""mLSTM beside a sliding window with sink tokens, mixed head by head (after arXiv 2603.15590): exact near, compressed far.

q, k = W_q x', W_k x'  (x' = SiLU(conv(x)), or x)    v, o = W_v x, W_o x    ĩ, f̃ = cap·tanh((W x + b) / cap)
g = sigmoid(W_g [q, k, v])  (a number a head)        m = norm_head(mlstm(q, k, v, ĩ, logsigmoid f̃))
a = norm_head(softmax over the window and the sinks of rotated q, k, v)
y = W_out ((g m + (1 - g) a) ⊙ sigmoid(o))

Both sides read the same queries, keys and values. There they have no norm; here each side has one, because what the mLSTM reads
grows with its input gate, and the gate between the sides would otherwise have to bridge powers of e.
"""

import torch
from torch import nn

from exlstm.layers.attention import Heads
from exlstm.layers.basic import (
    CausalConv,
    HeadNorm,
    check_input,
    check_sizes,
    ends,
    init_linear,
    parts,
    soft_cap,
    valid_mask,
    wide_map,
)
from exlstm.ops.backend import blanked, check_companions, exact, log_sigmoid
from exlstm.ops.mlstm import mlstm


class mLSTMWindow(nn.Module):
    """Matrix memory and a window side by side over (B, T, d_model); state is (inputs of the convolution or None, MLSTMState,
    AttentionState), which stops growing at window - 1 + sinks tokens.

    Args:
        d_model: width of input and output; also of the values, d_model / n_heads a head.
        n_heads: memories and windows side by side.
        window: tokens that the attention sees, itself included.
        sinks: first tokens of the document that stay visible beyond the window (arXiv 2309.17453).
        rope_base: base of the window's rotary positions, 0 for none; the memory reads no positions.
        qk_ratio, conv, gate_cap, i_bias, forget_bias, out_start: as in mLSTM.

    >>> y, state = mLSTMWindow(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        *,
        window: int = 512,
        sinks: int = 4,
        rope_base: float = 10000.0,
        qk_ratio: float = 0.5,
        conv: int = 4,
        gate_cap: float = 15.0,
        i_bias: float = -2.0,
        forget_bias: tuple[float, float] = (0.0, 6.0),
        out_start: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        head = d_model // n_heads
        keys = round(head * qk_ratio)
        if keys < 1:
            raise ValueError(
                f"qk_ratio {qk_ratio} leaves no features to the keys of {n_heads} heads in d_model {d_model}"
            )
        if window < 1:
            raise ValueError(f"window is {window}, wanted at least 1 token")
        self.d_model, self.n_heads, self.gate_cap = d_model, n_heads, gate_cap
        self.i_bias, self.forget_bias, self.out_start = i_bias, ends(forget_bias), out_start
        new = {"device": device, "dtype": dtype}
        self.conv = CausalConv(d_model, conv, **new) if conv else None
        self.q = nn.Linear(d_model, n_heads * keys, bias=False, **new)
        self.k = nn.Linear(d_model, n_heads * keys, bias=False, **new)
        self.v = nn.Linear(d_model, d_model, bias=False, **new)
        self.o = nn.Linear(d_model, d_model, bias=False, **new)
        self.gate = nn.Linear(d_model, 2 * n_heads, **new)  # rows: input gates, forget gates
        self.side = nn.Linear(2 * n_heads * keys + d_model, n_heads, **new)
        self.attend = Heads(keys, rope_base, window, sinks)
        self.memory_norm = HeadNorm(n_heads, head, **new)
        self.window_norm = HeadNorm(n_heads, head, **new)
        self.out = nn.Linear(d_model, d_model, bias=False, **new)
        self.reset_parameters()

    def reset_parameters(self):
        for linear in (self.q, self.k, self.v, self.o):
            init_linear(linear.weight)
        init_linear(self.out.weight, self.out_start)
        # At the start the gates ignore the input: heads differ by how long they remember, and either side has half a say.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.side.weight)
        nn.init.zeros_(self.side.bias)
        with torch.no_grad():
            self.gate.bias[: self.n_heads].fill_(self.i_bias)
            forget = self.gate.bias[self.n_heads :]
            forget.copy_(torch.linspace(*self.forget_bias, self.n_heads, device=forget.device))
        for part in (self.memory_norm, self.window_norm, self.conv):
            if part is not None:
                part.reset_parameters()

    def gates(self, x):
        """log_i, log_f (B, T, H) of x (B, T, D), in float32 whatever the autocast."""
        pre = wide_map(self.gate, x)
        with exact(x.device):
            log_i, f = soft_cap(pre, self.gate_cap).chunk(2, -1)
            return log_i, log_sigmoid(f)

    def filled(self, state):
        conv, memory, seen = state
        return conv, memory, self.attend.filled(seen)

    def forward(self, x, state=None, *, lengths=None, mask=None, reset=None):
        check_input(x, self.d_model, self.v)
        mask = valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        check_companions(x, reset, None, {})
        conv, memory, seen = parts(state, "conv", "memory", "window")
        mixed = x
        if self.conv is not None:
            mixed, conv = self.conv(x, conv, mask=mask, reset=reset, activation="silu")
        q, k, v = self.q(mixed), self.k(mixed), self.v(x)
        g = torch.sigmoid(self.side(torch.cat((q, k, v), -1)))  # (B, T, H)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))  # (B, T, H, ·)
        h, memory = mlstm(q, k, v, *self.gates(x), memory, reset=reset, mask=mask)
        a, seen = self.attend(q, k, v, seen, mask=mask, reset=reset)
        g = g.repeat_interleave(self.d_model // self.n_heads, -1)  # (B, T, D)
        y = torch.lerp(self.window_norm(a), self.memory_norm(h), g.to(h.dtype)) * torch.sigmoid(self.o(x))
        return self.out(y), (conv, memory, seen)
