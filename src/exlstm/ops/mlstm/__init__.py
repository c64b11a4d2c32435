"""The mLSTM operator: matrix memory with exponential gates (xLSTM, arXiv 2405.04517, equations 19 to 27)."""

from exlstm.ops.mlstm.api import IMPLEMENTATIONS, MLSTMState, mlstm

__all__ = ["IMPLEMENTATIONS", "MLSTMState", "mlstm"]
