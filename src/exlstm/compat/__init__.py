"""NX-AI's names on our modules: `from exlstm.compat import ...` in the place of `from xlstm import ...` (version 2.0.6).

Configurations take every field of theirs. What says how something is computed (backends, kernels, layouts, dtypes of kernels,
context_length, batch_size) or how it starts (bias_init, recurrent_weight_init) is ours to choose and is passed over; a name
that they do not know either gives one warning. What would be another network is refused: see exlstm/compat/config.py.
"""

from exlstm.compat.config import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from exlstm.compat.layers import GatedFeedForward, mLSTMBlock, mLSTMLayer, sLSTMBlock, sLSTMLayer
from exlstm.compat.models import xLSTMBlockStack, xLSTMLarge, xLSTMLMModel

__all__ = [
    "FeedForwardConfig",
    "GatedFeedForward",
    "mLSTMBlock",
    "mLSTMBlockConfig",
    "mLSTMLayer",
    "mLSTMLayerConfig",
    "sLSTMBlock",
    "sLSTMBlockConfig",
    "sLSTMLayer",
    "sLSTMLayerConfig",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
    "xLSTMLarge",
    "xLSTMLargeConfig",
]
