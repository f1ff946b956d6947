"""A weighted mean of states of one architecture, streamed.

Each term is multiplied with its coefficient and added in the order of the terms, in fp64. The sum is rounded
once to fp32. Product and sum are separate operations, because a processor may fuse a combined one. So the
bits of a mean are the same on every processor (NaNs excepted), for any windows, threads and ranks. With the
default coefficients the mean of equal fp32 states is that state.

Sources: Wortsman et al. 2022, "Model soups" (uniform means of
fine-tuned models); the annealed OLMo models are such means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.tensors.catalogue import Catalogue, Computed, Shape, Tensor, Values
from ckpt_tools.tensors.dtypes import FLOAT32, DType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False, eq=False)
class Mean(Computed):
    """The weighted sum of tensors of one shape, in fp32.

    Attributes:
        tensors: the terms, floating and of one shape.
        weights: their coefficients.
    """

    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...]
    dtype: DType = FLOAT32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of each term."""
        return self.tensors[0].shape

    @property
    def pieces(self) -> int:
        """Number of runs of all terms."""
        return sum(tensor.pieces for tensor in self.tensors)

    def compute(self, start: int, stop: int, values: Values) -> torch.Tensor:
        """The sum of each term times its coefficient, added in the order of the terms."""
        import torch

        total = torch.zeros(stop - start, dtype=torch.float64)
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            total += values.window(tensor, start, stop).double().mul_(weight)
        return total.float()


def average(states: Sequence[Catalogue], coefficients: Sequence[float] | None = None) -> Catalogue:
    """The mean of ``states``, name by name, rounded to fp32.

    Tensors that are not floating (counters, masks) are taken from the last state. Names that are tied in
    every state stay tied.

    Args:
        states: catalogues with the same names and shapes. A name may be a second name in some of them.
        coefficients: one a state; they must add up to 1. By default all are equal.

    Raises:
        UsageError: names or shapes differ, or the coefficients do not fit.
    """
    weights = tuple(coefficients or [1 / len(states)] * len(states))
    if len(weights) != len(states):
        raise UsageError(
            f"there are {len(states)} checkpoints, and the number of coefficients is {len(weights)}",
            hint="Pass one coefficient for each checkpoint.",
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError("a coefficient is not a number", hint="Pass numbers that add up to 1.")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UsageError(
            f"the coefficients add up to {sum(weights):g}, not to 1",
            hint="Divide each coefficient by their sum.",
        )
    first = states[0]
    for index, state in enumerate(states[1:], start=2):
        odd = sorted(name for name in {*first, *state} if name not in first or name not in state)
        if odd:
            raise UsageError(
                f"checkpoint {index} and the first differ in {len(odd)} names: {listed(odd, 3)}",
                hint="Only checkpoints of one architecture can be averaged. If these are, write each with "
                "consolidate and the same --like DIR, and average the two outputs.",
            )
        for name in first:
            if first[name].shape != state[name].shape:
                raise UsageError(
                    f"its shape is {first[name].shape} in the first checkpoint and "
                    f"{state[name].shape} in number {index}",
                    tensor=name,
                )
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    met: dict[tuple[str, ...], str] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        kept = met.setdefault(tuple(state.ties.get(name, name) for state in states), name)
        if kept != name:
            ties[name] = kept
            continue
        terms = tuple(state[name] for state in states)
        floating = all(term.dtype.is_floating for term in terms)
        tensors[name] = Mean(terms, weights) if floating else terms[-1]
    for alias, kept in first.ties.items():
        if alias not in tensors:
            ties.setdefault(alias, ties.get(kept, kept))
    return Catalogue(tensors, ties)
