"""Forecasting benchmarks: every task fitted and judged alike, ours beside its own baselines and other libraries' models."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exlstm.bench import timing
from exlstm.bench.config import ForecastingConfig
from exlstm.bench.forecast_tasks import Task, tasks_of
from exlstm.forecast import engine, frames
from exlstm.forecast.command import Report
from exlstm.forecast.config import MODEL, TITLES, FitConfig
from exlstm.train.progress import Pace

LEVELS = engine.LEVELS
DECILES = [k for k, level in enumerate(engine.LEVELS) if round(level * 10) == level * 10]
SCRIPT = Path(__file__).with_name("forecast_peers.py")


class Tally:
    """Errors summed over windows where the forecasts are: quantiles (B, H, Q), truth (B, H), float64, in units of the data.

    Q counts all levels, or those that it goes by, LEVELS[k] for k in `at`: median and intervals, with `ratios` the deciles too.
    """

    def __init__(self, ratios: bool = True):
        self.ratios, self.sums, self.windows = ratios, 0.0, []
        half, last = len(LEVELS) // 2, len(LEVELS) - 1
        self.at = sorted({0, 2, half, last - 2, last, *(DECILES if ratios else ())})

    def add(self, quantiles: Tensor, y: Tensor, scale: Tensor):
        """`scale` (B,): the mean error of the naive forecast in the history of each window."""
        quantiles = quantiles[..., self.at] if quantiles.shape[-1] == len(LEVELS) else quantiles
        known, last, loss = ~y.isnan(), len(LEVELS) - 1, torch.zeros(())
        off = torch.where(known[..., None], y[..., None] - quantiles, 0.0)  # (B, H, Q)
        error = off[..., self.at.index(last // 2)]
        if self.ratios:
            picked = off[..., [self.at.index(k) for k in DECILES]]
            levels = torch.tensor([LEVELS[k] for k in DECILES], dtype=y.dtype, device=y.device)
            loss = 2 * torch.maximum(levels * picked, (levels - 1) * picked).mean(-1)
        ends = [(off[..., self.at.index(k)], off[..., self.at.index(last - k)]) for k in (2, 0)]  # 80 and 95 %
        inside = [((low >= 0) & (high <= 0) & known).sum() for low, high in ends]
        sums = (error.square().sum(), error.abs().sum(), known.sum(), loss.sum(), y.abs().nansum(), *inside)
        self.sums = self.sums + torch.stack([x.to(y) for x in sums])
        if self.ratios:
            self.windows += (error.abs().sum(1) / known.sum(1).clamp_min(1) / scale).tolist()

    def row(self) -> dict:
        se, ae, n, loss, size, in80, in95 = self.sums.tolist()
        n, finite = max(n, 1), [w for w in self.windows if math.isfinite(w)]
        found = {"MSE": se / n, "MAE": ae / n, "MASE": float(np.mean(finite)) if finite else math.nan}
        return {**found, "WQL": loss / max(size, 1e-300), "cover 80": in80 / n, "cover 95": in95 / n}


def run(config: ForecastingConfig) -> list[dict]:
    """Measures, prints and writes; returns a row a task and model."""
    if not config.files:
        raise ValueError("bench forecast wants files, as in: exlstm bench forecast ETTh1.csv m3_monthly_dataset.tsf")
    rows = []
    try:
        with timing.cores(config):
            for task in (task for path in config.files for task in tasks_of(path, config)):
                print(task.told(), flush=True)
                found = [row for seed in config.seeds for row in _ours(task, config, seed)]
                found += [row for peer in config.peers for row in _theirs(task, config, peer)]
                rows += _beside_naive(found)
                print(timing.table(rows[-len(found) :]), flush=True)
    finally:
        # Tasks that have ended are kept when the rest is not waited for.
        if rows:
            rows += _averages(rows)
            facts = timing.machine(config, "pandas")
            timing.report("forecast", rows, config, facts, drawing(rows))
            _markdown(rows, config.out / "forecast.md", facts)
    return rows


def _ours(task: Task, config: ForecastingConfig, seed: int) -> list[dict]:
    """Rows of the blend and of every member, one fit a mixer; the members without a network come from the first."""
    rows, shown = [], set()
    for mixer in config.mixers:
        start = time.perf_counter()
        changes = {
            "horizon": task.horizon,
            "metric": task.metric,
            "val_size": task.val_size,
            "refit": task.refit,
            "seed": seed,
        }
        settings = replace(config.fit, **changes, **_network(mixer, config.fit))
        fitted = engine.fit(task.learnt, settings, task.season, config.device, report=Report())
        seconds = time.perf_counter() - start
        names = [m for m in fitted.scores if m != "blend" and (m == "network" or m not in shown)]
        shown |= set(names)
        for name, tally in _judge(task, fitted, names).items():
            title = MODEL if name == "blend" else TITLES[name]
            title += f" ({mixer})" if name in ("blend", "network") and mixer != "slstm" else ""
            weight = fitted.weights.get(name)
            look = fitted.lookback if name == "ridge" else fitted.linear.config.lookback
            rows.append(_row(task, title, seed, tally, seconds, {"weight": weight, "look-back": look}))
    return rows


def _network(mixer: str, fit: FitConfig) -> dict:
    """The settings that a mixer changes."""
    if mixer == "xlstmtime":
        return {"design": mixer, "d_model": 256, "n_layers": 3}
    blocks = tuple(mixer.split("+"))
    return {"blocks": blocks, "n_layers": max(len(blocks), fit.n_layers)}


def _judge(task: Task, fitted: engine.Engine, names) -> dict[str, Tally]:
    windows = fitted.windows(task.panel)
    series, cuts = (torch.from_numpy(x).to(windows.device) for x in task.windows)
    if fitted.network is not None and fitted.network.config.grouped:
        # Groups of one cut stand together.
        order = torch.argsort(cuts, stable=True)
        series, cuts = series[order], cuts[order]
    archive = task.protocol == "archive"
    scale, tallies = _naive_errors(task), {name: Tally(archive) for name in ("blend", *names)}
    # Sums in float64 where they can be had; MPS has none.
    home = {"dtype": torch.float64, "device": "cpu" if windows.device.type == "mps" else windows.device}
    norms = torch.from_numpy(windows.norms).to(**home)[:, :, None]  # (N, 2, 1)
    pairs = zip(series.tolist(), cuts.tolist()) if archive else ()
    units = torch.tensor([scale(n, t) for n, t in pairs] or [math.nan] * len(series)).to(**home)
    size = 512 if windows.device.type == "cpu" else 2048
    pace = Pace("test windows", len(series), functools.partial(print, flush=True))
    for at, out, batch in fitted.forecast(windows, series, cuts, names, size, tallies["blend"].at):
        mean, deviation = norms[series[at].to(home["device"])].unbind(1)
        y = batch.target.to(**home) * deviation + mean
        for name, q in out.items():
            tallies[name].add(q.to(**home) * deviation[..., None] + mean[..., None], y, units[at.to(home["device"])])
        pace.add(len(at))
    return tallies


def _naive_errors(task: Task):
    """(series, cut) -> mean |y[t] - y[t - season]| before the cut; NaN where nothing moves."""
    sums, lag = [], task.mase_season
    for a, b in zip(task.panel.offsets[:-1], task.panel.offsets[1:]):
        y = task.panel.y[a:b]
        step = np.abs(y[lag:] - y[:-lag])
        known = ~np.isnan(step)
        sums.append((np.cumsum(np.where(known, step, 0.0)), np.cumsum(known)))

    def error(series: int, cut: int) -> float:
        total, count = sums[series]
        at = cut - lag - 1
        return total[at] / count[at] if at >= 0 and count[at] and total[at] > 0 else math.nan

    return error


def _row(task: Task, model: str, seed, tally: Tally, seconds: float, more: dict) -> dict:
    figures = tally.row()
    if task.protocol != "archive":
        figures.pop("MASE"), figures.pop("WQL")
    return {
        "task": task.name,
        "h": task.horizon,
        "model": model,
        "seed": seed,
        **figures,
        **more,
        "seconds": round(seconds, 1),
    }


def _beside_naive(rows: list[dict]) -> list[dict]:
    """Archive rows with their ratios to the seasonal naive forecast."""
    naive = next((row for row in rows if row["model"] == TITLES["naive"]), None)
    for row in rows:
        if naive is not None and "WQL" in row:
            row |= {f"{name}/naive": row[name] / naive[name] for name in ("MASE", "WQL")}
    return rows


def _averages(rows: list[dict]) -> list[dict]:
    """Means over the horizons of a file, and geometric means of the ratios over the archive's tasks."""
    found, models = [], list(dict.fromkeys(row["model"] for row in rows))
    for name in dict.fromkeys(row["task"] for row in rows if "WQL" not in row):
        for model in models:
            own = [row for row in rows if row["task"] == name and row["model"] == model]
            if len({row["h"] for row in own}) > 1 or len({row["seed"] for row in own}) > 1:
                means = {k: float(np.mean([row[k] for row in own])) for k in ("MSE", "MAE", "cover 80", "cover 95")}
                seeds = {s: np.mean([r["MSE"] for r in own if r["seed"] == s]) for s in {r["seed"] for r in own}}
                spread = {"sd over seeds": float(np.std(list(seeds.values()), ddof=1))} if len(seeds) > 1 else {}
                found.append({"task": f"{name}, mean", "model": model, **means, **spread})
    for model in models:
        own = [row for row in rows if row["model"] == model and row.get("WQL/naive")]
        if len({row["task"] for row in own}) > 1:
            ratios = {k: float(np.exp(np.mean([np.log(row[k]) for row in own]))) for k in ("MASE/naive", "WQL/naive")}
            found.append({"task": f"geometric mean of {len({r['task'] for r in own})} tasks", "model": model, **ratios})
    return found


