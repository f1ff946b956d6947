"""Masters of DeepSpeed without ZeRO (stage 0): all in the model file, and without names.

The fused optimizers keep one flat fp32 vector per parameter group, the unfused one a list of tensors per
group, both in the order of the optimizer's own groups, which is usually, but not necessarily, that of the
module. So an order is proposed, and accepted only where the masters, cast, begin and end as the module's
weights of that name do; the caller is told to compare the rest in full. Where no order fits, the
masters are left out, and said to be.

Source: ``deepspeed/runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.dtypes import DType
from ckpt_tools.gather import load
from ckpt_tools.lazy import cast
from ckpt_tools.readers.restricted_pickle import TensorRef
from ckpt_tools.readers.zero_shards import ShardSet

_SAMPLE = 64


@dataclass(frozen=True)
class _Run:
    """Masters that follow each other in one piece of the file; all of one group, or one tensor."""

    path: Path
    offset: int
    dtype: DType
    numel: int

    def part(self, start: int, stop: int) -> Stored:
        fragment = Fragment(
            self.path, self.offset + start * self.dtype.itemsize, FlatRange(0, stop - start)
        )
        return Stored(self.dtype, (stop - start,), [fragment] if stop > start else [])


def unpartitioned_masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """Masters of a stage 0 checkpoint by name, and why they must be compared with the module in full.

    Both are empty where the optimizer kept no masters (fp32 training), or none that can be named.
    """
    optimizer = shards.first.get("optimizer")
    if not isinstance(optimizer, dict):
        return {}, []
    runs = [
        _Run(Path(ref.storage.path), ref.byte_offset if ref.numel else 0, ref.dtype, ref.numel)
        for ref in _masters_in_order(optimizer)
    ]
    if not any(run.numel for run in runs):
        return {}, []
    buffers = set(shards.first.get("buffer_names") or ())
    aliases = set(shards.first.get("shared_params") or ())
    module = {
        name: ref
        for name, ref in shards.first.content["module"].items()
        if isinstance(ref, TensorRef) and name not in buffers | aliases and ref.dtype.is_floating
    }
    masters = _match(runs, module)
    if masters is None:
        return {}, []
    return masters, ["masters of stage 0 carry no names"]


def _masters_in_order(optimizer: dict[str, object]) -> list[TensorRef]:
    flat, nested = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    groups = flat if isinstance(flat, list) else nested if isinstance(nested, list) else []
    members = [m for group in groups for m in (group if isinstance(group, list) else [group])]
    return [member for member in members if isinstance(member, TensorRef)]


def _match(runs: Sequence[_Run], module: dict[str, TensorRef]) -> dict[str, Stored] | None:
    """Give each stretch of the runs the first name still free that it fits; None if one fits none."""
    free = dict(module)
    masters: dict[str, Stored] = {}
    for run in runs:
        position = 0
        while position < run.numel:
            name = next(_fitting(run, position, free), None)
            if name is None:
                return None
            ref = free.pop(name)
            part = run.part(position, position + ref.numel)
            masters[name] = Stored(part.dtype, ref.shape, part.fragments)
            position += ref.numel
    return masters


def _fitting(run: _Run, position: int, free: dict[str, TensorRef]) -> Iterator[str]:
    for name, ref in free.items():
        stop = position + ref.numel
        if ref.numel and stop <= run.numel and ref.is_contiguous:
            weight = _Run(Path(ref.storage.path), ref.byte_offset, ref.dtype, ref.numel)
            if all(
                _equal(run.part(position + low, position + high), weight.part(low, high))
                for low, high in _samples(ref.numel)
            ):
                yield name


def _samples(numel: int) -> Sequence[tuple[int, int]]:
    if numel <= 2 * _SAMPLE:
        return [(0, numel)]
    return [(0, _SAMPLE), (numel - _SAMPLE, numel)]


def _equal(master: Stored, weight: Stored) -> bool:
    ours, theirs = load(cast(master, weight.dtype)), load(weight)
    return bool((ours == theirs).all() or ours.equal(theirs))
