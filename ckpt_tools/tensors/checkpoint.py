"""Owns what every reader returns: the tensors of a checkpoint, the copies of each tensor, and the facts.

A training framework may keep a parameter twice: the *master* that the optimizer updates (usually fp32)
and the *model* copy in training dtype. The two are separate here, so that a caller can choose one, and can
compare both. This module does no I/O.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout, UsageError
from ckpt_tools.storage.stamps import Stamp
from ckpt_tools.tensors.catalogue import Catalogue, Shape, Stored, Tensor
from ckpt_tools.tensors.dtypes import DType

Kind = Literal["parameter", "frozen", "buffer"]
Copy = Literal["master", "model"]

# Names are split at their dots, and a part may be looked at with all before it. Models have some ten parts.
_MOST_PARTS = 256
_NO_NAME = "Save the state dict with the names of model.state_dict()."
# `Location.format` of a model in training, which has no directory.
LIVE = "live"
# `Location.format` of an adapter that PEFT saved.
ADAPTER = "peft"
# Formats that training state may be exported to, into the same directory.
FINISHED = ("huggingface",)
# Formats that any file may be of: what another reader finds there comes first.
LAST = ("torch",)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model, with its copies in the checkpoint.

    Attributes:
        kind: trained parameter, frozen parameter or persistent buffer.
        shape: sizes.
        dtype: its dtype in the model during training.
        master: the optimizer's copy, or None.
        model: the copy in training dtype, or None.
    """

    kind: Kind
    shape: Shape
    dtype: DType
    master: Stored | None = None
    model: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Replica:
    """Two tensors of different ranks that must be equal, because both are of the same elements.

    Attributes:
        name: the tensor that the elements belong to.
        copy: of which of its copies.
        first: the elements that are taken.
        other: the same elements of another rank.
    """

    name: str
    copy: Copy
    first: Stored
    other: Stored


@dataclass(frozen=True, slots=True)
class Location:
    """A checkpoint that was found under a path.

    Attributes:
        format: name of the reader that claims it.
        directory: the directory that holds its files.
        name: its name among others in the same directory: a tag, a folder.
        near: directories in which its config and tokenizer may lie, nearest first.
        remarks: remarks about its directory, for the report.
        part: the reader's name of one of several models in the directory.
        model_shapes: gives the shapes of the model's tensors, for files that do not state how their parts
            are put together. None if no model is known.
    """

    format: str
    directory: Path
    name: str
    near: tuple[Path, ...]
    remarks: tuple[str, ...] = ()
    part: str | None = None
    model_shapes: Callable[[], Mapping[str, Shape] | None] | None = field(
        default=None, compare=False, repr=False
    )


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint, read from metadata alone: a read-only map from tensor name to lazy tensor.

    The mapping has every name, including second names of tied tensors. It gives the master of a parameter if
    there is one; ``checkpoint[name].load()`` reads it.

    Attributes:
        location: where it lies.
        title: the format, for messages: ``DeepSpeed ZeRO-3``.
        weights: every tensor, in the model's order.
        ties: for each second name of a tensor, its name in ``weights``.
        files: the files it was read from, with their sizes in bytes.
        step: number of optimizer steps, if known.
        world_size: number of ranks that wrote it, if known.
        framework: the framework that wrote it, with its version if known.
        details: further facts of the format, such as ``stage``.
        remarks: oddities that do not prevent reading.
        doubts: reasons to compare all masters with the model copy in full.
        lost: why the masters cannot be read, although the run kept some.
        shapeless: tensors of which the files record the number of elements alone; their shape here is flat.
        unlisted: tensors in files beside it that its index does not name, each with its file.
        replicas: pairs of tensors that must be equal.
        stamps: the stamps of the files when they were read.

    Raises:
        DamagedCheckpoint: a name is no text that a file can hold.
    """

    location: Location
    title: str
    weights: Mapping[str, Weight]
    ties: Mapping[str, str]
    files: Mapping[Path, int]
    step: int | None = None
    world_size: int | None = None
    framework: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    lost: CkptError | None = None
    shapeless: frozenset[str] = frozenset()
    unlisted: Mapping[str, Path] = field(default_factory=dict)
    replicas: Sequence[Replica] = ()
    stamps: dict[Path, Stamp | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.weights, *self.ties):
            _check_name(name, self.location.directory)
        if not _is_count(self.step):
            object.__setattr__(self, "step", None)
        if not _is_count(self.world_size):
            object.__setattr__(self, "world_size", None)

    def catalogue(self, copy: Copy = "master") -> Catalogue:
        """The tensors, from one of the copies.

        Args:
            copy: ``master`` takes the optimizer's copy if there is one, else the model's; ``model`` takes
                the model's copy of every tensor.

        Raises:
            UsageError: ``copy`` is ``model``, and the checkpoint does not keep that copy of every tensor.
            CkptError: ``copy`` is ``master``, and the masters are lost.
        """
        if copy == "master" and self.lost is not None:
            raise self.lost
        if copy == "model":
            lacking = [name for name, weight in self.weights.items() if weight.model is None]
            if lacking:
                raise UsageError(
                    f"no 16-bit weights are kept in {self.title} files "
                    f"({len(lacking)} of {len(self.weights)} tensors have only a master)",
                    path=self.location.directory,
                    hint="Use --weights master --dtype auto. The masters cast to the training dtype are the "
                    "same weights, bit for bit.",
                )
        tensors = {}
        for name, weight in self.weights.items():
            first, second = weight.master, weight.model
            stored = (second or first) if copy == "model" else (first or second)
            assert stored is not None
            tensors[name] = stored
        return Catalogue(tensors, self.ties)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[self.ties.get(name, name)]
        if self.lost is not None and weight.kind == "parameter":
            raise self.lost
        tensor = weight.master or weight.model
        assert tensor is not None
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        yield from self.ties

    def __len__(self) -> int:
        return len(self.weights) + len(self.ties)

    def __repr__(self) -> str:
        return f"<{self.title} checkpoint {str(self.location.directory)!r}, {len(self)} tensors>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        from ckpt_tools.tensors.listing import html_table

        return html_table(self)

    @cached_property
    def training_dtype(self) -> DType | None:
        """The dtype of most floating elements in the model; None if there are none."""
        counts: Counter[DType] = Counter()
        for weight in self.weights.values():
            if weight.dtype.is_floating:
                counts[weight.dtype] += math.prod(weight.shape)
        return counts.most_common(1)[0][0] if counts else None

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all its files, including optimizer moments."""
        return sum(self.files.values())


def _check_name(name: object, path: Path) -> None:
    if not isinstance(name, str):
        raise DamagedCheckpoint(
            f"a tensor's name is not text but a value of type {type(name).__name__}",
            path=path,
            hint=_NO_NAME,
        )
    if name.count(".") >= _MOST_PARTS:
        raise UnsupportedLayout(
            f"a tensor's name has {name.count('.') + 1:,} parts; names of up to {_MOST_PARTS} are read",
            path=path,
            tensor=name[:100],
            hint="Save the model under shorter names: each module within another adds one part.",
        )
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DamagedCheckpoint(
                "a tensor's name holds half of a pair of characters, which no file can hold",
                path=path,
                tensor=name,
                hint=_NO_NAME,
            ) from None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
