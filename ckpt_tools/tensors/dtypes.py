"""Owns the table of dtypes: torch's name, safetensors' name, bytes per element, floating or not.

Importing this module does not import torch: metadata work (``inspect``, planning) needs only names and
sizes. ``DType.torch`` imports it where elements are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# Without slots: up to Python 3.11.3 a frozen dataclass with slots replaces its __setstate__ by one that sets
# attributes.
@dataclass(frozen=True, eq=False)
class DType:
    """An element type.

    It equals itself and the ``torch.dtype`` of the same name: ``entry.dtype == torch.bfloat16`` works.

    Attributes:
        name: torch's name without the ``torch.`` prefix, such as ``bfloat16``.
        safetensors: the name in a safetensors header, such as ``BF16``; empty if the format has none.
        itemsize: bytes per element.
        is_floating: whether casts apply; integer and boolean tensors are never cast.
    """

    name: str
    safetensors: str
    itemsize: int
    is_floating: bool

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DType):
            return self.name == other.name
        return str(other) == f"torch.{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is the entry of the table itself."""
        return _named, (self.name,)

    def __setstate__(self, state: object) -> None:
        """Refuse: a hostile pickle must not change an entry of the table."""
        raise TypeError("a dtype does not change")

    @property
    def torch(self) -> torch.dtype:
        """The ``torch.dtype`` of the same name (imports torch)."""
        import torch

        dtype = getattr(torch, self.name)
        assert isinstance(dtype, torch.dtype)
        return dtype


FLOAT64 = DType("float64", "F64", 8, True)
FLOAT32 = DType("float32", "F32", 4, True)
FLOAT16 = DType("float16", "F16", 2, True)
BFLOAT16 = DType("bfloat16", "BF16", 2, True)

ALL = (
    FLOAT64,
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    DType("float8_e4m3fn", "F8_E4M3", 1, True),
    DType("float8_e5m2", "F8_E5M2", 1, True),
    DType("float8_e8m0fnu", "F8_E8M0", 1, True),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, True),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, True),
    DType("complex64", "C64", 8, False),
    DType("int64", "I64", 8, False),
    DType("int32", "I32", 4, False),
    DType("int16", "I16", 2, False),
    DType("int8", "I8", 1, False),
    DType("uint8", "U8", 1, False),
    DType("uint16", "U16", 2, False),
    DType("uint32", "U32", 4, False),
    DType("uint64", "U64", 8, False),
    DType("bool", "BOOL", 1, False),
)
# What safetensors has no name for.
UNWRITTEN = (
    DType("complex128", "", 16, False),
    DType("complex32", "", 4, False),
    DType("bits8", "", 1, False),
    DType("bits16", "", 2, False),
    DType("bits1x8", "", 1, False),
    DType("bits2x4", "", 1, False),
    DType("bits4x2", "", 1, False),
)


def _named(name: str) -> DType:
    return BY_NAME[name]


BY_NAME = {dtype.name: dtype for dtype in (*ALL, *UNWRITTEN)}
BY_SAFETENSORS_NAME = {dtype.safetensors: dtype for dtype in ALL}

# Names of torch's typed storage classes in pickles.
BY_STORAGE_CLASS = {
    "DoubleStorage": BY_NAME["float64"],
    "FloatStorage": BY_NAME["float32"],
    "HalfStorage": BY_NAME["float16"],
    "BFloat16Storage": BY_NAME["bfloat16"],
    "LongStorage": BY_NAME["int64"],
    "IntStorage": BY_NAME["int32"],
    "ShortStorage": BY_NAME["int16"],
    "CharStorage": BY_NAME["int8"],
    "ByteStorage": BY_NAME["uint8"],
    "BoolStorage": BY_NAME["bool"],
    "ComplexFloatStorage": BY_NAME["complex64"],
    "ComplexDoubleStorage": BY_NAME["complex128"],
    "UntypedStorage": BY_NAME["uint8"],
}

# Names on the command line.
BY_SHORT_NAME = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}


def short_name(value: object) -> str:
    """The short name of a dtype: ``bf16`` of ``bfloat16``, ``torch.bfloat16`` or the ``torch.dtype``.

    The text of any other value is returned as it is.
    """
    name = str(value).removeprefix("torch.")
    return _SHORT_NAMES.get(name, name)


_SHORT_NAMES = {dtype.name: short for short, dtype in BY_SHORT_NAME.items()} | {
    "float": "fp32",
    "half": "fp16",
}
