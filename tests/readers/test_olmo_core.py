"""Checkpoints of OLMo-core against its live models, as its own converter maps them to Hugging Face."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckpt_tools import open_checkpoint, readers
from ckpt_tools.errors import AmbiguousCheckpoint, DamagedCheckpoint, UsageError
from ckpt_tools.readers.olmo_core_names import hub_names
from ckpt_tools.tensors.checkpoint import Checkpoint
from tests.support.readers.contract import Case, assert_same, opened
from tests.support.readers.dcp_case import DCP, DcpCase, DcpContract, copy_of, dcp_cases

CASES = dcp_cases("olmo-core*")
TRAINED = "olmo-core-olmo2-2ranks"


class TestEveryOlmoCoreFixture(DcpContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def framework(self, case: Case) -> str:
        # Only the trainer writes its version down.
        return "ai2-olmo-core 3.0.0" if case.facts["step"] == 2 else "ai2-olmo-core"

    def test_its_title(self, checkpoint: Checkpoint) -> None:
        assert (checkpoint.title, checkpoint.location.format) == ("OLMo-core", "olmo-core")
        assert checkpoint.details["names"] == "Hugging Face"


def test_the_fixtures_cover_what_the_contract_is_for() -> None:
    assert {case.facts["step"] for case in CASES} == {None, 1, 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_of(TRAINED, tmp_path)


# Where it is found.


@pytest.mark.parametrize(
    "inner", ["", "step2", "step2/model_and_optim", "step2/model_and_optim/.metadata"]
)
def test_every_spelling_means_the_same(run: Path, inner: str) -> None:
    location = readers.locate(run / inner)
    assert (location.directory, location.name) == (run / "step2" / "model_and_optim", "step2")
    assert run / "step2" in location.near


def test_several_steps_are_a_choice_in_their_order(run: Path) -> None:
    for step in (10, 9):
        shutil.copytree(run / "step2", run / f"step{step}")
    with pytest.raises(AmbiguousCheckpoint) as caught:
        readers.locate(run)
    assert caught.value.choices == ("step2", "step9", "step10")
    assert readers.locate(run, "step9").name == "step9"
    with pytest.raises(UsageError, match="one of: step2, step9, step10"):
        readers.locate(run, "step3")


def test_a_model_that_was_saved_alone_is_known_by_who_wrote_it() -> None:
    path = DCP / "olmo-core-model-only" / "checkpoint"
    assert [reader.NAME for reader in readers.readers().values() if reader.find(path)] == [
        "olmo-core"
    ]


def test_damaged_metadata_is_still_of_this_format(run: Path) -> None:
    directory = run / "step2" / "model_and_optim"
    (directory / ".metadata").write_bytes(b"\x80\x04")
    assert readers.locate(run).format == readers.locate(directory).format == "olmo-core"
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(run)


# Facts.


def test_without_the_trainers_record_the_directory_tells_the_step(run: Path) -> None:
    shutil.rmtree(run / "step2" / "train")
    (run / "step2" / ".metadata.json").unlink()
    (run / "step2").rename(run / "step70")
    checkpoint = open_checkpoint(run)
    assert (checkpoint.step, checkpoint.world_size) == (70, 2)
    assert checkpoint.framework == "ai2-olmo-core"


# Names.


def test_without_a_config_wide_norms_of_queries_tell_the_model() -> None:
    (remark,) = opened(DcpCase(DCP / "olmo-core-model-only")).remarks
    assert "taken for an Olmo2 or Olmo3, because its q_norm spans all heads" in remark
    assert not opened(DcpCase(DCP / TRAINED)).remarks


def experiment(name: str = "reordered_norm", **changes: object) -> dict[str, object]:
    return {"model": {"block": {"name": name}, **changes}}


@pytest.mark.parametrize(
    ("shapes", "config", "reason"),
    [
        ({"blocks.0.attention.w_q.weight": (4, 4)}, {}, "there is no config of OLMo-core"),
        (
            {"blocks.0.attention.q_norm.weight": (2,), "blocks.0.attention.w_q.weight": (4, 4)},
            {},
            "there is no config of OLMo-core",
        ),
        ({"embeddings.weight": (4, 4)}, experiment("default"), "no default blocks"),
        (
            {"embeddings.weight": (4, 4)},
            experiment(block_overrides={"1": {"name": "peri_norm"}}),
            "peri_norm",
        ),
        (
            {"blocks.0.feed_forward_moe.router.weight": (4,)},
            experiment(),
            "no name for blocks.0.feed_forward_moe.router.weight",
        ),
        ({"lm_head.weights": (4,)}, experiment(), "no name for lm_head.weights"),
    ],
)
def test_other_models_keep_their_names_and_say_so(
    shapes: dict[str, tuple[int, ...]], config: dict[str, object], reason: str
) -> None:
    names, remark = hub_names(shapes, config)
    assert names == {}
    assert remark is not None
    assert reason in remark


def hybrid(linear: str, attention: str, mixer: str = "gated_delta_net") -> dict[str, object]:
    blocks = {
        "gdn": {"name": linear, "sequence_mixer": {"type": mixer}},
        "attn": {"name": attention, "sequence_mixer": {"type": "attention"}},
    }
    return {"model": {"block": blocks, "block_pattern": ["gdn", "attn"], "n_layers": 4}}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # OLMo-core's own converter renames these too, and warns; Hugging Face has the norms elsewhere.
        (hybrid("reordered_norm", "reordered_norm"), "no reordered_norm blocks of gated_delta_net"),
        (hybrid("default", "default"), "no default blocks"),
        (hybrid("default", "reordered_norm", "kda"), "no default blocks of kda"),
    ],
)
def test_hybrids_with_norms_in_other_places_keep_their_names(
    config: dict[str, object], reason: str
) -> None:
    names, remark = hub_names({"embeddings.weight": (4, 4)}, config)
    assert names == {}
    assert remark is not None
    assert reason in remark


def test_each_layer_of_a_hybrid_has_the_names_of_its_kind() -> None:
    shapes = {f"blocks.{n}.attention.w_out.weight": (4, 4) for n in range(4)}
    names, remark = hub_names(shapes, hybrid("default", "reordered_norm"))
    parts = [name.split(".")[3] for name in names.values()]
    assert (parts, remark) == (["linear_attn", "self_attn"] * 2, None)
    odd = hub_names({"blocks.1.attention.A_log": (4,)}, hybrid("default", "reordered_norm"))
    assert odd[0] == {}, "attention has no such tensor"


def test_another_kind_of_block_in_the_config_leaves_the_names(run: Path) -> None:
    path = run / "step2" / "config.json"
    data = json.loads(path.read_text())
    data["model"]["block"]["name"] = "default"
    path.write_text(json.dumps(data))
    checkpoint = open_checkpoint(run)
    assert checkpoint.details["names"] == "OLMo-core"
    for name, value in load_file(DCP / TRAINED / "truth" / "model.safetensors").items():
        assert_same(checkpoint[name].load(), value, name)
