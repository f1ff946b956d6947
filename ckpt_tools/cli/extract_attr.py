"""``ckpt-tools extract-attr``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.shared import reports_errors
from ckpt_tools.cli.writing import write_directory, writing_options


@click.command("extract-attr")
@click.argument("attr")
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@writing_options
@reports_errors
def command(attr: str, ckpt: Path, out: Path, **options: Any) -> None:
    """Write one attribute ATTR of a composite model as a Hugging Face directory OUT.

    ATTR is a dotted path, such as `policy` or `module.policy.model`; `ckpt-tools inspect` lists what
    there is. Only its bytes are read.

    \b
    Example:
      ckpt-tools extract-attr policy run/global_step500 policy --config base-model
    """
    from ckpt_tools.conversion.api import consolidate

    write_directory(partial(consolidate, ckpt, out, attribute=attr), **options)
