"""Links that leave the directory that was named are refused, unless the caller trusts the directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import consolidate, extract_lora, merge_lora
from ckpt_tools.errors import UsageError
from tests.conftest import FIXTURES

CASE = FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks"
SECRET = "TOP-SECRET-KEY"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CASE / "hf", tmp_path / "hf"))


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt",
        "tokenizer.model",
        "additional_chat_templates/x.jinja",
        "preprocessor_config.json",
    ],
)
def test_a_file_that_links_out_of_its_directory_is_not_copied(
    tmp_path: Path, model: Path, secret: Path, name: str
) -> None:
    secret.write_text("{}")
    link = model / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)

    with pytest.raises(UsageError, match="leads out of") as caught:
        consolidate(CASE / "checkpoint", tmp_path / "out", config=model, tokenizer=model)

    assert caught.value.path == link
    assert str(secret) in caught.value.fact
    assert "--follow-links" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    options = {"config": model, "tokenizer": model, "follow_links": True}
    consolidate(CASE / "checkpoint", tmp_path / "out", **options)
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_a_config_that_links_out_of_its_directory_is_not_read(tmp_path: Path, model: Path) -> None:
    (model / "config.json").rename(tmp_path / "elsewhere.json")
    (model / "config.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(UsageError, match="leads out of"):
        consolidate(CASE / "checkpoint", tmp_path / "out", config=model)

    consolidate(
        CASE / "checkpoint", tmp_path / "out", config=model / "config.json", tokenizer=model
    )


def test_a_link_within_its_directory_and_a_directory_that_is_a_link_are_followed(
    tmp_path: Path, model: Path
) -> None:
    (model / "tokenizer.json").rename(model / "own.json")
    (model / "tokenizer.json").symlink_to("own.json")
    (tmp_path / "named").symlink_to(model)

    named = tmp_path / "named"
    consolidate(CASE / "checkpoint", tmp_path / "out", config=named, tokenizer=named)

    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "own.json").read_bytes()


def test_the_cache_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted((CASE / "hf").iterdir())):
        shutil.copyfile(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    consolidate(CASE / "checkpoint", tmp_path / "out", config=snapshot, tokenizer=snapshot)

    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()

    (tmp_path / "models--other" / "blobs").mkdir(parents=True)
    other = tmp_path / "models--other" / "blobs" / "0"
    other.write_text(SECRET)
    (snapshot / "vocab.txt").symlink_to(other)
    with pytest.raises(UsageError, match="leads out of"):
        consolidate(CASE / "checkpoint", tmp_path / "out2", config=snapshot, tokenizer=snapshot)


def test_a_tag_that_links_out_of_the_checkpoint_is_not_followed(tmp_path: Path) -> None:
    root = Path(shutil.copytree(CASE / "checkpoint", tmp_path / "run"))
    tag = (root / "latest").read_text().strip()
    (root / tag).rename(tmp_path / "elsewhere")
    (root / tag).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UsageError, match="leads out of") as caught:
        consolidate(root, tmp_path / "out", weights_only=True)

    assert caught.value.path == root / tag
    consolidate(root, tmp_path / "out", weights_only=True, follow_links=True)
    consolidate(root / tag, tmp_path / "direct", weights_only=True)


def test_a_shard_that_links_out_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    root = Path(shutil.copytree(CASE / "checkpoint", tmp_path / "run"))
    shard = next(root.rglob("*rank_1_mp*optim_states.pt"))
    elsewhere = shard.rename(tmp_path / "elsewhere.pt")
    shard.symlink_to(elsewhere)

    with pytest.raises(UsageError, match="leads out of") as caught:
        consolidate(root, tmp_path / "out", weights_only=True)

    assert caught.value.path == shard
    assert not (tmp_path / "out").exists()
    consolidate(root, tmp_path / "out", weights_only=True, follow_links=True)
    elsewhere.rename(shard.with_name("own"))
    shard.unlink()
    shard.symlink_to("own")
    consolidate(root, tmp_path / "within", weights_only=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_links_out_of_its_directory_is_not_read(tmp_path: Path, name: str) -> None:
    case = FIXTURES / "peft" / "zero3-olmo2-lora-frozen-excluded"
    adapter = Path(shutil.copytree(case / "truth" / "adapter", tmp_path / "adapter"))
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    options: Any = {"adapter_dir": adapter, "weights_only": True}
    base = case / "base"

    with pytest.raises(UsageError, match="leads out of") as caught:
        merge_lora(base, tmp_path / "out", **options)

    assert caught.value.path == adapter / name
    merge_lora(base, tmp_path / "out", follow_links=True, **options)


def test_an_adapter_config_near_a_checkpoint_that_links_out_is_not_read(tmp_path: Path) -> None:
    case = FIXTURES / "peft" / "zero2-olmo2-lora"
    root = Path(shutil.copytree(case / "checkpoint", tmp_path / "run"))
    config = case / "truth" / "adapter" / "adapter_config.json"
    (root / "adapter_config.json").symlink_to(config)

    with pytest.raises(UsageError, match="leads out of"):
        extract_lora(root, tmp_path / "out")

    extract_lora(root, tmp_path / "out", adapter_config=config)
    extract_lora(root, tmp_path / "out2", adapter_config=config.parent)
