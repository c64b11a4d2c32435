"""mLSTM layer in the form of the first xLSTM paper (arXiv 2405.04517, figure 11): the memory works in a wider space.

u, z = W_up x      c = SiLU(conv(u))      q, k = W_q c, W_k c      v = W_v u      (W_q, W_k, W_v block-diagonal)
ĩ, f̃ = W [q, k, v] + b      y = W_down ((norm_head(mlstm(q, k, v, ĩ, logsigmoid f̃)) + skip ⊙ c) ⊙ SiLU(z))
Input gate and normaliser can be had otherwise, as in mlstm.py.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from exlstm.layers.basic import (
    CausalConv,
    HeadNorm,
    bare,
    check_input,
    check_sizes,
    ends,
    init_linear,
    parts,
    valid_mask,
    wide_map,
    width,
)
from exlstm.layers.mlstm import INPUT_GATES, check_gate, token_gates
from exlstm.layers.token import array, as_built, is_token, parameter, project, silu, token_errors
from exlstm.ops.backend import autocasts, blanked, cast, exact, log_sigmoid, traced
from exlstm.ops.mlstm import MLSTMState, mlstm
from exlstm.ops.mlstm.cpu import decode


def _join(blocks, side):
    """Blocks (N, out, in) as fewer and larger ones (N', side, side), zeros beside the diagonal."""
    count = side // blocks.shape[1]
    blocks = blocks.unflatten(0, (-1, count)).unsqueeze(3)  # (N', count, out, 1, in)
    eye = torch.eye(count, device=blocks.device, dtype=blocks.dtype).view(count, 1, count, 1)
    return (blocks * eye).reshape(-1, side, side)


class _Maps(torch.autograd.Function):
    """q, k = c W_q, c W_k; v = u W_v; g = c F_cᵀ + u F_uᵀ + b with its gradient by hand: as few products as there can be.

    c, u (n, inner)    w (3, N, side in, side out)    f (2, 2 H, inner)    q, k, v (N, n, side), g (n, 2 H)
    Forward and backward at n 1,024, inner 256, float32, two CPU cores: 5.1 ms, by autograd 6.4.
    """

    @staticmethod
    def forward(ctx, c, u, w, f, b):
        ctx.save_for_backward(c, u, w, f)
        c_blocks, u_blocks = (_blocks(x, w) for x in (c, u))
        qk, v = torch.bmm(c_blocks, torch.cat((w[0], w[1]), -1)), torch.bmm(u_blocks, w[2])
        return *qk.chunk(2, -1), v, torch.addmm(b, c, f[0].t()).addmm_(u, f[1].t())

    @staticmethod
    def backward(ctx, dq, dk, dv, dg):
        c, u, w, f = ctx.saved_tensors
        dc, du = dg @ f[0], dg @ f[1]
        _blocks(dc, w).add_(torch.bmm(dq, w[0].mT).baddbmm_(dk, w[1].mT))
        _blocks(du, w).add_(torch.bmm(dv, w[2].mT))
        pairs = ((c, dq), (c, dk), (u, dv))
        dw = torch.stack([torch.bmm(_blocks(x, w).mT, dy) for x, dy in pairs])
        return dc, du, dw, torch.stack((dg.t() @ c, dg.t() @ u)), dg.sum(0)


def _blocks(x, w):
    """x (n, inner) as the inputs of the blocks w (map, N, side in, side out): (N, n, side in), a view."""
    return x.view(len(x), w.shape[1], w.shape[2]).transpose(0, 1)


class mLSTMUp(nn.Module):
    """Matrix memory between a projection up and a projection down; state is (inputs of the convolution, MLSTMState).

    Args:
        d_model: width of input and output.
        n_heads: memories side by side.
        up_ratio: inner width over d_model, rounded up to a multiple of `multiple`.
        conv: width of the causal convolution in front of q and k.
        qkv_block: side of the small blocks of the q, k and v maps.
        eps: added to the stabilised denominator; only weights trained elsewhere want it.
        m_start: stabiliser of an empty memory where there is no state, in nats; behind a reset it is 0. With an eps of 0 it
            changes nothing.
        forget_bias, i_gate, normalize: as in mLSTM.

    >>> y, state = mLSTMUp(64)(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        *,
        up_ratio: float = 2.0,
        conv: int = 4,
        qkv_block: int = 4,
        eps: float = 0.0,
        m_start: float = 0.0,
        forget_bias: tuple[float, float] = (0.0, 6.0),
        i_gate: str = "exp",
        normalize: bool = True,
        multiple: int = 64,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads, qkv_block=qkv_block)
        inner = width(up_ratio, d_model, multiple)
        if inner < 1:
            raise ValueError(f"up_ratio {up_ratio} leaves no inner width, wanted more than 0")
        if inner % n_heads or inner % qkv_block:
            raise ValueError(f"the inner width {inner} is not divisible by n_heads {n_heads} and qkv_block {qkv_block}")
        check_gate(i_gate)
        if conv < 1:
            raise ValueError(f"conv is {conv}, wanted a width of at least 1")
        self.d_model, self.n_heads, self.eps, self.m_start = d_model, n_heads, eps, m_start
        self.forget_bias, self.i_gate, self.normalize = ends(forget_bias), i_gate, normalize
        new = {"device": device, "dtype": dtype}
        self.up = nn.Linear(d_model, 2 * inner, bias=False, **new)
        self.conv = CausalConv(inner, conv, **new)
        self.side = qkv_block * max(n for n in range(1, max(1, 64 // qkv_block) + 1) if inner // qkv_block % n == 0)
        self.qkv = nn.Parameter(
            torch.empty(3, inner // qkv_block, qkv_block, qkv_block, **new)
        )  # (map, block, out, in)
        self.gate = nn.Linear(3 * inner, 2 * n_heads, **new)  # rows: input gates, forget gates
        self.norm = HeadNorm(n_heads, inner // n_heads, eps=1e-5, **new)
        self.skip = nn.Parameter(torch.empty(inner, **new))
        self.out = nn.Linear(inner, d_model, bias=False, **new)
        head = inner // n_heads
        self.shapes = (conv - 1, inner), (n_heads, head, head), (n_heads, head), (n_heads,)  # of a row's state
        self.reset_parameters()

    def reset_parameters(self):
        init_linear(self.up.weight)
        init_linear(self.out.weight)
        init_linear(self.qkv)
        self.conv.reset_parameters()
        self.norm.reset_parameters()
        nn.init.ones_(self.skip)
        # At the start the gates ignore the input: heads differ by how long they remember (0: 2 tokens, 6: 400).
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            nn.init.normal_(self.gate.bias[: self.n_heads], std=0.1)
            forget = self.gate.bias[self.n_heads :]
            forget.copy_(torch.linspace(*self.forget_bias, self.n_heads, device=forget.device))

    def maps(self, c, u):
        """q, k of c and v of u, each (B, T, inner), through small blocks on the diagonal."""
        weights = cast(self.qkv, c.dtype)
        if c.shape[1] == 1:
            x = torch.stack((c, c, u)).view(3, -1, weights.shape[1], 1, weights.shape[3])  # (3, B, blocks, 1, in)
            return (x * weights.unsqueeze(1)).sum(-1).view(3, *c.shape).unbind(0)
        # Small blocks starve a matrix unit: several stand on the diagonal of one that feeds it.
        joined = self._joined(weights)
        groups = (x.reshape(-1, *joined.shape[1:3]).transpose(0, 1) for x in (c, c, u))  # (B', B·T, in)
        return [torch.bmm(x, w).transpose(0, 1).reshape(c.shape) for x, w in zip(groups, joined, strict=True)]

    def gates(self, q, k, v):
        """log_i, log_f (B, T, H) from q, k, v (B, T, inner), in float32 whatever the autocast."""
        with exact(q.device):
            dtype = torch.promote_types(q.dtype, torch.float32)
            if q.shape[1] == 1 or not bare(self.gate):
                pre = wide_map(self.gate, torch.cat((q, k, v), -1))
            else:
                # Three products in place of a long concatenation.
                w, b = cast(self.gate.weight, dtype), cast(self.gate.bias, dtype)
                w_q, w_k, w_v = w.chunk(3, -1)
                q, k, v = (cast(x, dtype) for x in (q, k, v))
                pre = F.linear(q, w_q, b) + F.linear(k, w_k) + F.linear(v, w_v)
            return self._gates(pre)

    def _gates(self, pre):
        """log_i, log_f (B, T, H) of their pre-activations (B, T, 2 H)."""
        i, f = pre.chunk(2, -1)
        return INPUT_GATES[self.i_gate](i), log_sigmoid(f)

    def _joined(self, weights):
        """The small blocks of every map on the diagonal of larger ones (map, B', in, out)."""
        return _join(weights.flatten(0, 1), self.side).unflatten(0, (3, -1)).mT

    def heads(self, c, u):
        """q, k, v (B, T, H, inner / H) and log_i, log_f (B, T, H) of c and u (B, T, inner)."""
        batch, time, inner = c.shape
        plain = autocasts(c.device) or traced() or c.dtype != self.qkv.dtype
        plain = plain or not (bare(self.gate) and as_built(self))
        if time == 1 or plain or c.device.type != "cpu" or c.dtype.itemsize < 4:
            q, k, v = self.maps(c, u)
            return *(x.view(batch, time, self.n_heads, -1) for x in (q, k, v)), *self.gates(q, k, v)
        w = self._joined(self.qkv)
        # The gates read q, k and v, which are maps of c and u themselves: so they read c and u.
        by_map = self.gate.weight.view(-1, *w.shape[:2], w.shape[3]).permute(1, 2, 0, 3)  # (map, B', 2 H, out)
        f = torch.bmm(by_map.flatten(0, 1), w.mT.flatten(0, 1)).view(3, w.shape[1], -1, w.shape[2])
        f = torch.stack((f[0] + f[1], f[2])).transpose(1, 2).flatten(2)  # (c and u, 2 H, inner)
        *qkv, g = _Maps.apply(*(x.reshape(-1, inner) for x in (c, u)), w, f, self.gate.bias)
        heads = (x.view(-1, batch, time, x.shape[2]).permute(1, 2, 0, 3) for x in qkv)  # (B, T, B', side)
        return *(x.reshape(batch, time, self.n_heads, -1) for x in heads), *self._gates(g.view(batch, time, -1))

    @token_errors
    def _token(self, x, conv, memory):
        """`forward` for an array of one token (B, D), in NumPy."""
        x = project(self.up, x)
        u, z = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]  # (B, inner)
        qkv = parameter(self, "qkv")
        batch, heads, blocks, side = len(u), self.n_heads, *qkv.shape[1:3]
        c, conv = self.conv.decode(u, conv)
        # The blocks stand last, so that the sum over a block's few inputs runs over long rows.
        x = np.empty((3, batch, side, 1, blocks), u.dtype)
        x[:2, :, :, 0] = c.reshape(batch, blocks, side).swapaxes(1, 2)
        x[2, :, :, 0] = u.reshape(batch, blocks, side).swapaxes(1, 2)
        products = x * np.ascontiguousarray(qkv.transpose(0, 3, 2, 1))[:, None]  # (3, B, in, out, blocks)
        qkv = np.add.reduce(products, 2).transpose(1, 0, 3, 2).reshape(batch, -1)  # (B, 3 inner)
        pre = np.matmul(qkv, parameter(self.gate, "weight").T)  # (B, 2 H)
        pre += parameter(self.gate, "bias")
        q, k, v = qkv.reshape(batch, 3, heads, -1).swapaxes(0, 1)  # (B, H, inner / H)
        gates = token_gates(pre, self.i_gate)
        h, *memory = decode(q, k, v, gates, *memory, q.shape[-1] ** -0.5, self.normalize, self.eps)
        c *= parameter(self, "skip")
        c += self.norm.decode(h)
        c *= silu(z)
        return torch.from_numpy(project(self.out, c)[:, None]), (conv, MLSTMState(*memory))

    def _empty(self, x):
        """The memory before the first token, where its stabiliser does not start at 0."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        c, n, m = (x.new_zeros(len(x), *shape, dtype=dtype) for shape in self.shapes[1:])
        return MLSTMState(c, n, m + self.m_start)

    def forward(self, x, state=None, *, lengths=None, mask=None, reset=None):
        check_input(x, self.d_model, self.up)
        mask = valid_mask(lengths, mask, *x.shape[:2], x.device)
        x = blanked(x, mask)
        conv, memory = parts(state, "conv", "memory")
        weight = self._parameters.get("qkv") if bare(self.gate) else None
        if is_token(x, weight, mask, reset, conv, memory, self, skipped=(self.conv, self.norm)):
            return self._token(array(x)[:, 0], conv, memory)
        u, z = self.up(x).chunk(2, -1)  # (B, T, inner)
        c, conv = self.conv(u, conv, mask=mask, reset=reset, activation="silu")
        if memory is None and self.m_start:
            memory = self._empty(x)
        h, memory = mlstm(*self.heads(c, u), memory, reset=reset, mask=mask, normalize=self.normalize, eps=self.eps)
        y = self.out(self.norm(h, z, activation="silu", skip=(self.skip, c)))
        return y, (conv, memory)
