"""What a shell offers for the value of an option: what the checkpoint holds that was named before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_tools.errors import AmbiguousCheckpoint, CkptError
from ckpt_tools.storage.addresses import is_address

if TYPE_CHECKING:
    from ckpt_tools.analysis.inspection import Inspection

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of the checkpoints or models among which ``--tag`` and ``--model`` choose."""
    from ckpt_tools import readers

    path = _checkpoint(context, parameter)
    if path is None:
        return []
    try:
        found: Iterable[str] = [readers.locate(path).name]
    except AmbiguousCheckpoint as error:
        found = error.choices
    except CkptError:
        found = []
    return [name for name in found if name.startswith(incomplete)]


def formats(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The formats that are read."""
    from ckpt_tools import readers

    return [name for name in readers.readers() if name.startswith(incomplete)]


def adapters(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The adapters of the checkpoint."""
    return _held(context, parameter, incomplete, lambda found: found.adapters or {})


def attributes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The attributes of a composite model."""
    return _held(context, parameter, incomplete, lambda found: found.attributes or {})


def attributes_of(path: Path) -> list[str]:
    """The attributes of the checkpoint under a path; none if it cannot be read."""
    return _parts_of(path, lambda found: found.attributes or {})


def _held(
    context: click.Context,
    parameter: click.Parameter,
    incomplete: str,
    part: Callable[[Inspection], Iterable[str]],
) -> list[str]:
    path = _checkpoint(context, parameter)
    found = [] if path is None else _parts_of(path, part)
    return [name for name in found if name.startswith(incomplete)]


def _parts_of(path: Path, part: Callable[[Inspection], Iterable[str]]) -> list[str]:
    from ckpt_tools.analysis.inspection import inspect

    try:
        return list(part(inspect(path)))
    except CkptError:
        return []


def _checkpoint(context: click.Context, parameter: click.Parameter) -> Path | None:
    """The checkpoint that is typed already; ``--tag-b`` is of the second."""
    # Click leaves the arguments as they are typed, because the option has no value yet.
    arguments = [each for each in context.command.params if isinstance(each, click.Argument)]
    typed = list(context.args)
    if arguments and "ATTR" in str(arguments[0].metavar) and len(typed) > _WITHOUT_ATTRIBUTE:
        del typed[0]
    at = int(any(flag.endswith("-b") for flag in parameter.opts))
    # A shell must not wait for a store.
    return Path(typed[at]) if len(typed) > at and not is_address(typed[at]) else None


# Arguments of a command whose first one, the attribute, is given as an option.
_WITHOUT_ATTRIBUTE = 2
