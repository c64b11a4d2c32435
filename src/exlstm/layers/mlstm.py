"""mLSTM layer as in xLSTM 7B (arXiv 2503.13427, section 3): dense maps, one gate pair a head, gated output.

q, k = W_q x', W_k x'  (x' = SiLU(conv(x)), or x)    v, o = W_v x, W_o x    ĩ, f̃ = cap·tanh((W x + b) / cap)
y = W_out (norm_head(mlstm(q, k, v, log_i, logsigmoid f̃)) ⊙ sigmoid(o))
With `conv_all` v, ĩ and f̃ are of x', too.
log_i = ĩ, the exponential gate of xLSTM, or logsigmoid ĩ (arXiv 2503.14376, section 4); with the normaliser or without it
"""

import numpy as np
import torch
from torch import nn

from exlstm.layers.basic import (
    CausalConv,
    HeadNorm,
    check_input,
    check_sizes,
    ends,
    init_linear,
    maps,
    parts,
    soft_cap,
    valid_mask,
)
from exlstm.layers.token import array, is_token, parameter, project, token_errors
from exlstm.ops.backend import blanked, exact, log_sigmoid
from exlstm.ops.mlstm import MLSTMState, mlstm
from exlstm.ops.mlstm.cpu import decode

# log_i of its pre-activation: the operator takes gates in log space.
INPUT_GATES = {"exp": lambda i: i, "sigmoid": log_sigmoid}


def check_gate(kind: str):
    """ValueError for an input gate that there is not."""
    if kind not in INPUT_GATES:
        raise ValueError(f"i_gate is {kind!r}, wanted {' or '.join(INPUT_GATES)}")


def token_gates(pre, kind: str):
    """log_i, log_f (B, 2, H) of one token's pre-activations, an array (B, 2 H), in its memory."""
    gates = pre.reshape(len(pre), 2, -1)
    x = gates[:, 1:] if kind == "exp" else gates
    np.negative(x, out=x)
    np.logaddexp(0, x, out=x)
    np.negative(x, out=x)
    return gates


