"""DCP in Hugging Face storage: what torch's own consolidation gets wrong is right, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckpt_tools import consolidate, open_checkpoint, readers
from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.tensors.checkpoint import Checkpoint
from tests.support import damage
from tests.support.readers.contract import Case, assert_same
from tests.support.readers.dcp_case import DCP, DcpCase, DcpContract, copy_of, dcp_cases

CASES = dcp_cases("hf-storage*")
SHARDS = "shard-{:05d}-model-{:05d}-of-{:05d}.safetensors".format
Tensors = dict[str, torch.Tensor]


class TestEveryHuggingFaceStorageFixture(DcpContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def framework(self, case: Case) -> str:
        return "torch.distributed.checkpoint 1.0"

    def test_it_says_what_it_does_not_know(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.title == "torch DCP in Hugging Face storage"
        assert checkpoint.details["shapes_inferred"] is True
        assert "only a comparison with a config's shapes" in checkpoint.remarks[0]


def test_the_fixtures_cover_what_the_contract_is_for() -> None:
    assert len(CASES) >= 4


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return copy_of("hf-storage-3ranks", tmp_path)


def damaged(directory: Path) -> DamagedCheckpoint:
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    return caught.value


# What PyTorch 2.13 itself gets wrong.


def test_a_0d_one_stays_one() -> None:
    case = DcpCase(DCP / "hf-storage-consolidated-2ranks")
    (torchs,) = case.path.glob("model-*.safetensors")
    assert load_file(torchs)["scale"].item() == 0.0, "torch has mended it: say so in the module"
    checkpoint = open_checkpoint(case.path)
    assert checkpoint.location.directory == case.path / "sharded"
    assert checkpoint["scale"].load().item() == 1.0


def test_a_0d_one_stays_one_in_the_output(tmp_path: Path) -> None:
    path = DCP / "hf-storage-consolidated-2ranks" / "checkpoint"
    consolidate(path, tmp_path / "out", weights_only=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["scale"].item() == 1.0


@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_shard_that_is_not_the_last_is_refused(directory: Path, rank: int) -> None:
    (directory / SHARDS(rank, 1, 1)).unlink()
    error = damaged(directory)
    assert error.missing == (SHARDS(rank, 1, 1),)
    assert error.tensor == "model.embed_tokens.weight"
    assert SHARDS(rank, 1, 1) in str(error.hint)


@pytest.mark.slow
def test_a_missing_last_shard_is_refused_by_the_shapes_of_the_config(
    directory: Path, tmp_path: Path
) -> None:
    (directory / SHARDS(3, 1, 1)).unlink()
    config = DCP / "hf-storage-3ranks" / "hf"
    with pytest.raises(UsageError, match="but the config describes"):
        consolidate(directory, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_a_missing_last_shard_shortens_its_tensors_and_is_a_remark(directory: Path) -> None:
    truth = DcpCase(DCP / "hf-storage-3ranks").model
    shapes = {name: tuple(value.shape) for name, value in truth.items()}
    rows, columns = shapes["lm_head.weight"]
    held = 2 * -(-rows // 3)
    (directory / SHARDS(3, 1, 1)).unlink()
    checkpoint = open_checkpoint(directory)
    assert checkpoint.weights["lm_head.weight"].shape == (held, columns)
    assert checkpoint.remarks, "without such shapes the reader itself must say that it cannot know"


def test_a_tensor_without_elements_has_no_size_in_the_files() -> None:
    checkpoint = open_checkpoint(DCP / "hf-storage-awkward-2ranks" / "checkpoint")
    assert checkpoint.remarks[1:] == ("tensors without elements have unknown shapes: empty.bias",)


# Parts.


def test_a_missing_part_of_one_rank(tmp_path: Path) -> None:
    directory = copy_of("hf-storage-two-parts-2ranks", tmp_path)
    (directory / SHARDS(1, 2, 2)).unlink()
    assert damaged(directory).missing == (SHARDS(1, 2, 2),)


def test_a_part_that_is_missing_in_every_rank(tmp_path: Path) -> None:
    directory = copy_of("hf-storage-two-parts-2ranks", tmp_path)
    for rank in (1, 2):
        (directory / SHARDS(rank, 2, 2)).unlink()
    error = damaged(directory)
    assert error.fact == "part 2 of 2 is missing in every shard"
    assert error.missing == (SHARDS(1, 2, 2), SHARDS(2, 2, 2))


def test_shards_of_saves_with_other_parts(tmp_path: Path) -> None:
    directory = copy_of("hf-storage-two-parts-2ranks", tmp_path)
    older = DCP / "hf-storage-3ranks" / "checkpoint" / SHARDS(3, 1, 1)
    shutil.copyfile(older, directory / older.name)
    assert "they belong to different saves" in damaged(directory).fact


# Headers.


def rewrite(path: Path, tensors: Tensors | None = None, info: str | None = "") -> None:
    """Save a shard again with other tensors or another record of where they belong."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    if info is None:
        del metadata["DCP_SHARDING_INFO"]
    elif info:
        metadata["DCP_SHARDING_INFO"] = info
    save_file(load_file(path) if tensors is None else tensors, path, metadata)


