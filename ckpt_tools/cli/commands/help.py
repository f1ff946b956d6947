"""``ckpt-tools help``."""

from __future__ import annotations

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.usage import no_such_command

SUMMARY = "The commands, or the options of one."


@click.command("help", cls=options.Command)
@click.argument("command", metavar="[COMMAND]", required=False)
@click.pass_context
def command(context: click.Context, command: str | None) -> None:
    """Show what ckpt-tools can do, or how COMMAND is used.

    \b
    Example:
      ckpt-tools help consolidate
    """
    parent = context.parent
    assert parent is not None and isinstance(parent.command, click.Group)
    if command is None:
        click.echo(parent.get_help())
        return
    found = parent.command.get_command(parent, command)
    if found is None:
        raise no_such_command(command, parent)
    with click.Context(found, parent=parent, info_name=command) as child:
        click.echo(found.get_help(child))
