"""Owns the search for DeepSpeed checkpoints, and the choice of the layout that reads one.

The layouts are ZeRO stages 0 to 3 and ``BF16_Optimizer``, each also with tensor parallelism, pipelines,
experts or as a universal checkpoint. Only metadata is read, without DeepSpeed and without code from the
files.
"""

from __future__ import annotations

import re
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError
from ckpt_tools.readers.deepspeed.experts import holds_experts, read_experts
from ckpt_tools.readers.deepspeed.names import (
    UNIVERSAL,
    is_save_file,
    is_shard_directory,
    is_universal,
    names_in,
)
from ckpt_tools.readers.deepspeed.pipeline import read_pipeline
from ckpt_tools.readers.deepspeed.saves import checkpoint, open_all, read_ranks
from ckpt_tools.readers.deepspeed.universal import read_universal
from ckpt_tools.storage.folders import by_number, entries_of
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location

NAME = "deepspeed"
# Files with the newest tag of a root; ds_to_universal.py writes the second.
_POINTERS = ("latest", "latest_universal")


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The checkpoints of this format to which ``path`` leads.

    Args:
        path: a directory with ``latest``, a tag's directory, a directory with one or more tags, or
            one of a checkpoint's files.
        tag: the name of one of several checkpoints.

    Returns:
        One location, several to choose from, or none if there is no checkpoint of this format.

    Raises:
        UsageError: ``tag`` does not exist.
        DamagedCheckpoint: the directory in ``latest`` is missing, outside, or not a checkpoint.
    """
    if path.is_file():
        if not (path.name in _POINTERS or is_save_file(path.name)):
            return []
        path = path.parent
    if path.name == UNIVERSAL and is_universal(path.parent):
        path = path.parent
    if _is_tag(path) or any(is_save_file(entry.name) for entry in entries_of(path)):
        if tag is not None and tag != path.name:
            raise UsageError(
                f"this directory holds the shards of {path.name!r}, not of {tag!r}",
                path=path,
                hint="Omit --tag, or pass the directory above.",
            )
        return [_location(path, path.parent)]
    tags = [entry for entry in entries_of(path) if entry.is_dir() and _is_tag(entry)]
    names = [entry.name for entry in tags]
    latest = next((path / name for name in _POINTERS if (path / name).is_file()), path / "latest")
    if tag is not None:
        if tag in names:
            return [_location(path / tag, path)]
        if not tags and not latest.is_file():
            return []
        raise UsageError(
            f"there is no checkpoint with the tag {tag!r}",
            path=path,
            hint=f"Pass --tag with one of: {', '.join(names)}."
            if names
            else f"{latest.name} is here, and no checkpoint is. It may have been moved or deleted.",
        )
    if latest.is_file():
        return [_follow_latest(path, latest, names)]
    return [_location(entry, path) for entry in tags]


def _is_tag(path: Path) -> bool:
    return is_shard_directory(path) or is_universal(path)


def _location(directory: Path, root: Path, remarks: tuple[str, ...] = ()) -> Location:
    near = (directory, root, root.parent)
    return Location(NAME, directory, directory.name, near, remarks)


def _follow_latest(root: Path, latest: Path, names: list[str]) -> Location:
    tag = content_of(latest).decode("utf-8", "replace").strip()
    hint = (
        f"Pass --tag with one of: {', '.join(names)}."
        if names
        else "There is no checkpoint beside it. The directory may have been moved or deleted."
    )
    if not tag or Path(tag).is_absolute() or ".." in Path(tag).parts:
        raise DamagedCheckpoint(
            f"its content is {tag!r}, which is not a directory beside it", path=latest, hint=hint
        )
    if not _is_directory(root / tag):
        raise DamagedCheckpoint(
            f"its content is {tag!r}, but this directory does not exist", path=latest, hint=hint
        )
    if not _is_tag(root / tag) and not any(is_save_file(e.name) for e in entries_of(root / tag)):
        raise DamagedCheckpoint(
            f"its content is {tag!r}, but this directory holds no DeepSpeed shards",
            path=latest,
            hint=hint,
        )
    others = [name for name in names if not is_universal(root / name)]
    # Several engines may save into one folder, each under tags of its own; `latest` names the last save.
    strangers = [name for name in others if _stem(name) != _stem(tag)]
    own = [name for name in others if name not in strangers]
    newer = [name for name in own if by_number(root / name) > by_number(root / tag)]
    remarks: tuple[str, ...] = ()
    if newer:
        remarks += (f"newer than the checkpoint in `latest`: {', '.join(newer)}",)
    if strangers:
        remarks += (f"`latest` names {tag}; --tag chooses others: {', '.join(strangers)}",)
    return _location(root / tag, root, remarks)


def _stem(tag: str) -> str:
    """A tag without its numbers: tags of one run differ in these alone."""
    return re.sub(r"\d+", "", tag)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long: `latest` may have any content
        return False


def read(location: Location) -> Checkpoint:
    """Read a checkpoint's metadata.

    Raises:
        DamagedCheckpoint: files are missing, truncated or of different saves.
        UnsupportedLayout: the layout is not supported.
    """
    if is_universal(location.directory):
        return checkpoint(location, *read_universal(location))
    names = names_in(location.directory)
    if names.layers and names.experts:
        raise UnsupportedLayout(
            "a DeepSpeed pipeline with native MoE layers, whose experts are in files without stages",
            path=location.directory,
            hint="Gather model.state_dict() in the training script, and save that with torch.save.",
        )
    if names.layers:
        return checkpoint(location, *read_pipeline(names, location))
    shards = open_all(names)
    if names.experts or holds_experts(shards[0]):
        return checkpoint(location, *read_experts(names, shards))
    return checkpoint(location, *read_ranks(shards, location))
