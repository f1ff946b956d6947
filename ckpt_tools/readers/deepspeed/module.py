"""Owns the ``module`` of a DeepSpeed model file, and the match of its names with those of the parameters.

DeepSpeed saves the module's ``state_dict`` there, and elsewhere names parameters by their place in the
module. Hooks make the two differ: activation-checkpoint wrappers omit their own name in ``state_dict``,
TRL's value head omits a prefix. The two lists are matched by structure: the longer name has all segments of
the shorter one in order, and the same segments are omitted everywhere. If that fails, shapes in order
decide, provided that only one order-preserving match fits; the caller must then compare the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.subclasses import plain
from ckpt_tools.readers.deepspeed.agreement import ModelState
from ckpt_tools.tensors.regions import Shape

# Hooks leave out a few combinations of segments. Each one that is tried takes a look at all names.
_MOST_COMBINATIONS = 64


@dataclass(frozen=True)
class Module:
    """The tensors of one ``module``.

    Attributes:
        tensors: by name.
        renamed: the names of parameters that differ from their places in the module, by place.
        dropped: segments of places that the names omit.
        doubts: a match by shapes alone, so that the values must be compared.
    """

    tensors: Mapping[str, TensorRef]
    renamed: Mapping[str, str]
    dropped: frozenset[str] = frozenset()
    doubts: tuple[str, ...] = ()

    def name(self, place: str) -> str:
        """The name of the parameter at ``place`` in the module."""
        if place in self.renamed or place in self.tensors or not self.dropped:
            return self.renamed.get(place, place)
        short = _without(place, self.dropped)
        return short if short in self.tensors else place


def matched_module(
    model: ModelState, shapes: Mapping[str, Shape], *, placeholders: bool, others: Iterable[str]
) -> Module:
    """The tensors of ``module``, matched with the parameters.

    Args:
        model: rank 0's model file.
        shapes: places of the trained parameters, and their shapes, in the order of the files.
        placeholders: whether the tensors are placeholders without a shape (stage 3).
        others: names that are not trained parameters.

    Raises:
        UnsupportedLayout: a value is a tensor that is not plain.
        UnsafePickle: a value may be a weight, but only code from the file can rebuild it.
        UnsupportedLayout: no match of the names fits, or more than one.
    """
    tensors = _tensors(model)
    lacking = [name for name in shapes if name not in tensors]
    if not lacking:
        return Module(tensors, {})
    taken = {*shapes, *others}
    free = [name for name in tensors if name not in taken]
    if not free:
        return Module(tensors, {})
    known = None if placeholders else {name: tensors[name].shape for name in free}
    found = _by_segments(lacking, free, shapes, known)
    if found is None and known is not None:
        by_shape = _by_shapes(lacking, free, shapes, known)
        if by_shape is not None:
            return Module(
                tensors,
                by_shape,
                doubts=("hooks renamed parameters in `module`: matched by their shapes in order",),
            )
    if found is None:
        raise UnsupportedLayout(
            f"{len(lacking)} parameters have different names in `module` and `param_shapes`, and the two "
            f"lists have no single match: {lacking[0]} may be {free[0]}",
            path=model.path,
            hint="A hook of the training script renames them. DeepSpeed's zero_to_fp32.py writes them with "
            "the names in param_shapes.",
        )
    renamed, dropped = found
    prefix = _prefix(renamed)
    if prefix:
        # A prefix that `state_dict` omits is restored, because the parameters' own names have it.
        back = {short: name for name, short in renamed.items()}
        return Module({back.get(name, name): ref for name, ref in tensors.items()}, {})
    return Module(tensors, renamed, dropped)


def _by_segments(
    lacking: Sequence[str],
    free: Sequence[str],
    shapes: Mapping[str, Shape],
    known: Mapping[str, Shape] | None,
) -> tuple[dict[str, str], frozenset[str]] | None:
    """Match names of which one has all segments of the other.

    Returns:
        The pairs and the segments; None if no choice or several fit, or after many combinations.
    """
    renamed: dict[str, str] = {}
    dropped: frozenset[str] = frozenset()
    left, open_names, tried = list(lacking), set(free), 0
    while left:
        choices: dict[frozenset[str], dict[str, str]] = {}
        for name in open_names:
            extra = _extra_segments(left[0], name)
            if extra and extra not in choices:
                tried += 1
                if tried > _MOST_COMBINATIONS:
                    return None
                pairs = _pairs(left, open_names, extra, shapes, known)
                if left[0] in pairs:
                    choices[extra] = pairs
        if len({pairs[left[0]] for pairs in choices.values()}) != 1:
            return None
        extra, pairs = max(choices.items(), key=lambda item: (len(item[1]), -len(item[0])))
        renamed |= pairs
        dropped |= extra
        left = [name for name in left if name not in pairs]
        open_names -= set(pairs.values())
    return (renamed, dropped) if len(set(renamed.values())) == len(renamed) else None


def _pairs(
    names: Sequence[str],
    free: set[str],
    extra: frozenset[str],
    shapes: Mapping[str, Shape],
    known: Mapping[str, Shape] | None,
) -> dict[str, str]:
    """The names that become a free one once these segments are left out of both."""
    short = {_without(name, extra): name for name in free}
    pairs = {}
    for name in names:
        other = short.get(_without(name, extra))
        if other is not None and (known is None or known[other] == shapes[name]):
            pairs[name] = other
    return pairs


def _extra_segments(a: str, b: str) -> frozenset[str] | None:
    """The segments that the longer name has beyond the shorter one; None if the names do not fit so."""
    long, short = sorted((a.split("."), b.split(".")), key=len, reverse=True)
    rest = iter(long)
    extra: list[str] = []
    for segment in short:
        for candidate in rest:
            if candidate == segment:
                break
            extra.append(candidate)
        else:
            return None
    extra.extend(rest)
    return frozenset(extra) if len(short) + len(extra) == len(long) and extra else None


def _without(name: str, segments: frozenset[str]) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in segments)


def _prefix(renamed: Mapping[str, str]) -> str:
    """What stands before every name here to make it the parameter's; empty if there is no such prefix."""
    prefixes = {
        name.removesuffix(short) if name.endswith(f".{short}") else ""
        for name, short in renamed.items()
    }
    return prefixes.pop() if len(prefixes) == 1 else ""


