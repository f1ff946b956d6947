"""States whose weights are quantised: made plain, or kept whole.

Owns the choice. A merge needs plain weights: those of another model where there are some, else what the
quantiser's own dequantisation gives. What is kept is kept whole: codes and scales are never cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_tools.errors import UnsupportedLayout, counted, listed
from ckpt_tools.hub.files import read_object
from ckpt_tools.model.state import State
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.dtypes import BFLOAT16, DType
from ckpt_tools.transforms.lora import adapted_names
from ckpt_tools.transforms.quantised import (
    PLAIN_ELSEWHERE,
    dequantised,
    find_packed,
    storage_names,
)

KEY = "quantization_config"


def quantizer_of(directories: Sequence[Path]) -> Mapping[str, Any]:
    """The ``quantization_config`` of the first config that has one; empty where none has."""
    for directory in directories:
        path = directory if directory.is_file() else directory / "config.json"
        found = read_object(path).get(KEY) if path.is_file() else None
        if isinstance(found, dict):
            return found
    return {}


def quantised_names(state: State) -> frozenset[str]:
    """The tensors of a state that are a quantiser's."""
    return frozenset(storage_names(state.catalogue))


def unknown_codes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Integers and 8-bit floats in modules without a weight, if no weight is stored in a known way."""
    if find_packed(tensors):
        return []
    return [
        name
        for name, tensor in tensors.items()
        if (not tensor.dtype.is_floating or tensor.dtype.itemsize < 2)
        and f"{name.rpartition('.')[0]}.weight" not in tensors
    ]


def plain_state(state: State, quantizer: Mapping[str, Any], instead: Collection[str] = ()) -> State:
    """The state with plain weights in the place of quantised ones.

    Args:
        state: the state.
        quantizer: its ``quantization_config``.
        instead: plain names of weights that another model has; these are left out here.

    Raises:
        UnsupportedLayout: a weight is stored in a way that is not dequantised here.
        DamagedCheckpoint: the tensors of a weight do not fit each other.
    """
    catalogue = state.catalogue
    packed = find_packed(catalogue)
    storage = quantised_names(state)
    if not storage and not (quantizer and instead):
        return state
    dtype = _model_dtype(state, storage)
    tensors = {name: tensor for name, tensor in catalogue.items() if name not in storage}
    dtypes = {name: state.dtypes[name] for name in tensors}
    kinds = {name: state.kinds[name] for name in tensors}
    plain = adapted_names([*packed, *catalogue]).plain
    own = {plain.get(name) for name in tensors}
    beside = {
        name
        for name in catalogue
        if (module := _module_elsewhere(plain.get(name, name), instead)) is not None
        and f"{module}.weight" not in own
    }
    for name in beside & tensors.keys():
        del tensors[name], dtypes[name], kinds[name]
    taken = [name for name in packed if plain.get(name, name) in instead]
    made = [name for name in packed if name not in taken]
    for name in made:
        tensors[name] = dequantised(packed[name], catalogue, quantizer, dtype)
        held = tensors[name].dtype
        dtypes[name] = held if held.itemsize == 2 else dtype
        kinds[name] = state.kinds.get(packed[name].parts.get("codes", name), "frozen")
    known = {part for each in packed.values() for part in each.parts.values()}
    odd = sorted(storage - known - beside)
    if odd:
        raise UnsupportedLayout(
            f"the quantiser of {counted(len(odd), 'tensor')} is not known: {listed(odd)}",
            hint=PLAIN_ELSEWHERE,
        )
    ties = {a: kept for a, kept in catalogue.ties.items() if kept in tensors and a not in tensors}
    methods = listed(sorted({packed[name].method for name in made}))
    modules = {_module_elsewhere(plain.get(name, name), instead) for name in beside}
    replaced = {plain.get(name, name) for name in taken} | {
        f"{module}.weight" for module in modules
    }
    notes = [
        *([f"dequantised {len(made)} weights ({methods})"] if made else []),
        *(
            [f"{len(replaced)} quantised weights were replaced by those of --base"]
            if replaced
            else []
        ),
    ]
    return replace(
        state,
        catalogue=Catalogue(tensors, ties),
        dtypes=dtypes,
        kinds=kinds,
        notes=(*state.notes, *notes),
    )


def _module_elsewhere(name: str, instead: Collection[str]) -> str | None:
    """The module below which a tensor is, if another model has its weight and not the tensor."""
    if name in instead:
        return None
    parent = name.rpartition(".")[0]
    while parent:
        if f"{parent}.weight" in instead:
            return parent
        parent = parent.rpartition(".")[0]
    return None


def _model_dtype(state: State, storage: Collection[str]) -> DType:
    """The dtype of most plain elements, if it has 16 bits; else bf16."""
    counts: Counter[DType] = Counter()
    for name, dtype in state.dtypes.items():
        if name not in storage and dtype.is_floating and dtype.itemsize == 2:
            counts[dtype] += max(state.catalogue[name].numel, 1)
    return counts.most_common(1)[0][0] if counts else BFLOAT16
