"""The part of a DeepSpeed engine's weights in this process: slices of parameters and of masters.

Owns the attributes that DeepSpeed puts on parameters and optimizers. Under stage 3 each process holds
``ceil(numel / ranks)`` elements of every parameter, padded at the end of the last; nothing is gathered.
Below stage 3 parameters are whole on every rank, and only masters are cut. DeepSpeed is imported where its
own functions are called.

Sources, read at 0.19.8: ``runtime/zero/partition_parameters.py`` (``_partition_param``), ``stage3.py``
(``_get_fp32_opt_state_partition``), ``utils/tensor_fragment.py``, ``runtime/fp16/fused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import FlatRange
from ckpt_tools.tensors.checkpoint import Copy, Kind
from ckpt_tools.tensors.dtypes import FLOAT32
from ckpt_tools.training.holding import Held, Piece, dtype_of, whole

_SAVE_WITH_ENGINE = "Save with engine.save_checkpoint; ckpt-tools consolidate reads that."
_NO_MASTERS = f'dtype="auto" needs no masters. {_SAVE_WITH_ENGINE}'


def is_sliced(parameter: Any) -> bool:
    """Whether ZeRO-3 has cut the parameter."""
    return hasattr(parameter, "ds_tensor")


def check_engine(engine: Any) -> None:
    """Raise UnsupportedLayout for an engine with pipeline, tensor or expert parallelism."""
    tensor_parallel = getattr(engine, "autotp_size", None)
    if getattr(engine, "has_moe_layers", False):
        what = "experts on different ranks"
    elif getattr(engine, "mp_world_size", 1) > 1 or (tensor_parallel and tensor_parallel() > 1):
        what = "tensor parallelism"
    else:
        return
    raise UnsupportedLayout(f"a DeepSpeed engine with {what}", hint=_SAVE_WITH_ENGINE)


def check_parameter(name: str, parameter: Any) -> None:
    """Raise UnsupportedLayout for a parameter that differs between ranks: an expert, a part of a tensor."""
    if not getattr(parameter, "allreduce", True):
        what = "an expert"
    elif getattr(parameter, "tensor_model_parallel", False):
        what = "a tensor-parallel part"
    else:
        return
    raise UnsupportedLayout(
        f"{what} that differs between ranks", tensor=name, hint=_SAVE_WITH_ENGINE
    )


def sliced(name: str, kind: Kind, parameter: Any) -> Held:
    """This process's slice of a parameter under ZeRO-3.

    Raises:
        UnsupportedLayout: the slice is on NVMe, or quantised.
    """
    part = parameter.ds_tensor
    if part.status.name != "AVAILABLE" or not _is_here(part):
        raise UnsupportedLayout(
            "its slice is on NVMe (offload_param)", tensor=name, hint=_SAVE_WITH_ENGINE
        )
    if hasattr(part, "ds_quant_scale"):
        raise UnsupportedLayout("it is quantised", tensor=name, hint=_SAVE_WITH_ENGINE)
    return _slice(name, "model", kind, parameter, part)


def _is_here(part: Any) -> bool:
    return bool(part.numel() >= part.ds_numel)


def _slice(name: str, copy: Copy, kind: Kind, parameter: Any, part: Any) -> Held:
    numel, room = parameter.ds_numel, part.numel()
    start = min(_rank(parameter) * room, numel)
    stop = min(start + room, numel)
    pieces = (
        (Piece(FlatRange(start, stop), part.detach().view(-1)[: stop - start]),)
        if stop > start
        else ()
    )
    shape = tuple(parameter.ds_shape)
    return Held(name, copy, kind, dtype_of(part, name), shape, pieces, room=room)


def _rank(parameter: Any) -> int:
    """Which slice is this process's."""
    rank = getattr(parameter, "ds_zero_partition_rank", None)
    if rank is None:  # before 0.19
        from deepspeed import comm

        rank = comm.get_rank(group=parameter.ds_process_group)
    return int(rank)


