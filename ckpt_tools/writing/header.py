"""Owns the header of a safetensors file: its bytes, and the place of each tensor after it.

The order of the tensors and the text of the header are those of ``safetensors.torch.save_file``.

Source: ``safetensors/src/tensor.rs`` (``prepare``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import Shape
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.regions import is_possible

# The order in which safetensors lays out dtypes within a file, by descending alignment.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)

# Of ``safetensors/src/tensor.rs``, which refuses to read a longer one.
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_LEAVE_OUT = "Remove the tensor from the state before it is saved; no library could load it."


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

    Raises:
        UnsupportedLayout: safetensors cannot read such a file: a name or shape that the format does not
            have, or a header over its limit.
    """
    for name, (dtype, shape) in layouts.items():
        _check_name(name)
        if not dtype.safetensors:
            raise UnsupportedLayout(
                f"its dtype is {dtype}, which safetensors cannot hold",
                tensor=name,
                hint="Leave it out with a --key-map FILE that gives it the name null, or cast it in the "
                "training script and save again.",
            )
        if not is_possible(shape):
            raise UnsupportedLayout(
                f"safetensors cannot hold the shape {list(shape)}", tensor=name, hint=_LEAVE_OUT
            )
    ordered = sorted(layouts, key=lambda name: (_ORDER.index(layouts[name][0].safetensors), name))
    entries: dict[str, object] = {_METADATA: dict(metadata)}
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
    if len(text) > _MAX_HEADER:
        raise UnsupportedLayout(
            f"the header of a file would have {len(text):,} bytes, and safetensors reads {_MAX_HEADER:,}",
            hint="Pass a smaller --max-shard-size, so that a file holds fewer tensors.",
        )
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _check_name(name: str) -> None:
    if name == _METADATA:
        raise UnsupportedLayout(
            "safetensors keeps this name for itself", tensor=name, hint=_LEAVE_OUT
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedLayout(
            "its name is no Unicode text, and safetensors cannot write it",
            tensor=ascii(name),
            hint=_LEAVE_OUT,
        ) from error
