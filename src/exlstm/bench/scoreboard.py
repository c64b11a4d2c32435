"""What a comparison says: a CSV of its runs, a table (CSV and Markdown) of its models, a plot over tokens and seconds.

Of every model the learning rate whose median over the seeds is best; its median, best and spread, greatest less least. Equal
seconds: the last score that was measured while the quickest model of the case finished; its schedule had not ended there.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from exlstm.bench import timing
from exlstm.bench.rows import Row

# What the runs of one line of the table share.
LINE = ("case", "model", "d_model", "n_layers", "n_heads", "batch", "steps", "equal")


def told(scores: dict[str, float]) -> str:
    """Scores as a line."""
    return ", ".join(f"{value:.4f} ({name})" for name, value in scores.items())


def report(folder: Path, name: str, row: Row, keys: list[str], records: dict[str, dict], facts: dict) -> list[dict]:
    """Prints and writes what the folder's records hold, those of earlier commands too: runs.csv, table.csv, table.md and
    table.png; returns the rows of the table. `keys` are the runs of this command."""
    ended = [record for record in records.values() if record.get("scores")]
    rows = table(row, ended)
    failed = [record for record in records.values() if record.get("failed")]
    print(f"\n{name}: {row.about}\n{timing.table(rows)}")
    print(", ".join(f"{key} {value or 'not installed'}" for key, value in facts.items()))
    for record in failed:
        print(
            f"failed: {record['case']}, {record['model']}, lr {record['lr']:g}, seed {record['seed']}: {record['failed']}"
        )
    left = sum(not records.get(key, {}).get("scores") for key in keys)
    if left:
        print(f"{left} of {len(keys)} runs have not ended: the same command goes on")
    _write_csv(folder / "runs.csv", [_plain(record) for record in (*ended, *failed)], facts)
    _write_csv(folder / "table.csv", rows, facts)
    (folder / "table.md").write_text(markdown(name, row, rows, facts, left), encoding="utf-8")
    print(f"table: {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'runs.csv'}")
    if ended:
        _picture(folder / "table.png", row, ended)
    return rows


def table(row: Row, ended: list[dict]) -> list[dict]:
    """A row a case, model, size and length of training, from the records of the runs that ended."""
    rows = []
    for group in _groups(row, ended):
        best = _best(row, group)
        first, scores = best[0], [score(row, record) for record in best]
        others = {
            test: round(statistics.median(record["scores"][test] for record in best), 4)
            for test in list(first["scores"])[1:]
        }
        rows.append(
            {
                **{name: first[name] for name in ("case", "model")},
                "width": first["d_model"],
                "parameters": first["parameters"],
                "state bytes": first["state_bytes"],
                "lr": first["lr"],
                "seeds": len(best),
                "median": round(statistics.median(scores), 4),
                "best": round((min if row.lower else max)(scores), 4),
                "spread": round(max(scores) - min(scores), 4),
                "at equal seconds": _in_time(row, ended, best),
                "measured": next(iter(first["scores"])),
                **others,
                "steps": first["steps"],
                "batch": first["batch"],
                "ms a step": round(1e3 * first["pace"], 3),
                "seconds": round(first["pace"] * first["steps"], 1),
                "equal": first["equal"],
                "runs": len(group),
            }
        )
    return rows


def score(row: Row, record: dict, step: int | None = None) -> float | None:
    """The score of a run: of its last evaluation, a loss of its best; up to `step`, None where there is none."""
    curve = [next(iter(p["scores"].values())) for p in record["curve"] if step is None or p["step"] <= step]
    return (min(curve) if row.lower else curve[-1]) if curve else None


def _groups(row: Row, ended: list[dict]) -> list[list[dict]]:
    """The runs of a line of the table, the cases and models in the order of the row."""
    groups = {}
    for record in ended:
        groups.setdefault(tuple(record[name] for name in LINE), []).append(record)
    cases, models = [case.name for case in row.cases], list(row.models)

    def place(names: list[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    def order(group):
        return place(cases, group[0]["case"]), group[0]["d_model"], place(models, group[0]["model"])

    return sorted(groups.values(), key=order)


def _best(row: Row, group: list[dict]) -> list[dict]:
    """The runs of the learning rate with the best median; of equal ones, that with more seeds."""
    rates = {}
    for record in group:
        rates.setdefault(record["lr"], []).append(record)

    def rank(runs):
        median = statistics.median(score(row, record) for record in runs)
        return (-median if row.lower else median), len(runs)

    return max(rates.values(), key=rank)


def _in_time(row: Row, ended: list[dict], best: list[dict]) -> float | None:
    """Median of the scores when the quickest model of the case had finished; None without one in that time."""
    # Models are compared that differ in nothing else.
    shared = [name for name in LINE if name not in ("model", "n_layers")]
    if best[0]["equal"] == "seconds":
        shared.remove("steps")
    same = [record for record in ended if all(record[name] == best[0][name] for name in shared)]
    budget = min(record["pace"] * record["steps"] for record in same)
    found = [score(row, record, int(1.001 * budget / record["pace"])) for record in best]
    found = [value for value in found if value is not None]
    return round(statistics.median(found), 4) if found else None


def markdown(name: str, row: Row, rows: list[dict], facts: dict, left: int) -> str:
    """The table as Markdown, with the protocol above it and the machine below."""
    names = list(dict.fromkeys(key for line in rows for key in line))
    names = [n for n in names if any(line.get(n) is not None for line in rows)]
    shown = [[_cell(line.get(n)) for n in names] for line in rows]
    head = f"# {name}\n\n{row.about[0].upper() + row.about[1:]}. {f'{left} runs have not ended. ' if left else ''}"
    head += f"Learning rates {', '.join(f'{lr:g}' for lr in row.lrs)}, seeds {', '.join(map(str, row.seeds))}, "
    head += f"AdamW β {row.betas[0]:g} and {row.betas[1]:g}, decay {row.weight_decay:g}, clip {row.clip:g}.\n"
    lines = [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *shown]]
    return "\n".join([head, *lines, "", ", ".join(f"{k} {v or 'not installed'}" for k, v in facts.items()), ""])


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(record: dict) -> dict:
    """A run as a line: its facts and its scores."""
    line = {key: value for key, value in record.items() if key not in ("curve", "scores")}
    return line | {f"score {key}": value for key, value in (record.get("scores") or {}).items()}


def _write_csv(path: Path, rows: list[dict], facts: dict):
    columns = list(dict.fromkeys(key for row in rows for key in (*row, *facts)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def _picture(path: Path, row: Row, ended: list[dict]):
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
        groups = [_best(row, group) for group in _groups(row, ended) if group[0]["case"] == case]
        for group in groups:
            _draw_curve(line, row, group, len(widths) > 1)
        if columns == 3:
            _draw_states(line[2], row, groups)
        line[0].set(xlabel="step", ylabel=f"{case}: {next(iter(groups[0][0]['scores']))}")
        line[1].set(xlabel="seconds of training, alone", xscale="log")
        line[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def _draw_curve(line, row: Row, group: list[dict], name_width: bool):
    """Median over the seeds with their range."""
    label = f"{group[0]['model']}{', ' + str(group[0]['d_model']) if name_width else ''}"
    steps = sorted(set.intersection(*({p["step"] for p in record["curve"]} for record in group)))
    values = [
        [next(iter(p["scores"].values())) for record in group for p in record["curve"] if p["step"] == s] for s in steps
    ]
    middle = [statistics.median(v) for v in values]
    for axis, scale in zip(line, (1, group[0]["pace"])):
        x = [scale * step for step in steps]
        (drawn,) = axis.plot(x, middle, marker=".", label=label)
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=drawn.get_color())


def _draw_states(axis, row: Row, groups: list[list[dict]]):
    """The score over the floats of the state, a line a model."""
    lines = {}
    for group in groups:
        if group[0]["state_bytes"]:
            point = group[0]["state_bytes"] / 4, statistics.median(score(row, record) for record in group)
            lines.setdefault(group[0]["model"], []).append(point)
    for model, points in lines.items():
        axis.plot(*zip(*sorted(points)), marker="o", label=model)
    axis.set(xlabel="floats of state", xscale="log")
