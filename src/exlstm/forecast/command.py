"""`exlstm forecast`: a table in, a forecast with intervals out, the simple baselines printed and drawn beside it."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from exlstm.forecast.config import MODEL, FitConfig

# The series without a file: hourly temperatures that this small package ships.
DEMO = ("vega_datasets", "_data/seattle-temps.csv")
SHOWN = 24


@dataclass(frozen=True)
class Forecast:
    """Forecast every series of a table, with calibrated intervals; without a file, a series that is here already.

    Columns and frequency are guessed and said. Prints how good the seasonal naive and the linear forecast are beside it.
    """

    file: Annotated[Positional[str], arg(metavar="FILE")] = ""
    """CSV or Parquet, one row a time (and series), or one column a series; or a .tsf file"""
    horizon: int = 0
    """steps to forecast; 0: one season, or those of a saved model"""
    id: str = ""
    """column that tells series apart"""
    time: str = ""
    """column of times"""
    target: str = ""
    """column to forecast"""
    freq: str = ""
    """step between rows as pandas writes it: h, 15min, D, W-SUN, MS, ME; a number where times are numbers"""
    season: int = 0
    """steps of a season, as where times are numbers; 0: by the frequency"""
    exog: tuple[str, ...] = ()
    """columns that help; known for the future if --future holds them"""
    static: tuple[str, ...] = ()
    """columns with one value a series"""
    future: str = ""
    """table with the coming values of the --exog columns"""
    level: tuple[float, ...] = (80.0, 95.0)
    """intervals in percent"""
    cv: int = 0
    """windows at the end that are forecast as a test, before the real forecast"""
    out: str = ""
    """file for the forecast, CSV or Parquet; left out: it is printed"""
    plot: str = ""
    """file for a picture (PNG)"""
    model: str = ""
    """folder of the model: used if one is there, written if not"""
    workers: int = 0
    """processes that forecast a large table with the model in --model, into parts below --out, a folder; the same command again
    goes on where it stopped. 0: one process, one file"""
    minutes: float = 1.0
    """training time at most; 0: no limit"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    fit: FitConfig = field(default_factory=FitConfig)


class Report:
    """Says what happens: a line a sentence, and at most one every two seconds while the network trains."""

    def __init__(self):
        self.shown = 0.0

    def __call__(self, *sentences: str):
        for text in sentences:
            print(text, flush=True)

    def step(self, step: int, steps: int, loss: float, seconds: float):
        now = time.perf_counter()
        if now - self.shown >= 2 or step == steps:
            self.shown = now
            left = seconds / step * (steps - step)
            print(f"  update {step}/{steps}  validation loss {loss:.4f}  {left:.0f} s left at most", flush=True)


