"""A run that was ended in any way is gone on with, to the same bytes, and reads nothing that is proven."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch._C._distributed_c10d import HashStore

from ckpt_tools import Report, average, consolidate
from ckpt_tools.errors import OutputExists, OutputFailed, UsageError
from ckpt_tools.ranks.clock import Clock
from ckpt_tools.writing import journal, publish
from tests.conftest import FIXTURES
from tests.conversion.test_crash import shell_status
from tests.support.forked import Forked
from tests.support.outputs import contents, partials, proven_units, units_in
from tests.support.ranks.in_threads import each, made
from tests.support.waiting import LONGEST_SECONDS, cpu_seconds, wait_until
from tests.writing.test_bytes import small_disk

__all__ = ["small_disk"]

CASE = FIXTURES / "zero" / "zero2-bf16-llama-3ranks"
OTHER = FIXTURES / "zero" / "zero3-bf16-llama-7ranks"
FP32 = FIXTURES / "zero" / "zero2-fp32-llama-2ranks"
# Many files, so that there is much to stop between: no block is of two files.
OPTIONS: dict[str, Any] = {"weights_only": True, "max_shard_size": 1_000, "workers": 1}


class Stopped(Exception):
    """What ends a run of these tests within the process."""


def stats(directory: Path) -> dict[Path, tuple[int, int]]:
    """What tells of any change below, but for the lock."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.name != "lock"
    }


class KnownLog(journal.Log):
    """A log that a test can ask whether all of it is proven."""

    last: ClassVar[KnownLog]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        KnownLog.last = self

    def is_proven(self) -> bool:
        return not self._thread.is_alive() or len(self.digests) == (
            units_in(self._path) if self._path.exists() else 0
        )


@pytest.fixture(autouse=True)
def quick_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_SECONDS", 0.002)
    monkeypatch.setattr(journal, "Log", KnownLog)


def until_proven(share: float, then: Callable[[], None]) -> Callable[[int, int], None]:
    """Calls ``then`` once a share of the bytes is written and what is written is proven."""

    def progress(done: int, total: int) -> None:
        if 0 < done >= share * total:
            wait_until(KnownLog.last.is_proven)
            then()

    return progress


def stop() -> None:
    raise Stopped


def stopped(checkpoint: Path, out: Path, share: float = 0.5, **options: Any) -> Path:
    """The partial directory of a run that was stopped when a share of it was written."""
    with pytest.raises(Stopped):
        consolidate(checkpoint, out, progress=until_proven(share, stop), **(OPTIONS | options))
    (home,) = partials(out)
    assert proven_units(home) > 0
    return home


def resumed(checkpoint: Path, out: Path, **options: Any) -> Report:
    return consolidate(checkpoint, out, resume=True, **(OPTIONS | options))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    consolidate(CASE / "checkpoint", out, **OPTIONS)
    assert len(list(out.glob("*.safetensors"))) > 5
    return out


# -- going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_stopped_run_is_gone_on_with_to_the_same_bytes(
    tmp_path: Path, undisturbed: Path, workers: int, share: float
) -> None:
    out = tmp_path / "out"
    home = stopped(CASE / "checkpoint", out, share)
    assert not out.exists()
    proven = proven_units(home)

    report = resumed(CASE / "checkpoint", out, workers=workers)

    assert contents(out) == contents(undisturbed)
    assert list(tmp_path.iterdir()) == [out]
    whole = consolidate(CASE / "checkpoint", tmp_path / "whole", **OPTIONS)
    assert 0 < report.bytes_read < whole.bytes_read
    assert report.bytes_written == whole.bytes_written
    assert report.warnings == whole.warnings
    (note,) = set(report.notes) - set(whole.notes)
    assert not_written_again(note) <= proven * 64


def not_written_again(note: str) -> int:
    match = re.search(r"earlier run: ([\d,]+) bytes were proven", note)
    assert match is not None
    return int(match[1].replace(",", ""))


