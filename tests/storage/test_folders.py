"""Copies of several machines' folders are read as one checkpoint, by --also and by ``also=``."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ckpt_tools import (
    average,
    consolidate,
    extract_lora,
    inspect,
    merge_lora,
    open_checkpoint,
)
from ckpt_tools.errors import CkptError, DamagedCheckpoint, NotACheckpoint, UsageError
from ckpt_tools.storage.folders import read_as_one
from ckpt_tools.storage.pool import PooledPath
from ckpt_tools.tensors.catalogue import Catalogue
from tests.cli.test_consolidate import run
from tests.conftest import FIXTURES
from tests.support.ranks.launching import launch

ZERO3 = "zero/zero3-bf16-olmo2-chat-2ranks"
ZERO2 = "zero/zero2-bf16-llama-3ranks"
DCP = "dcp/fsdp2-model-3ranks"
RANK_FILES = "rank_files/verl-fsdp1-3ranks"
SOURCES = [
    ZERO3,
    ZERO2,
    "zero/zero1-bf16-llama-2ranks",
    "zero/zero3-bf16-llama-frozen-3ranks",
    "zero/zero1-bf16-llama-fp32-grad-accum-3ranks",
    "zero/old-0.5.3-zero3-fp16-tied",
    DCP,
    "dcp/fsdp-tp-4ranks",
    "dcp/no-collectives-2ranks",
    "dcp/olmo-core-olmo2-2ranks",
    "dcp/hf-storage-3ranks",
    "dcp/zstd-2ranks",
    "accelerate/fsdp1-sharded-2ranks",
    "accelerate/fsdp2-sharded-3ranks",
    "accelerate/deepspeed-zero3-3ranks",
    "accelerate/fsdp2-rank-files-3ranks",
    "accelerate/trainer-fsdp2-2ranks",
    "accelerate/save-model-sharded",
    RANK_FILES,
    "rank_files/sharded-tensor-3ranks",
    "trainer/trainer-zero3-olmo2",
]


def checkpoint_of(source: str) -> Path:
    """The directory that the framework was told to save to."""
    (path,) = [*(FIXTURES / source).glob("checkpoint"), *(FIXTURES / source).glob("checkpoint-*")]
    return path


_RANK = re.compile(
    r"zero_pp_rank_(\d+)_|__(\d+)_\d+\.distcp|__(\d+)\.metadata|rank_?(\d+)\.|(\d+)(?:-of|-model)|state_(\d+)\."
)
_DATA = re.compile(r".*\.(pt|bin|pth|distcp|safetensors)")
Where = Callable[[str], list[int]]
"""Which of the folders a file goes to, by its path in the checkpoint."""


def rank_of(name: str) -> int:
    match = _RANK.search(Path(name).name)
    return int(next(group for group in match.groups() if group)) if match else 0


def each_rank_its_own(name: str) -> list[int]:
    return [min(rank_of(name), 2)]


def the_last_rank_first(name: str) -> list[int]:
    return [max(2 - rank_of(name), 0)]


def metadata_first_data_second(name: str) -> list[int]:
    return [1 if _DATA.fullmatch(name) else 0]


def data_first_metadata_last(name: str) -> list[int]:
    return [0 if _DATA.fullmatch(name) else 2]


def all_in_each_but_ranks(name: str) -> list[int]:
    return [rank_of(name) % 3] if _DATA.fullmatch(name) else [0, 1, 2]


def the_same_in_each(name: str) -> list[int]:
    return [0, 1, 2]


WAYS: list[Where] = [
    each_rank_its_own,
    the_last_rank_first,
    metadata_first_data_second,
    data_first_metadata_last,
    all_in_each_but_ranks,
    the_same_in_each,
]


def split(source: Path, directory: Path, where: Where, name: str = "run") -> list[Path]:
    """Copies of a checkpoint with some of its files each: ``node0/run``, ``node1/run`` and so on."""
    folders = [directory / f"node{number}" / name for number in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            relative = path.relative_to(source)
            for number in where(relative.as_posix()):
                copy = folders[number] / relative
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
    return folders


def outputs(directory: Path) -> dict[str, bytes]:
    """Every file of an output but the manifest, which says where the source lay."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in paths
        if path.name not in ("ckpt_tools_manifest.json", "README.md")
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The output of a checkpoint that lies in one folder, made once."""
    made: dict[str, dict[str, bytes]] = {}

    def output(source: str) -> dict[str, bytes]:
        if source not in made:
            target = tmp_path_factory.mktemp("whole") / "out"
            consolidate(checkpoint_of(source), target, weights_only=True)
            made[source] = outputs(target)
        return made[source]

    return output


# Wherever the files lie, the output is the same.


@pytest.mark.slow
@pytest.mark.parametrize("where", WAYS, ids=lambda where: where.__name__)
@pytest.mark.parametrize("source", SOURCES)
def test_split_files_give_the_output_of_the_whole(
    tmp_path: Path, source: str, where: Where, whole: Callable[[str], dict[str, bytes]]
) -> None:
    first, *others = split(checkpoint_of(source), tmp_path, where)
    consolidate(first, tmp_path / "out", also=others, weights_only=True)
    assert outputs(tmp_path / "out") == whole(source)


@pytest.mark.parametrize("source", [ZERO3, ZERO2, DCP, RANK_FILES])
def test_the_order_of_the_folders_does_not_matter(
    tmp_path: Path, source: str, whole: Callable[[str], dict[str, bytes]]
) -> None:
    folders = split(checkpoint_of(source), tmp_path, each_rank_its_own)
    for turn in range(3):
        first, *others = [*folders[turn:], *folders[:turn]]
        consolidate(first, tmp_path / f"out{turn}", also=others, weights_only=True)
        assert outputs(tmp_path / f"out{turn}") == whole(source)


def test_the_split_is_one() -> None:
    """Each way puts data into several folders for each source, so that one folder is not enough."""
    for source in SOURCES:
        files = [path for path in checkpoint_of(source).rglob("*") if path.is_file()]
        names = [path.relative_to(FIXTURES).as_posix() for path in files]
        assert len({each_rank_its_own(n)[0] for n in names if _DATA.fullmatch(n)}) > 1, source


@pytest.mark.parametrize("source", SOURCES)
def test_inspect_sees_the_whole(tmp_path: Path, source: str) -> None:
    checkpoint = checkpoint_of(source)
    first, *others = split(checkpoint, tmp_path, each_rank_its_own)
    expected = inspect(checkpoint).to_json()
    found = inspect(first, also=others).to_json()
    assert found.pop("path").startswith(str(first))
    assert expected.pop("path").startswith(str(checkpoint))
    for named in (found, expected):
        if named["name"] in ("run", checkpoint.name):  # some formats call it as its directory
            del named["name"]
    assert found == expected


def test_latest_in_another_folder_is_followed(tmp_path: Path) -> None:
    source = checkpoint_of(ZERO3)
    first, second, _ = split(source, tmp_path, lambda name: [int(name == "latest")])
    shutil.copytree(first / "global_step120", first / "global_step500")
    assert open_checkpoint(first, also=[second]).location.name == "global_step120"
    with pytest.raises(UsageError, match="there are 2 checkpoints here"):
        open_checkpoint(first)
    assert open_checkpoint(first, also=[second], tag="global_step500").step == 120


def test_one_s_own_latest_counts(tmp_path: Path) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, the_same_in_each)
    shutil.copytree(first / "global_step120", first / "global_step500")
    (second / "latest").write_text("global_step500")
    assert open_checkpoint(first, also=[second]).location.name == "global_step120"


def test_a_file_of_the_checkpoint_may_be_named(tmp_path: Path) -> None:
    first, *others = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    for file in ("latest", "global_step120/zero_pp_rank_0_mp_rank_00_model_states.pt"):
        path = first / file
        nodes = [other / "global_step120" if "/" in file else other for other in others[:1]]
        assert len(open_checkpoint(path, also=nodes)) == 25


def test_another_process_with_the_same_folders_reads_the_same_paths(tmp_path: Path) -> None:
    """One process plans, and the others are sent what to read."""
    first, *others = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    checkpoint = open_checkpoint(first, also=others)
    files = sorted(checkpoint.files)
    program = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from ckpt_tools.storage.folders import read_as_one\n"
        f"kept = read_as_one(Path({str(first)!r}), {list(map(str, others))!r})\n"
        "files = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps([path.read_bytes() for path in files]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(files), capture_output=True, check=True
    )
    assert pickle.loads(done.stdout) == [path.read_bytes() for path in files]
    assert len(files) == 4


@pytest.mark.slow
def test_under_torchrun_every_rank_reads_from_the_folders(
    tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    first, *others = split(checkpoint_of(ZERO2), tmp_path, each_rank_its_own)
    also = [part for other in others for part in ("--also", str(other))]
    command = ["-m", "ckpt_tools", "consolidate", first, tmp_path / "out"]
    done = launch([*command, "--weights-only", "--node-local", *also], ranks=2)
    assert done.status == 0, done.said
    assert outputs(tmp_path / "out") == whole(ZERO2)


# Folders of different levels.


def folders_at(
    tmp_path: Path, source: str, step: str, levels: list[int], extra: bool = False
) -> list[Path]:
    """The folders of a split at the run (0), at the save in it (1) or above the run (-1)."""
    folders = split(checkpoint_of(source), tmp_path, each_rank_its_own)
    at = {0: lambda f: f, 1: lambda f: f / step, -1: lambda f: f.parent}
    return [at[level](folder) for folder, level in zip(folders, levels, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "levels", [[0, 0], [0, 1], [1, 0], [1, 1], [0, -1], [1, -1]], ids=lambda levels: str(levels)
)
@pytest.mark.parametrize(
    ("source", "step"),
    [
        (ZERO3, "global_step120"),
        ("accelerate/fsdp1-sharded-2ranks", "pytorch_model_fsdp_0"),
        ("accelerate/trainer-fsdp2-2ranks", "checkpoint-2"),
        ("dcp/olmo-core-olmo2-2ranks", "step2"),
    ],
)
def test_folders_of_different_levels_are_aligned_by_their_names(
    tmp_path: Path,
    source: str,
    step: str,
    levels: list[int],
    whole: Callable[[str], dict[str, bytes]],
) -> None:
    first, *others = folders_at(tmp_path, source, step, levels)
    consolidate(first, tmp_path / "out", also=others, weights_only=True)
    assert outputs(tmp_path / "out") == whole(source)


def test_a_save_two_levels_down_is_aligned(tmp_path: Path) -> None:
    source = checkpoint_of("trainer/trainer-zero3-olmo2")
    first, second, _ = split(source, tmp_path, each_rank_its_own, "run/checkpoint-2")
    names = set(open_checkpoint(source))
    assert set(open_checkpoint(first.parent, also=[second / "global_step2"])) == names
    assert set(open_checkpoint(first / "global_step2", also=[second.parent])) == names
    assert set(open_checkpoint(first / "global_step2", also=[second])) == names
    assert set(open_checkpoint(first, also=[second.parent])) == names


def test_latest_names_a_save_that_is_not_there(tmp_path: Path) -> None:
    """The machine at hand kept `latest` and nothing else; the others' saves were copied by themselves."""
    first, *others = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    shutil.move(first / "global_step120", tmp_path / "own" / "global_step120")
    nodes = [tmp_path / "own" / "global_step120", others[0] / "global_step120"]
    assert len(open_checkpoint(first, also=nodes)) == 25
    assert len(open_checkpoint(first, also=[tmp_path / "own", *others])) == 25


