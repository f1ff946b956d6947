"""Owns the header of a safetensors file: dtype, shape and byte range of each tensor.

Judges a header as the format's own library does: the byte ranges tile the file, with no hole, overlap or
bytes left over, and the JSON is what serde reads. Which files make a model, the format readers know.

Source: https://github.com/huggingface/safetensors#format, ``safetensors/src/tensor.rs``
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import BY_SAFETENSORS_NAME
from ckpt_tools.tensors.regions import is_possible

_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_COPY_ANEW = "The file is truncated or damaged. Copy or download it anew."


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    size: int
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_safetensors(path: Path, begin: int = 0) -> SafetensorsFile:
    """Read a file's header.

    Args:
        path: the file.
        begin: first byte of the safetensors part, which extends to the end of the file.

    Raises:
        DamagedCheckpoint: it is truncated, or its header does not describe it.
        UnsupportedLayout: it has an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(begin)
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= min(_MAX_HEADER, size) else b""
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read ({error.strerror})", path=path) from error
    if _MAX_HEADER < length <= size:
        raise DamagedCheckpoint(
            f"its header has {length:,} bytes, and the format allows {_MAX_HEADER:,}",
            path=path,
            hint="Save the tensors in several files, as save_pretrained does with max_shard_size.",
        )
    try:
        header = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"not a complete safetensors file (header: {error})", path=path, hint=_COPY_ANEW
        ) from error
    metadata = header.pop(_METADATA, None) or {}
    start, end, tensors = begin + 8 + length, begin + 8 + length, {}
    try:
        for name, entry in sorted(_entries(header), key=lambda item: item[1].offsets):
            tensor = _tensor(path, name, entry, start, end)
            tensors[name] = tensor
            end += tensor.nbytes
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint("its header is malformed", path=path, hint=_COPY_ANEW) from error
    if end != size:
        raise DamagedCheckpoint(
            f"its header describes {end:,} bytes, the file has {size:,}", path=path, hint=_COPY_ANEW
        )
    return SafetensorsFile(path, size, tensors, metadata)


class _Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: object
    shape: tuple[int, ...]
    offsets: tuple[int, int]


class _Repeating(dict[str, Any]):
    """A JSON object of which some keys are written twice."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object: a plain dictionary, of which there may be a million, unless it repeats a key."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    made = _Repeating(plain)
    counts = Counter(name for name, _ in pairs)
    made.repeated = frozenset(name for name, count in counts.items() if count > 1)
    return made


def _repeated(value: object) -> frozenset[str]:
    return value.repeated if isinstance(value, _Repeating) else frozenset()


def _parsed(text: bytes) -> dict[str, Any]:
    """The header as a mapping.

    Raises:
        ValueError: the library does not take it for a header.
    """
    # A call for each of a million numbers takes as long as the rest.
    integer = _integer if b"-0" in text else int
    header = json.loads(
        text.decode(), object_pairs_hook=_object, parse_int=integer, parse_constant=_no_number
    )
    if not isinstance(header, dict):
        raise ValueError("it is not a mapping")
    for name in header:
        name.encode()  # half of a surrogate pair is no text
    metadata = header.get(_METADATA)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError(f"its {_METADATA} is not a map of strings")
    if _METADATA in _repeated(header):
        raise ValueError(f"it has {_METADATA} twice")
    return header


def _integer(text: str) -> int | float:
    return float(text) if text == "-0" else int(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _entries(header: Mapping[str, Any]) -> Iterator[tuple[str, _Entry]]:
    """What the header says of each tensor.

    Raises:
        ValueError, TypeError, KeyError: an entry is malformed.
    """
    for name, value in header.items():
        if isinstance(value, list):  # serde takes the fields of an entry in their order, too
            dtype, shape, offsets = value
        else:
            if not _repeated(value).isdisjoint(_FIELDS):
                raise ValueError("a field that is written twice")
            dtype, shape, offsets = (value[field] for field in _FIELDS)
        low, high = offsets
        numbers = (*shape, low, high)
        if {*map(type, numbers)} != {int} or min(numbers) < 0:
            raise ValueError("a size or an offset that is no whole number")
        if not isinstance(shape, list) or not isinstance(offsets, list):
            raise TypeError("sizes or offsets that are no list")
        yield name, _Entry(dtype, tuple(shape), (low, high))


def _tensor(path: Path, name: str, entry: _Entry, start: int, end: int) -> Stored:
    code, shape = entry.dtype, entry.shape
    dtype = BY_SAFETENSORS_NAME.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise UnsupportedLayout(
            f"unknown dtype {code!r}",
            path=path,
            tensor=name,
            hint="A newer safetensors may know it: load the file with that, and save it in another dtype.",
        )
    if not is_possible(shape):
        raise DamagedCheckpoint(
            f"no tensor can have its shape {list(shape)}", path=path, tensor=name, hint=_COPY_ANEW
        )
    numel = math.prod(shape)
    low, high = entry.offsets
    if start + low != end or high - low != numel * dtype.itemsize:
        raise DamagedCheckpoint(
            "its byte range leaves a hole, overlaps, or does not fit its shape",
            path=path,
            tensor=name,
            hint=_COPY_ANEW,
        )
    fragments = [Fragment(path, start + low, FlatRange(0, numel))] if numel else []
    return Stored(dtype, shape, fragments)
