"""Data: what models learn from; a batch is a pure function of (seed, step)."""
