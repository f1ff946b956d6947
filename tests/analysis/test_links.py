"""Commands that write nothing follow links out of the directory that was named, and say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckpt_tools.analysis.difference import diff
from ckpt_tools.analysis.inspection import inspect
from ckpt_tools.verification import verify
from tests.conftest import FIXTURES

CASE = FIXTURES / "zero" / "zero2-bf16-llama-3ranks"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CASE / "checkpoint", tmp_path / "run"))


def moved(path: Path, away: Path) -> Path:
    """The new place of a file or a folder, with a link to it in the old one."""
    path.rename(away / path.name)
    path.symlink_to(away / path.name)
    return away / path.name


def test_a_file_outside_is_named(run: Path, tmp_path: Path) -> None:
    shard = next(run.glob("*/*_rank_1_*optim_states.pt"))
    named = f"{shard.relative_to(run)} -> {moved(shard, tmp_path)}"

    found = inspect(run)

    assert not found.problems
    (remark,) = found.remarks
    assert remark == f"a link leads out of {run}: {named}; a conversion needs --follow-links"
    assert diff(run, CASE / "checkpoint").notes == (f"a link leads out of {run}: {named}",)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_save_outside_is_named_once(run: Path, tmp_path: Path, damaged: bool) -> None:
    (save,) = (path for path in run.iterdir() if path.is_dir())
    target = moved(save, tmp_path)
    if damaged:
        next(target.glob("*optim_states.pt")).write_bytes(b"")

    found = inspect(run)

    assert bool(found.problems) is damaged
    assert [r for r in found.remarks if "--follow-links" in r] == [
        f"a link leads out of {run}: {save.name} -> {target}; a conversion needs --follow-links"
    ]
    assert not inspect(save).remarks, "this directory was named itself"


def test_links_within_and_those_of_the_cache_of_the_hub_are_not_named(
    run: Path, tmp_path: Path
) -> None:
    shard = next(run.glob("*/*optim_states.pt"))
    shard.rename(run / "elsewhere")
    shard.symlink_to(run / "elsewhere")
    assert not inspect(run).remarks

    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(CASE / "checkpoint", snapshot)
    for path in [*snapshot.rglob("*.pt")]:
        moved(path, blobs)
    assert not inspect(snapshot).remarks
    assert not inspect(next(snapshot.glob("global_step*"))).remarks


def test_verify_names_links_of_the_checkpoint_that_it_compares_with(
    run: Path, tmp_path: Path
) -> None:
    moved(next(run.glob("*/*_rank_1_*optim_states.pt")), tmp_path)

    verdict = verify(CASE / "hf", against=run)

    assert any(what.startswith(f"a link leads out of {run}: ") for what in verdict.checked)
