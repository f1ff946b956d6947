"""Owns torch Distributed Checkpoint in Hugging Face storage: ``shard-R-model-K-of-N.safetensors``, no index.

Each rank writes its boxes to safetensors files, and the header has the start of each box. The size of the
whole tensor, the number of ranks and the list of tensors are not recorded: a tensor ends where its last box
ends. A missing shard at the start or in the middle leaves a hole, which is an error here. A missing shard
at the end only shortens its tensors; a comparison with the shapes of a config finds this.
If torch also consolidated the shards, those under ``sharded/`` are read, because torch's consolidation
turns a 0-d 1.0 into 0.0.

Source: ``torch/distributed/checkpoint/hf_storage.py`` and ``_hf_utils.py``, read at torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from itertools import islice, product
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint, UsageError, listed
from ckpt_tools.readers.containers.safetensors_file import SafetensorsFile, read_safetensors
from ckpt_tools.readers.dcp.names import step_in
from ckpt_tools.readers.dcp.sharding_info import held_whole, sharding_info
from ckpt_tools.tensors.catalogue import Box, Shape, Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Kind, Location, Weight
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.fragments import Piece, assembled
from ckpt_tools.tensors.threads import read_each

NAME = "torch-dcp-huggingface"
_SHARD = re.compile(r"shard-(\d{1,6})-model-(\d{1,6})-of-(\d{1,6})\.safetensors")
# Names of missing files that an error lists.
_NAMED = 1_000
_CONSOLIDATED_FROM = "sharded"
_REMARK = (
    "the number of shards is not recorded: only a comparison with a config's shapes shows that none is "
    "missing at the end"
)


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoint of this format to which ``path`` leads.

    Args:
        path: the directory of the shards, one of them, or the directory with torch's consolidated files.
        tag: the directory's name; a checkpoint of this format has no other tag.

    Raises:
        UsageError: ``tag`` is another name.
    """
    if path.is_file() and _SHARD.fullmatch(path.name):
        path = path.parent
    # Only the shards show the format: torch's name for their directory is too general.
    shards = path / _CONSOLIDATED_FROM
    directory = shards if _shards(shards) else path
    if not _shards(directory):
        return []
    if tag not in (None, path.name, directory.name):
        raise UsageError(
            f"this directory holds one checkpoint without tags, so the tag {tag!r} does not exist",
            path=path,
            hint="Omit --tag.",
        )
    near = (directory, directory.parent, directory.parent.parent)
    name = directory.parent.name if directory.name == _CONSOLIDATED_FROM else directory.name
    return [Location(NAME, directory, name, near)]


def _shards(directory: Path) -> dict[tuple[int, int, int], Path]:
    """The shard files by number of the shard, number of the part and number of parts."""
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return {}
    return {
        (int(match[1]), int(match[2]), int(match[3])): entry
        for entry in entries
        if (match := _SHARD.fullmatch(entry.name))
    }


def read(location: Location) -> Checkpoint:
    """Read the headers of a checkpoint's shards.

    Raises:
        DamagedCheckpoint: a shard that is not the last is missing, or one is truncated; boxes overlap or
            leave a hole.
    """
    directory = location.directory
    shards = _shards(directory)
    gaps = _gaps(shards, directory)
    files = read_each(read_safetensors, list(shards.values()))
    hint = "Copy the shards of every rank into one directory, or pass the other folders with --also DIR."
    if gaps:
        hint += f" These numbers are missing: {listed(gaps)}."
    boxes = _boxes(files)
    weights = {name: _weight(name, held, directory, gaps, hint) for name, held in boxes.items()}
    return Checkpoint(
        location=location,
        title="torch DCP in Hugging Face storage",
        weights=weights,
        ties={},
        files={e: e.stat().st_size for e in sorted(directory.iterdir()) if e.is_file()},
        step=step_in(location.name),
        world_size=max(rank for rank, _, _ in shards),
        framework=_framework(files),
        details={"shards": len(shards), "shapes_inferred": True},
        remarks=(*location.remarks, _REMARK, *_shapeless(boxes)),
    )