def damage(home: Path, share: float) -> int:
    """Change a byte in some of the files that the journal notes as written; gives their number."""
    (log,) = (home / "journal").glob("*.log")
    noted = sorted(
        {json.loads(line.split("\t")[0])["file"] for line in log.read_text().splitlines()}
    )
    chosen = noted[: max(1, int(share * len(noted)))]
    for name in chosen:
        path = home / "output" / name
        data = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        data[begin + (len(data) - begin) // 2] ^= 0x10
        path.write_bytes(data)
    return len(chosen)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_units_that_changed_on_disk_are_written_again(
    tmp_path: Path, undisturbed: Path, workers: int, share: float
) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out", 0.7)
    damaged = damage(home, share)

    report = resumed(CASE / "checkpoint", tmp_path / "out", workers=workers)

    assert contents(tmp_path / "out") == contents(undisturbed)
    (note,) = [note for note in report.notes if "changed on disk" in note]
    assert f"written again: {damaged}." in note


def test_units_that_changed_on_disk_are_written_again_by_several_ranks(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Each rank digests the noted units of its share, which are not those that it wrote."""
    out = tmp_path / "out"
    damaged = damage(stopped(CASE / "checkpoint", out, 0.7), 1.0)

    reports = each(
        made(Clock(), 3, timeout=LONGEST_SECONDS, store=HashStore()),
        lambda own: resumed(CASE / "checkpoint", out, ranks=own),
    )

    assert contents(out) == contents(undisturbed)
    (note,) = [note for note in reports[0].notes if "changed on disk" in note]
    assert f"written again: {damaged}." in note


def test_nothing_is_read_where_all_was_proven(tmp_path: Path, undisturbed: Path) -> None:
    stopped(CASE / "checkpoint", tmp_path / "out", 1.0)

    report = resumed(CASE / "checkpoint", tmp_path / "out")

    assert report.bytes_read == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_progress_counts_what_is_proven_and_ends_at_the_whole(tmp_path: Path) -> None:
    stopped(CASE / "checkpoint", tmp_path / "out")
    told: list[tuple[int, int]] = []

    report = resumed(
        CASE / "checkpoint", tmp_path / "out", progress=lambda d, t: told.append((d, t))
    )

    (total,) = {total for _, total in told}
    (kept,) = [not_written_again(note) for note in report.notes if "earlier run" in note]
    done = [done for done, _ in told]
    assert done[0] == 0
    assert kept in done
    assert done == sorted(done)
    assert done[-1] == total == 2 * report.parameters


def test_a_run_may_be_stopped_again_and_again(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    home = stopped(CASE / "checkpoint", out, 0.1)
    for share in (0.3, 0.5, 0.7, 0.9):
        before = proven_units(home)
        assert stopped(CASE / "checkpoint", out, share, resume=True) == home
        assert proven_units(home) > before

    resumed(CASE / "checkpoint", out)

    assert contents(out) == contents(undisturbed)
    assert list(tmp_path.iterdir()) == [out]


def test_what_goes_wrong_is_told_with_how_to_go_on(tmp_path: Path) -> None:
    shutil.copytree(CASE / "checkpoint", tmp_path / "run")
    out = tmp_path / "out"

    def cut_off() -> None:
        for path in (tmp_path / "run").glob("*/*optim_states.pt"):
            os.truncate(path, 100)

    with pytest.raises(Exception, match="ends at byte") as caught:
        consolidate(tmp_path / "run", out, progress=until_proven(0.3, cut_off), **OPTIONS)

    (home,) = partials(out)
    assert "--resume" in str(caught.value)
    assert f"delete {home}" in str(caught.value)


def test_a_run_that_proved_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        consolidate(
            CASE / "checkpoint",
            tmp_path / "made" / "out",
            progress=lambda done, total: stop(),
            **OPTIONS,
        )

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["nothing", "no journal", "a torn journal", "of another output"])
def test_where_there_is_nothing_to_go_on_with_a_run_begins_anew(
    tmp_path: Path, undisturbed: Path, left: str
) -> None:
    out = tmp_path / "out"
    other = tmp_path / ("out2.partial-0" if left == "of another output" else "out.partial-0")
    if left != "nothing":
        (other / "output").mkdir(parents=True)
        (other / "output" / "model.safetensors").write_text("begun")
    if left == "a torn journal":
        (other / "journal").mkdir()
        (other / "journal" / "run.json").write_text('{"tool": ')

    report = resumed(CASE / "checkpoint", out)

    assert contents(out) == contents(undisturbed)
    assert report.bytes_read > 0
    if left != "nothing":
        assert contents(other)["output/model.safetensors"] == b"begun"


# -- refusing ---------------------------------------------------------------------------------------


def refused(home: Path, why: str, *arguments: Any, **options: Any) -> None:
    before = stats(home)

    with pytest.raises(UsageError, match=why) as caught:
        resumed(*arguments, **options)

    assert caught.value.exit_code == 2
    assert caught.value.path == home
    assert "Repeat the earlier command" in str(caught.value.hint)
    assert str(home) in str(caught.value.hint)
    assert stats(home) == before


OTHER_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "fp32"}, "dtype was auto, now fp32"),
    ({"dtype": "keep"}, "dtype was auto, now keep"),
    ({"weights": "model"}, "weights was master, now model"),
    ({"max_shard_size": 1_500}, "its layout differs"),
]


@pytest.mark.parametrize(("options", "which"), OTHER_OPTIONS)
def test_other_options_are_refused_and_nothing_is_changed(
    tmp_path: Path, options: dict[str, Any], which: str
) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out")

    why = f"with other options.*{which}"
    refused(home, why, CASE / "checkpoint", tmp_path / "out", **options)


def test_the_other_copy_is_another_option_though_the_layout_is_the_same(tmp_path: Path) -> None:
    """Both are fp32 there, and nothing but their bytes could tell them apart."""
    home = stopped(FP32 / "checkpoint", tmp_path / "out", dtype="keep")

    refused(
        *(home, "with other options", FP32 / "checkpoint", tmp_path / "out"),
        dtype="keep",
        weights="model",
    )


def test_other_coefficients_are_other_options_though_the_layout_is_the_same(
    tmp_path: Path,
) -> None:
    checkpoints, out = [CASE / "checkpoint", OTHER / "checkpoint"], tmp_path / "out"
    weights: dict[str, Any] = {"coefficients": [0.25, 0.75]}
    average(checkpoints, tmp_path / "whole", **weights, **OPTIONS)
    with pytest.raises(Stopped):
        average(checkpoints, out, progress=until_proven(0.5, stop), **weights, **OPTIONS)
    (home,) = partials(out)
    before = stats(home)

    with pytest.raises(UsageError, match="with other options"):
        average(checkpoints, out, resume=True, **OPTIONS)

    assert stats(home) == before
    average(checkpoints, out, resume=True, **weights, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["touched", "replaced"])
@pytest.mark.parametrize("file", ["model_states", "pp_rank_0", "pp_rank_2"])
def test_a_source_that_changed_is_refused_and_nothing_is_changed(
    tmp_path: Path, change: str, file: str
) -> None:
    shutil.copytree(CASE / "checkpoint", tmp_path / "run")
    home = stopped(tmp_path / "run", tmp_path / "out")
    (shard,) = (tmp_path / "run").glob(f"*/*{file}*.pt")
    if change == "touched":
        os.utime(shard)
    else:
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content)

    refused(home, "or the checkpoint changed", tmp_path / "run", tmp_path / "out")


def test_another_checkpoint_of_the_same_layout_is_refused(tmp_path: Path) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out")

    refused(home, "from another checkpoint", OTHER / "checkpoint", tmp_path / "out")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out")
    monkeypatch.setattr("ckpt_tools.writing.delivery.__version__", "99.0")

    refused(home, "this is 99.0", CASE / "checkpoint", tmp_path / "out")


def test_a_refusal_is_status_2_on_the_command_line(tmp_path: Path) -> None:
    from tests.cli.test_consolidate import run

    home = stopped(CASE / "checkpoint", tmp_path / "out")
    arguments = ("consolidate", CASE / "checkpoint", tmp_path / "out", "--weights-only")

    done = run(*arguments, "--resume", "--dtype", "fp32")

    assert done.exit_code == 2
    assert "error: the earlier run cannot be resumed" in done.stderr
    assert f"  in: {home}" in done.stderr
    assert run(*arguments, "--resume", "--max-shard-size", "1KB").exit_code == 0
    assert not home.exists()


def test_without_resume_a_run_begins_anew_and_says_what_is_left(
    tmp_path: Path, undisturbed: Path
) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out")
    before = stats(home)

    report = consolidate(CASE / "checkpoint", tmp_path / "out", **OPTIONS)

    assert contents(tmp_path / "out") == contents(undisturbed)
    assert [w for w in report.warnings if str(home) in w and "--resume" in w]
    assert stats(home) == before


# -- what another run left is not mixed in ----------------------------------------------------------


def journal_lines(home: Path) -> tuple[Path, list[bytes]]:
    (path,) = (home / "journal").glob("*.log")
    return path, path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone", "foreign"])
def test_what_a_damaged_line_said_is_written_again(
    tmp_path: Path, undisturbed: Path, damage: str
) -> None:
    out = tmp_path / "out"
    home = stopped(CASE / "checkpoint", out, 1.0)
    path, lines = journal_lines(home)
    entry = json.loads(lines[2].rpartition(b"\t")[0])
    lines[2] = {
        "flipped": lines[2].replace(b'"first": ', b'"first":!'),
        "cut off": lines[2][:40],
        "gone": b"",
        "foreign": b"?\n",
    }[damage]
    if damage == "cut off":
        lines = lines[:3]
    path.write_bytes(b"".join(lines))
    weights = home / "output" / entry["file"]
    ruin(weights)

    report = resumed(CASE / "checkpoint", out)

    assert report.bytes_read > 0
    assert contents(out) == contents(undisturbed)


def ruin(path: Path) -> None:
    """Put other bytes in the place of the tensors of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start].ljust(len(content), b"?"))


