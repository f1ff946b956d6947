"""``ckpt-tools completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckpt_tools.cli import options

SUMMARY = "A script that completes commands, options, tags and adapters in a shell."

# Click looks for it in the environment, and answers the shell.
_VARIABLE = "_CKPT_TOOLS_COMPLETE"


@click.command("completion", cls=options.Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that lets SHELL (bash, zsh or fish) complete what is typed after ckpt-tools.

    Commands, options and their values are completed, and the tags, models and adapters of the checkpoint that
    is named.

    \b
    Examples:
      ckpt-tools completion bash >> ~/.bash_completion
      ckpt-tools completion zsh > ~/.zfunc/_ckpt-tools
      ckpt-tools completion fish > ~/.config/fish/completions/ckpt-tools.fish
    """
    made = get_completion_class(shell)
    assert made is not None and context.parent is not None
    root = context.find_root()
    click.echo(made(root.command, {}, "ckpt-tools", _VARIABLE).source(), nl=False)
