"""The signature and the docstring of a function whose options are fields of a request.

``help``, ``inspect.signature`` and notebooks show each option with its type, default and meaning; the options
are stated once, in :class:`ckpt_tools.conversion.request.Request`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ckpt_tools.conversion.request import Request

F = TypeVar("F", bound=Callable[..., Any])

_WIDTH = 110
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def states_options(accepted: type) -> Callable[[F], F]:
    """Replace ``**options`` in the signature and the docstring by the options themselves.

    Args:
        accepted: the ``TypedDict`` with the options that the function takes.
    """

    def stated(function: F) -> F:
        names = accepted.__annotations__
        defaults = {each.name: each.default for each in fields(Request)}
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if defaults[name] is MISSING else defaults[name],
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in names.items()
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in [*kept, *more]} | {
            "return": signature.return_annotation
        }
        function.__doc__ = _documented(function.__doc__ or "", names)
        return function

    return stated


def _documented(doc: str, names: Mapping[str, object]) -> str:
    meanings = _meanings()
    lines = [
        textwrap.fill(
            f"{name}: {meanings[name]}",
            _WIDTH,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for name in names
    ]
    return re.sub(r"^        options: .*$", lambda _: "\n".join(lines), doc, flags=re.MULTILINE)


def _meanings() -> dict[str, str]:
    """What each option means, from the docstrings of the request and of the classes it extends."""
    found: dict[str, str] = {}
    for owner in reversed(Request.__mro__[:-1]):
        _, _, attributes = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
        for name, text in _ATTRIBUTE.findall(attributes):
            found[name] = " ".join(text.split())
    return found
