"""Owns which files of a store are listed for an address: what it names, and the folders above.

Folders are listed in parallel, two levels deep; what is further below comes in pages. Of the folders above
only the files themselves are listed, because config and tokenizer of a run may lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt_tools.errors import StoreFailed
from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.failures import Patience
from ckpt_tools.storage.remote.stores import Store

T = TypeVar("T")

# As near as the readers look.
_LEVELS_ABOVE = 3
# In which verl writes config and tokenizer.
_BESIDE = "huggingface"
_AT_ONCE = 32


@dataclass
class Listed:
    """What lies at an address.

    Attributes:
        files: the facts of each file, by its path in the store.
        is_file: whether the address names a file.
    """

    files: dict[str, FileFacts] = field(default_factory=dict)
    is_file: bool = False


def list_at(store: Store, path: str, patience: Patience, address: Callable[[str], str]) -> Listed:
    """List what an address names, and the files of the folders above it.

    Args:
        store: the store.
        path: the path of the address in it.
        patience: repeats requests.
        address: gives the address of a path, for messages.

    Raises:
        StoreFailed: the store cannot be reached, or refuses.
    """

    def asked(request: Callable[[str], T], folder: str) -> T:
        return patience.call(lambda: request(folder), lambda: address(folder))

    def deep(folder: str) -> list[tuple[str, FileFacts]]:
        return asked(lambda at: list(store.below(at)), folder)

    def may_fail(folder: str) -> tuple[dict[str, FileFacts], list[str]]:
        try:
            return asked(store.folder, folder)
        except (StoreFailed, FileNotFoundError):
            return {}, []  # a folder that nobody named may be forbidden

    found = Listed()
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        above = [threads.submit(may_fail, folder) for folder in _above(path)]
        files, folders = asked(store.folder, path)
        if not files and not folders and path:
            facts = asked(store.facts, path)
            if facts is not None:
                found.is_file = True
                files = {path: facts}
        found.files |= files
        seconds = list(threads.map(lambda folder: asked(store.folder, folder), folders))
        for more, _ in seconds:
            found.files |= more
        further = [folder for _, inner in seconds for folder in inner]
        for entries in threads.map(deep, further):
            found.files |= dict(entries)
        beside = []
        for files, folders in map(Future.result, above):
            found.files = files | found.files
            beside += [f for f in folders if f.rpartition("/")[2] == _BESIDE and f != path]
        for files, _ in threads.map(may_fail, beside):
            found.files = files | found.files
    for marker in _markers(found.files):
        del found.files[marker]
    return found


def _above(path: str) -> list[str]:
    parts = path.split("/") if path else []
    return [
        "/".join(parts[: len(parts) - up]) for up in range(1, min(_LEVELS_ABOVE, len(parts)) + 1)
    ]


def _markers(files: Iterable[str]) -> list[str]:
    """The empty objects that stand for folders."""
    names = list(files)
    folders = set()
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in folders:
            folders.add(above)
            above = above.rpartition("/")[0]
    return [name for name in names if name in folders]
