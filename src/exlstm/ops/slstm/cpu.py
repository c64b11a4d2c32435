"""sLSTM on the CPU: one loop over time that writes into preallocated memory, and a hand-written backward without a tape.

A step is a product and some twenty small element-wise operations, so the cost of a call decides: arithmetic, exp, tanh and
small products go through NumPy (a microsecond a call), the rest through torch, over the same memory. What need not wait
for its turn is done for a block of steps at once: x is laid where a step works on it, h is laid out, the backward's factors made.
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

from exlstm.ops.backend import cast, distributed, exact, unseen
from exlstm.ops.pages import room

# Numbers a slab of steps may hold that are worked on at once, between or behind the steps themselves.
BLOCK_NUMBERS = 1 << 16
# Multiplications up to which NumPy multiplies small matrices at least as fast, on one core, as torch does, whose threads meet
# at every step: in all of them, times torch's threads, and in one, beyond which NumPy would call threads of its own.
SMALL_PRODUCTS, SMALL_PRODUCT = 1 << 22, 1 << 18


def cpu(x, r, h, c, n, m, reset, mask):
    """Same signature and result as `reference`, for CPU tensors."""
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(f"backend 'cpu' runs on CPU tensors, x is on {x.device}")
    bare = reset is None and mask is None and x.device.type == "cpu"
    if x.shape[1] == 1 and bare and unseen() and not distributed():
        return _decode(x, r, h, c, n, m)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, r, h, c, n))
    hs, *state, _, _ = _slstm_cpu(x, r, h, c, n, m.detach(), reset, mask, save)
    return hs, *state


def _decode(x, r, h, c, n, m):
    """One token without gradients."""
    wide, weights, h = (cast(t.detach(), c.dtype).numpy() for t in (x, r, h))
    with np.errstate(over="ignore", under="ignore"):
        state = decode(recurrent(h, weights) + wide[:, 0].swapaxes(0, 1), c, n, m)
    return state[0].to(x.dtype, copy=True).unsqueeze(1), *state


def recurrent(h, r):
    """R h (H, B, 4, D) of arrays h (B, H, D) and r (H, 4, D, D)."""
    heads, gates, width, _ = r.shape
    products = np.matmul(h.swapaxes(0, 1), r.reshape(heads, -1, width).swapaxes(1, 2))  # (H, B, 4 D)
    return products.reshape(heads, -1, gates, width)


def decode(g, c, n, m):
    """One token: the recurrence as it stands, from an array of whole gates (H, B, 4, D) and a memory (B, H, D) of tensors."""
    i, f, z, o = np.ascontiguousarray(g.transpose(2, 1, 0, 3))  # (B, H, D)
    c, n, m = (t.detach().numpy() for t in (c, n, m))
    kept = torch.nn.functional.softplus(torch.from_numpy(f), -1, 40).numpy()  # logsigmoid
    kept += m
    kept[n == 0] = -np.inf
    m = np.maximum(kept, i)
    f, i = np.exp(kept - m), np.exp(i - m)
    c, n = f * c + i * np.tanh(z), f * n + i
    h = c / (n * (1 + np.exp(-o)))
    return [torch.from_numpy(s) for s in (h, c, n, m)]


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
    """hs, h, c, n, m, then for the backward w, f̃, z, o, q (T, 5, H, B, D) and the initial q (H, B, D)."""
    dtype, (batch, steps, heads, _, width) = c.dtype, x.shape
    h, c, n, m = (s.transpose(0, 1).clone(memory_format=torch.contiguous_format) for s in (h, c, n, m))  # (H, B, D)
    empty = n == 0
    m.masked_fill_(empty, -torch.inf)
    first = (c / n.masked_fill(empty, 1)).masked_fill_(empty, 0)
    hs = room((batch, steps, heads, width), x.dtype)
    saved = room((steps if save else _block(first, steps), 5, heads, batch, width), dtype)
    with exact(x.device), np.errstate(under="ignore"):
        q = _forward_loop(x, r.to(dtype), h, first, n, m, hs, saved, _rows(reset, steps), _rows(mask, steps, False))
    m.masked_fill_(n == 0, 0)
    state = [s.transpose(0, 1).contiguous() for s in (h, q * n, n, m)]
    if not save:
        saved, first = saved.new_empty(0), first.new_empty(0)
    return hs, *state, saved, first


def _block(slab, steps):
    """How many steps share what need not wait for its turn."""
    return min(steps, max(1, BLOCK_NUMBERS // slab.numel()))


def _multiply(a, b, out):
    """a @ b of arrays into `out`: on one core by NumPy, or between all of them by torch where there is work for them."""
    inner, numbers = b.shape[-2], out.shape[-2] * out.shape[-1]
    if numbers * inner <= SMALL_PRODUCT and out.size * inner * torch.get_num_threads() <= SMALL_PRODUCTS:
        np.matmul(a, b, out=out)
    else:
        torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def _forward_loop(x, r, h, q, n, m, hs, saved, resets, paddings):
    """Fills `hs` and `saved`, leaves the last h, n, m in their tensors and returns the last q."""
    xs, out = x.permute(1, 3, 2, 0, 4), hs.permute(1, 2, 0, 3)  # (T, 4, H, B, D) and (T, H, B, D), views
    steps, block = len(xs), _block(h, len(xs))
    weights = r.permute(1, 0, 3, 2).contiguous().numpy()  # (4, H, D in, D out)
    for start in range(0, steps, block):
        here = slice(start, min(start + block, steps))
        part = saved[here] if len(saved) == steps else saved[: here.stop - start]
        part[:, :4].copy_(xs[here])
        q = _forward_block(part, weights, h, q, n, m, resets[here], paddings[here])
        torch.mul(part[:, 3], part[:, 4], out=out[here])
    return q


def _forward_block(saved, weights, h, q, n, m, resets, paddings):
    """The steps of one block: turns x in `saved` into what is kept of a step, in place, and returns the last q."""
    h, q, n, m = (s.numpy() for s in (h, q, n, m))
    products, log_f = np.empty((4, *h.shape), h.dtype), saved.new_empty(h.shape)
    a, arrays = log_f.numpy(), saved.numpy()
    steps = zip(saved[:, 1], saved[:, 3], arrays[:, :4], arrays, resets, paddings)
    for t_f, t_o, gates, (i, _, z, o, new), fresh, padded in steps:
        if fresh is not None:
            q = q.copy()
            h[:, fresh] = q[:, fresh] = n[:, fresh] = 0
            m[:, fresh] = -np.inf
        kept = None if padded is None else [s[:, padded] for s in (h, q, n, m)]
        _multiply(h, weights, products)
        np.add(gates, products, out=gates)
        torch._C._nn.softplus(t_f, -1, 40, out=log_f)  # logsigmoid, in one vectorised pass on one core
        torch.sigmoid(t_o, out=t_o)
        np.tanh(z, out=z)
        np.add(a, m, out=a)
        np.maximum(i, a, out=m)
        np.subtract(a, m, out=a)
        np.exp(a, out=a)
        np.multiply(n, a, out=n)
        np.subtract(i, m, out=i)
        np.exp(i, out=i)
        np.add(n, i, out=n)
        np.divide(i, n, out=i)
        np.subtract(z, q, out=a)
        np.multiply(a, i, out=a)
        np.add(q, a, out=new)
        np.multiply(o, new, out=h)
        q = new
        if kept is not None:
            for s, old in zip((h, q, n, m), kept, strict=True):
                s[:, padded] = old
    return torch.from_numpy(q)


@torch.library.custom_op("exlstm::slstm_cpu_backward", mutates_args=())
def _slstm_cpu_backward(
    dhs: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    dn: Tensor | None,
    r: Tensor,
    h: Tensor,
    n: Tensor,
    last_n: Tensor,
    saved: Tensor,
    first: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in `dtype`, dr, and dh, dc, dn with respect to the initial state."""
    steps, _, heads, batch, width = saved.shape
    dh, dc, dn = (
        torch.zeros_like(first) if d is None else d.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for d in (dh, dc, dn)
    )
    last_n, n = last_n.transpose(0, 1), n.transpose(0, 1)
    dp = (dn + dc * saved[-1, 4]) * last_n
    dq = dc * last_n
    dhs = h.new_zeros(()).expand(batch, steps, heads, width) if dhs is None else dhs
    with exact(h.device):
        resets, paddings = _rows(reset, steps), _rows(mask, steps, False)
        dx = _backward_loop(dhs, dh, dq, dp, r.to(saved.dtype), saved, first, resets, paddings)  # (B, T, H, 4, D)
        before = _outputs_before(saved, h.transpose(0, 1), resets, paddings)  # (B, T, H, D)
        dr = torch.bmm(dx.flatten(3).flatten(0, 1).permute(1, 2, 0), before.flatten(0, 1).transpose(0, 1)).view(r.shape)
    empty = n == 0
    n = n.masked_fill(empty, 1)
    dc, dn = (dq / n).masked_fill(empty, 0), ((dp - dq * first) / n).masked_fill(empty, 0)
    return dx.to(dtype), dr.to(r.dtype), *(d.transpose(0, 1).contiguous() for d in (dh, dc, dn))


