"""The part of a module in this process, entry by entry of its state dict.

The state dict names the tensors, as in every checkpoint. Its entries are the live tensors; their
attributes say how they are cut. Under DeepSpeed the names are those of ``named_parameters``, as in its
checkpoints. FSDP1 is not asked for a state dict, because that would gather the model.
"""

from __future__ import annotations

from typing import Any

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.checkpoint import Kind
from ckpt_tools.training import deepspeed, dtensors, flat_params
from ckpt_tools.training.holding import Held, Holding, first_names, kind_of, whole
from ckpt_tools.training.wrappers import Unwrapped


def holding_of(model: Unwrapped, *, masters: bool) -> Holding:
    """The part of a model in this process.

    Args:
        model: the model.
        masters: whether master weights are wanted too, if the optimizer keeps any.

    Raises:
        UnsupportedLayout: a tensor has an unknown layout, or a master is not in memory.
    """
    module = model.module
    if flat_params.is_flat(module):
        return flat_params.holding_of(module)
    if model.engine is not None:
        deepspeed.check_engine(model.engine)
    parameters = {id(value): name for name, value in module.named_parameters()}
    entries = _entries(module, parameters, by_place=_is_of_deepspeed(model, module))
    kept, ties = first_names(entries)
    held: list[Held] = []
    known = deepspeed.Masters(model.engine, module.parameters()) if masters else None
    for name, value in kept.items():
        kind = kind_of(value, id(value) not in parameters)
        held.append(_held(name, kind, value))
        master = known.of(name, value) if known is not None and kind == "parameter" else None
        if master is not None:
            held.append(master)
        elif known is not None and _lacks_a_master(model, kind, value):
            raise UnsupportedLayout(
                f"the masters of {type(model.engine.optimizer).__name__} have an unknown layout",
                tensor=name,
                hint='dtype="auto" needs none.',
            )
    return Holding(tuple(held), ties)


def _held(name: str, kind: Kind, value: Any) -> Held:
    if kind != "buffer":
        deepspeed.check_parameter(name, value)
    flat_params.check_parameter(name, value)
    if deepspeed.is_sliced(value):
        return deepspeed.sliced(name, kind, value)
    if dtensors.is_dtensor(value.data):
        return dtensors.held_of(name, kind, value)
    return whole(name, "model", kind, value)


def _is_of_deepspeed(model: Unwrapped, module: Any) -> bool:
    return model.engine is not None or any(map(deepspeed.is_sliced, module.parameters()))


def _entries(module: Any, parameters: dict[int, str], *, by_place: bool) -> list[tuple[str, Any]]:
    """Names and tensors of the state dict; other values there are not weights."""
    import torch

    entries = [
        (name, value)
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    ]
    if not by_place:
        return entries
    places = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return [
        (name if name in places else parameters.get(id(value), name), value)
        for name, value in entries
    ]


def _lacks_a_master(model: Unwrapped, kind: Kind, value: Any) -> bool:
    """Whether an engine must keep a master of the entry, but none was found."""
    return (
        model.engine is not None
        and getattr(model.engine, "optimizer", None) is not None
        and kind == "parameter"
        and value.numel() > 0
        and value.dtype.itemsize < 4
    )
