"""Frames around the engine: covariates of the future, forecasts as rows, and metrics in the words of utilsforecast."""

from __future__ import annotations

import re
from numbers import Real

import numpy as np

from exlstm.data import clock, frequency
from exlstm.data.columns import columns_of
from exlstm.data.panel import ID, TARGET, Panel, bare, numbers, require_pandas, to_pandas
from exlstm.forecast.config import MODEL, TITLES


def shown(times, panel: Panel):
    """Times as the user wrote them: in their zone."""
    if isinstance(times, np.ndarray):
        return times
    if panel.wall is not None:
        # A midnight that there is not becomes the first time of its day, one that there is twice the first of the two.
        return times.tz_localize(panel.wall, ambiguous=np.ones(len(times), bool), nonexistent="shift_forward")
    return times if panel.zone is None else times.tz_localize("UTC").tz_convert(panel.zone)


def ahead(panel: Panel, n: int, horizon: int):
    """The times of the `horizon` steps after series n."""
    length = int(panel.lengths[n])
    return panel.times(n, length, length + horizon)


def id_column(panel: Panel) -> str:
    return panel.columns.id or ID


def refuse_names(panel: Panel):
    """ValueError where id, time or target have the name of another column of forecasts."""
    names, titles = panel.columns, "|".join((MODEL, *TITLES.values()))
    for name in (names.id, names.time, names.target):
        ours = re.fullmatch(rf"cutoff|(?:{titles})(?:-(?:lo|hi)-[\d.]+|_ql[\d.]+)?", name)
        if ours or (not names.id and name == ID):
            raise ValueError(f"column {name!r} has the name of a column of forecasts; rename it")


def _times(frame, panel: Panel, what: str):
    """The times of a frame as those of the panel are counted."""
    name = panel.columns.time
    times, zone = frequency.parse_times(frame[name], name, **panel.reading)
    if panel.zone is None and zone is not None:
        times = frequency.wall_times(frame[name], times, panel.wall or zone, name, panel.dayfirst)
    if panel.zone is not None and zone is None:
        raise ValueError(f"the times of the {what} have no zone, those of the data are in {panel.zone}")
    return times


def forecasts_of(data, panel: Panel):
    """Forecasts as a pandas frame, with what is their index or, as in a file, text, as it was forecast."""
    pd, frame, name = require_pandas(), columns_of(to_pandas(data), panel.columns), panel.columns.time
    if name in frame.columns and not pd.api.types.is_any_real_numeric_dtype(frame[name]):
        frame = frame.assign(**{name: shown(_times(frame, panel, "forecasts"), panel)})
    return frame


def future_values(panel: Panel, futr, horizon: int, most: int) -> np.ndarray | None:
    """(N, most, F) of the covariates known for the future, of `futr` or those that the data held; the first `horizon` steps
    of every series have to be there, the first that lacks after them, and all behind it, are as the step before."""
    names = panel.columns.futr
    if not names:
        return None
    if futr is None and panel.ahead is not None:
        return panel.ahead
    if futr is None:
        told = ", ".join(names)
        raise ValueError(f"the model was fitted with {told} known for the future; give their next {horizon} steps")
    pd, frame = require_pandas(), columns_of(to_pandas(futr), panel.columns)
    time, ids = panel.columns.time, id_column(panel)
    shared = panel.wide or not panel.columns.id
    for name in (time, *names, *(() if shared else (ids,))):
        if name not in frame.columns:
            have = ", ".join(repr(c) for c in frame.columns)
            raise ValueError(f"the future covariates lack column {name!r}; they have {have}")
    times = _times(frame, panel, "future covariates")
    values = np.stack([numbers(frame, name) for name in names], 1)
    ours = len(values)
    values = values if panel.ahead is None else np.concatenate([values, panel.ahead.reshape(-1, len(names))])
    whole = ~np.isnan(values).any(1)
    keys = [None] * len(frame) if shared else bare(frame[ids]).tolist()
    stamps = times.tolist() if isinstance(times, np.ndarray) else times.as_unit("ns").asi8.tolist()
    table = pd.Series(np.arange(len(frame)), index=pd.MultiIndex.from_arrays([keys, stamps]))
    if (twice := table.index.duplicated()).any():
        row = int(np.flatnonzero(twice)[0])
        raise ValueError(f"the future covariates hold {times[row]} twice{'' if shared else f' for {keys[row]!r}'}")
    table = dict(zip(zip(keys, stamps), range(len(frame))))
    out = np.empty((len(panel), most, len(names)))
    for n, name in enumerate(panel.ids):
        wanted = ahead(panel, n, most)
        marks = wanted.tolist() if isinstance(wanted, np.ndarray) else wanted.as_unit("ns").asi8.tolist()
        held = [None] * most if panel.ahead is None else range(ours + n * most, ours + (n + 1) * most)
        rows = [table.get((None if shared else name, mark), other) for mark, other in zip(marks, held)]
        if None in rows[:horizon]:
            lacking = [str(wanted[i]) for i, row in enumerate(rows[:horizon]) if row is None]
            whose = "" if len(panel) == 1 else f" of series {name!r}"
            told = f"the future covariates lack {len(lacking)} of {horizon} rows{whose}: {_few(lacking)}"
            past = f"; the data has {panel.lacking[n]} rows without a target before them" if panel.lacking[n] else ""
            raise ValueError(told + past)
        given = next((i for i, row in enumerate(rows) if row is None or not whole[row]), most)
        if given < horizon:
            step, column = given, int(np.flatnonzero(np.isnan(values[rows[given]]))[0])
            raise ValueError(f"the future covariate {names[column]!r} is missing at {wanted[step]} of series {name!r}")
        out[n] = values[[rows[min(i, given - 1)] for i in range(most)]]
    return out


