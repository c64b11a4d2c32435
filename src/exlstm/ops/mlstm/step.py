"""One token of the mLSTM as a Triton kernel, for decoding: the memory is read once and written once.

m⁺ = max(log_f + m, log_i)      f' = exp(log_f + m - m⁺)      i' = exp(log_i - m⁺)
C⁺ = f' C + i' k vᵀ             n⁺ = f' n + i' k
h = C⁺ᵀ q / (max(|qᵀ n⁺|, exp(-m⁺)) + eps), with the scale on q; without normaliser the denominator is exp(-m⁺).

A program owns columns of one head's memory. All programs of a head read its old n and m, so in place these are renewed by
a second, tiny launch, or written beside the old ones where the caller keeps room for both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlstm.ops import backend as backends
from exlstm.ops.kernels import DTYPES, rows_apart

# As in the reference: exp(-m) is held at e^-60.
M_MAX = tl.constexpr(60.0)
# Features of a head up to which a block of columns stays in registers.
LARGEST = 512
RUNTIME = ["H", *(f"stride_{x}{axis}" for x in "qkvif" for axis in "bh"), "stride_rb"]


class Tiles(NamedTuple):
    """How the work is cut: columns and warps a program, the cache policy of c, and whether the second launch overlaps."""

    columns: int
    warps: int
    evict: str = ""
    overlap: bool = False


def tiles(keys: int, values: int) -> Tiles:
    """Lines of 128 bytes, and 64 numbers a thread in flight; the same for every batch, so that no row sees its batch."""
    columns = min(32, triton.next_power_of_2(values))
    return Tiles(columns, max(1, min(8, triton.next_power_of_2(keys) * columns // 2048)))


@triton.jit
def _gates(b_i, b_f, b_m):
    """m⁺, f' and i' of log_i, log_f and m."""
    b_old = b_f + b_m
    b_new = tl.maximum(b_old, b_i, propagate_nan=tl.PropagateNan.ALL)
    return b_new, tl.exp(b_old - b_new), tl.exp(b_i - b_new)


@triton.jit(do_not_specialize=RUNTIME)
def mlstm_step_forward_kernel(
    q, k, v, log_i, log_f, reset, c, n, m, c_out, n_out, m_out, h, scale, eps, H,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_ib, stride_ih, stride_fb, stride_fh, stride_rb,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_RESET: tl.constexpr, WRITE_N: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (B·H·V/BV,): the columns i_v of the memory of head i_h in row i_b, and its n and m where WRITE_N."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = tl.cdiv(V, BV)
    i_v = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    i_b, i_h, i_bh = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    keep_k, keep_v = o_k < K, o_v < V
    keep = keep_k[:, None] & keep_v[None, :]
    o_c = i_bh * K * V + o_k[:, None] * V + o_v[None, :]  # (BK, BV)
    # All loads before all arithmetic: one latency and not four. What a reset forgets is not even read.
    b_lives = tl.load(reset + i_b * stride_rb) == 0 if HAS_RESET else tl.full((), True, tl.int1)
    b_q = tl.load(q + i_b * stride_qb + i_h * stride_qh + o_k, mask=keep_k, other=0.0)
    b_k = tl.load(k + i_b * stride_kb + i_h * stride_kh + o_k, mask=keep_k, other=0.0)
    b_v = tl.load(v + i_b * stride_vb + i_h * stride_vh + o_v, mask=keep_v, other=0.0)
    b_n = tl.load(n + i_bh * K + o_k, mask=keep_k & b_lives, other=0.0)
    b_m = tl.load(m + i_bh, mask=b_lives, other=0.0)
    b_i, b_f = tl.load(log_i + i_b * stride_ib + i_h * stride_ih), tl.load(log_f + i_b * stride_fb + i_h * stride_fh)
    b_c = tl.load(c + o_c, mask=keep & b_lives, other=0.0, eviction_policy=EVICT)
    b_m, b_decay, b_gate = _gates(b_i, b_f, b_m)
    b_q, b_k, b_v = b_q.to(tl.float32) * scale, b_k.to(tl.float32) * b_gate, b_v.to(tl.float32)
    b_c = tl.fma(b_decay, b_c, b_k[:, None] * b_v[None, :])
    b_n = tl.fma(b_decay, b_n, b_k)
    # In place, no thread may write before every thread of the program has read.
    tl.debug_barrier()
    tl.store(c_out + o_c, b_c, mask=keep, eviction_policy=EVICT)
    b_den = tl.exp(-tl.minimum(b_m, M_MAX, propagate_nan=tl.PropagateNan.ALL))
    if NORMALIZE:
        b_den = tl.maximum(tl.abs(tl.sum(b_q * b_n, 0)), b_den, propagate_nan=tl.PropagateNan.ALL) + eps
    b_h = tl.sum(b_q[:, None] * b_c, 0) / b_den
    tl.store(h + i_bh * V + o_v, b_h.to(h.dtype.element_ty), mask=keep_v)
    if WRITE_N and i_v == 0:
        tl.store(n_out + i_bh * K + o_k, b_n, mask=keep_k)
        tl.store(m_out + i_bh, b_m)


@triton.jit(do_not_specialize=RUNTIME)
def mlstm_step_normaliser_kernel(
    k, log_i, log_f, reset, n, m, H, stride_kb, stride_kh, stride_ib, stride_ih, stride_fb, stride_fh, stride_rb,
    K: tl.constexpr, BK: tl.constexpr, HAS_RESET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (B·H,): n and m of a head, in place, behind all programs that read the old ones."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    i_bh = tl.program_id(0)
    i_b, i_h, i_bh = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64)
    o_k = tl.arange(0, BK)
    keep = o_k < K
    b_lives = tl.load(reset + i_b * stride_rb) == 0 if HAS_RESET else tl.full((), True, tl.int1)
    b_k = tl.load(k + i_b * stride_kb + i_h * stride_kh + o_k, mask=keep, other=0.0)
    b_n = tl.load(n + i_bh * K + o_k, mask=keep & b_lives, other=0.0)
    b_m = tl.load(m + i_bh, mask=b_lives, other=0.0)
    b_i, b_f = tl.load(log_i + i_b * stride_ib + i_h * stride_ih), tl.load(log_f + i_b * stride_fb + i_h * stride_fh)
    b_m, b_decay, b_gate = _gates(b_i, b_f, b_m)
    tl.debug_barrier()
    # Written out, so that no compiler rounds elsewhere than in the kernel above.
    tl.store(n + i_bh * K + o_k, tl.fma(b_decay, b_n, b_k.to(tl.float32) * b_gate), mask=keep)
    tl.store(m + i_bh, b_m)


def takes(q: Tensor, v: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel runs a token of these q, k and v (B, 1, H, ·) with a memory of `dtype`."""
    return dtype == torch.float32 and q.dtype in DTYPES and max(q.shape[-1], v.shape[-1]) <= LARGEST


