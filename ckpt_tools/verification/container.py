"""Owns the strict reading of one weight file's metadata for checks: safetensors headers and pickles.

The safetensors code is independent of the package's reader and writer, so that neither checks itself. It
continues after each problem and returns the entries that are valid. No tensor data is read. Pickles are read
with the package's reader, which stops at its first problem and never runs code.

Sources: https://github.com/huggingface/safetensors#format, ``safetensors/src/tensor.rs`` (``validate``).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.weight_files import read_weight_files
from ckpt_tools.tensors.catalogue import FlatRange, Stored, Tensor
from ckpt_tools.tensors.dequantise import Dequantised
from ckpt_tools.tensors.dtypes import BY_SAFETENSORS_NAME, DType
from ckpt_tools.verification.problem import Findings

_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What torch's operations take, and what fits a number of the header.
_MOST_DIMENSIONS, _MAX_SIZE = 64, (1 << 64) - 1
_ANEW = "Copy or download the file again."

# Bits of an element. The added ones have no torch dtype, or less than a byte.
_BITS = {dtype.safetensors: 8 * dtype.itemsize for dtype in BY_SAFETENSORS_NAME.values()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor, and its place.

    Attributes:
        name: its name.
        code: the safetensors name of its dtype, such as ``BF16``.
        shape: sizes.
        file: the file, relative to the directory.
        start: its first byte in the file.
        stop: the byte after its last.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def dtype(self) -> DType | None:
        """The dtype; None if torch does not have it."""
        return BY_SAFETENSORS_NAME.get(self.code)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True)
class Container:
    """One safetensors file.

    Attributes:
        file: its name, relative to the directory.
        size: its bytes.
        header_size: bytes before the data, length prefix included.
        entries: its tensors in the order of the file.
    """

    file: str
    size: int
    header_size: int
    entries: Mapping[str, Entry]


def read_container(directory: Path, file: str, findings: Findings) -> Container | None:
    """Read a header and add every problem of it.

    Args:
        directory: the directory of the file.
        file: its name relative to ``directory``, with forward slashes.
        findings: takes the problems.

    Returns:
        The header without invalid entries; None if there is no header.
    """
    try:
        with (directory / file).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            start = stream.read(64)
            length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            text = stream.read(length) if length <= min(_MAX_HEADER, size) else b""
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return None
    header = _header(file, size, start, length, text, findings)
    if header is None:
        return None
    data = 8 + length
    if data % 8:
        findings.add(
            "header-unaligned",
            f"tensor data starts at byte {data:,}, which is not a multiple of 8",
            file=file,
            hint="Save the file again with a recent safetensors.",
        )
    _check_metadata(header.pop("__metadata__", None), file, findings)
    found = [_entry(name, value, file, data, findings) for name, value in header.items()]
    entries = sorted(filter(None, found), key=lambda entry: (entry.start, entry.stop))
    if len(entries) == len(header):
        _check_tiling(entries, file, data, size, findings)
    return Container(file, size, data, {entry.name: entry for entry in entries})


def _header(
    file: str, size: int, start: bytes, length: int, text: bytes, findings: Findings
) -> dict[str, Any] | None:
    if start.startswith(_LFS_POINTER):
        findings.add(
            "lfs-pointer",
            "it is a Git LFS pointer, not the file itself",
            file=file,
            hint="Fetch the file with git lfs pull.",
        )
        return None
    if size < 8 or (length <= _MAX_HEADER and start[8:9] in (b"{", b"") and length > size - 8):
        wanted = f"; the header alone has {8 + length:,}" if size >= 8 else ""
        findings.add("shard-truncated", f"it has {size:,} bytes{wanted}", file=file, hint=_ANEW)
        return None
    try:
        if not text.startswith(b"{"):
            raise ValueError(f"a header of {length:,} bytes does not start with a brace")
        header, repeated = parse_json(text.decode())
    except (ValueError, RecursionError) as error:
        findings.add("header-invalid", f"its header is damaged: {error}", file=file, hint=_ANEW)
        return None
    for key in repeated:
        findings.add("duplicate-key", f"its header contains {key!r} twice", file=file)
    assert isinstance(header, dict)
    return header


def parse_json(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the repeated keys of its objects.

    Raises:
        ValueError: it is not JSON.
    """
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return value

    return json.loads(text, object_pairs_hook=collect), repeated


