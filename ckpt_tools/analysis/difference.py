"""Owns the comparison of two checkpoints, for ``ckpt-tools diff``: which tensors form a pair, and the result.

    open both -> names without wrappers -> pair by name -> choose the copy of each -> compare windows

Windows are compared as bytes first. Arithmetic is needed only for tensors that differ.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

from ckpt_tools.analysis.change import Sums, Tolerance, measure
from ckpt_tools.errors import AmbiguousCheckpoint, UsageError
from ckpt_tools.hub.links import remarks_on
from ckpt_tools.model.matching import Matched, Side, Weights, alike, match, side_of
from ckpt_tools.readers.opening import FILE, open_weights
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.deferred import settle
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.tensors.windows import Meter, Window, same_bits, visit_windows

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Layout:
    """Dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        return cls(str(tensor.dtype), tensor.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorDifference:
    """How the elements of one tensor differ.

    Attributes:
        name: its name.
        shape: sizes, the same on both sides.
        dtypes: the compared element types of A and B.
        changed: elements that differ.
        max_abs: largest ``|a - b|`` of the elements that are finite on both sides.
        mean_abs: mean of them, over all elements that are finite on both sides.
        relative: ``||a - b|| / ||a||`` of them; None if A is zero.
        cosine: cosine of the angle between A and B; None if one of them is zero.
        nan: elements that are NaN, in A and in B.
        inf: elements that are infinite, in A and in B.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    changed: int
    max_abs: float
    mean_abs: float
    relative: float | None
    cosine: float | None
    nan: tuple[int, int]
    inf: tuple[int, int]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> tuple[float, float, int]:
        """The sort key of the change: NaN and infinity first, then ``relative`` and ``max_abs``."""
        odd = any((*self.nan, *self.inf))
        relative = math.inf if odd or (self.relative is None and self.max_abs) else self.relative
        return relative or 0.0, self.max_abs, self.changed

    def to_json(self) -> dict[str, Any]:
        """The object of the report; a number that JSON cannot hold is null."""
        data = asdict(self) | {"numel": self.numel}
        return {k: None if v in (math.inf, -math.inf) else v for k, v in data.items()}


@dataclass(frozen=True)
class Difference:
    """The differences between two checkpoints, A and B.

    Attributes:
        a: ``path``, ``title``, ``name`` and ``step`` of A.
        b: the same for B.
        rtol: an element counts as changed if ``|a - b| > atol + rtol * |b|``.
        atol: the absolute part of the tolerance.
        compared: number of tensors that both have in the same shape.
        elements: number of their elements.
        unchanged: compared tensors that did not change.
        changed: tensors that changed, largest change first.
        recast: names of tensors with different dtypes, with both dtypes. Their values are compared.
        reshaped: names of tensors with different shapes, with both layouts. They are not compared.
        added: tensors that only B has.
        removed: tensors that only A has.
        notes: how names and copies were chosen.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    rtol: float
    atol: float
    compared: int
    elements: int
    unchanged: tuple[str, ...]
    changed: tuple[TensorDifference, ...]
    recast: Mapping[str, tuple[str, str]]
    reshaped: Mapping[str, tuple[Layout, Layout]]
    added: Mapping[str, Layout]
    removed: Mapping[str, Layout]
    notes: tuple[str, ...]

    @property
    def same(self) -> int:
        """Number of compared tensors that did not change."""
        return len(self.unchanged)

    @property
    def is_empty(self) -> bool:
        """Whether there is no difference."""
        return not (self.changed or self.recast or self.reshaped or self.added or self.removed)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values.

        ``version`` (of this schema), ``a`` and ``b`` (``path``, ``title``, ``name``, ``step``), ``rtol``,
        ``atol``, ``identical``, the counts ``compared``, ``elements`` and ``same``; lists of objects with
        a ``name``: ``changed`` (the fields of :class:`TensorDifference` and ``numel``), ``recast`` (dtypes
        ``a`` and ``b``), ``reshaped`` (``a`` and ``b``, each with ``dtype`` and ``shape``), ``added`` and
        ``removed`` (``dtype`` and ``shape``); and ``notes``.
        """

        def layouts(held: Mapping[str, Layout]) -> list[dict[str, Any]]:
            return [{"name": name, **asdict(layout)} for name, layout in held.items()]

        return {
            "version": SCHEMA_VERSION,
            "a": dict(self.a),
            "b": dict(self.b),
            "rtol": self.rtol,
            "atol": self.atol,
            "identical": self.is_empty,
            "compared": self.compared,
            "elements": self.elements,
            "same": self.same,
            "changed": [each.to_json() for each in self.changed],
            "recast": [{"name": n, "a": a, "b": b} for n, (a, b) in self.recast.items()],
            "reshaped": [
                {"name": n, "a": asdict(a), "b": asdict(b)} for n, (a, b) in self.reshaped.items()
            ],
            "added": layouts(self.added),
            "removed": layouts(self.removed),
            "notes": list(self.notes),
        }


def diff(
    a: PathLike | Checkpoint,
    b: PathLike | Checkpoint,
    *,
    tag_a: str | None = None,
    tag_b: str | None = None,
    weights: Weights = "auto",
    rtol: float = 0.0,
    atol: float = 0.0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two checkpoints of any formats, tensor by tensor.

    Args:
        a: a training checkpoint, a directory of a model or an adapter, a file of weights, or an opened
            checkpoint.
        b: the other checkpoint.
        tag_a: the name of A among several checkpoints.
        tag_b: the name of B among several checkpoints.
        weights: the copy of a training checkpoint's tensors. ``master`` takes the optimizer's copy if
            there is one. ``model`` takes the weights of the training dtype, which are the rounded masters.
            ``auto`` takes for each tensor the copy that the other side holds too, masters first.
        rtol: an element counts as changed if ``|a - b| > atol + rtol * |b|``. If both are 0, every bit
            counts.
        atol: the absolute part of the tolerance.
        workers: number of threads; the result does not depend on it.
        progress: called with bytes done and bytes in all, from any thread.

    Returns:
        The differences.

    Raises:
        UsageError: a tolerance is negative, or a tag or copy is unknown.
        CkptError: see :mod:`ckpt_tools.errors`; one of the two cannot be read.
    """
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf):
        raise UsageError(f"a tolerance must be a number >= 0, not rtol {rtol:g}, atol {atol:g}")
    if weights not in ("auto", "master", "model"):
        raise UsageError(f"{weights!r} is not a copy", hint="Choose auto, master or model.")
    opened = [_opened(a, tag_a, "a"), _opened(b, tag_b, "b")]
    sides = alike(side_of(opened[0], "A", weights), side_of(opened[1], "B", weights))
    first, second = (side.copies[0] for side in sides)
    matched = match(first, second)
    chosen = {name: _chosen(name, *sides) for name in matched.pairs}
    reshaped = {n: (x, y) for n, (x, y) in chosen.items() if x.shape != y.shape}
    pairs = {name: pair for name, pair in chosen.items() if name not in reshaped}
    count = workers or default_workers()
    settle((tensor for pair in pairs.values() for tensor in pair), count)
    changed = list(_changes(pairs, Tolerance(rtol, atol), count, progress))
    moved = {each.name for each in changed}
    return Difference(
        a=_facts(opened[0]),
        b=_facts(opened[1]),
        rtol=rtol,
        atol=atol,
        compared=len(pairs),
        elements=sum(x.numel for x, _ in pairs.values()),
        unchanged=tuple(name for name in pairs if name not in moved),
        changed=tuple(sorted(changed, key=lambda each: each.size, reverse=True)),
        recast={
            name: (str(x.dtype), str(y.dtype))
            for name, (x, y) in pairs.items()
            if x.dtype != y.dtype
        },
        reshaped={name: (Layout.of(x), Layout.of(y)) for name, (x, y) in reshaped.items()},
        added={name: Layout.of(second[name]) for name in matched.only_second},
        removed={name: Layout.of(first[name]) for name in matched.only_first},
        notes=(
            *(note for side in sides for note in side.notes),
            *_links(a, opened[0]),
            *_links(b, opened[1]),
            *_rounded(pairs, sides),
            *_strangers(matched),
        ),
    )


