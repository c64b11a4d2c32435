"""Forecaster: frames in, calibrated probabilistic forecasts out, with the simple baselines always beside them."""

from __future__ import annotations

import copy
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from exlstm.data import frequency
from exlstm.data.panel import TARGET, Columns, Panel
from exlstm.data.series import panel_of, without_times
from exlstm.forecast import combine, endings, engine, files, fitting, floors, frames
from exlstm.forecast.config import MODEL, TITLES, FitConfig
from exlstm.train.process import Randomness, plain_torch
from exlstm.train.progress import Pace

BASELINES = ("naive", "ridge")


class Forecaster:
    """One model over many series: quantiles for `h` steps, direct, from a blend that validation chooses.

    The members are the seasonal naive forecast, the theta method, ridge regression in closed form, and a network of
    xLSTM blocks that begins as that regression. Everything left at its default is chosen on the last part of the data.

    Args:
        h: steps that are forecast.
        freq: a pandas alias ("h", "D", "MS"), or a whole number where times are numbers; guessed without.
        input_size: steps of the past that are seen; None: chosen on validation.
        level: intervals in percent that `predict` gives.
        futr_exog, hist_exog, stat_exog: columns known for the future, for the past only, and one value a series.
        id_col, time_col, target_col: names of columns; guessed without.
        season: steps of the season of the naive forecast; None: by the frequency.
        config: every other setting, an exlstm.forecast.config.FitConfig.
        device: cpu, cuda, ...; auto: the accelerator if there is one.
        report: a function that hears sentences on what is done, such as `print`.

    >>> model = Forecaster(h=12).fit(frame)      # columns unique_id, ds, y, or any others that can be told apart
    >>> model.predict()                          # unique_id, ds, xLSTM, xLSTM-lo-80, xLSTM-hi-80, ..., SeasonalNaive, Linear
    """

    def __init__(
        self,
        h: int,
        freq=None,
        input_size: int | None = None,
        level=(80, 95),
        futr_exog=(),
        hist_exog=(),
        stat_exog=(),
        id_col: str = "",
        time_col: str = "",
        target_col: str = "",
        season: int | None = None,
        config: FitConfig | None = None,
        device: str = "auto",
        report=None,
    ):
        if not isinstance(config, FitConfig | None):
            raise TypeError(f"config is {type(config).__name__}, wanted a FitConfig of exlstm.forecast.config")
        config = config or FitConfig()
        lookback = config.lookback if input_size is None else input_size
        self.config = replace(config, horizon=_plain(h), lookback=_plain(lookback))
        self.level = frames.listed(level)
        frames.check_levels(self.level, None)
        single = ("".join(_names(name)) for name in (id_col, time_col, target_col))
        self.columns = Columns(*single, *map(_names, (futr_exog, hist_exog, stat_exog)))
        season = None if season is None else _counted("season", season)
        self.freq, self.season, self.device, self.report = freq, season, _device(device), report
        self.engine: engine.Engine | None = None
        self.panel: Panel | None = None
        # Tells the library in which forecasts come.
        self.sample = None

    @property
    def h(self) -> int:
        return self.config.horizon

    def fit(self, df) -> Forecaster:
        """Learns from a long or wide frame (pandas, polars), a Series, an array (T,) or (N, T), or a list of arrays."""
        panel = self._usable(panel_of(df, self.columns, self.freq))
        season = self.season or frequency.seasons(panel.freq)[0]
        self._say(*panel.told)
        panel = self._parted(panel)
        self._say(f"{len(panel)} series, {int(panel.lengths.sum()):,} steps, season {season}")
        self.engine = self._learnt(panel, season)
        self.panel, self.sample = panel, frames.sample_of(df)
        return self

    def predict(self, df=None, futr_df=None, level=None, quantiles=None, h: int | None = None, baselines: bool = True):
        """The next `h` steps of every series: of the data fitted and updated, or of `df` with the same columns.

        Columns: id, time, xLSTM, then its intervals; with `baselines` SeasonalNaive and Linear with theirs.
        """
        self._fitted()
        h = self._horizon(h)
        wanted, endings = frames.check_levels(self.level if level is None and quantiles is None else level, quantiles)
        panel = self.panel if df is None else self._parted(self._usable(self._same(df)), h)
        future = frames.future_values(panel, futr_df, h, self.h)
        values = self._values(panel, future, wanted, endings, BASELINES if baselines else (), h)
        frame = frames.rows(panel, np.arange(len(panel)), panel.lengths, h, values)
        return self._like(frame, panel, df)

    def cross_validation(
        self, df=None, n_windows: int = 1, step_size: int | None = None, refit: bool = False, level=None, quantiles=None
    ):
        """Forecasts of the last `n_windows` windows, `step_size` apart (the horizon by default), each from before its cutoff.

        The model is fitted once before the first cutoff, or with `refit` before each. Adds cutoff and the true values. What
        `fit` has learnt or has not is neither used nor changed.
        """
        panel = self._panel() if df is None else self._parted(self._usable(panel_of(df, self.columns, self.freq)))
        n_windows = _counted("n_windows", n_windows)
        step = self.h if step_size is None else _counted("step_size", step_size)
        wanted, endings = frames.check_levels(self.level if level is None and quantiles is None else level, quantiles)
        season, whole = self.season or frequency.seasons(panel.freq)[0], []
        fitting.check_lengths(panel.lengths, season, self.config, self.h + (n_windows - 1) * step)
        model, place = copy.copy(self), {name: n for n, name in enumerate(panel.ids)}
        for k in range(n_windows - 1, -1, -1):
            back = self.h + k * step
            # What stands behind the cutoff is not there, but for what was known of it: not even scales go by it.
            before = self._usable(panel.cut(back))
            if k == n_windows - 1 or refit:
                model.engine = self._learnt(before, season)
            series = np.array([place[name] for name in before.ids])
            cuts = panel.lengths[series] - back
            future = panel.futr[(panel.offsets[series] + cuts)[:, None] + np.arange(self.h)]
            values = model._values(before, future, wanted, endings, BASELINES, self.h)
            whole.append(frames.rows(panel, series, cuts, self.h, values, cutoff=True, y=True))
        import pandas as pd

        frame = pd.concat(whole, ignore_index=True)
        frame = frame.sort_values([frames.id_column(panel), "cutoff"], kind="stable", ignore_index=True)
        return self._like(frame, panel, df)

    def evaluate(self, forecasts, df=None, metrics=frames.METRICS, level=None):
        """One row a model of mae, rmse, smape, mase, wql and coverage; `forecasts` from `cross_validation`, or from
        `predict` with the true values in `df`. mae, rmse, smape, mase and coverage as utilsforecast has them, means over the
        series; wql over all rows, of the median and the ends of the intervals. Without a fit, `df` is the history, too."""
        fitted = self.engine is not None
        if not fitted and df is None:
            raise ValueError("this forecaster has not been fitted; call fit(df) first, or give the whole data as df")
        panel = self._panel() if fitted else self._usable(panel_of(df, self.columns, self.freq))
        cv = frames.forecasts_of(forecasts, panel)
        levels = frames.listed(self.level if level is None else level)
        ids, time, target = frames.id_column(panel), panel.columns.time, panel.columns.target or TARGET
        metrics = (metrics,) if isinstance(metrics, str) else metrics
        frames.check_forecasts(cv, (ids, time, MODEL), levels if {"wql", "coverage"} & set(metrics) else ())
        if target not in cv.columns:
            if df is None:
                raise ValueError(f"the forecasts have no column {target!r}; give the true values as df")
            cv = cv.merge(frames.history(self._same(df) if fitted else panel), on=[ids, time], how="inner")
        if not cv[target].notna().any():
            raise ValueError("there is no true value at any time of the forecasts")
        before = frames.history(panel)
        first = cv[time].min()
        kept = before[before[time] < first]
        models = [m for m in (MODEL, *(TITLES[b] for b in BASELINES)) if m in cv.columns]
        trained = (
            panel
            if kept.empty
            else panel_of(kept, replace(panel.columns, id=ids, futr=(), hist=(), static=()), panel.freq)
        )
        season = self._season() if fitted else self.season or frequency.seasons(panel.freq)[0]
        return frames.evaluated(cv, models, trained, season, levels, metrics)

    def update(self, df) -> Forecaster:
        """Appends new rows to the series that are known; a forecast then begins after them. Costs the same at any age.

        Steps that are missing between the old rows and the new ones are gaps, as any others.

        Arrays go on where the series end. Of the past, as much is kept as a forecast sees.
        """
        self._fitted()
        new = self._same(df)
        if without_times(df):
            ends = (self.panel.times(n, int(length), int(length) + 1)[0] for n, length in enumerate(self.panel.lengths))
            new = replace(new, first=[int(end) for end, _ in zip(ends, new.ids)])
        self.panel = _joined(self.panel, new, self.engine.kept)
        return self

    def on(self, df) -> Forecaster:
        """The same model on another history: forecasts begin after the rows of `df`, which has the same columns."""
        self._fitted()
        other = copy.copy(self)
        other.panel = self._parted(self._usable(self._same(df)))
        return other

    def finetune(self, df, steps: int = 200) -> Forecaster:
        """Goes on learning from other data with the same columns: the linear path is fitted to it, the network trained on."""
        self._fitted()
        panel = self._parted(self._usable(self._same(df)))
        with plain_torch(), Randomness(torch.device(self.device)):
            self.engine = engine.finetune(self.engine, panel, _plain(steps), self.report)
        self.panel = panel
        return self

    def skill(self):
        """One row a member on the validation part: its errors over those of the seasonal naive forecast, and its weight."""
        import pandas as pd

        scores, weights = self._fitted().scores, self.engine.weights
        base = scores.get("naive") or scores["linear"]
        rows = []
        for name, score in scores.items():
            title = MODEL if name == "blend" else TITLES[name]
            ratios = {k: score[k] / max(base[k], 1e-12) for k in ("mae", "pinball")}
            coverage = {k: v for k, v in score.items() if k.startswith("coverage")}
            rows.append({"model": title, "weight": weights.get(name), **ratios, **coverage})
        return pd.DataFrame(rows)

    def plot(self, forecasts=None, path=None, max_series: int = 8):
        """Draws history, forecast, intervals and baselines of the first series that `forecasts` hold, those of `predict`
        without; returns the matplotlib figure, or writes it to `path`."""
        from exlstm.plot import check_picture, draw_forecasts

        if path is not None:
            check_picture(Path(path))
        panel = self._panel()
        fc = frames.forecasts_of(self.predict() if forecasts is None else forecasts, panel)
        ids, time = frames.id_column(panel), panel.columns.time
        past = frames.history(panel, last=max(4 * self.h, 3 * self._season()))
        pieces = []
        held = set(fc[ids])
        if max_series < 1 or not (names := [name for name in panel.ids if name in held]):
            raise ValueError(
                f"there is nothing to draw: max_series is {max_series}, known series {len(held & {*panel.ids})}"
            )
        for name in names[:max_series]:
            own = fc[fc[ids] == name]
            lines = {c: own[c].to_numpy() for c in own.columns if c not in (ids, time)}
            seen = past[past[ids] == name]
            pieces.append((str(name), seen[time].to_numpy(), seen.iloc[:, 2].to_numpy(), own[time].to_numpy(), lines))
        return draw_forecasts(pieces, MODEL, [TITLES[b] for b in BASELINES], path)

    def save(self, folder) -> None:
        """A folder of safetensors and JSON that `load` reads, with the end of every series."""
        self._fitted()
        with plain_torch():
            files.save(self, folder)

    @classmethod
    def load(cls, folder, device: str = "auto") -> Forecaster:
        """The forecaster in a folder of `save`; the same forecasts, bit for bit on the same machine."""
        device = _device(device)
        with plain_torch(), Randomness(torch.device(device)):
            return files.load(cls, folder, device)

    def _learnt(self, panel: Panel, season: int) -> engine.Engine:
        with plain_torch(), Randomness(torch.device(self.device)):
            return engine.fit(panel, self.config, season, self.device, self.report)

    def _values(self, panel: Panel, future, wanted, endings, also, h: int) -> dict[str, np.ndarray]:
        """Column name -> (N, h) of the steps behind every series, in the units of the data."""
        found: dict[str, list] = {}
        held, half = [], len(engine.LEVELS) // 2
        pace = Pace("forecasts", len(panel), self.report)
        with plain_torch():
            windows = self.engine.windows(panel, future)
            floor = self.engine.floors.of(windows)
            for rows, out, batch in self.engine.forecast(windows, *windows.ends(), also):
                pace.add(len(rows))
                # Levels beyond the outermost lie on straight lines.
                low = floors.under(batch, floor[rows])[..., None]
                held.append(low[:, 0] == floor[rows, None])
                for name, q in out.items():
                    title = MODEL if name == "blend" else TITLES[name]
                    picked = combine.at_levels(q, self.engine.levels, wanted).maximum(low) if wanted else q[..., :0]
                    found.setdefault(title, []).append(q[..., half])
                    for k, ending in enumerate(endings):
                        found.setdefault(title + ending, []).append(picked[..., k])
        mean, scale = windows.norms.T[:, :, None]
        # What float32 does not hold is not shown: six digits of the series' deviation.
        digits = 10.0 ** (5 - np.floor(np.log10(scale)))
        values = {name: torch.cat(parts)[:, :h].double().cpu().numpy() * scale + mean for name, parts in found.items()}
        # Nor does rounding go below the floor.
        least = np.where(torch.cat(held).cpu().numpy(), self.engine.floors.among(panel)[:, None], -np.inf)
        # And a zero without a sign.
        return {name: np.maximum(np.rint(value * digits) / digits, least) + 0.0 for name, value in values.items()}

    def _like(self, frame, panel: Panel, df):
        """The frame in the library of `df`, or of the data fitted."""
        return frames.like(frame, self.sample if df is None else df, (frames.id_column(panel), panel.columns.time))

    def _same(self, df) -> Panel:
        """New data with the columns and frequency of the data fitted."""
        return panel_of(df, known=self.panel)

    def _usable(self, panel: Panel) -> Panel:
        """The panel from the first value of every series on: before it, only what comes later could fill the gaps."""
        frames.refuse_names(panel)
        seen = np.logical_or.reduceat(~np.isnan(panel.y), panel.offsets[:-1])
        if not seen.all():
            lost = [str(i) for i, s in zip(panel.ids, seen) if not s]
            if not seen.any():
                whose = "" if len(lost) > 1 else f" in series {lost[0]!r}"
                raise ValueError(f"every value of the target is missing{whose}")
            self._say(f"{len(lost)} series without a single value are left out: {', '.join(lost[:5])}")
            panel = panel.cut(np.where(seen, 0, panel.lengths))
        # Series that see each other stand on one clock, and those that begin later have gaps there.
        return panel.begun() if self.config.variates == "none" else panel

    def _parted(self, panel: Panel, h: int = 0) -> Panel:
        """The panel without rows of the future, which it keeps apart; says how its series end."""
        panel, told = endings.parted(panel, h or self.h, self.h, self.config.variates != "none")
        self._say(*told)
        return panel

    def _fitted(self) -> engine.Engine:
        if self.engine is None:
            raise ValueError("this forecaster has not been fitted; call fit(df) first")
        return self.engine

    def _panel(self) -> Panel:
        self._fitted()
        return self.panel

    def _season(self) -> int:
        return self.engine.season

    def _horizon(self, h) -> int:
        h = self.h if h is None else _plain(h)
        if not isinstance(h, int) or isinstance(h, bool) or not 1 <= h <= self.h:
            raise ValueError(f"h is {h!r}, wanted 1 to {self.h}: the model was fitted for {self.h} steps")
        return h

    def _say(self, *sentences):
        for sentence in sentences:
            if self.report:
                self.report(sentence)


