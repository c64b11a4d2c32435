"""The linear path of a forecaster: ridge regressions in closed form from a window to all steps of the forecast.

W_α = (XᵀX + α t I)⁻¹ XᵀY with t the mean of XᵀX's diagonal. XᵀX and XᵀY are summed over pieces of the windows, and one
eigendecomposition gives the answer for every α. Everything is counted from the level of the window in its scale.

A ridge that sees only the last l steps, counted from their own mean or from the last of them, is R X with a matrix R, so that
the sums over the longest window hold those of every shorter one and of either level, and its answer is a map of the longest
window again: a mean of ridges over many look-backs and levels is one matrix.

A ridge is drawn to zero, that is to its level, or, from the same sums, to the mean pattern of the season (α t |(W - sP) D|²
with the map P to that pattern, the s in [0, 1] that fits best, and D² growing with the age of a step).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exlstm.models.config import LinearConfig

# A window that hardly moves is counted in at least this share of its series' deviation.
LEAST = 0.02
# Windows whose future lies further off than this many scales teach nothing about the others.
FURTHEST = 20.0
# Windows of a stretch that are summed at once.
PIECE = 2**17
# Ends of stretches that are held until they are summed.
HELD = 256


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
    """(Batch) -> (B, H) in units of the window; `weight` (features, H) comes from `Gram.solve`.

    `own` (series, features, H) is what the weights of single series have beside it.
    """

    def __init__(self, config: LinearConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.features, config.horizon, device=device, dtype=dtype))
        self.weight.requires_grad_(False)
        self.own = None
        if config.own:
            own = torch.empty(config.own, config.features, config.horizon, device=device, dtype=dtype)
            self.own = nn.Parameter(own, requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Zeros: until it is fitted the forecast is the level of the window."""
        nn.init.zeros_(self.weight)
        if self.own is not None:
            nn.init.zeros_(self.own)

    def units(self, batch) -> tuple[Tensor, Tensor]:
        """Level and scale of every window, (B, 1) each."""
        c = self.config
        level, scale = level_and_scale(batch, c.lookback, c.center, c.scale)
        return level, level_and_scale(batch, c.lately, c.center, c.scale)[1] if c.lately else scale

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

    def map(self, x: Tensor, series: Tensor) -> Tensor:
        """Features (B, features) of the series numbered (B,) -> (B, H)."""
        if self.own is None:
            return x @ self.weight
        if x.is_cuda:
            # Every series for every row, so that nothing waits for the GPU.
            every = torch.einsum("bf,nfh->bnh", x, self.own)
            picked = every.take_along_dim(series.clamp_min(0)[:, None, None], 1)[:, 0]
            return x @ self.weight + torch.where(series[:, None] >= 0, picked, 0.0)
        y = x @ self.weight
        for n in series.unique().tolist():
            if n >= 0:
                at = series == n
                y[at] += x[at] @ self.own[n]
        return y

    def forward(self, batch) -> Tensor:
        level, scale = self.units(batch)
        return self.map(self.features(batch, level, scale), batch.series)

    def predict(self, batch, units: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, H) in units of the series; `units`: level and scale of the windows, where they are known already."""
        level, scale = self.units(batch) if units is None else units
        return level + scale * self.map(self.features(batch, level, scale), batch.series)


class Gram:
    """XᵀX and XᵀY of a linear path, summed over batches or whole stretches in float64."""

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

    @property
    def takes_stretches(self) -> bool:
        """Whether windows are counted in one scale, and nothing but the calendar stands beside them."""
        c = self.path.config
        return c.scale == "series" and not (c.n_past and c.past) and not c.n_future

    @torch.no_grad()
    def add_stretches(self, stretches):
        """Adds all windows of stretches (rows (W + L + H - 1,) without gaps, calendar (W, C) at the first step of each future).

        The same sums as of `add`, without a window in sight: they are sums of products of the rows at every lag, and those
        one step on differ from them by what enters and what leaves. The cost does not grow with W times L (L + H).
        """
        c, new = self.path.config, {"dtype": torch.float64, "device": self.home}
        d = c.lookback + c.horizon
        crossed, beside = torch.zeros(d, c.n_dates + 1, **new), torch.zeros(c.n_dates + 1, c.n_dates + 1, **new)
        first, far_off, steps = torch.zeros(d, **new), torch.zeros(d, d, **new), torch.zeros(d - 1, d - 1, **new)
        enter, leave = [], []
        for rows, calendar in stretches:
            for at in range(0, len(calendar), PIECE):
                e = calendar[at : at + PIECE, : c.n_dates].to(**new)
                z, e = rows[at : at + len(e) + d - 1].to(**new), torch.cat([e, torch.ones(len(e), 1, **new)], 1)
                products = _lagged(torch.cat([z[None, : len(e)], e.T]), z, d)
                first, crossed, beside = first + products[0], crossed + products[1:].T, beside + e.T @ e
                if len(enter) == HELD:
                    steps, enter, leave = steps + _squares(enter) - _squares(leave), [], []
                enter.append(z[len(e) :])
                leave.append(z[: d - 1])
                if len(far := self._far(z)):
                    out, e = z.unfold(0, d, 1)[far], e[far]
                    far_off, crossed, beside = far_off + out.T @ out, crossed - out.T @ e, beside - e.T @ e
        if not enter:
            return
        whole = _down_the_diagonals(first, steps + _squares(enter) - _squares(leave)) - far_off
        # Every window is counted from its level, which is a sum over it.
        level = _level(d, c.lookback, c.center, whole)
        whole = whole - level @ whole
        whole, crossed = whole - (whole @ level)[:, None], crossed - level @ crossed
        x, y = slice(0, c.lookback), slice(c.lookback, d)
        self.xx += torch.cat([torch.cat([whole[x, x], crossed[x]], 1), torch.cat([crossed[x].T, beside], 1)])
        self.xy += torch.cat([whole[x, y], crossed[y].T])
        self.windows += beside[-1, -1].to(self.path.weight.device)

    def _far(self, z: Tensor) -> Tensor:
        """The windows of a stretch whose future lies FURTHEST off their level or further."""
        c = self.path.config
        if z.max() - z.min() < FURTHEST:
            return z.new_zeros(0, dtype=torch.int64)
        sums = torch.nn.functional.pad(z.cumsum(0), (1, 0))
        n = len(z) - c.lookback - c.horizon + 1
        level = (sums[c.lookback :] - sums[: -c.lookback])[:n] / c.lookback
        level = level if c.center == "mean" else z[c.lookback - 1 :][:n]
        ahead = z[c.lookback :].unfold(0, c.horizon, 1)
        off = torch.maximum(ahead.amax(1) - level, level - ahead.amin(1))
        return (off >= FURTHEST).nonzero()[:, 0]

    def plus(self, others) -> Gram:
        """The sums of these windows and of the others'."""
        whole = Gram(self.path)
        for name in ("xx", "xy", "windows"):
            setattr(whole, name, sum((getattr(g, name) for g in others), getattr(self, name)))
        return whole

    def solve(self, alphas, lookback: int | None = None, season: int = 0, constants=(True,)) -> list[Tensor]:
        """The weights of each α, in float32 on the path's device, as maps of the whole window; `lookback`: of ridges that see
        only as many steps; `season`: that count them from the last value and are drawn to the pattern of the season;
        `constants`: for each of them all α, of ridges with the constant or without."""
        c, home = self.path.config, self.home
        n, center = c.lookback if lookback is None else lookback, "last" if season else c.center
        kept = torch.arange(c.lookback - n, c.features, device=home)
        xx, xy = self.xx[kept][:, kept], self.xy[kept]
        level, aim, ease = _level(n, n, center, xx), torch.zeros_like(xy), torch.ones_like(xx[:, :1])
        if moved := center != c.center or (n < c.lookback and center == "mean"):
            # What these windows are counted from.
            xy = xy - (xx[:, :n] @ level)[:, None]
            xx, xy = _counted(xx, level), _counted(xy, level)
            xx = _counted(xx.T, level).T
        if season:
            aim[:n], ease[:n, 0] = _pattern(n, season, c.horizon, xx), _ease(n, season, xx)
            drawn = xx @ aim
            share = ((aim * xy).sum() / (aim * drawn).sum().clamp_min(1e-30)).clamp(0, 1)
            aim, xy, xx = share * aim, ease * (xy - share * drawn), ease * xx * ease.T
        found = []
        for w in _solved(xx, xy, alphas, constants):
            w = aim + ease * w
            if moved:
                w[:n] += torch.outer(level, 1 - w[:n].sum(0))
            whole = torch.zeros(c.features, c.horizon, dtype=w.dtype, device=home)
            whole[kept] = w
            found.append(whole.to(self.path.weight.device, self.path.weight.dtype))
        return found