class mLSTM(nn.Module):
    """Matrix memory over (B, T, d_model); state is (inputs of the convolution or None, MLSTMState).

    Args:
        d_model: width of input and output; also of the values, d_model / n_heads a head.
        n_heads: memories side by side.
        qk_ratio: width of queries and keys over the width of values.
        conv: width of the causal convolution in front of q and k, 0 for none.
        conv_all: whether values and gates, too, come out of the convolution: all but the output gate.
        gate_cap: soft cap of the gates' pre-activations in nats, 0 for none.
        i_bias: bias of the input gate at the start, in nats. Far below -5 what is read is smaller than the root of the head
            norm's epsilon, and the gradients of q, k and v with it.
        forget_bias: bias of the forget gates at the start, at the first head and at the last, even steps between.
        out_start: size of the output map at the start, over that of the other maps.
        i_gate: "exp", or "sigmoid" for an input gate that never exceeds 1.
        normalize: divide what is read by max(|q·n|, 1); without it the memory is gated linear attention.

    >>> y, state = mLSTM(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        *,
        qk_ratio: float = 0.5,
        conv: int = 4,
        conv_all: bool = False,
        gate_cap: float = 15.0,
        i_bias: float = -2.0,
        forget_bias: tuple[float, float] = (0.0, 6.0),
        out_start: float = 0.1,
        eps: float = 0.0,
        i_gate: str = "exp",
        normalize: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        check_gate(i_gate)
        keys = round(d_model // n_heads * qk_ratio)
        if keys < 1:
            raise ValueError(
                f"qk_ratio {qk_ratio} leaves no features to the keys of {n_heads} heads in d_model {d_model}"
            )
        self.d_model, self.n_heads, self.gate_cap, self.i_bias, self.eps = d_model, n_heads, gate_cap, i_bias, eps
        self.forget_bias, self.out_start = ends(forget_bias), out_start
        self.i_gate, self.normalize, self.conv_all = i_gate, normalize, conv_all
        new = {"device": device, "dtype": dtype}
        self.conv = CausalConv(d_model, conv, **new) if conv else None
        self.q = nn.Linear(d_model, n_heads * keys, bias=False, **new)
        self.k = nn.Linear(d_model, n_heads * keys, bias=False, **new)
        self.v = nn.Linear(d_model, d_model, bias=False, **new)
        self.o = nn.Linear(d_model, d_model, bias=False, **new)
        self.gate = nn.Linear(d_model, 2 * n_heads, **new)  # rows: input gates, forget gates
        self.norm = HeadNorm(n_heads, d_model // n_heads, **new)
        self.out = nn.Linear(d_model, d_model, bias=False, **new)
        head, past = d_model // n_heads, ((conv - 1, d_model),) * bool(conv)
        self.shapes = (*past, (n_heads, keys, head), (n_heads, keys), (n_heads,))  # of a row's state
        self.reset_parameters()

    def reset_parameters(self):
        for linear in (self.q, self.k, self.v, self.o):
            init_linear(linear.weight)
        # Behind the head norm even what an untrained memory mixes up has its full size: heard aloud it hides what is near.
        init_linear(self.out.weight, self.out_start)
        # At the start the gates ignore the input: heads differ by how long they remember (0: 2 tokens, 6: 400).
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias[: self.n_heads].fill_(self.i_bias)
            forget = self.gate.bias[self.n_heads :]
            forget.copy_(torch.linspace(*self.forget_bias, self.n_heads, device=forget.device))
        self.norm.reset_parameters()
        if self.conv is not None:
            self.conv.reset_parameters()

    def gates(self, pre):
        """log_i, log_f (B, T, H) of their pre-activations (B, T, 2 H), in float32 whatever the autocast: a bfloat16 step at
        10 nats is 6 %."""
        with exact(pre.device):
            i, f = soft_cap(pre, self.gate_cap).chunk(2, -1)
            return INPUT_GATES[self.i_gate](i), log_sigmoid(f)

    @token_errors
    def _token(self, x, conv, memory):
        """`forward` for an array of one token (B, D), in NumPy."""
        batch, heads, mixed = len(x), self.n_heads, x
        if self.conv is not None:
            mixed, conv = self.conv.decode(x, conv)
        q, k = (project(linear, mixed).reshape(batch, heads, -1) for linear in (self.q, self.k))  # (B, H, K)
        late = mixed if self.conv_all else x
        v = project(self.v, late).reshape(batch, heads, -1)  # (B, H, V)
        pre = np.matmul(late, parameter(self.gate, "weight").T)  # (B, 2 H)
        pre += parameter(self.gate, "bias")
        if self.gate_cap:
            pre = self.gate_cap * np.tanh(pre / self.gate_cap)
        gates = token_gates(pre, self.i_gate)
        h, *memory = decode(q, k, v, gates, *memory, q.shape[-1] ** -0.5, self.normalize, self.eps)
        y = self.norm.decode(h)
        y /= 1 + np.exp(-project(self.o, x))
        return torch.from_numpy(project(self.out, y)[:, None]), (conv, MLSTMState(*memory))

    def forward(self, x, state=None, *, lengths=None, mask=None, reset=None):
        check_input(x, self.d_model, self.v)
        mask = valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        conv, memory = parts(state, "conv", "memory")
        skipped, weight = (self.conv, self.gate, self.norm), self.gate._parameters.get("weight")
        if is_token(x, weight, mask, reset, conv, memory, self, skipped=skipped):
            return self._token(array(x)[:, 0], conv, memory)
        mixed = x
        if self.conv is not None:
            mixed, conv = self.conv(x, conv, mask=mask, reset=reset, activation="silu")
        if self.conv_all:
            (q, k, v, pre), (o,) = maps(mixed, self.q, self.k, self.v, wide=self.gate), maps(x, self.o)
        else:
            (q, k), (v, o, pre) = maps(mixed, self.q, self.k), maps(x, self.v, self.o, wide=self.gate)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in (q, k, v))  # (B, T, H, K) twice, (B, T, H, V)
        h, memory = mlstm(
            q, k, v, *self.gates(pre), memory, reset=reset, mask=mask, normalize=self.normalize, eps=self.eps
        )
        y = self.out(self.norm(h, o))
        return y, (conv, memory)

    def extra_repr(self):
        return f"{self.d_model}, n_heads={self.n_heads}"
