"""What one process holds of a model in training: tensors whole, or pieces of them.

A :class:`Held` tensor is the live tensor itself, with the words that the catalogue has for it: which region
of the whole it is. Nothing is copied, and nothing is asked of other processes. How a framework cuts its
tensors is the business of the modules that make these values; how all processes' pieces become one checkpoint
that of :mod:`ckpt_tools.training.live`.
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
    """What this process holds of one tensor.

    Attributes:
        name: its name in the state of the module.
        copy: which copy of it: the one that the model computes with, or the optimizer's.
        kind: trained parameter, frozen parameter or persistent buffer.
        dtype: element type.
        shape: sizes of the whole.
        pieces: what is here of it; may be nothing.
        is_whole: whether every process holds all of it.
        room: the most elements that any process holds of it, where that is known here.
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
    """What this process holds of a model.

    Attributes:
        tensors: in the order of the module's state dict.
        ties: for each second name of a tensor, the name it is listed under.
    """

    tensors: tuple[Held, ...]
    ties: Mapping[str, str]


def dtype_of(tensor: torch.Tensor, name: str) -> DType:
    """Its element type.

    Raises:
        UnsupportedLayout: it has no place in a checkpoint.
    """
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedLayout(f"tensors of {tensor.dtype} are not written", tensor=name)
    return dtype


def whole(name: str, copy: Copy, kind: Kind, tensor: torch.Tensor) -> Held:
    """A tensor that every process holds whole.

    Raises:
        UnsupportedLayout: its elements are not in memory as a plain tensor's are.
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
    """What an entry of a state dict is."""
    if is_buffer:
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def first_names(entries: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries under their first names, and second names of the same objects."""
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
