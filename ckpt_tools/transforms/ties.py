"""Owns tied names: which name is written, and whether two names are still tied.

A model defines which names share one tensor. A state shows which names it holds, and which share their bytes.
If both agree, only the name that ``save_pretrained`` keeps is written. If a state holds different values
under tied names, both are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt_tools.tensors.catalogue import Catalogue, Tensor


@dataclass(frozen=True)
class Settled:
    """A catalogue whose ties are all ties of the model.

    Attributes:
        catalogue: the tensors. Its ties are left out of the output.
        untied: names that the model ties and that hold different values.
        duplicated: names that share their bytes in the state but are not tied in the model. Each is
            written.
    """

    catalogue: Catalogue
    untied: tuple[str, ...]
    duplicated: tuple[str, ...]


def settle_ties(
    catalogue: Catalogue,
    model_ties: Mapping[str, str],
    model_names: Mapping[str, object],
    equal: Callable[[Tensor, Tensor], bool],
) -> Settled:
    """Bring the ties of a state in line with those of its model.

    Args:
        catalogue: the state.
        model_ties: names that ``save_pretrained`` leaves out, each with the name that it keeps.
        model_names: all names of the model.
        equal: whether two tensors hold the same values. It is called only if that is not known.
    """
    tensors = {name: catalogue[name] for name in catalogue}
    ties = dict(catalogue.ties)
    untied = []
    for alias, kept in model_ties.items():
        if ties.get(kept) == alias:
            # The state lists the tensor under the name that save_pretrained leaves out.
            tensors = {kept if n == alias else n: t for n, t in tensors.items()}
            ties = {n: kept if k == alias else k for n, k in ties.items() if n != kept}
            ties[alias] = kept
        elif alias in tensors and kept not in tensors and kept not in ties:
            tensors = {kept if n == alias else n: t for n, t in tensors.items()}
            ties = {n: kept if k == alias else k for n, k in ties.items()}
            ties[alias] = kept
        elif alias in tensors and kept in tensors:
            if tensors[alias].shape == tensors[kept].shape and equal(tensors[alias], tensors[kept]):
                del tensors[alias]
                ties = {n: kept if k == alias else k for n, k in ties.items()}
                ties[alias] = kept
            else:
                untied.append(alias)
    duplicated = [name for name in ties if name in model_names and name not in model_ties]
    for name in duplicated:
        tensors[name] = tensors[ties.pop(name)]
    return Settled(Catalogue(tensors, ties), tuple(untied), tuple(duplicated))
