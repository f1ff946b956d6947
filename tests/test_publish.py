"""An output appears complete or not at all, and what was there before is not lost."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tools.errors import OutputExists, OutputFailed, UsageError
from ckpt_tools.publish import check_room, check_target, leftovers, partial_directory


def tree(directory: Path) -> dict[str, str | None]:
    """Every file below with its text, every directory with None, links followed."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_text()
        for path in sorted(directory.rglob("*"))
    }


def publish(target: Path, *, overwrite: bool = False, text: str = "new") -> Path:
    """Make an output of a file and a file in a directory; gives where it was made."""
    with partial_directory(target, overwrite=overwrite) as partial:
        (partial / "model").write_text(text)
        (partial / "extra").mkdir()
        (partial / "extra" / "code.py").write_text(text)
    return partial


def fail(target: Path, error: BaseException, *, overwrite: bool = False) -> None:
    """Make part of an output and then fail."""
    with partial_directory(target, overwrite=overwrite) as partial:
        (partial / "model").write_text("new")
        raise error


NEW = {"model": "new", "extra": None, "extra/code.py": "new"}
OLD = {"model": "old", "extra": None, "extra/code.py": "old"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing but what a test names may be left."""
    yield tmp_path
    strays = [path for path in tmp_path.rglob("*") if ".partial-" in path.name]
    assert strays == []


def test_the_output_appears_under_its_name_when_the_block_ends(disk: Path) -> None:
    with partial_directory(disk / "out", overwrite=False) as partial:
        (partial / "model").write_text("new")
        assert partial.parent == disk
        assert partial.name.startswith("out.partial-")
        assert not (disk / "out").exists()

    assert tree(disk) == {"out": None, "out/model": "new"}


def test_two_runs_never_share_a_partial_directory(disk: Path) -> None:
    with (
        partial_directory(disk / "out", overwrite=True) as one,
        partial_directory(disk / "out", overwrite=True) as two,
    ):
        assert one != two


def test_the_output_has_the_permissions_that_a_new_directory_has(disk: Path) -> None:
    (disk / "usual").mkdir()

    publish(disk / "out")

    usual = stat.S_IMODE((disk / "usual").stat().st_mode)
    assert stat.S_IMODE((disk / "out").stat().st_mode) == usual


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputFailed])
def test_an_error_leaves_nothing_behind_and_passes(disk: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match="of the block"):
        fail(disk / "a" / "b" / "out", error("of the block"))

    assert tree(disk) == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_the_old_output_as_it_was(disk: Path, overwrite: bool) -> None:
    publish(disk / "out", text="old")
    inode = (disk / "out").stat().st_ino

    with pytest.raises(ValueError, match="of the block"):
        fail(disk / "out", ValueError("of the block"), overwrite=overwrite)

    assert tree(disk / "out") == OLD
    assert (disk / "out").stat().st_ino == inode


def test_parents_that_were_missing_are_made(disk: Path) -> None:
    publish(disk / "a" / "b" / "out")

    assert tree(disk / "a" / "b" / "out") == NEW


def test_parents_are_removed_on_failure_only_if_they_were_made_and_are_empty(disk: Path) -> None:
    (disk / "a").mkdir()

    def write() -> None:
        with partial_directory(disk / "a" / "b" / "c" / "out", overwrite=False):
            (disk / "a" / "b" / "somebody's").write_text("else's")
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        write()

    assert tree(disk) == {"a": None, "a/b": None, "a/b/somebody's": "else's"}


def test_parents_that_were_made_are_removed_though_some_are_gone(disk: Path) -> None:
    def write() -> None:
        with partial_directory(disk / "a" / "b" / "c" / "out", overwrite=False):
            shutil.rmtree(disk / "a" / "b")
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        write()

    assert tree(disk) == {}


def test_an_empty_directory_is_no_output(disk: Path) -> None:
    (disk / "out").mkdir()

    check_target(disk / "out", [], overwrite=False)
    publish(disk / "out")

    assert tree(disk / "out") == NEW


@pytest.mark.parametrize("content", ["a file", ".hidden"])
def test_an_output_that_exists_is_refused(disk: Path, content: str) -> None:
    (disk / "out").mkdir()
    (disk / "out" / content).write_text("old")

    with pytest.raises(OutputExists) as caught:
        check_target(disk / "out", [], overwrite=False)

    assert caught.value.path == disk / "out"
    assert "--overwrite" in str(caught.value.hint)
    assert caught.value.exit_code == 2
    check_target(disk / "out", [], overwrite=True)


def test_an_output_that_appears_meanwhile_is_not_lost(disk: Path) -> None:
    def write() -> None:
        with partial_directory(disk / "out", overwrite=False) as partial:
            (partial / "model").write_text("new")
            (disk / "out").mkdir()
            (disk / "out" / "model").write_text("somebody's")

    with pytest.raises(OutputExists, match="appeared while") as caught:
        write()

    assert caught.value.path == disk / "out"
    assert tree(disk) == {"out": None, "out/model": "somebody's"}


def test_overwriting_replaces_all_of_the_old_output(disk: Path) -> None:
    publish(disk / "out", text="old")
    (disk / "out" / "model-00001-of-00009.safetensors").write_text("stale")

    publish(disk / "out", overwrite=True)

    assert tree(disk) == {"out": None} | {f"out/{name}": text for name, text in NEW.items()}


def test_where_directories_cannot_be_exchanged_the_old_output_is_moved_aside(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems that do not know renameat2's RENAME_EXCHANGE."""
    monkeypatch.setattr("ckpt_tools.publish._exchange", lambda a, b: False)
    publish(disk / "out", text="old")

    publish(disk / "out", overwrite=True)

    assert tree(disk) == {"out": None} | {f"out/{name}": text for name, text in NEW.items()}


def test_the_old_output_is_there_until_the_new_one_is(disk: Path) -> None:
    publish(disk / "out", text="old")

    with partial_directory(disk / "out", overwrite=True) as partial:
        (partial / "model").write_text("new")
        assert tree(disk / "out") == OLD

    assert tree(disk / "out") == {"model": "new"}


def test_there_is_no_moment_without_an_output_while_it_is_replaced(disk: Path) -> None:
    """A process that looks all the time finds one every time."""
    publish(disk / "out", text="old")
    program = (
        "import os, sys\n"
        "print('looking', flush=True)\n"
        "looks = missing = 0\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    looks += 1\n"
        "    missing += not os.path.exists(sys.argv[1])\n"
        "print(looks, missing)\n"
    )
    command = [sys.executable, "-c", program, str(disk / "out" / "model"), str(disk / "stop")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as looker:
        assert looker.stdout is not None
        assert looker.stdout.readline() == "looking\n"
        for _ in range(300):
            publish(disk / "out", overwrite=True)
        (disk / "stop").write_text("")
        looks, missing = map(int, looker.stdout.read().split())

    assert looks > 1_000
    assert missing == 0


def test_a_file_in_the_place_of_the_output_is_refused_even_for_overwriting(disk: Path) -> None:
    (disk / "out").write_text("somebody's")

    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="not a directory"):
            check_target(disk / "out", [], overwrite=overwrite)
    with pytest.raises(OutputFailed):
        publish(disk / "out", overwrite=True)

    assert tree(disk) == {"out": "somebody's"}


def test_a_link_stays_one_and_the_output_lies_where_it_leads(disk: Path) -> None:
    (disk / "other").mkdir()
    (disk / "other" / "real").mkdir()
    (disk / "out").symlink_to("other/real")

    partial = publish(disk / "out")

    assert partial.parent == disk / "other"
    assert (disk / "out").is_symlink()
    assert tree(disk / "other" / "real") == NEW
    publish(disk / "out", overwrite=True, text="old")
    assert (disk / "out").is_symlink()
    assert tree(disk / "other" / "real") == OLD
    assert sorted(path.name for path in disk.iterdir()) == ["other", "out"]


def test_a_full_directory_behind_a_link_is_an_output_that_exists(disk: Path) -> None:
    publish(disk / "real", text="old")
    (disk / "out").symlink_to("real")

    with pytest.raises(OutputExists):
        check_target(disk / "out", [], overwrite=False)


def test_a_link_that_leads_nowhere_is_refused(disk: Path) -> None:
    (disk / "out").symlink_to("gone")

    with pytest.raises(UsageError, match="leads nowhere"):
        check_target(disk / "out", [], overwrite=True)


@pytest.mark.parametrize("source", ["out", "out/global_step5", "out/hf/config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelt", ["out", "./other/../out", "link"])
def test_an_output_that_holds_an_input_is_refused(
    disk: Path, source: str, overwrite: bool, spelt: str
) -> None:
    (disk / "other").mkdir()
    (disk / "out" / "global_step5").mkdir(parents=True)
    (disk / "out" / "hf").mkdir()
    (disk / "out" / "hf" / "config.json").write_text("{}")
    (disk / "link").symlink_to("out")

    with pytest.raises(UsageError) as caught:
        check_target(disk / spelt, [disk / "other", disk / source], overwrite=overwrite)

    assert str(disk / source) in caught.value.fact
    assert "never changed or deleted" in str(caught.value.hint)


def test_an_output_that_holds_an_input_behind_a_link_is_refused(disk: Path) -> None:
    (disk / "out" / "hf").mkdir(parents=True)
    (disk / "base").symlink_to("out/hf")

    with pytest.raises(UsageError, match="delete the input"):
        check_target(disk / "out", [disk / "base"], overwrite=True)


def test_an_output_inside_or_beside_an_input_is_allowed(disk: Path) -> None:
    (disk / "run" / "global_step5").mkdir(parents=True)

    check_target(
        disk / "run" / "model", [disk / "run", disk / "run" / "global_step5"], overwrite=True
    )
    check_target(disk / "run" / "global_step5-hf", [disk / "run" / "global_step5"], overwrite=True)


def test_a_parent_that_cannot_be_made_is_named(disk: Path) -> None:
    (disk / "file").write_text("")

    with pytest.raises(OutputFailed) as caught:
        publish(disk / "file" / "deeper" / "out")

    assert caught.value.exit_code == 6
    assert tree(disk) == {"file": ""}


def test_a_directory_without_write_permission_is_named(disk: Path) -> None:
    (disk / "locked").mkdir()
    (disk / "locked").chmod(0o500)
    if os.access(disk / "locked", os.W_OK):
        pytest.skip("root may write anywhere")

    with pytest.raises(OutputFailed, match="Permission denied") as caught:
        publish(disk / "locked" / "out")

    assert caught.value.hint == "Check the permissions."


def test_leftovers_are_those_of_the_same_output(tmp_path: Path) -> None:
    for name in (
        "out.partial-0123abcd",
        "out.partial-deadbeef",
        "out2.partial-01234567",
        "out",
        "about.partial-01234567",
    ):
        (tmp_path / name).mkdir()

    found = leftovers(tmp_path / "out")

    assert [path.name for path in found] == ["out.partial-0123abcd", "out.partial-deadbeef"]
    assert leftovers(tmp_path / "nowhere" / "out") == []


@pytest.mark.parametrize("name", ["run[1]", "what?", "all*"])
def test_leftovers_take_the_name_literally(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.partial-01234567").mkdir()
    for other in ("run1", "whats", "all-of-them"):
        (tmp_path / f"{other}.partial-01234567").mkdir()

    assert leftovers(tmp_path / name) == [tmp_path / f"{name}.partial-01234567"]


def test_room_is_asked_of_the_disk_that_the_output_will_be_on(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet" / "there", 1)

    with pytest.raises(OutputFailed, match=r"needs 1000000000\.00 GB and its disk has") as caught:
        check_room(tmp_path / "not" / "yet" / "there", 10**18)

    assert caught.value.path == tmp_path / "not" / "yet" / "there"
    assert "another disk" in str(caught.value.hint)
    assert tree(tmp_path) == {}
