"""``ckpt-tools diff`` as it is typed: what it prints, and the exit status of ``diff``."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.analysis import difference
from tests.cli.test_consolidate import PROGRAM, run, run_program
from tests.conftest import FIXTURES

ZERO = FIXTURES / "zero"
SAVES = ZERO / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
PLAIN = ZERO / "zero2-bf16-llama-3ranks"
NAME = "model.norm.weight"
NOTE = "note: A: 21 float32 masters are compared as bfloat16 weights, because B holds bfloat16"


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """The export of a checkpoint in which everything was changed that can be."""
    state = load_file(PLAIN / "truth" / "model.safetensors")
    state[NAME][0] = float("nan")
    state["model.layers.0.mlp.up_proj.weight"] *= 1.5
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].half()
    state["extra"] = torch.ones(2, dtype=torch.bool)
    del state["model.layers.1.input_layernorm.weight"]
    save_file(state, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


def test_what_is_the_same_is_said_to_be_and_ends_with_0() -> None:
    done = run("diff", PLAIN / "checkpoint", PLAIN / "truth" / "model.safetensors")

    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"A: {PLAIN}/checkpoint/global_step2 (DeepSpeed ZeRO-2, step 2)",
        f"B: {PLAIN}/truth/model.safetensors (safetensors file)",
        NOTE,
        "21 tensors compared, 3,910 elements: the same, bit for bit",
    ]


@pytest.mark.slow
def test_what_is_different_is_listed_and_ends_with_1(edited: Path) -> None:
    done = run_program("diff", PLAIN / "truth" / "model.safetensors", edited)

    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[2] == (
        "19 tensors compared, 3,230 elements: 2 changed, 1 recast, 1 reshaped, 1 added, 1 removed"
    )
    assert lines[3].split()[-1] == "tensor"
    first, second = lines[4], lines[5]
    assert first.endswith(f"1 of 10  {NAME}  (1 NaN in B)")
    assert second.split()[0] == "0.5"
    assert second.endswith("260 of 260  model.layers.0.mlp.up_proj.weight")
    assert lines[6:] == [
        "removed: model.layers.1.input_layernorm.weight bfloat16 [10]",
        "added: extra bool [2]",
        "reshaped: lm_head.weight bfloat16 [67, 10] -> bfloat16 [10, 67]",
        "recast: model.embed_tokens.weight bfloat16 -> float16",
    ]
    assert "\x1b" not in done.stdout


def test_the_largest_changes_come_first_and_the_rest_is_counted() -> None:
    done = run("diff", SAVES, SAVES, "--tag-a", "global_step2", "--top", "3")

    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[2] == "21 tensors compared, 3,910 elements: 21 changed"
    relative = [float(line.split()[0]) for line in lines[4:7]]
    assert relative == sorted(relative, reverse=True)
    assert lines[7:] == ["and 18 more changed; --top lists them"]
    every = run("diff", SAVES, SAVES, "--tag-a", "global_step2", "--top", "21").stdout
    assert len(every.splitlines()) == 4 + 21


def test_tags_choose_on_each_side() -> None:
    done = run("diff", SAVES, SAVES, "--tag-a", "global_step2", "--tag-b", "global_step2")

    assert done.exit_code == 0
    assert done.stdout.count("global_step2 (DeepSpeed ZeRO-2, step 2)") == 2
    assert run("diff", SAVES, SAVES, "--tag-b", "global_step2").exit_code == 1


def test_a_tolerance_is_named_where_everything_lies_within_it() -> None:
    two = ("diff", SAVES, SAVES, "--tag-a", "global_step2")
    done = run(*two, "--atol", "0.1", "--rtol", "1e-3")

    assert done.exit_code == 0
    assert "within rtol 0.001, atol 0.1" in done.stdout
    assert run(*two, "--atol", "1e-6").exit_code == 1


def test_weights_choose_the_copy() -> None:
    export = PLAIN / "truth" / "model.safetensors"

    done = run("diff", PLAIN / "checkpoint", export, "--weights", "master")
    assert done.exit_code == 1
    assert "21 recast" in done.stdout
    assert run("diff", PLAIN / "checkpoint", export, "--weights", "model").exit_code == 0


@pytest.mark.slow
def test_json_has_every_tensor_and_nothing_else_is_on_stdout(edited: Path) -> None:
    done = run_program(
        "diff", PLAIN / "truth" / "model.safetensors", edited, "--format", "json", "--top", "1"
    )

    assert done.returncode == 1
    assert done.stderr == ""
    data = json.loads(done.stdout)
    assert data["changed"][0]["name"] == NAME
    assert len(data["changed"]) == 2
    assert data["changed"][0]["nan"] == [0, 1]
    assert data["identical"] is False


def test_quiet_leaves_it_to_the_exit_status(edited: Path) -> None:
    for b, status in ((edited, 1), (PLAIN / "truth" / "model.safetensors", 0)):
        done = run("diff", PLAIN / "truth" / "model.safetensors", b, "--quiet")
        assert (done.exit_code, done.output) == (status, "")


# -- trouble is neither 0 nor 1 --------------------------------------------------------------------


def test_what_is_not_there_is_trouble(tmp_path: Path) -> None:
    done = run("diff", PLAIN / "checkpoint", tmp_path / "nowhere")

    assert done.exit_code == 3
    assert done.stdout == ""
    assert "no such file or directory" in done.stderr


@pytest.mark.parametrize("side", ["a", "b"])
def test_the_hint_names_the_tag_of_the_side(side: str) -> None:
    several = FIXTURES / "accelerate" / "plain-two-models" / "checkpoint"
    paths = [several, PLAIN / "checkpoint"]

    done = run("diff", *(paths if side == "a" else paths[::-1]))

    assert done.exit_code == 2
    assert f"next: Pass --tag-{side} with one of them: model, model_1" in done.stderr


def test_trouble_is_told_to_programs_too(tmp_path: Path) -> None:
    done = run("diff", PLAIN / "checkpoint", tmp_path / "nowhere", "--format", "json")

    assert json.loads(done.stdout)["error"]["kind"] == "NotACheckpoint"


def test_a_damaged_checkpoint_is_trouble(edited: Path) -> None:
    edited.write_bytes(edited.read_bytes()[:-1])

    assert run("diff", PLAIN / "checkpoint", edited).exit_code == 4


@pytest.mark.parametrize(
    "options", [["--rtol", "-1"], ["--weights", "best"], ["--top", "-1"], ["--tag-a", "x"]]
)
def test_a_wrong_option_is_trouble(options: list[str]) -> None:
    assert run("diff", SAVES, SAVES, *options).exit_code == 2


def test_a_fault_of_our_own_is_trouble_and_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(difference, "diff", fail)
    done = run("diff", SAVES, SAVES)

    assert done.exit_code == 2
    assert "ZeroDivisionError: unforeseen" in done.stderr


@pytest.mark.slow
def test_a_bar_says_what_is_done_on_a_terminal(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"x": torch.zeros(1 << 22)}, tmp_path / f"{name}.safetensors")
    outer, inner = pty.openpty()
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    child = subprocess.Popen(
        [*PROGRAM, "diff", *paths],
        stdout=subprocess.PIPE,
        stderr=inner,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 1 << 16):
            shown += chunk
    except OSError:
        pass  # the other end is closed
    assert child.wait(60) == 0
    assert b"comparing" in shown
    assert b"writing" not in shown