def _solved(xx: Tensor, xy: Tensor, alphas, constants) -> list[Tensor]:
    """(XᵀX + α t I)⁻¹ XᵀY of every α from one eigendecomposition; of a single α by Cholesky, in a tenth of the time.

    Without the constant, the last number, for a False among `constants`: W - k W[-1] / k[-1] with k what solves for e, the
    unit vector of the constant, in place of XᵀY.
    """
    # Directions that the windows do not have at all stay out, at any α.
    costs = [max(alpha, 1e-9) * xx.diagonal().mean().clamp_min(1e-30) for alpha in alphas]
    eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    both = torch.cat([xy, eye[:, -1:]], 1)
    found = None
    if len(costs) == 1:
        factor, failed = torch.linalg.cholesky_ex(xx + costs[0] * eye)
        found = None if failed else [torch.cholesky_solve(both, factor)]
    if found is None:
        values, vectors = torch.linalg.eigh(xx)
        turned, values = vectors.T @ both, values.clamp_min(0)[:, None]
        found = [vectors @ (turned / (values + cost)) for cost in costs]
    return [w[:, :-1] if yes else w[:, :-1] - w[:, -1:] * (w[-1:, :-1] / w[-1, -1]) for yes in constants for w in found]


def _pattern(n: int, season: int, horizon: int, like: Tensor) -> Tensor:
    """(n, H): the map of the last n steps to the mean of all whole seasons among them, zero where there is none."""
    map, ahead = like.new_zeros(n, horizon), torch.arange(horizon, device=like.device)
    for k in range(1, n // season + 1):
        map[n - k * season + ahead % season, ahead] = season / (n - n % season)
    return map


def _ease(n: int, season: int, like: Tensor) -> Tensor:
    """(n,): the root of one over what a weight costs, which grows with the age of its step in seasons."""
    age = torch.arange(n - 1, -1, -1, dtype=like.dtype, device=like.device)
    return (1 + age / season).rsqrt()


def _lagged(columns: Tensor, z: Tensor, lags: int) -> Tensor:
    """(C, lags): sums over t of columns[c, t] z[t + lag], for columns (C, W) and z (W + lags - 1,)."""
    size = 1 << (len(z) - 1).bit_length()
    product = torch.fft.rfft(columns, size).conj() * torch.fft.rfft(z, size)
    return torch.fft.irfft(product, size)[:, :lags]


def _squares(rows: list[Tensor]) -> Tensor:
    rows = torch.stack(rows)
    return rows.T @ rows


def _down_the_diagonals(first: Tensor, steps: Tensor) -> Tensor:
    """The symmetric matrix (d, d) with the first row `first` and m[i + 1, j + 1] = m[i, j] + steps[i, j]."""
    d = len(first)
    whole = torch.empty(d, d, dtype=first.dtype, device=first.device)
    whole[0], whole[:, 0] = first, first
    for i in range(d - 1):
        torch.add(whole[i, :-1], steps[i], out=whole[i + 1, 1:])
    return whole


def _level(rows: int, lookback: int, center: str, like: Tensor) -> Tensor:
    """(rows,): what the mean or the last value of the first `lookback` of them is the sum with."""
    level = like.new_zeros(rows)
    if center == "mean":
        level[:lookback] = 1 / lookback
    else:
        level[lookback - 1] = 1.0
    return level


def _counted(rows: Tensor, level: Tensor) -> Tensor:
    """The first n rows counted from their level, the sum with `level` (n,), the others as they are."""
    n = len(level)
    return torch.cat([rows[:n] - level @ rows[:n], rows[n:]])
