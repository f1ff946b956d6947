"""Progress of a long command: a bar on a terminal, plain lines elsewhere, nothing when asked.

Where a store is read or written, the bytes that went over the network are shown too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ckpt_tools.cli.text import nbytes_text, seconds_text
from ckpt_tools.storage.wire import carried

_LINE_SECONDS = 10.0


@contextmanager
def shown_progress(
    quiet: bool, doing: str = "writing"
) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with bytes done and bytes in all; None under ``quiet``."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(doing) as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, description=doing + _network(), completed=done, total=total)

        yield update


def _lines() -> Callable[[int, int], None]:
    """A line every ten seconds, for log files and batch systems."""
    started = last = 0.0
    before = latest = 0  # bytes of an earlier run, and bytes at the last call

    def update(done: int, total: int) -> None:
        nonlocal started, last, before, latest
        now = time.monotonic()
        if not started or done < latest:
            # The first of a task; one command may have several.
            started, last, before = now, now, done
        latest = done
        if now - last < _LINE_SECONDS:
            return
        last = now
        rate = (done - before) / (now - started)
        left = seconds_text((total - done) / rate) if rate else "unknown"
        click.echo(
            f"{done / total:.0%}: {nbytes_text(done)} of {nbytes_text(total)}, "
            f"{nbytes_text(rate)}/s, {left} left{_network()}",
            err=True,
        )

    return update


def _network() -> str:
    """The bytes that went over the network; nothing where no store is used."""
    nbytes = carried()
    return f", {nbytes_text(nbytes)} over the network" if nbytes else ""
