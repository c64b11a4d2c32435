"""Forecasting: from frames to calibrated probabilistic forecasts, the simple baselines always beside the network."""
