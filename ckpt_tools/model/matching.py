"""Pairs the tensors of two checkpoints that different programs wrote.

Owns the ways in which the same tensor is named and stored: wrappers around a training model, second names of
tied tensors, the adapter name that PEFT leaves out of its files, the hub layout of a finished directory,
masters beside 16-bit weights. Tensor data is read only to settle ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt_tools.errors import CkptError
from ckpt_tools.hub import AssetOptions, find_config
from ckpt_tools.model.fit import fit_to_model
from ckpt_tools.model.state import main_dtype, model_state
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import ADAPTER, FINISHED, Checkpoint, Copy
from ckpt_tools.tensors.derived import cast
from ckpt_tools.transforms.lora import PREFIX, adapted_names

Weights = Literal["auto", "master", "model"]
_DEFAULT = "default"


@dataclass(frozen=True)
class Matched:
    """Two catalogues, name by name.

    Attributes:
        pairs: for each name on both sides, the two tensors. A tied tensor has the name under which one
            side lists it.
        only_first: names of tensors that the second catalogue lacks.
        only_second: names of tensors that the first lacks.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def odd(self) -> int:
        """Number of tensors without a counterpart of the same shape."""
        misshaped = sum(a.shape != b.shape for a, b in self.pairs.values())
        return len(self.only_first) + len(self.only_second) + misshaped


def match(first: Catalogue, second: Catalogue) -> Matched:
    """Pair the tensors of two catalogues by name.

    A tensor of one side is on the other side if any of its names is. A side that leaves out a second name
    lacks nothing.
    """
    met: dict[tuple[str, str], str] = {}
    only_first: list[str] = []
    only_second: list[str] = []
    for name in dict.fromkeys((*first, *second)):
        in_first = name in first
        side, other = (first, second) if in_first else (second, first)
        known = next((each for each in _names(side, name) if each in other), None)
        if known is None:
            (only_first if in_first else only_second).append(name)
        else:
            listed = (first.ties.get(known, known), second.ties.get(known, known))
            met.setdefault(listed, known)
    pairs = {name: (first[name], second[name]) for name in met.values()}
    return Matched(pairs, tuple(only_first), tuple(only_second))


def _names(catalogue: Catalogue, name: str) -> Iterator[str]:
    """All names of a tensor, this one first."""
    yield name
    yield from (alias for alias, kept in catalogue.ties.items() if kept == name)


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        label: its name in messages.
        copies: its tensors, wrappers stripped; the same names in each, the preferred copy first.
        directory: where it lies.
        kind: a finished model in the hub's layout, an adapter as PEFT writes it, or neither.
        notes: what was done to its names.
    """

    label: str
    copies: tuple[Catalogue, ...]
    directory: Path
    kind: Literal["model", "adapter", "state"]
    notes: tuple[str, ...] = ()

    def renamed(self, rename: Callable[[Catalogue], Catalogue | None], note: str) -> Side:
        """The side with each copy renamed; unchanged if one cannot be renamed."""
        copies = tuple(new for copy in self.copies if (new := rename(copy)) is not None)
        if len(copies) < len(self.copies):
            return self
        return replace(self, copies=copies, notes=(*self.notes, note))


def side_of(checkpoint: Checkpoint, label: str, weights: Weights = "auto") -> Side:
    """A checkpoint as one side of a comparison.

    Args:
        checkpoint: the checkpoint.
        label: its name in messages.
        weights: ``master`` for the optimizer's copy where there is one, ``model`` for the weights that it
            trains with, ``auto`` for both to choose from.
    """
    # Where the masters are lost, the weights are what is left to choose from.
    copy: Copy = "master" if checkpoint.lost is None or weights == "master" else "model"
    state = model_state(checkpoint, copy)
    held = checkpoint.catalogue(copy)
    weight_of = {id(held[name]): weight for name, weight in checkpoint.weights.items()}
    trained: dict[str, Tensor] = {}
    for name, tensor in state.catalogue.items():
        weight = weight_of[id(tensor)]
        # An engine makes its weights from its masters: a rounded master is the weight, bit for bit.
        trained[name] = weight.model or cast(tensor, weight.dtype)
    masters, models = state.catalogue, Catalogue(trained, state.catalogue.ties)
    copies = {"auto": (masters, models), "master": (masters,), "model": (models,)}[weights]
    location = checkpoint.location
    kind: Literal["model", "adapter", "state"] = "state"
    if location.format in FINISHED:
        kind = "model"
    elif location.format == ADAPTER:
        kind = "adapter"
    notes = tuple(f"{label}: {note}" for note in state.notes)
    return Side(label, copies, location.directory, kind, notes)


def alike(a: Side, b: Side) -> tuple[Side, Side]:
    """The two sides under the same names, as far as possible.

    Where names or shapes differ and one side is finished, the other is brought into its form: the layout
    of the model of its config, or PEFT's names for the adapter.
    """
    before = match(a.copies[0], b.copies[0])
    if not before.odd:
        return a, b
    new_a, new_b = _in_form_of(a, b), _in_form_of(b, a)
    after = match(new_a.copies[0], new_b.copies[0])
    return (new_a, new_b) if after.odd < before.odd else (a, b)


def _in_form_of(side: Side, other: Side) -> Side:
    if side.kind != "state":
        return side
    if other.kind == "model":
        return side.renamed(
            lambda copy: in_hub_layout(copy, other.directory),
            f"{side.label}: brought into the hub layout by the config of {other.label}",
        )
    if other.kind == "adapter":
        return side.renamed(
            lambda copy: as_adapter(copy, other.copies[0], other.directory.name),
            f"{side.label}: only the adapter is compared, because {other.label} is an adapter",
        )
    return side


def in_hub_layout(catalogue: Catalogue, directory: Path) -> Catalogue | None:
    """The tensors of a state as the model of a finished directory saves them.

    Args:
        catalogue: the state, wrappers stripped.
        directory: a directory with the model's ``config.json``.

    Returns:
        The tensors, or None if the config describes another model or none.
    """
    try:
        config = find_config(AssetOptions(config=directory))
        return fit_to_model(catalogue, config, None, main_dtype(catalogue)).catalogue
    except CkptError:
        return None


def as_adapter(catalogue: Catalogue, files: Catalogue, label: str) -> Catalogue | None:
    """The tensors of a training state that an adapter directory may hold, under PEFT's names.

    Args:
        catalogue: the state, wrappers stripped.
        files: the tensors of the directory; tensors of the base that it holds are taken from the state too.
        label: name of the directory; PEFT names it after the adapter if there are several.

    Returns:
        The tensors, or None if the state holds no adapter, or several under other names.
    """
    try:
        names = adapted_names([*catalogue, *catalogue.ties])
    except CkptError:
        return None
    candidates = [label, _DEFAULT, *(names.adapters if len(names.adapters) == 1 else ())]
    adapter = next((name for name in candidates if name in names.adapters), None)
    if adapter is None:
        return None
    saved = {part.saved: part.name for part in names.adapters[adapter]}
    base = {PREFIX + inner: name for name, inner in names.base.items() if PREFIX + inner in files}
    return Catalogue({new: catalogue[old] for new, old in {**base, **saved}.items()})
