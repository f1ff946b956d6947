"""One look at a run: what is a save, and what is known of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ckpt_tools.conversion.watching.saves import look_at
from tests.conftest import FIXTURES

TRAINER = FIXTURES / "accelerate" / "trainer-plain" / "checkpoint" / "checkpoint-2"
ZERO = FIXTURES / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"


def made(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_saves_are_directories_with_weights_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "run" / "models"
    for name in ("step_10", "step_9", "best", "epoch=1-step=200.ckpt/checkpoint"):
        made(run / name / "model.safetensors")
    made(out / "step_9" / "model.safetensors")
    made(run / "logs_3" / "events.out")
    made(run / "model.safetensors")
    for temporary in ("tmp-checkpoint-11", ".hidden", "step12-tmp", "x.partial-0a"):
        made(run / temporary / "model.safetensors")
    os.symlink("step_10", run / "last")

    look = look_at(run, out)

    assert [save.name for save in look.saves] == [
        "step_9",
        "step_10",
        "epoch=1-step=200.ckpt",
        "best",
    ]
    assert [save.number for save in look.saves] == [9, 10, 200, None]
    assert look.linked == {"step_10"}
    assert look_at(tmp_path / "not yet", out).saves == ()


def test_what_the_trainer_and_deepspeed_say_is_read(tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "zero")
    look = look_at(tmp_path / "zero", tmp_path / "out")
    assert [save.name for save in look.saves] == ["global_step2", "global_step4"]
    assert look.latest == "global_step4"

    shutil.copytree(TRAINER, tmp_path / "run" / "checkpoint-2")
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    data = json.loads(state.read_text()) | {"best_model_checkpoint": "/elsewhere/run/checkpoint-1"}
    state.write_text(json.dumps(data))
    (save,) = look_at(tmp_path / "run", tmp_path / "out").saves
    assert (save.has_state, save.best) == (True, "checkpoint-1")

    state.write_text(json.dumps(data)[:-20])
    (save,) = look_at(tmp_path / "run", tmp_path / "out").saves
    assert (save.has_state, save.best) == (False, None)


def test_the_signature_is_that_of_the_weights(tmp_path: Path) -> None:
    shutil.copytree(TRAINER, tmp_path / "run" / "checkpoint-2")

    def signature() -> str:
        (save,) = look_at(tmp_path / "run", tmp_path / "out").saves
        return save.signature

    before = signature()
    made(tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth")
    assert signature() == before
    os.utime(tmp_path / "run" / "checkpoint-2" / "model.safetensors", ns=(5, 5))
    assert signature() != before
