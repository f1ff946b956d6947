"""Owns the selection of one attribute of a composite model: the tensors under a dotted path.

A training wrapper can hold several models (``policy`` and ``value_model``, ``pretrained_model`` and
``v_head``). Each is a complete model without the path in front of its names. Tensors that an attribute
shares with another are included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckpt_tools.errors import AttributeNotFound
from ckpt_tools.tensors.catalogue import Catalogue


def take_attribute(catalogue: Catalogue, path: str) -> Catalogue:
    """The part of ``catalogue`` under ``path``, without the path in the names.

    Args:
        catalogue: the whole state.
        path: dotted path of the attribute (``policy``, ``module.policy.model``).

    Raises:
        AttributeNotFound: no attribute has this name. The error lists the attributes.
    """
    prefix = path.strip(".") + "."
    inside = {name: name.removeprefix(prefix) for name in catalogue if name.startswith(prefix)}
    tensors = {inside[name]: catalogue[name] for name in inside}
    ties: dict[str, str] = {}
    homes: dict[str, str] = dict(inside)
    for alias, kept in catalogue.ties.items():
        if not alias.startswith(prefix):
            continue
        name = alias.removeprefix(prefix)
        if kept in homes:
            ties[name] = homes[kept]
        else:
            # The catalogue lists the tensor under a name of another attribute.
            tensors[name] = catalogue[kept]
            homes[kept] = name
    if not tensors:
        raise AttributeNotFound(
            f"the checkpoint has no attribute {path!r}", choices=attributes(catalogue)
        )
    return Catalogue(tensors, ties)


def attributes(catalogue: Mapping[str, object]) -> dict[str, int]:
    """The outermost attributes, with the number of tensors of each.

    A single attribute is entered, so that the names below a wrapper are listed.
    """
    prefix = ""
    while True:
        counts = _counts(catalogue, prefix)
        if len(counts) != 1:
            return {prefix + name: count for name, count in counts.items()}
        (only,) = counts
        if not _counts(catalogue, f"{prefix}{only}."):
            return {prefix + only: counts[only]}
        prefix += f"{only}."


def _counts(names: Iterable[str], prefix: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        if name.startswith(prefix):
            head = name.removeprefix(prefix).split(".")[0]
            counts[head] = counts.get(head, 0) + 1
    return counts
