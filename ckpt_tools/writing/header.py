"""Owns the header of a safetensors file: its bytes, and the place of each tensor after it.

The order of the tensors and the text of the header are those of ``safetensors.torch.save_file``.

Source: ``safetensors/src/tensor.rs`` (``prepare``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from ckpt_tools.tensors.catalogue import Shape
from ckpt_tools.tensors.dtypes import DType

# The order in which safetensors lays out dtypes within a file, by descending alignment.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def file_header(
    layouts: Mapping[str, tuple[DType, Shape]],
    metadata: Mapping[str, str],
    *,
    alignment: int = 8,
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and the byte of the file at which each tensor begins.

    Args:
        layouts: dtype and shape of each tensor, by name.
        metadata: the strings of ``__metadata__``.
        alignment: the data of the first tensor begins at a multiple of this number.

    Returns:
        The header, length prefix included, and the offsets in the order of the file.
    """
    ordered = sorted(layouts, key=lambda name: (_ORDER.index(layouts[name][0].safetensors), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name in ordered:
        dtype, shape = layouts[name]
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": dtype.safetensors,
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
