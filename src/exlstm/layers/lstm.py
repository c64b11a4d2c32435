"""The plain LSTM (Hochreiter and Schmidhuber 1997, with forget gate) on the fast kernel of the device: the baseline.

i, f, g, o = W x_t + R h_{t-1} + b      c_t = σ(f) c_{t-1} + σ(i) tanh(g)      h_t = σ(o) tanh(c_t)
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.layers.basic import check_input, check_sizes, init_linear, valid_mask
from exlstm.ops import backend as backends


class LSTMState(NamedTuple):
    """Memory of the LSTM: h and c, each (B, D); float32 or float64."""

    h: Tensor
    c: Tensor


backends.portable(LSTMState)


class LSTM(nn.Module):
    """One layer of nn.LSTM over (B, T, d_model), its memory d_model wide; state is an LSTMState.

    Eager, the kernel runs on the pieces between resets and changes of the mask; compiled, the recurrence is unrolled.

    >>> y, state = LSTM(64)(torch.randn(2, 10, 64))
    """

    def __init__(self, d_model: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes(d_model=d_model)
        self.d_model = d_model
        new = {"device": device, "dtype": dtype}
        # Rows as in nn.LSTM: the gates i, f, g, o.
        self.w = nn.Parameter(torch.empty(4 * d_model, d_model, **new))
        self.r = nn.Parameter(torch.empty(4 * d_model, d_model, **new))
        self.b = nn.Parameter(torch.empty(4 * d_model, **new))
        self.recurrent = ("r",)
        self.reset_parameters()

    def reset_parameters(self):
        """Input maps as `init_linear` says. Recurrent maps orthogonal, one a gate: nothing grows or dies through them
        (Saxe et al., arXiv 1312.6120). Forget bias 1: memory and gradient last from the start (Gers et al. 2000)."""
        init_linear(self.w)
        with torch.no_grad():
            for gate in self.r.chunk(4):
                gate.copy_(nn.init.orthogonal_(torch.empty_like(gate, dtype=torch.float32)))
            self.b.zero_()
            self.b[self.d_model : 2 * self.d_model].fill_(1.0)

    def forward(
        self,
        x: Tensor,
        state: LSTMState | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, LSTMState]:
        check_input(x, self.d_model, self, "w")
        batch, time = x.shape[:2]
        mask = valid_mask(lengths, mask, batch, time, x.device)
        x = backends.blanked(x, mask)
        backends.check_companions(x, reset, None, {})
        dtype = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            h = c = x.new_zeros(batch, self.d_model, dtype=dtype)
        else:
            backends.check_state(state, dict.fromkeys(LSTMState._fields, (batch, self.d_model)), x.device)
            h, c = (s.to(dtype) for s in state)
        # oneDNN has no LSTM for autocast, and cuDNN's is in float16 whatever dtype autocast has: memory and gradients with it.
        with backends.exact(x.device):
            ys = []
            for start, stop in pairwise(_cuts(time, mask, reset)):
                if reset is not None:
                    h, c = (s.masked_fill(reset[:, start, None], 0) for s in (h, c))
                y, h_after, c_after = self._piece(x[:, start:stop], h, c)
                ys.append(y)
                if mask is not None:
                    valid = mask[:, start, None]
                    h_after, c_after = torch.where(valid, h_after, h), torch.where(valid, c_after, c)
                h, c = h_after, c_after
        return backends.blanked(torch.cat(ys, 1).to(x.dtype), mask), LSTMState(h, c)

    def _piece(self, x, h, c):
        """Output and state after x (B, t, D) without resets or padding."""
        dtype, kept = self.w.dtype, c.dtype
        if not backends.traced():
            weights = (self.w, self.r, self.b, torch.zeros_like(self.b))
            if x.device.type == "cuda":
                # cuDNN wants its weights in one piece of memory.
                pieces = torch.cat([p.flatten() for p in weights]).split([p.numel() for p in weights])
                weights = tuple(piece.view_as(p) for piece, p in zip(pieces, weights, strict=True))
            memory = (h[None].to(dtype), c[None].to(dtype))
            y, h, c = torch.lstm(x.to(dtype), memory, weights, True, 1, 0.0, self.training, False, True)
            return y, h[0].to(kept), c[0].to(kept)
        # The kernels have no graph for a compiler, and no rule for a transform.
        pre = F.linear(x.to(dtype), self.w, self.b)
        hs = []
        for t in range(x.shape[1]):
            gates = (pre[:, t] + F.linear(h.to(dtype), self.r)).to(kept)
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            hs.append(h)
        return torch.stack(hs, 1), h, c


def _cuts(time, mask, reset):
    """0, T, and every time between at which a row is reset or a row's padding starts or ends."""
    if mask is None and reset is None:
        return [0, time]
    if backends.traced() or (mask if reset is None else reset).is_meta:
        return list(range(time + 1))
    cut = torch.zeros(time, dtype=torch.bool, device=(mask if reset is None else reset).device)
    if reset is not None:
        cut |= reset.any(0)
    if mask is not None:
        cut[1:] |= (mask[:, 1:] != mask[:, :-1]).any(0)
    return [0, *(cut[1:].nonzero().squeeze(1) + 1).tolist(), time]