def test_folders_of_other_names_are_of_one_level_if_they_hold_the_like(tmp_path: Path) -> None:
    for source, step in ((ZERO3, "global_step120"), (ZERO3, ""), (DCP, "")):
        place = tmp_path / Path(source).name / (step or "root")
        first, *others = split(checkpoint_of(source), place, each_rank_its_own)
        held = [other / step for other in others if any((other / step).glob("*"))]
        copies = [folder.rename(place / f"copy{n}") for n, folder in enumerate(held)]
        whole_names = set(open_checkpoint(checkpoint_of(source)))
        assert set(open_checkpoint(first / step, also=copies)) == whole_names


def test_a_folder_with_the_shards_alone_belongs_to_one_with_the_metadata_alone(
    tmp_path: Path,
) -> None:
    first, second, _ = split(checkpoint_of(DCP), tmp_path, metadata_first_data_second)
    second = second.rename(tmp_path / "shards")
    assert len(open_checkpoint(first, also=[second])) == 21


def test_other_folders_with_names_in_common_do_not_mislead(tmp_path: Path) -> None:
    """Both levels have a `logs`; the folder above the run is told by the run's name."""
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    for directory in (first / "logs", second.parent / "logs"):
        directory.mkdir()
        (directory / "events").write_text("")
    assert len(open_checkpoint(first, also=[second.parent])) == 25


