"""`exlstm compare ROW`: every model of a row on the same samples, with the same optimizers and seeds, many runs at once.

On a GPU one process replays the CUDA graphs of many runs on their own streams; on a CPU a process a core takes run after run.
A finished run is a record, an unfinished one a checkpoint: nothing is done twice.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import queue
import signal
import time
import warnings
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from exlstm.bench import rows, scoreboard, timing
from exlstm.bench.config import CompareConfig
from exlstm.bench.entrants import MODELS, THEIRS, near
from exlstm.bench.feeds import open_feed, open_text
from exlstm.bench.rows import ROWS, TEXTS, Row
from exlstm.bench.trial import Plan, Trial
from exlstm.models.config import nearest
from exlstm.runs import device_of
from exlstm.train import checkpoint
from exlstm.train.config import OPTIMIZERS, PRECISIONS
from exlstm.train.process import Signals
from exlstm.train.progress import clock

# Tokens of a step × width × layers that share a GPU, and runs at most; seconds between saves and between lines.
SHARED, MOST, SAVE, TELL = 1 << 28, 32, 60.0, 5.0
# What a row may have several of, and what each of them is for a run.
_WAYS = {"widths": "d_model"} | {f"{way}s": way for way in rows.WAYS}
# Numbers that are given as several: what each is called, and which fit.
_FITTING = {
    "lrs": ("an lr", lambda x: 0 < x < float("inf"), "0 < lr < ∞"),
    "seeds": ("a seed", lambda x: 0 <= x < 2**63, "0 ≤ seed < 2⁶³"),
    "dropouts": ("a dropout", lambda x: 0 <= x < 1, "0 ≤ dropout < 1"),
    "final_lrs": ("a final_lr", lambda x: 0 <= x <= 1, "0 ≤ final_lr ≤ 1"),
    "clips": ("a clip", lambda x: 0 <= x < float("inf"), "0 ≤ clip < ∞"),
    "recurrent_lrs": ("a recurrent_lr", lambda x: 0 <= x < float("inf"), "0 ≤ recurrent_lr < ∞"),
}


def run(name: str, config: CompareConfig) -> list[dict]:
    """Trains what is not trained yet, then prints and writes the tables; returns the rows of the table.

    SIGINT and SIGTERM save and write what there is, and end as they would have.
    """
    began = time.time()
    until = began + 60 * config.minutes if config.minutes else float("inf")
    row, device = chosen(name, config), device_of(config.device)
    folder = config.out / (f"{name}-quick" if config.quick else name)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.only_writer(folder), timing.cores(replace(config, device=device)):
        warnings.filterwarnings("ignore", "This instance was constructed with capturable", UserWarning)
        texts = _texts(row, config.text, folder)
        speeds = Speeds(folder / "speeds.json", device, texts, config.graphs)
        plans = planned(row, config, speeds)
        if not plans:
            why = next(iter(speeds.failed.values())).partition(": ")[2]
            raise ValueError(f"no model of row {name} can run so: {why}")
        done = _records(folder)
        waiting = [plan for plan in plans if done.get(plan.key, {}).get("scores") is None]
        counts = f"{len(plans)} runs, {len(plans) - len(waiting)} of them done"
        print(f"{name}: {row.about}; {counts}, on {device}", flush=True)
        supervisor = _Supervisor(config, device, folder, texts, plans, waiting, speeds, until)
        done |= supervisor.go()
    table = scoreboard.report(folder, name, row, [plan.key for plan in plans], done, supervisor.facts)
    if supervisor.signals.received:
        raise KeyboardInterrupt if supervisor.signals.received == signal.SIGINT else SystemExit(143)
    lost = [told for plan in plans if (told := done.get(plan.key, {}).get("failed"))]
    if len(lost) == len(plans):
        raise ValueError(f"all {len(plans)} runs failed, the first of them by {lost[0]}")
    return table


def chosen(name: str, config: CompareConfig) -> Row:
    """The row as the settings want it. ValueError: it has no such case, model or size."""
    if name not in ROWS:
        raise ValueError(f"unknown row {name!r}{nearest(name, ROWS)}")
    row = ROWS[name]
    for model in config.models:
        if model not in (*MODELS, *THEIRS):
            raise ValueError(f"unknown model {model!r}{near(model)}")
    known = [case.name for case in row.cases]
    for case in config.cases:
        if case not in known:
            raise ValueError(f"row {name} has no case {case!r}{nearest(case, known)}")
    for field in ("steps", "batch", "n_layers", "n_heads", "minutes", "minutes_each", "at_once"):
        if not 0 <= getattr(config, field) < float("inf"):
            raise ValueError(f"{field} is {getattr(config, field)}, wanted at least 0")
    if config.steps and config.minutes_each:
        raise ValueError(
            f"steps is {config.steps} and minutes_each is {config.minutes_each}; one of the two fixes a run"
        )
    if any(case.task in TEXTS for case in row.cases) and config.text is None:
        raise ValueError(f"row {name} reads a text, give its file with --text")
    if config.quick:
        row = rows.toy(row)
    for field, (name, fits, wanted) in _FITTING.items():
        for value in getattr(config, field):
            if not fits(value):
                raise ValueError(f"{name} is {value}, wanted {wanted}")
    for field, known in {"optimizers": OPTIMIZERS, "precisions": PRECISIONS}.items():
        for value in getattr(config, field):
            if value not in known:
                raise ValueError(f"unknown {field[:-1]} {value!r}{nearest(value, known)}")
    kept = ("models", "lrs", "seeds", "steps", "batch", "n_layers", "n_heads", *_WAYS)
    given = {field: getattr(config, field) for field in kept if getattr(config, field)}
    # What is named twice is trained once.
    row = replace(row, **{k: tuple(dict.fromkeys(v)) if isinstance(v, tuple) else v for k, v in given.items()})
    if config.cases:
        row = replace(row, cases=tuple(case for case in row.cases if case.name in config.cases))
    return row


def planned(row: Row, config: CompareConfig, speeds: Speeds) -> list[Plan]:
    """All runs, those of the first seed first; models that cannot run here, or not this case, are told and left out."""
    plans = []
    for seed in row.seeds:
        for lr in row.lrs:
            for one in _sizes(row):
                for case in row.cases:
                    for model in row.models:
                        plan = Plan(one, case, model, lr, seed, row.steps)
                        pace = speeds.of(plan)
                        if pace is None:
                            continue
                        if config.minutes_each:
                            steps = max(10, round(60 * config.minutes_each / pace))
                            plans.append(replace(plan, steps=steps, equal="seconds"))
                        else:
                            plans.append(plan)
    return plans


def _sizes(row: Row) -> list[Row]:
    """The row at each of its ways: widths, dropouts, optimizers and so on."""
    ways = [getattr(row, many) or (getattr(row, one),) for many, one in _WAYS.items()]
    alone = replace(row, **dict.fromkeys(_WAYS, ()))
    return [replace(alone, **dict(zip(_WAYS.values(), way))) for way in itertools.product(*ways)]


class Speeds:
    """Seconds of a step alone, parameters and bytes of state of every model and shape, measured once a device."""

    def __init__(self, path: Path, device: str, texts: dict, graphs: bool):
        self.path, self.device, self.texts, self.graphs = path, device, texts, graphs
        self.known = _read(path)
        self.failed = {}

    def key(self, plan: Plan) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device
        row, case = plan.row, plan.case
        # Tasks of words of equal lengths take equally long.
        kind = case.task if case.task in TEXTS or case.train != ((3, 40, 0),) else "words"
        sizes = (row.batch, row.d_model, row.n_layers, row.n_heads, row.matrix, row.match, row.dropout > 0, self.graphs)
        sizes = (*sizes, row.precision, row.optimizer, row.recurrent_lr)
        return json.dumps([name, plan.model, rows.settings(plan.model, row), kind, case.train, sizes])

    def of(self, plan: Plan) -> float | None:
        """Seconds a step; None, and a line that says why, where the model does not run."""
        key = self.key(plan)
        if key not in self.known and key not in self.failed:
            try:
                self.known[key] = self._measure(plan)
                _write(self.path, self.known)
            except Exception as error:  # Another package may raise anything: it costs its model, not the others.
                told = f"{plan.model} is left out: {' '.join(str(error).split())[:200]}"
                if told not in self.failed.values():
                    print(told, flush=True)
                self.failed[key] = told
        return self.known.get(key)

    def _measure(self, plan: Plan) -> float:
        feed = open_feed(plan.case, plan.row.batch, plan.steps, 0, self.device, self.texts)
        trial = Trial(plan, feed, self.path.parent / "nowhere", self.device, self.graphs)
        pace = trial.pace(20 if trial.cuda else 2)
        print(f"{plan.model}, {plan.case.name}: {1e3 * pace:.3g} ms a step alone  {trial.note}", flush=True)
        return pace


class _Supervisor:
    """Gives the waiting runs to workers, keeps what they report, and says how far they are."""

    def __init__(self, config, device, folder, texts, plans, waiting, speeds, until):
        self.facts = timing.machine(replace(config, device=device), "xlstm", "triton")
        self.config, self.device, self.folder, self.until = config, device, folder, until
        self.texts, self.waiting, self.signals = texts, waiting, Signals()
        self.cost = {plan.key: plan.steps * speeds.of(plan) for plan in plans}
        self.share = {plan.key: 1.0 for plan in plans}
        self.share |= {plan.key: self._begun(plan) for plan in waiting}
        self.plans = {plan.key: plan for plan in plans}
        self.records, self.first, self.began, self.told = {}, self._spent(), time.time(), 0.0

    def _begun(self, plan: Plan) -> float:
        steps = checkpoint.steps_in(self.folder / "checkpoints" / plan.key)
        return steps[0] / plan.steps if steps else 0.0

    def _spent(self) -> float:
        return sum(self.cost[key] * share for key, share in self.share.items())

    def go(self) -> dict[str, dict]:
        """The records of the runs that ended."""
        if not self.waiting:
            return {}
        workers = 1
        if self.device == "cpu":
            workers = min(
                self.config.at_once or max(1, (os.cpu_count() or 1) // self.config.threads), len(self.waiting)
            )
        with self.signals:
            if workers == 1:
                plans = deque(self.waiting)
                work(self._job(), lambda: plans.popleft() if plans else None, self._hear, self._stopped)
            else:
                self._spawn(workers)
        return self.records

    def _job(self) -> dict:
        config, sizes = self.config, []
        for plan in self.waiting:
            longest = max(high for _, high, _ in plan.case.train)
            sizes.append(plan.row.batch * longest * plan.row.d_model * plan.row.n_layers)
        at_once = 1
        if self.device.startswith("cuda"):
            at_once = config.at_once or (1 if self.texts else max(1, min(MOST, SHARED // max(sizes))))
        more = {"folder": self.folder / "checkpoints", "until": self.until, "at_once": at_once}
        return {"device": self.device, "graphs": config.graphs, "threads": config.threads, "texts": self.texts, **more}

    def _stopped(self) -> bool:
        self._tell()
        return self.signals.received is not None

    def _spawn(self, workers: int):
        context = multiprocessing.get_context("spawn")
        plans, said, stop = context.Queue(), context.Queue(), context.Event()
        for plan in self.waiting:
            plans.put(plan)
        processes = [context.Process(target=_serve, args=(self._job(), plans, said, stop)) for _ in range(workers)]
        for process in processes:
            process.start()
        try:
            while any(process.is_alive() for process in processes) or not said.empty():
                if self._stopped():
                    stop.set()
                try:
                    self._hear(*said.get(timeout=0.2))
                except queue.Empty:
                    continue
        finally:
            stop.set()
            # A queue that is not read would keep this process from ending.
            plans.cancel_join_thread()
            for process in processes:
                process.join()
                if process.exitcode:
                    print(f"a process ended with code {process.exitcode}, its run has not ended", flush=True)

    def _hear(self, key: str, share: float, record: dict | None):
        self.share[key] = share
        if record is None:
            return
        plan = self.plans[key]
        facts = {"case": plan.case.name, "model": plan.model, "lr": plan.lr, "seed": plan.seed, "equal": plan.equal}
        facts |= {field: getattr(plan.row, field) for field in ("d_model", "n_layers", "n_heads", "batch", *rows.WAYS)}
        facts["settings"] = rows.told((rows.settings(plan.model, plan.row) or ((), {}))[1])
        facts |= {"pace": self.cost[key] / plan.steps, "steps": plan.steps, "stop_at": plan.row.stop_at}
        self.records[key] = {**facts, **record, **self.facts}
        _write(self.folder / "records" / f"{key}.json", self.records[key])
        score = record.get("failed") or scoreboard.told(record["scores"])
        print(f"  {plan.case.name}, {plan.model}, lr {plan.lr:g}, seed {plan.seed}: {score}", flush=True)

    def _tell(self):
        now = time.time()
        if now - self.told < TELL:
            return
        self.told = now
        spent, total = self._spent(), sum(self.cost.values())
        rate = (spent - self.first) / max(1e-9, now - self.began)
        left = f"{clock((total - spent) / rate)} left" if rate else ""
        ended = sum(share >= 1 for share in self.share.values())
        print(f"{ended}/{len(self.share)} runs, {100 * spent / total:.1f} % of the steps  {left}", flush=True)


def _serve(job: dict, plans, said, stop):
    """A worker process: Ctrl-C is its parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def take():
        try:
            return plans.get(timeout=0.5)
        except queue.Empty:
            return None

    work(job, take, lambda *message: said.put(message), stop.is_set)


