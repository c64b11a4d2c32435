"""mLSTM in chunks, in plain PyTorch: products inside a chunk, a recurrence from chunk to chunk, and the exact backward by hand.

The gates of a chunk that starts with stabiliser m⁻ are rank one:

    b_t = Σ log_f up to t      u = log_i - b      M_t = max(m⁻, max_{j≤t} u_j)      m = b + M      D_tj = exp(u_j - M_t) for j ≤ t
    s = (Q Kᵀ ⊙ D) 1 + exp(m⁻ - M) ⊙ Q n⁻      h = a ((Q Kᵀ ⊙ D) V + exp(m⁻ - M) ⊙ Q C⁻) / (max(|a s|, exp(-m)) + eps)

M_t keeps the exponents in range, and h does not depend on it. Where M climbs little inside a chunk, the M_0 of its first
token does for all of them (so nothing of a token's result stems from its future). D is then exp(u_j - M_0), a factor on K:

    W = exp(u - M_0) ⊙ K      P = tril(Q Wᵀ)      y = P 1 + Q e      X = P V + Q E      h = X ⊙ x
    den = max(|a y|, exp(-m + M - M_0)) + eps exp(M - M_0)      x = a / den      r = [the maximum is |a y|] a y / den
    E = exp(m⁻ - M_0) C⁻      Z = E + Wᵀ V      E of the next chunk = exp(b_L + M_0 - M_0 of the next) Z        (e likewise, of n)

and backward, with everything between blocks recomputed and nothing but the inputs, h and the memory at block starts kept:

    δ = Σ dh ⊙ h      dX = x ⊙ dh      dy = -δ ⊙ x ⊙ sign(r)      dP = tril(dX Vᵀ + dy 1ᵀ)
    dQ = dP W + dX Eᵀ + dy eᵀ      dW = dPᵀ Q + V dZᵀ + 1 dzᵀ      dK = exp(u - M_0) ⊙ dW      dV = Pᵀ dX + W dZ
    dE = dZ + Qᵀ dX                q·dq = δ (1 - |r|)              dlog_i = k·dk = w·dw
    dlog_f_t = Σ_{t ≤ r ≤ end of chunk} (q_r·dq_r - k_r·dk_r) + <Z, dZ> + <z, dz>

Where M climbs far, D is written out and W is K. A reset lets b, M and the last sum restart, and cuts P, E and Z. The gates
are worked out in float64: they are two vectors, and the prefix sums would otherwise cost a digit. A sequence is a row of
blocks that fit the cache, so memory beside the inputs stays flat.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from exlstm.ops.backend import batched, exact, faked

# exp(-m) would underflow far above this, and 0 / 0 follow where q_tᵀ n_t vanishes: it is held at e^-60, as in the reference.
M_MAX = 60.0
# How far M may climb inside a chunk: e^50 leaves float32 as much room again on either side.
CLIMB = 50.0
# Numbers in flight that a block of chunks may take, so that its matrices stay in a cache.
BLOCK_NUMBERS = 1 << 22


class Gates(NamedTuple):
    """What the gates of a block amount to, (N, B·H, L) unless said otherwise, None where every number would be 1."""

    u: Tensor  # float64
    top: Tensor  # M, float64
    floor: Tensor  # exp(-m), on the scale of its row of P
    eps: Tensor | float  # the same of eps
    weight: Tensor | None  # W = weight ⊙ K
    first: Tensor | None  # E reaches the output as first ⊙ Q E
    last: Tensor | None  # Z = keep E + (last ⊙ W)ᵀ V
    keep: Tensor | None  # (N, B·H)
    carry: Tensor  # from Z to the E of the next chunk, and behind the last to the memory (N, B·H)
    opening: Tensor  # from the memory to the first E (B·H,)
    last_m: Tensor  # (B·H,), float64
    document: Tensor | None  # resets so far in the chunk, where there are resets

    @property
    def steep(self):
        """M climbs too far for a factor on K."""
        return self.weight is None


class Work(NamedTuple):
    """What forward and backward of a block share, chunk-major: N·B·H chunks in the order (N, B, H)."""

    p: Tensor  # (N·B·H, L, L)
    e: Tensor  # (N, B·H, K, V)
    e_n: Tensor  # e (N, B·H, K)
    x: Tensor  # (N·B·H, L)
    r: Tensor | None  # (N·B·H, L), None without normaliser
    d: Tensor | None  # D (N·B·H, L, L) where it is not in W


class _Space(threading.local):
    """Memory that a thread keeps from call to call: fresh pages cost a third of the time. Two names never overlap."""

    def __init__(self):
        self.kept = {}

    def __call__(self, name, like, *shape):
        """An uninitialised tensor (shape) of the kind of `like`, valid until `name` is asked for again."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        numbers = torch.Size(shape).numel()
        kept = self.kept.get((name, like.dtype))
        if kept is None or kept.numel() < numbers:
            # What is born in inference mode could never be written outside of it.
            with torch.inference_mode(False):
                kept = self.kept[name, like.dtype] = torch.empty(numbers, dtype=like.dtype, device="cpu")
        return kept[:numbers].view(shape)