def run(command: Forecast) -> int:
    """Reads, fits or loads, tests if asked to, forecasts, writes."""
    from exlstm.forecast.tables import read_table, write_table

    _check(command)
    source = Path(command.file) if command.file else _demo()
    saved = Path(command.model) if command.model else None
    told = [f"{what} to {where}" for what, where in (("forecast", command.out), ("picture", command.plot)) if where]
    if saved and not (saved / "forecaster.json").is_file():
        told.append(f"model to {saved}")
    print(f"reads {source}{'; writes ' + ', '.join(told) if told else ''}", flush=True)
    held = command.id or _held_id(saved)
    frame = read_table(source, held)
    if command.workers:
        return _in_parts(command, frame, saved)
    future = read_table(Path(command.future), held, frame) if command.future else None
    model, fresh = _model(command, frame, future, saved)
    if command.cv:
        tested = model.cross_validation(n_windows=command.cv)
        print(f"\ntest on the last {command.cv} windows, each forecast from what came before it:")
        print(model.evaluate(tested).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    forecast = model.predict(futr_df=future)
    _say_skill(model)
    if command.plot:
        model.plot(forecast, command.plot)
    if fresh and saved:
        model.save(saved)
        print(f"model: {saved}")
    if command.out:
        write_table(forecast, Path(command.out))
        print(f"forecast: {command.out}, {len(forecast):,} rows")
    else:
        few = forecast[[c for c in forecast.columns if not c.startswith(("SeasonalNaive-", "Linear-"))]].head(SHOWN)
        print("\n" + few.to_string(index=False, float_format=lambda x: f"{x:.6g}"))
        if len(forecast) > SHOWN:
            print(f"... {len(forecast) - SHOWN:,} more rows; --out forecast.csv keeps them")
    if command.plot:
        print(f"picture: {command.plot}")
    return 0


def _check(command: Forecast):
    """What can be refused before anything is read."""
    from exlstm.forecast.tables import check_target

    if command.plot:
        from exlstm.plot import check_picture

        check_picture(Path(command.plot))
    for read in (command.file, command.future):
        if re.match(r"\w+://", read):
            raise ValueError(f"{read} is an address, wanted a file: download it first")
    for name in ("cv", "horizon", "season", "workers"):
        if getattr(command, name) < 0:
            raise ValueError(f"{name} is {getattr(command, name)}, wanted at least 0")
    for where in (command.out, command.plot):
        if where and not Path(where).absolute().parent.is_dir():
            raise ValueError(f"{where} cannot be written: there is no folder {Path(where).absolute().parent}")
        for read in (command.file, command.future):
            if where and read and Path(where).resolve() == Path(read).resolve():
                raise ValueError(f"{where} is to be read and written; choose another file")
    if command.out and command.model and Path(command.out).resolve() == Path(command.model).resolve():
        raise ValueError(f"{command.out} is to hold the model and the forecast; choose another file or folder")
    if command.out and not command.workers:
        check_target(Path(command.out))
    if command.workers:
        ready = command.out and command.file and command.model and (Path(command.model) / "forecaster.json").is_file()
        if not ready:
            raise ValueError("--workers wants a table, a fitted model in --model and a folder in --out")
        if Path(command.out).is_file() or command.exog or command.future or command.cv or command.plot:
            raise ValueError("--workers takes a folder in --out, and neither --exog, --future, --cv nor --plot")
    if command.future and not command.exog and not command.model:
        raise ValueError("--future holds covariates, but no --exog names them")
    folder = Path(command.model) if command.model else None
    if (
        folder
        and folder.exists()
        and (not folder.is_dir() or (os.listdir(folder) and not (folder / "forecaster.json").is_file()))
    ):
        raise ValueError(f"{folder} holds no forecaster and is not empty; choose another folder for --model")


def _in_parts(command: Forecast, frame, saved: Path) -> int:
    """Forecasts with the saved model, part by part."""
    from exlstm.forecast.batch import BatchForecaster, in_parts

    id, frame = _held_id(saved), frame.rename(columns=lambda name: str(name).strip())
    if id not in frame.columns:
        raise ValueError(f"{command.file} has no column {id!r} that tells series apart, so it has no parts")
    kind = "parquet" if Path(command.file).suffix.lower() in (".parquet", ".pq") else "csv"
    model = BatchForecaster(saved, list(command.level), command.device, threads=1)
    in_parts(frame, id, model, Path(command.out), command.workers, kind, lambda text: print(text, flush=True))
    print(f"forecasts: {command.out}")
    return 0


def _held_id(saved: Path | None) -> str:
    """The id column of a saved model, "" without one; what is damaged there, loading it tells."""
    import json

    try:
        return json.loads((saved / "forecaster.json").read_text(encoding="utf-8"))["columns"]["id"] if saved else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _demo() -> Path:
    spec = importlib.util.find_spec(DEMO[0])
    if spec is None:
        raise ValueError("without a file the demo needs vega_datasets: pip install 'exlstm[forecast]'")
    return Path(spec.submodule_search_locations[0]) / DEMO[1]


def _model(command: Forecast, frame, future, saved: Path | None):
    """The saved model on these rows, or a new one; and whether it is new."""
    from exlstm.data import frequency
    from exlstm.data.panel import Columns
    from exlstm.data.series import panel_of
    from exlstm.forecast.endings import held_ahead
    from exlstm.forecast.forecaster import Forecaster

    report = Report()
    if saved and (saved / "forecaster.json").is_file():
        model = Forecaster.load(saved, command.device)
        model.report = report
        if command.horizon and command.horizon != model.h:
            raise ValueError(f"{saved} holds a model for a horizon of {model.h}, --horizon is {command.horizon}")
        _check_columns(command, model, saved)
        print(f"uses the model in {saved}")
        model.level = list(command.level)
        return model.on(frame), False
    ahead = [] if future is None else [str(name).strip() for name in future.columns]
    futr = tuple(name for name in command.exog if name in ahead)
    if future is not None and not futr:
        have = ", ".join(map(repr, ahead))
        raise ValueError(f"the future covariates lack column {command.exog[0]!r}; they have {have}")
    hist = tuple(name for name in command.exog if name not in futr)
    if futr and hist:
        print(f"known for the future: {', '.join(futr)}; for the past only: {', '.join(hist)}")
    columns = Columns(command.id, command.time, command.target, futr, hist, command.static)
    panel = panel_of(frame, columns, command.freq or None)
    season = command.season or frequency.seasons(panel.freq)[0]
    horizon = command.horizon or (season if season > 1 else 12)
    if not command.horizon:
        print(f"horizon {horizon}: no --horizon was given")
    if hist and future is None:
        ahead, told = held_ahead(panel, horizon)
        report(*told)
        if ahead:
            columns = replace(panel.columns, futr=ahead, hist=tuple(name for name in hist if name not in ahead))
            panel = replace(panel_of(frame, columns, panel.freq), told=panel.told)
    fit = replace(command.fit, minutes=command.minutes or command.fit.minutes)
    made = {"season": command.season or None, "config": fit, "device": command.device, "report": report}
    model = Forecaster(horizon, level=command.level, **made)
    return model.fit(panel), True


def _check_columns(command: Forecast, model, saved: Path):
    """ValueError where the command names other columns, another frequency or settings than the saved model was fitted with."""
    from exlstm.data import frequency

    panel, columns = model.panel, model.panel.columns
    if command.freq and frequency.checked(command.freq, panel.times(0, 0, 1)) != panel.freq:
        raise ValueError(f"{saved} holds a model of frequency {panel.freq!r}, --freq is {command.freq!r}")
    if command.season and command.season != model.season:
        raise ValueError(f"{saved} holds a model of season {model.season}, --season is {command.season}")
    if command.static and set(command.static) != set(columns.static):
        told = ", ".join(columns.static) or "none"
        raise ValueError(f"{saved} holds a model with static columns {told}, --static is {', '.join(command.static)}")
    for option, held in (("id", columns.id), ("time", columns.time), ("target", columns.target)):
        given = getattr(command, option)
        if given and given != held:
            raise ValueError(f"{saved} holds a model with {option} {held!r}, --{option} is {given!r}")
    for f in fields(FitConfig):
        given, fitted = getattr(command.fit, f.name), getattr(model.config, f.name)
        if given not in (f.default, fitted) and f.name != "minutes":
            name = f.name.replace("_", "-")
            raise ValueError(f"{saved} holds a model fitted with {name} {fitted!r}, --fit.{name} is {given!r}")
    if command.future and not columns.futr:
        raise ValueError(f"{saved} holds a model without covariates known for the future, so --future has no use")
    held = {*columns.futr, *columns.hist}
    if command.exog and set(command.exog) != held:
        told = ", ".join(sorted(held)) or "none"
        raise ValueError(f"{saved} holds a model with covariates {told}, --exog is {', '.join(command.exog)}")


def _say_skill(model):
    """The table of members on validation, and a sentence that hides nothing."""
    skill = model.skill()
    print("\non the validation part, over the seasonal naive forecast (below 1 is better):")
    print(skill.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.3f}"))
    if told := verdict(skill):
        print(told)


def verdict(skill) -> str:
    """Which baseline was better on validation by the error of its median, or, where none was, by its intervals; "" for none.

    The two are told apart: the baselines' intervals are fitted to that part, ours are wider on purpose where it is short.
    """
    rows = skill.set_index("model")
    ours, others = rows.loc[MODEL], rows.loc[rows.index.isin(("SeasonalNaive", "Linear"))]
    best, least = others["mae"].idxmin(), others["mae"].min()
    if ours["mae"] > 1.0005 * least:
        who = f"{best}, a single ridge beside the blend," if best == "Linear" else best
        by = f"by {100 * (ours['mae'] / least - 1):.1f} % in mean absolute error" if least else "and without an error"
        return f"{who} was better there {by}"
    best, least = others["pinball"].idxmin(), others["pinball"].min()
    if not ours["pinball"] > 1.0005 * least:
        return ""
    more = f"{100 * (ours['pinball'] / least - 1):.1f} % more " if least else ""
    ends = [name for name in rows if name.startswith("coverage")]
    wider = (ours[ends] >= others.loc[best, ends]).all()
    why = f": they are widened for what comes after it, those of {best} are fitted to it" if wider else ""
    return f"no baseline was better there in mean absolute error; {MODEL}'s intervals cost {more}pinball loss than {best}'s{why}"
