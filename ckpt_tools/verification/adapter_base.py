"""Owns the base model of an adapter: where it lies, and its tensors.

A base is at hand if ``--base`` names it, or if the adapter's config names a directory on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.weight_files import entry_in, read_weight_files
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.regular import content_of
from ckpt_tools.verification.directory import CONFIG

_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        path: its directory.
        shapes: shape of each tensor, by the names in its files.
        quantized: whether its tensors are stored in a quantized form.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    quantized: bool


def find_base(folder: Path, config: Mapping[str, Any], asked: str | Path | None) -> Path | None:
    """The directory of an adapter's base; None where it is not on this machine.

    Args:
        folder: where the adapter lies.
        config: the adapter's config.
        asked: ``--base``.
    """
    if asked is not None:
        places = [as_path(asked)]
    else:
        named = str(config.get("base_model_name_or_path"))
        places = [Path(named), folder / named]
    return next((place for place in places if (place / CONFIG).is_file()), None)


def read_base(path: Path) -> Base | None:
    """The names and shapes of a base; None where they cannot be read."""
    entry = entry_in(path, _FILES)
    if entry is None:
        return None
    try:
        tensors = read_weight_files(entry).tensors
        config = json.loads(content_of(path / CONFIG))
    except (CkptError, OSError, ValueError, RecursionError):
        return None
    quantized = isinstance(config, dict) and bool(config.get("quantization_config"))
    return Base(path, {name: tensor.shape for name, tensor in tensors.items()}, quantized)
