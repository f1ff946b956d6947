"""The value types of options: paths, addresses of stores, dtypes.

:mod:`ckpt_tools.cli.options` has the options themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpt_tools.cli.usage import Unusable
from ckpt_tools.errors import UsageError
from ckpt_tools.storage.addresses import is_address, parsed
from ckpt_tools.tensors.dtypes import short_name


class Place(click.Path):
    """A path of a file system, or the address of a store."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; the text of an address.

        Raises:
            Unusable: it is empty, as a shell makes it of a variable that is not set. A path would be the
                current directory.
        """
        if value == "":
            name = "" if param is None else f" of {param.human_readable_name}"
            if isinstance(param, click.Option):
                name = f" of {param.opts[-1]}"
            raise Unusable(
                f"the path{name} is empty",
                hint="If it is a variable of the shell, it is not set. Write . for the current directory.",
            )
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
