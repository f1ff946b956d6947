"""Owns the comparison of tensors with expected tensors, bit for bit, and the messages about differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ckpt_tools.errors import CkptError
from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.windows import Meter, Window, same_bits, unequal_elements, visit_windows
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import Directory
from ckpt_tools.verification.problem import Findings

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]


class Held(NamedTuple):
    """A tensor of the directory, and its place."""

    entry: Entry
    tensor: Tensor


class Expected(NamedTuple):
    """A tensor and its expected value.

    Attributes:
        held: the tensor of the directory.
        tensor: the expected tensor, in the dtype of ``held``.
        source: the dtype in the checkpoint.
        hint: the next step.
    """

    held: Held
    tensor: Tensor
    source: DType
    hint: str


class _Differing(NamedTuple):
    """Different elements of a window: their number, the first, and its value on each side."""

    elements: int
    first: int
    here: str
    there: str


def compare(
    directory: Directory,
    expected: Sequence[Expected],
    findings: Findings,
    workers: int,
    progress: Progress | None,
) -> None:
    """Add a problem for every tensor that differs or cannot be read.

    Args:
        directory: the directory of the tensors.
        expected: the tensors.
        findings: takes the problems.
        workers: number of threads.
        progress: called with bytes done and bytes in all, from any thread.
    """
    groups = [(each.held.tensor, each.tensor) for each in expected]
    meter = Meter(progress, sum(2 * each.held.tensor.nbytes for each in expected))

    def visit(window: Window, elements: Sequence[torch.Tensor]) -> _Differing | None:
        here, there = elements
        return None if same_bits(here, there) else _differing(window, here, there)

    def failed(_: Window, error: CkptError) -> CkptError:
        return error

    seen: Iterator[tuple[Window, _Differing | CkptError | None]] = visit_windows(
        groups, visit, workers=workers, progress=meter.add, failed=failed
    )
    for index, windows in groupby(seen, key=lambda pair: pair[0].group):
        results = [result for _, result in windows if result is not None]
        errors = [result for result in results if isinstance(result, CkptError)]
        differing = [result for result in results if isinstance(result, _Differing)]
        if errors:
            _note_unread(directory, expected[index], errors[0], findings)
        if differing:
            _note_differing(expected[index], differing, findings)


def _differing(window: Window, here: torch.Tensor, there: torch.Tensor) -> _Differing:
    unequal = unequal_elements(here, there)
    at = int(unequal.nonzero()[0])
    values = [_value(each[at : at + 1]) for each in (here, there)]
    if values[0] == values[1]:
        # Zeros of different signs and NaNs differ only in their bits.
        values = [_hexadecimal(each[at : at + 1]) for each in (here, there)]
    return _Differing(int(unequal.sum()), window.start + at, *values)


def _value(element: torch.Tensor) -> str:
    value = element.item()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _hexadecimal(element: torch.Tensor) -> str:
    import torch

    return "0x" + bytes(element.view(torch.uint8).flip(0).tolist()).hex()


def _note_differing(
    expected: Expected, differing: Sequence[_Differing], findings: Findings
) -> None:
    entry, first = expected.held.entry, differing[0]
    count, numel = sum(each.elements for each in differing), expected.tensor.numel
    place = f" {_index(first.first, entry.shape)}" if entry.shape else ""
    rounded = expected.source != expected.tensor.dtype
    there = f"the checkpoint gives {first.there}" + (
        f" ({expected.source}, rounded)" if rounded else ""
    )
    findings.add(
        "tensor-differs",
        f"{count:,} of {numel:,} elements differ; the first{place} is {first.here}, {there}",
        file=entry.file,
        tensor=entry.name,
        hint=expected.hint,
    )


def _note_unread(
    directory: Directory, expected: Expected, error: CkptError, findings: Findings
) -> None:
    entry, path = expected.held.entry, error.path
    if path is not None and path.is_relative_to(directory.path):
        where = entry.file
        fact = error.fact
    else:
        where = None
        fact = f"the checkpoint's {path}: {error.fact}"
    findings.add(
        "against-unread",
        f"it cannot be read completely: {fact}",
        file=where,
        tensor=entry.name,
        hint=error.hint,
    )


def _index(flat: int, shape: Sequence[int]) -> list[int]:
    """The index in each axis of a flat index."""
    index: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.insert(0, at)
    return index
