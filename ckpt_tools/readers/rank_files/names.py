"""Owns the names of the files of ranks: which files are one set, and the rank of each.

verl and Accelerate have names of their own. People's loops have any name that ends with the rank. Such a name
proves nothing, because a rank can also save a slice as a plain tensor, or state of another kind. So the first
file of such a set must hold a sharded tensor, which records the number of ranks and the place of the shard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.dtensor import part_of
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.rank_files.content import state_dict_in

# For each writer the names of its files; the group is the set that a file belongs to.
_NAMES = {
    "verl": re.compile(r"model_(world_size_\d+)_rank_\d+\.pt"),
    "accelerate": re.compile(r"(pytorch_model_fsdp(?:_\d+)?)_rank\d+\.bin"),
    "torch": re.compile(r"(model)_rank_?\d+\.pt"),
}
_ANY = re.compile(r"(.*[^_.-])[_.-]?rank[_-]?\d+\.(?:pt|pth|bin|ckpt)")
_NO_WEIGHTS = re.compile(r"optim|sched|extra_state|rng|random|loader|mp_rank|pp_rank|world_size")
RANK = re.compile(r"\d+(?=\.\w+$)")


def part_named(name: str) -> str | None:
    """The set that a file belongs to, or None if its name is another."""
    matches = (pattern.fullmatch(name) for pattern in _NAMES.values())
    found = next((match[1] for match in matches if match), None)
    if found is None and not _NO_WEIGHTS.search(name) and (match := _ANY.fullmatch(name)):
        return match[1]
    return found


def writer_of(name: str) -> str:
    """The framework whose names are such; torch for those of a loop."""
    writers = (writer for writer, pattern in _NAMES.items() if pattern.fullmatch(name))
    return next(writers, "torch")


def rank_in(name: str) -> int | None:
    """The rank that the name of a file states; None for files of no rank."""
    match = RANK.search(name)
    return int(match[0]) if match is not None and part_named(name) is not None else None


def sets_in(directory: Path) -> dict[str, dict[int, Path]]:
    """The files of each set, by rank."""
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        part = part_named(path.name)
        if part is not None and path.is_file():
            sets.setdefault(part, {})[int(RANK.findall(path.name)[0])] = path
    return {part: dict(sorted(files.items())) for part, files in sets.items()}


def is_proven(files: Mapping[int, Path]) -> bool:
    """Whether a set is one of a framework's names, or its first file records the placement of its tensors."""
    first = next(iter(files.values()))
    if any(pattern.fullmatch(first.name) for pattern in _NAMES.values()):
        return True
    try:
        content = TorchFile(first).load()
        held = state_dict_in(content, first) if isinstance(content, Mapping) else {}
        return any(
            (part := part_of(value, first, str(name))) is not None and part.world_size is not None
            for name, value in held.items()
            if not isinstance(value, TensorRef)
        )
    except CkptError:
        return False