def step(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps):
    """(h, c, n, m) after one token, in new tensors: `reference` with T = 1 and without gradients, on float32 memories.

    q, k, v (B, 1, H, ·) in float32, bfloat16 or float16, log_i, log_f (B, 1, H) float32, reset (B, 1) bool or None.
    """
    if torch.compiler.is_compiling():
        return tuple(_step(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps))
    return _functional(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps)


def step_(q, k, v, log_i, log_f, c, n, m, scale, normalize, eps, h=None, *, reset=None, out=None, cut=None):
    """h (B, 1, H, V) after one token, written to `h` where given; c becomes the new memory, and so do n and m.

    For the owner of a decoding loop: no copy, no wait, with `h` no allocation, so a CUDA graph may hold it. With
    out = (n⁺, m⁺) the new n and m are written there, the old ones stay, and one launch does it all.

    >>> h = step_(q, k, v, log_i, log_f, *state, q.shape[-1] ** -0.5, True, 0.0)  # doctest: +SKIP
    """
    for name, tensor in {"c": c, "n": n, "m": m, "h": h, **dict(zip(("n⁺", "m⁺"), out or ()))}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, wanted a contiguous tensor to write to")
    if h is None:
        h = v.new_empty(v.shape)
    cut = cut or tiles(q.shape[-1], v.shape[-1])
    _launch(q, k, v, log_i, log_f, reset, (c, n, m), (c, *(out or (n, m))), h, scale, normalize, eps, cut)
    return h


def _functional(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps):
    state = [x.contiguous() for x in (c, n, m)]
    new, h = [torch.empty_like(x) for x in state], torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch(q, k, v, log_i, log_f, reset, state, new, h, scale, normalize, eps, tiles(q.shape[-1], v.shape[-1]))
    return h, *new


@torch.library.custom_op("exlstm::mlstm_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, c: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None, scale: float, normalize: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    return list(_functional(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps))


@_step.register_fake
def _(q, k, v, log_i, log_f, c, n, m, reset, scale, normalize, eps):
    return [x.new_empty(x.shape) for x in (v, c, n, m)]


def _launch(q, k, v, log_i, log_f, reset, old, new, h, scale, normalize, eps, cut):
    """Both kernels on checked tensors; `old` and `new` are (c, n, m), and may be the same."""
    q, k, v = map(rows_apart, (q, k, v))
    (batch, _, heads, keys), values = q.shape, v.shape[-1]
    height, blocks = triton.next_power_of_2(keys), triton.cdiv(values, cut.columns)
    gates = [s for x in (log_i, log_f) for s in (x.stride(0), x.stride(2))]
    strides = [s for x in (q, k, v) for s in (x.stride(0), x.stride(2))]
    fresh = reset is not None
    reset = reset.view(torch.uint8) if fresh else log_i
    second = blocks > 1 and old[1] is new[1]
    with backends.on(q.device):
        mlstm_step_forward_kernel[(batch * heads * blocks,)](
            q, k, v, log_i, log_f, reset, *old, *new, h, scale, eps, heads, *strides, *gates, reset.stride(0),
            K=keys, V=values, BK=height, BV=cut.columns, NORMALIZE=normalize, HAS_RESET=fresh, WRITE_N=not second,
            EVICT=cut.evict, OVERLAP=second and cut.overlap, num_warps=cut.warps,
        )  # fmt: skip
        if second:
            mlstm_step_normaliser_kernel[(batch * heads,)](
                k, log_i, log_f, reset, *old[1:], heads, *strides[2:4], *gates, reset.stride(0),
                K=keys, BK=height, HAS_RESET=fresh, OVERLAP=cut.overlap, num_warps=1,
                **({"launch_pdl": True} if cut.overlap else {}),
            )  # fmt: skip
