"""Owns torch Distributed Checkpoint: ``.metadata`` and ``__R_N.distcp``, of any mesh, torchtitan's included.

It finds a checkpoint under a path, and makes weights of its metadata: the files that must exist, the
entries of a model, the boxes of each tensor. The data files are not read, except one number with the count
of steps. The bytes of a chunk are located when they are requested (:mod:`~ckpt_tools.tensors.deferred`).
Checkpoints of other libraries with their own names in this format have their own readers, which build on
this one.

Source: ``torch/distributed/checkpoint/filesystem.py`` and ``default_planner.py``, read at torch 2.13.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt_tools.errors import (
    CkptError,
    DamagedCheckpoint,
    NoModel,
    UnsupportedLayout,
    UsageError,
    listed,
)
from ckpt_tools.readers.containers.quantised_classes import quantised_remarks
from ckpt_tools.readers.containers.safetensors_file import SafetensorsFile, read_safetensors
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.dcp.chunks import (
    STALE,
    ChunkFragment,
    ChunkStore,
    check_transforms,
    is_bare,
)
from ckpt_tools.readers.dcp.metadata import (
    DATA_FILE,
    GLOBAL_FILE,
    RANK_FILE,
    Chunk,
    Extent,
    Metadata,
    SavedTensor,
    is_dcp_directory,
    read_metadata,
)
from ckpt_tools.readers.dcp.names import TOP, left_alone, models, objects_of, step_in, step_names
from ckpt_tools.readers.dcp.quantised import quantised
from ckpt_tools.readers.dcp.sharding_info import held_whole, sharding_info
from ckpt_tools.readers.trainer_state import trainer_step
from ckpt_tools.storage.folders import entries_of
from ckpt_tools.tensors.catalogue import Box, Fragment, Stored
from ckpt_tools.tensors.checkpoint import Checkpoint, Kind, Location, Weight
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.fragments import Piece, Region, assembled

NAME = "torch-dcp"
# Directories of this format that are parts of a larger checkpoint.
_PARTS = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+|model_and_optim")
# Checkpoints with their own reader, by the directory's name and by the writer of the metadata.
_ELSEWHERE = {"model_and_optim", "olmo_core"}
_SCALARS = {"float32": "<f", "float64": "<d", "int32": "<i", "int64": "<q"}
_OTHER_NODES = (
    "Each node may have written to its own disk: copy the .distcp files of every node into this "
    "directory, or pass their folders with --also DIR."
)


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: the directory with ``.metadata``, that file, or the directory above (that of torchtitan's
            ``step-N``, for example).
        tag: the name of a directory, or of a model in a checkpoint with several models.

    Returns:
        One location, several to choose from, or none if there is no checkpoint of this format.

    Raises:
        UsageError: ``tag`` does not exist.
    """
    if path.is_file():
        if not is_own_file(path):
            return []
        path = path.parent
    if is_dcp_directory(path):
        return _inside(path, None if tag == path.name else tag)
    if not path.is_dir():
        return []
    children = [
        entry
        for entry in entries_of(path)
        if entry.is_dir() and not _PARTS.fullmatch(entry.name) and is_dcp_directory(entry)
    ]
    chosen = [entry for entry in children if entry.name == tag]
    if chosen:
        return _inside(chosen[0], None)
    if tag is None and len(children) > 1:
        return [location_of(NAME, entry) for entry in children]
    return _inside(children[0], tag) if len(children) == 1 else []


def _inside(directory: Path, tag: str | None) -> list[Location]:
    """The models of one checkpoint; :func:`read` reports damage."""
    if directory.name in _ELSEWHERE:
        return []
    try:
        metadata = read_metadata(directory)
    except CkptError:
        return [location_of(NAME, directory)]
    if metadata.writer in _ELSEWHERE:
        return []
    names = list(models(metadata))
    if tag is not None and tag not in names:
        raise UsageError(
            f"it has no model {tag!r}",
            path=directory,
            hint=f"Pass --tag with one of: {', '.join(names)}." if names else "Leave out --tag.",
        )
    if tag is None and len(names) < 2:
        return [location_of(NAME, directory)]
    return [location_of(NAME, directory, part) for part in names if tag in (None, part)]


def is_own_file(path: Path) -> bool:
    """Whether the name of a file is one of this format."""
    named = any(pattern.fullmatch(path.name) for pattern in (RANK_FILE, DATA_FILE))
    return path.is_file() and (named or path.name == GLOBAL_FILE)