def _check_metadata(metadata: object, file: str, findings: Findings) -> None:
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        findings.add("header-invalid", "its __metadata__ is not a map of strings", file=file)
    elif metadata.get("format") != "pt":
        said = f"has format: {metadata['format']}" if "format" in metadata else "has no format"
        findings.add(
            "format-missing",
            f"its metadata {said}",
            file=file,
            hint='transformers 4 refuses such files. Save with metadata={"format": "pt"}.',
        )


def _entry(name: str, value: object, file: str, data: int, findings: Findings) -> Entry | None:
    shape = _sizes(value.get("shape")) if isinstance(value, dict) else None
    offsets = _sizes(value.get("data_offsets")) if isinstance(value, dict) else None
    code = value.get("dtype") if isinstance(value, dict) else None
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(code, str):
        findings.add("header-invalid", "its entry is malformed", file=file, tensor=name, hint=_ANEW)
        return None
    start, stop = offsets
    bits = _BITS.get(code)
    if bits is None:
        findings.add("dtype-unknown", f"its dtype is {code}", file=file, tensor=name)
    elif (stop - start) * 8 != math.prod(shape) * bits:
        findings.add(
            "tensor-size",
            f"{code} of shape {list(shape)} needs {math.prod(shape) * bits // 8:,} bytes;"
            f" it has {stop - start:,}",
            file=file,
            tensor=name,
            hint=_ANEW,
        )
    return Entry(name, code, shape, file, data + start, data + stop)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of sizes; None for anything else."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return None
    right = all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value)
    return tuple(value) if right else None


def _check_tiling(
    entries: list[Entry], file: str, data: int, size: int, findings: Findings
) -> None:
    """The tensors fill the file from the header to the end, without gaps."""
    end = data
    for entry in entries:
        if entry.start > end:
            findings.add(
                "data-hole",
                f"{entry.start - end:,} bytes before it belong to no tensor",
                file=file,
                tensor=entry.name,
            )
        elif entry.start < end:
            findings.add(
                "data-overlap",
                f"its first {end - entry.start:,} bytes belong to another tensor too",
                file=file,
                tensor=entry.name,
            )
        end = max(end, entry.stop)
    if size > end:
        findings.add(
            "trailing-bytes", f"{size - end:,} bytes follow the last tensor", file=file, hint=_ANEW
        )
    elif size < end:
        cut = [entry.name for entry in entries if entry.stop > size]
        are = "tensor is" if len(cut) == 1 else "tensors are"
        findings.add(
            "shard-truncated",
            f"it has {size:,} bytes; its header describes {end:,}; {len(cut):,} {are} cut or lost",
            file=file,
            tensor=cut[0],
            hint=_ANEW,
        )


def read_pickled(directory: Path, file: str, findings: Findings) -> dict[str, Entry] | None:
    """The tensors of one pickled file; None, and a problem, if it cannot be read.

    A second name of a tensor is an entry with the place of the first.
    """
    try:
        held = read_weight_files(directory / file)
        entries = {name: _pickled_entry(name, held.tensors[name], file) for name in held.tensors}
    except CkptError as error:
        findings.add("pickled-invalid", error.fact, file=file, tensor=error.tensor, hint=error.hint)
        return None
    except OSError as error:
        findings.add("file-unreadable", f"cannot be read ({error.strerror})", file=file)
        return None
    seconds = {name: entries[first] for name, first in held.ties.items()}
    return entries | {
        name: Entry(name, first.code, first.shape, file, first.start, first.stop)
        for name, first in seconds.items()
    }


def _pickled_entry(name: str, tensor: Tensor, file: str) -> Entry:
    start = 0
    if isinstance(tensor, Dequantised):
        tensor = tensor.parts["codes"]
    assert isinstance(tensor, Stored)
    for fragment in tensor.fragments:
        assert isinstance(fragment.region, FlatRange)
        start = fragment.offset
    return Entry(name, tensor.dtype.safetensors, tensor.shape, file, start, start + tensor.nbytes)
