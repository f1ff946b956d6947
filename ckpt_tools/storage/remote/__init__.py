"""Owns the files of object stores, web servers and the Hub as places of :mod:`ckpt_tools.storage.places`.

Nothing else in the package knows which store it is. The modules are imported when an address is named.
"""
