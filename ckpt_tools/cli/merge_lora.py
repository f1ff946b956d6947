"""``ckpt-tools merge-lora``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.shared import adapter_options, reports_errors
from ckpt_tools.cli.writing import write_directory, writing_options

_PATH = click.Path(path_type=Path)


@click.command("merge-lora")
@click.argument("ckpt", type=_PATH)
@click.argument("out", type=_PATH)
@adapter_options("Which adapter, where there are several.")
@click.option(
    "--adapter-dir",
    type=_PATH,
    metavar="DIR",
    help="Take the adapter from a directory that PEFT wrote, and CKPT as the base.",
)
@click.option(
    "--base",
    type=_PATH,
    metavar="DIR",
    help="A Hugging Face directory of the base: what CKPT lacks comes from it.",
)
@writing_options
@reports_errors
def command(ckpt: Path, out: Path, **options: Any) -> None:
    """Merge a LoRA adapter into its base and write the model as a Hugging Face directory OUT.

    W + s B A is computed in fp32 from the weights that trained, and rounded once to the output's dtype.

    \b
    Example:
      ckpt-tools merge-lora run/global_step500 merged --base base-model
    """
    from ckpt_tools.conversion.api import merge_lora

    write_directory(partial(merge_lora, ckpt, out), **options)
