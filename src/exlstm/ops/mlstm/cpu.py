"""mLSTM in chunks, in plain PyTorch: products inside a chunk, a recurrence from chunk to chunk, and the exact backward by hand.

The gates of a chunk that starts with stabiliser m⁻ are rank one:

    b_t = Σ log_f up to t      u = log_i - b      M_t = max(m⁻, max_{j≤t} u_j)      m = b + M
    D_tj = exp(u_j - M_t) for j ≤ t      β_t = exp(m⁻ - M_t)      α_j = exp(u_j - M_L)      γ = exp(m⁻ - M_L)      m⁺ = b_L + M_L
    P = (Q Kᵀ) ⊙ D      s = P·1 + β ⊙ (Q n⁻)      h = (P V + β ⊙ (Q C⁻)) / den      den = max(|s|, exp(-m)) + eps
    C⁺ = γ C⁻ + Kᵀ(α ⊙ V)      n⁺ = γ n⁻ + Kᵀ α                                  (the scale sits on Q)

and backward, with everything between chunks recomputed and nothing but the inputs, h and the memory at block starts kept:

    dnum = dh / den      ds = -[|s| > exp(-m)] sign(s) Σ(dh ⊙ h) / den      dS = (dnum Vᵀ + ds 1ᵀ) ⊙ D
    dQ = dS K + β ⊙ (dnum C⁻ᵀ + ds n⁻ᵀ)      dK = dSᵀ Q + α ⊙ (V dC⁺ᵀ + dn⁺)      dV = Pᵀ dnum + α ⊙ (K dC⁺)
    dC⁻ = γ dC⁺ + (β ⊙ Q)ᵀ dnum              dn⁻ = γ dn⁺ + (β ⊙ Q)ᵀ ds
    dlog_i = k·dk      dlog_f_t = Σ_{t ≤ r ≤ end of chunk} (q_r·dq_r - k_r·dk_r) + <C⁺, dC⁺> + <n⁺, dn⁺>

A reset lets b, M and the last sum restart, and cuts D, β, α and γ. The gates are worked out in float64: they are two
vectors, and the prefix sums would otherwise cost a digit. Chunks are worked on in blocks that fit the cache, so memory
beside the inputs stays flat.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from exlstm.ops.backend import cast, exact

# exp(-m) would underflow far above this, and 0 / 0 follow where q_tᵀ n_t vanishes: it is held at e^-60, as in the reference.
M_MAX = 60.0
# Numbers in flight that a block of chunks may take, so that its matrices stay in a core's cache.
BLOCK_NUMBERS = 1 << 21
# Numbers in a memory up to which NumPy reads it faster, on one core.
SMALL = 1 << 16


class Gates(NamedTuple):
    """What the gates of a sequence amount to, (B·H, N, L) unless said otherwise."""

    u: Tensor  # float64
    top: Tensor  # M, float64
    floor: Tensor  # exp(-m)
    alpha: Tensor
    beta: Tensor
    gamma: Tensor  # (B·H, N)
    last_m: Tensor  # (B·H,)
    document: Tensor | None  # resets so far in the chunk, where there are resets


def cpu(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """Same signature and result as `reference`; plain PyTorch, so any device."""
    m = m.detach()
    if q.shape[1] == 1:
        bare = reset is None and c.device.type == "cpu" and not torch.compiler.is_compiling()
        step = _decode if bare and not torch.is_grad_enabled() else _step
        h, *memory = step(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps)
        return cast(h, v.dtype), *memory
    tensors = (q, k, v, log_i, log_f, c, n)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    h, *memory, _, _ = _mlstm_chunked(*tensors, m, reset, scale, normalize, eps, chunk or _chunk_length(q, v), save)
    return h, *memory


def _chunk_length(q, v):
    longest = 32 if q.shape[-1] + v.shape[-1] <= 64 else 64
    return -(-q.shape[1] // -(-q.shape[1] // longest))


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
    inputs = (cast(x.detach(), c.dtype).numpy()[:, 0] for x in (q, k, v, log_i, log_f))
    with np.errstate(over="ignore", under="ignore"):
        h, *memory = decode(*inputs, c, n, m, scale, normalize, eps)
    return torch.from_numpy(h).unsqueeze(1), *memory


def decode(q, k, v, log_i, log_f, c, n, m, scale, normalize=True, eps=0.0):
    """One token of arrays q, k, v (B, H, K or V), log_i, log_f (B, H) and a memory of tensors: h (B, H, V) and the next memory.

    A call of torch costs more than the arithmetic of a token: NumPy does everything but the two passes over c.
    """
    n, m = n.detach().numpy(), m.detach().numpy()
    kept = log_f + m
    m = np.maximum(kept, log_i)
    f = np.exp(kept - m)[..., None]  # (B, H, 1)
    k = k * np.exp(log_i - m)[..., None]
    n = n * f
    n += k
    denominator = np.exp(-np.minimum(m, M_MAX))
    c = torch.mul(c.detach(), torch.from_numpy(f[..., None]))
    c.addcmul_(torch.from_numpy(k[..., None]), torch.from_numpy(v[..., None, :]))
    if normalize:
        inner = np.matmul(q[..., None, :], n[..., None])[..., 0, 0]  # (B, H)
        np.maximum(np.abs(scale * inner), denominator, out=denominator)
        denominator += eps
    if c.numel() <= SMALL:
        h = np.matmul(q[..., None, :], c.numpy())[..., 0, :]
    else:
        h = torch.matmul(torch.from_numpy(q[..., None, :]), c).numpy()[..., 0, :]
    h *= (scale / denominator)[..., None]
    return h, c, torch.from_numpy(n), torch.from_numpy(m)


def _gates(log_i, log_f, m, reset, length):
    """Gates of a whole sequence: log_i, log_f (B, T, H), m (B, H)."""
    batch, steps, heads = log_i.shape
    # Apple's GPUs have no float64.
    exact = torch.float32 if log_i.device.type == "mps" else torch.float64
    chunks = -(-steps // length)
    tail = (0, chunks * length - steps)

    def lay(x, fill):
        return pad(x.transpose(1, 2).to(exact), tail, value=fill).reshape(batch * heads, chunks, length)

    log_i, log_f = lay(log_i, -torch.inf), lay(log_f, 0.0)
    b = log_f.cumsum(-1)
    if reset is None:
        document, fresh = None, None
        u = log_i - b
        top = u.cummax(-1).values
    else:
        reset = pad(reset, tail).view(batch, 1, chunks, length).expand(-1, heads, -1, -1).flatten(0, 1)
        document = reset.cumsum(-1)
        start = torch.where(reset, torch.arange(length, device=reset.device), 0).cummax(-1).values
        b = b - torch.where(document > 0, (b - log_f).gather(-1, start), 0)
        u = log_i - b
        together = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
        top = torch.where(together, u.unsqueeze(-2), -torch.inf).amax(-1)
        fresh = document > 0
    m_before = _stabilisers(m.flatten().to(exact), b[..., -1], top[..., -1], None if fresh is None else fresh[..., -1])
    before = m_before[:, :-1, None].expand_as(top)
    if fresh is not None:
        before = before.masked_fill(fresh, 0)
    top = torch.maximum(top, before)
    alpha, beta = torch.exp(u - top[..., -1:]), torch.exp(before - top)
    if fresh is not None:
        alpha, beta = alpha.masked_fill(document != document[..., -1:], 0), beta.masked_fill(fresh, 0)
    floor = torch.exp(-(b + top).clamp(max=M_MAX))
    small = (x.to(m.dtype) for x in (floor, alpha, beta, beta[..., -1], m_before[:, -1]))
    return Gates(u, top, *small, document)


def _stabilisers(m, total, top, fresh):
    """m at the start of every chunk and after the last (B·H, N + 1): a running maximum from chunk to chunk."""
    found = [m]
    for j in range(total.shape[1]):
        start = m if fresh is None else m.masked_fill(fresh[:, j], 0)
        m = total[:, j] + torch.maximum(start, top[:, j])
        found.append(m)
    return torch.stack(found, 1)


def _lay(x, chunks, length, dtype, factor=None):
    """x (B, t, H, D) as (B·H·N, L, D) in `dtype`, zeros behind the end."""
    batch, steps, heads, width = x.shape
    laid = x.new_zeros if chunks * length > steps else x.new_empty
    laid = laid(batch, heads, chunks * length, width, dtype=dtype)
    laid[:, :, :steps] = x.transpose(1, 2)
    return (laid if factor is None else laid.mul_(factor)).view(-1, length, width)


def _unlay(x, out):
    """Writes x (B·H·N, L, D) to out (B, t, H, D)."""
    out.copy_(x.view(out.shape[0], out.shape[2], -1, x.shape[-1])[:, :, : out.shape[1]].transpose(1, 2))


def _decay(gates, part, dtype):
    """D (B·H·N, L, L) of the chunks in `part`; what lies above the diagonal is arbitrary."""
    # The exponents differ by little what u and M have in common: the high parts cancel, the low parts keep the digits.
    (u, u_low), (top, top_low) = (_split(x[:, part], dtype) for x in (gates.u, gates.top))
    d = u.unsqueeze(-2) - top.unsqueeze(-1)
    if u_low is not None:
        d.add_(u_low.unsqueeze(-2)).sub_(top_low.unsqueeze(-1))
    d.exp_()
    if gates.document is not None:
        document = gates.document[:, part]
        d.masked_fill_(document.unsqueeze(-1) != document.unsqueeze(-2), 0)
    return d.flatten(0, 1)


def _split(x, dtype):
    """x as a sum of two numbers of `dtype`, the second None where the first is exact."""
    if x.dtype == dtype:
        return x, None
    high = x.to(dtype)
    return high, (x - high).nan_to_num_(0).to(dtype)


def _block_size(rows, chunks, length, keys, values):
    """Chunks that are worked on at once: as many as fit, in blocks of one size."""
    numbers = rows * (2 * length * length + 2 * keys * values + 3 * length * (keys + values))
    fit = max(1, BLOCK_NUMBERS // numbers)
    return -(-chunks // -(-chunks // fit))


def _blocks(gates, q, v):
    """The chunks in pieces, as slices, each small enough for the cache."""
    rows, chunks, length = gates.u.shape
    size = _block_size(rows, chunks, length, q.shape[-1], v.shape[-1])
    return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]


def _memories(k, v, gates, part, c, n):
    """C and n at the start of each chunk in `part` and after the last: (B·H, N + 1, K, V) and (B·H, N + 1, K)."""
    rows, count, length = gates.alpha[:, part].shape
    weighted = k * gates.alpha[:, part].reshape(-1, length, 1)
    cs = c.new_empty(rows, count + 1, *c.shape[1:])
    ns = n.new_empty(rows, count + 1, n.shape[1])
    cs[:, 0], ns[:, 0] = c, n
    gain_c = torch.bmm(weighted.mT, v).view(rows, count, *c.shape[1:])
    gain_n = weighted.sum(1).view(rows, count, -1)
    gamma = gates.gamma[:, part]
    for j in range(count):
        torch.addcmul(gain_c[:, j], cs[:, j], gamma[:, j, None, None], out=cs[:, j + 1])
        torch.addcmul(gain_n[:, j], ns[:, j], gamma[:, j, None], out=ns[:, j + 1])
    return cs, ns


def _denominator(p, q, ns, gates, part, normalize, eps):
    """den and the signed s (B·H·N, L), s with 0 where the floor exp(-m) is the larger one."""
    floor = gates.floor[:, part].flatten(0, 1)
    if not normalize:
        return floor, None
    s = p.sum(-1).addcmul_(gates.beta[:, part].flatten(0, 1), torch.bmm(q, ns.unsqueeze(-1)).squeeze(-1))
    size = s.abs()
    return torch.maximum(size, floor) + eps, s.masked_fill_(size <= floor, 0)


@torch.library.custom_op("exlstm::mlstm_chunked", mutates_args=())
def _mlstm_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None,
    scale: float, normalize: bool, eps: float, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, c, n, m, then C and n at the start of every block for the backward."""
    dtype, shape = c.dtype, c.shape
    with torch.autocast(q.device.type, enabled=False):
        gates = _gates(log_i, log_f, m, reset, chunk)
        h = torch.empty_like(v, memory_format=torch.contiguous_format)
        c, n = c.flatten(0, 1), n.flatten(0, 1)
        starts_c, starts_n = [], []
        for part in _blocks(gates, q, v):
            starts_c.append(c)
            starts_n.append(n)
            span, count = slice(part.start * chunk, part.stop * chunk), part.stop - part.start
            qs = _lay(q[:, span], count, chunk, dtype, scale)
            ks, vs = (_lay(x[:, span], count, chunk, dtype) for x in (k, v))
            cs, ns = _memories(ks, vs, gates, part, c, n)
            c, n = cs[:, -1], ns[:, -1]
            cs, ns = cs[:, :-1].flatten(0, 1), ns[:, :-1].flatten(0, 1)
            p = torch.bmm(qs, ks.mT).mul_(_decay(gates, part, dtype)).tril_()
            den, _ = _denominator(p, qs, ns, gates, part, normalize, eps)
            num = torch.bmm(p, vs).baddbmm_(qs.mul_(gates.beta[:, part].reshape(-1, chunk, 1)), cs)
            _unlay(num.div_(den.unsqueeze(-1)), h[:, span])
        c, n, m = c.reshape(shape).clone(), n.reshape(shape[:-1]).clone(), gates.last_m.reshape(shape[:2]).clone()
        starts = (torch.stack(starts_c), torch.stack(starts_n)) if save else (c.new_empty(0), c.new_empty(0))
    return h, c, n, m, *starts


