"""Owns the matching of names with patterns that a checkpoint states, within a limit of time.

DeepSpeed records patterns of parameters, and adapters name their modules by them. So the pattern and the
names come from the input. A regular expression such as ``(a+)+b`` takes twice as long for each letter more of
a name. The library ``regex`` ends a comparison at a limit of processor time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout

# For the patterns of one file. A thousand patterns of a thousand names take two.
SECONDS = 5.0
# A brace that is text for `re` and fuzzy matching for `regex`.
_BRACE = re.compile(r"\\.|\{(?!\d*,?\d*\})", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)

V = TypeVar("V")
R = TypeVar("R")


class Allowance:
    """The processor time that the patterns of one file may take.

    Args:
        path: the file, for errors.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._left = SECONDS

    def of(self, work: Callable[[float], R]) -> R:
        """What some work gives, after its time was counted.

        Args:
            work: takes the seconds that are left, and ends with TimeoutError when they are used up.

        Raises:
            UnsupportedLayout: they are used up.
        """
        started = time.thread_time()
        try:
            if self._left > 0:
                return work(self._left)
        except TimeoutError:
            self._left = 0.0
        finally:
            self._left -= time.thread_time() - started
        raise UnsupportedLayout(
            f"comparing its patterns with names takes more than {SECONDS:.0f} seconds",
            path=self.path,
            hint="A pattern with repetitions within repetitions takes years. Write it without them, or "
            "list the names.",
        )


class Patterns(Generic[V]):
    """Regular expressions, each with a value.

    Args:
        values: the value of each pattern, in the order in which they are tried.
        allowance: the time that they may take.
        whole: the whole name must match, and not only its start.

    Raises:
        DamagedCheckpoint: one is not a regular expression.
    """

    def __init__(
        self, values: Mapping[str, V], allowance: Allowance, *, whole: bool = False
    ) -> None:
        self._allowance, self._is_whole = allowance, whole
        self._whole: dict[str, tuple[int, V]] = {}
        self._others: list[tuple[int, Callable[..., object], V]] = []
        for index, (pattern, value) in enumerate(values.items()):
            name = _whole_name(pattern)
            if name is None:
                compiled = allowance.of(partial(self._compiled, pattern))
                self._others.append((index, compiled, value))
            else:
                self._whole.setdefault(name, (index, value))

    def first(self, name: str) -> V | None:
        """The value of the first pattern that a name matches; None if none does."""
        end, found = self._whole.get(name, (len(self._whole) + len(self._others), None))
        for index, compare, value in self._others:
            if index > end:
                break
            if self._allowance.of(partial(_found, compare, name)):
                return value
        return found

    def _compiled(self, pattern: Any, _seconds: float) -> Callable[..., object]:
        # Most checkpoints state none, and this takes as long as reading a small one.
        import regex  # type: ignore[import-untyped]

        try:
            re.compile(pattern)
            compiled = regex.compile(_BRACE.sub(_as_text, pattern))
        except (re.error, regex.error, OverflowError, RecursionError, TypeError) as error:
            raise DamagedCheckpoint(
                f"a pattern in it is not a regular expression ({error})",
                path=self._allowance.path,
                hint="The file is damaged or was edited. Copy it anew from where it was written.",
            ) from error
        compare: Callable[..., object] = compiled.fullmatch if self._is_whole else compiled.match
        return compare


def _found(compare: Callable[..., object], name: str, seconds: float) -> bool:
    return compare(name, timeout=seconds) is not None


def _whole_name(pattern: Any) -> str | None:
    """The one name that a pattern matches, where it is the escaped name between ``^`` and ``$``."""
    if not isinstance(pattern, str) or pattern[:1] != "^" or pattern[-1:] != "$":
        return None
    name = _ESCAPE.sub(r"\1", pattern[1:-1])
    return name if re.escape(name) == pattern[1:-1] else None


def _as_text(found: re.Match[str]) -> str:
    return r"\{" if found[0] == "{" else found[0]
