"""The memory of this process as a place with files: live tensors, read by byte ranges.

Reading copies ranges of the tensors from any device into the caller's buffer; it takes no other memory. A
file is a row of tensors at fixed offsets, each aligned to its element size. Bytes between tensors are
zero.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckpt_tools.storage.places import LOCAL, FileFacts, Readable
from ckpt_tools.tensors.regions import window_slabs

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16


class Row:
    """Tensors one after another, as a file.

    Attributes:
        size: bytes.
    """

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._tensors: list[torch.Tensor] = []
        self.size = 0

    def reserve(self, nbytes: int) -> int:
        """Reserve ``nbytes`` at the end of the file, and return their first byte."""
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = offset + nbytes
        return offset

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        """Put the bytes of the tensor at ``offset``, in row-major order. Offsets must rise."""
        self._offsets.append(offset)
        self._tensors.append(tensor)

    def read_into(self, view: memoryview, offset: int) -> int:
        """See :meth:`ckpt_tools.storage.places.Readable.read_into`."""
        count = min(len(view), max(self.size - offset, 0))
        view = view[:count]
        at = max(bisect_right(self._offsets, offset) - 1, 0)
        done = 0
        for start, tensor in zip(self._offsets[at:], self._tensors[at:], strict=True):
            end = start + tensor.numel() * tensor.element_size()
            if start >= offset + count:
                break
            low, high = max(start, offset), min(end, offset + count)
            if low < high:
                _blank(view[done : low - offset])
                copy_bytes(tensor, low - start, view[low - offset : high - offset])
                done = high - offset
        _blank(view[done:])
        return count

    def close(self) -> None:
        """Nothing is held open."""


class Memory:
    """A place whose files are rows of live tensors. It keeps them alive until it is closed.

    Attributes:
        label: its name in messages.
    """

    requests = LOCAL

    def __init__(self, label: str, rows: Mapping[str, Row]) -> None:
        self.label = label
        self._rows = dict(rows)

    def listing(self) -> Mapping[str, FileFacts]:
        """See :meth:`ckpt_tools.storage.places.Place.listing`."""
        return {name: FileFacts(row.size, 0) for name, row in self._rows.items()}

    def open(self, relative: str) -> Readable:
        """See :meth:`ckpt_tools.storage.places.Place.open`."""
        try:
            return self._rows[relative]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), relative) from None

    def close(self) -> None:
        """Let go of the tensors."""
        self._rows.clear()


def synchronize(tensors: Sequence[torch.Tensor]) -> None:
    """Wait until the devices that hold the tensors have finished their work."""
    import torch

    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        # torch.accelerator is new in torch 2.6.
        (getattr(torch, "accelerator", None) or getattr(torch, device.type)).synchronize(device)


def copy_bytes(tensor: torch.Tensor, start: int, into: memoryview) -> None:
    """Fill ``into`` with the bytes of a tensor, from byte ``start`` of its row-major order."""
    import torch

    target = torch.frombuffer(into, dtype=torch.uint8)
    with torch.no_grad():
        if tensor.is_contiguous():
            flat = tensor.detach().view(-1).view(torch.uint8)
            target.copy_(flat[start : start + len(into)])
            return
        itemsize = tensor.element_size()
        first, last = start // itemsize, -(-(start + len(into)) // itemsize)
        elements = torch.empty(last - first, dtype=tensor.dtype)
        done = 0
        for slab in window_slabs(tuple(tensor.shape), first, last):
            part = tensor.detach()
            for axis, (low, size) in enumerate(zip(slab.offsets, slab.sizes, strict=True)):
                part = part.narrow(axis, low, size)
            elements[done : done + slab.numel].view(slab.sizes).copy_(part)
            done += slab.numel
        skipped = start - first * itemsize
        target.copy_(elements.view(torch.uint8)[skipped : skipped + len(into)])


def _blank(view: memoryview) -> None:
    view[:] = bytes(len(view))