@pytest.mark.parametrize(
    ("info", "fact"),
    [
        (None, "DCP_SHARDING_INFO is missing"),
        ("{}", "is malformed"),
        ("[", "is malformed"),
        ('{"lm_head.weight": {"saved_offsets": [0]}}', "is malformed"),
    ],
)
def test_a_record_that_is_missing_or_malformed(
    directory: Path, info: str | None, fact: str
) -> None:
    path = directory / SHARDS(2, 1, 1)
    rewrite(path, info=info)
    error = damaged(directory)
    assert (error.path, fact in error.fact) == (path, True)


def test_shards_that_overlap(directory: Path) -> None:
    shutil.copyfile(directory / SHARDS(1, 1, 1), directory / SHARDS(2, 1, 1))
    assert "leave a hole or overlap" in damaged(directory).fact


def test_shards_of_another_dtype(directory: Path) -> None:
    path = directory / SHARDS(2, 1, 1)
    rewrite(path, {name: value.to(torch.bfloat16) for name, value in load_file(path).items()})
    assert "shards disagree about it (float32, bfloat16)" in damaged(directory).fact


def test_a_truncated_shard(directory: Path) -> None:
    path = directory / SHARDS(2, 1, 1)
    damage.truncate(path, path.stat().st_size - 4)
    assert damaged(directory).path == path


# Where it is found.


def test_a_shard_means_all_of_them(directory: Path) -> None:
    assert readers.locate(directory / SHARDS(2, 1, 1)).directory == directory


def test_the_consolidated_files_are_read_where_they_are_named() -> None:
    path = DCP / "hf-storage-consolidated-2ranks" / "checkpoint"
    location = readers.locate(path / "model.safetensors.index.json")
    assert (location.format, location.directory) == ("huggingface", path)
    assert readers.locate(path).format == "torch-dcp-huggingface"
    assert readers.locate(path / "sharded").directory == path / "sharded"


def test_no_other_tag_is_there(directory: Path) -> None:
    assert readers.locate(directory, "hf-storage-3ranks").directory == directory
    with pytest.raises(UsageError, match="the tag 'step-9' does not exist"):
        readers.locate(directory, "step-9")


def test_a_small_file_of_shards_is_like_its_truth(tmp_path: Path) -> None:
    """A tensor cut along its second axis, as tensor parallelism cuts it."""
    whole = torch.arange(30.0).view(5, 6)
    for rank, columns in ((1, slice(0, 4)), (2, slice(4, 6))):
        info = f'{{"w": {{"saved_offsets": [0, {columns.start}]}}}}'
        part = {"w": whole[:, columns].contiguous()}
        save_file(part, tmp_path / SHARDS(rank, 1, 1), {"DCP_SHARDING_INFO": info})
    assert_same(open_checkpoint(tmp_path)["w"].load(), whole, "w")
