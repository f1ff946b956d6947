"""Owns the writing of an output: from a plan to a proven, published directory."""