class Masters:
    """The master weights of the parameters.

    Args:
        engine: the engine; None if only the parameters are known.
        parameters: the parameters; under ZeRO they refer to their optimizer.
    """

    def __init__(self, engine: Any, parameters: Iterable[Any]) -> None:
        optimizer = getattr(engine, "optimizer", None)
        for parameter in parameters if optimizer is None else ():
            optimizer = optimizer or getattr(parameter, "_zero_optimizer", None)
        self._whole = _whole_masters(optimizer)
        self._runs = _reordered_runs(optimizer)

    def of(self, name: str, parameter: Any) -> Held | None:
        """The part of a parameter's master in this process; None if the optimizer keeps no master.

        Raises:
            UnsupportedLayout: it is on NVMe.
        """
        if id(parameter) in self._whole:
            return whole(name, "master", "parameter", self._whole[id(parameter)])
        if is_sliced(parameter):
            return _sliced_master(name, parameter)
        if id(parameter) in self._runs:
            return _run(name, parameter, *self._runs[id(parameter)])
        if not hasattr(parameter, "_hp_mapping"):
            return None
        fragment = parameter._hp_mapping
        if fragment is None:  # other processes hold all of it
            return _run(name, parameter, 0, 0, None)
        start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
        return _run(name, parameter, start, start + count, fragment.hp_fragment)


def _run(name: str, parameter: Any, start: int, stop: int, values: Any) -> Held:
    shape = tuple(parameter.shape)
    if stop <= start:
        return Held(name, "master", "parameter", FLOAT32, shape, ())
    if values is None or values.numel() != stop - start:
        raise _not_here(name)
    values = values.detach().view(-1)
    pieces = (Piece(FlatRange(start, stop), values),)
    return Held(name, "master", "parameter", dtype_of(values, name), shape, pieces)


def _reordered_runs(optimizer: Any) -> dict[int, tuple[int, int, Any]]:
    """Under ``round_robin_gradients``, each parameter's run in this process's partition, by its id.

    The mappings of the parameters state the order before the reordering, so they point at values of other
    parameters.
    """
    if not getattr(optimizer, "round_robin_gradients", False):
        return {}
    if not hasattr(optimizer, "round_robin_bit16_offsets"):
        raise UnsupportedLayout(
            "this DeepSpeed keeps masters under round_robin_gradients in an unknown layout",
            hint=_NO_MASTERS,
        )
    from deepspeed import comm

    runs: dict[int, tuple[int, int, Any]] = {}
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        low = comm.get_rank(group=optimizer.real_dp_process_group[number]) * flat.numel()
        parameters = optimizer.round_robin_bit16_groups[number]
        offsets = optimizer.round_robin_bit16_offsets[number]
        for parameter, offset in zip(parameters, offsets, strict=True):
            first = max(offset, low)
            last = max(min(offset + parameter.numel(), low + flat.numel()), first)
            run = flat.detach()[first - low : last - low]
            runs[id(parameter)] = (first - offset, last - offset, run)
    return runs


def _sliced_master(name: str, parameter: Any) -> Held | None:
    """The slice of a master under ZeRO-3, in a flat group; as many elements as the slice of the parameter.

    DeepSpeed's ``safe_get_local_fp32_param`` copies each slice to the accelerator.
    """
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None or not parameter.requires_grad:
        return None
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    if optimizer._swappable_optimizer_subgroup(group) or flat.numel() < offset + count:
        raise _not_here(name)
    return _slice(name, "master", "parameter", parameter, flat.narrow(0, offset, count))


def _not_here(name: str) -> UnsupportedLayout:
    return UnsupportedLayout(
        "its master is not in memory (optimizer states are offloaded)",
        tensor=name,
        hint=_NO_MASTERS,
    )


def _whole_masters(optimizer: Any) -> dict[int, Any]:
    """Without ZeRO: the master of each parameter, by the id of the parameter."""
    held: dict[int, Any] = {}
    groups = getattr(optimizer, "fp16_groups", ())
    if hasattr(optimizer, "fp32_groups_flat"):
        for flat, parameters in zip(optimizer.fp32_groups_flat, groups, strict=True):
            end = 0
            for parameter in parameters:
                start, end = end, end + parameter.numel()
                held[id(parameter)] = flat.detach()[start:end].view(parameter.shape)
    elif hasattr(optimizer, "fp32_groups"):
        for masters, parameters in zip(optimizer.fp32_groups, groups, strict=True):
            held |= {id(p): m.detach() for p, m in zip(parameters, masters, strict=True)}
    return held
