"""``ckpt-tools consolidate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.shared import reports_errors
from ckpt_tools.cli.writing import write_directory, writing_options


@click.command("consolidate")
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@writing_options
@reports_errors
def command(ckpt: Path, out: Path, **options: Any) -> None:
    """Write the training checkpoint CKPT as a Hugging Face directory OUT.

    CKPT is what you have at hand: the directory with `latest`, the global_stepN directory, or a
    Transformers checkpoint-N directory.

    \b
    Examples:
      ckpt-tools consolidate run/global_step500 model --config base-model
      ckpt-tools consolidate run model --tag global_step500 --dtype fp32
    """
    from ckpt_tools.conversion.api import consolidate

    write_directory(partial(consolidate, ckpt, out), **options)