def _few(names) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def listed(values) -> list:
    """Numbers as a list of plain ones, each once; a single number is one of its own."""
    values = np.asarray(values).tolist()
    return list(dict.fromkeys(values)) if isinstance(values, list) else [values]


def check_levels(level, quantiles) -> tuple[list[float], list[str]]:
    """The quantiles that are wanted, and the endings of their columns: -lo-80, -hi-80, or _ql0.1."""
    if level is not None and quantiles is not None:
        raise ValueError("level and quantiles are both given; one of the two says which intervals are wanted")
    if quantiles is not None:
        quantiles = listed(quantiles)
        bad = [q for q in quantiles if not isinstance(q, Real) or not 0 < q < 1]
        if bad:
            raise ValueError(f"quantiles hold {bad[0]!r}, wanted numbers between 0 and 1")
        return [float(q) for q in quantiles], [f"_ql{q:.12g}" for q in quantiles]
    level = [80, 95] if level is None else listed(level)
    bad = [x for x in level if not isinstance(x, Real) or isinstance(x, bool) or not 0 < x < 100]
    if bad:
        raise ValueError(f"level holds {bad[0]!r}, wanted numbers between 0 and 100, as 80 or 95")
    # 0.9 is 90 in other libraries: an interval of .9 % would be drawn in silence.
    if shares := [x for x in level if x < 1]:
        raise ValueError(f"level holds {shares[0]!r}, wanted percent, as 80 or 95")
    wanted, names = [], []
    for x in sorted(map(float, level)):
        wanted += [0.5 - x / 200, 0.5 + x / 200]
        names += [f"-lo-{x:.12g}", f"-hi-{x:.12g}"]
    return wanted, names


def rows(
    panel: Panel, series, cuts, horizon: int, values: dict[str, np.ndarray], cutoff: bool = False, y: bool = False
):
    """A long frame of windows (series[b], cuts[b]); `values` name -> (B, H). Adds y and the cutoff where asked for."""
    pd = require_pandas()
    blocks = {id_column(panel): np.repeat(pd.Series(panel.ids, dtype=object).to_numpy()[series], horizon)}
    skip = 1 if cutoff else 0
    times = clock.spread([panel.first[n] for n in series], panel.freq, np.asarray(cuts) - skip, horizon + skip)
    flat = times[:, skip:].reshape(-1)
    if not isinstance(panel.freq, int):
        flat = shown(pd.DatetimeIndex(flat), panel)
    blocks[panel.columns.time] = flat
    if cutoff:
        starts = np.repeat(times[:, 0], horizon)
        blocks["cutoff"] = starts if isinstance(panel.freq, int) else shown(pd.DatetimeIndex(starts), panel)
    if y:
        ends = panel.offsets[series] + cuts
        blocks[panel.columns.target or TARGET] = np.concatenate([panel.y[e : e + horizon] for e in ends])
    for name, value in values.items():
        blocks[name] = value.reshape(-1)
    frame = pd.DataFrame(blocks)
    frame[id_column(panel)] = frame[id_column(panel)].infer_objects()
    return frame


