"""``ckpt-tools extract-attr``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.writing import write_directory

SUMMARY = "One attribute of a composite model becomes a directory of its own."


@click.command("extract-attr", cls=options.Command)
@click.argument("attr")
@click.argument("ckpt", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.model_writing
@reports_errors
def command(attr: str, ckpt: Path, out: Path, **asked: Any) -> None:
    """Write one attribute ATTR of a composite model as a Hugging Face directory OUT.

    ATTR is a dotted path, such as `policy` or `module.policy.model`; `ckpt-tools inspect` lists the
    attributes. Only the bytes of ATTR are read.

    \b
    Example:
      ckpt-tools extract-attr policy run/global_step500 policy --config base-model
    """
    from ckpt_tools.conversion.api import consolidate

    write_directory(partial(consolidate, ckpt, out, attribute=attr), **asked)
