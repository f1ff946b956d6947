"""Owns the containers of ``torch.save``: the place of each storage's bytes, without reading tensor data.

torch writes two containers: the zip file (each storage is one uncompressed record) and the legacy stream
(pickles, then the storages one after the other). ``restricted_pickle`` reads the pickles in them.

Source: ``torch/serialization.py`` (``_save``, ``_legacy_save``) and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.records import data_start
from ckpt_tools.readers.containers.restricted_pickle import Opaque, StorageRef, TensorRef, unpickle
from ckpt_tools.storage.places import Region
from ckpt_tools.storage.reading import open_for_reading
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Shape, Stored, Strided
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.runs import span_of

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Compressed records are read up to this size.
_LARGEST_SMALL = 1 << 10
# What zipfile raises for a file that is not what it says.
_NO_ZIP = (
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_LOAD_AND_SAVE = (
    "Load it with torch where it was written, and save plain contiguous tensors with torch.save."
)
# A few bytes of an expanded tensor can stand for any number of elements.
_MOST_REPEATED = 1 << 30
_COPY_ANEW = "The file is truncated or was overwritten. Copy it anew from where it was written."


@dataclass(slots=True)
class ZipStorage(StorageRef):
    """A storage that is a record of a torch zip file."""

    file: TorchFile
    record: zipfile.ZipInfo
    dtype: DType
    numel: int
    _offset: int = -1

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.file.path

    @property
    def data_offset(self) -> int:
        """First byte of the record's data.

        The central directory has the place of the record's own header. Only that header has its length
        (torch pads it so that the data starts at a multiple of 64).
        """
        if self._offset < 0:
            with self.file.open() as stream:
                start = data_start(stream, self.record, self.path, _COPY_ANEW)
            if start + self.record.file_size > self.file.size:
                raise DamagedCheckpoint(
                    f"record {self.record.filename} extends beyond the end of the file",
                    path=self.path,
                    hint=_COPY_ANEW,
                )
            self._offset = self.file.offset + start
        return self._offset


@dataclass(slots=True)
class StreamStorage(StorageRef):
    """A storage of a legacy file; its place is known after the whole stream was read."""

    file: TorchFile
    dtype: DType
    numel: int
    start: int = -1

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.file.path

    @property
    def data_offset(self) -> int:
        """First byte of its data."""
        return self.start


class TorchFile:
    """One file written by ``torch.save``, or a region of a file with many of them.

    Args:
        path: the file.
        offset: the first byte of the region.
        length: bytes of the region; None for all up to the end of the file.

    Attributes:
        size: bytes in the region.
        is_zip: False for torch's legacy container.
        root: after :meth:`load`, the folder of the records. ``torch.save`` to a path names it after the file.
    """

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self.offset = offset
        try:
            rest = path.stat().st_size - offset
            self.size = rest if length is None else length
            with self.open() as stream:
                magic = stream.read(4)
        except OSError as error:
            raise DamagedCheckpoint(
                f"cannot be read ({error.strerror})", path=path, hint="Check its permissions."
            ) from error
        if self.size > rest:
            raise DamagedCheckpoint(
                f"it must have {offset + self.size:,} bytes and has {offset + rest:,}",
                path=path,
                hint=_COPY_ANEW,
            )
        if not self.size:
            raise DamagedCheckpoint("the file is empty", path=path, hint=_COPY_ANEW)
        self.is_zip = magic == b"PK\x03\x04"
        self.root: str | None = None

    def open(self) -> io.BufferedReader:
        """A stream of the region."""
        return io.BufferedReader(Region(open_for_reading(self.path), self.offset, self.size))

    def load(self) -> Any:
        """The saved object, with tensors as :class:`TensorRef`.

        Raises:
            DamagedCheckpoint: the file is truncated, or not written by ``torch.save``.
            UnsafePickle: the objects cannot be built without code from the file.
            UnsupportedLayout: it is a TorchScript archive, big-endian, or has compressed records.
        """
        return self._load_zip() if self.is_zip else self._load_legacy()

    def _load_zip(self) -> Any:
        try:
            with self.open() as stream, zipfile.ZipFile(stream) as archive:
                records = {info.filename: info for info in archive.infolist()}
                if not any(info.CRC for info in records.values()):
                    # Saved without checksums: torch.serialization.set_crc32_options(False).
                    for info in records.values():
                        info.CRC = None  # type: ignore[assignment]
                pickles = [name for name in records if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise DamagedCheckpoint(
                        "a zip file that torch.save did not write", path=self.path
                    )
                root = pickles[0].removesuffix("data.pkl")
                self.root = root.removesuffix("/")
                if f"{root}constants.pkl" in records:
                    raise UnsupportedLayout(
                        "a TorchScript archive, not a checkpoint",
                        path=self.path,
                        hint="Load it with torch.jit.load, and save its state_dict() with torch.save.",
                    )
                if records[pickles[0]].compress_type != zipfile.ZIP_STORED:
                    raise self._compressed()
                order = f"{root}byteorder"
                if order in records and _small(archive, records[order]) != b"little":
                    raise UnsupportedLayout(
                        "written on a big-endian machine", path=self.path, hint=_LOAD_AND_SAVE
                    )
                pickled = records[pickles[0]]
                if max(pickled.file_size, pickled.compress_size) > self.size:
                    raise zipfile.BadZipFile("its pickle extends beyond the end of the file")
                data = archive.read(pickles[0])
        except _NO_ZIP as error:
            raise DamagedCheckpoint(
                f"not a complete torch file ({error})", path=self.path, hint=_COPY_ANEW
            ) from error

        storages: dict[str, ZipStorage] = {}

        def resolve(pid: tuple[Any, ...]) -> ZipStorage | Opaque:
            dtype, key, numel = self._storage_id(pid)
            if dtype is None:
                return Opaque(*pid)
            record = records.get(f"{root}data/{key}")
            if record is None:
                raise DamagedCheckpoint(
                    f"storage {key} is missing", path=self.path, hint=_COPY_ANEW
                )
            if record.compress_type != zipfile.ZIP_STORED:
                raise self._compressed()
            if numel * dtype.itemsize > record.file_size:
                raise DamagedCheckpoint(
                    f"storage {key} is shorter than recorded", path=self.path, hint=_COPY_ANEW
                )
            return storages.setdefault(key, ZipStorage(self, record, dtype, numel))

        return unpickle(io.BytesIO(data), str(self.path), resolve)

    def _compressed(self) -> UnsupportedLayout:
        return UnsupportedLayout(
            "its records are compressed; torch.save never does that",
            path=self.path,
            hint="Unpack and repack the file without compression.",
        )

    def _load_legacy(self) -> Any:
        path = str(self.path)
        storages: dict[str, StreamStorage] = {}

        def resolve(pid: tuple[Any, ...]) -> StreamStorage:
            dtype, key, numel = self._storage_id(pid)
            if dtype is None:
                raise UnsupportedLayout(
                    "a storage has an unknown type, so its length is unknown",
                    path=path,
                    hint=_LOAD_AND_SAVE,
                )
            return storages.setdefault(key, StreamStorage(self, dtype, numel))

        with self.open() as stream:
            if stream.read(1) != b"\x80":
                raise DamagedCheckpoint("not a file of torch.save", path=path)
            stream.seek(0)
            magic = unpickle(stream, path)
            if magic != _LEGACY_MAGIC:
                raise DamagedCheckpoint("a pickle that torch.save did not write", path=path)
            unpickle(stream, path)
            system = unpickle(stream, path)
            if isinstance(system, dict) and not system.get("little_endian", True):
                raise UnsupportedLayout(
                    "written on a big-endian machine", path=path, hint=_LOAD_AND_SAVE
                )
            saved = unpickle(stream, path, resolve)
            keys = unpickle(stream, path)
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise DamagedCheckpoint("its list of storages is malformed", path=path)
            self._place_storages(stream, storages, keys)
        return saved

    def _place_storages(
        self, stream: io.BufferedReader, storages: dict[str, StreamStorage], keys: Any
    ) -> None:
        for key in keys:
            header = stream.read(8)
            storage = storages.get(key)
            if storage is None or len(header) < 8:
                raise DamagedCheckpoint(
                    f"storage {key} is missing", path=self.path, hint=_COPY_ANEW
                )
            storage.start = stream.tell()
            numel = int.from_bytes(header, "little")
            end = storage.start + storage.numel * storage.dtype.itemsize
            if numel != storage.numel or end > self.size:
                raise DamagedCheckpoint(
                    f"storage {key} is shorter than recorded", path=self.path, hint=_COPY_ANEW
                )
            stream.seek(end)
        if any(storage.start < 0 for storage in storages.values()):
            raise DamagedCheckpoint("a storage has no data", path=self.path, hint=_COPY_ANEW)

    def _storage_id(self, pid: tuple[Any, ...]) -> tuple[DType | None, str, int]:
        """Element type (None if unknown), key and number of elements."""
        if (
            len(pid) < 5
            or type(pid[0]) is not str
            or pid[0] != "storage"
            or type(pid[2]) is not str
            or type(pid[4]) is not int
            or not 0 <= pid[4] < 1 << 63
        ):
            raise DamagedCheckpoint("the pickle has an unknown kind of reference", path=self.path)
        return pid[1] if isinstance(pid[1], DType) else None, pid[2], pid[4]


def _small(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
    """A record of a few bytes, also where it is compressed.

    Raises:
        zipfile.BadZipFile: it is larger.
    """
    if record.file_size > _LARGEST_SMALL:
        raise zipfile.BadZipFile(f"record {record.filename} has {record.file_size:,} bytes")
    with archive.open(record) as stream:
        return stream.read(_LARGEST_SMALL)


def refuse_exchanged(file: TorchFile, rank_of: Callable[[str], object]) -> None:
    """Refuse a rank's file that was saved as the file of another rank.

    Files whose root has no such name are let pass: ``torch.save`` to a stream calls it ``archive``, and users
    rename files.

    Args:
        file: a file that was loaded.
        rank_of: the rank that a file name states; None for other names.

    Raises:
        DamagedCheckpoint: the records are under the name of another rank's file.
    """
    saved_as = f"{file.root}{file.path.suffix}"
    if rank_of(saved_as) not in (None, rank_of(file.path.name)):
        raise DamagedCheckpoint(
            f"its content was saved as {saved_as}: files of two ranks were exchanged, or one was "
            "copied over the other",
            path=file.path,
            hint=(
                f"{saved_as} lies beside it: if that file is good, move this one away. If not, copy the "
                "files of this checkpoint again from where they were written."
                if file.path.with_name(saved_as).is_file()
                else "Copy the files of this checkpoint again from where they were written."
            ),
        )


def contiguous(ref: TensorRef, what: str) -> TensorRef:
    """``ref``, after a check that it is one contiguous run."""
    if not ref.is_contiguous:
        raise UnsupportedLayout(
            f"{what} is not contiguous", path=ref.storage.path, hint=_LOAD_AND_SAVE
        )
    return ref


def layout_of(ref: TensorRef, shape: Shape | None = None) -> Strided | None:
    """How the elements of a tensor lie in its storage; None for row-major order.

    Args:
        ref: the tensor.
        shape: sizes of the layout, if they differ from those of ``ref`` in axes of size 1 alone.
    """
    if ref.is_contiguous:
        return None
    nbytes = ref.numel * ref.dtype.itemsize
    if nbytes > _MOST_REPEATED and ref.numel > span_of(ref.shape, ref.stride):
        raise UnsupportedLayout(
            f"a tensor of {nbytes:,} bytes repeats its elements (its strides are {ref.stride})",
            path=ref.storage.path,
            hint="Call contiguous() on it in the training script, and save again.",
        )
    axes = [(n, step) for n, step in zip(ref.shape, ref.stride, strict=True) if n != 1]
    if shape is None or [n for n in shape if n != 1] != [n for n, _ in axes]:
        return Strided(ref.shape, ref.stride)
    steps = iter(step for _, step in axes)
    return Strided(shape, tuple(next(steps) if n != 1 else 0 for n in shape))


def stored(ref: TensorRef, shape: Shape | None = None) -> Stored:
    """The tensor of these elements, which lie in one storage of one file."""
    shape = ref.shape if shape is None else shape
    if math.prod(shape) != ref.numel:
        raise DamagedCheckpoint(
            f"a tensor has {ref.numel} elements, but {tuple(shape)} was recorded",
            path=ref.storage.path,
        )
    region = FlatRange(0, ref.numel)
    fragments = [Fragment(ref.storage.path, ref.byte_offset, region, layout_of(ref, shape))]
    if not ref.numel:
        fragments = []
    return Stored(ref.dtype, shape, fragments)
