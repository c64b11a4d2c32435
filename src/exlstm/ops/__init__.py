"""The operators: the two recurrences of xLSTM and their neighbours, each with explicit state."""
