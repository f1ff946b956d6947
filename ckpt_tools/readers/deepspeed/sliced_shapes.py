"""Owns the joining of tensor-parallel slices that no record describes, by the shapes of the whole model.

AutoTP up to DeepSpeed 0.18 records nothing. The shapes of the model then say along which axis a parameter was
cut, or that each rank has all of it. They do not say how a parameter that fuses several others (qkv, gate and
up) was cut, so slices are joined only where the name is that of one whole projection. Everything else is
refused.

Source: ``deepspeed/module_inject/layers.py``, ``module_inject/auto_tp.py`` (``_replace``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.readers.deepspeed.joining import Piece, along, copies, shifted
from ckpt_tools.tensors.catalogue import Shape

# Modules of transformers whose weight is one parameter: rows or columns of the ranks follow each other.
_WHOLE_ROWS = frozenset(
    {
        *("embed_tokens", "wte", "embed_in", "lm_head", "embed_out", "score"),
        *("q_proj", "k_proj", "v_proj", "q", "k", "v", "wq", "wk", "wv"),
        *("gate_proj", "up_proj", "fc1", "fc_in", "wi", "wi_0", "wi_1", "w1", "w3"),
    }
)
_WHOLE_COLUMNS = frozenset(
    {
        *("embed_tokens", "wte", "embed_in"),
        *("o_proj", "out_proj", "o", "wo", "dense"),
        *("down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h"),
    }
)
_SAVE_AGAIN = (
    "AutoTP of DeepSpeed 0.19 records how slices are cut: load the checkpoint in the training script with "
    "that release and save it again. engine.save_16bit_model writes the joined 16-bit weights."
)


class ModelShapes:
    """The shapes of a model, from which it follows how the slices of each parameter are joined.

    Args:
        shapes: names and shapes of all tensors of the model.
        ranks: number of tensor-parallel ranks.
        path: a file of the checkpoint, for errors.
    """

    def __init__(self, shapes: Mapping[str, Shape], ranks: int, path: Path) -> None:
        self._shapes, self._ranks, self._path = shapes, ranks, path
        self._counts: Counter[str] = Counter()

    def pieces(self, name: str, slices: Sequence[Shape]) -> tuple[list[Piece], Shape]:
        """The pieces of a tensor, and its shape.

        Raises:
            UnsupportedLayout: the shapes do not determine them.
        """
        full = self._shapes.get(name)
        if full is None:
            raise self._unsupported(name, "the model of the config has no tensor of this name")
        if all(shape == full for shape in slices):
            self._counts["whole on each rank"] += 1
            return copies(slices), full
        axis = _cut_axis(slices, full)
        if axis is None:
            raise self._unsupported(
                name, f"its slices {[*slices]} do not make up {full}, its shape in the model"
            )
        module = name.split(".")[-2] if "." in name else name
        if len(full) > 2 or module not in (_WHOLE_COLUMNS if axis else _WHOLE_ROWS):
            raise self._unsupported(
                name,
                f"it is cut along axis {axis} and may fuse several parameters, whose parts alternate",
            )
        self._counts["cut by columns" if axis else "cut by rows"] += 1
        pieces, place = [], 0
        for rank, shape in enumerate(slices):
            box = along(shape, axis, 0, shape[axis])
            pieces.append(Piece(rank, box, shifted(shape, axis, place)))
            place += shape[axis]
        return pieces, full

    @property
    def remark(self) -> str:
        """How the tensors asked for so far are joined, for the report."""
        counts = ", ".join(f"{count} {how}" for how, count in sorted(self._counts.items()))
        return (
            f"the files do not record how slices are joined; by the shapes of the model: {counts}"
        )

    def _unsupported(self, name: str, why: str) -> UnsupportedLayout:
        return UnsupportedLayout(
            f"a tensor-parallel checkpoint of {self._ranks} ranks without a record of its slices: {why}",
            path=self._path,
            tensor=name,
            hint=_SAVE_AGAIN,
        )


def _cut_axis(slices: Sequence[Shape], full: Shape) -> int | None:
    """The one axis along which the slices add up to the whole; None if there is none."""
    if any(len(shape) != len(full) for shape in slices):
        return None
    odd = {
        axis
        for shape in slices
        for axis, (a, b) in enumerate(zip(shape, full, strict=True))
        if a != b
    }
    if len(odd) != 1:
        return None
    (axis,) = odd
    return axis if sum(shape[axis] for shape in slices) == full[axis] else None


def unrecorded(ranks: int, path: Path) -> UnsupportedLayout:
    """The refusal where neither a record nor a model says how slices are joined."""
    return UnsupportedLayout(
        f"a tensor-parallel checkpoint of {ranks} ranks that does not record how its slices are cut",
        path=path,
        hint="Its model files have no `universal_checkpoint_info`. consolidate takes the shapes from "
        f"the model of --config FILE|DIR. {_SAVE_AGAIN}",
    )
