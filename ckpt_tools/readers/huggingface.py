"""Owns Hugging Face model directories as input, with the files that the Transformers Trainer adds.

:mod:`~ckpt_tools.readers.containers.weight_files` reads the content of the files.

Source: ``transformers/utils/__init__.py`` (``SAFE_WEIGHTS_NAME`` and its neighbours).
"""

from __future__ import annotations

import json
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.weight_files import entry_in, entry_names, read_weight_files
from ckpt_tools.readers.trainer_state import trainer_step, trainer_world_size
from ckpt_tools.storage.regular import content_of
from ckpt_tools.tensors.checkpoint import Checkpoint, Location, Weight

NAME = "huggingface"
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def find(path: Path, tag: str | None = None) -> list[Location]:
    """The model directory at ``path``, if it is one. The format has no tags."""
    if path.is_file() and path.name in entry_names(_SINGLE):
        path = path.parent
    elif any(path.glob("sharded/shard-*-model-*.safetensors")):
        # torch consolidated these shards, which turns 0-d values into zeros. The shards have a reader.
        return []
    if tag is not None or entry_in(path, _SINGLE) is None:
        return []
    return [Location(NAME, path, path.name, (path, path.parent))]


def read(location: Location) -> Checkpoint:
    """Read a directory's headers.

    Raises:
        DamagedCheckpoint: a shard is missing or truncated, or index and shards disagree.
    """
    entry = entry_in(location.directory, _SINGLE)
    if entry is None:
        raise DamagedCheckpoint("the files of its weights no longer exist", path=location.directory)
    held = read_weight_files(entry)
    weights = {
        key: Weight("parameter", tensor.shape, tensor.dtype, model=tensor)
        for key, tensor in held.tensors.items()
    }
    kind = "safetensors" if next(iter(held.files)).suffix == ".safetensors" else "torch"
    return Checkpoint(
        location=location,
        title=f"Hugging Face {kind}",
        weights=weights,
        ties=held.ties,
        files=held.files,
        step=trainer_step(location.directory),
        world_size=trainer_world_size(location.directory),
        framework=_framework(location.directory),
        details={"shards": len(held.files)},
        remarks=(*location.remarks, *held.remarks),
        unlisted=held.unlisted,
    )


def _framework(directory: Path) -> str | None:
    """The version of transformers that wrote the config beside the weights, for the report."""
    try:
        version = json.loads(content_of(directory / "config.json").decode())["transformers_version"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return f"transformers {version}" if isinstance(version, str) else None
