"""A place that is not a directory: files in memory, read through nothing but what a place must offer.

It stands for another machine. Every read is short, as a read through a network may be.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ckpt_tools.storage.places import LOCAL, FileFacts

SHORT = 509


class Memory:
    """Files by their path in the tree.

    Args:
        files: what they hold.
        label: what the place is called.
        short: the most bytes of one read.
    """

    def __init__(
        self, files: Mapping[str, bytes], label: str = "machine node7", short: int = SHORT
    ) -> None:
        self.files = dict(files)
        self.label = label
        self.short = short
        self.requests = LOCAL
        self.opened: list[str] = []
        self.asked: list[tuple[int, int]] = []
        self.unclosed = 0
        self.lock = threading.Lock()

    @classmethod
    def of(
        cls, directory: Path, wanted: Callable[[str], bool] = bool, label: str = "machine node7"
    ) -> Memory:
        """The files of a directory that are wanted, by their path in it."""
        paths = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*"))}
        held = {name: p.read_bytes() for name, p in paths.items() if p.is_file() and wanted(name)}
        return cls(held, label)

    def listing(self) -> dict[str, FileFacts]:
        return {name: FileFacts(len(data), 10**18) for name, data in self.files.items()}

    def open(self, relative: str) -> MemoryFile:
        if relative not in self.files:
            raise FileNotFoundError(2, os.strerror(2), relative)
        with self.lock:
            self.opened.append(relative)
            self.unclosed += 1
        return MemoryFile(self, self.files[relative])


class MemoryFile:
    """One of them, open."""

    def __init__(self, place: Memory, data: bytes) -> None:
        self._place = place
        self._data = data
        self._is_open = True

    def read_into(self, view: memoryview, offset: int) -> int:
        assert self._is_open, "read after it was closed"
        with self._place.lock:
            self._place.asked.append((offset, len(view)))
        part = self._data[offset : offset + min(len(view), self._place.short)]
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with self._place.lock:
                self._place.unclosed -= 1
