"""A store that refuses: one request, and one message with the fact and the next step."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import pytest

from ckpt_tools import inspect
from ckpt_tools.errors import StoreFailed
from ckpt_tools.storage import patience
from ckpt_tools.storage.remote import failures
from tests.support.remote.s3 import VARIABLES


@contextmanager
def refusing(status: int, body: str) -> Iterator[list[str]]:
    """A server of S3 that gives one answer to every request; yields the requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {**VARIABLES, "AWS_ENDPOINT_URL": url, "STORAGE_EMULATOR_HOST": url}
    try:
        with mock.patch.dict(os.environ, settings):
            yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_s3(code: str) -> str:
    """The body of an error as S3 writes it."""
    return f"<Error><Code>{code}</Code><Message>secret-of-the-store</Message></Error>"


@pytest.mark.parametrize(
    ("address", "status", "body", "fact", "hint"),
    [
        ("s3://b/run", 400, of_s3("ExpiredToken"), "the credentials have expired", "AWS_PROFILE"),
        ("s3://b/run", 403, of_s3("RequestTimeTooSkewed"), "the clock of this machine", "Check"),
        ("s3://b/run", 403, of_s3("InvalidAccessKeyId"), "does not know the access key", "AWS_"),
        ("s3://b/run", 403, of_s3("SignatureDoesNotMatch"), "the secret key does not", "AWS_"),
        ("s3://b/run", 403, of_s3("AccessDenied"), "the store denies access", "AWS_PROFILE"),
        ("s3://b/run", 404, of_s3("NoSuchBucket"), "there is no such bucket", "the spelling"),
        ("s3://b/run", 301, of_s3("PermanentRedirect"), "is in another region", "AWS_REGION"),
        ("s3://b/run", 400, of_s3("AuthorizationHeaderMalformed"), "another region", "AWS_REGION"),
        ("s3://b/run", 418, "", "the store answers with status 418", "docs/remote.md"),
        ("gs://b/run", 401, "", "the store denies access", "gcloud auth"),
    ],
)
def test_a_refusal_is_one_message_at_once(
    address: str, status: int, body: str, fact: str, hint: str
) -> None:
    with refusing(status, body) as asked, pytest.raises(StoreFailed, match=fact) as raised:
        inspect(address)
    # The folder that was named and those above it are listed at the same time.
    assert len(asked) == len(set(asked))
    assert raised.value.exit_code == 9
    assert str(raised.value.where).startswith(address[:6])
    assert hint in str(raised.value.hint)
    assert "secret-of" not in str(raised.value)


def test_a_store_that_asks_for_patience_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_SHORTEST_PAUSE", 0.01)
    patience.be_patient(0.05)
    try:
        with (
            refusing(503, of_s3("SlowDown")) as asked,
            pytest.raises(StoreFailed, match="did not answer within") as raised,
        ):
            inspect("s3://b/run")
    finally:
        patience.be_patient(1800.0)
    assert len(asked) > len(set(asked))
    assert "--resume" in str(raised.value.hint)
