"""Hugging Face model directories as input, written by the real ``save_pretrained`` and ``torch.save``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools import consolidate, open_checkpoint, readers
from ckpt_tools.errors import CkptError, DamagedCheckpoint
from tests.support.readers.contract import assert_same

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def live() -> torch.nn.Module:
    """A small real model with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="module", params=["one file", "shards"])
def directory(
    request: pytest.FixtureRequest, live: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("saved")
    size = "1KB" if request.param == "shards" else "1GB"
    live.save_pretrained(path, max_shard_size=size)  # type: ignore[operator]
    assert len(list(path.glob("*.safetensors"))) > 1 or request.param == "one file"
    return path


def test_a_saved_model_is_read_whole(directory: Path, live: torch.nn.Module) -> None:
    checkpoint = open_checkpoint(directory)
    state = live.state_dict()
    assert set(state) - set(checkpoint) == {
        "lm_head.weight"
    }  # tied, and left out by save_pretrained
    for name in checkpoint:
        assert_same(checkpoint[name].load(), state[name], name)


def test_its_facts_are_those_of_the_files(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    shards = {path: path.stat().st_size for path in directory.glob("*.safetensors")}
    assert checkpoint.title == "Hugging Face safetensors"
    assert dict(checkpoint.files) == shards
    assert checkpoint.details == {"shards": len(shards)}
    assert checkpoint.training_dtype == torch.bfloat16
    assert (checkpoint.step, checkpoint.world_size) == (None, None)
    assert checkpoint.framework == f"transformers {version('transformers')}"
    assert {weight.kind for weight in checkpoint.weights.values()} == {"parameter"}


@pytest.mark.parametrize("config", [None, "{", "[]", '{"transformers_version": 5}', "[" * 100_000])
def test_a_version_that_is_not_recorded_is_none(config: str | None, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    assert open_checkpoint(tmp_path).framework is None


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        (["rng_state.pth"], 1),
        (["rng_state_0.pth", "rng_state_2.pth", "rng_state_10.pth"], 11),
        (["rng_state_best.pth"], None),
    ],
)
def test_the_trainers_ranks_each_left_a_random_state(
    names: list[str], ranks: int | None, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in names:
        (tmp_path / name).touch()
    assert open_checkpoint(tmp_path).world_size is None

    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')

    assert (open_checkpoint(tmp_path).step, open_checkpoint(tmp_path).world_size) == (3, ranks)


def test_both_copies_are_the_one_that_there_is(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    assert dict(checkpoint.catalogue("master")) == dict(checkpoint.catalogue("model"))


def test_a_file_of_it_means_the_directory(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    entry = index if index.exists() else directory / "model.safetensors"
    location = readers.locate(entry)
    assert (location.format, location.directory) == ("huggingface", directory)
    assert location.near == (directory, directory.parent)


def bins(path: Path, *shards: Tensors) -> Path:
    """A directory of ``.bin`` files as transformers wrote them until version 4."""
    path.mkdir(exist_ok=True)
    if len(shards) == 1:
        torch.save(shards[0], path / "pytorch_model.bin")
        return path
    names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, path / name)
    weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def test_a_bin_file_is_read_and_its_sharing_found(live: torch.nn.Module, tmp_path: Path) -> None:
    state = live.state_dict()
    checkpoint = open_checkpoint(bins(tmp_path / "m", state))
    assert checkpoint.title == "Hugging Face torch"
    assert dict(checkpoint.ties) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(checkpoint) == set(state)
    for name, truth in state.items():
        assert_same(checkpoint[name].load(), truth, name)


def test_bin_shards_are_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    first, second = {"z": torch.ones(2), "y": torch.zeros(3)}, {"a": torch.arange(4.0)}
    checkpoint = open_checkpoint(bins(tmp_path / "m", first, second))
    assert list(checkpoint) == ["z", "y", "a"]
    for name, truth in (first | second).items():
        assert_same(checkpoint[name].load(), truth, name)


def test_a_square_matrix_and_its_transpose_are_not_one_tensor(tmp_path: Path) -> None:
    """They share their bytes, their place and their shape, and hold different values."""
    square = torch.arange(9.0).view(3, 3)
    checkpoint = open_checkpoint(bins(tmp_path / "m", {"a": square, "b": square.t()}))
    assert dict(checkpoint.ties) == {}
    assert_same(checkpoint["a"].load(), square, "a")
    assert_same(checkpoint["b"].load(), square.t().contiguous(), "b")


def test_views_of_one_storage_are_tensors_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tensors = {"first": whole[:3], "second": whole[3:], "whole": whole, "square": whole.view(2, 3)}
    checkpoint = open_checkpoint(bins(tmp_path / "m", tensors))
    assert dict(checkpoint.ties) == {}
    for name, truth in tensors.items():
        assert_same(checkpoint[name].load(), truth, name)


def test_empty_tensors_are_not_tied_to_each_other(tmp_path: Path) -> None:
    tensors = {"a": torch.empty(0), "b": torch.empty(0, 3), "c": torch.empty(0)}
    checkpoint = open_checkpoint(bins(tmp_path / "m", tensors))
    assert dict(checkpoint.ties) == {}
    assert {name: checkpoint[name].shape for name in checkpoint} == {
        "a": (0,),
        "b": (0, 3),
        "c": (0,),
    }


def test_safetensors_are_taken_before_bin_files(tmp_path: Path) -> None:
    path = bins(tmp_path / "m", {"a": torch.zeros(1)})
    save_file({"a": torch.ones(1)}, path / "model.safetensors")
    assert open_checkpoint(path)["a"].load().tolist() == [1]


def test_shards_are_taken_before_a_single_file_of_an_earlier_save(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")
    assert {name: tensor.load().tolist() for name, tensor in open_checkpoint(path).items()} == {
        "a": [1, 1],
        "b": [1, 1, 1],
    }


# Damage.


def sharded(tmp_path: Path) -> Path:
    """Two safetensors shards and their index."""
    path = tmp_path / "sharded"
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, path / "model-00002-of-00002.safetensors")
    write_index(
        path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    )
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(path)
    return caught.value


def test_a_shard_that_the_index_does_not_name_is_reported(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, path / "model-00003-of-00003.safetensors")

    found = open_checkpoint(path)

    assert set(found) == {"a", "b"}
    (remark,) = found.remarks
    assert "model-00003-of-00003.safetensors" in remark
    assert remark.endswith("tensors that only they hold: c")
    assert found.unlisted == {"c": path / "model-00003-of-00003.safetensors"}


def test_an_index_that_leaves_out_a_shard_that_the_model_needs_is_refused(
    tmp_path: Path, fixtures: Path
) -> None:
    """With the shard's name: the tensors are there, so they are not frozen ones that were left out."""
    model = fixtures / "peft" / "zero3-olmo2-patterns" / "truth" / "merged"
    source = tmp_path / "source"
    consolidate(model, source, card=False, max_shard_size=2_000)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    last = max(weight_map.values())
    kept = {name: file for name, file in weight_map.items() if file != last}
    index.write_text(json.dumps({"weight_map": kept}))

    with pytest.raises(DamagedCheckpoint, match="the model needs tensors that it holds") as caught:
        consolidate(source, tmp_path / "out", card=False)

    assert caught.value.path == source / last
    assert set(caught.value.missing) == set(weight_map) - set(kept)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / "model-00002-of-00002.safetensors").unlink()
    error = refusal(path)
    assert isinstance(error, DamagedCheckpoint)
    assert error.missing == ("model-00002-of-00002.safetensors",)
    assert error.fact == "a shard in the index is missing"
    assert error.exit_code == 4


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    shard = path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(path).path == shard


def test_a_tensor_that_the_index_names_and_no_shard_has_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    write_index(
        path,
        {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    )
    error = refusal(path)
    assert (error.fact, error.tensor) == ("index and shards differ in 1 tensor", "c")


def test_a_tensor_that_the_index_does_not_name_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    extra = {"b": torch.ones(3), "stray": torch.ones(1)}
    save_file(extra, path / "model-00002-of-00002.safetensors")
    assert refusal(path).tensor == "stray"


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, path / "model-00002-of-00002.safetensors")
    error = refusal(path)
    assert (error.fact, error.tensor) == ("it is in two shards", "a")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."]
)
def test_an_index_that_leads_outside_is_not_followed(shard: str, tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (path / "sub").mkdir()
    save_file({"a": torch.ones(2)}, path / "sub" / "model.safetensors")
    write_index(path, {"a": shard})
    assert isinstance(refusal(path), DamagedCheckpoint)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = sharded(tmp_path)
    index = path / "model.safetensors.index.json"
    index.write_text(text)
    error = refusal(path)
    assert isinstance(error, DamagedCheckpoint)
    assert error.path == index
    assert error.fact.startswith("not an index of shards")


CONTENTS: dict[str, Callable[[], object]] = {
    "a list": lambda: [torch.ones(1)],
    "a tensor": lambda: torch.ones(1),
    "a whole training state": lambda: {"model": {"a": torch.ones(1)}, "step": 3},
    "a number among tensors": lambda: {"a": torch.ones(1), "step": 3},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_bin_file_that_holds_no_state_dict_is_refused(kind: str, tmp_path: Path) -> None:
    torch.save(CONTENTS[kind](), tmp_path / "pytorch_model.bin")
    error = refusal(tmp_path)
    assert isinstance(error, DamagedCheckpoint)
    assert error.fact in ("its content is not a state dict", "it is not a tensor")


def test_weights_that_went_away_meanwhile_are_said_to_be_gone(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    location = readers.locate(path)
    shutil.rmtree(path)
    path.mkdir()
    with pytest.raises(DamagedCheckpoint, match="the files of its weights no longer exist"):
        readers.read(location)
