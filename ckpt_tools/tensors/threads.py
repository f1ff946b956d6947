"""Owns the number of worker threads, and how they share the processor cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

MAX_WORKERS = 16


def default_workers() -> int:
    """One worker for each processor that this process may use, up to 16."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@contextmanager
def casting_on_one_core() -> Iterator[None]:
    """Let torch use one thread for each cast or sum, while several workers run.

    The workers already use all cores. A sum in several threads has no fixed order of additions.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
