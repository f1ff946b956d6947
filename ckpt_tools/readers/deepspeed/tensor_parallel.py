"""Owns ``universal_checkpoint_info``: how the tensor-parallel slices of each parameter are joined.

AutoTP records it since DeepSpeed 0.19; Megatron-DeepSpeed writes it to the client state. It lists
parameters by regular expressions: replicated on all ranks, cut along the second axis (row parallelism),
made of sub-parameters that are cut one by one (fused qkv or gate and up), padded to a rounder vocabulary.
All others are cut along the first axis. AutoTP also records the geometry of each parameter
(``affine_map``), which has precedence. Without a record nothing is guessed.

Sources: ``deepspeed/checkpoint/ds_to_universal.py`` (``merge_tp_slices``), ``checkpoint/affine.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.deepspeed.joining import Piece, along, copies, shifted
from ckpt_tools.tensors.catalogue import Box, Shape
from ckpt_tools.tensors.patterns import Allowance, Patterns
from ckpt_tools.tensors.regions import row_major_strides

INFO = "universal_checkpoint_info"
_AFFINE_VERSION = 1
_REPLICATED = "tp_replicated_parameter_patterns"
_AVERAGED = "parameter_to_average_patterns"
_ROW = "parameter_with_row_parallelism_patterns"
_VOCABULARY = "vocabulary_parameter_patterns"
_TWO_HALVES = "parameter_with_2_sub_params_cat_dim_0"
_SUB_PARAMS = "parameter_with_sub_params"
_WIDTHS = "sub_param_shard_widths"
_UNDESCRIBED = "autotp_unsupported_parameter_patterns"


class SliceRecord:
    """The record of one save that states how its slices are joined.

    Args:
        info: the value of ``universal_checkpoint_info``.
        path: the file of the record, for errors.

    Raises:
        UnsupportedLayout: its version is unknown.
        DamagedCheckpoint: a pattern in it is not a regular expression.
    """

    def __init__(self, info: Mapping[str, Any], path: Path) -> None:
        self._info, self._path = info, path
        affine = info.get("affine_map") or {}
        if affine and int(affine.get("version", 1)) > _AFFINE_VERSION:
            raise UnsupportedLayout(
                f"its affine_map has version {affine['version']}; only version {_AFFINE_VERSION} is known",
                path=path,
                hint="Convert it with ds_to_universal.py of the same DeepSpeed, and pass the result.",
            )
        allowance = Allowance(path)
        sub_params: dict[str, Mapping[str, Any]] = {}
        try:
            for sub in info.get(_SUB_PARAMS) or ():
                for pattern in sub["patterns"]:
                    sub_params.setdefault(pattern, sub)
            self._affine = Patterns[Any](affine.get("params") or {}, allowance)
            self._undescribed = Patterns[Any](info.get(_UNDESCRIBED) or {}, allowance)
            self._widths = Patterns[Any](info.get(_WIDTHS) or {}, allowance)
            self._sub_params = Patterns(sub_params, allowance)
            self._listed = {
                key: Patterns(dict.fromkeys(info.get(key) or (), True), allowance)
                for key in (_AVERAGED, _REPLICATED, _TWO_HALVES, _ROW, _VOCABULARY)
            }
        except (AttributeError, LookupError, TypeError) as error:
            raise DamagedCheckpoint(
                f"{INFO} in it does not have the form that DeepSpeed writes "
                f"({type(error).__name__}: {error})",
                path=path,
            ) from error

    def pieces(self, name: str, shapes: Sequence[Shape]) -> tuple[list[Piece], Shape]:
        """The pieces of a tensor, and its shape; pieces at one place are copies.

        Raises:
            DamagedCheckpoint: the slices do not have the recorded shapes.
            UnsupportedLayout: the record asks for more than putting pieces together.
        """
        try:
            return self._pieces(name, shapes)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(
                f"its slices are not cut as {INFO} says ({error})", path=self._path, tensor=name
            ) from error

    def _pieces(self, name: str, shapes: Sequence[Shape]) -> tuple[list[Piece], Shape]:
        geometry = self._affine.first(name)
        if geometry is not None:
            scales = [p.get("scale", 1.0) for r in geometry["ranks"].values() for p in r["pieces"]]
            if any(float(scale) != 1.0 for scale in scales):
                raise self._unsupported(name, "the ranks hold it scaled")
            return _geometric(geometry, shapes)
        reason = self._undescribed.first(name)
        if reason is not None:
            raise self._unsupported(name, f"DeepSpeed could not describe how it is cut: {reason}")
        if self._says(_AVERAGED, name):
            raise self._unsupported(name, "it must be averaged over the tensor-parallel ranks")
        if self._says(_REPLICATED, name):
            if len(set(shapes)) > 1:
                raise ValueError(f"replicated, but of shapes {shapes}")
            return copies(shapes), shapes[0]
        if self._says(_TWO_HALVES, name):
            halves = [_halved(shape[0]) for shape in shapes]
            return _cut(shapes, 0, [halves, halves])
        sub = self._sub_params.first(name)
        if sub is not None:
            return self._sub_parameters(sub, name, shapes)
        axis = 1 if self._says(_ROW, name) else 0
        pieces, shape = _cut(shapes, axis, [[shape[axis] for shape in shapes]])
        if self._says(_VOCABULARY, name):
            return _first_rows(pieces, shape, int(self._info["original_vocab_size"]))
        return pieces, shape

    def _sub_parameters(
        self, sub: Mapping[str, Any], name: str, shapes: Sequence[Shape]
    ) -> tuple[list[Piece], Shape]:
        axis = int(sub["partition_dim"])
        widths = self._widths.first(name)
        if widths is not None:
            return _cut(shapes, axis, [list(map(int, row)) for row in widths])
        # Before this record all splits were even: into equal parts, or into parts of stated sizes.
        total = sum(shape[axis] for shape in shapes)
        sizes = sub["shape"][axis]
        if isinstance(sizes, int):
            sizes = [_divided(total, sizes)] * sizes
        return _cut(shapes, axis, [[_divided(n, len(shapes))] * len(shapes) for n in sizes])

    def _says(self, key: str, name: str) -> bool:
        return self._listed[key].first(name) is not None

    def _unsupported(self, name: str, why: str) -> UnsupportedLayout:
        return UnsupportedLayout(
            why,
            path=self._path,
            tensor=name,
            hint="Convert the checkpoint with DeepSpeed's ds_to_universal.py, and pass the result.",
        )


def _cut(
    shapes: Sequence[Shape], axis: int, widths: Sequence[Sequence[int]]
) -> tuple[list[Piece], Shape]:
    """The pieces of sub-parameters that follow each other along an axis, each cut among the ranks.

    Args:
        shapes: of the slices.
        axis: along which they are cut.
        widths: for each sub-parameter, how much of it each rank has.
    """
    rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    held = [sum(row[rank] for row in widths) for rank in range(len(shapes))]
    if len(rests) > 1 or held != [shape[axis] for shape in shapes]:
        raise ValueError(f"shapes {list(shapes)}, widths {[list(row) for row in widths]}")
    pieces, place, taken = [], 0, [0] * len(shapes)
    for row in widths:
        for rank, width in enumerate(row):
            if width:
                box = along(shapes[rank], axis, taken[rank], width)
                pieces.append(Piece(rank, box, shifted(shapes[rank], axis, place)))
            taken[rank] += width
            place += width
    return pieces, (*shapes[0][:axis], place, *shapes[0][axis + 1 :])


def _first_rows(pieces: Sequence[Piece], shape: Shape, rows: int) -> tuple[list[Piece], Shape]:
    """The pieces of the first rows; the other rows are padding of the vocabulary."""
    if not 0 < rows <= shape[0]:
        raise ValueError(f"{rows} rows of {shape[0]}")
    kept = []
    for piece in pieces:
        size = min(piece.box.sizes[0], rows - piece.offsets[0])
        if size > 0:
            kept.append(
                Piece(
                    piece.rank,
                    Box(piece.box.offsets, (size, *piece.box.sizes[1:])),
                    piece.offsets,
                )
            )
    return kept, (rows, *shape[1:])


def _geometric(geometry: Mapping[str, Any], shapes: Sequence[Shape]) -> tuple[list[Piece], Shape]:
    """The pieces in an affine map."""
    full = tuple(map(int, geometry["logical_shape"]))
    pieces = []
    for rank, entry in sorted((int(r), e) for r, e in geometry["ranks"].items()):
        shape = tuple(map(int, entry["shard_shape"]))
        if shape != shapes[rank]:
            raise ValueError(f"rank {rank} has {shapes[rank]}, recorded is {shape}")
        for piece in entry["pieces"]:
            sizes = tuple(map(int, piece["shape"]))
            offsets = _corner(piece["source"], sizes, full)
            if math.prod(sizes):
                pieces.append(
                    Piece(rank, Box(_corner(piece["dest"], sizes, shape), sizes), offsets)
                )
    return pieces, full


def _corner(view: Sequence[Any], sizes: Shape, shape: Shape) -> Shape:
    """The first index of a strided view that is a box of a tensor of this shape."""
    offset, strides = int(view[0]), tuple(map(int, view[1]))
    own = row_major_strides(shape)
    if len(sizes) != len(shape) or any(
        size > 1 and a != b for size, a, b in zip(sizes, strides, own, strict=True)
    ):
        raise ValueError(f"strides {strides} in shape {shape}")
    corner = []
    for stride in own:
        index, offset = divmod(offset, max(stride, 1))
        corner.append(index)
    return tuple(corner)


def _halved(size: int) -> int:
    return _divided(size, 2)


def _divided(size: int, parts: int) -> int:
    if parts < 1 or size % parts:
        raise ValueError(f"{size} elements in {parts} parts")
    return size // parts