def _plain(number):
    """A whole number of NumPy as one of Python; anything else as it is."""
    return int(number) if isinstance(number, np.integer) else number


def _counted(name: str, number) -> int:
    """A whole number of at least 1, of Python or NumPy, as one of Python; ValueError for anything else."""
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} is {number!r}, wanted a whole number of at least 1")
    return int(number)


def _names(given) -> tuple[str, ...]:
    """Names of columns, one or several or None, as the columns of a frame are named here: as text without spaces around it."""
    several = () if given is None else (given,) if isinstance(given, str | Integral) else given
    return tuple(name for name in (str(name).strip() for name in several) if name)


def _device(name: str) -> str:
    from exlstm.runs import device_of

    return str(device_of(name))


def _gap(panel: Panel, n: int, time, most: int) -> int:
    """Steps of series n that are missing before `time`, where it goes on: less than `most`."""
    length = int(panel.lengths[n])
    first = panel.times(n, length, length + 1)[0]
    if time == first:
        return 0
    coming = list(panel.times(n, length, length + most))
    if time in coming:
        return coming.index(time)
    whose = "" if len(panel) == 1 else f" of series {panel.ids[n]!r}"
    wanted = f"{first}, the step after the last, or one of the {most - 1} that follow"
    raise ValueError(f"the new rows{whose} begin at {time}, wanted {wanted}")


