"""Stores of Google and Azure: three checkpoints of each, and an output in each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import pytest

from ckpt_tools import consolidate, inspect, verify
from ckpt_tools.storage.places import FileFacts
from ckpt_tools.storage.remote.stores import facts_of
from tests.conftest import FIXTURES
from tests.storage.remote.test_buckets import ZERO3, files_of
from tests.support.remote import clouds
from tests.support.remote.s3 import BUCKET, S3

SOURCES = [
    "zero/zero3-bf16-olmo2-chat-2ranks",
    "dcp/fsdp2-model-3ranks",
    "rank_files/verl-fsdp1-3ranks",
]
SHOWN = "model.safetensors"


def assert_read(serving: AbstractContextManager[str], tmp_path: Path) -> str:
    """Convert each checkpoint, and compare with that of this machine; returns an address."""
    address = ""
    with serving as prefix:
        for source in SOURCES:
            (checkpoint,) = (FIXTURES / source).glob("checkpoint*")
            address = f"{prefix}/{source}"
            clouds.put(checkpoint, address)
            assert inspect(address).parameters == inspect(checkpoint).parameters
            here, there = tmp_path / "here" / source, tmp_path / "there" / source
            consolidate(checkpoint, here, weights_only=True)
            consolidate(address, there, weights_only=True)
            assert (there / SHOWN).read_bytes() == (here / SHOWN).read_bytes()
    return address


def assert_written(address: str, tmp_path: Path) -> None:
    """Write an output, and compare what lies there with an output on this machine."""
    consolidate(ZERO3 / "checkpoint", tmp_path / "out", config=ZERO3 / "hf", tokenizer=ZERO3 / "hf")
    consolidate(
        *(ZERO3 / "checkpoint", address),
        config=ZERO3 / "hf",
        tokenizer=ZERO3 / "hf",
        scratch=tmp_path / "scratch",
    )
    found = verify(address, like=tmp_path / "out", against=ZERO3 / "checkpoint", read_data=True)
    assert not found.problems
    assert found.tensors == 25
    from ckpt_tools.storage.naming import as_path

    there = as_path(address)
    names = [path for path in there.rglob("*") if path.is_file()]
    held = {path.relative_to(there).as_posix(): path.read_bytes() for path in names}
    assert held == files_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("stated", "version"),
    [("0x8D", '"0x8D"'), ('"0x8D"', '"0x8D"'), ('W/"1"', 'W/"1"'), (None, "7")],
)
def test_a_version_is_quoted_alike_in_listings_and_answers(
    stated: str | None, version: str
) -> None:
    """Listings of Azure have no quotes; its answers have."""
    written = datetime.fromtimestamp(1, tz=timezone.utc)
    meta = {"size": 3, "last_modified": written, "e_tag": stated, "version": "7"}
    assert facts_of(meta) == FileFacts(3, 10**9, version)


@pytest.mark.slow
def test_checkpoints_in_a_bucket_of_google(tmp_path: Path) -> None:
    assert_read(clouds.google(), tmp_path)


@pytest.mark.slow
def test_an_output_in_a_bucket_of_google(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google takes the requests of S3, and obstore makes those: moto answers them."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
    assert_written(f"gs://{BUCKET}/clouds/out", tmp_path)


@pytest.mark.slow
def test_checkpoints_and_an_output_in_azure(tmp_path: Path) -> None:
    with clouds.azure() as prefix:
        assert_read(nullcontext(prefix), tmp_path)
        assert_written(f"{prefix}/out", tmp_path / "written")
