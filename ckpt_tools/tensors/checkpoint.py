"""What every reader returns: the tensors of a checkpoint, the copies there are of each, and the facts.

A training framework may keep a parameter twice: the *master* that the optimizer updates (usually fp32)
and the *model* copy in training dtype. Both are kept apart here, so that a caller can choose, and can
check one against the other. This module knows no format and does no I/O.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.tensors.catalogue import Catalogue, Shape, Stored, Tensor
from ckpt_tools.tensors.dtypes import DType

Kind = Literal["parameter", "frozen", "buffer"]
Copy = Literal["master", "model"]

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
    """One tensor of a model, and the copies of it that the checkpoint holds.

    Attributes:
        kind: trained parameter, frozen parameter or persistent buffer.
        shape: sizes.
        dtype: the dtype it had in the model during training.
        master: the optimizer's copy, or None.
        model: the copy in training dtype, or None.
    """

    kind: Kind
    shape: Shape
    dtype: DType
    master: Stored | None = None
    model: Stored | None = None


@dataclass(frozen=True, slots=True)
class Location:
    """A checkpoint that was found under a path.

    Attributes:
        format: name of the reader that claims it.
        directory: the directory that holds its files.
        name: how a person tells it from others beside it: a tag, a folder.
        near: directories in which its config and tokenizer may lie, nearest first.
        remarks: what is odd about where it lies, for the report.
        part: which of several models in the directory, as its reader calls it.
    """

    format: str
    directory: Path
    name: str
    near: tuple[Path, ...]
    remarks: tuple[str, ...] = ()
    part: str | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint, read from metadata alone: a read-only map from tensor name to lazy tensor.

    As a mapping it has every name, second names of tied tensors included, and gives the master of a
    parameter where there is one; ``checkpoint[name].load()`` reads it.

    Attributes:
        location: where it lies.
        title: what it is, for a person: ``DeepSpeed ZeRO-3``.
        weights: every tensor, in the order in which the model names them.
        ties: for each second name of a tensor, the name it is listed under.
        files: the files it was read from, with their sizes in bytes.
        step: optimizer steps taken, where known.
        world_size: number of ranks that wrote it, where known.
        framework: what wrote it, with its version where known.
        details: further facts of the format, such as ``stage``.
        remarks: what is odd but does not stop a reading.
        doubts: reasons why masters must be compared with the model copy in full.
        lost: why the masters cannot be read, though the run kept some.
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

    def catalogue(self, copy: Copy = "master") -> Catalogue:
        """The tensors, from one of the copies.

        Args:
            copy: ``master`` takes the optimizer's copy where there is one and the model's otherwise;
                ``model`` takes the model's copy everywhere.

        Raises:
            UsageError: ``model`` was asked of a checkpoint that does not keep that copy.
            CkptError: ``master`` was asked of one whose masters are lost.
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
                    hint="Use --weights master --dtype auto: the masters cast to the training dtype "
                    "are the same weights, bit for bit.",
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

    @cached_property
    def training_dtype(self) -> DType | None:
        """The dtype that most floating elements had in the model; None where there is none."""
        counts: Counter[DType] = Counter()
        for weight in self.weights.values():
            if weight.dtype.is_floating:
                counts[weight.dtype] += math.prod(weight.shape)
        return counts.most_common(1)[0][0] if counts else None

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all its files, optimizer moments included."""
        return sum(self.files.values())