def _backward_loop(dhs, dh, dq, dp, r, saved, first, resets, paddings):
    """dg̃ (B, T, H, 4, D); leaves the gradients of the initial h, q and p in dh, dq and dp."""
    steps, _, heads, batch, width = saved.shape
    block, outer = _block(first, steps), dhs.permute(1, 2, 0, 3)  # (T, H, B, D), a view
    # A copy: storage that NumPy has seen cannot be given back, and sharded weights are given back after every use.
    weights = r.flatten(1, 2).clone().numpy()  # (H, 4 D out, D in)
    dx = room((batch, steps, heads, 4, width), saved.dtype)
    by_time = dx.permute(1, 2, 0, 3, 4)  # (T, H, B, 4, D), a view
    # The gradients that reach the outputs of a block, and in front of them the one that the block hands on.
    es = saved.new_empty(block + 1, *first.shape)
    factors, dg = saved.new_empty(block, 5, *first.shape), saved.new_empty(block, heads, batch, 4, width)
    by_gate = dg.numpy().transpose(0, 3, 1, 2, 4)
    views = list(zip(es.numpy(), es.numpy()[1:], factors.numpy(), dg.flatten(3).numpy(), by_gate))
    for start in reversed(range(0, steps, block)):
        here = slice(start, min(start + block, steps))
        part, e = saved[here], es[: here.stop - start + 1]
        e[1:].copy_(outer[here])
        e[-1].add_(dh)
        e[0].zero_()
        _factors(part, saved[start - 1, 4] if start else first, factors[: len(part)])
        _backward_block(views, dq.numpy(), dp.numpy(), weights, part, resets[here], paddings[here])
        by_time[here].copy_(dg[: len(part)])
        dh.copy_(e[0])
    return dx