def _theirs(task: Task, config: ForecastingConfig, peer: str) -> list[dict]:
    """The row of a peer, run on the same rows in an environment of its own; nothing when it fails, with a sentence."""
    start = time.perf_counter()
    rows, roles = _peer_rows(task)
    settings = {
        **roles,
        "model": peer,
        "h": task.horizon,
        "season": task.season,
        "steps": config.peer_steps,
        "step": config.stride if task.protocol != "archive" else task.horizon,
        "levels": engine.LEVELS,
        "windows": len(task.cuts[0]),
        "val_size": task.val_size or task.horizon,
        "seed": config.seeds[0],
        "raw": task.protocol == "archive",
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows.to_csv(place / "data.csv", index=False)
        (place / "settings.json").write_text(json.dumps(settings))
        command = [config.peer_python or sys.executable, str(SCRIPT), str(place)]
        threads = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        limit = {"timeout": 60 * config.peer_minutes or None, "env": threads}
        try:
            done = subprocess.run(command, capture_output=True, text=True, **limit)
        except subprocess.TimeoutExpired:
            print(f"{peer} on {task.name} was stopped: not done in {config.peer_minutes:g} minutes")
            return []
        if done.returncode or not (place / "out.npz").is_file():
            told = (done.stderr.strip().splitlines() or ["no word"])[-1]
            print(f"{peer} on {task.name} failed: {told}")
            return []
        out = np.load(place / "out.npz", allow_pickle=False)
        quantiles, ids, cuts = out["quantiles"], out["series"], out["cuts"]
        bare = any(roles.values()) and not out["covariates"].size
    scale, tally = _naive_errors(task), Tally()
    place = {str(name): n for n, name in enumerate(task.panel.ids)}
    at = [(place[str(name)], int(cut)) for name, cut in zip(ids, cuts)]
    y = np.stack([task.panel.y[task.panel.offsets[n] + t :][: task.horizon] for n, t in at])
    unit = torch.tensor([scale(n, t) for n, t in at], dtype=torch.float64)
    tally.add(torch.from_numpy(quantiles).double(), torch.from_numpy(y), unit)
    title = f"{peer}, no covariates" if bare else peer
    row = _row(task, title, config.seeds[0], tally, time.perf_counter() - start, {})
    print(f"{title}: MSE {row['MSE']:.4g}, {row['seconds']:.0f} s", flush=True)
    return [row]


def _peer_rows(task: Task):
    """The rows of a task for a peer, covariates in deviations of what comes before the test part, and their names by role."""
    rows, past = frames.history(task.panel).set_axis(["unique_id", "ds", "y"], axis=1), task.learnt
    roles = {"futr": [], "hist": []}
    for role, names in roles.items():
        seen = getattr(past, role)
        for k, (column, before) in enumerate(zip(getattr(task.panel, role).T, seen.T)):
            names.append(f"{role}{k}")
            rows[names[-1]] = (column - np.nanmean(before)) / (np.nanstd(before) or 1.0)
    return rows, roles


def _markdown(rows: list[dict], path: Path, facts: dict):
    """The table as Markdown, with the facts of the machine below it."""
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if any(row.get(n) is not None for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (row.get(n) for n in names)
        lines.append(
            "| " + " | ".join("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    told = ", ".join(f"{key} {value or 'not installed'}" for key, value in facts.items())
    path.write_text("\n".join([*lines, "", told, ""]), encoding="utf-8")
    print(f"Markdown: {path}")


def drawing(rows: list[dict]):
    """Bars a task: errors over those of the seasonal naive forecast; ours, the ridge, the network alone, the peers.

    Rows read back from several tables will do, too: what a table lacks is NaN there.
    """
    rows = [row for row in rows if (row.get("h") or 0) > 0]
    tasks = list(dict.fromkeys((row["task"], row["h"]) for row in rows))
    hidden = {title for name, title in TITLES.items() if name not in ("ridge", "network")}
    models = [m for m in dict.fromkeys(row["model"] for row in rows) if m not in hidden]
    found = {(row["task"], row["h"], row["model"]): row for row in reversed(rows)}

    def height(task, h, model) -> float:
        own, naive = found.get((task, h, model)), found.get((task, h, TITLES["naive"]))
        if own is None or naive is None:
            return math.nan
        key = "MSE" if math.isnan(own.get("WQL") or math.nan) else "WQL"
        return own[key] / naive[key]

    def draw(axes):
        width = 0.8 / len(models)
        for k, model in enumerate(models):
            heights = [height(task, h, model) for task, h in tasks]
            axes.bar([x + (k + 0.5) * width for x in range(len(tasks))], heights, width, label=model)
        axes.axhline(1, color="black", linewidth=0.8)
        told = [f"{task.removesuffix('_dataset')}\n{h:g}".replace(", ", "\n") for task, h in tasks]
        axes.set_xticks([x + 0.4 for x in range(len(tasks))], told, fontsize=7)
        axes.set_ylabel("error over the seasonal naive forecast's")
        axes.legend(fontsize=7)

    return draw
