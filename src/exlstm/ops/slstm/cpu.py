"""sLSTM on the CPU: one loop over time that writes into preallocated memory, and a hand-written backward without a tape.

A step is a product and a dozen small element-wise operations, so the cost of a call decides: arithmetic and exp go through NumPy
(a microsecond a call), the other functions and products through torch, over the same memory.
The loop carries q = c/n, a weighted mean of the tanh(z̃) so far, in place of c (the rest is `reference`'s recurrence):

    w_t = i'/n_t        q_t = q_{t-1} + w_t (tanh(z̃) - q_{t-1})        h_t = sigmoid(õ) q_t

Its exact backward, with p = log n + m in place of n, so that every factor is at most 1:

    e = dh_out + dh      dq += e·o       dõ = e·o·q(1-o)      dz̃ = dq·w(1-z²)      dĩ = dp·w + dq·w(1-w)(z - q_{t-1})
    dp -= dĩ             df̃ = dp·sigmoid(-f̃)                  dq -= dq·w           dh = Rᵀ[dĩ, df̃, dz̃, dõ]
    dr = Σ_t dg̃_t ⊗ h_{t-1} by one product after the loop      dx = dg̃
"""

import numpy as np
import torch
from torch import Tensor

from exlstm.ops.backend import cast, exact


def cpu(x, r, h, c, n, m, reset, mask):
    """Same signature and result as `reference`, for CPU tensors."""
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(f"backend 'cpu' runs on CPU tensors, x is on {x.device}")
    bare = reset is None and mask is None and x.device.type == "cpu"
    if x.shape[1] == 1 and bare and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return _decode(x, r, h, c, n, m)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, r, h, c, n))
    hs, *state, _, _ = _slstm_cpu(x, r, h, c, n, m.detach(), reset, mask, save)
    return hs, *state


def _decode(x, r, h, c, n, m):
    """One token without gradients: the recurrence as it stands."""
    dtype, (batch, _, heads, _, width) = c.dtype, x.shape
    with exact(x.device):
        recurrent = torch.bmm(h.transpose(0, 1), cast(r, dtype).flatten(1, 2).mT)  # (H, B, 4 D)
        g = recurrent.view(heads, batch, 4, width).permute(2, 1, 0, 3) + cast(x, dtype).squeeze(1).permute(2, 0, 1, 3)
        i, f, z, o = g  # (B, H, D)
        f, z, o = (t.numpy() for t in (torch.nn.functional.logsigmoid(f), torch.tanh(z), torch.sigmoid(o)))
    i, c, n, m = (t.detach().numpy() for t in (i, c, n, m))
    with np.errstate(over="ignore", under="ignore"):
        kept = f + np.where(n > 0, m, -np.inf).astype(m.dtype)
        m = np.maximum(kept, i)
        f, i = np.exp(kept - m), np.exp(i - m)
        c, n = f * c + i * z, f * n + i
        h = o * c / n
    state = [torch.from_numpy(s) for s in (h, c, n, m)]
    return state[0].to(x.dtype, copy=True).unsqueeze(1), *state


