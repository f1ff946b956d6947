"""``ckpt-tools extract-attr``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli import completing, options, reporting
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.usage import Unusable
from ckpt_tools.cli.writing import write_directory
from ckpt_tools.storage.addresses import is_address


def _told_apart(context: click.Context, _: click.Parameter, words: tuple[Path, ...]) -> None:
    """Put the attribute, the checkpoint and the output of the arguments into the context."""
    asked = context.params
    if asked.get("attr") is None and len(words) > 2:
        asked["attr"], words = str(words[0]), words[1:]
    asked["ckpt"], asked["out"] = (*words, None, None)[:2]
    if context.resilient_parsing:
        return
    if asked.get("attr") is None or len(words) != 2:
        raise click.UsageError("the arguments are ATTR CKPT OUT, or CKPT OUT with --attr", context)
    attr, ckpt, out = asked["attr"], *words
    if Path(attr).exists() and not is_address(str(ckpt)) and not Path(ckpt).exists():
        meant, output = (ckpt, out)
        if str(out) in (held := completing.attributes_of(Path(attr))) and str(ckpt) not in held:
            meant, output = (out, ckpt)
        raise Unusable(
            f"the attribute is the first argument, and {attr} is a path",
            hint=f"Type: ckpt-tools extract-attr {meant} {attr} {output}",
        )


SUMMARY = "One attribute of a composite model becomes a directory of its own."


@click.command("extract-attr", cls=options.Command)
@click.argument(
    "words",
    nargs=-1,
    required=True,
    metavar="ATTR CKPT OUT",
    type=options.PATH,
    callback=_told_apart,
    expose_value=False,
)
@options.option(
    "--attr",
    group=options.READ,
    metavar="ATTR",
    is_eager=True,
    shell_complete=completing.attributes,
    help="The attribute, where it is not the first argument.",
)
@options.model_writing
@reporting.page_with_statistics
@reports_errors
def command(attr: str, ckpt: Path, out: Path, **asked: Any) -> None:
    """Write one attribute ATTR of a composite model as a Hugging Face directory OUT.

    ATTR is a dotted path, such as `policy` or `module.policy.model`; `ckpt-tools inspect` lists the
    attributes. Only the bytes of ATTR are read.

    \b
    Examples:
      ckpt-tools extract-attr policy run/global_step500 policy --config base-model
      ckpt-tools extract-attr run policy --attr policy --config base-model
    """
    from ckpt_tools.conversion.api import consolidate

    write_directory(partial(consolidate, ckpt, out, attribute=attr), **asked)
