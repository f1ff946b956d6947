"""The Trainer's callback saves when it should, keeps what it should, and removes only what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import training
from ckpt_tools.errors import OutputExists, OutputFailed, UsageError

# transformers' Trainer takes seconds to import: where it is used.
pytestmark = pytest.mark.slow

LEDGER = ".clean-checkpoints.json"
ROWS = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 8


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def train(model: Any, tmp_path: Path, callback: Any, steps: int) -> None:
    """Some real steps of the real Trainer."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback]).train()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {LEDGER}


def callback(directory: Path, **options: Any) -> Any:
    return training.CleanCheckpointCallback(directory, weights_only=True, **options)


def later(directory: Path, **options: Any) -> Any:
    """A callback whose run is ten steps on."""

    class Later(training.CleanCheckpointCallback):
        def _save(self, state: Any, parts: dict[str, Any]) -> None:
            state.global_step += 10
            try:
                super()._save(state, parts)
            finally:
                state.global_step -= 10

    return Later(directory, every=1, weights_only=True, **options)


def test_saves_every_so_many_steps_and_at_the_end(model: Any, tmp_path: Path) -> None:
    clean = tmp_path / "clean"

    train(model, tmp_path, callback(clean, every=2), 5)

    assert names(clean) == {"step-2", "step-4", "step-5"}
    last = load_file(clean / "step-5" / "model.safetensors")
    assert all(torch.equal(last[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(
        last["lm_head.weight"],
        load_file(clean / "step-2" / "model.safetensors")["lm_head.weight"],
    )


def test_the_config_loses_what_the_trainer_set_for_itself(model: Any, tmp_path: Path) -> None:
    """A conversion of the Trainer's checkpoint sets it right, and a save writes the same file."""
    assert model.config.use_cache

    train(model, tmp_path, training.CleanCheckpointCallback(tmp_path / "clean", every=1), 1)

    assert not model.config.use_cache, "the Trainer sets it"
    assert json.loads((tmp_path / "clean" / "step-1" / "config.json").read_text())["use_cache"]


def test_a_last_step_that_was_saved_is_not_saved_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []

    def noting(model: Any, target: Path, **options: Any) -> None:
        saved.append(target.name)
        training.save(model, target, **options)

    monkeypatch.setattr("ckpt_tools.training.callback.save", noting)
    train(model, tmp_path, callback(tmp_path / "clean", every=2), 4)
    train(model, tmp_path, callback(tmp_path / "none", every=9, at_end=False), 1)

    assert saved == ["step-2", "step-4"]
    assert not (tmp_path / "none").exists()


def test_keeps_the_last_ones_and_whatever_is_not_its_own(model: Any, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    (clean / "step-0").mkdir(parents=True)
    (clean / "step-0" / "mine").write_text("somebody's")
    train(model, tmp_path, callback(clean, every=1, at_end=False), 2)
    (clean / "step-1" / "scores.json").write_text("somebody's too")

    # Another callback of a later run knows them by the ledger.
    train(model, tmp_path, later(clean, keep_last=1), 2)

    # step-1 has a file that the callback did not write, and step-2 has not.
    assert names(clean) == {"step-0", "step-1", "step-12"}
    assert names(clean / "step-1") == {"scores.json", *names(clean / "step-12")}
    assert list(json.loads((clean / LEDGER).read_text())) == ["step-12"]


def test_removes_nothing_where_the_new_one_fails(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = tmp_path / "clean"
    train(model, tmp_path, callback(clean, every=1), 1)

    def full(*_: object, **__: object) -> None:
        raise OutputFailed("no space left on the output's disk")

    monkeypatch.setattr("ckpt_tools.writing.shares.write", full)
    with pytest.raises(OutputFailed):
        train(model, tmp_path, later(clean, keep_last=1), 1)

    assert names(clean) == {"step-1"}


def test_a_run_that_is_resumed_writes_the_same_step_again(model: Any, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    train(model, tmp_path, callback(clean, every=1), 1)
    before = load_file(clean / "step-1" / "model.safetensors")

    train(model, tmp_path, callback(clean, every=1), 1)

    after = load_file(clean / "step-1" / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_directory_of_somebody_else_is_not_replaced(model: Any, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    train(model, tmp_path, callback(clean, every=1), 1)
    (clean / "step-1" / "model.safetensors").write_bytes(b"changed")

    with pytest.raises(OutputExists):
        train(model, tmp_path, callback(clean, every=1), 1)

    assert (clean / "step-1" / "model.safetensors").read_bytes() == b"changed"


def test_numbers_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for every, keep_last in ((0, None), (1, 0)):
        with pytest.raises(UsageError, match="both must be 1 or more"):
            callback(tmp_path, every=every, keep_last=keep_last)
