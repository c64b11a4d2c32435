"""sLSTM one step at a time, as the paper writes it: the truth that every other implementation is held against.

g̃ = x_t,g + R_g h_{t-1} for the gates g = i, f, z, o
a_t = logsigmoid(f̃) + m_{t-1}       m_t = max(a_t, ĩ)       i' = exp(ĩ - m_t)       f' = exp(a_t - m_t)
c_t = f' c_{t-1} + i' tanh(z̃)       n_t = f' n_{t-1} + i'   h_t = sigmoid(õ) c_t / n_t
A memory with n = 0 is an empty one: its m counts as -inf, so that the first step gives i' = 1, f' = 0 and n ≥ 1 ever after.
"""

import torch

from exlstm.ops.backend import exact, log_sigmoid


def reference(x, r, h, c, n, m, reset, mask):
    """(hs, h, c, n, m) of the recurrence; shapes as in `slstm`, computed in the state's dtype, differentiable by autograd."""
    dtype, hs = c.dtype, []
    r = r.to(dtype)  # (H, 4, D out, D in)
    with exact(x.device):
        for t in range(x.shape[1]):
            if reset is not None:
                fresh = reset[:, t, None, None]
                h, c, n, m = (s.masked_fill(fresh, 0) for s in (h, c, n, m))
            g = x[:, t].to(dtype) + torch.einsum("hgoi,bhi->bhgo", r, h)  # (B, H, 4, D)
            i, f, z, o = g.unbind(2)
            # -inf itself would make NaN gradients where n is 0; the forget factor is cut by `where` instead.
            alive = n > 0
            a = log_sigmoid(f) + m
            m_next = torch.where(alive, torch.maximum(a, i), i).detach()
            i = torch.exp(i - m_next)
            f = torch.where(alive, torch.exp(torch.where(alive, a - m_next, 0)), 0)
            c_next, n_next = f * c + i * torch.tanh(z), f * n + i  # (B, H, D)
            h_next = torch.sigmoid(o) * c_next / n_next
            hs.append(h_next)
            if mask is not None:
                keep = mask[:, t, None, None]
                h_next, c_next, n_next, m_next = (
                    torch.where(keep, new, old) for new, old in ((h_next, h), (c_next, c), (n_next, n), (m_next, m))
                )
            h, c, n, m = h_next, c_next, n_next, m_next
    return torch.stack(hs, 1).to(x.dtype), h, c, n, m
