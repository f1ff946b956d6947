"""Owns the tree of errors: every failure that ckpt-tools foresees, whose fault it is, and its exit status.

    CkptError                      1   anything below
    ├── UsageError                 2   the request cannot be carried out as typed
    │   ├── AmbiguousCheckpoint    2   several checkpoints fit the path; the choices are listed
    │   ├── AttributeNotFound      2   a composite model has no such part; the parts are listed
    │   ├── OutputExists           2   the output exists and --overwrite was not given
    │   └── MissingAsset           2   a config, tokenizer or token that the output needs was not found
    ├── NotACheckpoint             3   nothing under the path is a checkpoint
    ├── DamagedCheckpoint          4   missing, truncated, mixed or contradictory files
    │   └── UnsafePickle           4   reading on would need code from the checkpoint
    ├── UnsupportedLayout          5   a layout that is recognised but cannot be read
    │   └── NoModel                5   a checkpoint of something else, such as an optimizer
    ├── OutputFailed               6   the output could not be written: disk full, permission, I/O error
    ├── VerificationFailed         7   the output was written, and verify found it wrong; it never appeared
    ├── RankFailed                 8   another rank failed with no status of its own, was lost, or hangs
    └── StoreFailed                9   an object store, web server or Hub refuses, or cannot be reached

``except CkptError`` catches all errors of ckpt-tools and no others. Each error says what is wrong, in which
file, and what to do next. A program can read the same from its fields.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path


class CkptError(Exception):
    """A failure that ckpt-tools foresees.

    Attributes:
        fact: what is wrong, one sentence without a full stop.
        path: the file or directory it was found in, if there is one.
        where: its text: of a file in a store, the address.
        tensor: the tensor it concerns, if there is one.
        hint: the next step, in whole sentences.
        exit_code: exit status of the command line for this kind of error.
    """

    exit_code = 1

    def __init__(
        self,
        fact: str,
        *,
        path: str | Path | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.fact = fact
        # The text of a path in a tree of several places says where the file really is.
        self.where = str(path) if path is not None else None
        self.path = Path(self.where) if self.where is not None else None
        self.tensor = tensor
        self.hint = hint
        super().__init__(fact)

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where is not None else ""
        what = f"{self.tensor}: " if self.tensor is not None else ""
        hint = f"\n{self.hint}" if self.hint else ""
        return f"{where}{what}{self.fact}{hint}"


class UsageError(CkptError):
    """The request cannot be carried out as typed."""

    exit_code = 2


class AmbiguousCheckpoint(UsageError):
    """Several checkpoints fit the path.

    Attributes:
        choices: what the caller can name instead.
    """

    def __init__(
        self, fact: str, *, choices: Sequence[str], path: Path, hint: str | None = None
    ) -> None:
        self.choices = tuple(choices)
        super().__init__(fact, path=path, hint=hint)


class AttributeNotFound(UsageError):
    """A composite model has no such part.

    Attributes:
        choices: the parts there are, with their numbers of tensors.
    """

    def __init__(self, fact: str, *, choices: Mapping[str, int], path: Path | None = None) -> None:
        self.choices = dict(choices)
        listed = ", ".join(f"{name} ({tensors(count)})" for name, count in self.choices.items())
        super().__init__(fact, path=path, hint=f"It has: {listed}.")


class OutputExists(UsageError):
    """The output path exists, and it was not to be replaced."""


class MissingAsset(UsageError):
    """A config, tokenizer or token that the output needs was not found."""


class NotACheckpoint(CkptError):
    """Nothing under the path is a checkpoint."""

    exit_code = 3


class DamagedCheckpoint(CkptError):
    """Files of the checkpoint are missing, truncated, mixed or contradict each other.

    Attributes:
        missing: the names of the missing files.
    """

    exit_code = 4

    def __init__(
        self,
        fact: str,
        *,
        path: str | Path | None = None,
        tensor: str | None = None,
        hint: str | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.missing = tuple(missing)
        super().__init__(fact, path=path, tensor=tensor, hint=hint)


class UnsafePickle(DamagedCheckpoint):
    """The checkpoint needs code that is not on the allow-list to build something that must be read."""


class UnsupportedLayout(CkptError):
    """A layout that is recognised but cannot be read."""

    exit_code = 5


class NoModel(UnsupportedLayout):
    """A checkpoint of something else than a model, such as an optimizer."""


class OutputFailed(CkptError):
    """The output could not be written."""

    exit_code = 6


class VerificationFailed(CkptError):
    """The output was written, verify found problems, and it was not published."""

    exit_code = 7


class RankFailed(CkptError):
    """Another rank of the same command failed, was lost, or made no progress."""

    exit_code = 8


class StoreFailed(CkptError):
    """An object store, a web server or the Hub refuses a request, or cannot be reached."""

    exit_code = 9


def counted(count: int, noun: str) -> str:
    """A number of things as text: ``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def tensors(count: int) -> str:
    """A number of tensors as text."""
    return counted(count, "tensor")


def listed(items: Collection[object], limit: int = 6, total: int | None = None) -> str:
    """The first items of a list as text, and the number of those that are left out.

    Args:
        items: what is listed.
        limit: the number of items shown.
        total: the number of items that there are; by default that of ``items``.
    """
    shown = ", ".join(map(str, islice(items, limit)))
    more = (len(items) if total is None else total) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown


def number_ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as text: ``[0, 1, 2, 5]`` is ``0-2, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def rank_ranges(ranks: Collection[int]) -> str:
    """Rising ranks as text: ``rank 1``, ``ranks 0-2, 5``."""
    return f"rank{'' if len(ranks) == 1 else 's'} {number_ranges(ranks)}"
