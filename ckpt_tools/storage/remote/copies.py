"""Owns copies of small files of a store on this machine, for libraries that read nothing but local files.

They lie in one temporary folder, which is removed when the process ends.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath

from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.ranges import Ranges
from ckpt_tools.storage.temporary import TemporaryFolder

# A tokenizer has tens of megabytes.
_LARGEST = 256 << 20
# Weights and states of training are never copied with a folder.
_NOT_SMALL = {
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".distcp",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
    ),
}
_AT_ONCE = 16


@cache
def _folder() -> TemporaryFolder:
    return TemporaryFolder()


class Copies:
    """The copies of one tree of a store.

    Args:
        ranges: reads the files.
        files: the facts of every file of the tree.
        name: the name of the tree, which is no other tree's.
    """

    def __init__(self, ranges: Ranges, files: Mapping[str, FileFacts], name: str) -> None:
        self._ranges, self._files, self._name = ranges, files, name
        self._lock = threading.Lock()

    def path(self, relative: str) -> Path:
        """A copy of a file, or of the small files in a folder and below it.

        Raises:
            OSError: the file is too large.
        """
        home = _folder().path / self._name
        wanted = [relative] if relative in self._files else self._small(relative)
        with self._lock:
            if relative not in self._files:
                (home / relative).mkdir(parents=True, exist_ok=True)
            missing = [name for name in wanted if not (home / name).exists()]
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                list(threads.map(lambda name: self._copy(name, home / name), missing))
        return home / relative

    def _small(self, folder: str) -> list[str]:
        above = f"{folder}/" if folder else ""
        return [
            name
            for name, facts in self._files.items()
            if name.startswith(above)
            and PurePosixPath(name).suffix not in _NOT_SMALL
            and facts.size <= _LARGEST
        ]

    def _copy(self, name: str, to: Path) -> None:
        facts = self._files[name]
        if facts.size > _LARGEST:
            raise OSError(errno.EFBIG, "it lies in a store and is too large to be copied", name)
        data = bytearray(facts.size)
        if data:
            self._ranges.read(name, memoryview(data), 0, facts)
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.partial")
        partial.write_bytes(data)
        partial.rename(to)
