"""Checkpoints in a bucket become the directories that the same files on this machine become."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import average, consolidate, diff, extract_lora, inspect, merge_lora, verify
from ckpt_tools.errors import CkptError, NotACheckpoint, StoreFailed, UsageError
from ckpt_tools.storage.places import LOCAL
from ckpt_tools.storage.remote import ranges
from ckpt_tools.storage.remote.ranges import REMOTE
from tests.conftest import FIXTURES
from tests.support.ranks.launching import launch
from tests.support.remote import hub as hubs
from tests.support.remote.s3 import BUCKET, S3, VARIABLES

ZERO3 = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
LORA = FIXTURES / "zero" / "zero2-bf16-olmo2-lora-2ranks"
QUICK = [
    "zero/zero3-bf16-olmo2-chat-2ranks",
    "zero/zero2-bf16-llama-3ranks",
    "dcp/fsdp2-model-3ranks",
    "dcp/hf-storage-3ranks",
    "layouts/universal-zero3-bf16-qwen3-tied-2ranks",
    "rank_files/verl-fsdp1-3ranks",
]
MANIFEST = "ckpt_tools_manifest.json"


def fixtures() -> list[Path]:
    """Every shipped directory that holds a checkpoint."""
    found = {path.parent for path in FIXTURES.rglob("checkpoint*") if path.is_dir()}
    return sorted(path for path in found if not any(a in found for a in path.parents))


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def converted(base: str | Path, source: Path, out: Path) -> dict[str, Any] | tuple[str, str]:
    """The files of the output, the manifest without the place of the source; or the refusal."""
    (name, *_) = sorted(
        path.name for path in source.iterdir() if path.name.startswith("checkpoint")
    )
    try:
        consolidate(f"{base}/{name}", out, weights_only=True)
    except CkptError as error:
        return type(error).__name__, error.fact.replace(str(base), "")
    found: dict[str, Any] = dict(files_of(out))
    manifest = json.loads(found.pop(MANIFEST))
    assert manifest["sources"][0].pop("path").startswith(str(base))
    manifest.pop("xxh3_128")
    manifest.pop("request", None)
    return found | {MANIFEST: manifest}


def assert_alike(source: Path, store: S3, tmp_path: Path) -> None:
    address = store.put(source, source.relative_to(FIXTURES).as_posix())
    there = converted(address, source, tmp_path / "there" / source.name)
    assert there == converted(source, source, tmp_path / "here" / source.name), source


@pytest.mark.slow
@pytest.mark.parametrize("source", QUICK)
def test_an_output_has_the_same_bytes(source: str, store: S3, tmp_path: Path) -> None:
    assert_alike(FIXTURES / source, store, tmp_path)


@pytest.mark.slow
def test_every_fixture_has_the_same_bytes(store: S3, tmp_path: Path) -> None:
    """With STORES=1 each of them, otherwise one of thirty; all take three minutes."""
    sources = fixtures()
    assert len(sources) > 150
    for source in sources if os.environ.get("STORES") else sources[::30]:
        assert_alike(source, store, tmp_path)


@pytest.mark.slow
def test_every_option_takes_an_address(store: S3, tmp_path: Path) -> None:
    run, lora = store.put(ZERO3, "options/run"), store.put(LORA, "options/lora")
    out = tmp_path / "out"
    consolidate(
        f"{run}/checkpoint",
        out,
        config=f"{run}/hf",
        tokenizer=f"{run}/hf",
    )
    here = tmp_path / "here"
    consolidate(
        ZERO3 / "checkpoint",
        here,
        config=ZERO3 / "hf",
        tokenizer=ZERO3 / "hf",
    )
    assert files_of(out).keys() == files_of(here).keys()
    assert all(
        files_of(out)[name] == data for name, data in files_of(here).items() if name != MANIFEST
    )
    model = store.put(out, "options/model")
    found = verify(
        model,
        against=f"{run}/checkpoint",
        read_data=True,
        like=f"{run}/hf",
        trust_remote_code=False,
    )
    assert [p for p in found.problems if p.severity == "error"] == []
    assert found.tensors == 25
    assert diff(model, ZERO3 / "checkpoint").is_empty
    average([f"{run}/checkpoint", ZERO3 / "checkpoint"], tmp_path / "mean", like=model)
    assert (tmp_path / "mean" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
    extract_lora(f"{lora}/checkpoint", tmp_path / "adapter", lora_alpha=8, base_model="base")
    adapter = store.put(tmp_path / "adapter", "options/adapter")
    merge_lora(f"{lora}/checkpoint", tmp_path / "one", weights_only=True, adapter_config=adapter)
    merge_lora(
        LORA / "checkpoint",
        tmp_path / "two",
        weights_only=True,
        adapter_config=tmp_path / "adapter",
    )
    merged = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert merged[0] == merged[1]


@pytest.mark.slow
def test_folders_of_a_store_and_of_this_machine_are_read_as_one(store: S3, tmp_path: Path) -> None:
    import shutil

    here = tmp_path / "checkpoint"
    shutil.copytree(ZERO3 / "checkpoint", here)
    there = store.put(here, "also/checkpoint")
    for path in here.rglob("*rank_1*"):
        path.unlink()
    for key in store.keys("also/checkpoint"):
        if "pp_rank_0" in key:
            store.client.delete_object(Bucket=BUCKET, Key=key)
    consolidate(ZERO3 / "checkpoint", tmp_path / "whole", weights_only=True)
    consolidate(here, tmp_path / "a", weights_only=True, also=[there])
    consolidate(there, tmp_path / "b", weights_only=True, also=[here])
    whole, *parts = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "a", "b")
    ]
    assert parts == [whole, whole]


@pytest.mark.slow
def test_two_ranks_of_torchrun_read_one_bucket(store: S3, tmp_path: Path) -> None:
    address = store.put(ZERO3, "ranks")
    consolidate(ZERO3 / "checkpoint", tmp_path / "here", weights_only=True)
    command = ["-m", "ckpt_tools", "consolidate", f"{address}/checkpoint", tmp_path / "there"]
    ended = launch([*command, "--weights-only"], ranks=2)
    assert ended.status == 0, ended.said
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert found[0] == found[1]


def test_credentials_are_in_no_manifest_and_no_message(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.put(ZERO3 / "checkpoint", "secrets")
    consolidate(address, tmp_path / "out", weights_only=True)
    secret = VARIABLES["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret.encode() in data for data in files_of(tmp_path / "out").values())
    with pytest.raises(UsageError) as raised:
        inspect("https://user:hidden@host/run?X-Amz-Signature=hidden")
    assert "hidden" not in str(raised.value)
    with pytest.raises(StoreFailed, match="no such bucket"):
        inspect("s3://nowhere/run")


def test_the_files_of_the_aws_command_line_are_read(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.put(ZERO3 / "checkpoint", "profile")
    (tmp_path / "credentials").write_text(
        "[team]\naws_access_key_id = testing\naws_secret_access_key = abc\n"
    )
    (tmp_path / "config").write_text(
        f"[profile team]\nregion = eu-west-1\nendpoint_url = {store.url}\n"
    )
    for name in (*VARIABLES, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert inspect(address).parameters == 27_888


def test_a_process_that_is_offline_does_not_ask_the_hub() -> None:
    with pytest.raises(StoreFailed, match="HF_HUB_OFFLINE forbids requests"):
        inspect("hf://org/runs/checkpoint")


@pytest.mark.slow
def test_a_repository_of_the_hub_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    sources = [FIXTURES / source for source in QUICK]
    with hubs.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.repositories["org/runs"] = {"trial": {}, "main": {}}
        for source in sources:
            for name, data in files_of(source).items():
                hub.repositories["org/runs"]["trial"][f"{source.name}/{name}"] = data
        for source in sources:
            address = f"hf://org/runs@trial/{source.name}"
            (name, *_) = sorted(path.name for path in source.glob("checkpoint*"))
            there, here = inspect(f"{address}/{name}"), inspect(source / name)
            assert (there.parameters, there.step) == (here.parameters, here.step)
            made = converted(address, source, tmp_path / "there" / source.name)
            assert made == converted(source, source, tmp_path / "here" / source.name), source
        with pytest.raises(NotACheckpoint, match="no such file or directory"):
            inspect("hf://org/runs@main/checkpoint")


def test_inspect_asks_for_metadata_alone(store: S3) -> None:
    from ckpt_tools.storage.naming import as_path
    from ckpt_tools.storage.remote.trees import StoreTree

    address = store.put(ZERO3 / "checkpoint", "metadata")
    inspect(address)
    tree = as_path(address).pool  # type: ignore[attr-defined]
    assert isinstance(tree, StoreTree)
    # Four small files of torch and the pointer; the step of each rank lies in them.
    assert tree.store.ranges.traffic.requests == 5


def test_the_records_of_a_large_file_take_two_requests(
    store: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start and its end; the directory of a zip is read in many short reads."""
    from ckpt_tools.readers.containers.records import Records
    from ckpt_tools.storage.naming import as_path

    monkeypatch.setattr(ranges, "_SMALL_BYTES", 0)
    monkeypatch.setattr(ranges, "_HEAD_BYTES", 1 << 10)
    monkeypatch.setattr(ranges, "_TAIL_BYTES", 4 << 10)
    (here,) = (ZERO3 / "checkpoint").rglob("bf16_zero_pp_rank_0*")
    there = as_path(store.put(here.parent, "records")) / here.name
    with Records(there, "") as far, Records(here, "") as near:
        assert far.signature == near.signature
        assert far
    assert there.pool.store.ranges.traffic.requests == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("mebibytes", [1, 2, 8, 32])
def test_buffers_do_not_grow_with_the_number_of_ranks(mebibytes: int) -> None:
    """With many ranks, a block holds a piece of each."""
    block = mebibytes << 20
    assert LOCAL.threads_for(block) is None
    threads = REMOTE.threads_for(block)
    assert threads is not None
    assert 1 <= threads <= REMOTE.threads
    assert threads == REMOTE.threads or (threads + 1) * 3 * block > REMOTE.buffer_bytes
    assert threads * 3 * block <= REMOTE.buffer_bytes


@pytest.mark.slow
def test_a_local_run_imports_no_client_of_a_store() -> None:
    script = (
        "import sys\n"
        "from ckpt_tools import consolidate, inspect\n"
        f"inspect({str(ZERO3 / 'checkpoint')!r})\n"
        "found = [name for name in sys.modules if 'obstore' in name or '.storage.remote' in name]\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_without_the_package_a_run_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match="obstore, which is not installed") as raised:
        inspect("s3://bucket/run")
    assert raised.value.hint == "Install it: pip install 'ckpt-tools[remote]'."