def test_files_whose_units_are_proven_are_not_written(tmp_path: Path, undisturbed: Path) -> None:
    """Or the test above, and every other one, would not show that the journal is used."""
    home = stopped(CASE / "checkpoint", tmp_path / "out", 1.0)
    before = stats(home / "output")
    ruin(third(home / "output"))

    resumed(CASE / "checkpoint", tmp_path / "out")

    assert contents(tmp_path / "out") == contents(undisturbed)
    after = stats(tmp_path / "out")
    weights = {path for path in before if path.suffix == ".safetensors"}
    changed = {path.name for path in weights if before[path] != after[tmp_path / "out" / path.name]}
    assert changed == {"model-00003-of-00010.safetensors"}


def third(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[2]


@pytest.mark.parametrize("damage", ["gone", "cut short", "another header"])
def test_a_file_that_was_lost_is_written_again_even_after_another_stop(
    tmp_path: Path, undisturbed: Path, damage: str
) -> None:
    """The journal still says that it is done; it was, before it was lost."""
    out = tmp_path / "out"
    home = stopped(CASE / "checkpoint", out, 1.0)
    weights = third(home / "output")
    if damage == "gone":
        weights.unlink()
    elif damage == "cut short":
        os.truncate(weights, weights.stat().st_size - 10)
    else:
        weights.write_bytes(weights.read_bytes().replace(b"weight", b"weigth"))

    with pytest.raises(Stopped):  # once the file is there anew and nothing is in it
        resumed(CASE / "checkpoint", out, progress=lambda done, total: stop())
    assert weights.stat().st_size > 0
    report = resumed(CASE / "checkpoint", out)

    assert report.bytes_read > 0
    assert contents(out) == contents(undisturbed)


def test_a_partial_directory_that_lost_its_output_is_written_anew(
    tmp_path: Path, undisturbed: Path
) -> None:
    home = stopped(CASE / "checkpoint", tmp_path / "out", 1.0)
    shutil.rmtree(home / "output")

    resumed(CASE / "checkpoint", tmp_path / "out")

    assert contents(tmp_path / "out") == contents(undisturbed)


def appear(out: Path) -> None:
    out.mkdir(exist_ok=True)
    (out / "model").write_text("somebody's")


def test_a_run_that_could_not_be_published_is_published_without_reading_again(
    tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputExists, match="appeared while") as caught:
        consolidate(
            CASE / "checkpoint",
            out,
            progress=until_proven(1.0, lambda: appear(out)),
            **OPTIONS,
        )
    assert "--resume" in str(caught.value.hint)
    assert contents(out) == {"model": b"somebody's"}

    with pytest.raises(OutputExists):
        resumed(CASE / "checkpoint", out)
    report = resumed(CASE / "checkpoint", out, overwrite=True)

    assert report.bytes_read == 0
    assert contents(out) == contents(undisturbed)
    assert list(tmp_path.iterdir()) == [out]


def test_files_that_are_not_asked_for_any_more_do_not_survive(
    tmp_path: Path, undisturbed: Path
) -> None:
    """An earlier run came as far as its checksums, and was asked for others."""
    out = tmp_path / "out"
    with pytest.raises(OutputExists):
        consolidate(
            CASE / "checkpoint",
            out,
            progress=until_proven(1.0, lambda: appear(out)),
            sha256=True,
            **OPTIONS,
        )
    (home,) = partials(out)
    assert (home / "output" / "SHA256SUMS").is_file()
    (home / "output" / "additional_chat_templates").mkdir()
    (home / "output" / "additional_chat_templates" / "old.jinja").write_text("old")
    shutil.rmtree(out)

    report = resumed(CASE / "checkpoint", out)

    assert contents(out) == contents(undisturbed)
    assert not (out / "additional_chat_templates").exists()
    assert set(report.files) == set(contents(undisturbed))


def test_the_output_that_was_replaced_is_never_published_again(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed after the exchange, while it removes the old output, which looks alike."""
    out = tmp_path / "out"
    consolidate(OTHER / "checkpoint", out, **OPTIONS)
    old = contents(out)
    assert old.keys() == contents(undisturbed).keys()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        consolidate(
            CASE / "checkpoint",
            out,
            overwrite=True,
            progress=until_proven(1.0, lambda: None),
            **OPTIONS,
        )
    assert contents(out) == contents(undisturbed)
    (home,) = partials(out)
    assert proven_units(home) > 0
    left = contents(home)
    assert old[third(out).name] in left.values(), "the old output is there still"

    for _ in range(2):
        resumed(CASE / "checkpoint", out, overwrite=True)
        assert contents(out) == contents(undisturbed)
    assert partials(out) == []


@pytest.mark.parametrize("resume", [False, True])
def test_nobody_else_goes_on_with_it_while_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    out = tmp_path / "out"
    if resume:
        stopped(CASE / "checkpoint", out)
    sync, tried = publish._sync_tree, []

    def publishing(directory: Path) -> None:
        (home,) = partials(out)
        with pytest.raises(UsageError, match="another run is writing there"):
            journal.Lock(home)
        tried.append(home)
        sync(directory)

    monkeypatch.setattr(publish, "_sync_tree", publishing)

    resumed(CASE / "checkpoint", out)

    assert len(tried) == 1
    assert list(tmp_path.iterdir()) == [out]


# -- a disk that is full ----------------------------------------------------------------------------


def free(disk: Path) -> None:
    (disk / "somebody's").unlink()


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)


@pytest.mark.parametrize("remedy", [free, enlarge])
def test_a_full_disk_keeps_what_is_proven_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, remedy: Callable[[Path], None]
) -> None:
    source, out = tmp_path / "source", small_disk / "out"
    source.mkdir()
    tensors = {f"t{i}": torch.full((10_000,), i + 1.0) for i in range(15)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = OPTIONS | {"max_shard_size": 50_000}

    def fill() -> None:
        with (small_disk / "somebody's").open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                return

    with pytest.raises(OutputFailed, match="no space left") as caught:
        consolidate(source, out, progress=until_proven(0.4, fill), **options)
    assert caught.value.exit_code == 6
    assert "Free some space" in str(caught.value.hint)
    assert "--resume" in str(caught.value.hint)
    assert not out.exists()
    (home,) = partials(out)
    with pytest.raises(OutputFailed):
        consolidate(source, out, resume=True, **options)
    assert partials(out) == [home]
    assert proven_units(home) > 0

    remedy(small_disk)
    report = consolidate(source, out, resume=True, **options)

    assert 0 < report.bytes_read < 0.7 * 600_000
    consolidate(source, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert partials(out) == []


# -- real processes ---------------------------------------------------------------------------------


# Of a digest in its line of a log.
DIGEST_CHARACTERS = 36
# The program as it is, but for the time after which what was written is noted.
PROGRAM = """
import sys
from ckpt_tools.writing import journal
from ckpt_tools.cli import main
journal._INTERVAL_SECONDS = 0.01
main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Large:
    """A checkpoint that takes a while to write, what comes of it, and how long that uses the processor."""

    path: Path
    output: Path
    report: dict[str, Any]
    cpu_seconds: float

    @property
    def units(self) -> int:
        manifest = json.loads((self.output / "ckpt_tools_manifest.json").read_text())
        return int(self.report["bytes_read"]) // int(manifest["unit_bytes"])


def measured(checkpoint: Path, root: Path) -> Large:
    out, log = root / "out", root / "log"
    run = start(checkpoint, out, log)
    os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
    used = cpu_seconds(run.pid)
    assert run.wait() == 0, log.read_text()
    return Large(checkpoint, out, json.loads(log.read_text()), used)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """A file of 120 MB without a zero in it: what is not written yet reads as zeros."""
    root = tmp_path_factory.mktemp("large")
    (root / "run").mkdir()
    values = torch.arange(1, 1_000_001, dtype=torch.float32)
    tensors = {f"layers.{i}.weight": values + i for i in range(30)}
    save_file(tensors, root / "run" / "model.safetensors", {"format": "pt"})
    yield measured(root / "run", root)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """A ZeRO-3 checkpoint of four ranks, 240 MB of masters."""
    root = tmp_path_factory.mktemp("zero")
    script = Path(__file__).parents[2] / "benchmarks" / "make_zero.py"
    made = [sys.executable, script, root / "run", "--params", "6e7", "--ranks", "4"]
    assert Forked([*map(str, made), "--no-moments"]).wait() == 0
    yield measured(root / "run", root)
    shutil.rmtree(root)


def start(
    checkpoint: Path, out: Path, log: Path, *options: str, workers: int = 2
) -> subprocess.Popen[bytes]:
    arguments = ["--weights-only", "--dtype", "fp32", "--max-shard-size", "50MB", "--json"]
    command = ["consolidate", str(checkpoint), str(out), *arguments, "--workers", str(workers)]
    with log.open("wb") as stream:
        return Forked(
            [sys.executable, "-c", PROGRAM, *command, *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_share(run: subprocess.Popen[bytes], out: Path, units: float) -> None:
    """Until about so many units are proven, or the run has ended."""
    wait_until(lambda: run.poll() is not None or journaled_bytes(out) > DIGEST_CHARACTERS * units)


def journaled_bytes(out: Path) -> int:
    logs = [log for home in partials(out) for log in home.glob("journal/*.log")]
    try:
        return sum(log.stat().st_size for log in logs)
    except FileNotFoundError:  # the run was published, and its journal is gone
        return 0


def end_with(run: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Send the signal; says whether it came before the run was done."""
    if run.poll() is None:
        os.killpg(run.pid, number)
    return shell_status(run) == 128 + number


def go_on_to_the_end(large: Large, out: Path, log: Path, *options: str) -> None:
    """Resume, and compare with the undisturbed run what comes of it and what was read for it."""
    proven = sum(map(proven_units, partials(out)))
    run = start(large.path, out, log, "--resume", *options)
    assert run.wait() == 0, log.read_text()
    assert contents(out) == contents(large.output)
    assert partials(out) == []
    report = json.loads(log.read_text())
    kept = sum(not_written_again(note) for note in report["notes"] if "earlier run" in note)
    assert report["bytes_read"] == large.report["bytes_read"] - kept
    assert (kept > 0) == (proven > 0)
    unit_bytes = large.report["bytes_read"] / large.units
    assert (proven - 2 * len(report["files"])) * unit_bytes <= kept <= proven * unit_bytes + 1


def kill_and_go_on(large: Large, directory: Path, seed: int, kills: int) -> None:
    """One output that is killed ``kills`` times on its way, and until a run proved something."""
    chance = random.Random(seed)
    out, log = directory / "out", directory / "log"
    count = useful = 0
    while count < kills or not useful:
        workers = chance.choice([1, 2, 3])
        before = max(map(proven_units, partials(out)), default=0)
        options = ["--resume"] if partials(out) else []
        run = start(large.path, out, log, *options, workers=workers)
        if chance.random() < 0.7:
            share = chance.uniform(0, 1)
            wait_for_share(run, out, before + share * (large.units - before))
        else:
            wait_for_use(run, chance.uniform(0, large.cpu_seconds))
        if not end_with(run, signal.SIGKILL):
            assert contents(out) == contents(large.output)
            shutil.rmtree(out)
            continue
        count += 1
        assert not out.exists() or contents(out) == contents(large.output)
        if out.exists():  # killed on its way out
            for path in (out, *partials(out)):
                shutil.rmtree(path)
        useful += any(proven_units(home) > before for home in partials(out))
    go_on_to_the_end(large, out, log)
    shutil.rmtree(out)


def wait_for_use(run: subprocess.Popen[bytes], seconds: float) -> None:
    """Until it has used the processor for so long, or has ended."""
    wait_until(lambda: run.poll() is not None or cpu_seconds(run.pid) >= seconds)


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_to_the_same_bytes(tmp_path: Path, large: Large) -> None:
    kill_and_go_on(large, tmp_path, 0, kills=2)


@pytest.mark.slow
def test_a_conversion_of_zero_shards_killed_again_and_again_is_gone_on_with_to_the_same_bytes(
    tmp_path: Path, zero: Large
) -> None:
    """``KILLS`` times, three by default."""
    kill_and_go_on(zero, tmp_path, 100, kills=int(os.environ.get("KILLS", "3")))


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_proven_and_is_gone_on_with(
    tmp_path: Path, large: Large
) -> None:
    out, log = tmp_path / "made" / "out", tmp_path / "log"
    for number, share in ((signal.SIGTERM, 0.2), (signal.SIGINT, 0.5)):
        while True:
            before = journaled_bytes(out)
            run = start(large.path, out, log, "--resume")
            # Not before it has written: a signal to an interpreter that starts has another status.
            wait_for_share(run, out, max(share * large.units, before / DIGEST_CHARACTERS))
            if end_with(run, number):
                break
            shutil.rmtree(out)
        assert not out.exists()
        (home,) = partials(out)
        assert proven_units(home) > 0.5 * share * large.units
        said = log.read_text()
        assert "Traceback" not in said
        assert number is not signal.SIGINT or f"with --resume, or delete {home}" in said

    go_on_to_the_end(large, out, log)


@pytest.mark.slow
def test_a_run_that_is_alive_is_not_gone_on_with(tmp_path: Path, large: Large) -> None:
    out = tmp_path / "out"
    while True:
        alive = start(large.path, out, tmp_path / "log")
        wait_for_share(alive, out, 0)
        alive.send_signal(signal.SIGSTOP)
        # A signal is only sent: the threads go on for a moment.
        how = os.waitid(os.P_PID, alive.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert how is not None
        if how.si_code == os.CLD_STOPPED and not out.exists():
            break
        alive.send_signal(signal.SIGCONT)
        alive.wait()
        shutil.rmtree(out)
    (home,) = partials(out)
    before = stats(home)

    second = start(large.path, out, tmp_path / "second", "--resume")

    assert second.wait() == 2
    said = (tmp_path / "second").read_text()
    assert "another run is writing there" in said
    assert "delete" not in said
    assert stats(home) == before
    alive.send_signal(signal.SIGCONT)
    assert alive.wait() == 0, (tmp_path / "log").read_text()
    assert contents(out) == contents(large.output)
    assert partials(out) == []
