"""Owns the removal of a save whose output is proven: what may be removed, and what never is.

Removing a save loses its optimizer and everything else of training. So it is removed only if

- training would not resume from it: it is older than the newest finished save, ``latest`` and no link names
  it, and the Trainer does not call it the best one;
- it is a directory of its own, and every file in it is one that training frameworks write or that the output
  holds too;
- the output holds the whole model, and is equal to the save bit for bit, read back from the disk just before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ckpt_tools.conversion.api import open_checkpoint
from ckpt_tools.conversion.watching.saves import Look, Save
from ckpt_tools.errors import CkptError, listed
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.verification import verify

# Files of training that hold no weights of the model, by the frameworks that are read.
_OF_TRAINING = re.compile(
    r"(rng_state(_\d+)?\.pth|random_states_\d+\.pkl|scheduler(_\d+)?\.(pt|bin)|scaler\.pt"
    r"|sampler(_\d+)?\.bin|dl_state_dict(_\d+)?\.bin|optimizer(_\d+)?\.(pt|bin)"
    r"|optimizer_\d+/(\.metadata|__\d+_\d+\.distcp)|trainer_state\.json|training_args\.bin"
    r"|latest|zero_to_(fp32|torch)\.py|COMPLETED|train/rank\d+\.pt|\.metadata\.json|data_paths\.txt"
    r"|model(-\d+-of-\d+)?\.safetensors\.index\.json|pytorch_model\.bin\.index\.json)"
)
# What else than a model readers find in a save, by its key or kind; custom objects may be anything.
_OBJECTS = re.compile(
    r"(.*\.)?(optim|optimizer|progress|scheduler|lr_scheduler|dataloader|rng|random_states|scaler|sampler"
    r"|dl_state_dict)"
)


def protected(look: Look, finished: Sequence[Save]) -> dict[str, str]:
    """The saves that are never removed, each with the reason.

    Args:
        look: the run.
        finished: its finished saves, in their order.
    """
    kept: dict[str, str] = {}
    newest = finished[-1].order if finished else None
    for save in look.saves:
        if newest is None or save.order >= newest:
            kept[save.name] = "it is the newest"
        elif save not in finished:
            kept[save.name] = "it is not finished"
        elif save.name == look.latest:
            kept[save.name] = "latest names it"
        elif save.name in look.linked:
            kept[save.name] = "a link leads to it"
        elif any(save.name == other.best for other in look.saves):
            kept[save.name] = "the Trainer calls it the best one"
        elif save.number is None:
            kept[save.name] = "its name has no number that says which save is newer"
    return kept


def refusal(save: Save, output: Path) -> str | None:
    """Why a save must not be removed, or None: everything of it is known, and its weights are proven.

    Args:
        save: a save that is not protected.
        output: the directory that was made of it.
    """
    if save.path.is_symlink() or not save.path.is_dir():
        return "it is not a directory of its own"
    links = [str(path) for path in _everything(save.path) if path.is_symlink()]
    if links:
        return f"it holds links: {listed(links)}"
    if not output.is_dir():
        return f"its output {output} is not there to be compared with it"
    try:
        checkpoint = open_checkpoint(save.path)
        strange = _strange(save, checkpoint, output)
        if strange:
            return f"it holds what the output does not: {listed(strange)}"
        verdict = verify(output, against=checkpoint, read_data=True)
    except CkptError as error:
        return f"it cannot be compared with its output: {error.fact}"
    doubts = [p for p in verdict.problems if p.severity == "error" or p.kind.startswith("against")]
    if doubts:
        return f"its output is not proven: {doubts[0].kind}: {doubts[0].detail}"
    if not any("bit for bit" in line for line in verdict.checked):
        return "its output could not be compared with it bit for bit"
    return None


def _strange(save: Save, checkpoint: Checkpoint, output: Path) -> list[str]:
    """Files and objects of a save that are neither weights of the model, training's, nor in the output."""
    read = {os.path.realpath(path) for path in checkpoint.files}
    strange = []
    for path in _everything(save.path):
        name = path.relative_to(save.path).as_posix()
        if path.is_dir() or os.path.realpath(path) in read or _OF_TRAINING.fullmatch(name):
            continue
        twin = output / PurePosixPath(name).name
        if not twin.is_file():
            strange.append(name)
    left = checkpoint.details.get("left_alone")
    if isinstance(left, dict):
        strange += [name for name in left if not _OBJECTS.fullmatch(name)]
    return strange


def _everything(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))
