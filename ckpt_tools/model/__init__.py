"""The state of one model: which copy, which adapter, what is merged, how it fits the config."""
