"""``ckpt-tools consolidate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import options, reporting
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.writing import write_directory

SUMMARY = "A checkpoint becomes a Hugging Face directory."


@click.command("consolidate", cls=options.Command)
@click.argument("ckpt", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.model_writing
@reporting.page_with_statistics
@reports_errors
def command(ckpt: Path, out: Path, **asked: Any) -> None:
    """Write the training checkpoint CKPT as a Hugging Face directory OUT.

    CKPT is what you have at hand: the directory with `latest`, the global_stepN directory, or a
    Transformers checkpoint-N directory.

    \b
    Examples:
      ckpt-tools consolidate run/global_step500 model --config base-model
      ckpt-tools consolidate run model --tag global_step500 --dtype fp32
    """
    from ckpt_tools.conversion.api import consolidate

    write_directory(partial(consolidate, ckpt, out), **asked)
