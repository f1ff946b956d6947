"""Owns the comparison of copies: whether two ranks hold the same bytes of a tensor.

A zip file has a checksum of each storage in its directory, so equal storages need no reading. Views into
storages that differ are read window by window.
"""

from __future__ import annotations

from ckpt_tools.readers.containers.dtensor import Run
from ckpt_tools.readers.containers.torch_file import ZipStorage
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Stored
from ckpt_tools.tensors.gather import Gatherer
from ckpt_tools.tensors.windows import first_difference


def differ(one: Run, other: Run) -> bool:
    """Whether two runs with the same number of elements hold different bytes.

    Legacy files have no checksums; their copies are taken for equal.
    """
    storages = (one.ref.storage, other.ref.storage)
    records = [storage.record for storage in storages if isinstance(storage, ZipStorage)]
    if len(records) < 2:
        return False
    same_place = (one.ref.storage_offset, one.ref.stride, one.start) == (
        other.ref.storage_offset,
        other.ref.stride,
        other.start,
    )
    if same_place and records[0].CRC == records[1].CRC:
        return False
    with Gatherer() as gatherer:
        return first_difference(gatherer, _tensor(one), _tensor(other)) is not None


def _tensor(run: Run) -> Stored:
    file, offset, layout = run.place
    region = FlatRange(0, run.box.numel)
    return Stored(run.ref.dtype, run.box.sizes, [Fragment(file, offset, region, layout)])
