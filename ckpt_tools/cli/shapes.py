"""Owns the shapes that options of several commands share: a switch, a path, a count, a time, a choice.

Each returns an option of :func:`ckpt_tools.cli.groups.option`; a command adds the name, group and help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ckpt_tools.cli import completing
from ckpt_tools.cli.groups import READ, RUN, option
from ckpt_tools.cli.kinds import PATH

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def switch(*flags: str, help: str, group: str = RUN) -> Decorator[Any]:
    """An option without a value."""
    return option(*flags, group=group, is_flag=True, help=help)


def place(flag: str, *, help: str, group: str, metavar: str = "DIR", **more: Any) -> Decorator[Any]:
    """A file or a directory that is read, on this machine or in a store."""
    return option(flag, group=group, type=PATH, metavar=metavar, help=help, **more)


def count(flag: str, *, help: str, group: str = RUN, metavar: str = "N") -> Decorator[Any]:
    """A number of at least 1, which may be left out."""
    return option(flag, group=group, type=click.IntRange(min=1), metavar=metavar, help=help)


def seconds(
    flag: str, *, help: str, default: float, least: float = 1, group: str = RUN
) -> Decorator[Any]:
    """A time in seconds, with its default in the help."""
    return option(
        flag,
        group=group,
        type=click.FloatRange(min=least),
        default=default,
        show_default=True,
        metavar="SECONDS",
        help=help,
    )


def one_of(*flags: str, among: Sequence[str], group: str, help: str) -> Decorator[Any]:
    """One of several words; the first is the default, and the help shows it."""
    return option(
        *flags,
        group=group,
        type=click.Choice(among),
        default=among[0],
        show_default=True,
        help=help,
    )


def tag_of(source: str, flag: str = "--tag") -> Decorator[Any]:
    """The name of one checkpoint among several in ``source``."""
    return option(
        flag,
        group=READ,
        metavar="T",
        shell_complete=completing.names,
        help=f"Which checkpoint, where {source} holds several.",
    )
