"""Owns the rules that say whether a save is finished, from names, sizes and times alone.

The rules of the writers, and what each proves:

- DCP renames ``.metadata`` into place when all ranks have reported their files, also in an asynchronous save
  (``torch/distributed/checkpoint/filesystem.py``, ``finish``).
- The Trainer writes ``trainer_state.json`` after weights and optimizer, which all ranks have saved then
  (``transformers/trainer.py``, ``_save_checkpoint``).
- DeepSpeed's rank 0 writes ``latest`` after its own files; other ranks may still write theirs. All ranks meet
  before the next save begins, so a ``latest`` that names a later save proves the earlier ones
  (``deepspeed/runtime/engine.py``, ``save_checkpoint``).
- Every process of open-instruct writes ``COMPLETED`` when its own files are written.
- Accelerate and plain saves have no last file.

Where nothing is proven, a save counts as finished once all its files stand still. A file that comes last and
is older than files before it belongs to an earlier save of the same name: that save is being written again.
Times of files are compared with each other only, never with a clock. In each case the readers have the last
word: they refuse a save in which a file is missing or ends early.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ckpt_tools.conversion.watching.saves import (
    COMPLETED,
    LATEST,
    TRAINER_STATE,
    Look,
    Save,
    Stamp,
    number_in,
)

# The clocks of machines that share a disk differ by less.
SKEW_NS = 5 * 10**9
_METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)_?\.metadata")
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")
_ZERO_FILE = re.compile(r".*_(model|optim)_states\.pt")


class State(enum.Enum):
    """How far a save is."""

    FINISHED = "finished"
    SETTLING = "finished if its files stand still"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Judgement:
    """How far a save is, and why."""

    state: State
    why: str


def judge(save: Save, look: Look) -> Judgement:
    """How far a save is, by the rules of the program that writes it.

    Args:
        save: the save.
        look: the run that it is part of.
    """
    found = [
        *_by_dcp(save),
        *_by_deepspeed(save, look),
        *_by_trainer(save),
        *_by_completed(save, look),
    ]
    for state in (State.UNFINISHED, State.SETTLING, State.FINISHED):
        for one in found:
            if one.state is state:
                return one
    return Judgement(State.SETTLING, "no file says that it is finished")


def _by_dcp(save: Save) -> Iterator[Judgement]:
    """``.metadata`` in each directory with ``.distcp`` files."""
    folders: dict[str, list[str]] = {}
    for name in save.files:
        if name.endswith(".distcp"):
            folders.setdefault(_folder(name), []).append(name)
    for folder, shards in folders.items():
        place = f"{folder}/" if folder else ""
        inside = [name for name in save.files if _folder(name) == folder]
        if any(name.endswith(f"{_METADATA}.tmp") for name in inside):
            yield Judgement(State.UNFINISHED, f"{place}{_METADATA} is being written")
        elif f"{place}{_METADATA}" in save.files:
            yield from _by_last_file(save, f"{place}{_METADATA}", shards)
            if _is_of_accelerate(folder) and not save.has_state:
                yield Judgement(State.SETTLING, "Accelerate writes further files after the weights")
        else:
            wrote = {m[1] for name in shards if (m := _RANK_FILE.fullmatch(_last(name)))}
            ended = {m[1] for name in inside if (m := _RANK_METADATA.fullmatch(_last(name)))}
            if not ended or wrote - ended:
                yield Judgement(State.UNFINISHED, f"{place}{_METADATA} comes last and is not there")
            else:
                yield Judgement(State.SETTLING, "each rank has written its own metadata")


def _is_of_accelerate(folder: str) -> bool:
    return re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", folder) is not None


def _by_deepspeed(save: Save, look: Look) -> Iterator[Judgement]:
    """``latest``, beside the directory of the shards."""
    shards = [name for name in save.files if _ZERO_FILE.fullmatch(name)]
    if not shards:
        return
    folders = {_folder(name) for name in shards}
    if folders == {""}:
        yield _by_pointer(save.name, look.latest)
    elif save.latest is not None and not any(f.split("/")[0] == save.latest for f in folders):
        yield Judgement(State.UNFINISHED, f"its {LATEST} names {save.latest}")
    elif not save.has_state:
        yield Judgement(State.SETTLING, f"{LATEST} says that rank 0 has written its files")
    elif LATEST in save.files and _is_newer(save.files[LATEST], save.files[TRAINER_STATE]):
        # An engine that saves in the background writes it at a later step.
        yield Judgement(State.SETTLING, f"{LATEST} was written after {TRAINER_STATE}")


def _by_pointer(name: str, latest: str | None) -> Judgement:
    if latest is None:
        return Judgement(State.SETTLING, f"there is no {LATEST}")
    if latest == name:
        return Judgement(State.SETTLING, f"{LATEST} says that rank 0 has written its files")
    own, named = number_in(name), number_in(latest)
    if own is None or named is None:
        return Judgement(State.SETTLING, f"{LATEST} names {latest}")
    if own < named:
        return Judgement(State.FINISHED, f"{LATEST} names the later {latest}")
    return Judgement(State.UNFINISHED, f"{LATEST} still names {latest}")


def _by_trainer(save: Save) -> Iterator[Judgement]:
    """``trainer_state.json``."""
    if TRAINER_STATE not in save.files and "training_args.bin" not in save.files:
        return
    if not save.has_state:
        yield Judgement(State.UNFINISHED, f"{TRAINER_STATE} comes last and is not whole")
    elif LATEST in save.files and _is_newer(save.files[LATEST], save.files[TRAINER_STATE]):
        return
    else:
        yield from _by_last_file(save, TRAINER_STATE, save.weights)


def _by_completed(save: Save, look: Look) -> Iterator[Judgement]:
    """``COMPLETED``, where the run writes it."""
    if COMPLETED in save.files:
        yield Judgement(State.SETTLING, f"another rank may write after {COMPLETED}")
    elif any(COMPLETED in other.files for other in look.saves):
        yield Judgement(State.UNFINISHED, f"{COMPLETED} is not there")


def _by_last_file(save: Save, last: str, before: Iterable[str]) -> Iterator[Judgement]:
    """Compare the times of the file that comes last and of those before it."""
    written = save.files[last].mtime_ns
    newest = max(before, key=lambda name: save.files[name].mtime_ns, default=last)
    late = save.files[newest].mtime_ns - written
    if late <= 0:
        yield Judgement(State.FINISHED, f"{last} is there")
    elif late <= SKEW_NS:
        yield Judgement(State.SETTLING, f"{newest} is a little newer than {last}")
    else:
        yield Judgement(
            State.UNFINISHED,
            f"{newest} is newer than {last}, which comes last: it is being saved again. If it was copied "
            f"without its times, touch {last}",
        )


def _is_newer(one: Stamp, other: Stamp) -> bool:
    return one.mtime_ns > other.mtime_ns


def _folder(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent


def _last(name: str) -> str:
    return PurePosixPath(name).name


class Stillness:
    """Since when the files of each save are as they are now, on a clock that never jumps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since: dict[str, tuple[object, float]] = {}

    def see(self, saves: Iterable[Save], now: float) -> None:
        """Note what lies there at the time ``now``."""
        seen: dict[str, tuple[object, float]] = {}
        for save in saves:
            files = tuple(sorted(save.files.items()))
            before, since = self._since.get(save.name, (None, now))
            seen[save.name] = (files, since if before == files else now)
        self._since = seen

    def stands(self, save: Save, now: float) -> bool:
        """Whether the files of a save have not changed for long enough."""
        return now - self._since[save.name][1] >= self.seconds
