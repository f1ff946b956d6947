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
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
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
    ordered = sorted(layouts)
    ordered.sort(key=lambda name: _ORDER.index(layouts[name][0].safetensors))
    starts = [0]
    # As json.dumps without spaces: of 100,000 tensors a dictionary of dictionaries takes 50 MB.
    text = bytearray(8)
    text += f'{{"{_METADATA}":{_JSON.encode(dict(metadata))}'.encode()
    for name in ordered:
        dtype, shape = layouts[name]
        start, end = starts[-1], starts[-1] + math.prod(shape) * dtype.itemsize
        starts.append(end)
        sizes = ",".join(map(str, shape))
        text += (
            f',{_JSON.encode(name)}:{{"dtype":"{dtype.safetensors}","shape":[{sizes}],'
            f'"data_offsets":[{start},{end}]}}'
        ).encode()
    text += b"}"
    text += b" " * (-len(text) % alignment)
    length = len(text) - 8
    if length > _MAX_HEADER:
        raise UnsupportedLayout(
            f"the header of a file would have {length:,} bytes, and safetensors reads {_MAX_HEADER:,}",
            hint="Pass a smaller --max-shard-size, so that a file holds fewer tensors.",
        )
    text[:8] = length.to_bytes(8, "little")
    places = (len(text) + start for start in starts)
    return bytes(text), dict(zip(ordered, places, strict=False))


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
