"""A stand-in for the Hub on the loopback device: repositories, trees, ranges and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """The server.

    Attributes:
        url: its endpoint.
        repositories: the files of each branch, by repository and branch.
        commits: the paths that each commit added, in order.
        private: the repositories that were made private.
        refuse_commits: how many commits are answered with a failure.
        tokens: the authorization headers of requests.
    """

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    refuse_commits: int = 0
    tokens: set[str | None] = field(default_factory=set)

    def sha(self, repository: str, branch: str) -> str:
        text = repr(sorted(self.repositories[repository][branch].items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def branch(self, repository: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repositories.get(repository, {})
        named = {self.sha(repository, name): files for name, files in branches.items()}
        return branches.get(revision, named.get(revision))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(content).encode(), status, **headers)

    def _bytes(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _parts(self) -> tuple[list[str], str]:
        self.hub.tokens.add(self.headers.get("Authorization"))
        split = urlsplit(self.path)
        return [unquote(part) for part in split.path.strip("/").split("/")], split.query

    def do_GET(self) -> None:
        parts, query = self._parts()
        hub = self.hub
        if len(parts) < 4:
            self._json({"error": "none"}, 404)
            return
        if parts[:2] != ["api", "models"]:
            name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            data = (hub.branch(name, revision) or {}).get(path)
            if data is None:
                self._json({"error": "none"}, 404)
                return
            self._range(data)
            return
        name = "/".join(parts[2:4])
        kind, revision = (parts[4], parts[5]) if len(parts) > 5 else ("revision", "main")
        files = hub.branch(name, revision)
        if files is None:
            code = "RevisionNotFound" if name in hub.repositories else "RepoNotFound"
            self._json({"error": "none"}, 404, X_Error_Code=code)
        elif kind == "tree":
            self._json(self._tree(files, "/".join(parts[6:]), "recursive=true" in query.lower()))
        else:
            branch = next(b for b, held in hub.repositories[name].items() if held is files)
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": hub.sha(name, branch), "siblings": siblings})

    def _range(self, data: bytes) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
        place = f"bytes {start}-{stop - 1}/{len(data)}"
        self._bytes(data[start:stop], 206, Content_Range=place, ETag='"x"')

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
        above = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, data in files.items():
            if path.startswith(above):
                inner = path[len(above) :]
                if "/" in inner and not recursive:
                    path = above + inner.partition("/")[0]
                    found[path] = {"type": "directory", "path": path, "oid": "0"}
                else:
                    found[path] = {"type": "file", "path": path, "oid": "0", "size": len(data)}
        return list(found.values())

    def do_POST(self) -> None:
        parts, _ = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.hub
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization')}/{asked['name']}"
            hub.repositories.setdefault(name, {"main": {}})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            return
        name = "/".join(parts[2:4])
        if len(parts) < 5:
            self._json({})
        elif parts[4] == "branch":
            hub.repositories[name].setdefault(parts[5], {})
            self._json({})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": each["path"], **modes} for each in files]})
        elif parts[4] == "paths-info":
            files = hub.branch(name, parts[5]) or {}
            wanted = parse_qs(body.decode())["paths"]
            self._json([each for each in self._tree(files, "", True) if each["path"] in wanted])
        elif hub.refuse_commits:
            hub.refuse_commits -= 1
            self._json({"error": "try again"}, 503)
        else:
            self._commit(name, parts[5], body)

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        hub = self.hub
        added, files = [], dict(hub.repositories[name].get(revision, {}))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        hub.repositories[name][revision] = files
        hub.commits.append(added)
        sha = hub.sha(name, revision)
        url = f"{hub.url}/{name}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})


@contextmanager
def serving() -> Iterator[Hub]:
    """The server, with no repository."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
