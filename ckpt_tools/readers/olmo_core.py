"""Owns checkpoints of OLMo-core: ``stepN/model_and_optim/``, a torch Distributed Checkpoint with own names.

It adds to that format the places of the files, and the facts in ``train/rank0.pt`` and ``.metadata.json``.
:mod:`~ckpt_tools.readers.dcp.reader` locates the bytes; :mod:`~ckpt_tools.readers.olmo_core_names` has the
names of the tensors on the hub; :mod:`ckpt_tools.hub.olmo_core` translates the config.

Source: OLMo-core ``train/checkpoint.py``, read at commit fa6c5014 (3.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.readers import dcp
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.dcp.metadata import is_dcp_directory, read_metadata
from ckpt_tools.readers.olmo_core_names import hub_names
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location

NAME = "olmo-core"
_STATE = "model_and_optim"
_STEP = re.compile(r"step(\d+)(-.*)?")


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: ``stepN``, ``model_and_optim`` in it, a run's directory with one or more ``stepN``, or a
            directory that ``save_model_and_optim_state`` wrote.
        tag: the name of one of several ``stepN``.

    Raises:
        UsageError: ``tag`` does not exist.
    """
    if path.name == ".metadata":
        path = path.parent
    if is_dcp_directory(path):
        if not _is_ours(path):
            return []
        name = path.parent.name if path.name == _STATE else path.name
        return [_location(path, name)] if tag in (None, name) else []
    if not path.is_dir():
        return []
    if (path / _STATE).is_dir():
        return [_location(path / _STATE, path.name)] if tag in (None, path.name) else []
    steps = sorted(
        (int(match[1]), entry)
        for entry in path.iterdir()
        if (match := _STEP.fullmatch(entry.name)) and (entry / _STATE).is_dir()
    )
    if tag is None or not steps:
        return [_location(entry / _STATE, entry.name) for _, entry in steps]
    chosen = [entry for _, entry in steps if entry.name == tag]
    if not chosen:
        raise UsageError(
            f"there is no checkpoint with the tag {tag!r}",
            path=path,
            hint=f"Pass --tag with one of: {', '.join(entry.name for _, entry in steps)}.",
        )
    return [_location(chosen[0] / _STATE, tag)]


def _is_ours(directory: Path) -> bool:
    if directory.name == _STATE:
        return True
    try:
        return read_metadata(directory).writer == "olmo_core"
    except CkptError:
        return False


def _location(directory: Path, name: str) -> Location:
    near = (directory, directory.parent, directory.parent.parent)
    return Location(NAME, directory, name, near)


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: files are missing or too short, or boxes overlap or leave a hole.
    """
    checkpoint = dcp.read(location)
    run = location.directory.parent if location.directory.name == _STATE else location.directory
    experiment = _object(run / "config.json")
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    names, remark = hub_names(shapes, experiment)
    train = _train_state(run / "train" / "rank0.pt")
    version = _object(run / ".metadata.json").get("version")
    step = _STEP.fullmatch(run.name)
    return replace(
        checkpoint,
        title="OLMo-core",
        weights={names.get(name, name): weight for name, weight in checkpoint.weights.items()},
        step=_int(train.get("global_step")) or (int(step[1]) if step else checkpoint.step),
        world_size=_int(train.get("world_size")) or checkpoint.world_size,
        framework=f"ai2-olmo-core {version}" if version else "ai2-olmo-core",
        details={**checkpoint.details, "names": "Hugging Face" if names else "OLMo-core"},
        remarks=(*checkpoint.remarks, *([remark] if remark else [])),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file cannot be read, because its facts are not essential."""
    try:
        data = json.loads(content_of(path).decode())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _train_state(path: Path) -> Mapping[str, Any]:
    """The trainer's record of its progress; empty if it cannot be read."""
    try:
        state = TorchFile(path).load()
    except CkptError:
        return {}
    return state if isinstance(state, dict) else {}


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