@torch.library.custom_op("exlstm::slstm_cpu", mutates_args=())
def _slstm_cpu(
    x: Tensor,
    r: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hs, h, c, n, m, then for the backward w, z, o, q, log_f (5, T, H, B, D) and the initial q (H, B, D)."""
    dtype, (batch, steps, heads, _, width) = c.dtype, x.shape
    h, c, n, m = (s.transpose(0, 1).clone(memory_format=torch.contiguous_format) for s in (h, c, n, m))  # (H, B, D)
    empty = n == 0
    m.masked_fill_(empty, -torch.inf)
    first = (c / n.masked_fill(empty, 1)).masked_fill_(empty, 0)
    hs = torch.empty(batch, steps, heads, width, dtype=dtype)
    saved = torch.empty(5, steps if save else 1, heads, batch, width, dtype=dtype)
    with exact(x.device), np.errstate(under="ignore"):
        q = _forward_loop(x.to(dtype), r.to(dtype), h, first.clone(), n, m, hs, saved, _rows(reset), _rows(mask, False))
    m.masked_fill_(n == 0, 0)
    state = [s.transpose(0, 1).contiguous() for s in (h, q * n, n, m)]
    if not save:
        saved, first = hs.new_empty(0), hs.new_empty(0)
    return hs.to(x.dtype), *state, saved, first


def _forward_loop(x, r, h, q, n, m, hs, saved, resets, paddings):
    """Fills `hs` and `saved`, leaves the last h, n, m in their tensors and returns the last q."""
    heads, batch, width = h.shape
    xs = x.permute(1, 3, 2, 0, 4).numpy()  # (T, 4, H, B, D), a view
    weights = r.flatten(1, 2).mT.contiguous()  # (H, D in, 4 D out)
    product = h.new_empty(heads, batch, 4 * width)
    recurrent = product.numpy().reshape(heads, batch, 4, width).transpose(2, 0, 1, 3)  # (4, H, B, D), a view
    gates = h.new_empty(4, heads, batch, width)
    _, g_f, g_z, g_o = gates
    a = gates.numpy()
    a_if, (a_i, a_f, _, _) = a[:2], a
    out = hs.numpy().transpose(1, 2, 0, 3)  # (T, H, B, D), a view
    _, t_z, t_o, _, t_f = (s.unbind(0) for s in saved)
    s_w, s_z, s_o, s_q, s_f = saved.numpy()
    h_, q_, n_, m_ = (s.numpy() for s in (h, q, n, m))
    for t in range(x.shape[1]):
        j = t if len(s_w) > 1 else 0
        if resets[t] is not None:
            q_ = q_.copy()
            h_[:, resets[t]] = q_[:, resets[t]] = n_[:, resets[t]] = 0
            m_[:, resets[t]] = -np.inf
        kept = None if paddings[t] is None else [s[:, paddings[t]] for s in (h_, q_, n_, m_)]
        torch.bmm(h, weights, out=product)
        np.add(recurrent, xs[t], out=a)
        torch._C._nn.log_sigmoid(g_f, out=t_f[j])
        np.add(s_f[j], m_, out=a_f)
        np.maximum(a_i, a_f, out=m_)
        np.subtract(a_if, m_, out=a_if)
        np.exp(a_if, out=a_if)  # i', f'
        torch.tanh(g_z, out=t_z[j])
        torch.sigmoid(g_o, out=t_o[j])
        np.multiply(n_, a_f, out=n_)
        np.add(n_, a_i, out=n_)
        w, new = s_w[j], s_q[j]
        np.divide(a_i, n_, out=w)
        np.subtract(s_z[j], q_, out=a_f)
        np.multiply(a_f, w, out=a_f)
        np.add(q_, a_f, out=new)
        np.multiply(s_o[j], new, out=h_)
        out[t] = h_
        q_ = new
        if kept is not None:
            for s, old in zip((h_, q_, n_, m_), kept, strict=True):
                s[:, paddings[t]] = old
    return torch.from_numpy(q_)


@torch.library.custom_op("exlstm::slstm_cpu_backward", mutates_args=())
def _slstm_cpu_backward(
    dhs: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    dn: Tensor | None,
    x: Tensor,
    r: Tensor,
    h: Tensor,
    n: Tensor,
    last_n: Tensor,
    saved: Tensor,
    first: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dr, dh, dc, dn, the last three with respect to the initial state."""
    dtype = saved.dtype
    q = saved[3]  # (T, H, B, D)
    dh, dc, dn = (
        torch.zeros_like(first) if d is None else d.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for d in (dh, dc, dn)
    )
    last_n, n = last_n.transpose(0, 1), n.transpose(0, 1)
    dp = (dn + dc * q[-1]) * last_n
    dq = dc * last_n
    dhs = torch.zeros(x.shape[:3] + x.shape[4:], dtype=dtype) if dhs is None else dhs.to(dtype)
    with exact(x.device):
        resets, paddings = _rows(reset), _rows(mask, False)
        dx = _backward_loop(dhs, dh, dq, dp, r.to(dtype), saved, first, resets, paddings)  # (B, T, H, 4, D)
        before = _outputs_before(saved, h.transpose(0, 1), resets, paddings)  # (B, T, H, D)
        dr = torch.bmm(dx.flatten(3).flatten(0, 1).permute(1, 2, 0), before.flatten(0, 1).transpose(0, 1)).view(r.shape)
    empty = n == 0
    n = n.masked_fill(empty, 1)
    dc, dn = (dq / n).masked_fill(empty, 0), ((dp - dq * first) / n).masked_fill(empty, 0)
    return dx.to(x.dtype), dr.to(r.dtype), *(d.transpose(0, 1).contiguous() for d in (dh, dc, dn))


def _backward_loop(dhs, dh, dq, dp, r, saved, first, resets, paddings):
    """dg̃ (B, T, H, 4, D); leaves the gradients of the initial h, q and p in dh, dq and dp."""
    _, steps, heads, batch, width = saved.shape
    weights = r.flatten(1, 2)  # (H, 4 D out, D in)
    dg = saved.new_empty(batch, steps, heads, 4, width)
    to_dg = dg.numpy().transpose(1, 3, 2, 0, 4)  # (T, 4, H, B, D), a view
    factors = dg.flatten(3).transpose(0, 2).unbind(1)  # T times (H, B, 4 D), views
    s_w, s_z, s_o, s_q, _ = saved.numpy()
    s_f = torch.expm1(saved[4]).neg_().numpy()  # sigmoid(-f̃)
    outer = dhs.numpy().transpose(1, 2, 0, 3)  # (T, H, B, D), a view
    a = np.empty((4, heads, batch, width), s_w.dtype)
    a_i, a_f, a_z, a_o = a
    e, p = np.empty_like(a_i), np.empty_like(a_i)
    dh_, dq_, dp_ = dh.numpy(), dq.numpy(), dp.numpy()
    for t in range(steps - 1, -1, -1):
        w, z, o, q, q_before = s_w[t], s_z[t], s_o[t], s_q[t], s_q[t - 1] if t else first.numpy()
        kept = None if paddings[t] is None else [s[:, paddings[t]] for s in (dh_, dq_, dp_)]
        np.add(outer[t], dh_, out=e)
        np.multiply(e, o, out=e)
        np.add(dq_, e, out=dq_)
        np.multiply(e, q, out=e)
        np.multiply(e, o, out=a_o)
        np.subtract(e, a_o, out=a_o)
        np.multiply(dq_, w, out=p)
        np.multiply(z, z, out=a_z)
        np.multiply(a_z, p, out=a_z)
        np.subtract(p, a_z, out=a_z)
        np.subtract(z, q_before, out=e)
        np.multiply(e, p, out=e)
        np.multiply(e, w, out=a_f)
        np.subtract(e, a_f, out=e)
        np.subtract(dq_, p, out=dq_)
        np.multiply(dp_, w, out=a_i)
        np.add(a_i, e, out=a_i)
        np.subtract(dp_, a_i, out=dp_)
        np.multiply(dp_, s_f[t], out=a_f)
        if kept is not None:
            a[:, :, paddings[t]] = 0
        to_dg[t] = a
        torch.bmm(factors[t], weights, out=dh)
        if kept is not None:
            for s, old in zip((dh_, dq_, dp_), kept, strict=True):
                s[:, paddings[t]] = old
        if resets[t] is not None:
            for s in (dh_, dq_, dp_):
                s[:, resets[t]] = 0
    return dg


def _outputs_before(saved, h, resets, paddings):
    """h_{t-1} as step t saw it (B, T, H, D)."""
    _, steps, heads, batch, width = saved.shape
    before = saved.new_empty(batch, steps, heads, width)
    rows = before.permute(1, 2, 0, 3)  # (T, H, B, D), a view
    rows[0] = h
    torch.mul(saved[2, :-1], saved[3, :-1], out=rows[1:])
    for t in range(steps):
        if resets[t] is not None:
            before[resets[t], t] = 0
        if paddings[t] is not None and t + 1 < steps:
            before[paddings[t], t + 1] = before[paddings[t], t]
    return before


def _rows(flags, wanted=True):
    """For each step the indices of the rows whose flag is as wanted, None where there are none."""
    if flags is None:
        return _Never()
    hits = flags.t().numpy() == wanted  # (T, B)
    return [np.flatnonzero(hit) if some else None for hit, some in zip(hits, hits.any(1), strict=True)]


class _Never:
    """No row at any step."""

    def __getitem__(self, t):
        return None


@_slstm_cpu.register_fake
def _(x, r, h, c, n, m, reset, mask, save):
    batch, steps, heads, _, width = x.shape
    state = [c.new_empty(batch, heads, width) for _ in range(4)]
    saved = c.new_empty((5, steps, heads, batch, width) if save else 0)
    return x.new_empty(batch, steps, heads, width), *state, saved, c.new_empty((heads, batch, width) if save else 0)


@_slstm_cpu_backward.register_fake
def _(dhs, dh, dc, dn, x, r, h, n, last_n, saved, first, reset, mask):
    return x.new_empty(x.shape), r.new_empty(r.shape), *(h.new_empty(h.shape) for _ in range(3))


def _setup_context(ctx, inputs, output):
    x, r, h, _, n, _, reset, mask, save = inputs
    if not save:
        return
    _, _, _, last_n, m, saved, first = output
    ctx.mark_non_differentiable(m, saved, first)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, r, h, n, last_n, saved, first, reset, mask)


def _backward(ctx, dhs, dh, dc, dn, *_):
    dx, dr, dh, dc, dn = _slstm_cpu_backward(dhs, dh, dc, dn, *ctx.saved_tensors)
    return dx, dr, dh, dc, dn, None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("slstm has no second derivative on backend 'cpu'; backend='reference' has one")


_slstm_cpu.register_autograd(_backward, setup_context=_setup_context)
_slstm_cpu_backward.register_autograd(_no_double_backward)
