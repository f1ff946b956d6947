"""A real S3 server on the loopback device: moto's, with one bucket, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

BUCKET = "runs"


class S3:
    """The server.

    Attributes:
        url: its endpoint.
        client: boto3's, to put objects there.
    """

    def __init__(self, url: str) -> None:
        import boto3

        self.url = url
        self.client: Any = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, directory: Path, prefix: str) -> str:
        """Put every file of a directory below a prefix; returns the address."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(directory).as_posix()}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str) -> list[str]:
        """The keys below a prefix."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", ())]


VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def serving() -> Iterator[S3]:
    """The server, and the environment variables that lead to it."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        with mock.patch.dict(os.environ, {**VARIABLES, "AWS_ENDPOINT_URL": url}):
            yield S3(url)
    finally:
        server.stop()
