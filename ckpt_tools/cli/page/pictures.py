"""Owns the pictures: what takes space, norms by layer, and where two checkpoints differ.

Each picture has a bounded number of marks, whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.analysis.statistics import Statistics
from ckpt_tools.cli.page.layers import Bins, Place, place_of
from ckpt_tools.cli.page.numbers import number_text, share_text
from ckpt_tools.cli.page.parts import Mark, Picture, Row
from ckpt_tools.text import nbytes_text

_ROWS = 24
_COLUMNS = 96
_HUES = 6
# So many layers have a row each; upright bars of so few would be blocks.
_FEW = 8

# Levels of a relative change, each with its upper limit.
_LEVELS = ((1e-6, "1"), (1e-4, "2"), (1e-2, "3"), (1.0, "4"), (math.inf, "5"))


@dataclass(frozen=True, slots=True)
class Size:
    """The bytes of one tensor."""

    name: str
    dtype: str
    nbytes: int


def of_dtypes(sizes: Sequence[Size]) -> Picture:
    """The bytes of each dtype, as parts of one bar."""
    counts: Counter[str] = Counter()
    for size in sizes:
        counts[size.dtype] += size.nbytes
    total = sum(counts.values()) or 1
    rows, start = [], 0.0
    listed = counts.most_common(_HUES)
    if len(counts) > _HUES:
        listed[_HUES - 1 :] = [("others", total - sum(n for _, n in listed[: _HUES - 1]))]
    for index, (dtype, nbytes) in enumerate(listed):
        share = nbytes / total
        text = f"{nbytes_text(nbytes)}, {share_text(share)}"
        mark = Mark(start, share, f"hue{index}", f"{dtype}: {text}")
        rows.append(Row(dtype, text, (mark,)))
        start += share
    return Picture("shares", "Bytes by dtype", rows)


def of_kinds(sizes: Sequence[Size]) -> Picture:
    """The bytes of each kind of tensor, the largest first."""
    counts: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for size in sizes:
        kind = place_of(size.name).kind
        counts[kind] += size.nbytes
        tensors[kind] += 1
    total = sum(counts.values()) or 1
    largest = max(counts.values(), default=0) or 1
    rows = []
    for kind, nbytes in counts.most_common(_ROWS // 2):
        many = f"{tensors[kind]:,} tensors" if tensors[kind] > 1 else "1 tensor"
        text = f"{nbytes_text(nbytes)}, {share_text(nbytes / total)}"
        rows.append(Row(kind, text, (Mark(0, nbytes / largest, "hue0", f"{many}, {text}"),)))
    note = "A star stands for the number of a layer or an expert."
    return Picture("bars", "Bytes by kind of tensor", rows, note + _left_out(counts, rows))


def of_layers(sizes: Sequence[Size]) -> Picture | None:
    """The bytes of each layer, from the first to the last; None if names have no layers."""
    placed = [(place_of(size.name), size.nbytes) for size in sizes]
    bins = _bins(place for place, _ in placed)
    if bins is None:
        return None
    totals = [0] * len(bins)
    outside = 0
    for place, nbytes in placed:
        if place.layer is None:
            outside += nbytes
        else:
            totals[bins.column(place.layer)] += nbytes
    largest, width = max(totals) or 1, 1 / len(bins)
    outside_note = f"Outside of layers: {nbytes_text(outside)}."
    if len(bins) <= _FEW:
        few = [
            Row(bins.label(at), nbytes_text(total), (Mark(0, total / largest, "hue0", ""),))
            for at, total in enumerate(totals)
        ]
        return Picture("bars", "Bytes by layer", few, outside_note)
    marks = [
        Mark(at * width, total / largest, "hue0", f"{bins.label(at)}: {nbytes_text(total)}", width)
        for at, total in enumerate(totals)
    ]
    note = f"The highest bar is {nbytes_text(largest)}. {outside_note}"
    return Picture("columns", "Bytes by layer", [Row("", "", marks)], note, bins.ends)


def of_norms(statistics: Mapping[str, Statistics]) -> Picture | None:
    """The root mean square of each kind of tensor, layer by layer; None if names have no layers."""
    placed = {name: place_of(name) for name in statistics}
    bins = _bins(placed.values())
    if bins is None:
        return None
    kinds: dict[str, dict[int, Statistics]] = defaultdict(dict)
    for name, place in placed.items():
        if place.layer is not None:
            at = bins.column(place.layer)
            kinds[place.kind][at] = kinds[place.kind].get(at, Statistics()) + statistics[name]
    rows = [_line(kind, held, bins) for kind, held in list(kinds.items())[:_ROWS]]
    note = (
        "Norm divided by the square root of the number of values, so that sizes do not matter. Each line has "
        "its own scale, from its least to its greatest value. A red mark is a layer with NaN or infinity."
    )
    title = "Norms by layer (root mean square)"
    return Picture("lines", title, rows, note + _left_out(kinds, rows), bins.ends)


def _line(kind: str, held: Mapping[int, Statistics], bins: Bins) -> Row:
    values = {at: found.root_mean_square for at, found in sorted(held.items())}
    known = {at: v for at, v in values.items() if v is not None and math.isfinite(v)}
    low, high = min(known.values(), default=0.0), max(known.values(), default=0.0)
    spread, last = (high - low) or 1.0, max(len(bins) - 1, 1)
    points, marks = [], []
    for at, value in values.items():
        is_odd = bool(held[at].nan or held[at].inf) or at not in known
        height = (known[at] - low) / spread if at in known and high > low else 0.5
        style = "bad" if is_odd else "point"
        text = f"{bins.label(at)}: {number_text(value)}{_odd(held[at])}"
        marks.append(Mark(at / last, height, style, text))
        if at in known:
            points.append(f"{at / last:.4f},{1 - height:.4f}")
    text = number_text(low) if low == high else f"{number_text(low)} to {number_text(high)}"
    return Row(kind, text, marks, " ".join(points))


def _odd(found: Statistics) -> str:
    parts = ((found.nan, "NaN"), (found.inf, "infinite"))
    return "".join(f", {count:,} {word}" for count, word in parts if count)


def of_changes(changes: Mapping[str, float | str | None]) -> Picture | None:
    """Where two checkpoints differ: a strip for each kind of tensor, a cell for each layer.

    Args:
        changes: for each tensor its relative change, 0 if it is the same; or ``only`` if one side lacks it or
            has it in another shape; or None if the change is no number.
    """
    if not changes:
        return None
    placed = {name: place_of(name) for name in changes}
    bins = _bins(placed.values()) or Bins([0], 1)
    kinds: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, place in placed.items():
        at = -1 if place.layer is None else bins.column(place.layer)
        kinds[place.kind][at].append(name)
    rows = [_strip(kind, held, changes, bins) for kind, held in kinds.items()]
    # Of many kinds, those that changed are shown.
    changed = [row for row in rows if any(mark.style != "level0" for mark in row.marks)]
    shown = rows if len(rows) <= _ROWS else changed[:_ROWS]
    note = "||a - b|| / ||a|| of each tensor; of several in one cell, the largest."
    if len(shown) < len(rows):
        same = len(rows) - len(changed)
        note += f" {same:,} kinds without a change are not shown." if same else ""
        note += _left_out(changed, shown)
    return Picture(
        "cells",
        "What changed where",
        shown,
        note,
        bins.ends if len(bins) > 1 else ("", ""),
        _LEGEND,
    )


_LEGEND = (
    ("level0", "the same"),
    ("level1", "up to 1e-6"),
    ("level2", "up to 0.0001"),
    ("level3", "up to 0.01"),
    ("level4", "up to 1"),
    ("level5", "more"),
    ("only", "added, removed or reshaped"),
    ("bad", "NaN, infinity, or from zero"),
)
_ORDER = {style: rank for rank, (style, _) in enumerate(_LEGEND)}


def _strip(
    kind: str,
    held: Mapping[int, Sequence[str]],
    changes: Mapping[str, float | str | None],
    bins: Bins,
) -> Row:
    marks, width = [], 1 / len(bins)
    for at, names in sorted(held.items()):
        styles = [_level(changes[name]) for name in names]
        worst = max(
            range(len(names)), key=lambda i: (_ORDER[styles[i]], _amount(changes[names[i]]))
        )
        change = changes[names[worst]]
        said = {"level0": "the same", "only": "added, removed or reshaped"}.get(styles[worst])
        said = said or (number_text(change) if isinstance(change, float) else "not a number")
        where = kind if at < 0 else bins.label(at)
        # Outside of layers, one cell, so that a wide mark does not look like many layers.
        start, size = (0.0, min(width, 1 / 16)) if at < 0 else (at * width, width)
        marks.append(Mark(start, 1.0, styles[worst], f"{where}: {said}", size))
    moved = sum(1 for names in held.values() for n in names if _level(changes[n]) != "level0")
    return Row(kind, f"{moved:,} of {sum(map(len, held.values())):,}", marks)


def _amount(change: float | str | None) -> float:
    return change if isinstance(change, float) else 0.0


def _level(change: float | str | None) -> str:
    if change is None:
        return "bad"
    if isinstance(change, str):
        return "only"
    if not change:
        return "level0"
    return f"level{next(level for limit, level in _LEVELS if change <= limit)}"


def _bins(places: Iterable[Place]) -> Bins | None:
    """The columns of the layers; None if there are not two layers."""
    layers = {place.layer for place in places if place.layer is not None}
    return Bins(layers, _COLUMNS) if len(layers) > 1 else None


def _left_out(every: Sequence[object] | Mapping[str, object], shown: Sequence[object]) -> str:
    left = len(every) - len(shown)
    return f" {left:,} more kinds are in the table alone." if left > 0 else ""
