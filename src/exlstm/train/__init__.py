"""Training of anything that has .loss(batch)."""
