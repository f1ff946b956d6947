"""``ckpt-tools average``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import options, reporting
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.writing import write_directory


def _numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter("write numbers with commas between them, as 0.5,0.5") from None


SUMMARY = "The mean of several checkpoints becomes a directory."


@click.command("average", cls=options.Command)
@click.argument("ckpts", nargs=-1, required=True, metavar="CKPT...", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.option(
    "--coefficients",
    group=options.READ,
    metavar="C,C,...",
    callback=_numbers,
    help="One for each CKPT, adding up to 1. Default: all equal.",
)
@options.mean_writing
@reporting.page_with_statistics
@reports_errors
def command(
    ckpts: tuple[Path, ...], out: Path, coefficients: list[float] | None, **asked: Any
) -> None:
    """Write the mean of the checkpoints CKPT... as a Hugging Face directory OUT.

    All are of one architecture; formats may be mixed. The mean of the masters is computed in fp64,
    rounded to fp32 and cast: the same bytes on every machine.

    \b
    Example:
      ckpt-tools average run/checkpoint-4 run/checkpoint-5 soup --config base
    """
    from ckpt_tools.conversion.api import average

    mean = partial(average, ckpts, out, coefficients=coefficients)
    write_directory(mean, **asked)
