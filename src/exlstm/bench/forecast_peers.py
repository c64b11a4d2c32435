"""A peer's forecasts for one task: run by `exlstm bench forecast` in the peer's own environment, which has no exlstm.

python forecast_peers.py FOLDER reads data.csv and settings.json there and writes out.npz: quantiles (W, H, Q), series, cuts,
and the names of the covariates that the model took.
"""

import json
import sys
from pathlib import Path

NEURAL = {"patchtst": "PatchTST", "nhits": "NHITS", "dlinear": "DLinear", "xlstm": "xLSTM", "lstm": "LSTM"}
# Those that count a window in units of its own only when told to.
PLAIN = ("nhits", "dlinear")
# The library's 1e-4 is for 5,000 steps: after 1,000 the validation loss of us_births is half above that of 1e-3.
RATES = {"dlinear": {"learning_rate": 1e-3}}
# A look-back of some horizons and seasons, as the libraries' own examples take it.
LOOKBACK_HORIZONS, LOOKBACK_SEASONS, LOOKBACK_MOST = 3, 2, 720


def main(folder: Path):
    """Reads, fits, forecasts every test window, writes."""
    import numpy as np
    import pandas as pd

    settings = json.loads((folder / "settings.json").read_text())
    data = pd.read_csv(folder / "data.csv", dtype={"unique_id": str})
    # Whole numbers as times: what the calendar says is not asked of anybody.
    data["ds"] = data.groupby("unique_id").cumcount()
    known = [c for c in data.columns if c not in ("unique_id", "ds")]
    data[known] = data.groupby("unique_id")[known].ffill()
    name = settings["model"]
    if name not in (*NEURAL, "autotheta"):
        raise SystemExit(f"unknown peer {name!r}; known: {', '.join(NEURAL)}, autotheta")
    made, covariates = _statistical(data, settings) if name == "autotheta" else _neural(data, settings)
    made = made.sort_values(["unique_id", "cutoff", "ds"], kind="stable")
    h, columns = settings["h"], [c for c in made.columns if c not in ("unique_id", "ds", "cutoff", "y")]
    quantiles = np.stack([made[_column(columns, level)].to_numpy() for level in settings["levels"]], -1)
    # Networks that have no guard against it cross their quantiles; sorted they are better.
    quantiles, first = np.sort(quantiles, -1), made.iloc[::h]
    values = {"quantiles": quantiles.reshape(-1, h, quantiles.shape[-1]).astype("float32")}
    values |= {"series": first["unique_id"].to_numpy(str), "cuts": first["cutoff"].to_numpy() + 1}
    np.savez(folder / "out.npz", covariates=np.array(covariates, str), **values)


def _column(columns: list[str], level: float) -> str:
    """The column of a quantile: the median, or the end of an interval."""
    if level == 0.5:
        return next((c for c in columns if c.endswith("-median")), columns[0])
    side, percent = ("lo", 1 - 2 * level) if level < 0.5 else ("hi", 2 * level - 1)
    ends = {c: float(c.rsplit("-", 1)[1]) for c in columns if f"-{side}-" in c}
    return min(ends, key=lambda c: abs(ends[c] - 100 * percent))


def _percents(settings: dict) -> list[float]:
    return sorted({round(100 * (2 * level - 1), 4) for level in settings["levels"] if level > 0.5})


def _statistical(data, settings: dict):
    from statsforecast import StatsForecast
    from statsforecast.models import AutoTheta

    model = StatsForecast([AutoTheta(season_length=settings["season"])], freq=1)
    step = {"h": settings["h"], "n_windows": settings["windows"], "step_size": settings["step"]}
    data = data[["unique_id", "ds", "y"]]
    return model.cross_validation(df=data, level=_percents(settings), **step).reset_index(drop=True), []


def _neural(data, settings: dict):
    import neuralforecast.models as models
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss

    h = settings["h"]
    lookback = min(LOOKBACK_MOST, max(LOOKBACK_HORIZONS * h, LOOKBACK_SEASONS * settings["season"]))
    more = {
        "start_padding_enabled": True,
        "early_stop_patience_steps": 5,
        "val_check_steps": 50,
        "enable_progress_bar": False,
        **RATES.get(settings["model"], {}),
    }
    # Series of an archive come in units of their own; "robust" is what the library's examples take.
    if settings["raw"] and settings["model"] in PLAIN:
        more["scaler_type"] = "robust"
    loss = MQLoss(level=_percents(settings))
    kind = getattr(models, NEURAL[settings["model"]])
    # Not every model has a place for covariates.
    takes = {"futr": kind.EXOGENOUS_FUTR, "hist": kind.EXOGENOUS_HIST}
    covariates = {f"{role}_exog_list": settings[role] for role, able in takes.items() if able and settings[role]}
    trained = {
        "max_steps": settings["steps"],
        "random_seed": settings["seed"] + 1,
        "logger": False,
        "enable_checkpointing": False,
    }
    model = NeuralForecast([kind(h=h, input_size=lookback, loss=loss, **covariates, **trained, **more)], freq=1)
    tested = settings["h"] + (settings["windows"] - 1) * settings["step"]
    parts = {"val_size": settings["val_size"], "test_size": tested, "step_size": settings["step"], "n_windows": None}
    taken = [name for names in covariates.values() for name in names]
    made = model.cross_validation(df=data[["unique_id", "ds", "y", *taken]], **parts)
    return made.reset_index(drop=True), taken


if __name__ == "__main__":
    main(Path(sys.argv[1]))
