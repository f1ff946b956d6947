"""Owns where a tensor is in its model, read off its name: its kind and the number of its layer.

``model.layers.3.mlp.experts.7.up_proj.weight`` is of layer 3 and of the kind
``model.layers.*.mlp.experts.*.up_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Longer numbers are not those of layers.
_DIGITS = 6


class Place(NamedTuple):
    """The place of a tensor: its kind, and its layer if the name has a number."""

    kind: str
    layer: int | None


def place_of(name: str) -> Place:
    """The place of a tensor by its name. The first number is that of the layer."""
    layer: int | None = None
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and len(part) <= _DIGITS:
            layer = int(part) if layer is None else layer
            parts[index] = "*"
    return Place(".".join(parts), layer)


class Bins:
    """Neighbouring layers that share a column of a picture, so that a picture stays bounded.

    Args:
        layers: every layer.
        limit: the most columns.
    """

    def __init__(self, layers: Iterable[int], limit: int) -> None:
        found = sorted(set(layers))
        size = -(-len(found) // limit) or 1
        self._groups = [found[at : at + size] for at in range(0, len(found), size)]
        self._column = {layer: at for at, group in enumerate(self._groups) for layer in group}

    def __len__(self) -> int:
        return len(self._groups)

    def column(self, layer: int) -> int:
        """The column of a layer."""
        return self._column[layer]

    def label(self, column: int) -> str:
        """The layers of a column."""
        first, last = self._groups[column][0], self._groups[column][-1]
        return f"layer {first}" if first == last else f"layers {first} to {last}"

    @property
    def ends(self) -> tuple[str, str]:
        """The labels of the first and the last column."""
        return self.label(0), self.label(len(self) - 1)
