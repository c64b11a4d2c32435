"""mLSTM one step at a time, as the paper writes it: the truth that every other implementation is held against.

m_t = max(log_f_t + m_{t-1}, log_i_t)        f' = exp(log_f_t + m_{t-1} - m_t)        i' = exp(log_i_t - m_t)
C_t = f' C_{t-1} + i' k_t v_tᵀ               n_t = f' n_{t-1} + i' k_t
h_t = C_tᵀ q_t / (max(|q_tᵀ n_t|, exp(-m_t)) + eps), with the scale on q; without normaliser the denominator is exp(-m_t).
"""

import torch

from exlstm.ops.backend import exact

# exp(-m) would underflow far above this, and 0 / 0 follow where q_tᵀ n_t vanishes: it is held at e^-60.
M_MAX = 60.0


def reference(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """(h, c, n, m) of the recurrence; shapes as in `mlstm`, computed in the state's dtype, differentiable by autograd."""
    dtype, hs = c.dtype, []
    with exact(q.device):
        for t in range(q.shape[1]):
            q_t, k_t, v_t = q[:, t].to(dtype) * scale, k[:, t].to(dtype), v[:, t].to(dtype)
            if reset is not None:
                fresh = reset[:, t, None]  # (B, 1)
                c, n, m = (s.masked_fill(fresh.view(-1, *[1] * (s.ndim - 1)), 0) for s in (c, n, m))
            log_i_t, log_f_t, m_before = log_i[:, t], log_f[:, t], m  # (B, H)
            m = torch.maximum(log_f_t + m, log_i_t).detach()
            f, i = torch.exp(log_f_t + m_before - m), torch.exp(log_i_t - m)
            c = f[..., None, None] * c + i[..., None, None] * k_t[..., :, None] * v_t[..., None, :]  # (B, H, K, V)
            n = f[..., None] * n + i[..., None] * k_t  # (B, H, K)
            numerator = (q_t[..., None, :] @ c).squeeze(-2)  # (B, H, V)
            floor = torch.exp(-m.clamp(max=M_MAX))
            denominator = torch.maximum((q_t * n).sum(-1).abs(), floor) + eps if normalize else floor
            hs.append(numerator / denominator[..., None])
    return torch.stack(hs, 1).to(v.dtype), c, n, m