def _opened(checkpoint: PathLike | Checkpoint, tag: str | None, side: str) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    try:
        return open_weights(as_path(checkpoint), tag)
    except AmbiguousCheckpoint as error:
        if error.hint is not None:
            # This command has a tag option for each side.
            error.hint = error.hint.replace("--tag ", f"--tag-{side} ")
        raise


def _links(named: PathLike | Checkpoint, opened: Checkpoint) -> list[str]:
    """Notes on links that lead out of a directory that was named."""
    if isinstance(named, Checkpoint):
        return []
    return remarks_on([opened.location.directory, *opened.files], [named])


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    location = checkpoint.location
    file = location.name if location.format == FILE else ""
    return {
        "path": str(location.directory / file),
        "title": checkpoint.title,
        "name": location.name,
        "step": checkpoint.step,
    }


def _chosen(name: str, a: Side, b: Side) -> tuple[Tensor, Tensor]:
    """The copies of a tensor that have the same dtype; otherwise the preferred copy of each side."""
    choices = [(x[name], y[name]) for x, y in product(a.copies, b.copies)]
    return next(((x, y) for x, y in choices if x.dtype == y.dtype), choices[0])


def _rounded(pairs: Mapping[str, tuple[Tensor, Tensor]], sides: Sequence[Side]) -> Iterator[str]:
    """Notes on masters that were compared as the weights of the training dtype."""
    for index, (side, other) in enumerate((sides, sides[::-1])):
        masters = side.copies[0]
        dtypes = Counter(
            (masters[name].dtype, pair[index].dtype)
            for name, pair in pairs.items()
            if masters[name].dtype != pair[index].dtype
        )
        for (master, trained), count in dtypes.items():
            yield (
                f"{side.label}: {count} {master} masters are compared as {trained} weights, "
                f"because {other.label} holds {trained}"
            )


