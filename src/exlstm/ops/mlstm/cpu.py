"""mLSTM in plain PyTorch: chunks over a sequence (equations in chunked.py and docs/math.md), the recurrence for one token."""

import numpy as np
import torch

from exlstm.ops.backend import cast, exact, unseen
from exlstm.ops.mlstm.chunked import M_MAX, chunked

# Numbers in a memory up to which NumPy reads it faster, on one core.
SMALL = 1 << 16


def cpu(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """Same signature and result as `reference`; plain PyTorch, so any device."""
    m = m.detach()
    if q.shape[1] == 1:
        step = _decode if reset is None and c.device.type == "cpu" and unseen() else _step
        h, *memory = step(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps)
        return cast(h, v.dtype), *memory
    return chunked(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk)


def _step(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps):
    """One token, T = 1, by autograd: the recurrence as it stands."""
    dtype = c.dtype
    with exact(q.device):
        if reset is not None:
            c, n, m = (s.masked_fill(reset.view(-1, *[1] * (s.ndim - 1)), 0) for s in (c, n, m))
        q, k, v = cast(q.squeeze(1), dtype) * scale, cast(k.squeeze(1), dtype), cast(v, dtype).transpose(1, 2)
        log_i, kept = log_i.squeeze(1), log_f.squeeze(1) + m
        m = torch.maximum(kept, log_i).detach()
        f, k = torch.exp(kept - m).unsqueeze(-1), k * torch.exp(log_i - m).unsqueeze(-1)  # (B, H, 1), (B, H, K)
        c = torch.addcmul(c * f.unsqueeze(-1), k.unsqueeze(-1), v)
        n = torch.addcmul(k, n, f)
        denominator = torch.exp(-m.clamp(max=M_MAX))
        if normalize:
            denominator = torch.maximum((q * n).sum(-1).abs(), denominator)
            denominator = denominator + eps if eps else denominator
        h = (q.unsqueeze(-2) @ c).squeeze(-2) / denominator.unsqueeze(-1)
        return h.unsqueeze(1), c, n, m


def _decode(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps):
    """`_step` without gradients and resets."""
    q, k, v, *gates = (cast(x, c.dtype).numpy(force=True)[:, 0] for x in (q, k, v, log_i, log_f))
    with np.errstate(over="ignore", under="ignore"):
        h, *memory = decode(q, k, v, np.stack(gates, 1), c, n, m, scale, normalize, eps)
    return torch.from_numpy(h).unsqueeze(1), *memory


def decode(q, k, v, gates, c, n, m, scale, normalize=True, eps=0.0):
    """One token of arrays q, k, v (B, H, K or V) and a memory of tensors: h (B, H, V) and the next memory.

    gates: log_i and log_f (B, 2, H), overwritten.
    A call of torch costs more than the arithmetic of a token: NumPy does everything but the two passes over c.
    """
    gates[:, 1] += m.numpy(force=True)
    m = np.maximum(gates[:, 0], gates[:, 1])
    gates -= m[:, None]
    # NumPy's exp in float32 is up to 1.5 units off, three times torch's: a decay multiplies what is kept at every step.
    gates = np.exp(gates, dtype=np.float64).astype(m.dtype)
    i, f = gates[:, 0, :, None], gates[:, 1, :, None]  # (B, H, 1)
    k = k * i
    n = n.numpy(force=True) * f
    n += k
    denominator = np.exp(-np.minimum(m, M_MAX))
    c = torch.mul(c, torch.from_numpy(f[..., None]))
    c.addcmul_(torch.from_numpy(k[..., None]), torch.from_numpy(v[..., None, :]))
    q = (q * scale)[..., None, :]
    if normalize:
        inner = np.matmul(q, n[..., None])[..., 0, 0]  # (B, H)
        np.maximum(np.abs(inner), denominator, out=denominator)
        if eps:
            denominator += eps
    h = np.matmul(q, c.numpy()) if c.numel() <= SMALL else torch.matmul(torch.from_numpy(q), c).numpy()
    h = h[..., 0, :]
    h /= denominator[..., None]
    return h, c, torch.from_numpy(n), torch.from_numpy(m)
