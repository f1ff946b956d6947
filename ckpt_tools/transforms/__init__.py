"""Transforms: one pure function a module, from catalogue to catalogue. No I/O, no formats, no order.

Which transform runs when is decided in :mod:`ckpt_tools.conversion.api` alone.
"""