_space = _Space()


def _fresh(name, like, *shape):
    """The same, to be kept."""
    return like.new_empty(shape)


def chunked(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk=None):
    """Same signature and result as `reference`, for two tokens and more; any device."""
    tensors = (q, k, v, log_i, log_f, c, n)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # A compiler sees one operator; without one its machinery would cost half a millisecond a call.
    if torch.compiler.is_compiling() or q.device.type == "meta" or faked():
        # The operator itself chooses the chunk, so that a graph may leave the length open.
        return _mlstm_chunked(*tensors, m, reset, scale, normalize, eps, chunk or 0, save)[:4]
    return _Chunked.apply(*tensors, m, reset, scale, normalize, eps, _chunk_length(q, v, chunk), save)[:4]


def _chunk_length(q, v, asked=None):
    """Tokens of a chunk: as many as were asked for, never more than there are, or what suits the widths."""
    if asked:
        return torch.sym_min(asked, q.shape[1])
    longest = 32 if q.shape[-1] + v.shape[-1] <= 64 else 64
    return -(-q.shape[1] // -(-q.shape[1] // longest))


def _spans(batch, steps, heads, keys, values, length):
    """The tokens of a sequence in blocks, as slices: as many chunks each as the cache holds, in blocks of one size."""
    size = _block(batch, steps, heads, keys, values, length)
    return [slice(i, min(i + size, steps)) for i in range(0, steps, size)]


def _block(batch, steps, heads, keys, values, length):
    """Tokens of a block. No branch asks for a number, so that a compiler may leave sizes open."""
    chunks = -(-steps // length)
    numbers = batch * heads * (2 * length * length + 2 * keys * values + 3 * length * (keys + values))
    fit = torch.sym_max(1, BLOCK_NUMBERS // numbers)
    return -(-chunks // -(-chunks // fit)) * length


def _gates(log_i, log_f, m, reset, length, dtype, eps):
    """Gates of a block: log_i, log_f (B, t, H), m (B·H,) in float64."""
    batch, steps, heads = log_i.shape
    chunks = -(-steps // length)

    def lay(x, fill, kind):
        laid = x.new_full((chunks, batch * heads, length, 1), fill, dtype=kind)
        return _lay(x.unsqueeze(-1), laid).squeeze(-1)

    log_i, log_f = lay(log_i, -torch.inf, m.dtype), lay(log_f, 0.0, m.dtype)
    b = log_f.cumsum(-1)
    document = fresh = start = None
    if reset is None:
        u = log_i - b
        top = u.cummax(-1).values
    else:
        reset = lay(reset.unsqueeze(-1).expand(-1, -1, heads), False, torch.bool)
        document = reset.cumsum(-1)
        fresh = document > 0
        start = torch.where(reset, torch.arange(length, device=reset.device), 0).cummax(-1).values
        b = b - torch.where(fresh, (b - log_f).gather(-1, start), 0)
        u = log_i - b
        together = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
        top = torch.where(together, u.unsqueeze(-2), -torch.inf).amax(-1)
    before = _stabilisers(m, b[..., -1], top[..., -1], None if fresh is None else fresh[..., -1])  # (N + 1, B·H)
    own = before[:-1, :, None].expand_as(top)
    top = torch.maximum(top, own if fresh is None else own.masked_fill(fresh, 0))
    return _scaled(u, b, top, before, document, start, dtype, eps)


def _stabilisers(m, total, top, fresh):
    """m at the start of every chunk and after the last (N + 1, B·H)."""
    if fresh is None:
        # m less the sum of all forget gates before is a running maximum.
        sums = total.cumsum(0)
        highest = torch.cat([m[None], top - sums + total]).cummax(0).values
        highest[1:] += sums
        return highest
    found = [m]
    for j in range(len(total)):
        m = total[j] + torch.maximum(m.masked_fill(fresh[j], 0), top[j])
        found.append(m)
    return torch.stack(found)


def _scaled(u, b, top, before, document, start, dtype, eps):
    """Gates with every factor on the scale of the rows of P: M_0 of its document, or M where that climbs too far."""
    base = top[..., :1] if document is None else top.gather(-1, start)
    climb = top - base
    # On an accelerator the answer would have to be waited for.
    steep = u.device.type != "cpu" or not bool(climb.amax() <= CLIMB)
    begin = torch.maximum(before[:-1], top[..., 0])  # scale of E
    row, end = (top, top[..., -1]) if steep else (base, base.expand_as(top)[..., -1])  # scales of P and of Z
    weight = first = last = keep = None
    if steep:
        first, last, keep = (
            torch.exp(begin.unsqueeze(-1) - top),
            torch.exp(u - end.unsqueeze(-1)),
            torch.exp(begin - end),
        )
    else:
        weight = torch.exp(u - base)
    if document is not None:
        fresh, left = document > 0, document != document[..., -1:]
        first = (torch.ones_like(u) if first is None else first).masked_fill(fresh, 0)
        last = (torch.ones_like(u) if last is None else last).masked_fill(left, 0)
        keep = (torch.ones_like(end) if keep is None else keep).masked_fill(fresh[..., -1], 0)
    floor = torch.exp(top - row - (b + top).clamp(max=M_MAX))
    after = torch.cat([begin[1:], before[-1:]])
    carry, opening = torch.exp(b[..., -1] + end - after), torch.exp(before[0] - begin[0])
    eps = (eps * torch.exp(top - row)).to(dtype) if eps else 0.0
    small = (None if x is None else x.to(dtype) for x in (weight, first, last, keep, carry, opening))
    return Gates(u, top, floor.to(dtype), eps, *small, before[-1], document)


def _pairs(x, laid):
    """Views on the same numbers, of x (B, t, H, D) and of laid (N, B·H, L, D): the whole chunks, then what is left."""
    (batch, steps, heads, width), length = x.shape, laid.shape[2]
    laid = laid.view(-1, batch, heads, length, laid.shape[3])
    whole, left = divmod(steps, length)
    if whole:
        yield x[:, : whole * length].view(batch, whole, length, heads, width).permute(1, 0, 3, 2, 4), laid[:whole]
    if left:
        yield x[:, whole * length :].transpose(1, 2), laid[whole, :, :, :left]


def _lay(x, laid, factor=None):
    """Writes x (B, t, H, D), times `factor` (N, B·H, L), to laid (N, B·H, L, D)."""
    if factor is None:
        for source, target in _pairs(x, laid):
            target.copy_(source)
    else:
        factors = (f for _, f in _pairs(x, factor.unsqueeze(-1)))
        for (source, target), f in zip(_pairs(x, laid), factors, strict=True):
            torch.mul(source, f, out=target)
    return laid


def _unlay(laid, x, factor=None):
    """Writes laid (N·B·H, L, D), times `factor` (N, B·H, L), to x (B, t, H, D)."""
    laid = laid.view(-1, x.shape[0] * x.shape[2], *laid.shape[1:])
    if factor is None:
        for target, source in _pairs(x, laid):
            target.copy_(source)
    else:
        factors = (f for _, f in _pairs(x, factor.unsqueeze(-1)))
        for (target, source), f in zip(_pairs(x, laid), factors, strict=True):
            torch.mul(source, f, out=target)


def _decay(gates, dtype):
    """D (N·B·H, L, L) on the scale M; what lies above the diagonal is arbitrary."""
    # The exponents differ by little what u and M have in common: the high parts cancel, the low parts keep the digits.
    (u, u_low), (top, top_low) = (_split(x, dtype) for x in (gates.u, gates.top))
    d = u.unsqueeze(-2) - top.unsqueeze(-1)
    if u_low is not None:
        d.add_(u_low.unsqueeze(-2)).sub_(top_low.unsqueeze(-1))
    return d.exp_().flatten(0, 1)


def _split(x, dtype):
    """x as a sum of two numbers of `dtype`, the second None where the first is exact."""
    if x.dtype == dtype:
        return x, None
    high = x.to(dtype)
    return high, (x - high).nan_to_num_(0).to(dtype)


def _cut(p, d, gates):
    """P, in place: times D where it is not in W, and 0 where t does not see j."""
    if d is not None:
        p.mul_(d)
    p.tril_()
    if gates.document is not None:
        document = gates.document.flatten(0, 1)
        p.masked_fill_(document.unsqueeze(-1) != document.unsqueeze(-2), 0)
    return p


def _scale_rows(x, factor):
    """x (N·B·H, L, D) ⊙ factor (N, B·H, L), x itself without one."""
    return x if factor is None else x * factor.reshape(-1, factor.shape[-1], 1)


def _laid(q, k, v, gates, like):
    """Q, W and V (N·B·H, L, ·) of q, k, v (B, t, H, ·)."""
    chunks, rows, length = gates.u.shape
    laid = []
    for name, x, factor in (("q", q, None), ("w", k, gates.weight), ("v", v, None)):
        space = _space(name, like, chunks, rows, length, x.shape[-1])
        if chunks * length > x.shape[1]:
            space[-1].zero_()
        laid.append(_lay(x, space, factor).flatten(0, 1))
    return laid


def _work(q, w, v, gates, c, n, scale, normalize, space):
    """Work of a block from the memory before it, c (B·H, K, V) and n (B·H, K), and the memory after it."""
    (rows, keys, values), (chunks, _, length) = c.shape, gates.u.shape
    d = _decay(gates, c.dtype) if gates.steep else None
    p = _cut(torch.bmm(q, w.mT, out=space("p", c, len(q), length, length)), d, gates)
    late = _scale_rows(w, gates.last)
    gain = torch.bmm(late.mT, v, out=_space("gain", c, len(q), keys, values)).view(chunks, rows, keys, values)
    e, c = _memories(gain, c, gates, space("e", c, *gain.shape))
    gain = late.sum(1).view(chunks, rows, keys)
    e_n, n = _memories(gain, n, gates, torch.empty_like(gain))
    return Work(p, e, e_n, *_denominator(p, q, e_n, gates, scale, normalize), d), (c, n)


def _memories(gain, memory, gates, e):
    """Fills E of every chunk (N, B·H, ...) from the memory before the first (B·H, ...); also returns the one after the last."""
    torch.mul(memory, _like(gates.opening, memory), out=e[0])
    for j in range(len(gain)):
        # Z takes the place of the gain.
        _add_kept(gain[j], e[j], gates, j)
        if j + 1 < len(gain):
            torch.mul(gain[j], _like(gates.carry[j], memory), out=e[j + 1])
    return e, gain[-1] * _like(gates.carry[-1], memory)


def _like(factor, memory):
    """factor (B·H,) with as many axes as the memory."""
    return factor.view(-1, *[1] * (memory.ndim - 1))


def _add_kept(x, memory, gates, j):
    """x += what chunk j keeps of the memory, in place."""
    if gates.keep is None:
        x.add_(memory)
    else:
        x.addcmul_(memory, _like(gates.keep[j], memory))


def _denominator(p, q, e_n, gates, scale, normalize):
    """x and r, each (N·B·H, L)."""
    floor = gates.floor.flatten(0, 1)
    if not normalize:
        return scale / floor, None
    # A row times a matrix: a matrix times a column takes four times as long.
    y = torch.bmm(e_n.view(len(q), 1, -1), q.mT).squeeze(1)
    if gates.first is not None:
        y.mul_(gates.first.flatten(0, 1))
    y.add_(p.sum(-1)).mul_(scale)
    size = y.abs()
    den = torch.maximum(size, floor)
    if torch.is_tensor(gates.eps):
        den.add_(gates.eps.flatten(0, 1))
    return scale / den, y.div_(den).masked_fill_(size <= floor, 0)


def _forward(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save, keep):
    """h, c, n, m, then with `save` C, n and m at the start of every block but the first; with `keep` also Gates and Work
    of the block where there is only one, else None."""
    shape, dtype, kept = c.shape, c.dtype, None
    with exact(q.device):
        h = torch.empty_like(v, memory_format=torch.contiguous_format)
        c, n, m = c.flatten(0, 1), n.flatten(0, 1), _wide(m)
        empty, reset, starts = _empty(c, n), reset if _any(reset) else None, []
        spans = _spans(*q.shape[:3], *shape[2:], chunk)
        space = _fresh if keep and len(spans) == 1 else _space
        for span in spans:
            starts.append((c, n, m))
            gates = _gates(log_i[:, span], log_f[:, span], m, _part(reset, span), chunk, dtype, eps)
            laid = _laid(q[:, span], k[:, span], v[:, span], gates, c)
            work, (c, n) = _work(*laid, gates, c, n, scale, normalize, space)
            m = gates.last_m
            x = torch.bmm(work.p, laid[2], out=_space("x", c, *laid[2].shape))
            none = len(c) if empty and len(starts) == 1 else 0  # chunks before which there is no memory
            x[none:].baddbmm_(_scale_rows(laid[0], gates.first)[none:], work.e.flatten(0, 1)[none:])
            _unlay(x, h[:, span], work.x.view_as(gates.u))
            kept = (gates, work) if space is _fresh else None
        none = (c.new_empty(0, *x.shape) for x in (c, n)), m.new_empty(0, *m.shape)
        starts = [torch.stack(x) for x in zip(*starts[1:])] if save and len(spans) > 1 else (*none[0], none[1])
    return (h, c.view(shape), n.view(shape[:-1]), m.to(dtype).view(shape[:2]), *starts), kept


def _wide(m):
    """m (B·H,) in float64, which Apple's GPUs lack."""
    return m.flatten().to(torch.float32 if m.device.type == "mps" else torch.float64)


def _empty(*memory):
    """Whether nothing stands in the memory; on an accelerator the answer would have to be waited for."""
    return memory[0].device.type == "cpu" and all(end == 0 for x in memory for end in x.aminmax())


def _any(reset):
    return reset is not None and (reset.device.type != "cpu" or bool(reset.any()))


def _part(x, span):
    return None if x is None else x[:, span]


def _backward(dh, dc, dn, saved, kept, scale, normalize, eps, chunk, memory):
    """dq, dk, dv, dlog_i, dlog_f, dc, dn, the last two with respect to the initial memory and empty without `memory`."""
    q, k, v, log_i, log_f, c, n, m, reset, h, last_c, last_n, *starts = saved
    dtype, shape = c.dtype, c.shape
    with exact(q.device):
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_i, log_f)]
        dh = torch.zeros_like(h) if dh is None else dh
        end = None
        if dc is not None or dn is not None:
            end = [(torch.zeros_like(x) if dx is None else dx.to(dtype)).flatten(0, 1) for dx, x in ((dc, c), (dn, n))]
        memories = [(c.flatten(0, 1), n.flatten(0, 1), _wide(m)), *zip(*starts)]
        memories.append((last_c.flatten(0, 1), last_n.flatten(0, 1), None))
        empty, reset = _empty(c, n), reset if _any(reset) else None
        spans = _spans(*q.shape[:3], *shape[2:], chunk)
        for i in reversed(range(len(spans))):
            span, (c, n, m) = spans[i], memories[i]
            gates = kept[0] if kept else _gates(
                log_i[:, span], log_f[:, span], m, _part(reset, span), chunk, dtype, eps
            )  # fmt: skip
            laid = _laid(q[:, span], k[:, span], v[:, span], gates, c)
            work = kept[1] if kept else _work(*laid, gates, c, n, scale, normalize, _space)[0]
            parts = [x[:, span] for x in (dh, h, *grads)]
            end = _block_backward(*parts, *laid, gates, work, memories[i + 1], end, memory or i > 0, empty and i == 0)
    if not memory:
        return *grads, c.new_empty(0), n.new_empty(0)
    return *grads, end[0].reshape(shape), end[1].reshape(shape[:-1])


def _block_backward(dh, h, dq, dk, dv, dlog_i, dlog_f, q, w, v, gates, work, after, end, memory, empty):
    """Fills dq ... dlog_f (B, t, H, ·) from dh and `end`, the gradients of the memory `after` the block (None: zero).

    Returns those of the memory before the block where `memory` asks for them; `empty`: nothing stands in it.
    """
    p, e, e_n, x, r, d = work
    chunks, rows, length = gates.u.shape
    delta = torch.mul(dh.to(x.dtype), h.to(x.dtype), out=_space("delta", x, *h.shape)).sum(-1, keepdim=True)
    delta = _lay(delta, x.new_zeros(chunks, rows, length, 1)).view_as(x)
    dx = _space("dx", x, chunks, rows, length, h.shape[-1])
    if chunks * length > h.shape[1]:
        dx[-1].zero_()
    dx = _lay(dh, dx, x.view_as(gates.u)).flatten(0, 1)
    dy = torch.zeros_like(x) if r is None else (delta * x).neg_().mul_(r.sign())
    dy = dy.unsqueeze(-1)  # (N·B·H, L, 1)
    dp = torch.bmm(dx, v.mT, out=_space("dp", x, *p.shape)).add_(dy)
    _cut(dp, _decay(gates, x.dtype) if gates.steep and d is None else d, gates)
    dz, dz_n, inflow, before = _memory_gradients(q, dx, dy, gates, work, after, end, memory)
    some, none = len(dz), rows if empty else 0  # chunks with a gradient behind them, and with no memory before them

    g = torch.bmm(p.mT, dx, out=_space("x", x, *v.shape))
    g[:some].baddbmm_(_scale_rows(w, gates.last)[:some], dz)
    _unlay(g, dv)

    g = torch.bmm(dp.mT, q, out=_space("g", x, *q.shape))
    if gates.last is None:
        g[:some].baddbmm_(v[:some], dz.mT).add_(dz_n)
    else:
        g[:some] += _scale_rows(torch.bmm(v[:some], dz.mT).add_(dz_n), gates.last[: some // rows])
    kdk = torch.mul(w, g, out=_space("kdk", x, *q.shape)).sum(-1)
    _unlay(g, dk, gates.weight)

    g = torch.bmm(dp, w, out=g)
    g[none:].baddbmm_(_scale_rows(dx, gates.first)[none:], e.flatten(0, 1)[none:].mT)
    g[none:].addcmul_(_scale_rows(dy, gates.first)[none:], e_n.view(len(g), 1, -1)[none:])
    _unlay(g, dq)

    qdq = delta if r is None else delta * (1 - r.abs())
    _unlay(kdk.unsqueeze(-1), dlog_i.unsqueeze(-1))
    flow = _forget_gradient((qdq - kdk).view_as(gates.u).to(gates.u.dtype), inflow, gates)
    _unlay(flow.view(-1, length, 1), dlog_f.unsqueeze(-1))
    return before


def _memory_gradients(q, dx, dy, gates, work, after, end, memory):
    """dZ (·, K, V) and dz (·, 1, K) of the chunks behind which there is a gradient, <Z, dZ> + <z, dz> of those chunks,
    and the gradient of the memory before all."""
    (chunks, rows, keys, values), q = work.e.shape, _scale_rows(q, gates.first)
    # What the output hands to E, from the first chunk whose E is asked about.
    known = 0 if memory else 1
    q, dx, dy = (x[known * rows :] for x in (q, dx, dy))
    out = torch.bmm(q.mT, dx, out=_space("out", dx, len(q), keys, values)).view(-1, rows, keys, values)
    out_n = torch.bmm(dy.mT, q).view(-1, rows, keys)
    ends = (None, None) if end is None else end
    dz = _memories_backward(out, ends[0], gates, _space("dz", dx, chunks - (end is None), *out.shape[1:]))
    dz_n = _memories_backward(out_n, ends[1], gates, dx.new_empty(chunks - (end is None), rows, keys))
    # Z reaches the future through the E of the next chunk, or through the memory after the block.
    inflow = (work.e[1:] * out[1 - known :]).sum((-2, -1)) + (work.e_n[1:] * out_n[1 - known :]).sum(-1)
    if end is not None:
        last = (after[0] * end[0]).sum((-2, -1)) + (after[1] * end[1]).sum(-1)
        inflow = torch.cat([inflow, last[None]])
    before = [None if known else x[0] * _like(gates.opening, x[0]) for x in (out, out_n)]
    return dz.flatten(0, 1), dz_n.view(-1, 1, keys), inflow.unsqueeze(-1), before


def _memories_backward(out, end, gates, dz):
    """Fills dZ (·, B·H, ...) of the chunks behind which there is a gradient; `out` becomes the gradient of their E."""
    chunks = len(gates.u)
    known = chunks - len(out)
    if end is not None:
        torch.mul(end, _like(gates.carry[-1], end), out=dz[-1])
    for j in range(chunks - 1, known - 1, -1):
        if j < len(dz):
            _add_kept(out[j - known], dz[j], gates, j)
        if j:
            torch.mul(out[j - known], _like(gates.carry[j - 1], out[0]), out=dz[j - 1])
    return dz


def _forget_gradient(flow, inflow, gates):
    """dlog_f (N, B·H, L): what flows in at the end of the chunk or document, and everything from there back to t."""
    some = len(inflow)
    if gates.document is None:
        total = flow.flip(-1).cumsum(-1).flip(-1)
        total[:some] += inflow
        return total
    document = gates.document
    together = (document.unsqueeze(-1) == document.unsqueeze(-2)).triu()
    total = torch.where(together, flow.unsqueeze(-2), 0).sum(-1)
    total[:some] += inflow * (document == document[..., -1:])[:some]
    # The first token of a document has nothing to forget.
    first = torch.cat([document[..., :1] > 0, document.diff(dim=-1) > 0], -1)
    return total.masked_fill(first, 0)


class _Chunked(torch.autograd.Function):
    """The operator with its gradient, eager; what a single block has worked out is kept for its backward."""

    @staticmethod
    def forward(ctx, q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
        (h, *memory, last_m, starts_c, starts_n, starts_m), kept = _forward(
            q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save, keep=save
        )
        ctx.mark_non_differentiable(last_m)
        ctx.set_materialize_grads(False)
        if save:
            ctx.settings = (scale, normalize, eps, chunk)
            kept = () if kept is None else (*kept[0]._replace(eps=None), *kept[1])
            saved = (q, k, v, log_i, log_f, c, n, m, reset, h, *memory, starts_c, starts_n, starts_m)
            ctx.save_for_backward(*saved, *kept)
        return h, *memory, last_m

    @staticmethod
    def backward(ctx, dh, dc, dn, _):
        memory = any(ctx.needs_input_grad[5:7])
        tensors = ctx.saved_tensors
        saved, kept = tensors[:15], tensors[15:]
        if torch.is_grad_enabled() or any(map(batched, (dh, dc, dn))):
            # Somebody means to differentiate twice, which the operator refuses, or for many gradients at once, one by one.
            grads = _mlstm_chunked_backward(dh, dc, dn, *saved, *ctx.settings, memory)
        else:
            cut = len(Gates._fields)
            kept = (Gates(*kept[:cut]), Work(*kept[cut:])) if kept else None
            grads = _backward(dh, dc, dn, saved, kept, *ctx.settings, memory)
        return *(grads if memory else (*grads[:-2], None, None)), *[None] * 7


@torch.library.custom_op("exlstm::mlstm_chunked", mutates_args=())
def _mlstm_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None,
    scale: float, normalize: bool, eps: float, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward` as one operator of a compiled graph; a chunk of 0 is chosen by the length."""
    chunk = _chunk_length(q, v, chunk)
    return _forward(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save, keep=False)[0]


@torch.library.custom_op("exlstm::mlstm_chunked_backward", mutates_args=())
def _mlstm_chunked_backward(
    dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor,
    c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None, h: Tensor, last_c: Tensor, last_n: Tensor,
    starts_c: Tensor, starts_n: Tensor, starts_m: Tensor,
    scale: float, normalize: bool, eps: float, chunk: int, memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_backward` as one operator of a compiled graph."""
    saved = (q, k, v, log_i, log_f, c, n, m, reset, h, last_c, last_n, starts_c, starts_n, starts_m)
    return _backward(dh, dc, dn, saved, None, scale, normalize, eps, _chunk_length(q, v, chunk), memory)


@_mlstm_chunked.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps, chunk, save):
    # Without a backward nothing is kept; with one the state in front of every block but the first.
    rows, kept = q.shape[0] * q.shape[2], 0
    if save:
        kept = -(-q.shape[1] // _block(*q.shape[:3], *c.shape[2:], _chunk_length(q, v, chunk))) - 1
    starts = [(kept, rows, *x.shape[2:]) for x in (c, n, m)]
    memory = (x.new_empty(x.shape) for x in (c, n, m))
    kept = (x.new_empty(shape) for x, shape in zip((c, n, _wide(m)), starts))
    return v.new_empty(v.shape), *memory, *kept


@_mlstm_chunked_backward.register_fake
def _(dh, dc, dn, q, k, v, log_i, log_f, c, n, m, *rest):
    like = (x.new_empty(x.shape) for x in (q, k, v, log_i, log_f))
    return *like, *(x.new_empty(x.shape if rest[-1] else 0) for x in (c, n))


def _setup_context(ctx, inputs, output):
    *tensors, scale, normalize, eps, chunk, save = inputs
    if not save:
        return
    h, c, n, last_m, *starts = output
    ctx.settings = (scale, normalize, eps, chunk)
    ctx.mark_non_differentiable(last_m, *starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, h, c, n, *starts)


def _compiled_backward(ctx, dh, dc, dn, *_):
    memory = any(ctx.needs_input_grad[5:7])
    grads = _mlstm_chunked_backward(dh, dc, dn, *ctx.saved_tensors, *ctx.settings, memory)
    return *(grads if memory else (*grads[:-2], None, None)), *[None] * 7


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "mlstm has no second derivative on backend 'cpu'; inside `with exlstm.backend(\"reference\")` it has one"
    )


_mlstm_chunked.register_autograd(_compiled_backward, setup_context=_setup_context)
_mlstm_chunked_backward.register_autograd(_no_double_backward)
