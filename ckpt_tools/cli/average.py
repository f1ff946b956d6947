"""``ckpt-tools average``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.shared import reports_errors
from ckpt_tools.cli.writing import mean_writing_options, write_directory


def _numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter("write numbers with commas between them, as 0.5,0.5") from None


@click.command("average")
@click.argument(
    "ckpts", nargs=-1, required=True, metavar="CKPT...", type=click.Path(path_type=Path)
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--coefficients",
    metavar="C,C,...",
    callback=_numbers,
    help="One for each CKPT, adding up to 1. Default: all equal.",
)
@mean_writing_options
@reports_errors
def command(
    ckpts: tuple[Path, ...], out: Path, coefficients: list[float] | None, **options: Any
) -> None:
    """Write the mean of the checkpoints CKPT... as a Hugging Face directory OUT.

    All are of one architecture; formats may be mixed. The mean is computed in fp32 from the masters
    and cast once.

    \b
    Example:
      ckpt-tools average run/global_step400 run/global_step500 soup --config base-model
    """
    from ckpt_tools.conversion.api import average

    mean = partial(average, ckpts, out, coefficients=coefficients)
    write_directory(mean, **options)
