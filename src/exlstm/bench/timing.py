"""Fair timing: ours and the peer in turn in one process, medians and the median of the pairwise ratios; tables, CSV, PNG."""

import csv
import gc
import os
import platform
import statistics
import time
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

import torch

from exlstm.runs import device_of


class Timing(NamedTuple):
    """Milliseconds (medians) of ours and of the peer, and ours over the peer: median, least and greatest of the rounds,
    and the best round of ours over the best of the peer, which a busy machine disturbs least."""

    ours: float
    peer: float | None
    ratio: float | None
    low: float | None
    high: float | None
    best: float | None


def paired(ours, peer=None, *, rounds: int, device="cpu", warmup: int = 2) -> Timing:
    """Times the calls `ours()` and `peer()` in turn, A B A B ..., so that a change of the machine's load meets both."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, wanted at least 1")
    sides = [ours] if peer is None else [ours, peer]
    for _ in range(warmup):
        for side in sides:
            side()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        times = [[milliseconds(side, device) for side in sides] for _ in range(rounds)]
    finally:
        if collecting:
            gc.enable()
    columns = [statistics.median(column) for column in zip(*times, strict=True)]
    if peer is None:
        return Timing(columns[0], None, None, None, None, None)
    ratios = [a / b for a, b in times]
    best, best_peer = (min(column) for column in zip(*times, strict=True))
    return Timing(*columns, statistics.median(ratios), min(ratios), max(ratios), best / best_peer)


def milliseconds(call, device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device):
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def saved_bytes(forward, ignore=()) -> int:
    """Bytes that `forward()` leaves behind for its backward: every storage once, those of the tensors `ignore` left out."""
    known = {t.untyped_storage().data_ptr() for t in ignore}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph lives until the count is made, so no storage can be freed and met again under the same address.
        result = forward()
    total = sum(storages.values())
    del result
    return total


def relative_error(value, truth) -> float:
    """‖value − truth‖ / ‖truth‖ in float64."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def row(case: str, unit: str, timing: Timing, peer: str, wanted: float | None = None, **more) -> dict:
    """One line of a table of timings; `wanted` is the greatest ratio that we call good."""
    shown = {
        f"ours {unit}": timing.ours,
        f"peer {unit}": timing.peer,
        "ours/peer": timing.ratio,
        "least": timing.low,
        "greatest": timing.high,
        "of the best": timing.best,
    }
    figures = {name: None if value is None else round(value, 3) for name, value in shown.items()}
    return {"case": case, **figures, "wanted": None if wanted is None else f"≤ {wanted:g}", "peer": peer, **more}


def machine(config, *packages: str) -> dict:
    """Where and with what a figure was measured."""
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in ("torch", *packages)}
    return {
        "device": f"{device.type} ({name})",
        "threads": config.threads,
        "python": platform.python_version(),
        **versions,
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def cores(config):
    """A run on `config.threads` CPU threads; refuses numbers below 0 and a device that is not here, says so when others keep
    the machine busy."""
    for name, value in vars(config).items():
        # Not a number is not fine either.
        if not all(number >= 0 for number in _numbers(value)):
            raise ValueError(f"{name} is {value}, wanted at least 0")
    if config.threads < 1:
        raise ValueError(f"threads is {config.threads}, wanted at least 1")
    device_of(config.device)
    before, busy = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5 * (os.cpu_count() or 1):
        print(f"the machine is busy (load {busy:.1f} on {os.cpu_count()} cores): ratios are worth more than times")
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbers(value) -> list:
    """The numbers of a setting, which may stand in tuples of tuples."""
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def wants_gpu(config, name: str):
    """ValueError where a benchmark of kernels has no NVIDIA GPU to run on."""
    if not (torch.cuda.is_available() and config.device.startswith("cuda")):
        here = f"device is {config.device!r}" if torch.cuda.is_available() else "there is none here"
        raise ValueError(f"bench {name} measures kernels on an NVIDIA GPU, {here}")


def attempt(what, deadline, call):
    """What `call` returns; None with one printed sentence where it fails, or where there is no time left."""
    if time.monotonic() > deadline:
        print(f"{what}: left out, the time is up (--seconds)")
        return None
    try:
        return call()
    except Exception as error:
        told = " ".join(str(error).split())
        print(f"{what}: failed with {type(error).__name__}{': ' * bool(told)}{told[:160]}")
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(rows: list[dict]) -> str:
    """Rows as aligned text; columns in the order of their first appearance, empty where a row has no such field."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [n for n in names if any(row.get(n) is not None for row in rows)]
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(n), int | float | None) for row in rows) for n in names]
    lines = (
        "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _text(value) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def report(name: str, rows: list[dict], config, facts: dict, draw=None):
    """Prints the table with the facts of the machine, writes `name`.csv, and `name`.png where matplotlib is installed."""
    print(table(rows))
    print(", ".join(f"{key} {value or 'not installed'}" for key, value in facts.items()))
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"{name}.csv"
    columns = list(dict.fromkeys(key for row in rows for key in (*row, *facts)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    print(f"table: {path}")
    if draw is not None:
        picture(config.out / f"{name}.png", draw)


def picture(path, draw):
    """Draws `draw(axes)` into a PNG; without matplotlib it says so and goes on."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'exlstm[plot]')")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def bars(rows: list[dict], unit: str):
    """A drawing of a table of timings: two bars a case."""

    def draw(axes):
        y = range(len(rows))
        for offset, side, color in ((-0.2, "peer", "0.7"), (0.2, "ours", "tab:blue")):
            axes.barh(
                [p + offset for p in y], [r.get(f"{side} {unit}") or 0 for r in rows], 0.38, label=side, color=color
            )
        axes.set_yticks(list(y), [r["case"] for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.legend()

    return draw
