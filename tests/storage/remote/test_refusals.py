"""What a store refuses: one message with the fact and the next step, and no second attempt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ckpt_tools import inspect
from ckpt_tools.errors import StoreFailed
from tests.support.remote.s3 import VARIABLES


@contextmanager
def refusing(status: int, code: str) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with an error of S3; its endpoint, and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "fact", "step"),
    [
        (400, "ExpiredToken", "the credentials have expired", "AWS_SESSION_TOKEN"),
        (403, "AccessDenied", "the store denies access", "AWS_PROFILE"),
        (403, "InvalidAccessKeyId", "the store does not know the access key", "AWS_ACCESS_KEY_ID"),
        (
            *(403, "SignatureDoesNotMatch"),
            *("the secret key does not belong to the access key", "AWS_SECRET_ACCESS_KEY"),
        ),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong", "docs/remote.md"),
        (301, "PermanentRedirect", "the bucket is in another region", "Set AWS_REGION"),
        (
            *(400, "AuthorizationHeaderMalformed"),
            *("the bucket is in another region", "Set AWS_REGION"),
        ),
        (404, "NoSuchBucket", "there is no such bucket", "spelling of the address"),
    ],
)
def test_a_refusal_of_s3_is_told_at_once(
    status: int, code: str, fact: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with refusing(status, code) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(StoreFailed) as raised:
            inspect("s3://runs/olmo")
    assert raised.value.fact == fact
    assert step in (raised.value.hint or "")
    assert raised.value.exit_code == 9
    assert len(asked) == len(set(asked))
