"""Whatever holds weights can be opened by those who only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import DamagedCheckpoint, NotACheckpoint, UsageError
from ckpt_tools.readers.opening import open_weights
from tests.conftest import FIXTURES

ZERO = FIXTURES / "zero" / "zero2-bf16-llama-two-saves-2ranks"
ADAPTER = FIXTURES / "peft" / "zero2-olmo2-two-adapters" / "truth" / "adapter"
TRAINER = FIXTURES / "accelerate" / "trainer-lora" / "checkpoint" / "checkpoint-2"


def test_a_checkpoint_is_what_the_readers_find() -> None:
    opened = open_weights(ZERO / "checkpoint", "global_step2")

    assert (opened.location.format, opened.step) == ("deepspeed", 2)
    assert open_weights(ZERO / "checkpoint").step == 4
    with pytest.raises(UsageError, match="no checkpoint with the tag 'global_step3'"):
        open_weights(ZERO / "checkpoint", "global_step3")


def test_a_file_is_the_file_that_was_named(tmp_path: Path) -> None:
    """Beside an index, or among the shards of one, it is still that file and no other."""
    for name in ("model", "model-00001-of-00002", "other"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")

    for name in ("model", "model-00001-of-00002", "other"):
        opened = open_weights(tmp_path / f"{name}.safetensors")
        assert [*opened] == [name]
        assert (opened.title, opened.location.name) == ("safetensors file", f"{name}.safetensors")
        assert torch.equal(opened[name].load(), torch.ones(2))


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth"])
def test_a_torch_file_with_a_state_dict(name: str, tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    torch.save({"a": shared, "b": shared, "c": torch.ones(1)}, tmp_path / name)

    opened = open_weights(tmp_path / name)

    assert opened.title == "torch file"
    assert {*opened.weights} == {"a", "c"}
    assert opened.ties == {"b": "a"}
    assert torch.equal(opened["b"].load(), shared)


@pytest.mark.parametrize("directory", [ADAPTER, ADAPTER / "second", TRAINER], ids=lambda p: p.name)
def test_an_adapter_has_the_names_of_its_file(directory: Path) -> None:
    opened = open_weights(directory)

    truth = load_file(directory / "adapter_model.safetensors")
    assert {*opened} == {*truth}
    assert (opened.title, opened.location.format) == ("PEFT adapter", "peft")
    assert opened.location.name == directory.name
    assert all(torch.equal(opened[name].load(), value) for name, value in truth.items())


def test_an_adapter_may_be_pickled(tmp_path: Path) -> None:
    torch.save({"x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.bin")

    assert [*open_weights(tmp_path)] == ["x.lora_A.weight"]


def test_what_holds_no_weights_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    torch.save({"step": 3, "optimizer": {"lr": 0.1}}, tmp_path / "optimizer.pt")

    with pytest.raises(NotACheckpoint, match=r"notes\.txt"):
        open_weights(tmp_path)
    with pytest.raises(NotACheckpoint, match="no checkpoint of a known format"):
        open_weights(tmp_path / "notes.txt")
    with pytest.raises(NotACheckpoint, match="no such file or directory"):
        open_weights(tmp_path / "nowhere.safetensors")
    with pytest.raises(NotACheckpoint, match="no checkpoint of a known format"):
        open_weights(tmp_path / "optimizer.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(DamagedCheckpoint, match="not a complete safetensors file"):
        open_weights(tmp_path / "cut.safetensors")
