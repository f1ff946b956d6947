"""Masters of DeepSpeed without ZeRO (stage 0): all in the model file, and without names.

The fused optimizers keep one flat fp32 vector per parameter group, the unfused one a list of tensors per
group, both in the order of the optimizer's own groups, which is usually, but not necessarily, that of the
module. So an order is proposed from the values, and the caller is told to compare them in full. Where
none fits, the masters are left out, and said to be.

Source: ``deepspeed/runtime/fp16/fused_optimizer.py`` and ``unfused_optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import contiguous
from ckpt_tools.readers.deepspeed.flat import FlatVector, match_by_value, named_weights
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.tensors.catalogue import Stored


def unpartitioned_masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """Masters of a stage 0 checkpoint by name, and why they must be compared with the module in full.

    Both are empty where the optimizer kept no masters (fp32 training). Where there are some that cannot be
    named, only the reason is given.
    """
    optimizer = shards.first.get("optimizer")
    if not isinstance(optimizer, dict):
        return {}, []
    refs = [contiguous(ref, "a master") for ref in _masters_in_order(optimizer)]
    vectors = [FlatVector([ref], [ref.numel]) for ref in refs if ref.numel]
    if not vectors:
        return {}, []
    masters = match_by_value(vectors, named_weights(shards.first.content))
    if masters is None:
        return {}, [
            "the fp32 masters fit no order of the module's names; its 16-bit weights are read"
        ]
    return masters, ["masters of stage 0 carry no names"]


def _masters_in_order(optimizer: dict[str, object]) -> list[TensorRef]:
    flat, nested = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    groups = flat if isinstance(flat, list) else nested if isinstance(nested, list) else []
    members = [m for group in groups for m in (group if isinstance(group, list) else [group])]
    return [member for member in members if isinstance(member, TensorRef)]
