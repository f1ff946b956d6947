"""Owns the upload of a finished directory to a bucket, so that no reader sees a half that loads.

Weights go first, then the other files; what makes a directory loadable, its index and config, goes last. Each
file appears whole or not at all. A record beside the directory says what was uploaded, so that an upload that
was interrupted continues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt_tools.errors import OutputExists, OutputFailed
from ckpt_tools.storage.addresses import Address
from ckpt_tools.storage.remote.failures import Patience
from ckpt_tools.storage.remote.stores import Bucket, Sent
from ckpt_tools.storage.wire import carry

# Parts of a large file: S3 accepts 10,000 of them.
_PART_BYTES = 16 << 20
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 8
_WEIGHTS = (".safetensors", ".bin")
_LAST = ("config.json", "adapter_config.json")
_INDEX = ".index.json"


def upload_order(names: list[str]) -> list[str]:
    """The files of a directory in the order in which they are uploaded."""

    def key(name: str) -> tuple[int, str]:
        base = PurePosixPath(name).name
        if base.endswith(_WEIGHTS):
            return 0, name
        return (3 if base in _LAST else 2 if base.endswith(_INDEX) else 1), name

    return sorted(names, key=key)


class BucketOutput:
    """A folder of a bucket that a directory is uploaded to.

    Args:
        address: the folder.
        patience: repeats requests.
    """

    def __init__(self, address: Address, patience: Patience) -> None:
        self.address = address
        self._bucket = Bucket(address)
        self._patience = patience

    def held(self) -> list[str]:
        """The files in the folder, by their paths in it."""
        above = f"{self.address.path}/" if self.address.path else ""
        found = self._patience.call(
            lambda: [name for name, _ in self._bucket.below(self.address.path)],
            lambda: str(self.address),
        )
        return sorted(name[len(above) :] for name in found if name.startswith(above))

    def refuse_existing(self, uploaded: Mapping[str, Any]) -> None:
        """Refuse a folder that holds files; those of an upload that is continued do not count.

        Raises:
            OutputExists: there are such files.
        """
        if set(self.held()) - set(uploaded):
            raise OutputExists(
                "the output exists already",
                path=str(self.address),
                hint="Name another output, or pass --overwrite. The index and config of the old output are "
                "removed first.",
            )

    def upload(self, directory: Path, record: Path, sent: Sent) -> None:
        """Upload every file of a directory, and remove what else is in the folder.

        Args:
            directory: the finished directory.
            record: the file that says what was uploaded; it may be of an interrupted upload.
            sent: called with the number of bytes of the directory that have arrived until now. It falls
                where a file is sent again.

        Raises:
            OutputFailed: a file of the store is not what was sent.
            StoreFailed: the store refuses, or cannot be reached.
        """
        paths = {
            p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()
        }
        uploaded = read_record(record)
        kept = {name for name in uploaded if name in paths and self._is_there(name, uploaded[name])}
        for name in reversed(upload_order([name for name in self.held() if name not in kept])):
            self._remove(name)
        done = sum(paths[name].stat().st_size for name in kept)
        for name in upload_order([name for name in paths if name not in kept]):
            uploaded[name] = self._put(name, paths[name], done, sent)
            record.write_text(json.dumps(uploaded), encoding="utf-8")
            done += paths[name].stat().st_size

    def _at(self, name: str) -> Address:
        path = f"{self.address.path}/{name}" if self.address.path else name
        return replace(self.address, path=path)

    def _put(self, name: str, path: Path, before: int, sent: Sent) -> list[Any]:
        at, size = self._at(name), path.stat().st_size
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))

        def put() -> None:
            self._bucket.put(at.path, path, part, _PARTS_AT_ONCE, lambda n: sent(before + n))

        self._patience.call(put, lambda: str(at))
        carry(size)
        facts = self._patience.call(lambda: self._bucket.facts(at.path), lambda: str(at))
        if facts is None or facts.size != size:
            found = "none" if facts is None else f"{facts.size:,}"
            raise OutputFailed(
                f"{size:,} bytes were sent, and the store holds {found}", path=str(at)
            )
        return [facts.size, facts.version]

    def _is_there(self, name: str, noted: list[Any]) -> bool:
        at = self._at(name)
        facts = self._patience.call(lambda: self._bucket.facts(at.path), lambda: str(at))
        return facts is not None and [facts.size, facts.version] == noted

    def _remove(self, name: str) -> None:
        at = self._at(name)
        self._patience.call(lambda: self._bucket.remove(at.path), lambda: str(at))


def read_record(record: Path) -> dict[str, Any]:
    """What an earlier upload recorded; nothing if there was none."""
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
