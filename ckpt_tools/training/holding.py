"""The tensors of a model in training that one process holds: whole, or pieces of them.

A :class:`Held` tensor is the live tensor itself, with the region of the whole tensor that it is. Nothing is
copied, and no other process is asked. The module of each framework makes these values;
:mod:`ckpt_tools.training.live` makes one checkpoint of those of all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import Box, FlatRange, Shape
from ckpt_tools.tensors.checkpoint import Copy, Kind
from ckpt_tools.tensors.dtypes import BY_NAME, DType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A region of a tensor, in memory.

    Attributes:
        region: which elements of the whole.
        tensor: the same elements in row-major order; of any shape, on any device.
    """

    region: FlatRange | Box
    tensor: torch.Tensor


@dataclass(frozen=True)
class Held:
    """The part of one tensor in this process.

    Attributes:
        name: its name in the state of the module.
        copy: which copy of it: the one that the model computes with, or the optimizer's.
        kind: trained parameter, frozen parameter or persistent buffer.
        dtype: element type.
        shape: sizes of the whole.
        pieces: the pieces in this process; may be empty.
        is_whole: whether every process holds all of it.
        room: the largest number of elements that any process holds, if known.
    """

    name: str
    copy: Copy
    kind: Kind
    dtype: DType
    shape: Shape
    pieces: tuple[Piece, ...]
    is_whole: bool = False
    room: int = 0


@dataclass(frozen=True)
class Holding:
    """The part of a model in this process.

    Attributes:
        tensors: in the order of the module's state dict.
        ties: for each second name of a tensor, the name under which it is listed.
    """

    tensors: tuple[Held, ...]
    ties: Mapping[str, str]


def dtype_of(tensor: torch.Tensor, name: str) -> DType:
    """Its element type.

    Raises:
        UnsupportedLayout: no checkpoint holds tensors of this dtype.
    """
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedLayout(
            f"tensors of {tensor.dtype} are not written",
            tensor=name,
            hint="safetensors has no such dtype. Convert the tensor before the save.",
        )
    return dtype


def whole(name: str, copy: Copy, kind: Kind, tensor: torch.Tensor) -> Held:
    """A tensor that every process holds whole.

    Raises:
        UnsupportedLayout: its elements are not in memory as those of a plain tensor.
    """
    tensor = tensor.detach()
    if tensor.is_meta or tensor.is_sparse or hasattr(tensor, "__tensor_flatten__"):
        what = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
        raise UnsupportedLayout(
            f"it is {what}, whose elements cannot be read",
            tensor=name,
            hint="Save a model whose weights are plain tensors in memory.",
        )
    shape = tuple(tensor.shape)
    region = Box((0,) * len(shape), shape)
    pieces = (Piece(region, tensor),) if tensor.numel() else ()
    return Held(name, copy, kind, dtype_of(tensor, name), shape, pieces, True, tensor.numel())


def kind_of(tensor: Any, is_buffer: bool) -> Kind:
    """The kind of an entry of a state dict."""
    if is_buffer:
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def first_names(entries: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries under their first names, and the second names of the same objects."""
    kept: dict[str, Any] = {}
    names: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, value in entries:
        first = names.setdefault(id(value), name)
        if first == name:
            kept[name] = value
        else:
            ties[name] = first
    return kept, ties
