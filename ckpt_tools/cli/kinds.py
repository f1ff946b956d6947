"""The kinds of options, their value types, and the groups in which ``--help`` lists them.

:mod:`ckpt_tools.cli.options` has the options themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ckpt_tools.cli.usage import Unusable
from ckpt_tools.errors import UsageError
from ckpt_tools.storage.addresses import is_address, parsed
from ckpt_tools.tensors.dtypes import short_name

F = TypeVar("F", bound=Callable[..., Any])


class Place(click.Path):
    """A path of a file system, or the address of a store."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; the text of an address."""
        if not is_address(value):
            return super().convert(value, param, ctx)
        try:
            address = parsed(value)
        except UsageError as error:
            raise Unusable(error.fact, hint=error.hint or "") from None
        return str(address)


class LocalPath(Place):
    """A path of a file system, which is written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; an address is refused, because a path would change it."""
        if is_address(value):
            raise Unusable(
                "the address of a store is not written here",
                hint="Name a file or folder of this machine.",
            )
        return super().convert(value, param, ctx)


class DTypeName(click.Choice):  # type: ignore[type-arg]
    """The dtype of an output: short names, and those of torch."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The short name."""
        return super().convert(short_name(value), param, ctx)


PATH = Place()
LOCAL = LocalPath()

READ = "What to read"
WRITE = "What to write"
ASSETS = "Files beside the weights"
CHECK = "Checking"
RUN = "Running"
GROUPS = (READ, WRITE, ASSETS, CHECK, RUN)


class Option(click.Option):
    """An option that ``--help`` lists in a group."""

    def __init__(self, *args: Any, group: str = RUN, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value in the environment: the variable is named as the option is typed."""
        flag = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        return os.environ.get(f"{ctx.auto_envvar_prefix}_{flag}") or None

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The value in the environment; for a flag, a true value means that it is typed."""
        if not self.is_flag:
            return super().value_from_envvar(ctx)
        text = self.resolve_envvar_value(ctx)
        if text is None:
            return None
        typed = click.BOOL.convert(text, self, ctx)
        return (self.flag_value if self.flag_value is False else True) if typed else None


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
                    formatter.write_dl(records)


def option(*flags: str, group: str = RUN, **attributes: Any) -> Callable[[F], F]:
    """An option of a command, in a group of its help."""
    return click.option(*flags, cls=Option, group=group, **attributes)
