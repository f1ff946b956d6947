"""Owns the opening of anything with weights: a checkpoint of any format, an adapter's directory, one file.

Commands that only read accept adapters and files beside the checkpoints of :mod:`ckpt_tools.readers`.
Tensors keep their names.
"""

from __future__ import annotations

from pathlib import Path

from ckpt_tools import readers
from ckpt_tools.errors import NotACheckpoint
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, entry_in, read_weight_files
from ckpt_tools.readers.net import unexpected_is_damage
from ckpt_tools.tensors.checkpoint import ADAPTER, Checkpoint, Location, Weight

# `Location.format` of a file of weights.
FILE = "file"


def open_weights(path: Path, tag: str | None = None) -> Checkpoint:
    """Open a checkpoint, an adapter's directory or a file of weights; only metadata is read.

    Args:
        path: the checkpoint, directory or file.
        tag: the name of one of several checkpoints.

    Raises:
        NotACheckpoint: there are no weights under the path.
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    if path.is_file() and path.suffix == ".safetensors":
        # The user named this file, so files beside it are not read.
        return _of_files(path, FILE, path.name, "safetensors file")
    try:
        return readers.read(readers.locate(path, tag))
    except NotACheckpoint:
        adapter = entry_in(path, ADAPTER_FILES)
        if adapter is not None:
            return _of_files(adapter, ADAPTER, path.name, "PEFT adapter")
        raise


def _of_files(entry: Path, format: str, name: str, title: str) -> Checkpoint:
    with unexpected_is_damage(entry, title):
        held = read_weight_files(entry)
        return Checkpoint(
            location=Location(format, entry.parent, name, (entry.parent,)),
            title=title,
            weights={
                key: Weight("parameter", tensor.shape, tensor.dtype, model=tensor)
                for key, tensor in held.tensors.items()
            },
            ties=held.ties,
            files=held.files,
        )
