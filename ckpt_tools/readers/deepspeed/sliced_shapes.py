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
_VOCABULARIES = [[name] for name in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")]
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
            raise self._unfitting(name, slices, full)
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

    def _unfitting(self, name: str, slices: Sequence[Shape], full: Shape) -> UnsupportedLayout:
        rows = _padded_rows(name, slices, full)
        if rows is None:
            why = f"its slices {[*slices]} do not make up {full}, its shape in the model"
            return self._unsupported(name, why)
        return self._unsupported(
            name,
            f"its slices have {rows} rows, and the model of the config {full[0]}: the vocabulary is padded",
            hint=f"Pass --config with a copy of the config whose vocab_size is {rows}. The padding is "
            f'written, unless a key map (--key-map) has a rule with "rows": {full[0]} for it.',
        )

    def _unsupported(self, name: str, why: str, hint: str = _SAVE_AGAIN) -> UnsupportedLayout:
        return UnsupportedLayout(
            f"a tensor-parallel checkpoint of {self._ranks} ranks without a record of its slices: {why}",
            path=self._path,
            tensor=name,
            hint=hint,
        )


def _padded_rows(name: str, slices: Sequence[Shape], full: Shape) -> int | None:
    """The rows of all slices of a vocabulary that has more than the model; None for everything else."""
    if name.split(".")[-2:-1] not in _VOCABULARIES or len(full) != 2:
        return None
    if any(len(shape) != 2 or shape[1] != full[1] for shape in slices):
        return None
    # A rank with more rows than the model has all of them.
    rows = slices[0][0] if slices[0][0] > full[0] else sum(shape[0] for shape in slices)
    return rows if rows > full[0] else None


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
