"""How a command line that cannot be understood is reported: in the form of every other error.

Owns the sentences for Click's errors, and the names that come close to what was typed.
"""

from __future__ import annotations

import difflib
import re

import click

from ckpt_tools.cli.text import say

_SURPLUS = re.compile(r"\.? \(?Did you mean|\. Choose from:")
_WORDS = (
    (re.compile(r"(\S+) is not in the range x>=(\d+)(?:\.0)?$"), r"\1 is less than \2"),
    (re.compile(r"is not a valid integer(?: range)?$"), "is not a whole number"),
    (re.compile(r"is not a valid float(?: range)?$"), "is not a number"),
)
_UNKNOWN = re.compile(r"[Nn]o such (?:command|option):? '?([^' ]+)'?")


class Unusable(click.UsageError):
    """An argument that cannot be used.

    Attributes:
        hint: the next step.
    """

    def __init__(self, fact: str, *, hint: str) -> None:
        super().__init__(fact)
        self.hint = hint


def no_such_command(name: str, context: click.Context) -> click.UsageError:
    """The error for a command that does not exist."""
    return click.UsageError(f"No such command {name!r}.", context)


def show_usage_error(error: click.ClickException) -> None:
    """Print what is wrong with the command line, and the next step."""
    context: click.Context | None = getattr(error, "ctx", None)
    message = error.format_message()
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        return
    fact = _in_plain_words(message)
    say(fact[0].lower() + fact[1:], label="error: ", color="red", bold=True, err=True)
    if isinstance(error, Unusable):
        say(error.hint, label="  next: ", err=True)
        return
    if context is None:
        return
    if _is_about_arguments(error):
        pieces = context.command.collect_usage_pieces(context)
        say(" ".join([context.command_path, *pieces]), label="  usage: ", err=True)
    unknown = _UNKNOWN.match(fact)
    close = _close_names(context, unknown[1]) if unknown is not None else []
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    say(f"{meant}Run {context.command_path} --help.", label="  next: ", err=True)


def _in_plain_words(message: str) -> str:
    """Click's sentence without its list of choices and close names, which the next step and --help show."""
    fact = _SURPLUS.split(message)[0].strip().removesuffix(".")
    for pattern, words in _WORDS:
        fact = pattern.sub(words, fact)
    return fact


def _is_about_arguments(error: click.ClickException) -> bool:
    """Whether an argument is missing or surplus."""
    return type(error) is click.UsageError or (
        isinstance(error, click.MissingParameter) and isinstance(error.param, click.Argument)
    )


def _close_names(context: click.Context, typed: str) -> list[str]:
    """The commands or options whose names come close to what was typed, the closest first."""
    command = context.command
    if isinstance(command, click.Group):
        names = command.list_commands(context)
    else:
        names = [flag for parameter in command.params for flag in parameter.opts]
    return difflib.get_close_matches(typed, names, 3, cutoff=0.7)
