"""Owns the pure functions from catalogue to catalogue, and the JSON that records them.

The functions do no I/O. :mod:`ckpt_tools.model` and :mod:`ckpt_tools.conversion` decide which of them run.
"""