def _factors(saved, q_before, out):
    """What the backward steps of a block multiply by: q·o(1-o), w(1-z²), w(1-w)(z - q_{t-1}), sigmoid(-f̃) and 1-w."""
    w, f, z, o, q = saved.unbind(1)
    by_o, by_z, by_i, by_f, by_q = out.unbind(1)
    torch.ops.aten.sigmoid_backward.grad_input(q, o, grad_input=by_o)
    torch.ops.aten.tanh_backward.grad_input(w, z, grad_input=by_z)
    torch.sub(z[0], q_before, out=by_i[0])
    torch.sub(z[1:], q[:-1], out=by_i[1:])
    torch.ops.aten.sigmoid_backward.grad_input(by_i, w, grad_input=by_i)
    torch.sigmoid(torch.neg(f, out=by_f), out=by_f)
    torch.sub(1, w, out=by_q)


def _backward_block(views, dq, dp, weights, saved, resets, paddings):
    """The steps of one block, from the last to the first: fills dg and adds to es, by their views; goes on with dq and dp."""
    a, b, product = (np.empty_like(dq) for _ in range(3))
    steps = list(zip(views, saved.numpy(), resets, paddings))
    for (e_next, e, factors, joint, d), (w, _, _, o, _), fresh, padded in reversed(steps):
        (by_o, by_z, by_i, by_f, by_q), (d_i, d_f, d_z, d_o) = factors, d
        kept = None if padded is None else [s[:, padded] for s in (e, dq, dp)]
        np.multiply(e, o, out=a)
        np.add(dq, a, out=dq)
        np.multiply(e, by_o, out=d_o)
        np.multiply(dq, by_z, out=d_z)
        np.multiply(dq, by_i, out=a)
        np.multiply(dq, by_q, out=dq)
        np.multiply(dp, w, out=b)
        np.add(a, b, out=a)
        np.subtract(dp, a, out=dp)
        d_i[...] = a
        np.multiply(dp, by_f, out=d_f)
        outer = None if fresh is None else e_next[:, fresh]
        if padded is not None:
            d[:, :, padded] = 0
        _multiply(joint, weights, product)
        np.add(e_next, product, out=e_next)
        if padded is not None:
            e_next[:, padded] += kept[0]
            dq[:, padded], dp[:, padded] = kept[1:]
        if fresh is not None:
            e_next[:, fresh], dq[:, fresh], dp[:, fresh] = outer, 0, 0


