"""The sLSTM operator: scalar memory with exponential gates and memory mixing (xLSTM, arXiv 2405.04517, equations 8 to 18)."""

from exlstm.ops.slstm.api import IMPLEMENTATIONS, SLSTMState, slstm

__all__ = ["IMPLEMENTATIONS", "SLSTMState", "slstm"]
