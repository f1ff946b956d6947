"""Some rows of a tensor, read without the others: ``tensor[10:20]``."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, SupportsIndex

from ckpt_tools.tensors.catalogue import Tensor
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.threads import load_torch

if TYPE_CHECKING:
    import torch

Rows = SupportsIndex | slice | Sequence[int]


def read_rows(tensor: Tensor, index: Rows | tuple[object, ...]) -> torch.Tensor:
    """The rows of ``tensor`` along its first dimension; only their bytes are read.

    Args:
        tensor: a tensor of one dimension or more.
        index: a number, a slice, or numbers in a list, an array or a tensor; negative ones count from the
            end. Further indices, in a tuple, are those of torch, and are applied to the rows.

    Returns:
        A new CPU tensor, as ``tensor.load()[index]`` gives it.

    Raises:
        IndexError: the tensor has no such row, or no dimension.
        DamagedCheckpoint: a file is too short.
    """
    first, *further = index if isinstance(index, tuple) else (index,)
    if hasattr(first, "tolist"):
        # An array or a tensor; it claims to be a number whatever its shape is.
        first = first.tolist()
    if not tensor.shape:
        raise IndexError("a tensor without dimensions has no rows: use load()")
    load_torch()
    import torch

    count, sizes = tensor.shape[0], tensor.shape[1:]
    size = math.prod(sizes)
    with Gatherer() as gatherer:

        def run(start: int, stop: int) -> torch.Tensor:
            stop = max(start, stop)
            return gatherer.window(tensor, start * size, stop * size).view(stop - start, *sizes)

        if isinstance(first, slice):
            numbers = range(count)[first]
            if numbers.step == 1:
                rows = run(numbers.start, numbers.stop)
            else:
                rows = torch.cat([run(0, 0), *(run(number, number + 1) for number in numbers)])
        elif isinstance(first, SupportsIndex):
            number = _number(first, count)
            only = (0, *further)
            return run(number, number + 1)[only]
        elif isinstance(first, Iterable):
            chosen = [_number(number, count) for number in first]
            rows = torch.cat([run(0, 0), *(run(number, number + 1) for number in chosen)])
        else:
            raise TypeError(f"rows are chosen by a number, a slice or a list, not by {first!r}")
    of_rows = (slice(None), *further)
    return rows[of_rows] if further else rows


def _number(value: SupportsIndex, count: int) -> int:
    if isinstance(value, bool):
        raise TypeError("rows are chosen by numbers, not by a mask: use load()")
    number = operator.index(value)
    if not -count <= number < count:
        raise IndexError(f"there is no row {number} among {count}")
    return number % count
