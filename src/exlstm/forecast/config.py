"""How a forecaster is fitted: frozen settings, without torch so that the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress

from exlstm.models.config import OPTIONS, nearest

MEMBERS = ("naive", "theta", "linear", "arcsinh", "climatology", "network")
CHOICES = {"metric": ("mae", "mse"), "variates": ("none", "attention", "slstm"), "design": ("patches", "xlstmtime")}
# Names of the columns of the members, and of the single ridge that stands beside them, as NeuralForecast names its models.
TITLES = {
    "naive": "SeasonalNaive",
    "theta": "Theta",
    "ridge": "Linear",
    "linear": "LinearPath",
    "arcsinh": "Arcsinh",
    "climatology": "Climatology",
    "network": "Network",
}
MODEL = "xLSTM"
# Steps of a look-back at most: the sums over its windows hold their square.
LONGEST = 2**14


@dataclass(frozen=True)
class FitConfig:
    """What `Forecaster.fit` does; everything left at its default is chosen by the procedure on the validation part."""

    horizon: Annotated[int, Suppress] = 1
    """steps forecast at once"""
    lookback: int = 0
    """steps of the past that are seen; 0: chosen on validation"""
    max_lookback: int = 720
    """longest look-back that is tried"""
    members: tuple[str, ...] = MEMBERS
    """what may enter the forecast: naive, theta, linear, arcsinh, climatology, network"""
    metric: Literal["mae", "mse"] = "mae"
    """what the choices on validation are made by: absolute errors and quantiles over the error of the naive forecast in
    the past, or squared errors in deviations of the series"""
    val_size: int = 0
    """steps at the end of every series that are the validation part; 0: 15 %, at least the horizon"""
    refit: bool = True
    """learn from the validation part too, once everything is chosen"""
    floors: bool = True
    """forecast nothing below zero where no value is negative, nor below the least value of a series that often stands there"""
    blocks: tuple[str, ...] = ("slstm",)
    """kinds of block of the network, repeated in turn"""
    d_model: int = 64
    """width of the network"""
    n_layers: int = 2
    """blocks of the network"""
    n_heads: int = 4
    """heads of every mixer"""
    dropout: float = 0.1
    """dropout in training"""
    variates: str = "none"
    """how series of one panel see each other: none, attention, or slstm"""
    design: str = "patches"
    """patches, or xlstmtime: the network of that paper, without covariates and without a linear path in closed form"""
    steps: int = 0
    """updates of the network at most; 0: thirty times through the windows, from 200 to max_steps"""
    max_steps: int = 2000
    """most updates where steps is 0"""
    batch_size: int = 128
    """windows an update"""
    lr: float = 1e-3
    """highest learning rate"""
    weight_decay: float = 0.01
    """decay of the matrices"""
    patience: int = 4
    """evaluations without a better validation loss after which training ends; there are twenty in a whole training"""
    minutes: float = 0.0
    """wall-clock budget of the training; 0: none"""
    seed: int = 0
    """seed of weights and batches"""

    def __post_init__(self):
        for name in ("members", "blocks"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "members", tuple(dict.fromkeys(self.members)))
        least = {
            "horizon": 1,
            "max_lookback": 4,
            "d_model": 1,
            "n_layers": 1,
            "n_heads": 1,
            "batch_size": 1,
            "max_steps": 1,
            "patience": 1,
        }
        for name in (*least, "lookback", "val_size", "steps", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 0):
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least {least.get(name, 0)}")
        for name in ("lookback", "max_lookback"):
            if getattr(self, name) > LONGEST:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at most {LONGEST}")
        for what, names, known in (("member", self.members, MEMBERS), ("block", self.blocks, OPTIONS)):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"unknown {what} {wrong[0]!r}{nearest(wrong[0], known)}")
        if not self.members:
            raise ValueError(f"members is empty; it names at least one of {', '.join(MEMBERS)}")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}{nearest(value, known)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, wanted 0 ≤ dropout < 1")
        for name in ("lr", "minutes", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (value > 0 if name == "lr" else value >= 0):
                raise ValueError(f"{name} is {value!r}, wanted a number {'above' if name == 'lr' else 'of at least'} 0")
