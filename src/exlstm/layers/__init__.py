"""Layers: one file a mixer, forward(x, state) -> (y, state)."""
