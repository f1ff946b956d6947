"""One attribute of a composite model: the tensors under a dotted path, under their own names.

A training wrapper holds several models (``policy`` and ``value_model``, ``pretrained_model`` and
``v_head``); each is a model in its own right once the path in front of its names is gone. Tensors that
it shares with another attribute come along. Knows names; knows no format and no config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckpt_tools.errors import AttributeNotFound
from ckpt_tools.tensors.catalogue import Catalogue


def take_attribute(catalogue: Catalogue, path: str) -> Catalogue:
    """The part of ``catalogue`` under ``path``, the path taken off the names.

    Args:
        catalogue: the whole state.
        path: dotted path of the attribute (``policy``, ``module.policy.model``).

    Raises:
        AttributeNotFound: nothing is called so; the error lists what there is.
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
            # Its tensor is listed under a name of another attribute: here it is listed under this one.
            tensors[name] = catalogue[kept]
            homes[kept] = name
    if not tensors:
        raise AttributeNotFound(
            f"the checkpoint has no attribute {path!r}", choices=attributes(catalogue)
        )
    return Catalogue(tensors, ties)


def attributes(catalogue: Mapping[str, object]) -> dict[str, int]:
    """Attributes that hold more than one tensor, with the number of tensors, outermost first.

    Descends where there is only one, so that the names under a wrapper are seen.
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
