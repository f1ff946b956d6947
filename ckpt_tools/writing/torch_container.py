"""Owns the container of ``torch.save``: a zip archive whose records are the storages of a state dict.

Every place is known before a byte is written: each record is stored as it is, and its data begins at a
multiple of 64, as in torch's files, so that the file can be mapped. What follows from the data, the checksum
of each record, is written last (:class:`Archive`). The pickle has the opcodes that ``torch.load`` allows with
``weights_only``, and is the same on every machine. Names of one tensor share its storage. The records
``.format_version`` and ``.storage_alignment`` are left out: by them torch would compute places as its own
writer lays them out, with descriptors after the data.

Sources: ``caffe2/serialize/inline_container.cc``, ``torch/serialization.py`` (``_save``),
``torch/_tensor.py`` (``__reduce_ex__``); PKWARE's APPNOTE.TXT, 4.3 to 4.5.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import Shape, row_major_strides
from ckpt_tools.tensors.dtypes import BY_STORAGE_CLASS, DType
from ckpt_tools.tensors.regions import is_possible

_ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_UTF8 = 1 << 11
_LARGE, _MANY = 0xFFFFFFFF, 0xFFFF
_ZIP64, _PADDING = 0x0001, 0x4246
_VERSION, _VERSION64 = 20, 45
# 1980-01-01, the first day of the format: the bytes do not depend on the time.
_DATE = 1 << 5 | 1
# Classes of storages by dtype; torch writes other dtypes beside an untyped storage.
_CLASSES = {
    dtype.name: name for name, dtype in BY_STORAGE_CLASS.items() if name != "UntypedStorage"
}
_MOST_BYTES_OF_INT = 9


@dataclass(frozen=True, slots=True)
class Member:
    """One record of an archive.

    Attributes:
        name: its name.
        header: byte of the file at which its local header begins.
        start: byte at which its data begins.
        nbytes: bytes of data.
        crc: their CRC-32, where they are known before they are written.
    """

    name: bytes
    header: int
    start: int
    nbytes: int
    crc: int | None = None

    def local(self, crc: int) -> bytes:
        """The local header, padded up to the data."""
        is_large = self.nbytes >= _LARGE
        size = _LARGE if is_large else self.nbytes
        extra = struct.pack("<2H2Q", _ZIP64, 16, self.nbytes, self.nbytes) if is_large else b""
        left = self.start - self.header - _LOCAL.size - len(self.name) - len(extra) - 4
        extra += struct.pack("<2H", _PADDING, left) + b"Z" * left
        version = _VERSION64 if is_large else _VERSION
        fields = (version, _UTF8, 0, 0, _DATE, crc, size, size, len(self.name), len(extra))
        return _LOCAL.pack(b"PK\3\4", *fields) + self.name + extra

    def central(self, crc: int) -> bytes:
        """The entry of the central directory."""
        values = (self.nbytes, self.nbytes, self.header)
        large = [value for value in values if value >= _LARGE]
        extra = struct.pack(f"<2H{len(large)}Q", _ZIP64, 8 * len(large), *large) if large else b""
        version = _VERSION64 if large else _VERSION
        packed, size, offset = (min(value, _LARGE) for value in values)
        sizes = (packed, size, len(self.name), len(extra), 0, 0, 0, 0, offset)
        fields = (version, version, _UTF8, 0, 0, _DATE, crc, *sizes)
        return _CENTRAL.pack(b"PK\1\2", *fields) + self.name + extra


@dataclass(frozen=True)
class Archive:
    """What is written around the data of one file; see ``Closing`` of :mod:`ckpt_tools.writing.layout`.

    Attributes:
        members: the records, in the order of the file.
        end: byte after the last record.
    """

    members: tuple[Member, ...]
    end: int

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First byte and end of the records whose CRC-32 follow from the data."""
        return [(m.start, m.start + m.nbytes) for m in self.members if m.crc is None]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.end + len(self._directory([m.crc or 0 for m in self.members]))

    def parts(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Each place and the bytes to write there.

        Args:
            checksums: the CRC-32 of each of :attr:`ranges`.
        """
        found = iter(checksums)
        crcs = [next(found) if member.crc is None else member.crc for member in self.members]
        for member, crc in zip(self.members, crcs, strict=True):
            if member.crc is None:
                yield member.header, member.local(crc)
        yield self.end, self._directory(crcs)

    def _directory(self, crcs: Sequence[int]) -> bytes:
        entries = b"".join(m.central(crc) for m, crc in zip(self.members, crcs, strict=True))
        count, size, start = len(self.members), len(entries), self.end
        versions = (_VERSION64, _VERSION64, 0, 0)
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, *versions, count, count, size, start)
        locator = _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
        counts = (min(count, _MANY), min(count, _MANY), min(size, _LARGE), min(start, _LARGE))
        return entries + end64 + locator + _END.pack(b"PK\5\6", 0, 0, *counts, 0)


def archive(
    root: str, layouts: Mapping[str, tuple[DType, Shape]], seconds: Mapping[str, str]
) -> tuple[bytes, dict[str, int], Archive]:
    """The first bytes of a file, the byte at which each tensor begins, and what is written last.

    Args:
        root: the folder of the records; torch names it after the file.
        layouts: dtype and shape of each tensor, by name, in the order of the file.
        seconds: second names of tensors, each with the name in ``layouts``.

    Raises:
        UnsupportedLayout: torch has no such dtype or shape.
    """
    state = _pickled(layouts, seconds)
    header, members = b"", list[Member]()
    for name, content in (("data.pkl", state), ("byteorder", b"little"), ("version", b"3\n")):
        member = _member(f"{root}/{name}", len(header), len(content), zlib.crc32(content))
        header += member.local(zlib.crc32(content)) + content
        members.append(member)
    starts, end = {}, len(header)
    for number, (name, (dtype, shape)) in enumerate(layouts.items()):
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        member = _member(f"{root}/data/{number}", end, nbytes)
        members.append(member)
        starts[name], end = member.start, member.start + nbytes
    return header, starts, Archive(tuple(members), end)


def _member(name: str, header: int, nbytes: int, crc: int | None = None) -> Member:
    text = name.encode()
    # The extra fields: sizes of a large record, and padding with its own head.
    first = header + _LOCAL.size + len(text) + (20 if nbytes >= _LARGE else 0) + 4
    return Member(text, header, -(-first // _ALIGNMENT) * _ALIGNMENT, nbytes, crc)


def _pickled(layouts: Mapping[str, tuple[DType, Shape]], seconds: Mapping[str, str]) -> bytes:
    """A dict of tensors as ``torch.save`` pickles it, without a memo."""
    numbers = {name: number for number, name in enumerate(layouts)}
    names: dict[str, list[str]] = {name: [name] for name in layouts}
    for second, kept in seconds.items():
        names[kept].append(second)
    items = b"".join(
        _text(name) + _tensor(numbers[kept], kept, *layouts[kept])
        for kept, every in names.items()
        for name in every
    )
    return (
        pickle.PROTO
        + b"\2"
        + pickle.EMPTY_DICT
        + pickle.MARK
        + items
        + pickle.SETITEMS
        + pickle.STOP
    )


def _tensor(number: int, name: str, dtype: DType, shape: Shape) -> bytes:
    if not is_possible(shape) or not dtype.safetensors:
        raise UnsupportedLayout(
            f"a tensor of dtype {dtype} and shape {list(shape)} is not written",
            tensor=name,
            hint="Leave it out with a --key-map FILE that gives it the name null, or cast it in the "
            "training script and save again.",
        )
    numel = 1
    for size in shape:
        numel *= size
    typed = _CLASSES.get(dtype.name)
    kind = _global("torch", typed) if typed else _global("torch.storage", "UntypedStorage")
    count = numel if typed else numel * dtype.itemsize
    storage = _tuple(_text("storage"), kind, _text(str(number)), _text("cpu"), _int(count))
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = [
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, row_major_strides(shape))),
        pickle.NEWFALSE,
        hooks,
    ]
    if not typed:
        arguments.append(_global("torch", dtype.name))
    rebuild = _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    return rebuild + _tuple(*arguments) + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    return pickle.LONG1 + bytes([_MOST_BYTES_OF_INT]) + value.to_bytes(_MOST_BYTES_OF_INT, "little")
