"""``ckpt-tools extract-lora``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import options, reporting
from ckpt_tools.cli.adapter_options import base_model, of_adapter
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.writing import write_directory

SUMMARY = "A PEFT adapter becomes a directory of its own."


@click.command("extract-lora", cls=options.Command)
@click.argument("ckpt", type=options.PATH)
@click.argument("out", type=options.PATH)
@of_adapter("Which adapter, where there are several; `all` writes each, in PEFT's folders.")
@base_model
@options.adapter_writing
@reporting.page_with_statistics
@reports_errors
def command(ckpt: Path, out: Path, **asked: Any) -> None:
    """Write an adapter as a directory OUT, as PEFT's save_pretrained writes it.

    Only the bytes of the adapter are read. adapter_config.json comes from --adapter-config or from near the
    checkpoint. Without one it is made from the tensors; give what they do not tell as options.

    \b
    Example:
      ckpt-tools extract-lora run adapter --lora-alpha 32 --base-model org/base
    """
    from ckpt_tools.conversion.api import extract_lora

    write_directory(partial(extract_lora, ckpt, out), **asked)
