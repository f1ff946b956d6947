"""Owns the requests to a store: list a folder, list all below it, look at one object, read a range of it.

:class:`Store` is what the rest of this folder uses. Buckets are read through obstore; a web server and the
Hub list their files in their own ways, and obstore reads them by HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckpt_tools.errors import StoreFailed, UsageError
from ckpt_tools.storage.addresses import Address
from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.credentials import aws_settings, google_settings
from ckpt_tools.storage.remote.failures import Incomplete, changed

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, HTTPStore, S3Store

    ObjectStore = AzureStore | GCSStore | HTTPStore | S3Store

Sent = Callable[[int], None]

# An answer of 16 MiB takes so long at 500 kB/s.
_ANSWER_SECONDS = 60
_CONNECT_SECONDS = 10
_IDLE_CONNECTIONS = 64
# An answer is taken in pieces of about this size, which fit into the cache of a processor.
_PIECE_BYTES = 256 << 10
_WEAK = "W/"
_OTHER_LENGTH = "the answer has another number of bytes than was asked for"


class Store(Protocol):
    """The requests that reading needs. Each makes one attempt; several threads may ask at once."""

    def folder(self, path: str) -> tuple[dict[str, FileFacts], list[str]]:
        """The files of a folder, and the folders in it, by their paths in the store."""

    def below(self, path: str) -> Iterator[tuple[str, FileFacts]]:
        """Every file below a folder."""

    def facts(self, path: str) -> FileFacts | None:
        """The facts of one file; None where there is none of this path."""

    def read(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> None:
        """Fill ``view`` with bytes of a file that still has these facts.

        Raises:
            Incomplete: the answer ended early.
            DamagedCheckpoint: the file was changed.
        """

    def fetch(self, path: str, offset: int, nbytes: int, facts: FileFacts) -> memoryview:
        """The same bytes in memory of their own; raises as :meth:`read`."""


def obstore() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import obstore
    except ImportError as error:
        raise UsageError(
            "addresses of stores are read through the package obstore, which is not installed",
            hint="Install it: pip install 'ckpt-tools[remote]'.",
        ) from error
    return obstore


def http_options(url: str, headers: dict[str, str] | None = None) -> ClientConfig:
    """How connections are made."""
    options: ClientConfig = {
        "allow_http": url.startswith("http://"),
        "timeout": timedelta(seconds=_ANSWER_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "pool_max_idle_per_host": str(_IDLE_CONNECTIONS),
        "user_agent": "ckpt-tools",
    }
    if headers:
        options["default_headers"] = headers
    return options


# Failures are judged and repeated in one place, failures.py.
ONE_ATTEMPT: Any = {"max_retries": 0}


def bucket_of(address: Address) -> ObjectStore:
    """The bucket or container of an address, with the settings of the environment."""
    obstore()
    from obstore import store as stores

    try:
        settings: Any
        if address.scheme == "gs":
            settings = google_settings()
            return stores.GCSStore(
                address.host,
                config=settings,
                client_options=_bucket_options(settings.get("base_url", "")),
                retry_config=ONE_ATTEMPT,
            )
        if address.scheme == "az":
            return stores.AzureStore(
                address.host,
                client_options=_bucket_options(os.environ.get("AZURE_STORAGE_ENDPOINT", "")),
                retry_config=ONE_ATTEMPT,
            )
        settings = aws_settings()
        return stores.S3Store(
            address.host,
            config=settings,
            client_options=_bucket_options(settings.get("endpoint", "")),
            retry_config=ONE_ATTEMPT,
        )
    except Exception as error:
        raise StoreFailed(
            f"the settings of the store cannot be used ({type(error).__name__})",
            path=str(address.root),
            hint="Check the environment variables and files that docs/remote.md lists.",
        ) from None


def _bucket_options(endpoint: str = "") -> ClientConfig:
    options = http_options(endpoint)
    if not options["allow_http"]:
        del options["allow_http"]  # a variable of the environment may allow it
    return options


class Bucket:
    """A bucket of S3, Google or Azure.

    Args:
        address: any address in it.
    """

    def __init__(self, address: Address) -> None:
        self._obstore = obstore()
        self._root = address.root
        self._bucket = bucket_of(address)

    def folder(self, path: str) -> tuple[dict[str, FileFacts], list[str]]:
        """See :meth:`Store.folder`."""
        found = self._obstore.list_with_delimiter(self._bucket, path or None)
        files = {meta["path"]: facts_of(meta) for meta in found["objects"]}
        return files, list(found["common_prefixes"])

    def below(self, path: str) -> Iterator[tuple[str, FileFacts]]:
        """See :meth:`Store.below`."""
        for batch in self._obstore.list(self._bucket, path or None, chunk_size=1000):
            for meta in batch:
                yield meta["path"], facts_of(meta)

    def facts(self, path: str) -> FileFacts | None:
        """See :meth:`Store.facts`."""
        try:
            return facts_of(self._obstore.head(self._bucket, path))
        except FileNotFoundError:
            return None

    def read(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> None:
        """See :meth:`Store.read`."""
        address = f"{self._root}/{path}"
        read_range(self._obstore, self._bucket, path, view, offset, facts, address)

    def fetch(self, path: str, offset: int, nbytes: int, facts: FileFacts) -> memoryview:
        """See :meth:`Store.fetch`."""
        address = f"{self._root}/{path}"
        return fetch_range(self._obstore, self._bucket, path, (offset, nbytes), facts, address)

    def put(self, path: str, file: Path, part_bytes: int, parts_at_once: int, sent: Sent) -> None:
        """Write a file of this machine; it appears whole.

        Args:
            path: its path in the store.
            file: the file.
            part_bytes: a longer file is sent in parts of so many bytes.
            parts_at_once: the number of parts under way.
            sent: called with the number of bytes of the file that have arrived.
        """
        size = file.stat().st_size
        parts = file if size <= part_bytes else _parts_of(file, part_bytes, parts_at_once, sent)
        self._obstore.put(
            self._bucket, path, parts, chunk_size=part_bytes, max_concurrency=parts_at_once
        )
        sent(size)

    def remove(self, path: str) -> None:
        """Remove a file."""
        self._obstore.delete(self._bucket, path)


def _parts_of(file: Path, part_bytes: int, parts_at_once: int, sent: Sent) -> Iterator[bytes]:
    """The parts of a file. The library asks for another one when one of those under way has arrived."""
    with file.open("rb") as stream:
        given = 0
        while part := stream.read(part_bytes):
            yield part
            given += 1
            sent(max(given - parts_at_once, 0) * part_bytes)


def read_range(
    library: Any,
    store: ObjectStore,
    path: str,
    view: memoryview,
    offset: int,
    facts: FileFacts,
    address: str,
) -> None:
    """Fill ``view`` from one answer, piece by piece as it arrives; raises as :meth:`Store.read`."""
    answer = _ask(library, store, path, (offset, len(view)), facts, address)
    # The whole answer would lie in memory twice: in pieces, and joined.
    into, done = np.frombuffer(view, np.uint8), 0
    for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
        data = np.frombuffer(piece, np.uint8)
        if len(data) > len(into) - done:
            raise Incomplete(_OTHER_LENGTH)
        # numpy copies without the interpreter lock.
        np.copyto(into[done : done + len(data)], data)
        done += len(data)
    if done != len(view):
        raise Incomplete(_OTHER_LENGTH)


def fetch_range(
    library: Any,
    store: ObjectStore,
    path: str,
    run: tuple[int, int],
    facts: FileFacts,
    address: str,
) -> memoryview:
    """A range as the library joins it, without the interpreter lock; raises as :meth:`Store.read`.

    Args:
        library: obstore.
        store: the store.
        path: the file.
        run: its first byte, and the number of bytes.
        facts: of the file.
        address: its address.
    """
    found = memoryview(_ask(library, store, path, run, facts, address).bytes())
    if len(found) != run[1]:
        raise Incomplete(_OTHER_LENGTH)
    return found


def _ask(
    library: Any,
    store: ObjectStore,
    path: str,
    run: tuple[int, int],
    facts: FileFacts,
    address: str,
) -> Any:
    """Ask for a range of the version that the facts name; the answer comes later."""
    options: dict[str, object] = {"range": (run[0], sum(run))}
    # RFC 9110 forbids a weak tag here: no version would match it.
    if facts.version is not None and not facts.version.startswith(_WEAK):
        options["if_match"] = facts.version
    try:
        answer = library.get(store, path, options=options)
    except FileNotFoundError:
        raise changed(address, "the object was removed while it was read") from None
    version = _tag_of(answer.meta)
    other_version = facts.version is not None and version is not None and version != facts.version
    if answer.meta["size"] != facts.size or other_version:
        raise changed(address)
    return answer


def facts_of(meta: Any) -> FileFacts:
    """The facts in what obstore says of an object."""
    written = int(meta["last_modified"].timestamp() * 1_000_000) * 1000
    return FileFacts(meta["size"], written, _tag_of(meta) or meta["version"])


def _tag_of(meta: Any) -> str | None:
    """The ETag of an object, quoted. Azure quotes it in the answer to a request, and not in a listing."""
    tag: str | None = meta["e_tag"]
    return tag if not tag or tag.startswith(('"', _WEAK)) else f'"{tag}"'
