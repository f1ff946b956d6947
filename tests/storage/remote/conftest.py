from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckpt_tools.storage.remote import trees
from tests.support.remote import s3


@pytest.fixture(scope="session")
def store() -> Iterator[s3.S3]:
    """A bucket in a real server, and the environment that leads to it."""
    with s3.serving() as served:
        yield served


@pytest.fixture(autouse=True)
def _listed_anew() -> Iterator[None]:
    trees.forget()
    yield
    trees.forget()