def history(panel: Panel, last: int | None = None):
    """The rows of the panel as a long frame, gaps as NaN; the `last` ones of every series."""
    pd, lengths = require_pandas(), panel.lengths
    starts = np.zeros_like(lengths) if last is None else (lengths - last).clip(0)
    times = [panel.times(n, int(a), int(b)) for n, (a, b) in enumerate(zip(starts, lengths))]
    times = np.concatenate([np.asarray(t) for t in times])
    times = times if isinstance(panel.freq, int) else shown(pd.DatetimeIndex(times), panel)
    y = [panel.y[a:b] for a, b in zip(panel.offsets[:-1] + starts, panel.offsets[1:])]
    ids = pd.Series(panel.ids).repeat(lengths - starts).reset_index(drop=True)
    return pd.DataFrame(
        {id_column(panel): ids, panel.columns.time: times, panel.columns.target or TARGET: np.concatenate(y)}
    )


def sample_of(data):
    """A frame without rows that tells library and types of `data`; None where forecasts come as pandas anyway."""
    pd = require_pandas()
    if isinstance(data, pd.DataFrame | Panel):
        return None
    try:
        import narwhals as nw

        frame = nw.from_native(data).head(0)
        return (frame.collect() if isinstance(frame, nw.LazyFrame) else frame).to_native()
    except (ImportError, TypeError):
        return None


def like(frame, sample, keys=()):
    """The frame in the library of `sample` (polars in, polars out), its columns `keys` of the types that they have there."""
    sample = sample_of(sample)
    if sample is None:
        return frame
    import narwhals as nw

    columns = {c: frame[c].tolist() for c in frame.columns}
    made = nw.from_dict(columns, backend=nw.get_native_namespace(sample))
    kinds = {name.strip(): kind for name, kind in nw.from_native(sample, eager_only=True).schema.items()}
    # What came as text stays a time.
    kinds = {name: kind for name, kind in kinds.items() if name in keys and not (kind == nw.String and name == keys[1])}
    if keys and keys[1] in kinds and "cutoff" in columns:
        kinds["cutoff"] = kinds[keys[1]]
    kinds = {name: kind for name, kind in kinds.items() if made.schema[name].is_temporal() == kind.is_temporal()}
    return made.with_columns(*(nw.col(name).cast(kind) for name, kind in kinds.items())).to_native()


def check_forecasts(frame, wanted, levels):
    """ValueError where forecasts lack one of the columns `wanted`, or an end of the intervals of `levels`."""
    endings = check_levels(levels, None)[1]
    for name in (*wanted, *(wanted[-1] + ending for ending in endings)):
        if name not in frame.columns:
            have = ", ".join(map(repr, frame.columns[:8]))
            raise ValueError(f"the forecasts lack column {name!r}; they have {have}")


METRICS = ("mae", "rmse", "smape", "mase", "wql", "coverage")


def evaluated(frame, models, panel_before: Panel, season: int, levels, metrics=METRICS):
    """One row a model: means of the metrics over series and cutoffs; wql over the quantiles of `levels` and the median."""
    import utilsforecast.losses as losses

    pd = require_pandas()
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    ids, target = id_column(panel_before), panel_before.columns.target or TARGET
    known = frame[frame[target].notna()].drop(columns="cutoff", errors="ignore")
    common = {"models": models, "id_col": ids, "target_col": target}
    trained = history(panel_before).dropna(subset=[target])
    found = {}
    for name in ("mae", "rmse", "smape"):
        if name in metrics:
            found[name] = getattr(losses, name)(known, **common)[models].mean()
    if "mase" in metrics:
        values = losses.mase(known, **common, seasonality=season, train_df=trained)[models]
        found["mase"] = values.replace([np.inf, -np.inf], np.nan).mean()
    total = known[target].abs().sum()
    for level in levels:
        if "coverage" in metrics:
            found[f"coverage {level:.12g}"] = losses.coverage(known, **common, level=f"{level:.12g}")[models].mean()
    if "wql" in metrics:
        found["wql"] = pd.Series({m: _wql(known, m, target, levels) / max(total, 1e-12) for m in models})
    return pd.DataFrame(found).rename_axis("model").reset_index()


def _wql(frame, model: str, target: str, levels) -> float:
    """Sum of twice the pinball losses, a mean over the levels."""
    y, parts = frame[target].to_numpy(), []
    columns = [(0.5, model)]
    for x in levels:
        columns += [(0.5 - x / 200, f"{model}-lo-{x:.12g}"), (0.5 + x / 200, f"{model}-hi-{x:.12g}")]
    for q, column in columns:
        error = y - frame[column].to_numpy()
        parts.append(2 * np.maximum(q * error, (q - 1) * error).sum())
    return float(np.mean(parts))
