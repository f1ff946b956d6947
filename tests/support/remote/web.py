"""A web server on the loopback device: ranges, an index of each folder, latency, throttling and faults."""

from __future__ import annotations

import html
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

Fault = Callable[["Asked"], str | None]
_PIECE = 256 << 10


@dataclass(frozen=True)
class Asked:
    """A request for a range of a file.

    Attributes:
        number: of all such requests.
        path: the file, below the root.
        start, stop: the range.
        version: the tag that the file must have, from ``If-Match``; None for any.
    """

    number: int
    path: str
    start: int
    stop: int
    version: str | None


@dataclass
class Web:
    """The server.

    Attributes:
        root: the directory that it serves.
        latency: seconds before each answer.
        rate: bytes a second of one answer; 0 for no limit.
        fault: names the fault of a request: ``drop`` (no answer), ``503``, ``429``, ``truncate`` (the
            connection ends in the middle), ``stall`` (nothing more comes), ``change`` (the file is written
            anew before the answer); None for none.
        asked: every request for a range.
        nbytes: bytes of files that were sent.
    """

    root: Path
    latency: float = 0.0
    rate: float = 0.0
    fault: Fault = lambda _: None
    change: Callable[[Path], None] = lambda _: None
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    other: int = 0
    nbytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        web = self.web
        time.sleep(web.latency)
        relative = unquote(urlsplit(self.path).path).lstrip("/")
        path = web.root / relative
        if path.is_dir():
            with web.lock:
                web.other += 1
            self._index(path, relative, body)
            return
        if not path.is_file():
            self._plain(404, b"")
            return
        size = path.stat().st_size
        start, stop = self._range(size)
        if body:
            with web.lock:
                demanded = self.headers.get("If-Match")
                asked = Asked(len(web.asked), relative, start, stop, demanded)
                web.asked.append(asked)
            fault = web.fault(asked)
        else:
            with web.lock:
                web.other += 1
            fault = None
        if fault == "drop":
            self._cut()
            return
        if fault in ("503", "429"):
            self._plain(int(fault), b"slow down")
            return
        if fault == "change":
            web.change(path)
            size = path.stat().st_size
        found = path.stat()
        tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        if self.headers.get("If-Match") not in (None, tag):
            self._plain(412, b"")
            return
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("ETag", tag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if body:
            self._send(path, start, stop, fault)

    def _range(self, size: int) -> tuple[int, int]:
        named = self.headers.get("Range")
        if not named:
            return 0, size
        first, _, last = named.removeprefix("bytes=").partition("-")
        return int(first), min(int(last or size - 1) + 1, size)

    def _send(self, path: Path, start: int, stop: int, fault: str | None) -> None:
        web, began = self.web, time.monotonic()
        end = start + (stop - start) // 2 if fault in ("truncate", "stall") else stop
        at = start
        with path.open("rb") as stream, suppress(BrokenPipeError, ConnectionResetError):
            while at < end:
                count = min(_PIECE, end - at)
                sent = os.sendfile(self.connection.fileno(), stream.fileno(), at, count)
                if not sent:
                    break
                at += sent
                with web.lock:
                    web.nbytes += sent
                if web.rate:
                    time.sleep(max(0.0, (at - start) / web.rate - (time.monotonic() - began)))
        # A file that shrinks meanwhile has no more to send; a client would wait for the rest.
        if at < end or fault == "truncate":
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _plain(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if text and self.command != "HEAD":
            self.wfile.write(text)

    def _index(self, path: Path, relative: str, body: bool) -> None:
        names = [entry.name + "/" * entry.is_dir() for entry in sorted(path.iterdir())]
        if not self.path.endswith("/"):
            self.send_response(301)
            self.send_header("Location", f"/{quote(relative)}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        links = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in names)
        text = f"<html><body><a href='../'>..</a>\n{links}</body></html>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serving(root: Path, **attributes: Any) -> Iterator[Web]:
    """The server of a directory."""
    web = Web(root, **attributes)
    handler = type("Handler", (_Handler,), {"web": web})
    server = _Server(("127.0.0.1", 0), handler)
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
