"""Owns the header of a safetensors file: dtype, shape and byte range of each tensor.

As the format requires, the byte ranges must tile the file, without a hole, an overlap or bytes at the end.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import BY_SAFETENSORS_NAME

_MAX_HEADER = 100_000_000
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
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is not a mapping")
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"not a complete safetensors file (header: {error})", path=path, hint=_COPY_ANEW
        ) from error
    metadata = header.pop("__metadata__", {})
    start, end, tensors = begin + 8 + length, begin + 8 + length, {}
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = _entry(path, name, entry, start, end)
            tensors[name] = tensor
            end += tensor.nbytes
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint("its header is malformed", path=path, hint=_COPY_ANEW) from error
    if end != size:
        raise DamagedCheckpoint(
            f"its header describes {end:,} bytes, the file has {size:,}", path=path, hint=_COPY_ANEW
        )
    return SafetensorsFile(path, size, tensors, metadata)


def _entry(path: Path, name: str, entry: dict[str, Any], start: int, end: int) -> Stored:
    dtype = BY_SAFETENSORS_NAME.get(entry.get("dtype", ""))
    if dtype is None:
        raise UnsupportedLayout(f"unknown dtype {entry.get('dtype')!r}", path=path, tensor=name)
    shape = tuple(entry["shape"])
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError("a malformed shape")
    numel = math.prod(shape)
    low, high = entry["data_offsets"]
    if start + low != end or high - low != numel * dtype.itemsize:
        raise DamagedCheckpoint(
            "its byte range leaves a hole, overlaps, or does not fit its shape",
            path=path,
            tensor=name,
            hint=_COPY_ANEW,
        )
    fragments = [Fragment(path, start + low, FlatRange(0, numel))] if numel else []
    return Stored(dtype, shape, fragments)
