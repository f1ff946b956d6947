"""The command line: options in, one library call, a report out. The only place that prints or exits.

A command is one module of :mod:`ckpt_tools.cli.commands`. Its own imports are light, so that ``--help``
starts at once; what it needs to work is imported when it is called.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import click

from ckpt_tools._version import __version__
from ckpt_tools.cli import commands
from ckpt_tools.cli.memory import share_one_arena
from ckpt_tools.cli.reporting import TYPED
from ckpt_tools.cli.signals import (
    STATUSES,
    end_on_signals,
    ignore_signals,
    is_later_rank,
    is_rank,
    leave_at_once,
)
from ckpt_tools.cli.usage import show_usage_error

# The order of `--help`; a command that is not listed comes after these.
_FIRST = (
    "inspect",
    "consolidate",
    "extract-attr",
    "extract-lora",
    "merge-lora",
    "average",
    "watch",
    "verify",
    "diff",
    "interval",
    "help",
    "completion",
)

_EPILOG = """\b
Exit status:
  0  done
  1  unforeseen failure; of verify and diff: something was found
  2  the command cannot be carried out as typed: wrong option, several
     checkpoints to choose from, output exists, config or token missing
  3  nothing under the path is a checkpoint
  4  the checkpoint is damaged: files missing, truncated or of several saves
  5  a layout that is recognised but cannot be read
  6  the output cannot be written: disk full, permission
  7  --verify found the output wrong; it never appeared
  8  another rank failed, was lost, or made no progress
  9  a store refuses a request, or cannot be reached
  129, 130, 143  interrupted; OUT was not touched

\b
An option that is not typed comes from the environment:
CKPT_TOOLS_CONSOLIDATE_DTYPE=fp32 is --dtype fp32 of consolidate.
"""


# torchrun ends all ranks when one leaves; the first rank reports the error within this time.
_LISTEN_SECONDS = 10.0

_INTERRUPTED = 130
# A normal exit frees each of them, which takes a second for ten million.
_MANY_OBJECTS = 1_000_000

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CKPT_TOOLS"}


class _Lazy(click.Group):
    """A group of one module a command: those of :mod:`ckpt_tools.cli.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {each.name.replace("_", "-") for each in pkgutil.iter_modules(commands.__path__)}
        return [*_FIRST, *sorted(found.difference(_FIRST))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = _module(cmd_name).command
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words for whoever repeats the command line."""
        ctx.meta[TYPED] = tuple(args)
        return super().parse_args(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run the command; a command line that is wrong is reported in the form of every error."""
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except click.ClickException as error:
            if not standalone_mode:
                raise
            if is_later_rank():
                # The first rank alone reports it.
                time.sleep(_LISTEN_SECONDS)
            else:
                show_usage_error(error)
            status = error.exit_code
        except click.Abort:
            status = _INTERRUPTED
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(n, _module(n).SUMMARY) for n in self.list_commands(ctx)])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name.replace('-', '_')}")


@click.command("ckpt-tools", cls=_Lazy, epilog=_EPILOG, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ckpt-tools")
def cli() -> None:
    """Convert training checkpoints into Hugging Face directories.

    Reads raw checkpoints without the framework that wrote them and without running code from them,
    and writes clean Hugging Face directories.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    end_on_signals()
    if args is None:
        share_one_arena(sys.argv[1:])
    try:
        cli.main(args=args, prog_name="ckpt-tools")
    except SystemExit as end:
        if args is None:
            # The process ends. Called with arguments, the caller's process goes on.
            ignore_signals()
        objects = sys.getallocatedblocks()
        is_slow = args is None and ("torch" in sys.modules or objects > _MANY_OBJECTS)
        if is_slow or end.code in STATUSES or is_rank():
            leave_at_once(end.code)
        raise
