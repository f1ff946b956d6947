"""Owns the step from the parts of tensor-parallel ranks to one part.

A record or the shapes of the model say which pieces of the slices make up a tensor. Pieces at one place are
copies: the first is taken, and the others must be equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.deepspeed.joining import Piece, joined, taken
from ckpt_tools.readers.deepspeed.weights import Part
from ckpt_tools.tensors.catalogue import Shape, Stored
from ckpt_tools.tensors.checkpoint import Copy, Replica, Weight

PiecesOf = Callable[[str, Sequence[Shape]], tuple[list[Piece], Shape]]


class TensorRanks:
    """The tensor-parallel ranks of a save.

    Args:
        pieces: for a tensor and the shapes of its slices, its pieces and its shape.
        ranks: number of ranks.
        directory: of the files, for errors.
    """

    def __init__(self, pieces: PiecesOf, ranks: int, directory: Path) -> None:
        self._pieces, self._ranks, self._directory = pieces, ranks, directory
        self._replicas: list[Replica] = []

    def part(self, parts: Sequence[Part]) -> Part:
        """The joined parts of the ranks."""
        first = parts[0]
        names = dict.fromkeys(name for part in parts for name in part.weights)
        weights = {
            name: self._weight(name, [p.weights[name] for p in parts if name in p.weights])
            for name in names
            if name not in first.ties
        }
        doubts = list(dict.fromkeys(doubt for part in parts for doubt in part.doubts))
        remarks = list(dict.fromkeys(remark for part in parts for remark in part.remarks))
        lost = next((part.lost for part in parts if part.lost is not None), None)
        return Part(weights, first.ties, remarks, doubts, lost, self._replicas)

    def _weight(self, name: str, parts: Sequence[Weight]) -> Weight:
        masters = [part.master for part in parts if part.master is not None]
        models = [part.model for part in parts if isinstance(part.model, Stored)]
        master = self.tensor(name, "master", masters)
        model = self.tensor(name, "model", models)
        held = master or model
        if held is None:
            raise DamagedCheckpoint(
                "not all tensor-parallel ranks hold it", path=self._directory, tensor=name
            )
        return Weight(parts[0].kind, held.shape, parts[0].dtype, master, model)

    def tensor(self, name: str, copy: Copy, slices: Sequence[Stored]) -> Stored | None:
        """The whole tensor of these slices, one a rank; None if not all ranks have one."""
        if len(slices) != self._ranks:
            return None
        if len({piece.dtype for piece in slices}) > 1:
            raise DamagedCheckpoint("its slices differ in dtype", path=self._directory, tensor=name)
        pieces, shape = self._pieces(name, [piece.shape for piece in slices])
        first: dict[tuple[Shape, Shape], Piece] = {}
        for piece in pieces:
            kept = first.setdefault((piece.offsets, piece.box.sizes), piece)
            if kept is not piece:
                pair = taken(slices, kept), taken(slices, piece)
                self._replicas.append(Replica(name, copy, *pair))
        return joined(slices, list(first.values()), shape)