def test_a_folder_inside_the_checkpoint_can_be_a_copy_of_it(tmp_path: Path) -> None:
    """Each machine's run was copied into a directory of the first one's."""
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    second.rename(first / "node1")
    assert len(open_checkpoint(first, also=[first / "node1"])) == 25


def test_a_directory_of_the_checkpoint_s_name_that_holds_other_things_does_not_mislead(
    tmp_path: Path,
) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    copied = (second / "global_step120").rename(tmp_path / "copied")
    (copied / "global_step120").mkdir()
    (copied / "global_step120" / "log.txt").write_text("")
    assert len(open_checkpoint(first / "global_step120", also=[copied])) == 25


def test_the_same_folder_twice_does_no_harm(tmp_path: Path) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    assert len(open_checkpoint(first, also=[first, second, second])) == 25
    assert len(open_checkpoint(first / "global_step120", also=[first, second])) == 25


def test_relative_and_linked_folders_are_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    (tmp_path / "link").symlink_to(second / "global_step120")
    monkeypatch.chdir(first)
    assert len(open_checkpoint(".", also=["../../node1/run"])) == 25
    assert len(open_checkpoint("global_step120", also=[tmp_path / "link"])) == 25
    consolidate(".", "../../out", also=[os.fspath(second)], weights_only=True)
    assert load_file(tmp_path / "out" / "model.safetensors").keys()


