"""The network of a forecaster: a residual on the linear path, from patches with a mask through a stack to quantiles.

A window is counted from its own level in its own deviation, cut into patches [values, mask, covariates, calendar] and
followed by patches of the future whose values are unknown; the stack reads them in time. The median is
    linear path + head(all tokens of the past) + step head(tokens of the future) + what Recent makes of the latest steps,
the other quantiles stand off it by sums of positive steps, so that none can cross. All heads begin at zero: before
training the forecast is the linear path with the spread of its residuals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlstm.layers.basic import LayerNorm, init_linear
from exlstm.layers.slstm import sLSTM
from exlstm.models.config import ForecasterConfig, LinearConfig
from exlstm.models.linear import LinearPath, level_and_scale
from exlstm.models.stack import Stack

# Width of what reads the latest steps at once.
HIDDEN = 256


class VariateMixer(nn.Module):
    """x + out(mix(norm(x))) over the series of one panel: (B, T, D) with B = groups x N -> the same."""

    def __init__(self, config: ForecasterConfig, device=None, dtype=None):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        d, self.kind, self.n_heads = config.d_model, config.variates, config.n_heads
        self.norm = LayerNorm(d, **new)
        self.out = nn.Linear(d if self.kind == "attention" else 2 * d, d, bias=False, **new)
        if self.kind == "attention":
            self.qkv = nn.Linear(d, 3 * d, bias=False, **new)
        else:
            more = {"dense": True, "forget_bias": config.slstm.forget_bias, **new}
            self.forth, self.back = (sLSTM(d, config.n_heads, **more) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        """The way out begins at zero: series first stand alone, and learn to look at each other where it helps."""
        nn.init.zeros_(self.out.weight)
        if self.kind == "attention":
            init_linear(self.qkv.weight)

    def forward(self, x: Tensor, n: int) -> Tensor:
        groups, tokens = x.shape[0] // n, x.shape[1]
        z = self.norm(x).unflatten(0, (groups, n)).transpose(1, 2).flatten(0, 1)  # (groups·T, N, D)
        if self.kind == "attention":
            q, k, v = self.qkv(z).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            z = torch.cat([self.forth(z)[0], self.back(z.flip(1))[0].flip(1)], -1)
        return x + self.out(z).unflatten(0, (groups, tokens)).transpose(1, 2).flatten(0, 1)


class Recent(nn.Module):
    """(Batch) -> (B, H, 3), zero at the start: the latest steps and all that is known of the future, read at once.

    Counted in units of the series and not of the window: what covariates do together hangs on how high they are.
    """

    def __init__(self, config: ForecasterConfig, device=None, dtype=None):
        super().__init__()
        new, self.steps, self.horizon = {"device": device, "dtype": dtype}, config.recent, config.horizon
        size = config.recent * (2 + config.n_past) + config.horizon * config.n_future + config.n_dates
        size += config.n_static + 2
        self.into, self.between = nn.Linear(size, HIDDEN, **new), nn.Linear(HIDDEN, HIDDEN, **new)
        self.out = nn.Linear(HIDDEN, 3 * config.horizon, **new)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self):
        for linear in (self.into, self.between):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch, level: Tensor, deviation: Tensor) -> Tensor:
        y, seen, past = (x[:, -self.steps :] for x in (batch.y, batch.seen, batch.past))
        parts = [y, seen.to(y.dtype), past.flatten(1), batch.future.flatten(1), batch.origin, batch.static]
        x = torch.cat([*parts, level, deviation.log()], 1)
        # What lies far from all that was learnt from moves the forecast little.
        x = self.dropout(F.gelu(self.into(torch.asinh(x / 4) * 4)))
        x = x + self.dropout(F.gelu(self.between(x)))
        return self.out(x * HIDDEN**-0.5).unflatten(1, (self.horizon, 3))


class ForecasterNetwork(nn.Module):
    """(Batch) -> quantiles (B, H, Q) in units of the series; `loss` is the mean pinball loss in units of the linear path.

    With `config.variates` the batch holds whole groups: `n_series` windows of one cut after the other.
    """

    def __init__(self, config: ForecasterConfig, linear: LinearConfig, device=None, dtype=None):
        super().__init__()
        new = {"device": device, "dtype": dtype}
        self.config, c = config, config
        self.linear = LinearPath(linear, **new)
        self.ahead = -(-c.horizon // c.patch)
        tokens = c.lookback // c.patch + self.ahead
        self.embed = nn.Linear(c.patch * (2 + c.n_past + c.n_dates), c.d_model, **new)
        self.place = nn.Parameter(torch.empty(tokens, c.d_model, **new))
        self.static = nn.Linear(c.n_static, c.d_model, bias=False, **new) if c.n_static else None
        self.stack = Stack(config, **new)
        self.recent = Recent(config, **new) if c.recent else None
        self.mixer = VariateMixer(config, **new) if c.variates != "none" else None
        self.norm = LayerNorm(c.d_model, **new)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(c.lookback // c.patch * c.d_model, c.horizon, **new)
        self.step_head = nn.Linear(c.d_model, 3 * c.patch, **new)
        self.steps = nn.Parameter(torch.empty(c.horizon, len(c.quantiles) - 1, **new))  # log of the positive steps
        self.register_buffer("levels", torch.tensor(c.quantiles, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Heads at zero, so that training begins at the linear path; steps of a normal spread of one deviation."""
        init_linear(self.embed.weight)
        if self.static is not None:
            init_linear(self.static.weight)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.place, std=0.02)
        for head in (self.head, self.step_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        if self.recent is not None:
            self.recent.reset_parameters()
        set_spread(self, torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.config.quantiles))[None])

    def tokens(self, batch, level: Tensor, deviation: Tensor) -> Tensor:
        """(B, tokens, D): patches of the past, then of the future."""
        c = self.config
        y = (batch.y[:, -c.lookback :] - level) / deviation * batch.inside[:, -c.lookback :]
        # An early outlier in a calm window must not drown the rest.
        y = torch.asinh(y / 4) * 4
        rows = [y[..., None], batch.seen[:, -c.lookback :, None].to(y.dtype)]
        if c.n_past:
            rows.append(batch.past[:, -c.lookback :])
        past, ahead = torch.cat(rows, -1), batch.y.new_zeros(len(y), self.ahead * c.patch, 2 + c.n_past)
        if c.n_future:
            ahead[:, : c.horizon, -c.n_future :] = batch.future
        whole = torch.cat([past, ahead], 1)  # (B, L + ahead, 2 + P)
        if c.n_dates:
            dates = batch.dates[:, -(c.lookback + c.horizon) :]
            short = whole.shape[1] - dates.shape[1]
            whole = torch.cat([whole, F.pad(dates, (0, 0, 0, short))], -1)
        return self.embed(whole.unflatten(1, (-1, c.patch)).flatten(2)) + self.place

    def forward(self, batch, n_series: int = 1) -> Tensor:
        c = self.config
        level, deviation = level_and_scale(batch, c.lookback, "mean", "window")
        steps = self.recent(batch, level, deviation) if self.recent is not None else 0.0  # (B, H, 3)
        if c.design != "recent":
            steps = steps + self._patches(batch, level, deviation, n_series)
        median = self.linear.predict(batch) + deviation * steps[..., 0]
        # One factor a side and step: the shape of the spread is learnt for all, its width for each window.
        low, high = (steps[..., 1:2].clamp(-4, 4), steps[..., 2:].clamp(-4, 4))
        return fan(median, deviation, self.steps.exp(), low.exp(), high.exp())

    def _patches(self, batch, level: Tensor, deviation: Tensor, n_series: int) -> Tensor:
        """(B, H, 3): what the stack makes of the patches."""
        c, n = self.config, self.config.lookback // self.config.patch
        x = self.tokens(batch, level, deviation)
        if self.static is not None:
            x = x + self.static(batch.static)[:, None]
        x, _ = self.stack(x)
        if self.mixer is not None:
            x = self.mixer(x, n_series)
        x = self.dropout(self.norm(x))  # (B, tokens, D)
        # Adam moves every weight alike: over so many inputs an update would throw the forecast far off the linear path.
        whole = self.head(x[:, :n].flatten(1) * self.head.in_features**-0.5)
        x = x[:, n:] * c.d_model**-0.5
        steps = self.step_head(x).unflatten(-1, (c.patch, 3)).flatten(1, 2)[:, : c.horizon]  # (B, H, 3)
        return steps + F.pad(whole[..., None], (0, 2))

    def loss(self, batch, n_series: int = 1) -> Tensor:
        """Mean pinball loss over known steps and levels, in the linear path's units."""
        _, scale = self.linear.units(batch)
        return pinball(self(batch, n_series), batch.target, self.levels, scale)


