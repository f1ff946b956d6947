"""``ckpt-tools interval``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from ckpt_tools.analysis.interval import CheckpointInterval, Cost, checkpoint_interval, draw
from ckpt_tools.analysis.interval.quantities import LONGEST, duration_text
from ckpt_tools.cli import options
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.text import counted, nbytes_text, print_json, say

SUMMARY = "How often to checkpoint, and what it costs."


@click.command("interval", cls=options.Command)
@options.option("--step-time", required=True, metavar="T", help="Duration of one optimizer step.")
@options.option(
    "--save-time", required=True, metavar="T", help="How long training waits for one save."
)
@options.option(
    "--steps", type=click.IntRange(min=1), required=True, metavar="N", help="Steps of the run."
)
@options.option(
    "--mtbf",
    required=True,
    metavar="T",
    help="Mean time between failures of the whole job: that of one node, divided by their number.",
)
@options.option(
    "--restart-time",
    default="0s",
    show_default=True,
    metavar="T",
    help="From a failure to the next step: detection, a new machine, loading.",
)
@options.option(
    "--every",
    type=click.IntRange(min=1),
    metavar="N",
    help="An interval to compare with, in steps, such as the present one.",
)
@options.option("--checkpoint-size", metavar="SIZE", help="Bytes of one checkpoint, such as 140GB.")
@options.option(
    "--from",
    "checkpoint",
    group=options.READ,
    type=options.PATH,
    metavar="CKPT",
    help="Take the size from this checkpoint.",
)
@options.tag
@options.option(
    "--keep", type=click.IntRange(min=1), metavar="K", help="How many checkpoints are kept."
)
@options.option(
    "--plot",
    type=options.LOCAL,
    metavar="FILE",
    help="Draw cost and disk against the interval, as .svg or .png.",
)
@options.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@options.json
@options.debug
@reports_errors
def command(
    step_time: str,
    save_time: str,
    steps: int,
    mtbf: str,
    restart_time: str,
    every: int | None,
    checkpoint_size: str | None,
    checkpoint: Path | None,
    tag: str | None,
    keep: int | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show how often to checkpoint: the cost of saving every N steps, and the N with the least cost.

    The cost is the time of the saves and the expected time that failures waste. A duration T is typed
    as 12s, 250ms, 1.5h, 9h30m or 2d; a number alone is seconds.

    \b
    Example:
      ckpt-tools interval --step-time 12s --save-time 90s --steps 20000 --mtbf 9h
    """
    found = checkpoint_interval(
        steps=steps,
        step_time=step_time,
        save_time=save_time,
        mtbf=mtbf,
        restart_time=restart_time,
        checkpoint_size=checkpoint_size,
        checkpoint=checkpoint,
        tag=tag,
        keep=keep,
        every=every,
    )
    if plot is not None:
        draw(found, plot, overwrite=overwrite)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _show(found: CheckpointInterval) -> None:
    facts = list(_facts(found))
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        say(value, label=f"{label:{width}}  ", bold=True)
    say()
    for line in _table(found):
        say(line)


def _facts(found: CheckpointInterval) -> Iterator[tuple[str, str]]:
    run, exact = found.run, found.exact
    yield (
        "save every",
        f"{counted(exact.interval, 'step')}, {duration_text(exact.interval_seconds)} of work",
    )
    total = _hours(exact.total_seconds)
    yield "the run", f"{_hours(run.work_seconds)} of work, {total} expected with saves and failures"
    undone = duration_text(exact.loss_per_failure_seconds)
    yield (
        "failures",
        f"{_rounded(exact.failures)} expected, one every {duration_text(run.mtbf)}; one undoes {undone}",
    )
    for name, formula in (("Young", found.young), ("Daly", found.daly)):
        yield (
            f"by {name}",
            f"{counted(formula.cost.interval, 'step')}, from {duration_text(formula.seconds)} of work",
        )
    yield from _disk_facts(found)
    for remark in found.remarks:
        yield "remark", remark


def _disk_facts(found: CheckpointInterval) -> Iterator[tuple[str, str]]:
    disk = found.disk(found.exact)
    if disk is None or found.checkpoint_bytes is None:
        return
    source = ""
    if found.measured is not None:
        source = f", as {found.measured.path} ({counted(found.measured.files, 'file')})"
    yield "a checkpoint", nbytes_text(found.checkpoint_bytes) + source
    yield "disk", f"{nbytes_text(disk.all)} for all {found.exact.saves:,}"
    if disk.kept is not None and disk.peak is not None:
        peak = nbytes_text(disk.peak)
        yield f"with --keep {found.keep}", f"{nbytes_text(disk.kept)}; {peak} while one is written"


def _table(found: CheckpointInterval) -> Iterator[str]:
    """Costs of several intervals as aligned columns."""
    named = [
        ("least cost", found.exact),
        ("half of it", found.half),
        ("twice it", found.double),
        ("Young", found.young.cost),
        ("Daly", found.daly.cost),
    ]
    if found.every is not None:
        named.append(("--every", found.every))
    head = ["", "steps", "saves", "saving", "lost"]
    head += ["restarts"] if found.run.restart_time else []
    head += ["cost", "of work", "over least", "of total"]
    head += ["disk"] if found.checkpoint_bytes is not None else []
    rows = [head, *([name, *_row(found, cost)] for name, cost in named)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


def _row(found: CheckpointInterval, cost: Cost) -> Iterator[str]:
    extra, disk = found.extra_seconds(cost), found.disk(cost)
    yield f"{cost.interval:,}"
    yield f"{cost.saves:,}"
    yield _hours(cost.save_seconds)
    yield _hours(cost.lost_seconds)
    if found.run.restart_time:
        yield _hours(cost.restart_seconds)
    yield _hours(cost.cost_seconds)
    yield _percent(cost.cost_seconds / cost.work_seconds)
    sign = "+" if extra <= LONGEST else ""
    yield f"{sign}{_hours(extra)}" if extra > 0 else ""
    yield f"{sign}{_percent(extra / found.exact.total_seconds)}" if extra > 0 else ""
    if disk is not None:
        yield nbytes_text(disk.all)


def _hours(seconds: float) -> str:
    if seconds < 360:
        return duration_text(seconds)
    return f"{_rounded(seconds / 3600)} h" if seconds <= LONGEST else "for ever"


def _percent(share: float) -> str:
    return f"{_rounded(100 * share)}%" if share <= LONGEST else "-"


def _rounded(number: float) -> str:
    """Three digits, or as many as stand before the point."""
    if 1000 <= number < 1e9:
        return f"{number:,.0f}"
    return f"{number:.3g}"
