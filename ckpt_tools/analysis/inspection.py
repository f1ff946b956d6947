"""Owns the description of a checkpoint from its metadata, for ``ckpt-tools inspect``.

It reads no tensor data and does not import torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_tools import readers
from ckpt_tools.errors import CkptError, NotACheckpoint, number_ranges
from ckpt_tools.hub.links import remarks_on
from ckpt_tools.readers.containers.suspicion import suspicious
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, entry_in
from ckpt_tools.readers.opening import open_weights
from ckpt_tools.storage.folders import read_as_one, shown
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import ADAPTER, Checkpoint, Location, Weight
from ckpt_tools.tensors.dtypes import BY_SHORT_NAME, DType
from ckpt_tools.tensors.threads import garbage_kept
from ckpt_tools.transforms.lora import adapter_of
from ckpt_tools.transforms.prefixes import strip_wrappers


@dataclass(frozen=True)
class Group:
    """A group of tensors: their number, elements, and bytes in the training dtype."""

    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """The facts of a checkpoint.

    Attributes:
        path: its directory.
        format: the reader's name for it.
        title: the format, for a person.
        name: tag or folder.
        step: optimizer step, if known.
        world_size: ranks that wrote it, if known.
        framework: the library that wrote it, with its version if known.
        details: further facts of the format, such as ``stage``.
        parameters: distinct elements of parameters, trained and frozen.
        files: number of files.
        bytes_on_disk: bytes of all files.
        weight_bytes: bytes that a conversion reads.
        training_dtype: dtype of most elements of the model.
        dtypes: number of elements of each training dtype.
        trained, frozen, buffers: the tensors by kind.
        tied: second names, each with the name that lists the tensor.
        adapters: the tensors of each adapter.
        attributes: the tensors of each top-level attribute.
        wrappers: prefixes that a conversion removes, with the number of names.
        output_bytes: bytes of the tensors of an output, for each dtype.
        numbered: names of a pipeline, whose layers are numbered; ``1-4.mlp.up.weight`` is four names.
        remarks: unusual facts.
        problems: errors.
        suspicious: for each file, the functions that its pickles name and no known framework writes. None of
            them was run.
    """

    path: Path
    format: str
    title: str
    name: str
    step: int | None = None
    world_size: int | None = None
    framework: str | None = None
    details: Mapping[str, object] | None = None
    parameters: int = 0
    files: int = 0
    bytes_on_disk: int = 0
    weight_bytes: int = 0
    training_dtype: str | None = None
    dtypes: Mapping[str, int] | None = None
    trained: Group | None = None
    frozen: Group | None = None
    buffers: Group | None = None
    tied: Mapping[str, str] | None = None
    adapters: Mapping[str, Group] | None = None
    attributes: Mapping[str, Group] | None = None
    wrappers: Mapping[str, int] | None = None
    output_bytes: Mapping[str, int] | None = None
    numbered: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    suspicious: Mapping[str, list[str]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def inspect(
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    model: int | str | None = None,
    source_format: str | None = None,
    also: Sequence[str | os.PathLike[str]] = (),
) -> Inspection:
    """Describe a checkpoint without reading its tensors.

    Raises:
        NotACheckpoint, UsageError: the path does not name exactly one checkpoint. A damaged checkpoint is
            not an error: its ``problems`` describe the damage.
    """
    # What is read lives until the report is made; the collector would visit all of it between two steps.
    with garbage_kept():
        place = read_as_one(as_path(path), also)
        try:
            location = readers.locate(place, tag, model=model, format=source_format)
            opened = partial(readers.read, location)
        except NotACheckpoint:
            if entry_in(place, ADAPTER_FILES) is None:
                raise
            location = Location(ADAPTER, place, place.name, (place,))
            opened = partial(open_weights, place)
        try:
            checkpoint = opened()
            named = suspicious(checkpoint.files, location.directory)
            found = replace(_facts(checkpoint), suspicious=named)
            held = checkpoint.files
        except CkptError as error:
            found, held = _of_damaged(location, error), {}
        links = remarks_on([location.directory, *held], [path, *also])
        links = [f"{link}; a conversion needs --follow-links" for link in links]
        return replace(found, remarks=(*found.remarks, *links))


def _of_damaged(location: Location, error: CkptError) -> Inspection:
    """What is known of a checkpoint that cannot be read."""
    sizes = list(_sizes(location.directory))
    return Inspection(
        path=shown(location.directory),
        format=location.format,
        title=f"{location.format} checkpoint",
        name=location.name,
        files=len(sizes),
        bytes_on_disk=sum(sizes),
        remarks=location.remarks,
        problems=(str(error),),
        suspicious=suspicious((), location.directory),
    )


def _sizes(directory: Path) -> Iterator[int]:
    """Bytes of each file of a damaged checkpoint."""
    for entry in directory.iterdir() if directory.is_dir() else [directory]:
        if entry.is_file():
            with suppress(CkptError):  # copies with different sizes
                yield entry.stat().st_size


def _facts(checkpoint: Checkpoint) -> Inspection:
    weights = checkpoint.weights
    stripped = strip_wrappers([*weights, *checkpoint.ties])
    named = {stripped.names[name]: weight for name, weight in weights.items()}
    parameters = {name: w for name, w in named.items() if w.kind != "buffer"}
    # A directory of PEFT's holds one adapter, and its names do not say which.
    saved = checkpoint.location.format == ADAPTER
    adapters = {name: "default" if saved else adapter_of(name) for name in named}
    adapted = {name: weight for name, weight in named.items() if adapters[name] is not None}
    return Inspection(
        path=shown(checkpoint.location.directory),
        format=checkpoint.location.format,
        title=checkpoint.title,
        name=checkpoint.location.name,
        step=checkpoint.step,
        world_size=checkpoint.world_size,
        framework=checkpoint.framework,
        details=checkpoint.details,
        parameters=sum(math.prod(w.shape) for w in parameters.values()),
        files=len(checkpoint.files),
        bytes_on_disk=checkpoint.bytes_on_disk,
        weight_bytes=checkpoint.catalogue("master" if checkpoint.lost is None else "model").nbytes,
        training_dtype=str(checkpoint.training_dtype) if checkpoint.training_dtype else None,
        dtypes={str(d): count for d, count in _elements(named.values()).items()},
        trained=_group(w for w in named.values() if w.kind == "parameter"),
        frozen=_group(w for w in named.values() if w.kind == "frozen"),
        buffers=_group(w for w in named.values() if w.kind == "buffer"),
        tied={stripped.names[a]: stripped.names[k] for a, k in checkpoint.ties.items()},
        adapters=_grouped(adapted, adapters.get),
        attributes={} if saved else _grouped(named, lambda name: name.split(".")[0]),
        wrappers=stripped.removed,
        output_bytes=_output_bytes(named, adapted.values()),
        numbered=_numbered(named),
        remarks=checkpoint.remarks,
        problems=() if checkpoint.lost is None else (str(checkpoint.lost),),
    )


def _numbered(names: Iterable[str]) -> tuple[str, ...]:
    """The names of a pipeline's layers, those that differ in the number alone as one."""
    layers: dict[str, list[int]] = {}
    others: list[str] = []
    for name in names:
        number, _, rest = name.partition(".")
        if number.isdigit():
            layers.setdefault(rest, []).append(int(number))
        else:
            others.append(name)
    if not layers:
        return ()
    return (*others, *(f"{number_ranges(found)}.{rest}" for rest, found in layers.items()))


