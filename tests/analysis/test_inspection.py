"""``inspect`` says what the live engine knew, from metadata alone and without torch."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools import inspect, open_checkpoint
from ckpt_tools.analysis.inspection import Group
from ckpt_tools.errors import AmbiguousCheckpoint, NotACheckpoint, UsageError
from ckpt_tools.tensors.gather import Gatherer
from tests.conftest import FIXTURES
from tests.support import adapted, damage
from tests.support.readers.contract import Case, cases

CASES = cases("zero", "zero*")


def case_of(name: str) -> Case:
    return Case(damage.ZERO / name)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    case = request.param
    assert isinstance(case, Case)
    return case


def test_the_facts_are_those_of_the_run(case: Case) -> None:
    found = inspect(case.path)
    left_out = sum(
        math.prod(shape)
        for name, shape in whole_shapes(case).items()
        if name in case.left_out and name not in case.facts["tied"]
    )
    assert found.format == "deepspeed"
    assert found.step == case.facts["step"]
    assert found.world_size == case.facts["world_size"]
    assert found.framework == f"deepspeed {case.facts['deepspeed_version']}"
    assert found.parameters == case.facts["parameter_count"] - left_out
    assert found.problems == ()
    assert found.buffers is not None
    assert found.buffers.tensors == len(case.facts["buffers"])
    directory = case.path / case.facts["tags"][-1]
    files = [path for path in directory.iterdir() if path.is_file()]
    assert found.path == directory
    assert (found.files, found.bytes_on_disk) == (len(files), sum(f.stat().st_size for f in files))


def whole_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(case.directory / "truth" / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_the_size_of_every_output_is_told(case: Case) -> None:
    written = {n: value for n, value in case.model.items() if n not in case.facts["tied"]}
    floating = sum(value.numel() for value in written.values() if value.is_floating_point())
    rest = sum(value.nbytes for value in written.values() if not value.is_floating_point())
    sizes = inspect(case.path).output_bytes
    assert sizes is not None
    assert sizes["auto"] == sum(value.nbytes for value in written.values())
    assert sizes["fp32"] == 4 * floating + rest
    assert sizes["bf16"] == sizes["fp16"] == 2 * floating + rest


def test_the_bytes_that_are_weights_are_told(case: Case) -> None:
    buffers = sum(case.model[name].nbytes for name in case.facts["buffers"])
    weights = sum(value.nbytes for value in case.masters.values()) + buffers
    assert inspect(case.path).weight_bytes == weights


def test_dtypes_are_counted_in_elements(case: Case) -> None:
    counts: dict[str, int] = {}
    for name, value in case.model.items():
        if name not in case.facts["tied"]:
            dtype = str(value.dtype).removeprefix("torch.")
            counts[dtype] = counts.get(dtype, 0) + value.numel()
    assert inspect(case.path).dtypes == counts


def test_it_is_json(case: Case) -> None:
    text = json.dumps(inspect(case.path).to_json())
    assert json.loads(text)["step"] == case.facts["step"]


def test_policy_and_value_model_are_told_apart() -> None:
    case = case_of("zero3-bf16-policy-value-2ranks")
    attributes = inspect(case.path).attributes
    assert attributes is not None
    assert set(attributes) == {name.split(".")[0] for name in case.model}
    for attribute, group in attributes.items():
        members = [v for n, v in case.masters.items() if n.split(".")[0] == attribute]
        nbytes = sum(case.model[n].nbytes for n in case.masters if n.split(".")[0] == attribute)
        assert group == Group(len(members), sum(v.numel() for v in members), nbytes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_adapter_is_told_with_its_size(stage: int) -> None:
    case = case_of(f"zero{stage}-bf16-olmo2-lora-2ranks")
    found = inspect(case.path)
    lora = {n: v for n, v in case.model.items() if ".lora_" in n}
    nbytes = sum(value.nbytes for value in lora.values())
    assert found.adapters == {
        "default": Group(len(lora), sum(v.numel() for v in lora.values()), nbytes)
    }
    assert found.output_bytes is not None
    assert found.output_bytes["adapter"] == nbytes


@pytest.mark.parametrize("name", adapted.CASES)
def test_every_kind_of_adapter_is_named(name: str) -> None:
    """The live model names its adapters; the name is a segment of the name of each of their tensors."""
    path = FIXTURES / "peft" / name / "checkpoint"
    held = [tensor.split(".") for tensor in open_checkpoint(path).weights]
    found = inspect(path).adapters

    assert found is not None
    assert {adapter: group.tensors for adapter, group in found.items()} == {
        adapter: sum(adapter in tensor for tensor in held)
        for adapter in adapted.facts(name)["adapters"]
    }


def test_frozen_and_trained_are_told_apart() -> None:
    case = case_of("zero1-bf16-llama-frozen-2ranks")
    found = inspect(case.path)
    assert found.frozen is not None
    assert found.trained is not None
    frozen = [case.masters[name] for name in case.facts["frozen"]]
    assert found.frozen.tensors == len(frozen)
    assert found.frozen.parameters == sum(value.numel() for value in frozen)
    assert found.trained.tensors == len(case.masters) - len(frozen)


def test_wrappers_are_told_and_their_names_stripped() -> None:
    case = case_of("zero2-bf16-llama-compiled-2ranks")
    found = inspect(case.path)
    assert found.wrappers == {"_orig_mod.": len(case.model)}
    assert found.attributes is not None
    assert "_orig_mod" not in found.attributes


def test_tied_names_are_told() -> None:
    case = case_of("zero3-bf16-t5-2ranks")
    assert inspect(case.path).tied == case.facts["tied"]


def test_what_is_wrong_is_told_and_is_no_error(tmp_path: Path) -> None:
    directory = damage.copy_of("zero3-bf16-llama-7ranks", tmp_path)
    damage.drop_rank(directory, 2)
    found = inspect(directory)
    (problem,) = found.problems
    assert "1 of 7 optim_states files are missing: rank 2" in problem
    assert "copy the folder of every machine here" in problem
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert (found.files, found.bytes_on_disk) == (13, sum(sizes))
    assert (found.format, found.name) == ("deepspeed", "global_step2")
    assert json.loads(json.dumps(found.to_json()))["problems"] == [problem]


def test_a_stale_pointer_is_remarked_even_where_the_checkpoint_is_damaged(tmp_path: Path) -> None:
    directory = damage.copy_of("zero2-bf16-llama-two-saves-2ranks", tmp_path, "global_step2")
    (directory.parent / "latest").write_text("global_step2")
    damage.drop_rank(directory, 0)
    assert "global_step4" in inspect(directory.parent).remarks[0]


def test_a_tag_is_inspected_when_it_is_asked_for() -> None:
    case = case_of("zero2-bf16-llama-two-saves-2ranks")
    assert inspect(case.path, tag="global_step2").step == 2


def test_where_there_is_no_one_checkpoint_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        inspect(tmp_path)
    with pytest.raises(UsageError):
        inspect(case_of("zero3-bf16-llama-7ranks").path, tag="nothing")
    directory = damage.copy_of("zero2-bf16-llama-two-saves-2ranks", tmp_path)
    (directory.parent / "latest").unlink()
    with pytest.raises(AmbiguousCheckpoint):
        inspect(directory.parent)


def test_no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Gatherer, "fill", refuse)
    path = case_of("zero2-bf16-llama-3ranks").path
    assert inspect(path).parameters
    with pytest.raises(AssertionError, match="a tensor was read"):
        open_checkpoint(path)["lm_head.weight"].load()


HEAVY = ("accelerate", "deepspeed", "numpy", "peft", "safetensors", "torch", "transformers")


@pytest.mark.parametrize(
    "name",
    [
        "zero0-bf16-llama-unfused-2ranks",
        "zero1-bf16-llama-fp32-grad-accum-3ranks",
        "zero2-bf16-llama-legacy-torch-2ranks",
        "zero3-bf16-llama-client-object-2ranks",
    ],
)
def test_inspecting_imports_no_framework(name: str) -> None:
    program = (
        "import sys; from ckpt_tools import inspect; "
        f"assert inspect({str(case_of(name).path)!r}).parameters; "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


@pytest.mark.slow
def test_reading_a_tensor_imports_torch_and_no_training_framework() -> None:
    program = (
        "import sys; from ckpt_tools import open_checkpoint; "
        f"c = open_checkpoint({str(case_of('zero3-bf16-llama-7ranks').path)!r}); "
        "assert c['lm_head.weight'].load().numel(); "
        "print([m for m in ('accelerate', 'deepspeed', 'peft', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_the_numbered_names_of_a_pipeline_are_listed_for_a_key_map(fixtures: Path) -> None:
    found = inspect(fixtures / "layouts" / "pipeline-bf16-llama-tied-2ranks" / "checkpoint")
    assert found.numbered[:3] == (
        "tied_modules.embed.weight",
        "1-2.self_attn.q_proj.weight",
        "1-2.self_attn.k_proj.weight",
    )
    assert found.numbered[-1] == "3.weight"
    assert inspect(fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint").numbered == ()


def test_lost_masters_are_a_problem_and_the_rest_is_described(
    fixtures: Path, tmp_path: Path
) -> None:
    shutil.copytree(fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint", tmp_path / "run")
    for path in (tmp_path / "run").glob("*/*optim_states.pt"):
        path.unlink()
    found = inspect(tmp_path / "run")
    (problem,) = found.problems
    assert "--weights model takes them" in problem
    assert (found.title, found.parameters, found.training_dtype) == (
        "DeepSpeed ZeRO-2",
        3910,
        "bfloat16",
    )
