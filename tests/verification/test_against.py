"""--against: a directory is what its checkpoint makes of it, bit for bit, or it is said where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import NotACheckpoint
from ckpt_tools.hub import reference
from ckpt_tools.hub.reference import child
from ckpt_tools.verification.against import check_against
from ckpt_tools.verification.problem import Findings
from tests.support.verification.beside import (
    DORA,
    EXPERTS,
    PEFT,
    PLAIN,
    SINGLE,
    TIED,
    UP,
    ZERO,
    against,
    casts,
    good,
    read,
    record,
    told,
    written,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What the live engine held in bf16, as a directory."""
    return written(tmp_path / "model", load_file(PLAIN / "truth" / SINGLE))


@pytest.fixture
def _asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is asked in this process, where others loaded it."""
    monkeypatch.setattr(reference, "ask", lambda _, question: child._answer(json.loads(question)))


@pytest.mark.parametrize("truth", ["masters", "model"])
@pytest.mark.parametrize("case", [PLAIN, TIED], ids=lambda case: case.name)
def test_what_the_engine_held_is_what_the_checkpoint_makes(
    case: Path, truth: str, tmp_path: Path
) -> None:
    state = load_file(case / "truth" / f"{truth}.safetensors")

    assert good(against(written(tmp_path / "x", state), case / "checkpoint"), len(state))


def test_the_checkpoint_may_be_of_any_format(model: Path) -> None:
    count = len(load_file(model / SINGLE))

    for path in (model, model / SINGLE, PLAIN / "truth", open_checkpoint(PLAIN / "checkpoint")):
        assert good(against(model, path), count)


def test_other_dtypes_are_rounded_as_torch_rounds(tmp_path: Path) -> None:
    state = load_file(PLAIN / "truth" / "masters.safetensors")
    for dtype in (torch.float16, torch.float64, torch.float8_e4m3fn):
        rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
        directory = written(tmp_path / str(dtype), rounded)
        assert good(against(directory, PLAIN / "checkpoint"), len(state))


def test_wrappers_in_the_checkpoint_are_no_difference(tmp_path: Path) -> None:
    case = ZERO / "zero2-bf16-llama-compiled-2ranks"
    state = load_file(case / "truth" / SINGLE)
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    assert plain.keys() != state.keys()

    assert good(against(written(tmp_path / "x", plain), case / "checkpoint"), len(state))


def test_a_second_name_may_be_left_out_or_written(tmp_path: Path) -> None:
    both = load_file(TIED / "truth" / SINGLE)
    one = {name: tensor for name, tensor in both.items() if name != "lm_head.weight"}
    assert len(one) < len(both)

    assert good(against(written(tmp_path / "one", one), TIED / "checkpoint"), len(one))
    assert good(against(written(tmp_path / "both", both), TIED / "checkpoint"), len(both))
    # The other side need not know of the tie: the config does.
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    assert good(against(tmp_path / "both", tmp_path / "one", ties=ties), len(both))
    assert told(against(tmp_path / "both", tmp_path / "one")) == {
        ("tensor-extra", "lm_head.weight")
    }


def test_a_second_name_with_values_of_its_own_differs(tmp_path: Path) -> None:
    both = load_file(TIED / "truth" / SINGLE)
    both["lm_head.weight"][0, 0] += 1

    found = against(written(tmp_path / "both", both), TIED / "checkpoint")

    assert told(found) == {("tensor-differs", "lm_head.weight")}


@pytest.mark.usefixtures("_asked_here")
@pytest.mark.slow
def test_the_hub_layout_is_no_difference(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(EXPERTS / "hf")
    live = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    live.save_pretrained(tmp_path / "hub")
    run = written(tmp_path / "run", live.state_dict())
    names = set(load_file(tmp_path / "hub" / SINGLE))
    assert names != set(live.state_dict())

    assert good(against(tmp_path / "hub", run / SINGLE), len(names))
    (gate,) = [n for n in names if n.endswith("layers.0.mlp.experts.1.gate_proj.weight")]
    edited = load_file(tmp_path / "hub" / SINGLE)
    edited[gate][3, 2] += 1
    save_file(edited, tmp_path / "hub" / SINGLE, metadata={"format": "pt"})
    assert told(against(tmp_path / "hub", run / SINGLE)) == {("tensor-differs", gate)}


@pytest.mark.parametrize(
    ("case", "tensors"),
    [("zero2-olmo2-dora", 9), ("zero2-olmo2-two-adapters", 10), ("zero2-olmo2-prompt", 1)],
)
def test_adapters_are_found_in_the_state(case: str, tensors: int) -> None:
    """What PEFT wrote, an adapter in a folder of its name included."""
    source = PEFT / case

    assert good(against(source / "truth" / "adapter", source / "checkpoint"), tensors)


def test_another_adapter_is_said_tensor_by_tensor() -> None:
    found = against(DORA / "truth" / "adapter", PEFT / "zero2-olmo2-lora" / "checkpoint")

    kinds = {problem.kind for problem in found.problems}
    assert kinds == {"tensor-differs", "tensor-extra", "tensor-missing"}


def test_a_directory_of_pickles_is_compared_too(tmp_path: Path) -> None:
    state = load_file(TIED / "truth" / SINGLE)
    shared = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = shared
    torch.save(state, tmp_path / "pytorch_model.bin")

    assert good(against(tmp_path, TIED / "checkpoint"), len(state))
    state[UP] = state[UP] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert told(against(tmp_path, TIED / "checkpoint")) == {("tensor-differs", UP)}


@pytest.mark.parametrize("recorded", [False, True])
def test_shapes_dtypes_and_names(recorded: bool, model: Path) -> None:
    state = load_file(model / SINGLE)
    names = [*state]
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()
    state["model.norm.weight"] = state["model.norm.weight"].int()
    state["extra"] = torch.zeros(2)
    del state[UP]
    written(model, state)
    if recorded:
        record(model, casts(names), PLAIN / "checkpoint")

    found = against(model, PLAIN / "checkpoint")

    # What is not there although the manifest lists it is told by the check of the manifest.
    lost = set() if recorded else {("tensor-missing", UP)}
    assert told(found) == lost | {
        ("tensor-differs", "lm_head.weight"),
        ("tensor-differs", "model.norm.weight"),
        ("tensor-extra", "extra"),
    }
    details = {problem.tensor: problem.detail for problem in found.problems}
    assert details["lm_head.weight"] == "its shape is [10, 67]; the checkpoint gives [67, 10]"
    dtype = "bfloat16" if recorded else "float32"
    assert details["model.norm.weight"] == f"its dtype is int32; the checkpoint has {dtype}"


def test_a_buffer_that_is_left_out_is_a_warning(tmp_path: Path) -> None:
    case = ZERO / "zero2-bf16-buffers-5ranks"
    state = load_file(case / "truth" / SINGLE)
    buffers = json.loads((case / "facts.json").read_text())["buffers"]
    parameters = {name: tensor for name, tensor in state.items() if name not in buffers}
    assert good(against(written(tmp_path / "all", state), case / "checkpoint"), len(state))

    found = against(written(tmp_path / "some", parameters), case / "checkpoint")

    assert {(p.kind, p.severity, p.tensor) for p in found.problems} == {
        ("tensor-missing", "warning", name) for name in buffers
    }


def test_another_model_is_one_problem() -> None:
    found = against(PLAIN / "truth", ZERO / "zero3-bf16-policy-value-2ranks" / "checkpoint")

    (problem,) = found.problems
    assert problem.kind == "checkpoint-other"
    assert "the checkpoint policy.model.embed_tokens.weight" in problem.detail
    assert found.checked == []


def test_a_checkpoint_that_is_none_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        against(model, tmp_path / "nowhere")


def test_a_tensor_that_is_broken_otherwise_is_left_to_others(model: Path) -> None:
    """Its size is told by the check of the container; the others are compared."""
    found = read(model)
    entry = found.tensors[UP]
    found.tensors[UP] = type(entry)(
        entry.name, "F4", entry.shape, entry.file, entry.start, entry.stop
    )
    other = found.tensors["model.norm.weight"]
    found.tensors["model.norm.weight"] = type(other)(
        other.name, other.code, (11,), other.file, other.start, other.stop
    )
    findings = Findings()
    check_against(found, PLAIN / "checkpoint", findings)

    assert findings.skipped == [f"tensors of a dtype that torch does not have: {UP}"]
    assert findings.checked[0].startswith("19 tensors against DeepSpeed ZeRO-2 ")
