"""Owns fragments, the runs of file bytes that hold parts of a tensor, and the proof that they tile it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.regions import Box, FlatRange, Shape
from ckpt_tools.tensors.runs import Strided

# So many cells are looked at one by one, and this many for each box.
_CELLS, _CELLS_A_BOX = 1 << 12, 16
_MOST_CORNERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Fragment:
    """The bytes in a file that hold one region of a tensor.

    Attributes:
        file: the file.
        offset: first byte of the run.
        region: which elements it holds.
        layout: how the elements lie from ``offset`` on; None for row-major order. The row-major order of its
            sizes is that of the region.
    """

    file: Path
    offset: int
    region: FlatRange | Box
    layout: Strided | None = None


class Consecutive(Sequence[Fragment]):
    """Flat ranges of which each begins where the one before ends, by the way they are made.

    Attributes:
        numel: the number of elements from the start of the first to the end of the last.
    """

    __slots__ = ()
    numel: int


def prove_ranges_tile(fragments: Sequence[Fragment], numel: int) -> None:
    """Prove that flat ranges, in rising order, hold each of ``numel`` elements once.

    Raises:
        DamagedCheckpoint: they do not.
    """
    end = fragments.numel if isinstance(fragments, Consecutive) else 0
    for fragment in () if isinstance(fragments, Consecutive) else fragments:
        region = fragment.region
        if not isinstance(region, FlatRange):
            raise DamagedCheckpoint("it has flat and boxed fragments", path=fragment.file)
        if region.start != end or region.stop < region.start:
            raise DamagedCheckpoint(
                f"its fragments leave a hole or overlap at element {min(end, region.start):,}",
                path=fragment.file,
            )
        end = region.stop
    if end != numel:
        where = fragments[-1].file if fragments else None
        raise DamagedCheckpoint(f"its fragments hold {end:,} of {numel:,} elements", path=where)


def prove_boxes_tile(fragments: Sequence[Fragment], shape: Shape) -> None:
    """Prove that boxes hold each element of a tensor once.

    The tensor is cut along every border of every box: each cell must lie in one box. Where that makes many
    more cells than boxes, the corners of the boxes are compared instead.

    Raises:
        DamagedCheckpoint: they do not.
        UnsupportedLayout: they are cut along too many axes to be compared.
    """
    boxes = [fragment.region for fragment in fragments]
    cuts = []
    for axis, size in enumerate(shape):
        borders = {0, size}
        for fragment, box in zip(fragments, boxes, strict=True):
            if not isinstance(box, Box) or len(box.sizes) != len(shape):
                raise DamagedCheckpoint(
                    "a fragment has another number of dimensions", path=fragment.file
                )
            low, high = box.offsets[axis], box.offsets[axis] + box.sizes[axis]
            if low < 0 or high > size or high < low:
                raise DamagedCheckpoint("a fragment reaches outside it", path=fragment.file)
            borders |= {low, high}
        cuts.append({border: index for index, border in enumerate(sorted(borders))})
    cells = math.prod(len(cut) - 1 for cut in cuts)
    if cells > _CELLS_A_BOX * len(fragments) + _CELLS:
        if not _corners_cancel([box for box in boxes if isinstance(box, Box)], shape):
            fact = "its fragments do not hold each of its elements once"
            raise DamagedCheckpoint(fact, path=fragments[-1].file)
        return
    covered: set[tuple[int, ...]] = set()
    for fragment, box in zip(fragments, boxes, strict=True):
        assert isinstance(box, Box)
        if not box.numel:
            continue
        spans = [
            range(cut[low], cut[low + size])
            for cut, low, size in zip(cuts, box.offsets, box.sizes, strict=True)
        ]
        for cell in product(*spans):
            if cell in covered:
                raise DamagedCheckpoint("two fragments hold the same elements", path=fragment.file)
            covered.add(cell)
    if math.prod(shape) and len(covered) != cells:
        where = fragments[-1].file if fragments else None
        raise DamagedCheckpoint("its fragments do not hold all of its elements", path=where)


def _corners_cancel(boxes: Sequence[Box], shape: Shape) -> bool:
    """Whether the corners of boxes, each with its sign, are those of the whole.

    The differences of a box's indicator function along each axis are its corners, with alternating signs. A
    sum of such functions has the differences of the whole where it is one everywhere, and only there.
    """
    axes = [a for a, n in enumerate(shape) if any(box.sizes[a] != n for box in boxes)]
    if len(boxes) << len(axes) > _MOST_CORNERS:
        raise UnsupportedLayout(
            f"it is cut into {len(boxes)} parts along {len(axes)} axes",
            hint="Save it with fewer sharded axes: a mesh of three cuts each tensor along three at most.",
        )
    corners: dict[tuple[int, ...], int] = {}
    for box, sign in [*((box, 1) for box in boxes), (Box((0,) * len(shape), shape), -1)]:
        if not box.numel:
            continue
        ends = [((box.offsets[a], 1), (box.offsets[a] + box.sizes[a], -1)) for a in axes]
        for corner in product(*ends):
            place = tuple([at for at, _ in corner])
            count = corners.get(place, 0) + sign * math.prod([side for _, side in corner])
            if count:
                corners[place] = count
            else:
                corners.pop(place, None)
    return not corners