def location_of(format_name: str, directory: Path, part: str | None = None) -> Location:
    """The location of a checkpoint, or of one model in it."""
    near = (directory, directory.parent, directory.parent.parent)
    return Location(format_name, directory, part or directory.name, near, part=part)


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: files are missing, too short or of different saves; boxes of a tensor
            overlap or leave a hole.
        UnsupportedLayout: it holds no model, or was written with an unknown extension.
    """
    metadata = read_metadata(location.directory)
    names = model_names(metadata, location)
    saving = Saving(location.directory, metadata, names.values())
    weights = {name: saving.weight(flat) for name, flat in names.items()}
    skipped = left_alone(metadata, names.values())
    held = {name: weight.model for name, weight in weights.items()}
    remarks = [*location.remarks, *saving.remarks, *quantised_remarks(held)]
    objects = objects_of(metadata, location.part or next(iter(models(metadata))))
    if objects:
        remarks.append(f"entries of the model that are not tensors: {listed(objects)}")
    return Checkpoint(
        location=location,
        title="torch DCP",
        weights=weights,
        ties={},
        files=saving.files,
        step=saving.step(),
        world_size=saving.world_size(),
        framework=" ".join(filter(None, ("torch.distributed.checkpoint", metadata.version))),
        details={"model": location.part or _part(metadata), "left_alone": skipped},
        remarks=tuple(remarks),
    )


def _part(metadata: Metadata) -> str | None:
    return next((name for name in models(metadata) if name != TOP), None)


def model_names(metadata: Metadata, location: Location) -> Mapping[str, str]:
    """Names in the model, each with its flat name in the checkpoint.

    Raises:
        NoModel: there is no model.
        UsageError: there is no model with this name, or several without a choice.
    """
    found = models(metadata)
    if not found:
        keys = left_alone(metadata, ())
        beside = sorted(p.name for p in location.directory.parent.glob("pytorch_model_fsdp_*"))
        raise NoModel(
            f"it holds no model: its entries are {listed(keys) or 'none'}",
            path=location.directory,
            hint=f"The weights are in {listed(beside)} beside it."
            if beside
            else "The weights may be in a directory beside it.",
        )
    part = location.part or next(iter(found))
    if part not in found or (location.part is None and len(found) > 1):
        raise UsageError(
            f"it holds {len(found)} models, and none is {location.part!r}",
            path=location.directory,
            hint=f"Pass --tag with one of: {', '.join(found)}.",
        )
    return found[part]


class Saving:
    """One save: its metadata, and the files that must exist.

    Args:
        directory: the checkpoint.
        metadata: the metadata of the save.
        needed: flat names of the tensors that are read.

    Attributes:
        files: every file in the directory, with its size.
        remarks: remarks about them for the report.

    Raises:
        DamagedCheckpoint: a file with a part of a needed tensor is missing or too short.
    """

    def __init__(self, directory: Path, metadata: Metadata, needed: Iterable[str]) -> None:
        self._directory = directory
        self._metadata = metadata
        self._store = ChunkStore()
        self._paths: dict[str, Path] = {}
        self._shards: dict[tuple[str, int], SafetensorsFile] = {}
        self.files = {
            entry: entry.stat().st_size for entry in sorted(directory.iterdir()) if entry.is_file()
        }
        self.remarks: list[str] = []
        wanted = {c.extent.file for n in needed for c in metadata.tensors[n].chunks}
        self._check_files(wanted)

    def _check_files(self, wanted: set[str]) -> None:
        ends: dict[str, int] = {}
        for extent in self._metadata.extents():
            ends[extent.file] = max(ends.get(extent.file, 0), extent.start + extent.length)
        lost = sorted(name for name in ends if self._directory / name not in self.files)
        if needed := [name for name in lost if name in wanted]:
            raise DamagedCheckpoint(
                f"{len(needed)} of {len(ends)} data files are missing: {listed(needed)}",
                path=self._directory,
                missing=needed,
                hint=_OTHER_NODES,
            )
        if lost:
            self.remarks.append(f"missing files without weights: {listed(lost)}")
        for name in sorted(wanted):
            path = self._directory / name
            if self.files[path] < ends[name]:
                raise DamagedCheckpoint(
                    f"it must have {ends[name]:,} bytes and has {self.files[path]:,}",
                    path=path,
                    hint=STALE,
                )
        self._note_gaps(wanted)
        strange = [
            path.name
            for path, size in self.files.items()
            if size and DATA_FILE.fullmatch(path.name) and path.name not in ends
        ]
        if strange:
            self.remarks.append(f"data files that are not in the metadata: {listed(strange)}")

    def _note_gaps(self, wanted: set[str]) -> None:
        """Note files with bytes of no entry: torch writes one entry after the other, without a gap."""
        if self._metadata.ranks is not None:
            return  # ranks that save without collectives all write what is replicated
        used: dict[str, int] = {}
        for extent in self._metadata.extents():
            used[extent.file] = used.get(extent.file, 0) + extent.length
        for tensor in self._metadata.tensors.values():
            for chunk in tensor.chunks:
                if tensor.dtype is not None and is_bare(chunk, tensor.dtype):
                    used.pop(chunk.extent.file, None)  # a safetensors file, with a header
        held = {name: self.files[self._directory / name] for name in sorted(wanted & used.keys())}
        unused = {name: size - used[name] for name, size in held.items()}
        if gaps := [f"{name} ({count:,})" for name, count in unused.items() if count > 0]:
            self.remarks.append(
                f"data files with bytes of no entry of the metadata: {listed(gaps)}. An entry may be lost"
            )

    def weight(self, flat: str) -> Weight:
        """A tensor of the model.

        Raises:
            DamagedCheckpoint: its boxes overlap or leave a hole.
            UnsupportedLayout: its dtype is unknown, or its chunks cannot be unpacked.
        """
        saved = self._metadata.tensors[flat]
        if saved.dtype is None:
            raise UnsupportedLayout(
                f"its dtype is {saved.unknown_dtype}, which ckpt-tools does not read",
                path=self._directory,
                tensor=flat,
                hint="Cast it to another dtype in the training script, and save again.",
            )
        stored = quantised(saved, self._directory) or self._stored(flat, saved, saved.dtype)
        # The files do not state which tensors were trained, but only floating ones can be.
        kind: Kind = "parameter" if saved.dtype.is_floating else "buffer"
        return Weight(kind, saved.shape, saved.dtype, model=stored)

    def _stored(self, flat: str, saved: SavedTensor, dtype: DType) -> Stored:
        pieces = [self._piece(flat, chunk, dtype) for chunk in saved.chunks]
        source = self._directory / GLOBAL_FILE
        return assembled(
            flat,
            dtype,
            saved.shape,
            pieces,
            source if source in self.files else self._directory,
            "The metadata is damaged, or that of a rank is missing. Copy it anew from where it was "
            "written, or pass the folder with the rest with --also DIR.",
        )

    def _piece(self, flat: str, chunk: Chunk, dtype: DType) -> Piece:
        box = Box(chunk.offsets, chunk.sizes)
        # There may be 100,000 chunks, and making a path takes as long as all other steps here.
        path = self._paths.get(chunk.extent.file) or self._directory / chunk.extent.file
        self._paths[chunk.extent.file] = path
        check_transforms(chunk, path)
        if box.numel and is_bare(chunk, dtype):
            tensor = self._of_shard(flat, chunk, dtype)
            return box, lambda region: held_whole(tensor, path, region)

        def deferred(region: Region) -> Fragment:
            return ChunkFragment(region, path, chunk, dtype, flat, self._store)

        return box, deferred

    def _of_shard(self, flat: str, chunk: Chunk, dtype: DType) -> Stored:
        """The tensor in a rank's safetensors file, for which the metadata has wrong offsets.

        In the metadata, its tensors start where the safetensors part starts: after the pickles of other
        objects. The part holds one box of a tensor, so a rank's second box of the same tensor is lost.
        """
        path = self._directory / chunk.extent.file
        key = (chunk.extent.file, chunk.extent.start)
        if key not in self._shards:
            self._shards[key] = read_safetensors(path, chunk.extent.start)
        shard = self._shards[key]
        tensor = shard.tensors.get(flat)
        offsets = (sharding_info(shard) or {}).get(flat)
        if tensor is None or (tensor.dtype, tensor.shape, offsets) != (
            dtype,
            chunk.sizes,
            chunk.offsets,
        ):
            raise DamagedCheckpoint(
                f"it does not hold the part at {chunk.offsets}", path=path, tensor=flat, hint=STALE
            )
        return tensor

    def step(self) -> int | None:
        """The number of steps: from the training loop's record, the directory's name or Adam's counter."""
        names = step_names(self._metadata)
        recorded = [name for name in names if name in self._metadata.objects]
        counted = [name for name in names if name not in self._metadata.objects]
        for name in recorded:
            if (value := self._object(self._metadata.objects[name])) is not None:
                return value
        if (named := step_in(self._directory.name)) is not None:
            return named
        if (trained := trainer_step(self._directory.parent)) is not None:
            return trained
        for name in counted:
            if (value := self._scalar(name)) is not None:
                return value
        return None

    def _object(self, extent: Extent) -> int | None:
        if extent.transforms:
            return None
        try:
            value = TorchFile(self._directory / extent.file, extent.start, extent.length).load()
        except CkptError:
            # The step is only for the report, so it must not cause a failure.
            return None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _scalar(self, flat: str) -> int | None:
        saved = self._metadata.tensors[flat]
        if saved.dtype is None or (code := _SCALARS.get(saved.dtype.name)) is None:
            return None
        try:
            fragment = self._stored(flat, saved, saved.dtype).fragments[0]
            with fragment.file.open("rb") as stream:
                stream.seek(fragment.offset)
                (value,) = struct.unpack(code, stream.read(saved.dtype.itemsize))
        except (CkptError, OSError, struct.error, IndexError):
            return None
        return int(value)

    def world_size(self) -> int | None:
        """Number of ranks. Each rank has a data file, which is empty if it had nothing to write."""
        if self._metadata.ranks is not None:
            return self._metadata.ranks
        named = {extent.file for extent in self._metadata.extents()}
        empty = {path.name for path, size in self.files.items() if not size}
        ranks = [int(m[1]) for name in named | empty if (m := DATA_FILE.fullmatch(name))]
        return max(ranks) + 1 if ranks else None
