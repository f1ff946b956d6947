"""``ckpt-tools extract-lora``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.shared import adapter_options, reports_errors
from ckpt_tools.cli.writing import adapter_writing_options, write_directory

_PATH = click.Path(path_type=Path)


@click.command("extract-lora")
@click.argument("ckpt", type=_PATH)
@click.argument("out", type=_PATH)
@adapter_options("Which adapter, where there are several; `all` writes each, in PEFT's folders.")
@click.option(
    "--base-model",
    metavar="NAME",
    help="What the base is called, a Hub name or directory, where no config says it.",
)
@adapter_writing_options
@reports_errors
def command(ckpt: Path, out: Path, **options: Any) -> None:
    """Write an adapter as the directory OUT that PEFT's save_pretrained would have written.

    Only its bytes are read. adapter_config.json comes from --adapter-config or from near the checkpoint;
    otherwise it is written from the tensors, and what they do not tell must be given.

    \b
    Example:
      ckpt-tools extract-lora run/global_step500 adapter --lora-alpha 32 --base-model allenai/OLMo-2-0425-1B
    """
    from ckpt_tools.conversion.api import extract_lora

    write_directory(partial(extract_lora, ckpt, out), **options)
