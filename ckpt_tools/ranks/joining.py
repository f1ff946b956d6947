"""Owns how the ranks of a command find each other: through torchrun, or in a training that runs.

The ranks of a training are those of its default process group. They talk through the store that the group was
made with, over a connection of their own. So no wait here delays the training's collectives, and no
collective delays a wait here. Nothing is sent through the group itself, whatever its backend.

Source: ``torch/distributed/rendezvous.py`` (the store that torchrun's agents share).
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from ckpt_tools.errors import RankFailed
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.ranks.line import first_line
from ckpt_tools.ranks.session import START_SECONDS, Ranks
from ckpt_tools.tensors.threads import load_torch

# The last group that was asked for, with its ranks. The count of sessions goes on for as long as the group.
_known: list[tuple[object, Ranks]] = []


def from_environment(timeout: float) -> Ranks | None:
    """The ranks of the torchrun that started this process; None without torchrun, or with one rank only.

    Args:
        timeout: seconds that any wait may last without progress.

    Raises:
        RankFailed: the store of the launcher does not answer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or size < 2:
        return None
    load_torch()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank = int(os.environ["RANK"])
    try:
        found, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    except Exception as error:  # whatever the store's backend raises
        raise RankFailed(
            f"rank {rank} cannot reach the others ({first_line(error)})",
            hint="MASTER_ADDR and MASTER_PORT must be reachable from every machine.",
        ) from error
    # A launcher may restart its ranks with the same store.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"ckpt-tools/start-{start}", found)
    machine = os.environ.get("GROUP_RANK", socket.gethostname())
    return Ranks(store, rank, size, machine, timeout, Clock())


def from_process_group(timeout: float) -> Ranks | None:
    """The ranks of the default process group; None without a group, or with one rank only.

    Args:
        timeout: seconds that any wait may last without progress.

    Raises:
        RankFailed: the group has no store (MPI).
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
            f"the default process group ({dist.get_backend()}) has no store",
            hint="Make the process group with the gloo or nccl backend.",
        )
    if hasattr(store, "clone"):
        store = store.clone()
    machine = os.environ.get("GROUP_RANK", socket.gethostname())
    own = PrefixStore("ckpt-tools-training", store)
    return Ranks(own, dist.get_rank(), dist.get_world_size(), machine, timeout, Clock())
