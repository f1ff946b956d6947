"""Sub-groups of ZeRO-3 in swap files of an NVMe offload: which file holds which parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import CkptError, DamagedCheckpoint, UnsupportedLayout
from tests.support import damage
from tests.support.readers.contract import FIXTURES, Case, assert_same

CASE = Case(FIXTURES / "layouts" / "zero3-bf16-qwen3-tied-frozen-nvme-2ranks")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    shutil.copytree(CASE.path, root)
    return root / (root / "latest").read_text()


def folders(directory: Path) -> list[Path]:
    return sorted((directory / "offloaded_tensors").iterdir())


def renamed(directory: Path, names: dict[str, str]) -> None:
    for folder in folders(directory):
        for old, new in names.items():
            (folder / old).rename(folder / f"{new}.moved")
        for path in folder.glob("*.moved"):
            path.rename(path.with_suffix(""))


def assert_live(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint) == set(CASE.model)
    for name, truth in CASE.masters.items():
        assert_same(checkpoint[name].load(), truth, name)


def test_numbers_may_start_anywhere(directory: Path) -> None:
    """A second engine in the process goes on where the first ended."""
    renamed(directory, {"0_0.tensor.swp": "20_20.tensor.swp", "1_7.tensor.swp": "21_27.tensor.swp"})
    assert_live(directory)


def test_files_of_an_earlier_run_are_left_alone(directory: Path) -> None:
    for folder in folders(directory):
        for name in ("3_9.tensor.swp", "exp_avg-0_0.tensor.swp", "0_0_gradient_0_9.tensor.swp"):
            shutil.copy(folder / "0_0.tensor.swp", folder / name)
    assert_live(directory)


def test_two_fitting_sets_of_numbers_are_not_chosen_from(directory: Path) -> None:
    for folder in folders(directory):
        shutil.copy(folder / "0_0.tensor.swp", folder / "20_20.tensor.swp")
        shutil.copy(folder / "1_7.tensor.swp", folder / "21_27.tensor.swp")
    with pytest.raises(UnsupportedLayout, match="do not determine which sub-groups they hold"):
        open_checkpoint(directory)


def drop(directory: Path) -> None:
    (folders(directory)[1] / "1_7.tensor.swp").unlink()


def drop_rank(directory: Path) -> None:
    shutil.rmtree(folders(directory)[1])


def cut(directory: Path) -> None:
    damage.truncate(folders(directory)[1] / "1_7.tensor.swp", 1024)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (drop, "1_7.tensor.swp is missing, which other ranks have"),
        (drop_rank, "the swap files of rank 1 are missing"),
        (cut, "it has 1,024 bytes, and its sub-group takes 2,048"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__,
)
def test_a_swap_file_that_is_lost_or_cut_is_found_out(
    change: Callable[[Path], None], fact: str, directory: Path
) -> None:
    change(directory)
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(directory)
    assert fact in caught.value.fact
    assert caught.value.hint


def test_swap_files_that_the_save_did_not_copy_can_be_copied_later(directory: Path) -> None:
    """The next step of the refusal works."""
    kept = (directory / "offloaded_tensors").rename(directory.parent / "nvme")
    with pytest.raises(CkptError, match="the save did not copy them") as caught:
        open_checkpoint(directory)
    assert "offloaded_tensors/rankNN (two digits) beside this file" in str(caught.value)
    kept.rename(directory / "offloaded_tensors")
    assert_live(directory)
