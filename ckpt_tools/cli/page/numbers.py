"""Owns how numbers are shown on a page, and columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ckpt_tools.cli.page.parts import Column
from ckpt_tools.text import nbytes_text

NOTHING = "–"
_LARGEST = 1.7e308


def number_text(value: float | None) -> str:
    """A measured number in four digits; a dash for none."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def share_text(share: float | None) -> str:
    """A share in percent; a share that is not 0 or 1 is never shown as one of them."""
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{100 * min(max(share, 1e-6), 0.999):.3g}%"


def counts(head: str, values: Iterable[int]) -> Column:
    """A column of whole numbers."""
    held = list(values)
    return Column(head, [f"{value:,}" for value in held], [_key(value) for value in held])


def sizes(head: str, values: Iterable[int]) -> Column:
    """A column of bytes."""
    held = list(values)
    return Column(head, [nbytes_text(value) for value in held], [_key(value) for value in held])


def numbers(head: str, values: Iterable[float | None]) -> Column:
    """A column of measured numbers."""
    held = list(values)
    return Column(head, [number_text(value) for value in held], [_key(value) for value in held])


def shares(head: str, values: Iterable[float | None]) -> Column:
    """A column of shares."""
    held = list(values)
    return Column(head, [share_text(value) for value in held], [_key(value) for value in held])


def texts(head: str, values: Iterable[str]) -> Column:
    """A column of text."""
    return Column(head, list(values))


def _key(value: float | None) -> float | None:
    """The number to sort by: JSON holds no NaN and no infinity, and a damaged header any integer."""
    if value is None or value != value:
        return None
    return float(min(max(value, -_LARGEST), _LARGEST))
