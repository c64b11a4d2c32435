"""What a comparison says: a CSV of its runs, a table (CSV and Markdown) of its models, a plot over tokens and seconds.

Of every model the learning rate whose median over the seeds is best; its median, best and spread, greatest less least. A run
that failed counts as the worst in the median. Equal seconds: the last score that was measured while the quickest model of the
case could make its whole schedule; its own had not ended there.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

from exlstm.bench import rows, timing
from exlstm.bench.rows import Row

# What the runs of one line of the table share.
LINE = (
    "case",
    "model",
    "d_model",
    "n_layers",
    "n_heads",
    "batch",
    *rows.WAYS,
    "steps",
    "equal",
    "stop_at",
    "settings",
)
# What the table tells where it is not the row's own.
OWN = ("clip", "recurrent_lr", "precision")


def told(scores: dict[str, float]) -> str:
    """Scores as a line."""
    return ", ".join(f"{value:.4f} ({name})" for name, value in scores.items())


def report(folder: Path, name: str, row: Row, keys: list[str], records: dict[str, dict], facts: dict) -> list[dict]:
    """Prints and writes what the folder's records hold, those of earlier commands too: runs.csv, table.csv, table.md and
    table.png; returns the rows of the table. `keys` are the runs of this command."""
    # Where a run does not say under which rule it ended, it is the row's; those that name no optimizer had AdamW, and those that
    # name no settings the model's own, nothing of the row's.
    usual = {"stop_at": row.stop_at, "optimizer": "adamw", "final_lr": row.final_lr}
    usual |= {"clip": row.clip, "recurrent_lr": row.recurrent_lr, "precision": row.precision}
    records = {key: {**usual, "settings": _own(record["model"]), **record} for key, record in records.items()}
    ended = [record for record in records.values() if record.get("scores")]
    failed = [record for record in records.values() if record.get("failed")]
    rows = table(row, ended, failed)
    facts, row = _machines([*ended, *failed], facts), _grid(row, [*ended, *failed])
    print(f"\n{name}: {row.about}\n{timing.table(rows)}")
    print(", ".join(f"{key} {value or 'not installed'}" for key, value in facts.items()))
    losses = [_failure(record) for record in failed]
    for line in losses:
        print(f"failed: {line}")
    left = sum(not records.get(key, {}).get("scores") for key in keys)
    if left:
        print(f"{left} of {len(keys)} runs have not ended: the same command goes on")
    _write_csv(folder / "runs.csv", [{**dict.fromkeys(facts), **_plain(record)} for record in (*ended, *failed)])
    _write_csv(folder / "table.csv", [{**line, **facts} for line in rows])
    (folder / "table.md").write_text(markdown(name, row, rows, facts, left, losses), encoding="utf-8")
    print(f"table: {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'runs.csv'}")
    if ended:
        _picture(folder / "table.png", row, ended, _lost(failed))
    return rows


def _own(model: str) -> str:
    return rows.told(rows.MODELS.get(model, ((), {}))[1])


def _failure(record: dict) -> str:
    return f"{record['case']}, {record['model']}, lr {record['lr']:g}, seed {record['seed']}: {record['failed']}"


def _grid(row: Row, records: list[dict]) -> Row:
    """The row with the learning rates and seeds of all its runs, those of earlier commands too."""
    grid = {field: tuple(sorted({r[key] for r in records})) for field, key in (("lrs", "lr"), ("seeds", "seed"))}
    return replace(row, **grid) if records else row


def _machines(records: list[dict], facts: dict) -> dict:
    """Where and with what these runs were made, each with what it has told; `facts` where none has."""
    found = {key: {str(r[key]) for r in records if r.get(key) is not None} for key in facts}
    return {key: "; ".join(sorted(values)) or facts[key] for key, values in found.items()}


def _line(record: dict) -> tuple:
    return tuple(record.get(name) or 0 for name in LINE)


def _lost(failed) -> Counter:
    """How many runs of a line failed at a learning rate."""
    return Counter((_line(record), record["lr"]) for record in failed)


def table(row: Row, ended: list[dict], failed=()) -> list[dict]:
    """A row a case, model, size and length of training, from the records of the runs that ended and of those that failed."""
    lines, lost = [], _lost(failed)
    for group in _groups(row, ended):
        best = _best(row, group, lost)
        first, scores = best[0], [score(row, record) for record in best]
        failures = lost[_line(first), first["lr"]]
        made = [record["curve"][-1]["step"] for record in best]
        tests = dict.fromkeys(test for record in best for test in list(record["scores"])[1:])
        others = {
            test: _median([r["scores"][test] for r in best if test in r["scores"]], failures, row.lower)
            for test in tests
        }
        lines.append(
            {
                **{name: first[name] for name in ("case", "model")},
                "width": first["d_model"],
                "parameters": first["parameters"],
                "state bytes": first["state_bytes"],
                "lr": first["lr"],
                "lr is": _place(first, group, lost),
                "seeds": len(best),
                "failed": failures or None,
                "median": _median(scores, failures, row.lower),
                "best": round((min if row.lower else max)(scores), 4),
                "spread": round(max(scores) - min(scores), 4),
                "at equal seconds": _in_time(row, ended, best, failures),
                "measured": next(iter(first["scores"])),
                **others,
                "steps": first["steps"],
                "stop at": first.get("stop_at") or None,
                "stopped early": sum(steps < first["steps"] for steps in made) if first.get("stop_at") else None,
                "steps made": round(statistics.median(made)),
                "batch": first["batch"],
                "dropout": first.get("dropout") or None,
                "optimizer": first.get("optimizer"),
                "final lr": first.get("final_lr"),
                **{name.replace("_", " "): first.get(name) for name in OWN},
                "ms a step": round(1e3 * first["pace"], 3),
                "seconds": round(statistics.median(r["pace"] * steps for r, steps in zip(best, made)), 1),
                "equal": first["equal"],
                "settings": first.get("settings") or None,
                "runs": len(group),
            }
        )
    for name in OWN:
        told = name.replace("_", " ")
        if all(line[told] in (None, getattr(row, name)) for line in lines):
            lines = [{key: value for key, value in line.items() if key != told} for line in lines]
    return lines


def _place(best: dict, group: list[dict], lost: Counter) -> str | None:
    """Whether the chosen learning rate stands at an end of those that ran, so that one beyond it might be better."""
    tried = {r["lr"] for r in group} | {lr for line, lr in lost if line == _line(best)}
    ends = {min(tried): "lowest", max(tried): "highest"}
    return "the only one" if len(tried) == 1 else ends.get(best["lr"])


def _median(values: list[float], failures: int, lower: bool) -> float | None:
    """Median of the values and of as many failures, worse than all of them, as NaN is; None where it is a failure."""
    worst = math.inf if lower else -math.inf
    middle = statistics.median([*(worst if math.isnan(v) else v for v in values), *[worst] * failures])
    return round(middle, 4) if math.isfinite(middle) else None


def score(row: Row, record: dict, step: int | None = None) -> float | None:
    """The score of a run: of its last evaluation, a loss of its best; up to `step`, None where there is none."""
    curve = [next(iter(p["scores"].values())) for p in record["curve"] if step is None or p["step"] <= step]
    return (min(curve) if row.lower else curve[-1]) if curve else None


def _groups(row: Row, ended: list[dict]) -> list[list[dict]]:
    """The runs of a line of the table, the cases and models in the order of the row."""
    groups = {}
    for record in ended:
        groups.setdefault(_line(record), []).append(record)
    cases, models = [case.name for case in row.cases], list(row.models)

    def place(names: list[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    def order(group):
        return place(cases, group[0]["case"]), group[0]["d_model"], place(models, group[0]["model"])

    return sorted(groups.values(), key=order)


def _best(row: Row, group: list[dict], lost=None) -> list[dict]:
    """The runs of the learning rate with the best median; of equal ones, that with more seeds. `lost` counts failures."""
    lost = lost or Counter()
    rates = {}
    for record in group:
        rates.setdefault(record["lr"], []).append(record)

    def rank(runs):
        failures = lost[_line(runs[0]), runs[0]["lr"]]
        median = _median([score(row, record) for record in runs], failures, row.lower)
        return (-math.inf if median is None else -median if row.lower else median), len(runs)

    return max(rates.values(), key=rank)


def _in_time(row: Row, ended: list[dict], best: list[dict], failures: int = 0) -> float | None:
    """Median of the scores when the quickest model of the case had finished; None without one in that time."""
    # Models are compared that differ in nothing else.
    shared = [name for name in (*LINE, "device") if name not in ("model", "n_layers", "settings")]
    found = []
    for record in best:
        if record["equal"] == "seconds":
            # Its whole schedule takes as long as all others of the comparison, but for parts of a step.
            found.append(score(row, record))
            continue
        same = [r for r in ended if all(r.get(name) == record.get(name) for name in shared)]
        budget = min(r["pace"] * r["steps"] for r in same)
        found.append(score(row, record, int(1.001 * budget / record["pace"])))
    found = [value for value in found if value is not None]
    return _median(found, failures, row.lower) if found else None


def markdown(name: str, row: Row, rows: list[dict], facts: dict, left: int, failed=()) -> str:
    """The table as Markdown, with the protocol above it, the machine and the runs that failed below."""
    names = list(dict.fromkeys(key for line in rows for key in line))
    names = [n for n in names if any(line.get(n) is not None for line in rows)]
    shown = [[_cell(line.get(n)) for n in names] for line in rows]
    head = f"# {name}\n\n{row.about[0].upper() + row.about[1:]}. {f'{left} runs have not ended. ' if left else ''}"
    head += f"Learning rates {', '.join(f'{lr:g}' for lr in row.lrs)}, seeds {', '.join(map(str, row.seeds))}, "
    head += f"AdamW β {row.betas[0]:g} and {row.betas[1]:g}, decay {row.weight_decay:g}, clip {row.clip:g}.\n"
    ends = sorted({line["stop at"] for line in rows if line.get("stop at")})
    for end in ends:
        head += (
            f"A run ended early where an evaluation on the way reached {end:g}; all tests were made there, before its\n"
        )
        head += "learning rate had come down: see `stopped early` (runs of the line) and `steps made` (their median).\n"
    lines = (
        [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *shown]]
        if rows
        else ["No run has ended."]
    )
    told = [", ".join(f"{k} {v or 'not installed'}" for k, v in facts.items()), ""]
    told += ["Failed:", "", *(f"* {line}" for line in failed), ""] if failed else []
    return "\n".join([head, *lines, "", *told])


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(record: dict) -> dict:
    """A run as a line: its facts and its scores."""
    line = {key: value for key, value in record.items() if key not in ("curve", "scores")}
    line |= {"steps made": record["curve"][-1]["step"]} if record.get("curve") else {}
    return line | {f"score {key}": value for key, value in (record.get("scores") or {}).items()}


def _write_csv(path: Path, rows: list[dict]):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _picture(path: Path, row: Row, ended: list[dict], lost: Counter | None = None):
    """A line of panels a case: the score over steps and over seconds, and where there are several widths over the state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'exlstm[plot]')")
        return
    cases, widths = list(dict.fromkeys(r["case"] for r in ended)), {r["d_model"] for r in ended}
    columns = 3 if len(widths) > 1 else 2
    figure = Figure(figsize=(5 * columns, 3.4 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for line, case in zip(axes, cases):
        groups = [_best(row, group, lost) for group in _groups(row, ended) if group[0]["case"] == case]
        for group in groups:
            _draw_curve(line, group, _label(group[0], [other[0] for other in groups]))
        if columns == 3:
            _draw_states(line[2], row, groups)
        line[0].set(xlabel="step", ylabel=f"{case}: {next(iter(groups[0][0]['scores']))}")
        line[1].set(xlabel="seconds of training, alone", xscale="log")
        line[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def _label(record: dict, others: list[dict]) -> str:
    """The model, and what tells its line from those of the same model."""
    others = [other for other in others if other["model"] == record["model"]]
    telling = [name for name in LINE if len({str(other.get(name)) for other in others}) > 1]
    return ", ".join([record["model"], *(f"{name} {record.get(name)}" for name in telling)])


def _draw_curve(line, group: list[dict], label: str):
    """Median over the seeds with their range."""
    first = max(record["curve"][0]["step"] for record in group)
    steps = sorted({p["step"] for record in group for p in record["curve"] if p["step"] >= first})
    # A run that ended early keeps its last score.
    values = [[_reached(record, step) for record in group] for step in steps]
    middle = [statistics.median(v) for v in values]
    for axis, scale in zip(line, (1, group[0]["pace"])):
        x = [scale * step for step in steps]
        (drawn,) = axis.plot(x, middle, marker=".", label=label)
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=drawn.get_color())


def _reached(record: dict, step: int) -> float:
    """The last score of a run up to a step."""
    return next(iter([p for p in record["curve"] if p["step"] <= step][-1]["scores"].values()))


def _draw_states(axis, row: Row, groups: list[list[dict]]):
    """The score over the floats of the state, a line a model."""
    lines = {}
    for group in groups:
        if group[0]["state_bytes"]:
            floats = group[0].get("state_floats") or group[0]["state_bytes"] / 4
            point = floats, statistics.median(score(row, record) for record in group)
            lines.setdefault(group[0]["model"], []).append(point)
    for model, points in lines.items():
        axis.plot(*zip(*sorted(points)), marker="o", label=model)
    axis.set(xlabel="floats of state", xscale="log")