# What is refused.


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> CkptError:
    with pytest.raises(CkptError) as caught:
        function(*arguments, **options)
    return caught.value


def test_a_folder_of_the_wrong_level_is_refused_with_the_one_that_was_expected(
    tmp_path: Path,
) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    renamed = shutil.copytree(second / "global_step120", tmp_path / "copied")
    error = refusal(open_checkpoint, first, also=[renamed])
    assert isinstance(error, UsageError)
    assert error.path == renamed
    assert error.fact == f"not a copy of {first}, nor of a directory in it"
    assert error.hint is not None
    assert "with the same name (global_step120)." in error.hint

    outer = second.rename(tmp_path / "backup")
    (outer / "global_step120").rename(outer / "saved")
    error = refusal(open_checkpoint, first / "global_step120", also=[outer])
    assert isinstance(error, UsageError)
    assert error.path == outer
    assert error.hint is not None
    assert f"{outer / 'global_step120'} does not exist." in error.hint


def test_a_folder_of_another_step_is_refused_by_its_name(tmp_path: Path) -> None:
    """Data files of torch DCP say nothing of the step, and have the same size at each."""
    first, second, _ = split(checkpoint_of(DCP), tmp_path, each_rank_its_own)
    six, five = first.rename(tmp_path / "step-6"), second.rename(tmp_path / "step-5")
    error = refusal(open_checkpoint, six, also=[five])
    assert isinstance(error, UsageError)
    assert error.fact == f"its name is that of another save than {six}"
    same = five.rename(tmp_path / "node1" / "step-6")
    assert refusal(open_checkpoint, six, also=[same]).fact.startswith("1 of 3 data files")


