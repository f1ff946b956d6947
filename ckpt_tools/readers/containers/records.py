"""The records of torch files and the CRC-32 that each was written with.

Owns the step from any file to the byte ranges that can be checked. A file of ``torch.save`` is one zip
archive; a ``.distcp`` file holds one archive after the other. Other files, and archives that were saved
without checksums (``torch.serialization.set_crc32_options(False)``), have none.

Sources: ``caffe2/serialize/inline_container.cc``; PKWARE's APPNOTE.TXT, 4.3 (local headers), 4.5 (extra
    fields).
"""

from __future__ import annotations

import io
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.places import Distant, Readable, Region, read_fully
from ckpt_tools.storage.reading import open_for_reading

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_EXTRA = struct.Struct("<HH")
_SIGNATURE = b"PK\x03\x04"
_HAS_DESCRIPTOR = 1 << 3
_UTF8 = 1 << 11


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one record.

    Attributes:
        name: its name in the archive.
        start, stop: its bytes in the file.
        crc: their CRC-32 when they were written.
    """

    name: str
    start: int
    stop: int
    crc: int


def data_start(
    stream: io.BufferedIOBase | io.RawIOBase, info: zipfile.ZipInfo, path: Path, hint: str
) -> int:
    """First byte of the data of a record, after a local header that agrees with the central directory.

    Raises:
        DamagedCheckpoint: the local header says anything else than the central directory.
    """
    stream.seek(info.header_offset)
    header = stream.read(LOCAL_HEADER.size) or b""
    if len(header) < LOCAL_HEADER.size or header[:4] != _SIGNATURE:
        raise _misplaced(info, path, hint)
    values = LOCAL_HEADER.unpack(header)
    _, _, flags, method, _, _, crc, _, size, name_length, extra_length = values
    tail = stream.read(name_length + extra_length) or b""
    name, extra = tail[:name_length], tail[name_length:]
    coding = "utf-8" if flags & _UTF8 else "cp437"
    # Data descriptors follow the data; the fields before it are zero then, or those of zip64.
    counts = () if flags & _HAS_DESCRIPTOR else ((crc, info.CRC or 0), (size, info.file_size))
    agrees = (
        flags == info.flag_bits
        and method == info.compress_type
        and len(extra) == extra_length
        and name == info.orig_filename.encode(coding, "surrogateescape")
        and all(own in (stated, 0xFFFFFFFF) for own, stated in counts)
        and _is_list_of_fields(extra)
    )
    if not agrees:
        raise _misplaced(info, path, hint)
    return info.header_offset + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _is_list_of_fields(extra: bytes) -> bool:
    at = 0
    while at + _EXTRA.size <= len(extra):
        at += _EXTRA.size + _EXTRA.unpack_from(extra, at)[1]
    return at == len(extra)


def _misplaced(info: zipfile.ZipInfo, path: Path, hint: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the header of record {info.filename} is not what the directory of the file says",
        path=path,
        hint=hint,
    )


class Records:
    """The records of one file that have a checksum, found by their position.

    Args:
        path: any file.
        hint: the next step where the file is damaged.

    Raises:
        DamagedCheckpoint: the file cannot be opened.
    """

    def __init__(self, path: Path, hint: str) -> None:
        self.path, self.hint = path, hint
        self._infos: list[zipfile.ZipInfo] = []
        try:
            self._size = path.stat().st_size
            self._file: Readable = open_for_reading(path)
        except OSError as error:
            raise DamagedCheckpoint(f"cannot be opened ({error.strerror})", path=path) from error
        for archive in self._archives():
            self._infos += [info for info in archive if info.compress_type == zipfile.ZIP_STORED]
        self._infos.sort(key=lambda info: info.header_offset)
        self._offsets = [info.header_offset for info in self._infos]

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __bool__(self) -> bool:
        return bool(self._infos)

    @property
    def signature(self) -> tuple[tuple[int, int, int], ...]:
        """Place, size and CRC-32 of every record: files that have the same hold the same bytes."""
        return tuple((info.header_offset, info.file_size, info.CRC) for info in self._infos)

    def _archives(self) -> Iterator[list[zipfile.ZipInfo]]:
        """The archives of the file, the last one first; none where they do not fill it."""
        found: list[list[zipfile.ZipInfo]] = []
        end = self._size
        while end:
            region = Region(_borrowed(self._file), 0, end)
            try:
                if region.read(len(_SIGNATURE)) != _SIGNATURE:
                    return
                with zipfile.ZipFile(io.BufferedReader(region)) as archive:
                    infos = archive.infolist()
            except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError):
                return
            if not infos:
                return
            found.append(infos if any(info.CRC for info in infos) else [])
            start = min(info.header_offset for info in infos)
            if not 0 <= start < end:
                return
            end = start
        yield from found

    def holding(self, start: int, stop: int) -> Iterator[Record]:
        """The records of which any byte lies in ``[start, stop)``.

        Raises:
            DamagedCheckpoint: a header does not agree with the directory.
        """
        first = max(bisect_right(self._offsets, start) - 1, 0)
        with io.BufferedReader(Region(_borrowed(self._file), 0, self._size)) as stream:
            for info in self._infos[first:]:
                if info.header_offset >= stop:
                    break
                begin = data_start(stream, info, self.path, self.hint)
                if begin < stop and start < begin + info.file_size:
                    yield Record(info.filename, begin, begin + info.file_size, info.CRC)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of the file, as far as there are any."""
        data = bytearray(max(min(stop, self._size) - start, 0))
        count = read_fully(self._file, memoryview(data), start)
        return bytes(data[:count])


class _Borrowed:
    """A file that stays open when a stream over it is closed."""

    def __init__(self, file: Readable) -> None:
        self._file = file

    def read_into(self, view: memoryview, offset: int) -> int:
        return self._file.read_into(view, offset)

    def close(self) -> None:
        pass


class _BorrowedFar(_Borrowed):
    """The same of a file in a store."""

    def __init__(self, file: Distant) -> None:
        super().__init__(file)
        self._far = file

    def peek_into(self, view: memoryview, offset: int) -> int:
        return self._far.peek_into(view, offset)


def _borrowed(file: Readable) -> Readable:
    return _BorrowedFar(file) if isinstance(file, Distant) else _Borrowed(file)
