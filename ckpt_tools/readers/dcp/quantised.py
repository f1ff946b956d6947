"""Owns torchao's quantised tensors in a Distributed Checkpoint: whole tensors of a known class.

The metadata states the dtype and the shape of the weight, as of any tensor. Only the chunk shows the class,
so a chunk is opened where it has fewer bytes than the elements of a plain tensor.
"""

from __future__ import annotations

import math
from pathlib import Path

from ckpt_tools.errors import CkptError
from ckpt_tools.readers.containers.quantised_classes import dequantised
from ckpt_tools.readers.containers.torch_file import TorchFile
from ckpt_tools.readers.dcp.metadata import SavedTensor
from ckpt_tools.tensors.dequantise import Dequantised


def quantised(saved: SavedTensor, directory: Path) -> Dequantised | None:
    """The weight that the only chunk of a tensor stands for; None if the chunk is no quantised tensor."""
    chunks = saved.chunks
    if len(chunks) != 1 or saved.dtype is None or chunks[0].sizes != saved.shape:
        return None
    extent = chunks[0].extent
    if extent.transforms or extent.length >= math.prod(saved.shape) * saved.dtype.itemsize:
        return None
    try:
        value = TorchFile(directory / extent.file, extent.start, extent.length).load()
    except CkptError:
        return None  # reading the chunk as a plain tensor tells what is wrong
    weight = dequantised(value)
    fitting = weight is not None and (weight.dtype, weight.shape) == (saved.dtype, saved.shape)
    return weight if fitting else None
