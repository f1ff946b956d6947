"""Owns what a mean is made of: the states of several checkpoints, and a warning where two are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckpt_tools.errors import UnsupportedLayout, listed
from ckpt_tools.hub import ConfigSource
from ckpt_tools.model.live_names import alike
from ckpt_tools.model.quantised import quantised_names
from ckpt_tools.model.state import State, mean_state
from ckpt_tools.storage.reading import is_near
from ckpt_tools.tensors.checkpoint import Checkpoint


def mean_of(
    states: Sequence[State],
    sources: Sequence[Checkpoint],
    coefficients: Sequence[float] | None,
    config: ConfigSource | None,
    *,
    trust: bool,
) -> State:
    """The mean of the states of checkpoints.

    Args:
        states: the states.
        sources: their checkpoints.
        coefficients: the weight of each; None if they are equal.
        config: of the model that all of them are; its names become one where they differ.
        trust: whether code beside the config may describe the model.

    Raises:
        UnsupportedLayout: a state holds codes of a quantiser.
        UsageError: names or shapes differ, or the coefficients do not fit.
    """
    codes = [name for state in states for name in quantised_names(state)]
    if codes:
        raise UnsupportedLayout(
            f"a mean of quantised weights is not a weight: {listed(codes)}",
            hint="Pass --dequantize, and the mean is that of the 16-bit weights.",
        )
    mean = mean_state(alike(states, config, trust=trust), coefficients)
    return replace(mean, warnings=(*mean.warnings, *_counted_twice(sources)))


def _counted_twice(sources: Sequence[Checkpoint]) -> Iterator[str]:
    """A warning for each checkpoint that several of the sources are."""
    numbers: dict[object, list[int]] = {}
    for number, source in enumerate(sources, start=1):
        numbers.setdefault(_identity(source), []).append(number)
    for held in numbers.values():
        if len(held) > 1:
            *first, last = map(str, held)
            yield (
                f"checkpoints {', '.join(first)} and {last} have the same files "
                f"({sources[held[0] - 1].location.directory}), so the mean counts them {len(held)} times. "
                "Name each checkpoint once. --coefficients gives one more weight."
            )


def _identity(source: Checkpoint) -> object:
    """A value that two checkpoints share if they are one model in the same files, however they are named.

    Links to a file have its stamp. A copy has another.
    """
    stamps = {file: source.stamps.get(file) if is_near(file) else None for file in source.files}
    return source.location.part, frozenset(stamp or str(file) for file, stamp in stamps.items())
