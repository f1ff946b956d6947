"""``ckpt-tools merge-lora``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import options, reporting, shapes
from ckpt_tools.cli.adapter_options import of_adapter
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.writing import write_directory

SUMMARY = "A LoRA adapter and its base become one model."


@click.command("merge-lora", cls=options.Command)
@click.argument("ckpt", type=options.PATH)
@click.argument("out", type=options.PATH)
@of_adapter("Which adapter, where there are several; or several with weights: a=0.7,b=0.3.")
@shapes.one_of(
    "--combination",
    group=options.READ,
    among=("cat", "linear"),
    help="How several adapters become one, as in PEFT: cat adds their updates, linear their factors.",
)
@shapes.place(
    "--adapter-dir",
    group=options.READ,
    help="Take the adapter from a directory that PEFT wrote, and CKPT as the base.",
)
@shapes.place(
    "--base",
    group=options.READ,
    help="A Hugging Face directory of the base: tensors that CKPT lacks come from it.",
)
@options.model_writing
@reporting.page_with_statistics
@reports_errors
def command(ckpt: Path, out: Path, **asked: Any) -> None:
    """Merge a LoRA adapter into its base and write the model as a Hugging Face directory OUT.

    W + s B A is computed in fp64 from the weights that trained, rounded to fp32 and cast to the output's
    dtype: the same bytes on every machine.

    \b
    Example:
      ckpt-tools merge-lora run/global_step500 merged --base base-model
    """
    from ckpt_tools.conversion.api import merge_lora

    write_directory(partial(merge_lora, ckpt, out), **asked)