def _strangers(matched: Matched) -> Iterator[str]:
    """A note if no names match, with a name of each side."""
    if not matched.pairs and matched.only_first and matched.only_second:
        yield (
            f"no tensor has the same name in both: A has {matched.only_first[0]}, "
            f"B has {matched.only_second[0]}"
        )
        for whole, part, names in (
            ("A", "B", (matched.only_first, matched.only_second)),
            ("B", "A", (matched.only_second, matched.only_first)),
        ):
            for attribute in _attributes(*names):
                yield (
                    f"the names suggest that {part} is the attribute {attribute} of {whole}: compare {part} "
                    f"with the output of ckpt-tools extract-attr {attribute} for {whole}"
                )


def _attributes(whole: Sequence[str], part: Sequence[str]) -> list[str]:
    """The attributes of a composite model that contain all names of another model."""
    names, end = set(whole), f".{part[0]}"
    found = {name.removesuffix(end) for name in whole if name.endswith(end)}
    return sorted(a for a in found if all(f"{a}.{name}" in names for name in part))


def _changes(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: Tolerance,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[TensorDifference]:
    """The tensors that differ, in the order of ``pairs``."""
    names, groups = list(pairs), list(pairs.values())
    meter = Meter(progress, sum(x.nbytes + y.nbytes for x, y in groups))

    def visit(window: Window, elements: Sequence[torch.Tensor]) -> Sums | None:
        a, b = elements
        if a.dtype == b.dtype and same_bits(a, b):
            return None
        return measure(a, b, tolerance)

    found: dict[int, Sums] = {}
    same: dict[int, list[Window]] = {}
    seen = visit_windows(groups, visit, workers=workers, progress=meter.add)
    for index, windows in groupby(seen, key=lambda pair: pair[0].group):
        sums, equal = Sums(), []
        for window, measured in windows:
            if measured is None:
                equal.append(window)
            else:
                sums += measured
        if sums.changed:
            found[index], same[index] = sums, equal
    # Equal windows of a changed tensor count in its norms.
    left = [window for windows in same.values() for window in windows]
    meter.expect(sum(groups[w.group][0].dtype.itemsize * (w.stop - w.start) for w in left))
    alone = [(a,) for a, _ in groups]

    def norms(window: Window, elements: Sequence[torch.Tensor]) -> Sums:
        return measure(elements[0], elements[0], tolerance)

    for window, sums in visit_windows(
        alone, norms, workers=workers, windows=left, progress=meter.add
    ):
        found[window.group] += sums
    for index, sums in found.items():
        yield _tensor_difference(names[index], groups[index], sums)


def _tensor_difference(name: str, pair: tuple[Tensor, Tensor], sums: Sums) -> TensorDifference:
    return TensorDifference(
        name=name,
        shape=pair[0].shape,
        dtypes=(str(pair[0].dtype), str(pair[1].dtype)),
        changed=sums.changed,
        max_abs=sums.largest,
        mean_abs=sums.mean,
        relative=sums.relative,
        cosine=sums.cosine,
        nan=(sums.nan_a, sums.nan_b),
        inf=(sums.inf_a, sums.inf_b),
    )
