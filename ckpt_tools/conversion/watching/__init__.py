"""A training that runs: each of its finished checkpoints is converted once, in order."""