def _outputs_before(saved, h, resets, paddings):
    """h_{t-1} as step t saw it (B, T, H, D)."""
    steps, _, heads, batch, width = saved.shape
    before = room((batch, steps, heads, width), saved.dtype)
    rows = before.permute(1, 2, 0, 3)  # (T, H, B, D), a view
    rows[0] = h
    torch.mul(saved[:-1, 3], saved[:-1, 4], out=rows[1:])
    for t in range(steps):
        if resets[t] is not None:
            before[resets[t], t] = 0
        if paddings[t] is not None and t + 1 < steps:
            before[paddings[t], t + 1] = before[paddings[t], t]
    return before


def _rows(flags, steps, wanted=True):
    """For each step the indices of the rows whose flag is as wanted, None where there are none."""
    if flags is None:
        return [None] * steps
    hits = flags.t().numpy() == wanted  # (T, B)
    return [np.flatnonzero(hit) if some else None for hit, some in zip(hits, hits.any(1), strict=True)]


@_slstm_cpu.register_fake
def _(x, r, h, c, n, m, reset, mask, save):
    batch, steps, heads, _, width = x.shape
    state = [c.new_empty(batch, heads, width) for _ in range(4)]
    saved = c.new_empty((steps, 5, heads, batch, width) if save else 0)
    return x.new_empty(batch, steps, heads, width), *state, saved, c.new_empty((heads, batch, width) if save else 0)


@_slstm_cpu_backward.register_fake
def _(dhs, dh, dc, dn, r, h, n, last_n, saved, first, reset, mask, dtype):
    steps, _, heads, batch, width = saved.shape
    dx = saved.new_empty(batch, steps, heads, 4, width, dtype=dtype)
    return dx, r.new_empty(r.shape), *(h.new_empty(h.shape) for _ in range(3))


def _setup_context(ctx, inputs, output):
    x, r, h, _, n, _, reset, mask, save = inputs
    if not save:
        return
    _, _, _, last_n, m, saved, first = output
    ctx.mark_non_differentiable(m, saved, first)
    ctx.set_materialize_grads(False)
    ctx.dtype = x.dtype
    ctx.save_for_backward(r, h, n, last_n, saved, first, reset, mask)


def _backward(ctx, dhs, dh, dc, dn, *_):
    dx, dr, dh, dc, dn = _slstm_cpu_backward(dhs, dh, dc, dn, *ctx.saved_tensors, ctx.dtype)
    return dx, dr, dh, dc, dn, None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "slstm has no second derivative on backend 'cpu'; inside `with exlstm.backend(\"reference\")` it has one"
    )


_slstm_cpu.register_autograd(_backward, setup_context=_setup_context)
_slstm_cpu_backward.register_autograd(_no_double_backward)
