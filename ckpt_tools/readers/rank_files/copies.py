"""Owns the comparison of copies: whether two ranks hold the same bytes of a tensor.

A zip file has a checksum of each storage in its directory, so equal storages need no reading. Views into
storages that differ are read in small blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.torch_file import ZipStorage
from ckpt_tools.readers.rank_files.dtensor import Run
from ckpt_tools.storage.places import read_fully
from ckpt_tools.storage.pool import open_for_reading

_BLOCK = 1 << 20


def differ(one: Run, other: Run) -> bool:
    """Whether two runs with the same number of elements hold different bytes.

    Legacy files have no checksums; their copies are taken for equal.
    """
    storages = (one.ref.storage, other.ref.storage)
    records = [storage.record for storage in storages if isinstance(storage, ZipStorage)]
    if len(records) < 2:
        return False
    same_place = one.ref.storage_offset + one.start == other.ref.storage_offset + other.start
    if same_place and records[0].CRC == records[1].CRC:
        return False
    return any(a != b for a, b in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(run: Run) -> Iterator[bytes]:
    itemsize = run.ref.dtype.itemsize
    path = run.ref.storage.path
    at = run.ref.byte_offset + run.start * itemsize
    end = at + math.prod(run.box.sizes) * itemsize
    block = memoryview(bytearray(min(_BLOCK, end - at)))
    with closing(open_for_reading(path)) as file:
        while at < end:
            wanted = block[: end - at]
            count = read_fully(file, wanted, at)
            if count < len(wanted):
                raise DamagedCheckpoint(f"the file ends at byte {at + count:,}", path=path)
            at += count
            yield bytes(wanted)
