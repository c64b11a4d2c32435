"""A forecaster on disk: forecaster.json and tensors.safetensors, written whole or not at all; nothing is pickled."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from exlstm.data.panel import Columns, Panel
from exlstm.forecast.config import FitConfig
from exlstm.forecast.drift import Drift
from exlstm.forecast.engine import Engine
from exlstm.forecast.floors import Floors
from exlstm.forecast.training import DESIGNS
from exlstm.models.config import ForecasterConfig, LinearConfig, SLSTMOptions, from_dict, nearest
from exlstm.models.linear import LinearPath
from exlstm.train.checkpoint import MANIFEST, verify, write_folder

# Version 1 knew one ridge, which was the linear path; versions 1 and 2 did not follow drift, version 3
# by the errors of the linear path alone, version 4 without those of the network.
FORMAT, VERSION, READS = "exlstm-forecaster", 5, (1, 2, 3, 4, 5)
SETTINGS, TENSORS = "forecaster.json", "tensors.safetensors"


def save(model, folder: str | os.PathLike):
    """Writes the folder; replaces one that holds a forecaster and nothing else, or nothing at all."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, wanted a folder to save the forecaster in")
    foreign = sorted({f.name for f in folder.iterdir()} - {SETTINGS, TENSORS, MANIFEST}) if folder.is_dir() else []
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which is no part of a saved forecaster; choose another folder")
    settings, tensors = _pack(model)
    text = json.dumps(settings, indent=1, allow_nan=False)

    def write(aside: Path):
        (aside / SETTINGS).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, aside / TENSORS)

    write_folder(folder, write)


