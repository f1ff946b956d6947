"""``ckpt-tools inspect`` as it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_consolidate import run, run_program
from tests.conversion.test_end_to_end import CASES, Case, every

CURRENT = [case for case in CASES if not case.path.name.startswith("old-")]


@every(CURRENT[::5])
def test_json_gives_the_facts(case: Case) -> None:
    done = run("inspect", case.checkpoint, "--json")

    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    found = json.loads(done.stdout)
    facts = case.facts
    assert found["format"] == "deepspeed"
    assert found["name"] == facts["tags"][-1]
    assert found["step"] == facts["step"]
    assert found["world_size"] == facts["world_size"]
    assert found["details"]["stage"] == facts["stage"]
    assert found["framework"] == f"deepspeed {facts['deepspeed_version']}"
    held = case.held({n: t for n, t in case.model().items() if n not in facts["tied"]})
    parameters = {name: t for name, t in held.items() if name not in facts["buffers"]}
    assert found["parameters"] == sum(tensor.numel() for tensor in parameters.values())
    assert found["output_bytes"]["auto"] == sum(tensor.nbytes for tensor in held.values())
    assert len(found["tied"]) == len(facts["tied"])
    assert found["buffers"]["tensors"] == len(facts["buffers"])
    assert found["problems"] == []
    folder = case.checkpoint / facts["tags"][-1]
    assert found["path"] == str(folder)
    assert found["bytes_on_disk"] == sum(p.stat().st_size for p in folder.glob("*.pt"))
    assert found["files"] == len(list(folder.glob("*.pt")))


def test_the_size_of_the_output_is_that_of_the_output(tmp_path: Path) -> None:
    case = CURRENT[0]
    sizes = json.loads(run("inspect", case.checkpoint, "--json").stdout)["output_bytes"]

    for dtype in ("auto", "fp32", "bf16", "fp16"):
        out = tmp_path / dtype
        assert (
            run("consolidate", case.checkpoint, out, "--weights-only", "--dtype", dtype).exit_code
            == 0
        )
        tensors = load_file(out / "model.safetensors").values()
        assert sizes[dtype] == sum(tensor.nbytes for tensor in tensors)


def test_a_table_is_for_a_person(fixtures: Path) -> None:
    case = fixtures / "zero" / "zero2-bf16-policy-value-2ranks"
    done = run_program("inspect", case / "checkpoint")

    assert done.returncode == 0
    assert done.stderr == ""
    assert "DeepSpeed ZeRO-2, deepspeed 0.19.8" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["ranks", "2"] in rows
    assert [row for row in rows if row[:2] == ["attribute", "policy:"]]
    assert [row for row in rows if row[:2] == ["attribute", "value_model:"]]
    assert [row for row in rows if row[0] == "output" and "(fp32)," in row]
    assert ["problems", "none", "seen", "in", "the", "metadata"] in rows
    assert "\x1b" not in done.stdout


def test_adapters_frozen_and_tied_tensors_are_told(fixtures: Path) -> None:
    lora = run("inspect", fixtures / "zero" / "zero3-bf16-olmo2-lora-2ranks" / "checkpoint").stdout
    assert "frozen" in lora
    assert "default: " in lora
    assert "(adapter)" in lora
    tied = run("inspect", fixtures / "zero" / "zero3-bf16-qwen3-tied-2ranks" / "checkpoint").stdout
    assert "lm_head.weight = model.embed_tokens.weight" in tied


@pytest.fixture
def incomplete(fixtures: Path, tmp_path: Path) -> Path:
    source = fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    shutil.copytree(source, tmp_path / "run")
    (optimizer,) = (tmp_path / "run").glob("*/*rank_1_mp_rank_00_optim_states.pt")
    optimizer.unlink()
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_described_and_its_problem_is_the_exit_status(
    incomplete: Path,
) -> None:
    table = run("inspect", incomplete)
    assert table.exit_code == 4
    assert "problem" in table.stdout
    assert "1" in table.stdout

    machine = run("inspect", incomplete, "--json")
    assert machine.exit_code == 4
    (problem,) = json.loads(machine.stdout)["problems"]
    assert "rank" in problem
    _, next_step = problem.split("\n")
    begins = next_step.split()[:5]
    assert begins in [line.split()[:5] for line in table.stdout.splitlines()]


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")

    done = run("inspect", tmp_path)

    assert done.exit_code == 3
    assert done.stdout == ""
    assert "notes.txt" in done.stderr


def test_a_tag_chooses_among_several(fixtures: Path) -> None:
    checkpoint = fixtures / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
    for tag, step in (("global_step2", 2), ("global_step4", 4)):
        done = run("inspect", checkpoint, "--tag", tag, "--json")
        assert (json.loads(done.stdout)["name"], json.loads(done.stdout)["step"]) == (tag, step)


def test_a_log_has_one_line_a_fact_and_no_spaces_at_its_end(fixtures: Path) -> None:
    done = run("inspect", fixtures / "peft" / "zero3-olmo2-lora" / "checkpoint")

    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert all(line and line == line.rstrip() and line[0] != " " for line in lines)
    (sizes,) = (line for line in lines if line.startswith("output"))
    assert sizes.endswith(" kB (adapter)")


def test_one_is_singular(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(1.5)}, tmp_path / "model.safetensors")
    assert "1 tensor, 1 element\n" in run("inspect", tmp_path).stdout
