"""Owns what torch records in the header of a safetensors file about the boxes in it.

The record is one ``saved_offsets`` a tensor. It says where a box begins, and not how large the whole is. Both
storages of torch Distributed Checkpoint write it.

Source: ``torch/distributed/checkpoint/filesystem.py`` (``_write_files_from_queue``) and ``_hf_utils.py``,
read at torch 2.13.
"""

from __future__ import annotations

import json
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.safetensors_file import SafetensorsFile
from ckpt_tools.tensors.catalogue import Fragment, Shape, Stored
from ckpt_tools.tensors.fragments import Region


def sharding_info(file: SafetensorsFile) -> dict[str, Shape] | None:
    """First index of each tensor of a shard in the whole tensor; None where torch recorded nothing.

    Raises:
        DamagedCheckpoint: the record is malformed, or not of the tensors in the file.
    """
    text = file.metadata.get("DCP_SHARDING_INFO")
    if text is None:
        return None
    try:
        recorded = json.loads(text)
        # In this order the state dict named them; those of the file are in the order of their bytes.
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in recorded.items()}
        if offsets.keys() != file.tensors.keys():
            raise ValueError(f"it is of {len(offsets)} tensors, the file holds {len(file.tensors)}")
        if not all(isinstance(n, int) and n >= 0 for at in offsets.values() for n in at):
            raise ValueError("an offset that is no index")
        odd = [n for n, at in offsets.items() if len(at) != len(file.tensors[n].shape)]
        if odd:
            raise ValueError(f"an offset of another rank for {odd[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"its DCP_SHARDING_INFO is malformed ({error})",
            path=file.path,
            hint="It was not written by torch, or was edited.",
        ) from error
    return offsets


def held_whole(tensor: Stored, path: Path, region: Region) -> Fragment:
    """The fragment that is all of a tensor of a safetensors file."""
    return Fragment(path, tensor.fragments[0].offset, region)