def _joined(old: Panel, new: Panel, keep: int) -> Panel:
    """The old panel's last `keep` steps with the new rows behind them, missing steps between them as gaps."""
    place, known = {name: n for n, name in enumerate(new.ids)}, set(old.ids)
    if unknown := [name for name in new.ids if name not in known]:
        raise ValueError(f"series {unknown[0]!r} is not one that the model knows; predict(df) takes new ones")
    parts = {k: [] for k in ("y", "futr", "hist")}
    firsts, lengths = [], []
    for n, name in enumerate(old.ids):
        a, b = old.offsets[n], old.offsets[n + 1]
        rows = {k: [getattr(old, k)[a:b]] for k in parts}
        if name in place:
            m = place[name]
            gap, c, d = _gap(old, n, new.first[m], keep), new.offsets[m], new.offsets[m + 1]
            for k in parts:
                rows[k] += [np.full((gap, *getattr(old, k).shape[1:]), np.nan), getattr(new, k)[c:d]]
        whole = {k: np.concatenate(v) for k, v in rows.items()}
        start = max(0, len(whole["y"]) - keep)
        whole = {k: v[start:] for k, v in whole.items()}
        firsts.append(old.times(n, start, start + 1)[0])
        lengths.append(len(whole["y"]))
        for k in parts:
            parts[k].append(whole[k])
    joined = {k: np.concatenate(v) for k, v in parts.items()}
    return replace(old, offsets=np.concatenate([[0], np.cumsum(lengths)]), first=firsts, told=[], ahead=None, **joined)
