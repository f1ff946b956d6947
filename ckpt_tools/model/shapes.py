"""Owns the shapes of parameters whose files record only their number of elements: the config states them."""

from __future__ import annotations

from dataclasses import replace

from ckpt_tools.errors import UnsupportedLayout, UsageError, counted, listed
from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.model.fit import ask_model
from ckpt_tools.model.state import State, main_dtype
from ckpt_tools.tensors.catalogue import Catalogue, Shape, Tensor, row_major_strides
from ckpt_tools.tensors.derived import view


def with_shapes(state: State, config: ConfigSource | None, *, trust: bool = False) -> State:
    """The state with every parameter in the shape that it has in the model of ``config``.

    Args:
        state: the state.
        config: the model's config; None where weights alone are written.
        trust: whether custom code beside the config may be run, in a process of its own.

    Raises:
        UsageError: there is no config, or it describes another number of elements.
        UnsupportedLayout: the model of the config has no such parameters.
    """
    if not state.shapeless:
        return state
    if config is None:
        raise UsageError(
            f"the files do not record the shapes of {counted(len(state.shapeless), 'parameter')}",
            hint="Pass --config with the config of the model that was trained, without --weights-only.",
        )
    dtype = main_dtype(state.catalogue)
    reference = ask_model(state.catalogue, config, None, dtype, trust=trust).result()
    unknown = [name for name in state.shapeless if _shape(name, reference) is None]
    if unknown:
        raise UnsupportedLayout(
            "the files do not record the shapes of the parameters, and the model of the config has no "
            f"parameter called {listed(sorted(unknown))}",
            path=config.path,
            hint="Pass the config of the model that was trained. Or load the state in the training script, "
            "and save it with SHARDED_STATE_DICT or FULL_STATE_DICT.",
        )
    tensors = {
        name: _shaped(name, tensor, reference, config) if name in state.shapeless else tensor
        for name, tensor in state.catalogue.items()
    }
    note = f"{counted(len(state.shapeless), 'parameter')} got their shapes from {config.path.name}"
    return replace(
        state,
        catalogue=Catalogue(tensors, state.catalogue.ties),
        notes=(*state.notes, note),
        shapeless=frozenset(),
    )


def _shape(name: str, reference: ReferenceModel | None) -> Shape | None:
    if reference is None:
        return None
    known = reference.live.get(name) or reference.saved.get(name)
    return None if known is None else known.shape


def _shaped(
    name: str, tensor: Tensor, reference: ReferenceModel | None, config: ConfigSource
) -> Tensor:
    shape = _shape(name, reference)
    assert shape is not None
    strides = row_major_strides(shape)
    numel = strides[0] * shape[0] if shape else 1
    if numel != tensor.numel:
        raise UsageError(
            f"it has {tensor.numel:,} elements, but the config describes {shape}",
            path=config.path,
            tensor=name,
            hint="Pass the config of the model that was trained (--config FILE|DIR).",
        )
    return view(tensor, 0, shape, strides)