@pytest.mark.parametrize("command", ["inspect", "consolidate"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, command: str) -> None:
    source = checkpoint_of(ZERO3)
    for also, fact in (
        (tmp_path / "gone", "no such directory"),
        (source / "latest", "not a directory"),
    ):
        out = [tmp_path / "out"] if command == "consolidate" else []
        done = run(command, source, *out, "--also", also)
        assert done.exit_code == 2
        assert f"error: {fact}\n  in: {also}\n  next: --also takes a folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path) == second:  # root may read everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    error = refusal(open_checkpoint, first, also=[second])
    assert isinstance(error, UsageError)
    assert (error.fact, error.path) == ("cannot be read (Permission denied)", second)


LOST = [
    (ZERO3, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "1 of 2 optim_states files are missing"),
    (ZERO2, "zero_pp_rank_2_mp_rank_00_optim_states.pt", "1 of 3 optim_states files are missing"),
    (ZERO2, "mp_rank_00_model_states.pt", "a DeepSpeed checkpoint with no *_model_states.pt file"),
    (DCP, "__1_0.distcp", "1 of 3 data files are missing: __1_0.distcp"),
    (DCP, ".metadata", "there are data files, but no .metadata"),
    (RANK_FILES, "model_world_size_3_rank_2.pt", "1 of 3 ranks are missing"),
    (
        "accelerate/save-model-sharded",
        "model-00002-of-00002.safetensors",
        "a shard in the index is missing",
    ),
]


def masters(path: Path, **options: Any) -> Catalogue:
    """The masters; of what is left of ZeRO-1 and 2 without them, the 16-bit weights can be read."""
    return open_checkpoint(path, **options).catalogue("master")


def without(name: str) -> Where:
    return lambda path: [] if path.endswith(name) else each_rank_its_own(path)


@pytest.mark.parametrize(("source", "name", "fact"), LOST, ids=lambda value: str(value)[:40])
def test_a_shard_that_no_folder_has_is_named_with_the_folders(
    tmp_path: Path, source: str, name: str, fact: str
) -> None:
    first, *others = split(checkpoint_of(source), tmp_path, without(name))
    error = refusal(masters, first, also=others)
    assert isinstance(error, DamagedCheckpoint)
    assert error.fact.startswith(fact)
    (missing,) = error.missing
    assert missing.endswith(name) or missing == "*_model_states.pt"
    assert error.hint is not None
    assert error.hint.endswith(f"Read as one checkpoint: {first}, {others[0]}, {others[1]}.")

    options = [part for other in others for part in ("--also", other)]
    done = run("consolidate", first, tmp_path / "out", "--weights-only", *options)
    assert done.exit_code == 4
    assert fact in done.stderr
    assert f"Read as one checkpoint: {first}, {others[0]}, {others[1]}." in done.stderr
    assert not (tmp_path / "out").exists()
    shown = run("inspect", first, *options)
    assert shown.exit_code == 4
    assert fact.split()[-1] in shown.stdout


def test_a_person_with_one_folder_is_told_of_also(tmp_path: Path) -> None:
    for source in (ZERO3, ZERO2, DCP, "dcp/no-collectives-2ranks", RANK_FILES):
        place = tmp_path / Path(source).name
        first, second, _ = split(checkpoint_of(source), place, each_rank_its_own)
        for folder in (first, second):
            error = refusal(masters, folder)
            if not isinstance(error, NotACheckpoint):
                assert "--also" in str(error), (source, folder)
                assert "Read as one" not in str(error)


STALE = [
    (ZERO3, "global_step120/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    (ZERO2, "global_step3/mp_rank_00_model_states.pt"),
    (DCP, "__1_0.distcp"),
    (DCP, ".metadata"),
    (RANK_FILES, "model_world_size_3_rank_2.pt"),
    ("dcp/hf-storage-3ranks", "shard-00002-model-00001-of-00001.safetensors"),
    ("accelerate/save-model-sharded", "model-00002-of-00002.safetensors"),
]


@pytest.mark.parametrize(("source", "name"), STALE)
def test_stale_shards_of_another_size_are_refused_and_both_folders_named(
    tmp_path: Path, source: str, name: str
) -> None:
    first, second, third = split(checkpoint_of(source), tmp_path, the_same_in_each)
    (path,) = first.rglob(Path(name).name)
    name = path.relative_to(first).as_posix()
    size = path.stat().st_size
    with (second / name).open("ab") as stream:
        stream.write(bytes(64))
    error = refusal(open_checkpoint, first, also=[third, second])
    assert isinstance(error, DamagedCheckpoint)
    assert error.fact == f"it has {size:,} bytes in {first} and {size + 64:,} in {second}"
    assert error.path == first / name

    options = ["--also", third, "--also", second]
    done = run("consolidate", first, tmp_path / "out", "--weights-only", *options)
    assert (done.exit_code, error.fact in done.stderr) == (4, True)
    assert not (tmp_path / "out").exists()
    shown = run("inspect", first, *options, "--json")
    assert shown.exit_code == 4
    (problem,) = json.loads(shown.stdout)["problems"]
    assert error.fact in problem


def test_shards_of_another_step_with_the_same_size_are_refused_by_what_they_say(
    tmp_path: Path,
) -> None:
    source = FIXTURES / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"
    old, new = sorted(path for path in source.iterdir() if path.is_dir())
    first, second = tmp_path / "a" / "tag", tmp_path / "b" / "tag"
    shutil.copytree(new, first)
    shutil.copytree(old, second)
    lost = next(first.glob("*zero_pp_rank_1_*optim_states.pt"))
    assert lost.stat().st_size == (second / lost.name).stat().st_size
    lost.unlink()
    error = refusal(open_checkpoint, first, also=[second])
    assert isinstance(error, DamagedCheckpoint)
    assert "the files belong to different saves: they differ in" in error.fact
    assert f"Read as one checkpoint: {first}, {second}." in str(error)


def test_a_damaged_file_is_named_where_it_lies(tmp_path: Path) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    path = next(second.rglob("*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:1000])
    error = refusal(open_checkpoint, first, also=[second])
    assert error.path == path
    assert "Read as one" not in str(error)


def test_one_checkpoint_without_further_folders_is_read_as_ever(tmp_path: Path) -> None:
    source = checkpoint_of(ZERO3)
    assert read_as_one(source, ()) is source
    directory = open_checkpoint(source, also=[]).location.directory
    assert not isinstance(directory, PooledPath)
    assert refusal(open_checkpoint, tmp_path / "gone", also=[source]).exit_code == 3


def test_a_mean_of_several_takes_opened_checkpoints(tmp_path: Path) -> None:
    source = checkpoint_of(ZERO3)
    first, second, _ = split(source, tmp_path, each_rank_its_own)
    error = refusal(average, [first, source], tmp_path / "out", also=[second])
    assert isinstance(error, UsageError)
    assert "open_checkpoint(path, also=...)" in str(error)
    opened = open_checkpoint(first, also=[second])
    average([opened, source], tmp_path / "out", weights_only=True)
    average([source, source], tmp_path / "whole", weights_only=True)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    done = run("average", first, source, tmp_path / "no", "--also", second)
    assert done.exit_code == 2
    assert "no such option" in done.stderr


# The inputs are safe.


@pytest.mark.parametrize("target", ["", "global_step120", ".."])
def test_no_folder_is_replaced_by_the_output(tmp_path: Path, target: str) -> None:
    first, second, third = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    third.rmdir()
    before = outputs(tmp_path)
    for folder in (first, second):
        out = folder / target
        options: dict[str, Any] = {"weights_only": True, "overwrite": True}
        error = refusal(consolidate, first, out, also=[second], **options)
        assert "replacing it would delete the input" in error.fact
        opened = open_checkpoint(first, also=[second])
        assert "replacing it would delete" in refusal(consolidate, opened, out, **options).fact
        done = run("consolidate", first, out, "--also", second, "--overwrite", "--weights-only")
        assert (done.exit_code, "replacing it would delete" in done.stderr) == (2, True)
    assert outputs(tmp_path) == before


def test_a_folder_with_nothing_but_latest_is_safe_too(tmp_path: Path) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, lambda name: [int(name == "latest")])
    error = refusal(consolidate, first, second, also=[second], overwrite=True, weights_only=True)
    assert "replacing it would delete the input" in error.fact
    assert (second / "latest").exists()


def test_no_folder_is_replaced_by_an_adapter(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "zero3-olmo2-lora" / "checkpoint"
    first, second, _ = split(source, tmp_path, each_rank_its_own)
    options: dict[str, Any] = {"lora_alpha": 16, "base_model": "b", "overwrite": True}
    error = refusal(extract_lora, first, second, also=[second], **options)
    assert "replacing it would delete the input" in error.fact


# The other commands, and the files beside the weights.


@pytest.mark.slow
def test_config_and_tokenizer_are_found_in_any_folder(tmp_path: Path) -> None:
    """verl keeps them beside the first rank's files; here they are on the second machine."""
    source = checkpoint_of(RANK_FILES)
    first, second, third = split(
        source, tmp_path, lambda n: [1] if n.startswith("huggingface/") else each_rank_its_own(n)
    )
    consolidate(source, tmp_path / "whole")
    consolidate(first, tmp_path / "out", also=[second, third])
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert {"config.json", "tokenizer.json"} <= outputs(tmp_path / "out").keys()
    near = open_checkpoint(first, also=[second, third]).location.near
    assert not any(isinstance(place, PooledPath) for place in near)
    assert near[:3] == (first, second, third)
    assert first.parent in near


def test_an_adapter_is_extracted_and_merged_from_split_files(tmp_path: Path) -> None:
    case = FIXTURES / "peft" / "zero3-olmo2-lora"
    first, *others = split(case / "checkpoint", tmp_path, each_rank_its_own)
    facts: dict[str, Any] = {"lora_alpha": 16}
    for path, also, name in ((case / "checkpoint", [], "whole"), (first, others, "split")):
        adapter = tmp_path / f"{name}-adapter"
        extract_lora(path, adapter, also=also, base_model="base", **facts)
        merge_lora(path, tmp_path / f"{name}-merged", also=also, weights_only=True, **facts)
    for kind in ("adapter", "merged"):
        assert outputs(tmp_path / f"split-{kind}") == outputs(tmp_path / f"whole-{kind}")
        assert outputs(tmp_path / f"split-{kind}")


def commands(first: Path, others: list[Path], out: Path) -> Iterator[tuple[str, list[object]]]:
    also = [part for other in others for part in ("--also", other)]
    lora = ["--lora-alpha", "16"]
    yield "consolidate", [first, out / "consolidate", "--weights-only", *also]
    yield "extract-attr", ["base_model", first, out / "attr", "--weights-only", *also]
    yield "extract-lora", [first, out / "lora", *lora, "--base-model", "base", *also]
    yield "merge-lora", [first, out / "merged", *lora, "--weights-only", *also]


def test_every_command_that_reads_one_checkpoint_takes_it(tmp_path: Path) -> None:
    case = FIXTURES / "peft" / "zero3-olmo2-lora"
    first, *others = split(case / "checkpoint", tmp_path, each_rank_its_own)
    for path, also, out in ((case / "checkpoint", [], "whole"), (first, others, "split")):
        for command, arguments in commands(path, also, tmp_path / out):
            done = run(command, *arguments)
            assert done.exit_code == 0, done.output
    assert outputs(tmp_path / "split") == outputs(tmp_path / "whole")
    assert len(outputs(tmp_path / "split")) >= 5


def test_the_manifest_names_every_folder_of_the_source(tmp_path: Path) -> None:
    first, second, empty = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    consolidate(first, tmp_path / "out", also=[second, empty], weights_only=True)

    manifest = json.loads((tmp_path / "out" / "ckpt_tools_manifest.json").read_text())

    (source,) = manifest["sources"]
    assert source["path"] == str(first / "global_step120")
    assert source["also"] == [str(second / "global_step120")]


def test_an_output_is_verified_against_split_files(tmp_path: Path) -> None:
    source = checkpoint_of(ZERO3)
    first, *others = split(source, tmp_path, each_rank_its_own)
    out = tmp_path / "out"
    assert run("consolidate", source, out, "--weights-only").exit_code == 0

    alone = run("verify", out, "--against", first)
    assert alone.exit_code == 2
    assert f"(in {first}" in alone.stdout
    assert "--also DIR" in alone.stdout

    also = [part for other in others for part in ("--also", other)]
    done = run("verify", out, "--against", first, *also, "--format", "json")
    assert done.exit_code == 0, done.output
    (held,) = json.loads(done.stdout)["directories"]
    assert f"25 tensors against DeepSpeed ZeRO-3 {first / 'global_step120'}" in held["checked"][-1]

    (altered,) = out.glob("*.safetensors")
    with altered.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    done = run("verify", out, "--against", first, *also)
    assert done.exit_code == 1
    assert "tensor-differs" in done.stdout


def test_also_without_a_checkpoint_to_compare_with_is_refused(tmp_path: Path) -> None:
    done = run("verify", tmp_path, "--also", tmp_path)
    assert done.exit_code == 2
    assert "--also is for --against" in " ".join(done.stdout.split())


def test_inspect_names_the_run_and_no_machine_s_folder(tmp_path: Path) -> None:
    first, second, _ = split(checkpoint_of(ZERO3), tmp_path, each_rank_its_own)
    done = run("inspect", first, "--also", second)
    assert done.exit_code == 0
    shown = re.sub(r"\s+", "", done.stdout)
    assert f"checkpoint{first / 'global_step120'}" in shown
    assert "370kBin4files" in shown
    report = json.loads(run("inspect", first, "--also", second, "--json").stdout)
    assert report["path"] == str(first / "global_step120")
    assert report["files"] == 4
