"""Owns the bytes of a chunk: the place of a box's elements in the file that a rank wrote.

Each chunk is the output of ``torch.save`` for one tensor. Its pickle is checked against the metadata, and
its elements are read in place, by their strides where the tensor was permuted (channels last, a transposed
weight). Chunks that are compressed with zstd are unpacked to a temporary file, which is removed at exit.

Source: ``torch/distributed/checkpoint/filesystem.py`` (``_write_item``, ``_SerialCpuLoader``) and
``_extension.py`` (``ZStandard``), read at torch 2.13.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ckpt_tools.errors import DamagedCheckpoint, OutputFailed, UnsafePickle, UnsupportedLayout
from ckpt_tools.readers.containers.subclasses import plain
from ckpt_tools.readers.containers.torch_file import TorchFile, layout_of
from ckpt_tools.readers.dcp.metadata import Chunk
from ckpt_tools.storage.places import Region
from ckpt_tools.storage.reading import open_for_reading, read_at
from ckpt_tools.storage.temporary import TemporaryFolder
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Shape, Strided
from ckpt_tools.tensors.deferred import DeferredFragment, Place
from ckpt_tools.tensors.dtypes import DType

_ZSTD = "stream.zstd/1"
_BLOCK = 1 << 20
# The start of a zip record's own header, and the offset of the content's checksum in it.
_RECORD = b"PK\x03\x04"
_CHECKSUM_AT = 14
# torch adds less than this to the elements of one tensor. A chunk that expands further is not from torch.
_MOST_OVERHEAD = 1 << 20
# The memory of unpacking; torch writes windows of 2 MiB.
_WINDOW = 1 << 27
STALE = (
    "The file belongs to another save than the metadata, or is truncated or damaged. Copy both anew from "
    "where they were written."
)


@dataclass(frozen=True, slots=True)
class _Head:
    """The bytes of a chunk before its elements, and the offset of the elements' checksum in them."""

    content: bytes
    checksum: int
    layout: Strided | None

    def begins(self, content: bytes) -> bool:
        """Whether another chunk of the same length, dtype and shape has these bytes, except the checksum."""
        at, end = self.checksum, self.checksum + 4
        return content[:at] == self.content[:at] and content[end:] == self.content[end:]