def _pack(model) -> tuple[dict, dict]:
    engine, panel = model.engine, model.panel
    rows, lengths, firsts = [], [], []
    for n in range(len(panel)):
        a, b = int(panel.offsets[n]), int(panel.offsets[n + 1])
        start = max(0, b - a - engine.kept)
        rows.append(np.arange(a + start, b))
        lengths.append(b - a - start)
        firsts.append(str(panel.times(n, start, start + 1)[0]))
    rows, series = np.concatenate(rows), engine.statistics["series"]
    kept = {k: getattr(panel, k)[rows] for k in ("y", "futr", "hist")} | {"static": panel.static}
    kept |= {} if panel.ahead is None else {"ahead": panel.ahead}
    tensors = {f"history.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in kept.items()}
    tensors["history.lengths"] = torch.tensor(lengths)
    tensors["series"] = torch.tensor(list(series.values()), dtype=torch.float64)
    for kind in ("futr", "hist", "static"):
        tensors[f"statistics.{kind}"] = torch.from_numpy(np.stack(engine.statistics[kind]))
    tensors |= {"ridge.weight": engine.ridge.weight, "factors": engine.factors, **_drift_tensors(engine)}
    tensors |= {f"spread.{k}": v for k, v in engine.spreads.items()}
    for part in ("linear", "bent", "network"):
        if (made := getattr(engine, part)) is not None:
            tensors |= {f"{part}.{k}": v for k, v in made.state_dict().items()}
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "fit": asdict(engine.config),
        "linear": asdict(engine.linear.config),
        "ridge": engine.lookback,
        "network": None if engine.network is None else asdict(engine.network.config),
        "season": engine.season,
        "year": engine.statistics["year"],
        "drift": _drift_settings(engine.drift),
        "bent": None if engine.bent is None else [engine.bend, asdict(engine.bent.config)],
        "floors": [engine.floors.others, [[_plain(name), low] for name, low in engine.floors.known.items()]],
        "weights": engine.weights,
        "scores": engine.scores,
        "notes": engine.notes,
        "level": model.level,
        "freq": panel.freq,
        "zone": panel.zone,
        "wall": panel.wall,
        "dayfirst": panel.dayfirst,
        "wide": panel.wide,
        "columns": asdict(panel.columns),
        "levels": panel.levels,
        "ids": [_plain(i) for i in panel.ids],
        "known": [_plain(i) for i in series],
        "firsts": firsts,
    }
    return settings, {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def _drift_tensors(engine) -> dict:
    if engine.drift is None:
        return {}
    now = {"linear": engine.linear, "arcsinh": engine.bent, "network": engine.network}
    held = {
        f"judge.{name}.{k}": v
        for name, judge in engine.drift.judges.items()
        if judge is not now[name]
        for k, v in judge.state_dict().items()
    }
    return {"drift.curve": engine.drift.curve, **held}


def _drift_settings(drift: Drift | None) -> dict | None:
    if drift is None:
        return None
    begins = [[_plain(name), str(first), step] for name, (first, step) in drift.begins.items()]
    return {"offset": drift.offset, "begins": begins, "shares": drift.shares}


def _unpack_drift(settings: dict, tensors: dict, engine: Engine, device: str) -> Drift | None:
    import pandas as pd

    found, judges = settings.get("drift"), {}
    if found is None:
        return None
    # Before version 4 the linear path alone forecast again.
    old = {f"judge.linear.{k[6:]}": v for k, v in tensors.items() if k in ("judge.weight", "judge.own")}
    shares = found.get("shares", {"linear": 1.0})
    now = {"linear": engine.linear, "arcsinh": engine.bent}
    now |= {"network": engine.network} if "network" in shares else {}
    for name, judge in now.items():
        if judge is None:
            continue
        start = f"judge.{name}."
        if held := {k[len(start) :]: v for k, v in (tensors | old).items() if k.startswith(start)}:
            judge = copy.deepcopy(judge)
            judge.load_state_dict(held)
        judges[name] = judge
    time = int if isinstance(settings["freq"], int) else pd.Timestamp
    begins = {name: (time(first), step) for name, first, step in found["begins"]}
    return Drift(judges, shares, tensors["drift.curve"].to(device), found["offset"], begins)


def _plain(name):
    name = name.item() if isinstance(name, np.generic) else name
    if not isinstance(name, str | int | float | bool):
        raise ValueError(f"the series {name!r} is named by {type(name).__name__}; only text and numbers can be saved")
    return name


def load(kind, folder: str | os.PathLike, device: str):
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a saved forecaster")
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: not the folder of a saved forecaster")
    verify(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ValueError(f"{folder / SETTINGS} is not of format {FORMAT!r}")
    if settings.get("version") not in READS:
        told = f"this exlstm reads {' and '.join(map(str, READS))}"
        raise ValueError(f"{folder / SETTINGS} has version {settings.get('version')!r}, {told}")
    try:
        return _unpack(kind, settings, tensors, device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None


def _unpack(kind, settings: dict, tensors: dict, device: str):
    fit = _dataclass(FitConfig, settings["fit"])
    linear = LinearPath(_dataclass(LinearConfig, settings["linear"]), device=device)
    linear.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("linear.")})
    ridge = LinearPath(replace(linear.config, own=0), device=device)
    ridge.weight.copy_(tensors.get("ridge.weight", linear.weight))
    network = None
    if settings["network"] is not None:
        values = {**settings["network"], "slstm": from_dict(SLSTMOptions, settings["network"]["slstm"])}
        shape = from_dict(ForecasterConfig, values)
        network = DESIGNS[shape.design](shape, linear.config, device=device)
        network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
        network.eval()
    series = dict(zip(settings["known"], map(tuple, tensors["series"].tolist())))
    statistics = {k: tuple(tensors[f"statistics.{k}"].numpy()) for k in ("futr", "hist", "static")} | {
        "series": series,
        "year": settings["year"],
    }
    spreads = {k[7:]: v.to(device) for k, v in tensors.items() if k.startswith("spread.")}
    if "ridge" not in spreads:
        spreads |= {k.replace("linear", "ridge"): v for k, v in spreads.items() if k.startswith("linear")}
    look = settings.get("ridge", linear.config.lookback)
    made = [fit, settings["season"], statistics, linear, ridge, look, network, settings["weights"], spreads]
    engine = Engine(*made, tensors["factors"].to(device), settings["scores"], settings["notes"])
    if settings.get("bent"):
        engine.bend, engine.bent = settings["bent"][0], LinearPath(LinearConfig(**settings["bent"][1]), device=device)
        engine.bent.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("bent.")})
    engine.drift = _unpack_drift(settings, tensors, engine, device)
    others, known = settings.get("floors", (None, []))
    engine.floors = Floors(dict(map(tuple, known)), others)
    panel = _unpack_panel(settings, tensors)
    columns = panel.columns
    names = (columns.futr, columns.hist, columns.static, columns.id, columns.time, columns.target)
    model = kind(fit.horizon, settings["freq"], None, settings["level"], *names, settings["season"], fit, device)
    model.engine, model.panel = engine, panel
    return model


def _unpack_panel(settings: dict, tensors: dict) -> Panel:
    import pandas as pd

    columns = _dataclass(Columns, settings["columns"])
    numeric = isinstance(settings["freq"], int)
    firsts = [int(t) if numeric else pd.Timestamp(t) for t in settings["firsts"]]
    offsets = np.concatenate([[0], np.cumsum(tensors["history.lengths"].numpy())])
    arrays = {k: tensors[f"history.{k}"].numpy() for k in ("y", "futr", "hist", "static")}
    ahead = tensors["history.ahead"].numpy() if "history.ahead" in tensors else None
    return Panel(
        settings["ids"], arrays["y"], offsets, firsts, settings["freq"], arrays["futr"], arrays["hist"], arrays["static"],
        columns, settings["zone"], settings["levels"], [], settings["wide"],
        settings.get("wall"), settings.get("dayfirst"), ahead,
    )  # fmt: skip


def _dataclass(kind, values: dict):
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {key!r}{nearest(key, known)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
