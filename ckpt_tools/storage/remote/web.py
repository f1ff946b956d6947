"""Owns the files of a web server: a single file, or a folder of which the server shows an index.

The index is a page with links, as Apache, nginx and Python write it. Servers must support ranges.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin

from ckpt_tools.storage.addresses import Address
from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.failures import status_of
from ckpt_tools.storage.remote.stores import (
    ONE_ATTEMPT,
    facts_of,
    fetch_range,
    http_options,
    obstore,
    read_range,
)

_PAGE_SECONDS = 30
_LARGEST_PAGE = 16 << 20
_AT_ONCE = 16
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".json", ".jinja", ".model", ".txt")


class _Links(HTMLParser):
    """The targets of the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if (tag, name) == ("a", "href") and value]


class WebServer:
    """A web server.

    Args:
        address: any address on it.
    """

    def __init__(self, address: Address) -> None:
        self._obstore = obstore()
        from obstore.store import HTTPStore

        self._url = str(address.root)
        options = http_options(self._url)
        self._server = HTTPStore(self._url, client_options=options, retry_config=ONE_ATTEMPT)

    def folder(self, path: str) -> tuple[dict[str, FileFacts], list[str]]:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.folder`."""
        if path.endswith(_FILES):
            return {}, []
        here = f"{self._url}/{quote(path)}/" if path else f"{self._url}/"
        links = [link[len(here) :] for link in self._links(here) if link.startswith(here)]
        above = f"{path}/" if path else ""
        names = dict.fromkeys(unquote(link.partition("#")[0]) for link in links if "?" not in link)
        folders = [
            above + name[:-1] for name in names if name.endswith("/") and "/" not in name[:-1]
        ]
        files = [above + name for name in names if name and "/" not in name]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            facts = zip(files, threads.map(self.facts, files), strict=True)
            return {name: found for name, found in facts if found is not None}, folders

    def _links(self, url: str) -> list[str]:
        try:
            with urllib.request.urlopen(url, timeout=_PAGE_SECONDS) as answer:
                if answer.headers.get_content_type() != "text/html":
                    return []
                page = _Links()
                page.feed(answer.read(_LARGEST_PAGE).decode("utf-8", "replace"))
                return [urljoin(answer.url, target) for target in page.targets]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code != 429:
                return []
            raise OSError(f"status code: {error.code}") from None

    def below(self, path: str) -> Iterator[tuple[str, FileFacts]]:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.below`."""
        files, folders = self.folder(path)
        yield from files.items()
        for folder in folders:
            yield from self.below(folder)

    def facts(self, path: str) -> FileFacts | None:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.facts`."""
        try:
            return facts_of(self._obstore.head(self._server, path))
        except FileNotFoundError:
            return None
        except self._obstore.exceptions.BaseError as error:
            if status_of(error) in (403, 405):
                return None
            raise

    def read(self, path: str, view: memoryview, offset: int, facts: FileFacts) -> None:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.read`."""
        address = f"{self._url}/{path}"
        read_range(self._obstore, self._server, path, view, offset, facts, address)

    def fetch(self, path: str, offset: int, nbytes: int, facts: FileFacts) -> memoryview:
        """See :meth:`ckpt_tools.storage.remote.stores.Store.fetch`."""
        address = f"{self._url}/{path}"
        return fetch_range(self._obstore, self._server, path, (offset, nbytes), facts, address)
