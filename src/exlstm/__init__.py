"""Extended LSTM (xLSTM, arXiv 2405.04517): exact, fast sLSTM and mLSTM, and the models built on them."""

from importlib import import_module

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use, so that the command line and configs never wait for torch.
_HOMES = {
    "mLSTM": "layers.mlstm",
    "mLSTMUp": "layers.mlstm_up",
    "sLSTM": "layers.slstm",
    "xLSTM": "models.rnn",
    "Stack": "models.stack",
    "StackConfig": "models.config",
    "LanguageModel": "models.language",
    "LanguageConfig": "models.config",
    "Engine": "models.engine",
    "Request": "models.sequence",
    "Forecaster": "forecast.forecaster",
    "BatchForecaster": "forecast.batch",
    "backend": "ops.backend",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'exlstm' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    value = getattr(import_module(f"exlstm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
