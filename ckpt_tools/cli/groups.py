"""Owns the form of an option: the group of ``--help`` that lists it, and its variable of the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

READ = "What to read"
WRITE = "What to write"
ASSETS = "Files beside the weights"
CHECK = "Checking"
RUN = "Running"
# The widest column of names; a longer name has a line of its own, so that the text beside it keeps its width.
_WIDEST = 24
GROUPS = (READ, WRITE, ASSETS, CHECK, RUN)


class Option(click.Option):
    """An option that ``--help`` lists in a group."""

    def __init__(self, *args: Any, group: str = RUN, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value in the environment: the variable is named as the option is typed."""
        return os.environ.get(self.variable(ctx)) or None

    def variable(self, ctx: click.Context) -> str:
        """The name of the variable of the environment that stands for it."""
        flag = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        return f"{ctx.auto_envvar_prefix}_{flag}"

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The value in the environment; for a flag, a true value means that it is typed."""
        if not self.is_flag:
            return super().value_from_envvar(ctx)
        text = self.resolve_envvar_value(ctx)
        if text is None:
            return None
        typed = click.BOOL.convert(text, self, ctx)
        return (self.flag_value if self.flag_value is False else True) if typed else None

    def get_help_extra(self, ctx: click.Context) -> Any:
        """The default alone: the error about a number outside its range states the range."""
        extra: Any = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose ``--help`` lists the options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section of help for each group."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                rows[getattr(parameter, "group", RUN)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records, col_max=_WIDEST)


def option(*flags: str, group: str = RUN, **attributes: Any) -> Callable[[F], F]:
    """An option of a command, in a group of its help."""
    return click.option(*flags, cls=Option, group=group, **attributes)
