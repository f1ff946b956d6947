"""Opens whatever holds weights: a checkpoint of any format, an adapter's directory, a single file.

Owns what counts as weights beyond the checkpoints that :mod:`ckpt_tools.readers` finds, for the commands
that only read: a file of tensors is a model's state to whoever compares it. Names stay as they lie in the
files. It must not know what is done with the tensors.
"""

from __future__ import annotations

from pathlib import Path

from ckpt_tools import readers
from ckpt_tools.errors import NotACheckpoint
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, entry_in, read_weight_files
from ckpt_tools.tensors.checkpoint import ADAPTER, Checkpoint, Location, Weight

# `Location.format` of a file of weights.
FILE = "file"
_TORCH_FILES = (".bin", ".pt", ".pth")


def open_weights(path: Path, tag: str | None = None) -> Checkpoint:
    """Open a checkpoint, an adapter's directory or a file of weights; reads metadata only.

    Args:
        path: what people have at hand.
        tag: which of several checkpoints, by name.

    Raises:
        NotACheckpoint: nothing under the path holds weights.
        CkptError: see :mod:`ckpt_tools.errors`.
    """
    if path.is_file() and path.suffix == ".safetensors":
        # By itself, whatever lies beside it: this file was named.
        return _of_files(path, FILE, path.name, "safetensors file")
    try:
        return readers.read(readers.locate(path, tag))
    except NotACheckpoint:
        adapter = entry_in(path, ADAPTER_FILES)
        if adapter is not None:
            return _of_files(adapter, ADAPTER, path.name, "PEFT adapter")
        if path.is_file() and path.suffix in _TORCH_FILES:
            return _of_files(path, FILE, path.name, "torch file")
        raise


def _of_files(entry: Path, format: str, name: str, title: str) -> Checkpoint:
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
