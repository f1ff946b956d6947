"""Which of many alike cases `make quick` runs; `make test` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int = 4) -> list[Any]:
    """One of ``every`` cases as it is, from the first on, and the others marked `slow`."""
    return [
        case if number % every == 0 else pytest.param(*_values(case), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    """What `pytest.param` takes: each of several arguments, or the only one."""
    return case if type(case) is tuple else (case,)
