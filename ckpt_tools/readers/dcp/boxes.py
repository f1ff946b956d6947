"""Tensors of boxes: what the two storages of torch Distributed Checkpoint have in common.

Owns the step from boxes to a tensor that is proven to be whole, and what torch records in the header of a
safetensors file about the boxes in it: one ``saved_offsets`` a tensor. That record says where a box begins
and not how large the whole is. Knows neither ``.metadata`` nor the names of files.

Source: ``torch/distributed/checkpoint/filesystem.py`` (``_write_files_from_queue``) and ``_hf_utils.py``,
read at torch 2.13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.safetensors_file import SafetensorsFile
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.dtypes import DType

Region = FlatRange | Box
Piece = tuple[Box, Callable[[Region], Fragment]]


def sharding_info(file: SafetensorsFile) -> dict[str, Shape] | None:
    """First index of each tensor of a shard in the whole tensor; None where torch recorded nothing.

    Raises:
        DamagedCheckpoint: the record is malformed, or not of the tensors in the file.
    """
    text = file.metadata.get("DCP_SHARDING_INFO")
    if text is None:
        return None
    try:
        recorded = json.loads(text)
        # In this order the state dict named them; those of the file are in the order of their bytes.
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in recorded.items()}
        if offsets.keys() != file.tensors.keys():
            raise ValueError(f"it is of {len(offsets)} tensors, the file holds {len(file.tensors)}")
        if not all(isinstance(n, int) and n >= 0 for at in offsets.values() for n in at):
            raise ValueError("an offset that is no index")
        odd = [n for n, at in offsets.items() if len(at) != len(file.tensors[n].shape)]
        if odd:
            raise ValueError(f"an offset of another rank for {odd[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"its DCP_SHARDING_INFO is malformed ({error})",
            path=file.path,
            hint="It was not written by torch, or was edited.",
        ) from error
    return offsets


def held_whole(tensor: Stored, path: Path, region: Region) -> Fragment:
    """The fragment that is all of a tensor of a safetensors file."""
    return Fragment(path, tensor.fragments[0].offset, region)


def assembled(
    name: str, dtype: DType, shape: Shape, pieces: Sequence[Piece], source: Path, hint: str
) -> Stored:
    """A tensor of boxes.

    Boxes of whole rows, which is what FSDP makes, become ranges of the flattened tensor: a window then
    finds its own without a look at the others.

    Args:
        name: of the tensor, for errors.
        dtype: element type.
        shape: sizes of the whole.
        pieces: each box, and what makes the fragment of its region.
        source: the file that describes the pieces, for errors.
        hint: the next step where they do not fit together.

    Raises:
        DamagedCheckpoint: they overlap, leave a hole or reach outside.
    """
    held = [(box, make) for box, make in pieces if box.numel]
    ranges = [_rows(shape, box) for box, _ in held]
    regions: list[Region] = [box for box, _ in held]
    if all(flat is not None for flat in ranges):
        order = sorted(range(len(held)), key=lambda i: held[i][0].offsets)
        held = [held[i] for i in order]
        regions = [flat for i in order if (flat := ranges[i]) is not None]
    fragments = [make(region) for (_, make), region in zip(held, regions, strict=True)]
    try:
        return Stored(dtype, shape, fragments)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            error.fact, path=source, tensor=name, missing=error.missing, hint=hint
        ) from error


def _rows(shape: Shape, box: Box) -> FlatRange | None:
    """The box as a range of the flattened tensor, where it is whole in all axes but the first."""
    if box.sizes[1:] != shape[1:] or any(box.offsets[1:]):
        return None
    if not shape:
        return FlatRange(0, 1)
    inner = math.prod(shape[1:])
    return FlatRange(box.offsets[0] * inner, (box.offsets[0] + box.sizes[0]) * inner)
