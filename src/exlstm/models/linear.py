"""The linear path of a forecaster: ridge regression in closed form from a window to all steps of the forecast.

W_α = (XᵀX + α t I)⁻¹ XᵀY with t the mean of XᵀX's diagonal. XᵀX and XᵀY are summed over pieces of the windows, and one
eigendecomposition gives the answer for every α. Everything is counted from the level of the window in its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exlstm.models.config import LinearConfig

# A window that hardly moves is counted in at least this share of its series' deviation.
LEAST = 0.02
# Windows whose future lies further off than this many scales teach nothing about the others.
FURTHEST = 20.0


def level_and_scale(batch, lookback: int, center: str, scale: str) -> tuple[Tensor, Tensor]:
    """What the last `lookback` steps of every window are counted from and in, both (B, 1)."""
    y, seen = batch.y[:, -lookback:], batch.seen[:, -lookback:]
    # A window of gaps alone is taken as it was filled.
    seen = torch.where(seen.any(1, keepdim=True), seen, batch.inside[:, -lookback:])
    count = seen.sum(1, keepdim=True).clamp_min(1)
    mean = (y * seen).sum(1, keepdim=True) / count
    level = mean if center == "mean" else y[:, -1:]
    if scale == "series":
        return level, torch.ones_like(level)
    deviation = (((y - mean) * seen).square().sum(1, keepdim=True) / count).sqrt()
    return level, deviation.clamp_min(LEAST)


class LinearPath(nn.Module):
    """(Batch) -> (B, H) in units of the window; `weight` (features, H) comes from `Gram.solve`."""

    def __init__(self, config: LinearConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.features, config.horizon, device=device, dtype=dtype))
        self.weight.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self):
        """Zeros: until it is fitted the forecast is the level of the window."""
        nn.init.zeros_(self.weight)

    def units(self, batch) -> tuple[Tensor, Tensor]:
        """Level and scale of every window, (B, 1) each."""
        return level_and_scale(batch, self.config.lookback, self.config.center, self.config.scale)

    def features(self, batch, level: Tensor, scale: Tensor) -> Tensor:
        """(B, features): the window, past and future covariates, the calendar at the first step, and a constant."""
        c, y = self.config, batch.y[:, -self.config.lookback :]
        parts = [(y - level) / scale * batch.inside[:, -c.lookback :]]
        if c.n_past and c.past:
            parts.append(batch.past[:, -c.past :, : c.n_past].flatten(1))
        if c.n_future:
            parts.append(batch.future.flatten(1))
        if c.n_dates:
            parts.append(batch.origin[:, : c.n_dates])
        return torch.cat([*parts, torch.ones_like(level)], 1)

    def forward(self, batch) -> Tensor:
        level, scale = self.units(batch)
        return self.features(batch, level, scale) @ self.weight

    def predict(self, batch) -> Tensor:
        """(B, H) in units of the series."""
        level, scale = self.units(batch)
        return level + scale * (self.features(batch, level, scale) @ self.weight)


class Gram:
    """XᵀX and XᵀY of a linear path, summed over batches in float64."""

    def __init__(self, path: LinearPath):
        self.path, n = path, path.config.features
        device = path.weight.device
        # Where float64 is unknown (MPS), the sums stand on the CPU.
        self.home = torch.device("cpu") if device.type == "mps" else device
        self.xx = torch.zeros(n, n, dtype=torch.float64, device=self.home)
        self.xy = torch.zeros(n, path.config.horizon, dtype=torch.float64, device=self.home)
        self.windows = 0

    @torch.no_grad()
    def add(self, batch):
        """Adds the windows whose target is whole and within FURTHEST of the level."""
        level, scale = self.path.units(batch)
        x = self.path.features(batch, level, scale)
        y = (batch.target - level) / scale
        keep = (y.abs().amax(1, keepdim=True) < FURTHEST).to(x.dtype)  # NaN is not
        x, y = x * keep, torch.where(keep > 0, y, 0.0)
        self.xx += (x.T @ x).to(self.home, torch.float64)
        self.xy += (x.T @ y).to(self.home, torch.float64)
        self.windows += keep.sum()

    def solve(self, alphas) -> list[Tensor]:
        """The weights of each α, in float32 on the path's device."""
        mean = self.xx.diagonal().mean()
        values, vectors = torch.linalg.eigh(self.xx)
        turned = vectors.T @ self.xy
        # Directions that the windows do not have at all stay out, at any α.
        values = values.clamp_min(0)[:, None]
        solved = [vectors @ (turned / (values + max(alpha, 1e-9) * mean.clamp_min(1e-30))) for alpha in alphas]
        return [w.to(self.path.weight.device, self.path.weight.dtype) for w in solved]
