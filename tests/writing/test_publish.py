"""An output appears complete or not at all, and what was there before is not lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tools import open_checkpoint, verify
from ckpt_tools.errors import CkptError, OutputExists, OutputFailed, UsageError
from ckpt_tools.writing import publish as publishing
from ckpt_tools.writing.publish import (
    Partial,
    check_room,
    check_target,
    leftovers,
    partial_directory,
)


def tree(directory: Path) -> dict[str, str | None]:
    """Every file below with its text, every directory with None, links followed."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_text()
        for path in sorted(directory.rglob("*"))
    }


def publish(
    target: Path, *, overwrite: bool = False, text: str = "new", resume: Path | None = None
) -> Partial:
    """Make an output of a file and a file in a directory; gives where it was made."""
    with partial_directory(target, overwrite=overwrite, resume=resume) as partial:
        (partial.path / "model").write_text(text)
        (partial.path / "extra").mkdir()
        (partial.path / "extra" / "code.py").write_text(text)
    return partial


def fail(
    target: Path,
    error: BaseException,
    *,
    overwrite: bool = False,
    keep: bool = False,
    resume: Path | None = None,
) -> None:
    """Make part of an output and then fail, with work that is worth keeping or without."""
    with partial_directory(target, overwrite=overwrite, resume=resume) as partial:
        (partial.path / "model").write_text("new")
        (partial.home / "journal").write_text("begun")
        partial.keep = keep or partial.keep
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
        (partial.path / "model").write_text("new")
        (partial.home / "journal").write_text("of no concern to the output")
        assert partial.home.parent == disk
        assert partial.home.name.startswith("out.partial-")
        assert partial.path.parent == partial.home
        assert not (disk / "out").exists()

    assert tree(disk) == {"out": None, "out/model": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_on_disk_before_the_output_has_its_name_and_then_the_name(
    disk: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Each file and directory is synced while it is in the partial directory, the parent afterwards."""
    if overwrite:
        publish(disk / "out", text="old")
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        published = (disk / "out" / "model").exists() and (
            disk / "out" / "model"
        ).read_text() == "new"
        synced.append((path.name, published))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)

    publish(disk / "out", overwrite=overwrite)

    within = ["output", "model", "extra", "code.py"]
    assert sorted(synced[:-1]) == sorted((name, False) for name in within)
    assert synced[-1] == (disk.name, True)


def test_two_runs_never_share_a_partial_directory(disk: Path) -> None:
    with (
        partial_directory(disk / "out", overwrite=True) as one,
        partial_directory(disk / "out", overwrite=True) as two,
    ):
        assert one.home != two.home


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


def kept(disk: Path, error: BaseException | None = None, *, overwrite: bool = False) -> Path:
    """The directory that a failed run left, whose work is worth keeping."""
    error = error or ValueError("of the block")
    with pytest.raises(type(error), match="of the block"):
        fail(disk / "out", error, keep=True, overwrite=overwrite)
    (left,) = leftovers(disk / "out")
    return left


def test_work_that_is_worth_keeping_outlives_an_error(tmp_path: Path) -> None:
    error = OutputFailed("of the block", hint="Free some room.")

    left = kept(tmp_path, error)

    assert tree(tmp_path) == {
        left.name: None,
        f"{left.name}/journal": "begun",
        f"{left.name}/output": None,
        f"{left.name}/output/model": "new",
    }
    assert error.hint is not None
    assert error.hint.startswith("Free some room. ")
    assert "--resume" in error.hint
    assert str(left) in error.hint
    shutil.rmtree(left)


def test_an_error_without_a_next_step_gets_one_where_work_was_kept(tmp_path: Path) -> None:
    error = OutputFailed("of the block")

    left = kept(tmp_path, error)

    assert error.hint is not None
    assert error.hint.startswith("The finished part is kept")
    assert str(left) in error.hint


def test_an_error_that_leaves_nothing_has_no_other_next_step(disk: Path) -> None:
    error = OutputFailed("of the block", hint="Free some room.")

    with pytest.raises(OutputFailed):
        fail(disk / "out", error)

    assert error.hint == "Free some room."


@pytest.mark.parametrize("overwrite", [False, True])
def test_kept_work_is_gone_on_with_and_published(disk: Path, overwrite: bool) -> None:
    if overwrite:
        publish(disk / "out", text="old")
    left = kept(disk, overwrite=overwrite)

    with partial_directory(disk / "out", overwrite=overwrite, resume=left) as partial:
        assert partial.home == left
        assert (partial.path / "model").read_text() == "new"
        (partial.path / "config").write_text("newer")
        assert overwrite == (disk / "out").exists()

    assert tree(disk) == {"out": None, "out/model": "new", "out/config": "newer"}


def test_kept_work_is_kept_again_when_going_on_with_it_fails(tmp_path: Path) -> None:
    left = kept(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt(), resume=left)

    assert leftovers(tmp_path / "out") == [left]
    assert (left / "output" / "model").read_text() == "new"


def test_parents_of_what_is_kept_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the block"):
        fail(tmp_path / "a" / "b" / "out", ValueError("of the block"), keep=True)

    (left,) = leftovers(tmp_path / "a" / "b" / "out")
    assert (left / "output" / "model").read_text() == "new"


@pytest.mark.parametrize("exchange", [True, False])
def test_work_is_kept_where_an_output_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    def write() -> None:
        with partial_directory(tmp_path / "out", overwrite=False) as partial:
            (partial.path / "model").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "model").write_text("somebody's")
            partial.keep = True

    if not exchange:
        monkeypatch.setattr("ckpt_tools.writing.publish._exchange", lambda a, b: False)
    with pytest.raises(OutputExists, match="appeared while") as caught:
        write()

    (left,) = leftovers(tmp_path / "out")
    assert str(left) in str(caught.value.hint)
    assert tree(left) == {"output": None, "output/model": "new"}
    with partial_directory(tmp_path / "out", overwrite=True, resume=left):
        pass
    assert tree(tmp_path) == {"out": None, "out/model": "new"}


def test_work_is_kept_where_it_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", text="old")

    def refuse(a: Path, b: Path) -> bool:
        raise OSError(5, "Input/output error", str(b))

    def write() -> None:
        with partial_directory(tmp_path / "out", overwrite=True) as partial:
            (partial.path / "model").write_text("new")
            partial.keep = True

    monkeypatch.setattr("ckpt_tools.writing.publish._exchange", refuse)
    with pytest.raises(OutputFailed, match="Input/output error"):
        write()

    assert tree(tmp_path / "out") == OLD
    (left,) = leftovers(tmp_path / "out")
    assert tree(left) == {"output": None, "output/model": "new"}


@pytest.mark.parametrize("resumed", [False, True])
def test_the_old_output_is_never_taken_for_kept_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """A run that is killed while it removes the old output has exchanged the two already."""
    publish(tmp_path / "out", text="old")
    left = kept(tmp_path, overwrite=True) if resumed else None
    seen: list[dict[str, str | None]] = []

    def killed(path: Path, ignore_errors: bool = False) -> None:
        (home,) = leftovers(tmp_path / "out")
        seen.append(tree(home))

    monkeypatch.setattr("ckpt_tools.writing.publish.shutil.rmtree", killed)
    with partial_directory(tmp_path / "out", overwrite=True, resume=left) as partial:
        (partial.path / "model").write_text("newest")
        partial.keep = True

    assert tree(tmp_path / "out") == {"model": "newest"}
    assert "old" in seen[0].values(), "the old output is not removed yet"
    assert not any(name.startswith("output") for name in seen[0])


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
            (partial.path / "model").write_text("new")
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
    monkeypatch.setattr("ckpt_tools.writing.publish._exchange", lambda a, b: False)
    publish(disk / "out", text="old")

    publish(disk / "out", overwrite=True)

    assert tree(disk) == {"out": None} | {f"out/{name}": text for name, text in NEW.items()}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_between_the_two_renames_leaves_an_output(
    disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr("ckpt_tools.writing.publish._exchange", lambda a, b: False)
    publish(disk / "out", text="old")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if ".replaced-" in target.name and moment == "before":
            rename(source, target)
            raise KeyboardInterrupt
        rename(source, target)
        if "complete-" in source.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(disk / "out", overwrite=True)

    assert tree(disk / "out") == (OLD if moment == "before" else NEW)


def test_after_a_kill_between_the_two_renames_both_outputs_are_named(disk: Path) -> None:
    publish(disk / "out", text="old")
    child = os.fork()
    if child == 0:
        publishing._exchange = lambda a, b: False
        rename = os.rename

        def killed(source: Path, target: Path) -> None:
            if target == disk / "out" and source.name.startswith("complete-"):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.rename = killed
        publish(disk / "out", overwrite=True)
    os.waitpid(child, 0)
    assert not (disk / "out").exists()

    with pytest.raises(OutputExists, match="has left it under another name") as caught:
        check_target(disk / "out", [], overwrite=True)
    for look in (lambda: open_checkpoint(disk / "out"), lambda: verify(disk / "out")):
        with pytest.raises(CkptError) as absent:
            look()
        assert absent.value.hint == caught.value.hint
    old, new = re.findall(r"mv (\S+) (\S+?)(?:\.|$)(?: |$)", str(caught.value.hint))
    for command in (old, new):
        os.rename(*command)
        assert tree(disk / "out") == (OLD if command == old else NEW)
        shutil.rmtree(disk / "out")
    check_target(disk / "out", [], overwrite=False)
    for partial in disk.glob("*.partial-*"):
        shutil.rmtree(partial)


def test_the_old_output_is_there_until_the_new_one_is(disk: Path) -> None:
    publish(disk / "out", text="old")

    with partial_directory(disk / "out", overwrite=True) as partial:
        (partial.path / "model").write_text("new")
        assert tree(disk / "out") == OLD

    assert tree(disk / "out") == {"model": "new"}


@pytest.mark.slow
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

    assert partial.home.parent == disk / "other"
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

    with pytest.raises(UsageError, match="it is a broken link"):
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

    assert caught.value.hint == "Check the permissions, or name an output on another disk."


def test_what_is_published_holds_nothing_of_what_the_run_kept_for_itself(disk: Path) -> None:
    with partial_directory(disk / "out", overwrite=False) as partial:
        (partial.path / "model").write_text("new")
        (partial.home / "journal").mkdir()
        (partial.home / "journal" / "log").write_text("done")

    assert tree(disk) == {"out": None, "out/model": "new"}


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

    with pytest.raises(OutputFailed, match=r"needs 1e\+06 TB and its disk has") as caught:
        check_room(tmp_path / "not" / "yet" / "there", 10**18)

    assert caught.value.path == tmp_path / "not" / "yet" / "there"
    assert "another disk" in str(caught.value.hint)
    assert tree(tmp_path) == {}
