"""Key maps: what the tensors of a checkpoint are called in the model, rule by rule.

A rule is a pattern and what becomes of a name that fits it: another name, several names of one tensor
(tied ones), or nothing. In a pattern ``{n}`` stands for a number, ``{last}`` for the largest number that
any name begins with, and ``*`` for anything; in a new name ``{n}``, ``{n-1}``, ``{last}`` and ``*`` stand
for what they stood for. The first rule that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.tensors.catalogue import Catalogue, Tensor

_PLACE = re.compile(r"\{(?P<name>[a-z]+)(?P<shift>[+-]\d+)?\}|\*")
_LAST = "last"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        pattern: the names it is about.
        names: the new names, of which the first is kept and the others are tied to it; none to leave it out.
    """

    pattern: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class KeyMap:
    """The rules, in order."""

    rules: tuple[Rule, ...]

    def apply(self, catalogue: Catalogue) -> Catalogue:
        """The catalogue under the new names.

        Raises:
            UsageError: a name fits no rule, or two become one.
        """
        every = [*catalogue, *catalogue.ties]
        last = max((int(name.split(".")[0]) for name in every if _numbered(name)), default=0)
        compiled = [(_compiled(rule.pattern, last), rule) for rule in self.rules]
        new = {name: _renamed(name, compiled, last) for name in every}
        unknown = [name for name, names in new.items() if names is None]
        if unknown:
            raise UsageError(
                f"no rule of the key map fits {listed(unknown, 5)}",
                hint='Add a rule for each. A last rule "*": "*" keeps the other names, "*": null leaves the '
                "other tensors out.",
            )
        tensors: dict[str, Tensor] = {}
        ties: dict[str, str] = {}
        for name in catalogue:
            kept, *others = new[name] or [""]
            if kept:
                _once(kept, name, tensors, ties)
                tensors[kept] = catalogue[name]
            for other in others:
                _once(other, name, tensors, ties)
                ties[other] = kept
        for alias, first in catalogue.ties.items():
            kept = (new[first] or ("",))[0]
            for other in new[alias] or ():
                if kept and other != kept:
                    _once(other, alias, tensors, ties)
                    ties[other] = kept
        return Catalogue(tensors, ties)


def key_map(content: object) -> KeyMap:
    """The key map that a JSON value describes: an object of patterns and names.

    Raises:
        UsageError: it is no such object, or a name uses what its pattern lacks.
    """
    if not isinstance(content, Mapping) or not content:
        raise UsageError("a key map is a JSON object of patterns and names", hint=_EXAMPLE)
    return KeyMap(tuple(_rule(pattern, target) for pattern, target in content.items()))


_EXAMPLE = 'For example {"0.weight": "model.embed_tokens.weight", "{n}.*": "model.layers.{n-1}.*"}.'


def _rule(pattern: str, target: object) -> Rule:
    names = [target] if isinstance(target, str) else [] if target is None else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"the rule {pattern!r} gives neither a name, nor names, nor null", hint=_EXAMPLE
        )
    known = {match["name"] or "*" for match in _PLACE.finditer(pattern)} | {_LAST}
    if pattern.count("*") > 1:
        raise UsageError(f"the pattern {pattern!r} has more than one *", hint=_EXAMPLE)
    for name in names:
        used = {match["name"] or "*" for match in _PLACE.finditer(name)}
        if used - known:
            raise UsageError(
                f"the rule {pattern!r} gives {name!r}, whose {min(used - known)} is not in the pattern",
                hint=_EXAMPLE,
            )
    return Rule(pattern, tuple(names))


def _numbered(name: str) -> bool:
    return name.split(".")[0].isdigit()


def _compiled(pattern: str, last: int) -> re.Pattern[str]:
    parts, at = [], 0
    seen: set[str] = set()
    for match in _PLACE.finditer(pattern):
        parts.append(re.escape(pattern[at : match.start()]))
        name = match["name"]
        if name is None:
            parts.append("(?P<rest>.+)")
        elif name == _LAST:
            parts.append(str(last + int(match["shift"] or 0)))
        else:
            parts.append(f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)")
            seen.add(name)
        at = match.end()
    return re.compile("".join((*parts, re.escape(pattern[at:]))))


def _renamed(
    name: str, rules: Sequence[tuple[re.Pattern[str], Rule]], last: int
) -> tuple[str, ...] | None:
    for pattern, rule in rules:
        match = pattern.fullmatch(name)
        if match is not None:
            return tuple(_filled(new, match, last) for new in rule.names)
    return None


def _filled(name: str, found: re.Match[str], last: int) -> str:
    def value(place: re.Match[str]) -> str:
        if place["name"] is None:
            return found["rest"]
        number = last if place["name"] == _LAST else int(found[place["name"]])
        return str(number + int(place["shift"] or 0))

    return _PLACE.sub(value, name)


def _once(name: str, old: str, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    if name in tensors or name in ties:
        raise UsageError(
            f"the key map gives two tensors the name {name}",
            tensor=old,
            hint="Rules are tried in order: put the rule for a single name before that for many.",
        )
