"""A model for neuralforecast: an xLSTM reads the window, a linear map gives all steps of the horizon, for any of its losses.

    pip install neuralforecast
    python examples/forecast_neuralforecast.py

The series are made on the spot: days with a weekly wave, a trend and noise.
"""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.common._base_model import BaseModel
from neuralforecast.losses.pytorch import MAE, MQLoss
from torch import nn

import exlstm


class XLSTM(BaseModel):
    """Arguments as in neuralforecast's models; those of the network are hidden_size, n_layers and blocks."""

    EXOGENOUS_FUTR = EXOGENOUS_HIST = EXOGENOUS_STAT = False
    MULTIVARIATE = RECURRENT = False

    def __init__(
        self,
        h: int,
        input_size: int,
        hidden_size: int = 64,
        n_layers: int = 2,
        blocks: tuple[str, ...] = ("slstm",),
        loss=None,
        max_steps: int = 500,
        learning_rate: float = 3e-3,
        batch_size: int = 32,
        scaler_type: str = "robust",
        random_seed: int = 1,
        **others,
    ):
        settings = {
            "valid_loss": None,
            "val_check_steps": 100,
            "windows_batch_size": 128,
            "inference_windows_batch_size": 1024,
        }
        settings |= {"valid_batch_size": None, "num_lr_decays": -1, "early_stop_patience_steps": -1, "step_size": 1}
        settings |= {"start_padding_enabled": False, "alias": None, **others}
        super().__init__(
            h=h,
            input_size=input_size,
            loss=MAE() if loss is None else loss,
            max_steps=max_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            scaler_type=scaler_type,
            random_seed=random_seed,
            **settings,
        )
        self.rnn = exlstm.xLSTM(1, hidden_size, n_layers, batch_first=True, blocks=blocks)
        self.head = nn.Linear(hidden_size, h * self.loss.outputsize_multiplier)

    def forward(self, windows_batch):
        _, (last, _) = self.rnn(windows_batch["insample_y"])  # (B, window, 1)
        return self.head(last[-1]).unflatten(-1, (self.h, -1))


def series(count: int, days: int, seed: int = 0) -> pd.DataFrame:
    draw, time = np.random.default_rng(seed), np.arange(days)
    frames = []
    for i in range(count):
        wave = np.sin(2 * np.pi * (time + draw.integers(7)) / 7)
        y = 10 + 3 * wave + 0.01 * draw.normal() * time + 0.3 * draw.normal(size=days)
        frames.append(
            pd.DataFrame({"unique_id": f"series {i}", "ds": pd.date_range("2024-01-01", periods=days), "y": y})
        )
    return pd.concat(frames, ignore_index=True)


def main(max_steps: int = 300, count: int = 20) -> float:
    """Trains, and returns the mean absolute error of the last 14 days over that of "as yesterday"."""
    known, horizon = series(count, 300), 14
    past = known.groupby("unique_id").head(300 - horizon)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    models = [XLSTM(horizon, 28, max_steps=max_steps, loss=MQLoss(level=[80]), accelerator="cpu", **quiet)]
    forecaster = NeuralForecast(models=models, freq="D")
    forecaster.fit(past)
    found = forecaster.predict().merge(known, on=["unique_id", "ds"])
    last = past.groupby("unique_id")["y"].last()
    error = (found["XLSTM-median"] - found["y"]).abs().mean()
    naive = (found["unique_id"].map(last) - found["y"]).abs().mean()
    inside = ((found["y"] >= found["XLSTM-lo-80"]) & (found["y"] <= found["XLSTM-hi-80"])).mean()
    print(f"mean absolute error {error:.3f}, as yesterday {naive:.3f}; {inside:.0%} lie in the interval of 80 %")
    print(f"error over naive {error / naive:.3f}")
    return float(error / naive)


if __name__ == "__main__":
    main()
