"""The forecasts that need no training: seasonal naive, the theta method (Assimakopoulos and Nikolopoulos, 2000), climatology."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A season is taken out where the autocorrelation at its lag is significant at 10 %, as the M competitions did.
SIGNIFICANT = 1.645
# Deviations from zero beyond which factors are differences, and float32 has no digits for what multiplies them.
FAR = 1e4
ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


def seasonal_naive(batch, season: int, horizon: int) -> Tensor:
    """(B, H): the value one season before; the last value where the window is shorter than a season."""
    last = batch.y[:, -1:].expand(-1, horizon)
    if batch.y.shape[1] < season:
        return last
    steps = torch.arange(horizon, device=batch.y.device) % season - season
    return torch.where(batch.inside[:, steps], batch.y[:, steps], last)


def climatology(batch, horizon: int, levels: Tensor) -> Tensor:
    """(B, H, Q): the quantiles of the values that the window has seen, for all steps; its last value where it has seen none."""
    seen = torch.where(batch.seen, batch.y, torch.nan)
    found = seen.nanquantile(levels.to(seen), dim=1).T  # (B, Q)
    found = torch.where(found.isnan(), batch.y[:, -1:], found)
    return found[:, None].expand(-1, horizon, -1)


def theta(batch, season: int, horizon: int, offset: Tensor) -> Tensor:
    """(B, H): trend line and simple exponential smoothing of the doubled curvature, averaged, on the deseasoned window.

    `offset` (B, 1) is the zero of the series in its own units: where all values lie above it, and not FAR, the season is a
    factor.
    """
    w = batch.inside.to(batch.y.dtype)
    positive = ((batch.y > offset) | (w == 0)).all(1, keepdim=True) & (offset > -FAR)
    offset = torch.where(positive, offset, 0.0)
    y = batch.y - offset
    y = torch.where(w > 0, y, torch.nan_to_num((y * w).sum(1, keepdim=True) / w.sum(1, keepdim=True)))
    factors = torch.zeros(len(y), season, device=y.device)
    if season > 1 and y.shape[1] >= 2 * season:
        factors = torch.where(_seasonal(y, w, season), _season(y, w, season, positive), torch.where(positive, 1.0, 0.0))
    elif season > 1:
        factors = torch.where(positive, torch.ones_like(factors), factors)
    else:
        factors = torch.where(positive, torch.ones_like(factors), factors)
    length = y.shape[1]
    phase = torch.arange(-length, horizon, device=y.device) % season
    seasonal = factors[:, phase]
    flat = torch.where(positive, y / seasonal[:, :length].clamp_min(0.05), y - seasonal[:, :length])
    ahead = _trend_and_smooth(flat, w, horizon)
    ahead = torch.where(positive, ahead * seasonal[:, length:], ahead + seasonal[:, length:])
    return ahead + offset


def _seasonal(y: Tensor, w: Tensor, season: int) -> Tensor:
    """(B, 1) bool: the autocorrelation at the season's lag is significant, and two seasons were seen."""
    n = w.sum(1, keepdim=True)
    z = (y - (y * w).sum(1, keepdim=True) / n) * w
    size = 1 << (2 * y.shape[1] - 1).bit_length()
    power = torch.fft.rfft(z, size).abs().square()
    r = torch.fft.irfft(power, size)[:, : season + 1]
    r = r / r[:, :1].clamp_min(1e-12)
    limit = SIGNIFICANT * ((1 + 2 * r[:, 1:season].square().sum(1, keepdim=True)) / n).sqrt()
    return (r[:, season:].abs() > limit) & (n >= 2 * season)


def _season(y: Tensor, w: Tensor, season: int, positive: Tensor) -> Tensor:
    """(B, season), phase 0 first behind a whole number of seasons before the end: ratio or difference to a centred mean."""
    kernel = torch.ones(1, 1, season, device=y.device)
    if season % 2 == 0:
        kernel = F.pad(kernel, (0, 1))
        kernel[..., 0] = kernel[..., -1] = 0.5
    half, kernel = kernel.shape[-1] // 2, kernel / season
    smooth = F.conv1d(y[:, None], kernel)[:, 0]  # (B, L - 2 half)
    whole = F.conv1d(w[:, None], kernel)[:, 0] > 1 - 1e-4
    middle = y[:, half : half + smooth.shape[1]]
    value = torch.where(positive, middle / smooth.clamp_min(1e-6), middle - smooth)
    phase = (torch.arange(half, half + smooth.shape[1], device=y.device) - y.shape[1]) % season
    total = torch.zeros(len(y), season, device=y.device).index_add_(1, phase, value * whole)
    count = torch.zeros_like(total).index_add_(1, phase, whole.to(y.dtype))
    factors = torch.where(count > 0, total / count.clamp_min(1), torch.where(positive, 1.0, 0.0))
    mean = factors.mean(1, keepdim=True)
    return torch.where(positive, factors / mean.clamp_min(1e-6), factors - mean)


def _trend_and_smooth(y: Tensor, w: Tensor, horizon: int) -> Tensor:
    """(B, H) of the theta method for rows whose steps with w = 0 stand at the beginning."""
    length = y.shape[1]
    t = torch.arange(length, dtype=y.dtype, device=y.device)
    n = w.sum(1, keepdim=True)
    mean_t, mean_y = (t * w).sum(1, keepdim=True) / n, (y * w).sum(1, keepdim=True) / n
    centred = (t - mean_t) * w
    slope = (centred * y).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-9)
    line = mean_y + slope * (t - mean_t)
    curved = 2 * y - line
    alphas = torch.tensor(ALPHAS, dtype=y.dtype, device=y.device)
    begins = (n[:, 0] * 0 + length - n[:, 0]).long()
    level = curved.gather(1, begins[:, None]).expand(-1, len(ALPHAS))  # (B, A)
    error = torch.zeros_like(level)
    for step in range(length):
        off = (curved[:, step : step + 1] - level) * w[:, step : step + 1]
        error, level = error + off.square(), level + alphas * off
    level = level.gather(1, error.argmin(1, keepdim=True))
    ahead = mean_y + slope * (length + torch.arange(horizon, dtype=y.dtype, device=y.device) - mean_t)
    return (ahead + level) / 2
