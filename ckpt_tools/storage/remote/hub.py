"""Owns the files of a repository of the Hub: huggingface_hub lists them, obstore reads them by HTTP.

A branch is resolved to its commit when the repository is opened. A commit never changes, so ranges are not
compared with a version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt_tools.storage.addresses import Address
from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.stores import (
    ONE_ATTEMPT,
    fetch_range,
    http_options,
    obstore,
    read_range,
)


class Repository:
    """A repository at one commit.

    Args:
        address: any address in it.
    """

    def __init__(self, address: Address) -> None:
        self._obstore = obstore()
        self._address = address.root
        self.name, _, revision = address.host.partition("@")
        self.revision = revision.replace("%2F", "/")
        self._commit: str | None = None
        self._server: Any = None

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    def _resolved(self) -> str:
        """The commit; asked for once."""
        if self._commit is None:
            from huggingface_hub import get_token
            from obstore.store import HTTPStore

            api = self._api()
            info = api.model_info(self.name, revision=self.revision)
            token = get_token()
            headers = {"authorization": f"Bearer {token}"} if token else None
            url = f"{api.endpoint}/{self.name}/resolve/{info.sha}"
            self._server = HTTPStore(
                url, client_options=http_options(url, headers), retry_config=ONE_ATTEMPT
            )
            self._commit = str(info.sha)
        return self._commit

    def _tree(self, path: str, recursive: bool) -> Iterator[Any]:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            yield from self._api().list_repo_tree(
                self.name, path or None, recursive=recursive, revision=self._resolved()
            )
        except EntryNotFoundError:
            return

    def folder(self, path: str) -> tuple[dict[str, FileFacts], list[str]]:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.folder`."""
        entries = list(self._tree(path, recursive=False))
        files = {e.path: FileFacts(e.size, 0) for e in entries if _is_file(e) and e.path != path}
        return files, [e.path for e in entries if not _is_file(e)]

    def below(self, path: str) -> Iterator[tuple[str, FileFacts]]:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.below`."""
        for entry in self._tree(path, recursive=True):
            if _is_file(entry):
                yield entry.path, FileFacts(entry.size, 0)

    def facts(self, path: str) -> FileFacts | None:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.facts`."""
        found = self._api().get_paths_info(self.name, [path], revision=self._resolved())
        return next((FileFacts(e.size, 0) for e in found if _is_file(e) and e.path == path), None)

    def read(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> None:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.read`."""
        self._resolved()
        address = f"{self._address}/{path}"
        read_range(self._obstore, self._server, path, view, offset, facts, address)

    def fetch(self, path: str, offset: int, nbytes: int, facts: FileFacts) -> memoryview:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.fetch`."""
        self._resolved()
        address = f"{self._address}/{path}"
        return fetch_range(self._obstore, self._server, path, (offset, nbytes), facts, address)


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "size")
