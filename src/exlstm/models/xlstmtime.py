"""The network of xLSTMTime (Alharthi and Mahmood, arXiv 2407.10240), for comparison: an xLSTM over the series of a panel.

RevIN; a moving average of 25 steps splits the window into trend and rest; a linear map of each to the horizon, summed; a linear
map to d_model; xLSTM blocks over the series one after the other; a linear map to the horizon; RevIN undone. Its loss is L1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.models.config import ForecasterConfig, LinearConfig
from exlstm.models.forecaster import fan, pinball, set_spread
from exlstm.models.linear import LinearPath, level_and_scale
from exlstm.models.stack import Stack

WIDTH = 25


class XLSTMTime(nn.Module):
    """(Batch of whole panels, `n_series` a panel) -> quantiles (B, H, Q); the spread around its median is learnt apart."""

    def __init__(self, config: ForecasterConfig, linear: LinearConfig, device=None, dtype=None):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        self.config, d, h = config, config.d_model, config.horizon
        # Not part of the paper's network: what its forecasts are compared in.
        self.linear = LinearPath(linear, **new)
        self.trend, self.rest = (nn.Linear(config.lookback, h, **new) for _ in range(2))
        self.up, self.down = nn.Linear(h, d, **new), nn.Linear(d, h, **new)
        self.stack = Stack(config, **new)
        self.steps = nn.Parameter(torch.empty(h, len(config.quantiles) - 1, **new))
        self.register_buffer("levels", torch.tensor(config.quantiles, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """The two maps of the window begin as its mean, as in the paper's code."""
        for linear in (self.trend, self.rest):
            nn.init.constant_(linear.weight, 1 / self.config.lookback)
            nn.init.zeros_(linear.bias)
        set_spread(self, torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.config.quantiles))[None])

    def forward(self, batch, n_series: int = 1) -> Tensor:
        level, deviation = level_and_scale(batch, self.config.lookback, "mean", "window")
        x = (batch.y[:, -self.config.lookback :] - level) / deviation * batch.inside[:, -self.config.lookback :]
        ends = F.pad(x[:, None], (WIDTH // 2, WIDTH // 2), mode="replicate")
        trend = F.avg_pool1d(ends, WIDTH, 1)[:, 0]  # (B, L)
        y = self.up(self.trend(trend) + self.rest(x - trend)).unflatten(0, (-1, n_series))  # (groups, N, D)
        y = self.down(self.stack(y)[0]).flatten(0, 1)
        return fan(level + deviation * y, deviation, self.steps.exp())

    def loss(self, batch, n_series: int = 1) -> Tensor:
        """L1 of the median, and the pinball loss of the spread around it as it is."""
        _, scale = self.linear.units(batch)
        found = self(batch, n_series)
        half = len(self.levels) // 2
        median = found[..., half : half + 1]
        spread = pinball(found - median + median.detach(), batch.target, self.levels, scale)
        return pinball(median, batch.target, self.levels[half : half + 1], scale) + spread