@torch.no_grad()
def set_spread(network: nn.Module, spread: Tensor):
    """The network begins with the quantiles `spread` (H or 1, Q) around the median, in deviations of the window."""
    network.steps.copy_(spread.diff(dim=1).clamp_min(1e-3).log())


def fan(
    median: Tensor, deviation: Tensor, steps: Tensor, low: Tensor | float = 1.0, high: Tensor | float = 1.0
) -> Tensor:
    """(B, H, Q): quantiles around the median (B, H), apart by positive steps (H, Q - 1), times `low` below it, `high` above."""
    half = steps.shape[-1] // 2
    below = -(steps[:, :half] * low).flip(-1).cumsum(-1).flip(-1)
    above = (steps[:, half:] * high).cumsum(-1)
    shape = (*median.shape, half)
    spread = torch.cat([below.expand(shape), torch.zeros_like(median)[..., None], above.expand(shape)], -1)
    return median[..., None] + deviation[..., None] * spread


def pinball(quantiles: Tensor, target: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Mean over known targets of max(q e, (q - 1) e), e = (target - quantile) / scale; twice, so that the median's is |e|."""
    known = ~target.isnan()
    error = (torch.where(known, target, 0.0)[..., None] - quantiles) / scale[..., None]
    each = torch.maximum(levels * error, (levels - 1) * error).mean(-1) * known
    return 2 * each.sum() / known.sum().clamp_min(1)
