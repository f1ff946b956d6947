"""Owns the ``.metadata`` of a torch Distributed Checkpoint: the bytes of a file that hold a box of a tensor.

The classes in the pickle are read as names and states, without torch. If a run saves without collectives,
each rank writes metadata (``__R.metadata``), which is merged here. :mod:`~ckpt_tools.readers.dcp.chunks`
reads the bytes of a chunk, :mod:`~ckpt_tools.readers.dcp.names` interprets the names.

Source: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` (``_StorageInfo``, ``finish``),
``_nested_dict.py`` (flat names), read at torch 2.13. The state of these classes has been the same since
torch 2.0, but for fields that were added and are optional here.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ckpt_tools.errors import CkptError, DamagedCheckpoint, listed
from ckpt_tools.readers.containers.restricted_pickle import Opaque, unpickle
from ckpt_tools.tensors.catalogue import Shape
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.threads import read_each

GLOBAL_FILE = ".metadata"
RANK_FILE = re.compile(r"__(\d{1,6})\.metadata")
DATA_FILE = re.compile(r"__(\d+)_\d+\.distcp")
KeyPath = tuple[str | int, ...]


class Extent(NamedTuple):
    """A run of bytes in a data file.

    Attributes:
        file: name of the file, relative to the checkpoint's directory.
        start: first byte.
        length: number of bytes in the file.
        transforms: the transforms of the bytes, such as ``stream.zstd/1``.
    """

    file: str
    start: int
    length: int
    transforms: tuple[str, ...]


# There may be a million of the three records here; a named tuple is made in a third of a dataclass's time.
# By flat name and first index; the index is None for entries that are not tensors.
_Extents = dict[tuple[str, Shape | None], Extent]


class Chunk(NamedTuple):
    """A box of a tensor and its place: first index, sizes, bytes."""

    offsets: Shape
    sizes: Shape
    extent: Extent


class SavedTensor(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        dtype: element type; None if it is not one that is read.
        shape: sizes of the whole.
        chunks: its boxes, in no order, without proof that they tile it.
        unknown_dtype: the name of an element type that is not read.
    """

    dtype: DType | None
    shape: Shape
    chunks: tuple[Chunk, ...]
    unknown_dtype: str = ""


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata of one save. It is equal to itself alone, so that answers about it can be kept.

    Attributes:
        tensors: every tensor, with optimizer states, by flat name.
        objects: all other entries: pickles of numbers, strings, lists.
        paths: for each flat name, its keys in the nested state; empty if not recorded.
        version: version of the format, if recorded.
        writer: the top module of the class that describes the storage: ``torch`` or another library.
        ranks: number of ranks that wrote metadata of their own; None for the one global file.
    """

    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, Extent]
    paths: Mapping[str, KeyPath]
    version: str | None
    writer: str
    ranks: int | None = None

    def extents(self) -> Iterator[Extent]:
        """Every recorded run of bytes."""
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                yield chunk.extent
        yield from self.objects.values()

    def path_of(self, name: str) -> KeyPath:
        """The keys of a flat name in the nested state; the name itself if they were not recorded."""
        return self.paths.get(name) or (name,)


def is_dcp_directory(directory: Path) -> bool:
    """Whether a directory holds metadata of this format, or data files without metadata."""
    try:
        names = [entry.name for entry in directory.iterdir()]
    except OSError:
        return False
    return (GLOBAL_FILE in names and (directory / GLOBAL_FILE).is_file()) or any(
        RANK_FILE.fullmatch(name) or DATA_FILE.fullmatch(name) for name in names
    )


def read_metadata(directory: Path) -> Metadata:
    """The metadata of the checkpoint in ``directory``.

    The last result is kept: a large checkpoint's metadata takes seconds to read, and it is needed to list the
    models and again to read one.

    Raises:
        DamagedCheckpoint: metadata is missing, truncated, contradictory or of two saves.
        UnsafePickle: it cannot be read without running code from it.
    """
    files = _metadata_files(directory)
    stamps = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return _read_files(tuple(stamps))


def _metadata_files(directory: Path) -> list[Path]:
    by_rank = {
        int(match[1]): entry
        for entry in directory.iterdir()
        if (match := RANK_FILE.fullmatch(entry.name))
    }
    whole = directory / GLOBAL_FILE
    if by_rank and whole.is_file():
        raise DamagedCheckpoint(
            f"there are both {GLOBAL_FILE} and {by_rank[min(by_rank)].name}: two saves went to one directory",
            path=directory,
            hint="Data files of the older save may be overwritten. Delete the metadata of the older save.",
        )
    if by_rank:
        lost = [f"__{rank}.metadata" for rank in range(max(by_rank)) if rank not in by_rank]
        if lost:
            raise DamagedCheckpoint(
                f"metadata of {len(lost)} ranks is missing: {listed(lost)}",
                path=directory,
                missing=lost,
                hint="It was saved without collectives, one file a rank. Copy the files of every node "
                "into one directory, or pass the folders of the other nodes with --also DIR.",
            )
        return [by_rank[rank] for rank in sorted(by_rank)]
    if not whole.is_file():
        raise DamagedCheckpoint(
            f"there are data files, but no {GLOBAL_FILE}",
            path=directory,
            missing=[GLOBAL_FILE],
            hint="One rank writes it last: the save did not finish, or the file is on another node. Pass the "
            "folder of that node with --also DIR.",
        )
    return [whole]


@lru_cache(maxsize=1)
def _read_files(stamps: tuple[tuple[Path, int, int], ...]) -> Metadata:
    parts = read_each(_read_file, [path for path, _, _ in stamps])
    if stamps[0][0].name == GLOBAL_FILE:
        return parts[0]
    return _merged(parts, [path for path, _, _ in stamps])


def _read_file(path: Path) -> Metadata:
    try:
        with path.open("rb") as stream:
            return _parse(unpickle(io.BytesIO(stream.read()), str(path)), path)
    except CkptError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read ({error.strerror})", path=path) from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"not metadata of a torch Distributed Checkpoint ({type(error).__name__}: {error})",
            path=path,
            hint="The file is damaged or has another format. Copy it anew from where it was written.",
        ) from error


def _parse(saved: Any, path: Path) -> Metadata:
    if _class(saved) != "Metadata":
        raise ValueError(f"it holds {_class(saved)}")
    state = saved.state
    writer = "torch"
    extents: _Extents = {}
    names: dict[Any, str] = {}
    for index, info in (state["storage_data"] or {}).items():
        key = index.state
        offset = key.get("offset")
        place = None if offset is None else _sizes(offset)
        extents[key["fqn"], place] = _extent(info.state, names)
        writer = info.global_name.partition(".")[0]
    tensors: dict[str, SavedTensor] = {}
    objects: dict[str, Extent] = {}
    kinds: dict[type, str] = {}
    for name, entry in state["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise ValueError("a name that is not text")
        kind = kinds.get(type(entry)) or kinds.setdefault(type(entry), _class(entry))
        if kind == "TensorStorageMetadata":
            tensors[name] = _tensor(name, entry.state, extents, path)
        elif kind == "BytesStorageMetadata":
            objects[name] = _lookup(extents, name, None, path)
        else:
            raise ValueError(f"an entry of class {kind}")
    _refuse_surplus(extents, tensors, objects, path)
    _refuse_shared_bytes(tensors, path)
    # torch writes the key even where the value is None.
    paths = state["planner_data"]
    known = paths if isinstance(paths, dict) else {}
    for name in known and (tensors.keys() | objects.keys()) ^ known.keys():
        raise _damaged("planner_data and state_dict_metadata do not both have it", path, name)
    return Metadata(
        tensors=tensors,
        objects=objects,
        paths={n: _keys(n, p, path) for n, p in known.items() if isinstance(p, tuple | list)},
        version=state.get("version"),
        writer=writer,
    )


def _keys(name: str, keys: Sequence[Any], path: Path) -> KeyPath:
    """The keys of a flat name. The file has no checksum, but it has most names more than once."""
    if len(keys) == 1 and type(keys[0]) is str and keys[0] == name:
        return (name,)
    if not all(type(key) in (str, int) for key in keys):
        raise _damaged("its keys in planner_data are not names and numbers", path, name)
    if ".".join(map(str, keys)) != name:
        raise _damaged(
            f"its keys in planner_data, {list(keys)}, do not make up its name", path, name
        )
    return tuple(keys)


def _refuse_surplus(
    extents: _Extents,
    tensors: Mapping[str, SavedTensor],
    objects: Mapping[str, Extent],
    path: Path,
) -> None:
    """Refuse parts of no entry. Each entry has found its parts, so their numbers tell where none is left."""
    count = len(objects)
    for tensor in tensors.values():
        chunks = tensor.chunks
        count += len(chunks) if len(chunks) < 2 else len({chunk.offsets for chunk in chunks})
    if count == len(extents):
        return
    held = {(name, chunk.offsets) for name, tensor in tensors.items() for chunk in tensor.chunks}
    for name, place in extents.keys() - held - {(name, None) for name in objects}:
        where = "" if place is None else f" at {place}"
        raise _damaged(f"storage_data has a part{where} that state_dict_metadata lacks", path, name)


def _refuse_shared_bytes(tensors: Mapping[str, SavedTensor], path: Path) -> None:
    """Refuse parts that overlap. A safetensors file holds elements alone, and its places are relative."""
    runs: dict[str, list[tuple[int, int, str, Shape]]] = {}
    for name, tensor in tensors.items():
        itemsize = None if tensor.dtype is None else tensor.dtype.itemsize
        for chunk in tensor.chunks:
            file, start, length, _ = chunk.extent
            if itemsize is None or length != math.prod(chunk.sizes) * itemsize:
                run = (start, start + length, name, chunk.offsets)
                if file in runs:
                    runs[file].append(run)
                else:
                    runs[file] = [run]
    for file in sorted(runs):
        runs[file].sort()
        for run, following in pairwise(runs[file]):
            (_, stop, name, _), (start, _, after, _) = run, following
            # A chunk that is listed twice is refused later, because its tensor is not tiled.
            if start < stop and run != following:
                raise _damaged(f"its bytes in {file} are also those of {name}", path, after)


def _damaged(fact: str, path: Path, tensor: str) -> DamagedCheckpoint:
    hint = "The metadata is damaged or was edited. Copy it anew from where it was written."
    return DamagedCheckpoint(fact, path=path, tensor=tensor, hint=hint)


def _class(value: Any) -> str:
    name = value.global_name if isinstance(value, Opaque) else type(value).__name__
    return str(name).rpartition(".")[2]


def _sizes(value: Any) -> Shape:
    sizes = tuple(value)
    for n in sizes:
        if type(n) is not int or n < 0:
            raise ValueError(f"sizes {sizes}")
    return sizes


def _extent(info: Mapping[str, Any], names: dict[Any, str]) -> Extent:
    start, length = info["offset"], info["length"]
    name = names.get(info["relative_path"])
    if name is None:
        name = names[info["relative_path"]] = _inner_name(info["relative_path"])
    if (
        type(start) is not int
        or type(length) is not int
        or not 0 <= start < 1 << 63
        or not 0 <= length < 1 << 63
    ):
        raise ValueError("a run of bytes that is no range of numbers")
    transforms = tuple(info.get("transform_descriptors") or ())
    if transforms and not all(isinstance(one, str) for one in transforms):
        raise ValueError("a transform without a name")
    return Extent(name, start, length, transforms)


def _inner_name(name: Any) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"a data file outside the directory: {name}")
    return str(path)


def _tensor(name: str, state: Mapping[str, Any], extents: _Extents, path: Path) -> SavedTensor:
    dtype = state["properties"].state[0]
    shape = _sizes(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a chunk of another rank in {name}")
        chunks.append(Chunk(offsets, sizes, _lookup(extents, name, offsets, path)))
    if isinstance(dtype, DType):
        return SavedTensor(dtype, shape, tuple(chunks))
    unknown = str(getattr(dtype, "global_name", dtype))
    return SavedTensor(None, shape, tuple(chunks), unknown)


def _lookup(extents: _Extents, name: str, offsets: Shape | None, path: Path) -> Extent:
    try:
        return extents[name, offsets]
    except KeyError:
        where = "" if offsets is None else f" at {offsets}"
        raise _damaged(f"no file holds its part{where}", path, name) from None


def _merged(parts: list[Metadata], files: list[Path]) -> Metadata:
    """The merged metadata of all ranks; equal boxes of several ranks are taken from the first."""
    tensors: dict[str, SavedTensor] = {}
    objects: dict[str, Extent] = {}
    paths: dict[str, KeyPath] = {}
    for part, path in zip(parts, files, strict=True):
        for name, tensor in part.tensors.items():
            first = tensors.get(name)
            if first is None:
                tensors[name] = tensor
                continue
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                raise DamagedCheckpoint(
                    f"it is {tensor.dtype} {tensor.shape} here, but {first.dtype} {first.shape} in the "
                    "metadata of another rank: the files belong to different saves",
                    path=path,
                    tensor=name,
                )
            held = {(chunk.offsets, chunk.sizes) for chunk in first.chunks}
            new = [c for c in tensor.chunks if (c.offsets, c.sizes) not in held]
            tensors[name] = SavedTensor(first.dtype, first.shape, (*first.chunks, *new))
        objects = {**part.objects, **objects}
        paths = {**part.paths, **paths}
    first_part = parts[0]
    return Metadata(tensors, objects, paths, first_part.version, first_part.writer, len(parts))
