"""Renames the tensors of a catalogue and keeps their order and ties."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tools.tensors.catalogue import Catalogue


def rename(catalogue: Catalogue, names: Mapping[str, str]) -> Catalogue:
    """The catalogue with every name, tied ones included, replaced by ``names[name]``."""
    tensors = {names[name]: catalogue[name] for name in catalogue}
    ties = {names[alias]: names[kept] for alias, kept in catalogue.ties.items()}
    return Catalogue(tensors, ties)