def _by_shapes(
    lacking: Sequence[str],
    free: Sequence[str],
    shapes: Mapping[str, Shape],
    known: Mapping[str, Shape],
) -> dict[str, str] | None:
    """Match by shapes in order; None unless exactly one order-preserving match fits."""
    first = _embedded([shapes[n] for n in lacking], [known[n] for n in free])
    last = _embedded([shapes[n] for n in reversed(lacking)], [known[n] for n in reversed(free)])
    if first is None or last is None:
        return None
    if first != [len(free) - 1 - index for index in reversed(last)]:
        return None
    return {name: free[index] for name, index in zip(lacking, first, strict=True)}


def _embedded(wanted: Sequence[Shape], offered: Sequence[Shape]) -> list[int] | None:
    """Where each wanted shape is first met, in order."""
    places, at = [], 0
    for shape in wanted:
        while at < len(offered) and offered[at] != shape:
            at += 1
        if at == len(offered):
            return None
        places.append(at)
        at += 1
    return places


def _tensors(model: ModelState) -> dict[str, TensorRef]:
    """The tensors of `module`, without extra state.

    Raises:
        UnsupportedLayout: a value is a tensor that is not plain.
        UnsafePickle: a value may be a weight, but only code from the file can rebuild it.
    """
    tensors = {}
    for name, value in (model.content["module"] or {}).items():
        if isinstance(value, TensorRef):
            tensors[name] = value
        elif isinstance(value, Opaque) and not name.endswith("_extra_state"):
            ref = plain(value, model.path, name)
            assert ref is not None
            tensors[name] = ref
    return tensors
