"""Key maps: what the tensors of a checkpoint are called in the model, rule by rule.

A rule is a pattern and what becomes of a name that fits it: another name, several names of one tensor
(tied ones), or nothing. In a pattern ``{n}`` stands for a number, ``{last}`` for the largest number that
any name begins with, and ``*`` for anything; in a new name ``{n}``, ``{n-1}``, ``{last}`` and ``*`` stand
for what they stood for. The first rule that fits counts. A rule may also reorder the rows of a query or key
projection for the rotary embedding of Hugging Face's Llama: from neighbouring pairs of rows to two halves. Or
it keeps the first rows of a tensor, and leaves out those with which Megatron pads a vocabulary.

Source of the order: ``_permute`` in torchtitan's ``models/llama3/state_dict_adapter.py``, read at 0.3.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.tensors.catalogue import Catalogue, Tensor, row_major_strides
from ckpt_tools.tensors.derived import view

_PLACE = re.compile(r"\{(?P<name>[a-z]+)(?P<shift>[+-]\d+)?\}|\*")
_LAST = "last"
_HEADS = "rope_heads"
_ROWS = "rows"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        pattern: the names it is about.
        names: the new names, of which the first is kept and the others are tied to it; none to leave it out.
        rope_heads: the number of heads whose rows are reordered, or the key of the config that has it.
        rows: the number of rows that are kept, or the key of the config that has it.
    """

    pattern: str
    names: tuple[str, ...]
    rope_heads: int | str | None = None
    rows: int | str | None = None


@dataclass(frozen=True)
class KeyMap:
    """The rules, in order."""

    rules: tuple[Rule, ...]

    def with_numbers(self, number: Callable[[str], object]) -> KeyMap:
        """The key map with the number in place of each key of the config.

        Args:
            number: the value of the config under a key.

        Raises:
            UsageError: the config has no such number.
        """
        return KeyMap(tuple(_with_number(rule, number) for rule in self.rules))

    def _fitting(
        self, catalogue: Catalogue
    ) -> tuple[int, dict[str, tuple[re.Match[str], Rule] | None]]:
        """The largest layer number, and the rule that fits each name."""
        every = [*catalogue, *catalogue.ties]
        last = max((int(name.split(".")[0]) for name in every if _numbered(name)), default=0)
        compiled = [(_compiled(rule.pattern, last), rule) for rule in self.rules]
        return last, {name: _fitting(name, compiled) for name in every}

    def reordered(self, catalogue: Catalogue) -> Catalogue:
        """The catalogue under its old names, with the rows that the rules keep, in the order that they give.

        Raises:
            UsageError: the rows are not those of the number of heads, or fewer than are to be kept.
        """
        _, fitting = self._fitting(catalogue)
        tensors = {
            name: tensor if (found := fitting[name]) is None else _changed(tensor, found[1], name)
            for name, tensor in catalogue.items()
        }
        return Catalogue(tensors, catalogue.ties)

    def apply(self, catalogue: Catalogue) -> Catalogue:
        """The catalogue under the new names.

        Raises:
            UsageError: a name fits no rule, or two become one.
        """
        last, fitting = self._fitting(catalogue)
        new = {
            name: None
            if found is None
            else tuple(_filled(n, found[0], last) for n in found[1].names)
            for name, found in fitting.items()
        }
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
    numbers: dict[str, int | str] = {}
    if isinstance(target, Mapping):
        numbers = {key: value for key, value in target.items() if key != "name"}
        if (
            "name" not in target
            or not numbers
            or numbers.keys() - {_HEADS, _ROWS}
            or not all(isinstance(value, int | str) and value for value in numbers.values())
        ):
            raise UsageError(
                f'the rule {pattern!r} is an object without "name" and "{_HEADS}" or "{_ROWS}"',
                hint=f'For example {{"wq.*": {{"name": "q_proj.*", "{_HEADS}": 32}}}}.',
            )
        target = target["name"]
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
    return Rule(pattern, tuple(names), numbers.get(_HEADS), numbers.get(_ROWS))


def _with_number(rule: Rule, number: Callable[[str], object]) -> Rule:
    def value(key: int | str | None) -> int | None:
        if not isinstance(key, str):
            return key
        found = number(key)
        if not isinstance(found, int) or found < 1:
            raise UsageError(
                f"the rule {rule.pattern!r} needs {key} of the config, which is {found!r}",
                hint=f'Write the number itself: "{_HEADS if key == rule.rope_heads else _ROWS}": 32.',
            )
        return found

    return replace(rule, rope_heads=value(rule.rope_heads), rows=value(rule.rows))


def _changed(tensor: Tensor, rule: Rule, name: str) -> Tensor:
    for key in (rule.rope_heads, rule.rows):
        if isinstance(key, str):
            raise UsageError(
                f"the rule {rule.pattern!r} needs {key} of the config, and there is no config",
                hint="Pass --config without --weights-only, or write the number in the place of the key.",
            )
    return _reordered(_first_rows(tensor, rule, name), rule, name)


def _first_rows(tensor: Tensor, rule: Rule, name: str) -> Tensor:
    """The rows that a rule keeps."""
    if not isinstance(rule.rows, int):
        return tensor
    held = tensor.shape[0] if tensor.shape else 0
    if not 0 < rule.rows <= held:
        raise UsageError(
            f"it has {held} rows, and the key map keeps {rule.rows}",
            tensor=name,
            hint=f"Correct {_ROWS} in the rule {rule.pattern!r} of the key map.",
        )
    shape = (rule.rows, *tensor.shape[1:])
    return view(tensor, 0, shape, row_major_strides(shape))


def _reordered(tensor: Tensor, rule: Rule, name: str) -> Tensor:
    """The rows of each head, from neighbouring pairs to two halves."""
    heads = rule.rope_heads
    if not isinstance(heads, int):
        return tensor
    rows = tensor.shape[0] if tensor.shape else 0
    if heads < 1 or not rows or rows % (2 * heads):
        raise UsageError(
            f"its {rows} rows are not those of {heads} heads with pairs of rows",
            tensor=name,
            hint=f"Correct {_HEADS} in the rule {rule.pattern!r} of the key map.",
        )
    pairs, row = rows // heads // 2, tensor.numel // rows
    split = view(tensor, 0, (heads, 2, pairs, row), (2 * pairs * row, row, 2 * row, 1))
    return view(split, 0, tensor.shape, row_major_strides(tensor.shape))


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


def _fitting(
    name: str, rules: Sequence[tuple[re.Pattern[str], Rule]]
) -> tuple[re.Match[str], Rule] | None:
    matches = ((pattern.fullmatch(name), rule) for pattern, rule in rules)
    return next(((match, rule) for match, rule in matches if match is not None), None)


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
            hint="A name without * and {n} is for one tensor. Rules are tried in order: put the rule for one "
            "tensor before the rule for many.",
        )
