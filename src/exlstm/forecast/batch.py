"""Forecasts of very many series with one fitted model: a picklable callable for Ray and Spark, and processes on one machine.

ray.data.read_parquet("sales/").groupby("unique_id").map_groups(BatchForecaster("model"), batch_format="pandas")
frame.repartition("unique_id").mapInPandas(BatchForecaster("model").map, schema)        # Spark
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from exlstm.data.panel import bare
from exlstm.forecast import frames
from exlstm.forecast.files import SETTINGS, TENSORS

# Series a part, and what the parts of a folder are of: hidden, so that the folder is read as one table.
PART, PARTS = 1000, ".parts.json"


class BatchForecaster:
    """frame -> frame with the forecasts of its series; the model is read where it runs, once a process.

    Args:
        folder: where `Forecaster.save` put the model; every machine has to see it.
        level: intervals in percent; None: those the model was fitted with.
        device: cpu, cuda, ...; auto: the accelerator if there is one.
        threads: CPU threads a process; 0 leaves them as they are.
    """

    def __init__(self, folder, level=None, device: str = "cpu", threads: int = 0):
        if not (Path(folder) / "forecaster.json").is_file():
            raise FileNotFoundError(f"{folder} holds no forecaster.json: not the folder of a saved forecaster")
        if level is not None:
            frames.check_levels(level, None)
        self.folder, self.level, self.device, self.threads, self.model = str(folder), level, device, threads, None
        # Ray's map_groups asks a callable for its name.
        self.__name__ = type(self).__name__

    def __getstate__(self):
        return {**self.__dict__, "model": None}

    def told(self) -> dict:
        """What its forecasts depend on, in short."""
        parts = [(Path(self.folder) / name).read_bytes() for name in (SETTINGS, TENSORS)]
        level = None if self.level is None else frames.listed(self.level)
        return {"model": hashlib.sha256(b"".join(parts)).hexdigest(), "level": level}

    def __call__(self, frame):
        """The forecasts of the series in `frame`, which holds the whole history of each."""
        if self.model is None:
            import torch

            from exlstm.forecast.forecaster import Forecaster

            if self.threads:
                torch.set_num_threads(self.threads)
            self.model = Forecaster.load(self.folder, self.device)
        return self.model.predict(frame, level=self.level, baselines=False)

    def map(self, parts):
        """The forecasts of all series in the frames of a partition (Spark's mapInPandas)."""
        import pandas as pd

        whole = list(parts)
        if whole:
            yield self(pd.concat(whole, ignore_index=True))


def _mark(frame) -> str:
    """A number of all rows."""
    from pandas.util import hash_pandas_object

    return hashlib.sha256(hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()


def _check_parts(out: Path, told: dict):
    """Notes in the folder what its parts are of; ValueError where it holds parts of something else."""
    path = out / PARTS
    if path.is_file() and any(out.glob("part-*")):
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in told if before.get(name) != told[name]]
        if other:
            raise ValueError(f"{out} holds parts of another {' and '.join(other)}; choose another folder for --out")
        return
    if any(out.glob("part-*")):
        raise ValueError(
            f"{out} holds parts and no {PARTS} that says what they are of; choose another folder for --out"
        )
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(told), encoding="utf-8")
    aside.replace(path)


def in_parts(
    frame, id_column: str, forecaster: BatchForecaster, out: Path, workers: int, kind: str = "csv", report=print
) -> int:
    """Writes out/part-00000.csv, ... of PART series each in `workers` processes; parts that are there are left as they are.

    Returns the number of parts that were written. ValueError: the parts that are there are of other rows, model or levels, or
    rows of the part that is named are none that the model can forecast from.
    """
    from exlstm.forecast.tables import write_table

    if workers < 1:
        raise ValueError(f"workers is {workers}, wanted at least 1")
    column = bare(frame[id_column])
    ids = list(dict.fromkeys(column))
    place = {name: n // PART for n, name in enumerate(ids)}
    groups = dict(list(frame.groupby(column.map(place), sort=True)))
    out.mkdir(parents=True, exist_ok=True)
    _check_parts(out, {**forecaster.told(), "table": _mark(frame)})
    left = {k: out / f"part-{k:05}.{kind}" for k in groups if not (out / f"part-{k:05}.{kind}").exists()}
    report(f"{len(ids):,} series in {len(groups)} parts, {len(groups) - len(left)} of them done before")
    start, done = time.perf_counter(), 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(forecaster, groups[k]): path for k, path in left.items()}
        for job in as_completed(jobs):
            try:
                made = job.result()
            except ValueError as error:
                # The sentence of a process comes with its traceback.
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(f"{jobs[job].stem}: {error}") from None
            write_table(made, jobs[job])
            done += 1
            seconds = (time.perf_counter() - start) / done * (len(left) - done)
            report(f"{jobs[job].name}: {done} of {len(left)}, {seconds:.0f} s left")
    return done
