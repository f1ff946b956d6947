"""What each rank runs in the tests: a list of conversions, one after the other, by the library.

One torchrun serves many cases, because starting one takes longer than they do. Usage:
``driver.py cases.json``, a list of ``{"function", "arguments", "options", "changed"}``. The last, which may
be missing, is what one rank has otherwise than the others: ``{"rank", "options"}``, or ``{"rank",
"module", "name", "value"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import ckpt_tools
from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks import from_environment
from ckpt_tools.writing import shares

RANK = int(os.environ["RANK"])


@contextlib.contextmanager
def otherwise(changed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One rank unlike the others; gives the options that it has."""
    if changed.get("rank") != RANK or "options" in changed:
        yield changed["options"] if changed.get("rank") == RANK else {}
        return
    with mock.patch.object(import_module(changed["module"]), changed["name"], changed["value"]):
        yield {}


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of tensors that this rank writes."""
    counts: list[int] = []

    def write(*arguments: Any, **options: Any) -> Any:
        written = original(*arguments, **options)
        counts.append(written.bytes_written)
        return written

    original = shares.write  # type: ignore[attr-defined]
    with mock.patch.object(shares, "write", write):
        yield counts


def main(path: str) -> None:
    ranks = from_environment(60)
    assert ranks is not None
    ranks.await_all()
    for case in json.loads(Path(path).read_text()):
        function = getattr(ckpt_tools, case["function"])
        with otherwise(case.get("changed", {})) as own, counted() as counts:
            options = {**case["options"], **own}
            try:
                report = function(*case["arguments"], ranks=ranks, **options)
                said = {"bytes_read": report.bytes_read, "output": str(report.output)}
            except Exception as error:
                said = {
                    "error": type(error).__name__,
                    "fact": getattr(error, "fact", str(error)),
                    "path": str(getattr(error, "path", None)),
                    "exit_code": getattr(error, "exit_code", RankFailed.exit_code),
                    "told_elsewhere": ranks.told_elsewhere,
                }
        sys.stdout.write(f"rank {RANK}: {json.dumps(said)}\nshare {RANK} {sum(counts)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