_Boxes = dict[str, list[tuple[SafetensorsFile, Shape, Stored]]]


def _boxes(files: list[SafetensorsFile]) -> _Boxes:
    """For each name, the shards' parts of the tensor and their starts, in the order of the headers."""
    boxes: _Boxes = {}
    for file in files:
        offsets = sharding_info(file)
        if offsets is None:
            raise DamagedCheckpoint(
                "DCP_SHARDING_INFO is missing, so the places of its tensors are unknown",
                path=file.path,
            )
        for name, at in offsets.items():
            boxes.setdefault(name, []).append((file, at, file.tensors[name]))
    return boxes


def _shapeless(boxes: _Boxes) -> list[str]:
    """The remark about tensors without elements that several ranks share; torch writes no size for them."""
    names = [
        name
        for name, held in boxes.items()
        if len(held) > 1 and not any(tensor.numel for _, _, tensor in held)
    ]
    return [f"tensors without elements have unknown shapes: {', '.join(names)}"] if names else []


def _weight(
    name: str,
    held: list[tuple[SafetensorsFile, Shape, Stored]],
    directory: Path,
    gaps: list[str],
    hint: str,
) -> Weight:
    dtypes: dict[DType, Path] = {tensor.dtype: file.path for file, _, tensor in held}
    ranks = {len(tensor.shape) for _, _, tensor in held}
    if len(dtypes) > 1 or len(ranks) > 1:
        raise DamagedCheckpoint(
            f"shards disagree about it ({', '.join(map(str, dtypes))}): they belong to different saves",
            path=directory,
            tensor=name,
        )
    (dtype,) = dtypes
    ends = [
        [start + size for start, size in zip(at, tensor.shape, strict=True)]
        for _, at, tensor in held
    ]
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    pieces: list[Piece] = [
        (Box(at, tensor.shape), partial(held_whole, tensor, file.path)) for file, at, tensor in held
    ]
    try:
        stored = assembled(name, dtype, shape, pieces, directory, hint)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            error.fact, path=directory, tensor=name, missing=gaps, hint=hint
        ) from error
    kind: Kind = "parameter" if dtype.is_floating else "buffer"
    return Weight(kind, shape, dtype, model=stored)


def _gaps(shards: Mapping[tuple[int, int, int], Path], directory: Path) -> list[str]:
    """Names of files whose numbers are missing.

    A rank that holds nothing of a part writes no file for it, so a gap alone is not damage.

    Raises:
        DamagedCheckpoint: there are files of two saves, or a part is missing in every shard.
    """
    parts = {total for _, _, total in shards}
    if len(parts) > 1:
        raise DamagedCheckpoint(
            f"its shards state {' and '.join(map(str, sorted(parts)))} parts: they belong to different saves",
            path=directory,
            hint="Delete the files of the older save.",
        )
    (total,) = parts
    last = max(rank for rank, _, _ in shards)
    every = product(range(1, last + 1), range(1, total + 1))
    lacking = ((rank, part) for rank, part in every if (rank, part, total) not in shards)
    gaps = [
        f"shard-{rank:05d}-model-{part:05d}-of-{total:05d}.safetensors"
        for rank, part in islice(lacking, _NAMED)
    ]
    held = {part for _, part, _ in shards}
    lost = [part for part in range(1, total + 1) if part not in held]
    if lost:
        raise DamagedCheckpoint(
            f"part {lost[0]} of {total} is missing in every shard",
            path=directory,
            missing=gaps,
            hint="Copy all files anew from where they were written.",
        )
    return gaps


def _framework(files: list[SafetensorsFile]) -> str:
    version = next((f.metadata["DCP_VERSION"] for f in files if "DCP_VERSION" in f.metadata), None)
    return " ".join(filter(None, ("torch.distributed.checkpoint", version)))
