"""Owns what a tensor is, which bytes hold it, and reading them."""
