"""The part of each parameter that a process holds under FSDP1: runs of flat parameters.

Owns the attributes of ``FlatParamHandle``: which parameters are laid end to end in a wrapped module's flat
parameter, and which run of each is in this process's shard. The two modes (``use_orig_params`` or not) differ
in what ``named_parameters`` shows, not in this. Nothing is gathered.

Source: ``torch/distributed/fsdp/_flat_param.py``, read at torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange
from ckpt_tools.training.holding import Held, Holding, Piece, dtype_of, kind_of, whole
from ckpt_tools.training.wrappers import is_a

_WRAPPED = "_fsdp_wrapped_module."
_FLAT = "_flat_param"


class _Flat(NamedTuple):
    """A parameter inside a flat parameter: its position among those of its handle."""

    handle: Any
    position: int


def is_flat(module: Any) -> bool:
    """Whether FSDP1 wraps something in the module."""
    return any(_is_wrapper(child) for child in module.modules())


def check_parameter(name: str, parameter: Any) -> None:
    """Raise UnsupportedLayout for a view of a flat parameter whose wrapper was not passed."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise UnsupportedLayout(
            "it is part of an FSDP wrapper that was not passed",
            tensor=name,
            hint="Pass the model as FSDP wrapped it.",
        )


def _is_wrapper(module: Any) -> bool:
    return is_a(module, "FullyShardedDataParallel")


def holding_of(module: Any) -> Holding:
    """The parts of a module's tensors in this process.

    Raises:
        UnsupportedLayout: buffers that FSDP keeps in another dtype than it saves; a parameter whose elements
            were not in row-major order.
    """
    flat, aliases = _managed(module)
    tensors: list[Held] = []
    names: dict[tuple[int, str], str] = {}
    ties: dict[str, tuple[int, str]] = {}
    for path, child in module.named_modules():
        prefix = f"{path}.".replace(_WRAPPED, "") if path else ""
        mine, others = flat.get(id(child), {}), aliases.get(id(child), {})
        ties |= {prefix + name: first for name, first in others.items()}
        for name, run in mine.items():
            names[id(child), name] = prefix + name
            tensors.append(_run(prefix + name, *run))
        for name, parameter in child._parameters.items():
            if parameter is not None and not {name} & {*mine, *others, _FLAT}:
                check_parameter(prefix + name, parameter)
                kind = kind_of(parameter, False)
                tensors.append(whole(prefix + name, "model", kind, parameter))
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                tensors.append(whole(prefix + name, "model", "buffer", buffer))
    return Holding(tuple(tensors), {alias: names[first] for alias, first in ties.items()})


def _managed(
    module: Any,
) -> tuple[dict[int, dict[str, _Flat]], dict[int, dict[str, tuple[int, str]]]]:
    """By the id of a module: its parameters inside flat parameters, and second names of these."""
    flat: dict[int, dict[str, _Flat]] = {}
    aliases: dict[int, dict[str, tuple[int, str]]] = {}
    handles: dict[int, Any] = {}
    for wrapper in filter(_is_wrapper, module.modules()):
        _check_buffers(wrapper)
        # Handles of wrappers around the module count too; callbacks of the Trainer do not get those wrappers.
        around = getattr(getattr(wrapper, "_exec_order_data", None), "all_handles", ())
        handles |= {id(h): h for h in (getattr(wrapper, "_handle", None), *around) if h is not None}
    for handle in handles.values():
        for index, info in enumerate(handle.flat_param._param_infos):
            flat.setdefault(id(info.module), {})[info.param_name] = _Flat(handle, index)
        for shared in handle.flat_param._shared_param_infos:
            first = (id(shared.prim_module), shared.prim_param_name)
            aliases.setdefault(id(shared.module), {})[shared.param_name] = first
    return flat, aliases


def _run(name: str, handle: Any, position: int) -> Held:
    parameter = handle.flat_param
    shape = tuple(parameter._shapes[position])
    if not all(parameter._contiguities[position : position + 1]):
        raise UnsupportedLayout(
            "FSDP does not keep its elements in row-major order",
            tensor=name,
            hint="Save it with FSDP's own state dict; ckpt-tools consolidate reads that.",
        )
    shard = getattr(parameter, "_local_shard", parameter).detach()
    info = parameter._shard_param_infos[position]
    pieces: tuple[Piece, ...] = ()
    if info.in_shard and info.numel_in_shard:
        start = info.intra_param_start_idx
        values = shard.narrow(0, info.offset_in_shard, info.numel_in_shard)
        pieces = (Piece(FlatRange(start, start + info.numel_in_shard), values),)
    original = parameter._params[position] if parameter._params else parameter
    kind = kind_of(original, False)
    return Held(name, "model", kind, dtype_of(shard, name), shape, pieces)


def _check_buffers(wrapper: Any) -> None:
    """Raise UnsupportedLayout for buffers that FSDP cast: a checkpoint holds them cast back."""
    before = getattr(wrapper, "_buffer_name_to_orig_dtype", {})
    for name, buffer in _persistent_buffers(wrapper):
        clean = name.replace(_WRAPPED, "")
        if before.get(clean, buffer.dtype) != buffer.dtype:
            raise UnsupportedLayout(
                f"FSDP keeps the buffer in {buffer.dtype} and saves it in {before[clean]}",
                tensor=clean,
                hint="Leave buffer_dtype out of MixedPrecision.",
            )


def _persistent_buffers(module: Any) -> Iterator[tuple[str, Any]]:
    """The buffers that a state dict holds. Others, such as ``inv_freq``, may have any dtype."""
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