def work(job: dict, take, tell, stopped):
    """Runs plans from `take()` (None: no more), several at once where the job says so, until the time is up or `stopped()`.

    `tell(key, share, record)`: how far a run is, and at its end what became of it.
    """
    torch.set_num_threads(job["threads"])
    feeds, active, more = {}, [], True
    while (more or active) and not stopped() and time.time() < job["until"]:
        while more and len(active) < job["at_once"]:
            plan = take()
            more = plan is not None
            if more and (trial := _begin(plan, job, feeds, tell)):
                active.append(trial)
        for trial in list(active):
            if trial.ready() and not _forward(trial, tell):
                active.remove(trial)
        if active and not any(trial.ready() for trial in active):
            time.sleep(1e-4)
    for trial in active:
        if trial.step:
            trial.save()
        tell(trial.plan.key, trial.step / trial.plan.steps, None)


def _begin(plan: Plan, job: dict, feeds: dict, tell) -> Trial | None:
    key = (plan.case, plan.row.batch, plan.steps if plan.case.grow else 0, plan.seed)
    try:
        if key not in feeds:
            feeds[key] = open_feed(plan.case, plan.row.batch, plan.steps, plan.seed, job["device"], job["texts"])
        trial = Trial(plan, feeds[key], job["folder"], job["device"], job["graphs"])
    except Exception as error:
        tell(plan.key, 1.0, _failure(error))
        return None
    return trial


