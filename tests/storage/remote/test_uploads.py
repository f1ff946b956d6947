"""An output in a store: complete, or without what makes it loadable; an interrupted upload continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from ckpt_tools import consolidate
from ckpt_tools.errors import OutputExists, StoreFailed, UsageError
from ckpt_tools.storage.addresses import parsed
from ckpt_tools.storage.naming import as_path
from ckpt_tools.storage.remote import trees, upload
from ckpt_tools.storage.remote.commit import HubOutput
from ckpt_tools.storage.remote.failures import Patience
from ckpt_tools.storage.remote.stores import Bucket
from ckpt_tools.storage.remote.upload import upload_order
from tests.conftest import FIXTURES
from tests.support.forked import Forked
from tests.support.remote import clouds
from tests.support.remote import hub as hubs
from tests.support.remote.s3 import BUCKET, S3

ZERO3 = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
CHECKPOINT = ZERO3 / "checkpoint"


def held(store: S3, prefix: str) -> dict[str, bytes]:
    keys = store.keys(f"{prefix}/")
    return {
        key[len(prefix) + 1 :]: store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for key in keys
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_weights_go_first_and_what_makes_them_loadable_last() -> None:
    names = ["config.json", "model.safetensors.index.json", "tokenizer.json", "b.safetensors"]
    assert upload_order(names) == [
        "b.safetensors",
        "tokenizer.json",
        "model.safetensors.index.json",
        "config.json",
    ]


def test_an_output_in_a_bucket_has_the_files_of_a_local_one(store: S3, tmp_path: Path) -> None:
    consolidate(CHECKPOINT, tmp_path / "out", weights_only=True)
    scratch = tmp_path / "scratch"
    report = consolidate(
        CHECKPOINT, f"s3://{BUCKET}/up/out", weights_only=True, scratch=scratch, verify=True
    )
    assert report.output == f"s3://{BUCKET}/up/out"
    assert held(store, "up/out") == files_of(tmp_path / "out")
    assert list(scratch.iterdir()) == []
    with pytest.raises(OutputExists):
        consolidate(CHECKPOINT, f"s3://{BUCKET}/up/out", weights_only=True, scratch=scratch)


@contextmanager
def bucket_of(scheme: str, store: S3) -> Iterator[str]:
    """The address of an empty folder in a store of a kind, which moto or Azurite serves."""
    if scheme == "az":
        with clouds.azure() as prefix:
            yield f"{prefix}/again"
    else:
        # Google takes the requests of S3.
        with mock.patch.dict(os.environ, STORAGE_EMULATOR_HOST=store.url):
            yield f"{scheme}://{BUCKET}/again-{scheme}"


def names_at(address: str) -> set[str]:
    trees.forget()
    there = as_path(address)
    return {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_an_interrupted_upload_has_no_config_and_continues(
    scheme: str, store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket_of(scheme, store) as address:
        assert_it_continues(address, tmp_path, monkeypatch)


def assert_it_continues(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop an upload at its third file, and continue it."""
    scratch = tmp_path / "scratch"
    put: Callable[..., None] = Bucket.put
    asked: list[str] = []

    def failing(self: Bucket, path: str, *more: Any) -> None:
        asked.append(path)
        if len(asked) == 3:
            raise StoreFailed("the store denies access", path=path, hint="Check it.")
        put(self, path, *more)

    monkeypatch.setattr(Bucket, "put", failing)
    options: dict[str, Any] = {
        "config": ZERO3 / "hf",
        "tokenizer": ZERO3 / "hf",
        "scratch": scratch,
    }
    with pytest.raises(StoreFailed, match="--resume sends what is missing"):
        consolidate(CHECKPOINT, address, **options)
    first = names_at(address)
    assert "model.safetensors" in first
    assert "config.json" not in first
    with pytest.raises(OutputExists):
        consolidate(CHECKPOINT, address, scratch=tmp_path / "other", weights_only=True)
    consolidate(CHECKPOINT, address, resume=True, **options)
    # What was uploaded is not sent again.
    assert len(asked) == len(set(asked)) + 1
    assert names_at(address) > {"config.json", "model.safetensors"}
    assert asked[-1].endswith("/config.json")