class ChunkStore:
    """The state that the chunks of one checkpoint share.

    Chunks of one shape start with the same bytes, and there may be thousands of a shape. The first is
    parsed, the others are compared with it. Unpacked chunks go to a temporary
    directory, which is removed with this object or at exit.
    """

    def __init__(self) -> None:
        self.heads: dict[tuple[DType, Shape, int], _Head] = {}
        self._lock = threading.Lock()
        self._directory: TemporaryFolder | None = None

    def __reduce__(self) -> tuple[Callable[..., ChunkStore], tuple[()]]:
        """Pickle an empty store: the temporary directory belongs to this machine."""
        return ChunkStore, ()

    @contextlib.contextmanager
    def new_file(self, source: Path) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file, and a stream to write it.

        Raises:
            OutputFailed: it cannot be written.
        """
        try:
            with self._lock:
                if self._directory is None:
                    self._directory = TemporaryFolder()
            with tempfile.NamedTemporaryFile(dir=self._directory.path, delete=False) as stream:
                yield Path(stream.name), stream
        except OSError as error:
            raise OutputFailed(
                f"a part of it cannot be unpacked into {tempfile.gettempdir()} ({error.strerror})",
                path=source,
                hint="Set TMPDIR to a directory with room for the weights.",
            ) from error


class ChunkFragment(DeferredFragment):
    """A box in a rank's file, as ``torch.save`` wrote it.

    Args:
        region: the elements of the box.
        source: the rank's file.
        chunk: its place in that file.
        dtype: element type in the metadata.
        name: the name of the tensor, for errors.
        store: shared by the chunks of the checkpoint.
    """

    __slots__ = ("_chunk", "_dtype", "_name", "_source", "_store")
    _chunk: Chunk
    _dtype: DType
    _name: str
    _source: Path
    _store: ChunkStore

    def __init__(
        self,
        region: FlatRange | Box,
        source: Path,
        chunk: Chunk,
        dtype: DType,
        name: str,
        store: ChunkStore,
    ) -> None:
        super().__init__(region)
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_chunk", chunk)
        object.__setattr__(self, "_dtype", dtype)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_store", store)

    def __reduce__(self) -> tuple[Callable[..., Fragment], tuple[object, ...]]:
        """Pickle the source of an unpacked chunk, so that another machine unpacks it anew."""
        if self._chunk.extent.transforms:
            parts = (self.region, self._source, self._chunk, self._dtype, self._name, self._store)
            return ChunkFragment, parts
        return super().__reduce__()

    def find_place(self) -> Place:
        """The place of the elements, after a check against the metadata.

        Raises:
            DamagedCheckpoint: the chunk does not agree with the metadata.
            UnsafePickle: its pickle cannot be read without running code.
            UnsupportedLayout: it is compressed, and the package to unpack it is missing.
            OutputFailed: it cannot be unpacked.
        """
        path, extent = self._source, self._chunk.extent
        if extent.transforms:
            return self._checked(TorchFile(self._unpacked(path)))
        key = (self._dtype, self._chunk.sizes, extent.length)
        head = self._store.heads.get(key)
        if head is not None and head.begins(self._first(len(head.content))):
            return Place(path, extent.start + len(head.content), head.layout)
        file = TorchFile(path, extent.start, extent.length)
        place = self._checked(file)
        self._store.heads[key] = self._head(place)
        return place

    def _checked(self, file: TorchFile) -> Place:
        """The place of the elements, after the pickle was compared with the metadata."""
        path, start = self._source, self._chunk.extent.start
        try:
            value = file.load()
        except UnsafePickle:
            raise
        except DamagedCheckpoint as error:
            raise self._wrong(
                path, f"there is no tensor at byte {start:,} ({error.fact})"
            ) from error
        ref = plain(value, path, self._name)
        if ref is None:
            raise self._wrong(path, f"the value at byte {start:,} is not a tensor")
        if (ref.dtype, ref.shape) != (self._dtype, self._chunk.sizes):
            raise self._wrong(
                path,
                f"the tensor at byte {start:,} is {ref.dtype} {ref.shape}, the metadata "
                f"states {self._dtype} {self._chunk.sizes}",
            )
        return Place(file.path, ref.byte_offset, layout_of(ref))

    def _first(self, count: int) -> bytes:
        """The first bytes of the chunk."""
        try:
            return read_at(self._source, self._chunk.extent.start, count)
        except OSError as error:
            raise self._wrong(self._source, f"cannot be read ({error.strerror})") from error

    def _head(self, place: Place) -> _Head:
        """The head of a parsed chunk, which ends with the header of the elements' record."""
        content = self._first(place.offset - self._chunk.extent.start)
        return _Head(content, content.rindex(_RECORD) + _CHECKSUM_AT, place.layout)

    def _wrong(self, path: Path, fact: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(fact, path=path, hint=STALE)

    def _unpacked(self, path: Path) -> Path:
        """The chunk, decompressed."""
        try:
            import zstandard
        except ImportError:
            raise UnsupportedLayout(
                "its chunks are compressed with zstd, and the package `zstandard` is not installed",
                path=path,
                hint='Install it: pip install "ckpt-tools[zstd]"',
            ) from None
        extent = self._chunk.extent
        room = math.prod(self._chunk.sizes) * self._dtype.itemsize + _MOST_OVERHEAD
        with self._store.new_file(path) as (copy, stream):
            try:
                with (
                    _run(path, extent.start, extent.length) as packed,
                    zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(
                        packed
                    ) as plain,
                ):
                    while block := plain.read(_BLOCK):
                        stream.write(block)
                        room -= len(block)
                        if room < 0:
                            raise self._wrong(path, "a compressed chunk holds more than its tensor")
            except zstandard.ZstdError as error:
                raise self._wrong(path, f"a compressed chunk is damaged ({error})") from error
        return copy


def _run(path: Path, offset: int, length: int) -> io.BufferedReader:
    """A run of a file's bytes as a stream."""
    return io.BufferedReader(Region(open_for_reading(path), offset, length))


def check_transforms(chunk: Chunk, path: Path) -> None:
    """Refuse transforms that this module cannot undo.

    Raises:
        UnsupportedLayout: the chunk is encrypted, or compressed in another way than zstd.
    """
    if chunk.extent.transforms not in ((), (_ZSTD,)):
        raise UnsupportedLayout(
            f"its chunks were transformed by {', '.join(chunk.extent.transforms)}",
            path=path,
            hint=f"Only {_ZSTD} is supported. Save the checkpoint again without extensions.",
        )


def is_bare(chunk: Chunk, dtype: DType) -> bool:
    """Whether a chunk's bytes are its elements alone, as in a safetensors file.

    The output of ``torch.save`` is always longer than the elements.
    """
    extent = chunk.extent
    return not extent.transforms and extent.length == math.prod(chunk.sizes) * dtype.itemsize
