"""The state of one model in a checkpoint: its tensors under the model's own names, and their dtypes.

Owns the steps that need no config: choose the copy, take an attribute, strip wrappers from the names, cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ckpt_tools.errors import UnsupportedLayout, UsageError, counted, tensors
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy, Kind
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.dtypes import BY_SHORT_NAME, DType
from ckpt_tools.transforms.average import average
from ckpt_tools.transforms.key_map import KeyMap
from ckpt_tools.transforms.prefixes import rename, strip_wrappers
from ckpt_tools.transforms.subset import take_attribute

DTypeChoice = Literal["auto", "keep", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class State:
    """The tensors of one model.

    Attributes:
        catalogue: the tensors as stored, under the model's own names.
        dtypes: for each name, the dtype it had in the model during training.
        kinds: for each name, whether it was trained, frozen or a buffer, as far as the format tells.
        notes: what was done to it.
        warnings: what to look at.
        shapeless: names of tensors whose shape is not recorded.
        of_base: names whose tensors are those of the base that an adapter was merged into.
        task: PEFT's task type of that adapter, if its config states one.
    """

    catalogue: Catalogue
    dtypes: Mapping[str, DType]
    kinds: Mapping[str, Kind]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    shapeless: frozenset[str] = frozenset()
    of_base: frozenset[str] = frozenset()
    task: str | None = None


def model_state(
    checkpoint: Checkpoint,
    copy: Copy,
    attribute: str | None = None,
    names: KeyMap | None = None,
    *,
    flat: bool = False,
) -> State:
    """The state of the whole model, or of one attribute of a composite one.

    Args:
        checkpoint: the checkpoint.
        copy: which copy of each tensor.
        attribute: dotted path of the part of a composite model.
        names: what its tensors are called in the model.
        flat: accept tensors whose shape is not recorded.

    Raises:
        UnsupportedLayout: shapes are not recorded, and ``flat`` is false.
        UsageError: the checkpoint does not keep this copy, or the key map does not fit its names.
        AttributeNotFound: it has no such attribute.
    """
    if checkpoint.shapeless and not flat:
        raise UnsupportedLayout(
            f"the files do not record the shapes of {counted(len(checkpoint.shapeless), 'parameter')}",
            path=checkpoint.location.directory,
            hint="consolidate with --config takes the shapes from the config. Pass its output here.",
        )
    stored = checkpoint.catalogue(copy)
    if names is not None:
        stored = names.reordered(stored)
    whole = stored if names is None else names.apply(stored)
    removed: dict[str, int] = {}

    def unwrapped(catalogue: Catalogue) -> Catalogue:
        stripped = strip_wrappers([*catalogue, *catalogue.ties])
        removed.update(stripped.removed)
        return rename(catalogue, stripped.names)

    if attribute is None:
        catalogue = unwrapped(whole)
    else:
        # A path may contain the wrappers that are in the names, or not.
        as_spelt = any(name.startswith(f"{attribute}.") for name in whole)
        catalogue = unwrapped(take_attribute(whole if as_spelt else unwrapped(whole), attribute))
    weights = {id(stored[name]): weight for name, weight in checkpoint.weights.items()}
    held = {name: weights[id(tensor)] for name, tensor in catalogue.items()}
    shapeless = {id(checkpoint.weights[name]) for name in checkpoint.shapeless}
    notes = [f"stripped {where} from {count} names" for where, count in removed.items()]
    if names is not None:
        notes.insert(0, f"the key map named {tensors(len(whole))}")
    return State(
        catalogue,
        {name: weight.dtype for name, weight in held.items()},
        {name: weight.kind for name, weight in held.items()},
        tuple(notes),
        shapeless=frozenset(name for name, weight in held.items() if id(weight) in shapeless),
    )


def mean_state(states: Sequence[State], coefficients: Sequence[float] | None) -> State:
    """The weighted mean of states; everything but tensors and notes comes from the first.

    Raises:
        UsageError: names or shapes differ, or the coefficients do not fit.
    """
    first = states[0]
    mean = average([state.catalogue for state in states], coefficients)
    # A name of another state may be a second name of the first.
    own = {name: first.catalogue.ties.get(name, name) for name in mean}
    return replace(
        first,
        catalogue=mean,
        dtypes={name: first.dtypes[held] for name, held in own.items()},
        kinds={name: first.kinds[held] for name, held in own.items()},
        notes=tuple(dict.fromkeys(note for state in states for note in state.notes)),
    )


def cast_state(state: State, choice: DTypeChoice, as_stored: Collection[str] = ()) -> Catalogue:
    """The tensors in the dtypes of the output; only floating ones are cast.

    Args:
        state: the state.
        choice: the dtype of the output.
        as_stored: tensors that are not cast: codes and scales of a quantiser.

    Raises:
        UsageError: ``choice`` is not a dtype.
    """
    if choice == "keep":
        return state.catalogue
    if choice != "auto" and choice not in BY_SHORT_NAME:
        raise UsageError(
            f"{choice!r} is not a dtype", hint="Choose auto, keep, fp32, bf16 or fp16."
        )
    tensors = {
        name: tensor
        if name in as_stored
        else cast(tensor, state.dtypes[name] if choice == "auto" else BY_SHORT_NAME[choice])
        for name, tensor in state.catalogue.items()
    }
    return Catalogue(tensors, state.catalogue.ties)


def main_dtype(tensors: Mapping[str, Tensor], stored: Collection[str] = ()) -> DType:
    """The dtype of most floating elements: what ``config.json`` calls the model's dtype.

    Args:
        tensors: the tensors of the output.
        stored: codes and scales of a quantiser. A model computes in the dtype of its other tensors:
            no library can create a model of 8-bit floats.

    Raises:
        UsageError: no tensor is floating.
    """
    counts: Counter[DType] = Counter()
    plain = {name for name in tensors if name not in stored}
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating and (name in plain or not plain):
            counts[tensor.dtype] += max(tensor.numel, 1)
    if not counts:
        raise UsageError(
            "the checkpoint holds no floating-point tensor", hint="Pass --weights-only."
        )
    return counts.most_common(1)[0][0]
