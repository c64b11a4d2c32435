"""A few outputs of a 16-bit x in float32 as a Triton kernel, which reads x once and as it is.

p = W x + b, W = W_1 + W_2 + W_3 in x's dtype: the products with 16-bit numbers are exact, and their sum is in float32.
"""

import torch
import triton
import triton.language as tl

from exlstm.ops import backend as backends
from exlstm.ops.kernels import rows_apart

# Rows and features of a tile, warps, and tiles in flight.
ROWS, FEATURES, WARPS, STAGES = 64, 128, 4, 3
DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["rows"])
def wide_forward_kernel(
    x, weight, bias, p, rows, D, stride_x,
    N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (rows / BR,): BR rows, all N outputs."""
    o_r, o_n = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None], tl.arange(0, BN)
    b_p = tl.zeros((BR, BN), tl.float32)
    for i_d in tl.range(0, D, BD, num_stages=STAGES):
        o_d = i_d + tl.arange(0, BD)
        b_x = tl.load(x + o_r * stride_x + o_d[None, :], mask=(o_r < rows) & (o_d < D)[None, :], other=0.0)
        keep = (o_d < D)[:, None] & (o_n < N)[None, :]
        b_w = tl.load(weight + o_n[None, :] * D + o_d[:, None], mask=keep, other=0.0)
        b_1 = b_w.to(b_x.dtype)
        b_w -= b_1.to(tl.float32)
        b_2 = b_w.to(b_x.dtype)
        b_3 = (b_w - b_2.to(tl.float32)).to(b_x.dtype)
        b_x = b_x.to(DOT)
        b_p = tl.dot(b_x, b_3.to(DOT), b_p, input_precision="ieee")
        b_p = tl.dot(b_x, b_2.to(DOT), b_p, input_precision="ieee")
        b_p = tl.dot(b_x, b_1.to(DOT), b_p, input_precision="ieee")
    b_p += tl.load(bias + o_n, mask=o_n < N, other=0.0)[None, :]
    tl.store(p + o_r * N + o_n[None, :], b_p, mask=(o_r < rows) & (o_n < N)[None, :])


def wide(x, weight, bias):
    """x (..., D) in 16 bits, weight (N, D) and bias (N,) in float32 -> (..., N) in float32."""
    p = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32, device=x.device)
    flat = rows_apart(x.reshape(-1, x.shape[-1]))
    with backends.on(x.device):
        wide_forward_kernel[(triton.cdiv(flat.shape[0], ROWS),)](
            flat,
            weight.contiguous(),
            bias.contiguous(),
            p,
            *flat.shape,
            flat.stride(0),
            **_cut(weight.shape[0], x.dtype),
        )
    return p


def _cut(outputs, dtype):
    padded = max(16, triton.next_power_of_2(outputs))
    # The interpreter multiplies no bfloat16.
    dot = DOTS[torch.float32 if backends.INTERPRETED else dtype]
    cut = {"N": outputs, "BN": padded, "BR": ROWS, "BD": FEATURES if padded <= 32 else 32, "DOT": dot}
    return cut | {"STAGES": STAGES, "num_warps": WARPS}