def _group(weights: Iterable[Weight]) -> Group:
    held = list(weights)
    numels = [math.prod(weight.shape) for weight in held]
    nbytes = sum(n * w.dtype.itemsize for n, w in zip(numels, held, strict=True))
    return Group(len(held), sum(numels), nbytes)


def _grouped(weights: Mapping[str, Weight], key: Callable[[str], str | None]) -> dict[str, Group]:
    groups: dict[str, list[Weight]] = {}
    for name, weight in weights.items():
        label = key(name)
        if label is not None:
            groups.setdefault(label, []).append(weight)
    return {label: _group(members) for label, members in groups.items()}


def _output_bytes(weights: Mapping[str, Weight], adapters: Collection[Weight]) -> dict[str, int]:
    """Bytes of the output's tensors for each ``--dtype``, and of the adapters alone."""
    elements = _elements(weights.values())

    def size(counts: Mapping[DType, int], to: DType | None) -> int:
        return sum(
            count * (to if to is not None and dtype.is_floating else dtype).itemsize
            for dtype, count in counts.items()
        )

    choices: dict[str, DType | None] = {"auto": None, **BY_SHORT_NAME}
    sizes = {choice: size(elements, dtype) for choice, dtype in choices.items()}
    if adapters:
        sizes["adapter"] = size(_elements(adapters), None)
    return sizes


def _elements(weights: Iterable[Weight]) -> dict[DType, int]:
    """The number of elements of each training dtype."""
    counts: dict[DType, int] = {}
    for weight in weights:
        counts[weight.dtype] = counts.get(weight.dtype, 0) + math.prod(weight.shape)
    return counts