def test_the_progress_of_an_upload_counts_parts_of_files(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(upload, "_PARTS_AT_ONCE", 1)
    weights, config = bytes(range(256)) * (11 << 12), b"{}"
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_bytes(config)
    address, told = parsed(f"s3://{BUCKET}/up/parts"), list[int]()
    output = upload.BucketOutput(address, Patience())
    output.upload(tmp_path, tmp_path.parent / "record.json", told.append)
    assert told == [0, 5 << 20, 10 << 20, 11 << 20, (11 << 20) + 2]
    assert held(store, "up/parts") == {"model.safetensors": weights, "config.json": config}


# The process dies when the store has a file that the record of the upload does not list.
_KILLED = """
import os, signal, sys
from ckpt_tools import consolidate
from ckpt_tools.storage.remote.stores import Bucket

put, sent = Bucket.put, []

def killing(self, path, *more):
    put(self, path, *more)
    sent.append(path)
    if len(sent) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Bucket.put = killing
checkpoint, address, beside, scratch = sys.argv[1:]
consolidate(checkpoint, address, config=beside, tokenizer=beside, scratch=scratch)
"""


@pytest.mark.slow
def test_an_upload_that_was_killed_continues(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, beside, scratch = f"s3://{BUCKET}/up/killed", ZERO3 / "hf", tmp_path / "scratch"
    command = [sys.executable, "-c", _KILLED, CHECKPOINT, address, beside, scratch]
    with Forked(list(map(str, command)), stderr=subprocess.PIPE, text=True) as killed:
        said = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, said
    first = held(store, "up/killed")
    assert len(first) == 2
    assert "model.safetensors" in first
    assert "config.json" not in first
    asked: list[str] = []
    put: Callable[..., None] = Bucket.put

    def noting(self: Bucket, path: str, *more: Any) -> None:
        asked.append(path.rpartition("/")[2])
        put(self, path, *more)

    monkeypatch.setattr(Bucket, "put", noting)
    options: dict[str, Any] = {"config": beside, "tokenizer": beside}
    consolidate(CHECKPOINT, address, resume=True, scratch=scratch, **options)
    consolidate(CHECKPOINT, tmp_path / "out", **options)

    assert held(store, "up/killed") == files_of(tmp_path / "out")
    # The record lists the first file, which is not sent again.
    assert "model.safetensors" not in asked
    assert set(first) - {"model.safetensors"} <= set(asked)
    assert asked[-1] == "config.json"
    assert list(scratch.iterdir()) == []


def test_two_runs_to_one_address_do_not_share_their_folder(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that begins while another uploads is refused, and the other's upload is whole."""
    address, scratch = f"s3://{BUCKET}/up/both", tmp_path / "scratch"
    put: Callable[..., None] = Bucket.put
    refused: list[UsageError] = []

    def beside(self: Bucket, path: str, *more: Any) -> None:
        with pytest.raises(UsageError, match="another run to this address") as caught:
            consolidate(CHECKPOINT, address, weights_only=True, scratch=scratch, overwrite=True)
        refused.append(caught.value)
        put(self, path, *more)

    monkeypatch.setattr(Bucket, "put", beside)
    consolidate(CHECKPOINT, address, weights_only=True, scratch=scratch)
    consolidate(CHECKPOINT, tmp_path / "out", weights_only=True)

    assert len(refused) == 2
    assert held(store, "up/both") == files_of(tmp_path / "out")
    assert list(scratch.iterdir()) == []


def test_a_folder_of_another_user_is_not_uploaded(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: other)
    with pytest.raises(UsageError, match="belongs to another user"):
        consolidate(CHECKPOINT, f"s3://{BUCKET}/up/mine", weights_only=True, scratch=tmp_path)
    assert not store.keys("up/mine/")


def test_an_output_that_is_replaced_leaves_no_old_file(store: S3, tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        store.client.put_object(Bucket=BUCKET, Key=f"up/old/{name}", Body=b"old")
    consolidate(
        CHECKPOINT, f"s3://{BUCKET}/up/old", weights_only=True, overwrite=True, scratch=tmp_path
    )
    assert set(held(store, "up/old")) == {"model.safetensors", "ckpt_tools_manifest.json"}


def test_a_web_server_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="https:// cannot be written"):
        consolidate(CHECKPOINT, "https://host/out", weights_only=True)


@pytest.mark.parametrize("wrong", ["nope", "hf://org/name", "org/name@branch", "a/b/c"])
def test_a_repository_has_two_parts(wrong: str, tmp_path: Path) -> None:
    options: Any = {"push_to_hub": wrong}
    with pytest.raises(UsageError, match="is not the name of a repository of the Hub"):
        consolidate(CHECKPOINT, tmp_path / "out", weights_only=True, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [True, False])
def test_the_bars_of_the_hub_are_off_while_it_uploads(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils.tqdm import progress_bar_states

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setitem(progress_bar_states, "_global", before)
    seen: list[bool] = []

    def uploading(self: HfApi, **_: Any) -> SimpleNamespace:
        seen.append(are_progress_bars_disabled())
        return SimpleNamespace(commit_url="made")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", uploading)
    output = HubOutput(parsed("hf://org/model"), False, Patience())
    assert output.upload(tmp_path, "message", False) == "made"
    assert seen == [True]
    assert are_progress_bars_disabled() is not before


@pytest.fixture
def failing_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[str]]]:
    """A Hub without files, whose first commit is denied; the weights' inode and all names of each upload."""
    from huggingface_hub import HfApi

    asked: list[tuple[int, set[str]]] = []

    def uploading(self: HfApi, *, folder_path: Path, **_: Any) -> SimpleNamespace:
        files = {path.name: path for path in folder_path.iterdir()}
        asked.append((files["model.safetensors"].stat().st_ino, set(files)))
        if len(asked) == 1:
            raise StoreFailed("the store denies access", path="org/model", hint="Check it.")
        return SimpleNamespace(commit_url="made")

    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, *_, **__: [])
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", uploading)
    return asked


def test_an_upload_to_the_hub_that_failed_sends_the_same_directory(
    failing_hub: list[tuple[int, set[str]]], tmp_path: Path
) -> None:
    """--resume does not convert again."""
    options: dict[str, Any] = {"weights_only": True, "scratch": tmp_path}
    with pytest.raises(StoreFailed, match="--resume sends what is missing"):
        consolidate(CHECKPOINT, "hf://org/model", **options)
    report = consolidate(CHECKPOINT, "hf://org/model", resume=True, **options)
    assert report.notes[-1] == "uploaded as one commit: made"
    assert failing_hub[0] == failing_hub[1]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_could_not_be_pushed_is_complete(
    failing_hub: list[tuple[int, set[str]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreFailed, match=r"out is complete\. hf upload sends it, too\."):
        consolidate(CHECKPOINT, out, weights_only=True, push_to_hub="org/model")
    assert set(files_of(out)) == failing_hub[0][1]


# The process dies before it asks for the commit, so the branch has no file of the output yet.
_KILLED_AT_THE_HUB = """
import os, signal, sys
from ckpt_tools import consolidate
from huggingface_hub import HfApi

HfApi.upload_folder = lambda self, **_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint, address, scratch = sys.argv[1:]
consolidate(checkpoint, address, weights_only=True, scratch=scratch)
"""


@pytest.mark.slow
def test_an_upload_to_the_hub_that_was_killed_continues(tmp_path: Path) -> None:
    with hubs.serving() as hub:
        scratch, address = tmp_path / "scratch", "hf://org/model"
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
        }

        def run(*command: object) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, *map(str, command)],
                check=False,
                capture_output=True,
                text=True,
                env=variables,
            )

        ended = run("-c", _KILLED_AT_THE_HUB, CHECKPOINT, address, scratch)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert hub.repositories["org/model"]["main"] == {}
        (made,) = scratch.rglob("model.safetensors")
        weights = made.read_bytes()
        command = ["consolidate", CHECKPOINT, address, "--weights-only", "--scratch", scratch]
        ended = run("-m", "ckpt_tools", *command, "--resume")
        assert ended.returncode == 0, ended.stderr
        assert hub.repositories["org/model"]["main"]["model.safetensors"] == weights
        assert len(hub.commits) == 1
        assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_the_hub_gets_one_commit_and_is_read_back(tmp_path: Path) -> None:
    with hubs.serving() as hub:
        hub.refuse_commits = 1

        def run(*command: object) -> str:
            ended = subprocess.run(
                [sys.executable, "-m", "ckpt_tools", *map(str, command)],
                capture_output=True,
                text=True,
                check=False,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "0",
                    "HF_ENDPOINT": hub.url,
                    "HF_TOKEN": "hf_hidden",
                    "HF_HOME": str(tmp_path / "home"),
                    "TMPDIR": str(tmp_path),
                },
            )
            assert "hf_hidden" not in ended.stdout + ended.stderr
            return f"{ended.returncode} {ended.stdout} {ended.stderr}"

        said = run("consolidate", CHECKPOINT, "hf://org/model@trial", "--weights-only", "--private")
        assert said.startswith("0 "), said
        consolidate(CHECKPOINT, tmp_path / "out", weights_only=True)
        assert hub.repositories["org/model"]["trial"] == files_of(tmp_path / "out")
        assert len(hub.commits) == 1
        assert hub.private == {"org/model"}
        assert run("consolidate", CHECKPOINT, "hf://org/model@trial", "--weights-only")[0] == "2"
        said = run("verify", "hf://org/model@trial", "--against", CHECKPOINT)
        assert "bit for bit" in " ".join(said.split()), said
        out = tmp_path / "pushed"
        said = run("consolidate", CHECKPOINT, out, "--weights-only", "--push-to-hub", "org/other")
        assert said.startswith("0 "), said
        assert hub.repositories["org/other"]["main"] == files_of(out)
        assert hub.tokens >= {"Bearer hf_hidden"}