@torch.library.custom_op("exlstm::mlstm_chunked_backward", mutates_args=())
def _mlstm_chunked_backward(
    dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor,
    m: Tensor, reset: Tensor | None, h: Tensor, starts_c: Tensor, starts_n: Tensor,
    scale: float, normalize: bool, eps: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_i, dlog_f, dc, dn, the last two with respect to the initial memory."""
    dtype = starts_c.dtype
    with torch.autocast(q.device.type, enabled=False):
        gates = _gates(log_i, log_f, m, reset, chunk)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        shape = (*m.shape, q.shape[-1], v.shape[-1])
        dc = torch.zeros_like(starts_c[0]) if dc is None else dc.to(dtype).flatten(0, 1)
        dn = torch.zeros_like(starts_n[0]) if dn is None else dn.to(dtype).flatten(0, 1)
        dh = torch.zeros_like(h) if dh is None else dh
        dlog_i, dlog_f = torch.empty_like(gates.u), torch.empty_like(gates.u)
        for i, part in reversed(list(enumerate(_blocks(gates, q, v)))):
            span, count = slice(part.start * chunk, part.stop * chunk), part.stop - part.start
            qs = _lay(q[:, span], count, chunk, dtype, scale)
            ks, vs, hs, dhs = (_lay(x[:, span], count, chunk, dtype) for x in (k, v, h, dh))
            memories = _memories(ks, vs, gates, part, starts_c[i], starts_n[i])
            gq, gk, gv, dc, dn, inflow = _block_backward(
                qs, ks, vs, hs, dhs, gates, part, memories, dc, dn, normalize, eps
            )
            qdq, kdk = ((a * b).sum(-1, dtype=gates.u.dtype).view(-1, count, chunk) for a, b in ((qs, gq), (ks, gk)))
            dlog_i[:, part] = kdk
            dlog_f[:, part] = _forget_gradient(qdq - kdk, inflow, gates, part)
            for laid, out in ((gq.mul_(scale), dq), (gk, dk), (gv, dv)):
                _unlay(laid, out[:, span])
        batch, steps, heads = log_i.shape
        dlog_i, dlog_f = (
            g.view(batch, heads, -1)[:, :, :steps]
            .transpose(1, 2)
            .to(log_i.dtype, memory_format=torch.contiguous_format)
            for g in (dlog_i, dlog_f)
        )
    return dq, dk, dv, dlog_i, dlog_f, dc.reshape(shape).clone(), dn.reshape(shape[:-1]).clone()


def _block_backward(q, k, v, h, dh, gates, part, memories, dc, dn, normalize, eps):
    """Gradients of one block from those of its last memory; inflow (B·H, N) is <C⁺, dC⁺> + <n⁺, dn⁺> of each chunk."""
    (cs, ns), dtype = memories, q.dtype
    rows, count = cs.shape[0], cs.shape[1] - 1
    alpha, beta = (g[:, part].reshape(rows * count, -1, 1) for g in (gates.alpha, gates.beta))
    before_c, before_n = cs[:, :-1].reshape(-1, *cs.shape[2:]), ns[:, :-1].reshape(-1, ns.shape[2])
    d = _decay(gates, part, dtype)
    p = torch.bmm(q, k.mT).mul_(d).tril_()
    den, s = _denominator(p, q, before_n, gates, part, normalize, eps)
    dnum = dh / den.unsqueeze(-1)
    ds = torch.bmm(dnum, v.mT)
    bq = q * beta
    if normalize:
        slope = ((dnum * h).sum(-1).neg_() * s.sign()).unsqueeze(-1)  # (B·H·N, L, 1)
        ds.add_(slope)
        out_n = torch.bmm(bq.mT, slope).view(rows, count, -1)
    else:
        slope, out_n = None, torch.zeros_like(ns[:, 1:])
    ds.mul_(d).tril_()
    dcs, dns, dc, dn = _memory_gradients(
        torch.bmm(bq.mT, dnum).view(rows, count, *dc.shape[1:]), out_n, gates, part, dc, dn
    )
    inflow = (cs[:, 1:] * dcs).sum((-2, -1)) + (ns[:, 1:] * dns).sum(-1)
    dcs, dns = dcs.flatten(0, 1), dns.flatten(0, 1)
    dv = torch.bmm(p.mT, dnum).baddbmm_(k * alpha, dcs)
    dk = torch.bmm(v * alpha, dcs.mT).addcmul_(alpha, dns.unsqueeze(1)).baddbmm_(ds.mT, q)
    dnum.mul_(beta)
    dq = torch.bmm(ds, k).baddbmm_(dnum, before_c.mT)
    if normalize:
        dq.addcmul_(slope * beta, before_n.unsqueeze(1))
    return dq, dk, dv, dc, dn, inflow


def _memory_gradients(out_c, out_n, gates, part, dc, dn):
    """dC⁺ and dn⁺ of every chunk in `part`, and the gradients of the memory before the first."""
    dcs, dns = torch.empty_like(out_c), torch.empty_like(out_n)
    gamma = gates.gamma[:, part]
    for j in range(out_c.shape[1] - 1, -1, -1):
        dcs[:, j], dns[:, j] = dc, dn
        dc = torch.addcmul(out_c[:, j], dc, gamma[:, j, None, None])
        dn = torch.addcmul(out_n[:, j], dn, gamma[:, j, None])
    return dcs, dns, dc, dn


def _forget_gradient(flow, inflow, gates, part):
    """dlog_f (B·H, N, L): what flows in at the end of the chunk or document, and everything from there back to t."""
    inflow = inflow.to(flow.dtype).unsqueeze(-1)
    if gates.document is None:
        return flow.flip(-1).cumsum(-1).flip(-1) + inflow
    document = gates.document[:, part]
    together = (document.unsqueeze(-1) == document.unsqueeze(-2)).triu()
    total = torch.where(together, flow.unsqueeze(-2), 0).sum(-1) + inflow * (document == document[..., -1:])
    # The first token of a document has nothing to forget.
    first = torch.cat([document[..., :1] > 0, document.diff(dim=-1) > 0], -1)
    return total.masked_fill(first, 0)


@_mlstm_chunked.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
    rows, (keys, values), chunks = q.shape[0] * q.shape[2], c.shape[2:], -(-q.shape[1] // chunk)
    blocks = -(-chunks // _block_size(rows, chunks, chunk, keys, values))
    starts = [(blocks, rows, keys, values), (blocks, rows, keys)] if save else [(0,), (0,)]
    memory = (x.new_empty(x.shape) for x in (c, n, m))
    return v.new_empty(v.shape), *memory, *(c.new_empty(shape) for shape in starts)


@_mlstm_chunked_backward.register_fake
def _(dh, dc, dn, q, k, v, log_i, log_f, m, reset, h, starts_c, starts_n, scale, normalize, eps, chunk):
    memory = (*m.shape, q.shape[-1], v.shape[-1])
    like = (x.new_empty(x.shape) for x in (q, k, v, log_i, log_f))
    return *like, starts_c.new_empty(memory), starts_c.new_empty(memory[:-1])


def _setup_context(ctx, inputs, output):
    q, k, v, log_i, log_f, _, _, m, reset, *ctx.settings, save = inputs
    if not save:
        return
    h, _, _, last_m, starts_c, starts_n = output
    ctx.mark_non_differentiable(last_m, starts_c, starts_n)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_i, log_f, m, reset, h, starts_c, starts_n)


def _backward(ctx, dh, dc, dn, *_):
    grads = _mlstm_chunked_backward(dh, dc, dn, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError("mlstm has no second derivative on backend 'cpu'; backend='reference' has one")


_mlstm_chunked.register_autograd(_backward, setup_context=_setup_context)
_mlstm_chunked_backward.register_autograd(_no_double_backward)
