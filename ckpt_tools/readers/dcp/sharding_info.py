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
    """The first index of each tensor of a shard in the whole tensor; None if torch recorded none.

    Raises:
        DamagedCheckpoint: the record is malformed, or has other tensors than the file.
    """
    text = file.metadata.get("DCP_SHARDING_INFO")
    if text is None:
        return None
    try:
        recorded = json.loads(text)
        # The record has the order of the state dict; the file has the order of the bytes.
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in recorded.items()}
        if offsets.keys() != file.tensors.keys():
            raise ValueError(f"it has {len(offsets)} tensors, the file has {len(file.tensors)}")
        if not all(isinstance(n, int) and n >= 0 for at in offsets.values() for n in at):
            raise ValueError("an offset is not an index")
        odd = [n for n, at in offsets.items() if len(at) != len(file.tensors[n].shape)]
        if odd:
            raise ValueError(f"the offset of {odd[0]} has another number of axes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"its DCP_SHARDING_INFO is malformed ({error})",
            path=file.path,
            hint="The file was not written by torch, or it was edited.",
        ) from error
    return offsets


def held_whole(tensor: Stored, path: Path, region: Region) -> Fragment:
    """The fragment that holds a whole tensor of a safetensors file."""
    return Fragment(path, tensor.fragments[0].offset, region)
