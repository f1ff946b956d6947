"""Owns FSDP1's LOCAL state: each rank's range of the flat parameter of every wrapped module.

With ``use_orig_params=True`` the file of a rank also has each parameter by its name, as the range of elements
that the rank holds: a view into the same storage, or a tensor without elements. The flat parameter records
where its shard begins, so the place of each range follows, with the alignment between parameters left out.
The shapes of the parameters are not recorded.

Source: ``torch/distributed/fsdp/_state_dict_utils.py`` (``_local_post_state_dict_hook``) and
``_flat_param.py`` (``_use_sharded_views``), read at torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.dtensor import Part, Run, part_of
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.tensors.catalogue import Box

KIND = "range of a flat parameter"
# FSDP1's names for the flat parameter of a wrapped module; the second name is older.
_FLAT = {"_flat_param", "flat_param"}

State = Mapping[str, Any]


def is_local(content: State) -> bool:
    """Whether a rank's state has flat parameters."""
    return any(_is_flat(name) for name in content)


def local_parts(states: Sequence[tuple[Path, State]]) -> list[dict[str, Part]]:
    """The parts of each rank, by name.

    Args:
        states: the file and the content of each rank.

    Raises:
        UnsupportedLayout: the parameters have no names.
        DamagedCheckpoint: a part is not one that FSDP1 writes.
    """
    shards = [_shards(path, content) for path, content in states]
    starts: dict[str, int] = {}
    stops: dict[str, int] = {}
    ranges: list[dict[str, tuple[int, TensorRef]]] = []
    for (path, content), held in zip(states, shards, strict=True):
        found: dict[str, tuple[int, TensorRef]] = {}
        for name, ref in content.items():
            if _is_flat(name) or not isinstance(ref, TensorRef) or id(ref.storage) not in held:
                continue
            start = held[id(ref.storage)] + ref.storage_offset
            if len(ref.shape) != 1 or not ref.is_contiguous:
                raise DamagedCheckpoint(
                    "it is not a range of its flat parameter", path=path, tensor=name
                )
            found[name] = (start, ref)
            starts[name] = min(starts.get(name, start), start)
            stops[name] = max(stops.get(name, 0), start + ref.numel)
        ranges.append(found)
    if not starts:
        raise _nameless(states[0])
    return [
        _parts(path, content, found, starts, stops)
        for (path, content), found in zip(states, ranges, strict=True)
    ]


def _is_flat(name: object) -> bool:
    return str(name).rpartition(".")[2] in _FLAT


def _shards(path: Path, content: State) -> dict[int, int]:
    """For the storage of each flat shard, the element of the flat parameter that its first element is."""
    held = {}
    for name, value in content.items():
        part = part_of(value, path, str(name)) if _is_flat(name) else None
        for run in () if part is None else part.runs:
            # One run: a rank's shard has one dimension.
            held[id(run.ref.storage)] = run.box.offsets[0] - run.ref.storage_offset
    return held


def _parts(
    path: Path,
    content: State,
    found: Mapping[str, tuple[int, TensorRef]],
    starts: Mapping[str, int],
    stops: Mapping[str, int],
) -> dict[str, Part]:
    sizes = [part_of(value, path, name) for name, value in content.items() if _is_flat(name)]
    rank = next((part.rank for part in sizes if part is not None), None)
    world_size = next((part.world_size for part in sizes if part is not None), None)
    parts: dict[str, Part] = {}
    for name, value in content.items():
        if _is_flat(name) or (name.endswith("_extra_state") and not isinstance(value, TensorRef)):
            continue
        if name not in starts:
            part = part_of(value, path, name)
            if part is None:
                raise DamagedCheckpoint("it is not a tensor", path=path, tensor=name)
            parts[name] = part
            continue
        if not isinstance(value, TensorRef) or (value.numel and name not in found):
            raise DamagedCheckpoint(
                "it is a range of a flat parameter in the file of another rank, and not here",
                path=path,
                tensor=name,
            )
        runs: tuple[Run, ...] = ()
        if name in found and value.numel:
            runs = (Run(Box((found[name][0] - starts[name],), value.shape), value),)
        shape = (stops[name] - starts[name],)
        parts[name] = Part(value.dtype, shape, runs, KIND, rank, world_size)
    return parts


def _nameless(state: tuple[Path, State]) -> UnsupportedLayout:
    path, content = state
    count = sum(map(_is_flat, content))
    return UnsupportedLayout(
        f"an FSDP1 LOCAL state with {count} flat parameters of wrapped modules, and without names of the "
        "parameters in them: the run had use_orig_params=False, or saved with offload_to_cpu=True",
        path=path,
        hint="A config does not state which modules were wrapped, so it is not enough. Load the state in "
        "the training script, and save it with SHARDED_STATE_DICT or FULL_STATE_DICT.",
    )
