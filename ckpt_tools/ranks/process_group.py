"""The ranks of a training that runs: those of its default process group.

Owns how they find each other: through the store that the group was made with, over a connection of their own,
so that no wait here holds up the training's collectives and none of those holds up a wait here. Nothing is
sent through the group itself, whatever its backend. Knows nothing of what is trained.
"""

from __future__ import annotations

import os
import socket

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.ranks.session import Ranks

# The ranks of the last group that was asked for, and that group: sessions are counted through its life.
_known: list[tuple[object, Ranks]] = []


def from_process_group(timeout: float) -> Ranks | None:
    """The ranks of the default process group; None where there is none, or only one rank.

    Args:
        timeout: seconds that any wait may last without progress.

    Raises:
        RankFailed: the group was made without a store (MPI).
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    group = dist.group.WORLD
    for known, ranks in _known:
        if known is group:
            ranks.timeout = timeout
            return ranks
    ranks = _ranks(timeout)
    _known[:] = [(group, ranks)]
    return ranks


def _ranks(timeout: float) -> Ranks:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store = _get_default_store()
    if store is None:
        raise RankFailed(
            f"the default process group ({dist.get_backend()}) has no store to talk through",
            hint="Make it with the gloo or nccl backend.",
        )
    if hasattr(store, "clone"):
        store = store.clone()
    machine = os.environ.get("GROUP_RANK", socket.gethostname())
    own = PrefixStore("ckpt-tools-training", store)
    return Ranks(own, dist.get_rank(), dist.get_world_size(), machine, timeout, Clock())
