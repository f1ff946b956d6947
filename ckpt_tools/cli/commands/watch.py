"""``ckpt-tools watch``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt_tools.cli import completing, options, shapes
from ckpt_tools.cli.adapter_options import base_model, of_adapter
from ckpt_tools.cli.outcome import reports_errors
from ckpt_tools.cli.progress import shown_progress
from ckpt_tools.cli.signals import is_rank
from ckpt_tools.cli.text import json_line, say
from ckpt_tools.cli.usage import Unusable
from ckpt_tools.cli.writing import show_report

if TYPE_CHECKING:
    from ckpt_tools.conversion.watching.events import Event, Tell

# Told also under --quiet, and those that need a look.
_FAILED = ("failed", "command failed")
_WRONG = (*_FAILED, "passed over", "kept")

SUMMARY = "Each checkpoint of a training that runs becomes a directory."


@click.command("watch", cls=options.Command)
@click.argument("run", type=options.PATH)
@click.argument("out", type=options.LOCAL)
@shapes.switch(
    "--once",
    help="Do what can be done now, and end; for cron and at the end of a run.",
)
@shapes.count(
    "--every",
    group=options.READ,
    metavar="K",
    help="Convert the checkpoints whose number (the last one in the name) is a multiple of K.",
)
@shapes.count(
    "--keep",
    group=options.WRITE,
    help="Remove all outputs but the newest N.",
)
@options.option(
    "--exec",
    metavar="CMD",
    help="Run CMD by sh after each conversion, with CKPT_TOOLS_OUTPUT, CKPT_TOOLS_CHECKPOINT, "
    "CKPT_TOOLS_NAME and CKPT_TOOLS_STEP.",
)
@shapes.switch(
    "--prune-source",
    help="Remove a checkpoint that training does not need once its output was compared with it bit for bit.",
)
@shapes.seconds(
    "--settle",
    least=0,
    default=30,
    help="How long files must stand still where nothing else says that a checkpoint is finished.",
)
@shapes.seconds(
    "--poll",
    least=0.01,
    default=10,
    help="Time between two looks at RUN.",
)
@options.option(
    "--attr",
    "attribute",
    group=options.READ,
    metavar="ATTR",
    shell_complete=completing.attributes,
    help="Write this attribute of a composite model, as extract-attr does.",
)
@shapes.switch("--lora", group=options.READ, help="Write the adapter, as extract-lora does.")
@of_adapter("With --lora: which adapter, where there are several; `all` writes each.")
@base_model
@options.watch_writing
@partial(reports_errors, goes_on=True)
def command(
    run: Path | str, out: Path, quiet: bool, verbose: bool, as_json: bool, **asked: Any
) -> None:
    """Convert each finished checkpoint of the training that writes to RUN, once and in order.

    RUN is the directory in which the checkpoints appear side by side. OUT gets a directory of the same name
    for each, and a file NAME.done when the command of --exec has ended. What is done is read from OUT, so the
    same command goes on where it was stopped. docs/watch.md says when a checkpoint is finished.

    \b
    Examples:
      ckpt-tools watch run models --config base-model --verify --keep 3
      ckpt-tools watch run models --once --exec 'evaluate "$CKPT_TOOLS_OUTPUT"'
    """
    from ckpt_tools.conversion.watching.api import watch

    if is_rank():
        raise Unusable(
            "watch is one process", hint="Start it without torchrun. Threads divide its work."
        )
    context = click.get_current_context()
    if asked["lora"]:
        _drop_options_of_models(context, asked)
    with shown_progress(quiet or as_json) as progress:
        tell = _tell_json if as_json else _telling(quiet, verbose)
        reports = watch(run, out, progress=progress, tell=tell, **asked)
    if asked["once"] and not reports and not (quiet or as_json):
        say("No checkpoint was converted: none is new and finished.")


def _drop_options_of_models(context: click.Context, asked: dict[str, Any]) -> None:
    """Leave out the options that adapters do not have; refuse those that were typed."""
    for parameter in context.command.params:
        if parameter.name in options.OF_MODELS:
            if (
                context.get_parameter_source(parameter.name)
                is not click.core.ParameterSource.DEFAULT
            ):
                raise Unusable(
                    f"{parameter.opts[0]} is an option for whole models, and --lora writes adapters",
                    hint=f"Leave out {parameter.opts[0]}.",
                )
            del asked[parameter.name]


def _telling(quiet: bool, verbose: bool) -> Tell:
    def tell(event: Event) -> None:
        if event.report is not None:
            if not quiet:
                show_report(event.report, verbose)
            return
        line, is_wrong = f"{event.name}: {event.happening}: {event.fact}", event.happening in _WRONG
        if is_wrong and (not quiet or event.happening in _FAILED):
            say(line, label="warning: ", color="yellow", err=True)
            if event.hint:
                say(event.hint, label="  next: ", err=True)
        elif not is_wrong and not quiet:
            say(line)

    return tell


def _tell_json(event: Event) -> None:
    """One JSON object a line."""
    click.echo(json_line(event.to_json()))
