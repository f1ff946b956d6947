"""Compares what must be equal in one checkpoint; a wrong reading shows here.

If a checkpoint holds both copies, the master of each parameter, cast to the training dtype, equals the 16-bit
weight bit for bit, because the engine makes the weight from the master after each step. What several
tensor-parallel ranks hold of the same elements is equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy, Replica, Weight
from ckpt_tools.tensors.derived import cast
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.threads import load_torch, pool
from ckpt_tools.tensors.windows import first_difference, sample_windows


def check_masters(
    checkpoint: Checkpoint,
    *,
    check_all_masters: bool,
    workers: int,
    progress: Callable[[], None] | None = None,
) -> int:
    """Compare a sample of each parameter, or all of it.

    Args:
        checkpoint: what to check.
        check_all_masters: compare all elements, not only some of each run. A checkpoint with doubts
            about its own layout is always compared in full.
        workers: number of threads.
        progress: called after each parameter, from any worker's thread.

    Returns:
        The number of parameters compared; 0 where the checkpoint holds one copy only.

    Raises:
        DamagedCheckpoint: one differs.
    """
    whole = check_all_masters or bool(checkpoint.doubts)
    pairs = list(_pairs(checkpoint))
    if not pairs:
        return 0

    def check(share: list[tuple[str, Weight]]) -> None:
        with Gatherer() as gatherer:
            for name, weight in share:
                assert weight.master is not None and weight.model is not None
                master = cast(weight.master, weight.model.dtype)
                windows = None if whole else sample_windows(master)
                at = first_difference(gatherer, master, weight.model, windows)
                if at is not None:
                    raise _differs(checkpoint, name, weight, at)
                if progress is not None:
                    progress()

    load_torch()
    with pool(workers) as threads:
        list(threads.map(check, [pairs[i::workers] for i in range(workers)]))
    return len(pairs)


def check_replicas(
    checkpoint: Checkpoint, *, copy: Copy, check_all_masters: bool, workers: int
) -> None:
    """Compare the copies that several ranks hold of the same elements.

    Args:
        checkpoint: what to check.
        copy: the copy that is written.
        check_all_masters: compare all elements, not only some of each run. A checkpoint with doubts
            about its own layout is always compared in full.
        workers: number of threads.

    Raises:
        UnsupportedLayout: two differ, so the checkpoint does not determine the weight.
    """
    whole = check_all_masters or bool(checkpoint.doubts)
    held = {name for name, weight in checkpoint.weights.items() if weight.master is not None}
    used = [
        pair
        for pair in checkpoint.replicas
        if pair.first.numel
        and pair.copy == ("model" if copy == "model" or pair.name not in held else "master")
    ]

    def check(share: list[Replica]) -> None:
        with Gatherer() as gatherer:
            for pair in share:
                windows = None if whole else sample_windows(pair.first)
                if first_difference(gatherer, pair.first, pair.other, windows) is not None:
                    raise _disagree(pair)

    if used:
        load_torch()
        with pool(workers) as threads:
            list(threads.map(check, [used[i::workers] for i in range(workers)]))


def _disagree(pair: Replica) -> UnsupportedLayout:
    other = next(move.file for move in pair.other.moves(0, pair.other.numel))
    advice = (
        "--weights model takes the 16-bit weights, which may agree. "
        if pair.copy == "master"
        else ""
    )
    return UnsupportedLayout(
        "tensor-parallel ranks hold different values of the same elements, so the run has no one weight here",
        path=other,
        tensor=pair.name,
        hint=f"{advice}To give all ranks one value, load the checkpoint in the training script, broadcast "
        "this parameter from the first tensor-parallel rank, and save again.",
    )


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[str, Weight]]:
    for name, weight in checkpoint.weights.items():
        if weight.master is not None and weight.model is not None and weight.master.numel:
            yield name, weight


def _differs(checkpoint: Checkpoint, name: str, weight: Weight, at: int) -> DamagedCheckpoint:
    assert weight.master is not None
    source = next(
        (move.file for move in weight.master.moves(at, at + 1)), checkpoint.location.directory
    )
    reason = f" ({checkpoint.doubts[0]})" if checkpoint.doubts else ""
    return DamagedCheckpoint(
        f"its master, cast to {weight.dtype}, is not its 16-bit weight (element {at:,}){reason}",
        path=source,
        tensor=name,
        hint="Files of two saves lie together, a file was damaged, or the layout was read wrongly. "
        "--weights model takes the 16-bit weights instead.",
    )