def _forward(trial: Trial, tell) -> bool:
    """A turn of a run: some steps, or the evaluation that is due; False when it has ended."""
    key = trial.plan.key
    try:
        if not trial.due():
            trial.advance()
            tell(key, trial.step / trial.plan.steps, None)
            return True
        trial.evaluate()
    except Exception as error:
        tell(key, 1.0, _failure(error))
        return False
    if not trial.done:
        if time.time() - trial.saved_at > SAVE:
            trial.save()
        return True
    facts = {"parameters": sum(p.numel() for p in trial.model.parameters())} | trial.state_size()
    tell(key, 1.0, {"scores": trial.curve[-1]["scores"], "curve": trial.curve, **facts, "note": trial.note})
    trial.forget()
    return False


def _failure(error: Exception) -> dict:
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "scores": None}


def _texts(row: Row, path: Path | None, folder: Path) -> dict:
    texts = {case.task: open_text(case.task, path, folder / "data") for case in row.cases if case.task in TEXTS}
    if texts:
        # Runs are known by their settings: of another text they would be taken for done.
        told = {name: [zlib.crc32(part.tobytes()) for part in text[:3]] for name, text in texts.items()}
        known = _read(folder / "texts.json")
        if known not in ({}, told) and any((folder / part).is_dir() for part in ("records", "checkpoints")):
            raise ValueError(f"the runs in {folder} read another text than {path}; choose another folder with --out")
        _write(folder / "texts.json", told)
    return texts


def _records(folder: Path) -> dict[str, dict]:
    found = ((path.stem, _read(path)) for path in sorted((folder / "records").glob("*.json")))
    return {key: record for key, record in found if record}


def _read(path: Path) -> dict:
    """What `_write` wrote, empty where there is nothing; what is damaged is told, and made anew."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        if not isinstance(error, FileNotFoundError):
            print(f"{path} is damaged and is made anew", flush=True)
        return {}


def _write(path: Path, values: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    aside.write_text(json.dumps(values), encoding="utf-8")
    aside.replace(path)
