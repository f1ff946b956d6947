"""Owns the layout of the output: the file of each tensor, and its bytes in the file. It does no I/O.

A container lays out one file: its first bytes, the place of each tensor, and what is written when the data is
there. The safetensors files are exactly those that ``save_pretrained`` and ``safetensors.torch.save_file``
write for the same tensors: the same shards, names, order within a file, header and index.

Sources: ``huggingface_hub.serialization`` (shards), ``transformers/modeling_utils.py`` (index).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from huggingface_hub import split_state_dict_into_shards_factory

from ckpt_tools.errors import UsageError
from ckpt_tools.tensors.catalogue import Catalogue, Shape, Tensor
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.writing.header import file_header
from ckpt_tools.writing.torch_container import archive

OutputFormat = Literal["safetensors", "bin"]
MODEL_STEMS: Mapping[OutputFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}
INDEX_SUFFIX = ".index.json"
_BLOCK_BYTES = 2 << 20
_MAX_BLOCK_BYTES = 32 << 20
# With many ranks a block holds a piece of each. With smaller pieces, disks spend their time on seeks.
_WORTHWHILE_READ = 128 << 10


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in an output file: ``nbytes`` from byte ``offset`` on."""

    name: str
    tensor: Tensor
    offset: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + self.tensor.nbytes


class Closing(Protocol):
    """What is written around the data of a file once it is there, because it follows from the data."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First byte and end of each range of the file whose CRC-32 is needed."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    def parts(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Each place and the bytes to write there, given the CRC-32 of each of the ranges."""


@dataclass(frozen=True)
class PlannedFile:
    """One weight file.

    Attributes:
        name: file name.
        header: its first bytes; tensor data comes after it.
        slots: its tensors in the order of the file. Bytes between them are zero until the file is closed.
        closing: what is written last; None if the data completes the file.
    """

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    closing: Closing | None = None

    @property
    def end(self) -> int:
        """The byte after the data of the last tensor."""
        return self.slots[-1].end if self.slots else len(self.header)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.end if self.closing is None else self.closing.size


@dataclass(frozen=True)
class Plan:
    """The place of every byte that will be written.

    Attributes:
        files: the weight files.
        index: name and content of the index, if there are several files.
    """

    files: tuple[PlannedFile, ...]
    index: tuple[str, bytes] | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {slot.name: slot.tensor for file in self.files for slot in file.slots}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def data_bytes(self) -> int:
        """Bytes between the headers and the ends of the data, gaps between tensors included."""
        return sum(file.end - len(file.header) for file in self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files and the index."""
        return sum(file.size for file in self.files) + (len(self.index[1]) if self.index else 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name, the index included."""
        sizes = {file.name: file.size for file in self.files}
        return sizes if self.index is None else sizes | {self.index[0]: len(self.index[1])}

    def listing(self) -> tuple[dict[str, object], ...]:
        """The files and their tensors as plain JSON values, for ``--dry-run``."""
        return tuple({"file": f.name, "bytes": f.size, "tensors": _listed(f)} for f in self.files)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one write; more if tensors come from many ranks."""
        pieces = max((tensor.pieces for tensor in self.tensors.values()), default=1)
        return min(max(_BLOCK_BYTES, pieces * _WORTHWHILE_READ), _MAX_BLOCK_BYTES)


def plan(
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
    stem: str | None = None,
    format: OutputFormat = "safetensors",
) -> Plan:
    """Lay out ``tensors``, in their order, as weight files.

    Args:
        tensors: the tensors to write, by name. Of a catalogue, a ``bin`` file holds second names too.
        max_shard_size: bytes, or a number with a decimal unit (``5GB``).
        stem: file name without its suffix, such as ``adapter_model``; by default that of a model.
        format: the container.

    Raises:
        UsageError: the size cannot be read or is not positive.
        UnsupportedLayout: the container cannot hold a tensor.
    """
    stem, suffix = stem or MODEL_STEMS[format], f".{format}"
    seconds = dict(tensors.ties) if format == "bin" and isinstance(tensors, Catalogue) else {}
    try:
        if not _is_positive(max_shard_size):
            raise ValueError("a positive number is needed")
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            # In torch, tensors without elements share their storage, so all are in one file.
            get_storage_id=lambda tensor: None if tensor.numel else "empty",
            filename_pattern=f"{stem}{{suffix}}{suffix}",
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{max_shard_size!r} is not a size of files",
            hint="Write a positive number with its unit, such as 5GB or 500MB.",
        ) from error
    places = split.tensor_to_filename
    # In the order of the state: the split puts tensors without elements last.
    held: dict[str, dict[str, Tensor]] = {name: {} for name in split.filename_to_tensors}
    for key, tensor in tensors.items():
        held[places[key]][key] = tensor
    files = tuple(_planned_file(name, inside, seconds, format) for name, inside in held.items())
    if len(files) < 2:
        return Plan(files or (_planned_file(f"{stem}{suffix}", {}, {}, format),), None)
    numel = sum(tensor.numel for tensor in tensors.values())
    index = {
        "metadata": {"total_parameters": numel, **split.metadata},
        "weight_map": places | {second: places[kept] for second, kept in seconds.items()},
    }
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return Plan(files, (f"{stem}{suffix}{INDEX_SUFFIX}", content.encode()))


def _is_positive(size: int | str) -> bool:
    return (size if isinstance(size, int) else float(size.upper().rstrip("KMGTPB "))) > 0


def _planned_file(
    name: str, tensors: Mapping[str, Tensor], seconds: Mapping[str, str], format: OutputFormat
) -> PlannedFile:
    layouts = _Layouts(tensors)
    closing: Closing | None = None
    match format:
        case "safetensors":
            header, offsets = file_header(layouts, {"format": "pt"})
        case "bin":
            inside = {second: kept for second, kept in seconds.items() if kept in layouts}
            header, offsets, closing = archive(name.removesuffix(".bin"), layouts, inside)
    slots = tuple(Slot(key, tensors[key], offset) for key, offset in offsets.items())
    return PlannedFile(name, header, slots, closing)


class _Layouts(Mapping[str, tuple[DType, Shape]]):
    """Dtype and shape of each tensor; of 100,000 tensors the pairs would take 12 MB."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> tuple[DType, Shape]:
        tensor = self._tensors[name]
        return tensor.dtype, tensor.shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _listed(file: PlannedFile) -> list[dict[str, object]]:
    return [
        {"name": s.name, "dtype": str(s.tensor.dtype), "shape": list(s.tensor.shape)}
        for s in file.slots
    ]
