"""A tree of several places looks like one directory, to everything that asks a path."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.storage.folders import folders_of, local_paths, searched
from ckpt_tools.storage.places import (
    DirectoryPlace,
    FileFacts,
    LocalFile,
    Place,
    Region,
    read_fully,
)
from ckpt_tools.storage.pool import Pool, PooledPath
from ckpt_tools.storage.reading import open_for_reading, read_at
from tests.support.in_memory import Memory

ROOT = Path(__file__).resolve().parents[2]
HERE = {"latest": b"global_step6", "global_step6/rank0.pt": b"0" * 10}
THERE = {"global_step6/rank1.pt": b"1" * 20, "global_step6/deep/note.txt": b"there\n"}
FAR = {"global_step6/rank2.pt": b"2" * 9000, "global_step6/far.txt": "f\u00e4r\nline".encode()}


def lay(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return lay(tmp_path / "here" / "run", HERE)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return lay(tmp_path / "there" / "run", THERE)


@pytest.fixture
def far() -> Memory:
    return Memory(FAR)


@pytest.fixture
def pool(here: Path, there: Path, far: Memory) -> Pool:
    return Pool(here, [DirectoryPlace(here), DirectoryPlace(there), far])


@pytest.fixture
def run(pool: Pool) -> PooledPath:
    return pool.path()


# What is there.


def test_a_directory_holds_the_files_of_all_places(run: PooledPath) -> None:
    assert sorted(entry.name for entry in run.iterdir()) == ["global_step6", "latest"]
    names = [entry.name for entry in (run / "global_step6").iterdir()]
    assert names == ["deep", "far.txt", "rank0.pt", "rank1.pt", "rank2.pt"]


def test_files_are_read_wherever_they_lie(run: PooledPath) -> None:
    for name, data in (HERE | THERE | FAR).items():
        assert (run / name).read_bytes() == data
        assert (run / name).stat().st_size == len(data)


@pytest.mark.parametrize(
    ("name", "exists", "is_file", "is_dir"),
    [
        ("", True, False, True),
        ("latest", True, True, False),
        ("global_step6", True, False, True),
        ("global_step6/deep", True, False, True),
        ("global_step6/rank1.pt", True, True, False),
        ("global_step6/rank2.pt", True, True, False),
        ("global_step6/rank3.pt", False, False, False),
        ("global_step7", False, False, False),
        ("global_step", False, False, False),
    ],
)
def test_what_a_path_is(
    run: PooledPath, name: str, exists: bool, is_file: bool, is_dir: bool
) -> None:
    path = run / name
    assert (path.exists(), path.is_file(), path.is_dir()) == (exists, is_file, is_dir)


def test_what_is_not_there_is_an_error_of_the_file_system(run: PooledPath) -> None:
    for look in (
        lambda: (run / "nothing").open(),
        lambda: (run / "nothing").stat(),
        lambda: list((run / "nothing").iterdir()),
        lambda: list((run / "latest").iterdir()),
        lambda: open_for_reading(run / "nothing"),
        lambda: (run / "nothing").resolve(strict=True),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            look()
        assert caught.value.errno == errno.ENOENT
        assert str(run) in str(caught.value)


def test_kind_size_and_time_are_told(run: PooledPath, here: Path) -> None:
    real = (here / "latest").stat()
    found = (run / "latest").stat()
    assert (found.st_size, found.st_mtime_ns) == (real.st_size, real.st_mtime_ns)
    assert found.st_mtime == pytest.approx(real.st_mtime, abs=1)
    assert (run / "global_step6" / "rank2.pt").stat().st_mtime_ns == 10**18
    assert not os.path.stat.S_ISDIR(found.st_mode)  # type: ignore[attr-defined]
    assert os.path.stat.S_ISDIR(run.stat().st_mode)  # type: ignore[attr-defined]


def test_a_file_that_grew_meanwhile_is_as_large_as_it_is_now(run: PooledPath, here: Path) -> None:
    (here / "latest").write_bytes(b"global_step6000")
    assert (run / "latest").stat().st_size == 15
    assert (run / "latest").read_text() == "global_step6000"


def test_text_is_read_as_of_a_plain_path(run: PooledPath, tmp_path: Path) -> None:
    far_text = run / "global_step6" / "far.txt"
    (tmp_path / "plain.txt").write_bytes(FAR["global_step6/far.txt"])
    for path in (far_text, tmp_path / "plain.txt"):
        assert path.read_text(encoding="utf-8") == "f\u00e4r\nline"
        assert path.read_text("ascii", "replace") == "f\ufffd\ufffdr\nline"
        with path.open(encoding="utf-8") as lines:
            assert list(lines) == ["f\u00e4r\n", "line"]


@pytest.mark.parametrize("name", ["global_step6/rank1.pt", "global_step6/rank2.pt"])
def test_a_stream_can_be_sought_and_read_unbuffered(run: PooledPath, name: str) -> None:
    with (run / name).open("rb") as stream:
        assert isinstance(stream, io.BufferedReader)
        stream.seek(-3, os.SEEK_END)
        assert stream.read() == name[17].encode() * 3
    with (run / name).open("rb", buffering=0) as raw:
        assert isinstance(raw, io.RawIOBase)
        assert raw.read() == (THERE | FAR)[name]


def test_a_local_file_is_opened_as_itself(run: PooledPath, there: Path) -> None:
    with (run / "global_step6" / "rank1.pt").open("rb") as stream:
        assert stream.name == str(there / "global_step6" / "rank1.pt")
        assert os.fstat(stream.fileno()).st_size == 20


@pytest.mark.parametrize("mode", ["w", "wb", "ab", "rb+", "x"])
def test_nothing_is_ever_written(run: PooledPath, mode: str, here: Path) -> None:
    for name in ("latest", "new"):
        with pytest.raises(OSError, match="read-only"):
            (run / name).open(mode)
    assert (here / "latest").read_bytes() == HERE["latest"]
    assert not (here / "new").exists()


def test_streams_of_another_machine_are_closed(run: PooledPath, far: Memory) -> None:
    path = run / "global_step6" / "far.txt"
    path.read_text(encoding="utf-8")
    path.read_bytes()
    read_at(path, 0, 2)
    with path.open("rb"), path.open(encoding="utf-8"), path.open("rb", buffering=0):
        assert far.unclosed == 3
    assert far.unclosed == 0
    assert far.opened == ["global_step6/far.txt"] * 6


# Patterns, against what pathlib itself says of the same files in one directory.


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.pt",
        "global_step6/*.pt",
        "global_step*/rank[01].pt",
        "*/deep/*",
        "**/*.txt",
        "**/rank?.pt",
        "global_step6/**/note.txt",
        "*/*/*",
        "nothing/*",
        "latest/*",
        "**/*",
    ],
)
def test_patterns_find_what_they_find_in_one_directory(
    run: PooledPath, tmp_path: Path, pattern: str
) -> None:
    whole = lay(tmp_path / "whole", HERE | THERE | FAR)
    expected = sorted(path.relative_to(whole).as_posix() for path in whole.glob(pattern))
    found = sorted(path.relative_to(run).as_posix() for path in run.glob(pattern))
    assert found == expected
    expected = sorted(path.relative_to(whole).as_posix() for path in whole.rglob(pattern))
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob(pattern)) == expected


def test_a_pattern_looks_outside_the_tree_too(run: PooledPath) -> None:
    assert [path.name for path in run.parent.glob("*")] == ["run"]
    assert [path.name for path in run.parent.rglob("latest")] == ["latest"]


# Which place counts.


def test_the_first_place_counts(tmp_path: Path) -> None:
    first = lay(tmp_path / "a", {"latest": b"global_step6", "zero_to_fp32.py": b"old"})
    second = lay(tmp_path / "b", {"latest": b"global_step500", "zero_to_fp32.py": b"newer"})
    for one, other, text in ((first, second, "global_step6"), (second, first, "global_step500")):
        pool = Pool(tmp_path / "a", [DirectoryPlace(one), DirectoryPlace(other)])
        assert (pool.path() / "latest").read_text() == text
        assert str(pool.path() / "latest") == str(one / "latest")


SHARDS = [
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model_fsdp_0_rank0.bin",
    "weights.pth",
    "model-00001-of-00002.safetensors",
    "__0_0.distcp",
    ".metadata",
    "__0.metadata",
]


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("far_too", [False, True])
def test_copies_of_a_shard_that_differ_in_size_are_refused(
    tmp_path: Path, name: str, far_too: bool
) -> None:
    first = lay(tmp_path / "a", {f"tag/{name}": b"x" * 1500})
    second = lay(tmp_path / "b", {f"tag/{name}": b"x" * 1400})
    other = Memory.of(second) if far_too else DirectoryPlace(second)
    path = Pool(first, [DirectoryPlace(first), other]).path() / "tag" / name
    assert path.is_file()
    for use in (
        path.stat,
        path.read_bytes,
        lambda: open_for_reading(path),
        lambda: os.fspath(path),
    ):
        with pytest.raises(DamagedCheckpoint) as caught:
            use()
        error = caught.value
        assert error.fact == f"it has 1,500 bytes in {first} and 1,400 in {other.label}"
        assert error.path == first / "tag" / name
        assert error.hint is not None
        assert "of another save" in error.hint


@pytest.mark.parametrize("name", SHARDS)
def test_copies_of_a_shard_of_one_size_are_read_from_the_first_place(
    tmp_path: Path, name: str
) -> None:
    first, second = lay(tmp_path / "a", {name: b"1"}), lay(tmp_path / "b", {name: b"2"})
    path = Pool(first, [DirectoryPlace(first), DirectoryPlace(second)]).path() / name
    assert path.read_bytes() == b"1"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "trainer_state.json",
        "rng_state_0.pth",
        "scheduler.pt",
        "training_args.bin",
        "random_states_0.pkl",
        "zero_to_fp32.py",
    ],
)
def test_files_that_each_machine_writes_may_differ(tmp_path: Path, name: str) -> None:
    first, second = lay(tmp_path / "a", {name: b"one"}), lay(tmp_path / "b", {name: b"another"})
    path = Pool(first, [DirectoryPlace(first), DirectoryPlace(second)]).path() / name
    assert path.read_bytes() == b"one"
    assert path.stat().st_size == 3


def test_a_stale_shard_elsewhere_does_not_matter(tmp_path: Path) -> None:
    first = lay(tmp_path / "a", {"global_step5/a.pt": b"1", "global_step6/a.pt": b"1"})
    second = lay(tmp_path / "b", {"global_step5/a.pt": b"22", "global_step6/b.pt": b"2"})
    run = Pool(first, [DirectoryPlace(first), DirectoryPlace(second)]).path()
    assert [path.stat().st_size for path in (run / "global_step6").iterdir()] == [1, 1]


@pytest.mark.parametrize("file_first", [True, False])
def test_what_is_a_file_here_and_a_directory_there_is_what_the_first_place_says(
    tmp_path: Path, file_first: bool
) -> None:
    as_file = lay(tmp_path / "a", {"x": b"file", "y/z": b""})
    as_directory = lay(tmp_path / "b", {"x/deep/in": b"it", "y/z": b""})
    order = [as_file, as_directory] if file_first else [as_directory, as_file]
    run = Pool(tmp_path / "a", [DirectoryPlace(place) for place in order]).path()
    assert (run / "x").is_file() is file_first
    assert (run / "x").is_dir() is not file_first
    assert (run / "x" / "deep" / "in").is_file() is not file_first
    assert (run / "x" / "deep").exists() is not file_first
    assert [path.name for path in run.iterdir()] == ["x", "y"]


def test_a_place_can_be_of_a_directory_in_the_tree(tmp_path: Path) -> None:
    first = lay(tmp_path / "a", {"latest": b"global_step6"})
    second = lay(tmp_path / "copied", {"a.pt": b"1", "deep/b.pt": b"22"})
    run = Pool(first, [DirectoryPlace(first), DirectoryPlace(second, "global_step6")]).path()
    assert (run / "global_step6" / "deep" / "b.pt").read_bytes() == b"22"
    assert str(run / "global_step6" / "a.pt") == str(second / "a.pt")
    assert os.fspath(run / "global_step6" / "deep") == str(second / "deep")
    assert local_paths(run / "global_step6") == [second]
    assert local_paths(run) == [first]
    assert folders_of(run / "global_step6") == [second, first, second]


def test_a_directory_with_names_alike_is_not_taken_for_it(tmp_path: Path) -> None:
    place = DirectoryPlace(tmp_path, "global_step6")
    assert place.covers("global_step6")
    assert place.covers("global_step6/a.pt")
    assert not place.covers("global_step60/a.pt")
    assert not place.covers("")


# Directories of this machine.


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    real = lay(tmp_path / "nvme", {"a.pt": b"1"})
    root = lay(tmp_path / "run", {"latest": b"tag"})
    (root / "tag").symlink_to(real)
    (root / "file").symlink_to(real / "a.pt")
    (root / "broken").symlink_to(tmp_path / "gone")
    (real / "up").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert list(DirectoryPlace(root).listing()) == ["file", "latest", "tag/a.pt"]


def test_a_directory_that_cannot_be_read_is_an_error_at_the_root_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pool(tmp_path, [DirectoryPlace(tmp_path / "gone")])
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Pool(tmp_path, [DirectoryPlace(tmp_path / "file")])


def test_a_directory_that_may_not_be_read_counts_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = lay(tmp_path, {"a.pt": b"", "lost+found/b.pt": b""})
    scandir = os.scandir

    def guarded(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("lost+found"):  # root may read everything
            raise PermissionError(errno.EACCES, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert list(DirectoryPlace(root).listing()) == ["a.pt"]


def test_a_listing_is_a_mapping(tmp_path: Path) -> None:
    listing = DirectoryPlace(lay(tmp_path, {"b/a.pt": b"123", "a.pt": b""})).listing()
    assert dict(listing) == {
        "a.pt": FileFacts(0, (tmp_path / "a.pt").stat().st_mtime_ns),
        "b/a.pt": FileFacts(3, (tmp_path / "b/a.pt").stat().st_mtime_ns),
    }
    assert len(listing) == 2
    assert "b/a.pt" in listing
    assert "b" not in listing
    with pytest.raises(KeyError):
        listing["b"]


def test_an_empty_or_missing_root_is_a_directory_all_the_same(far: Memory) -> None:
    run = Pool(Path("/nowhere/run"), [far]).path()
    assert run.is_dir()
    assert (run / "global_step6" / "rank2.pt").read_bytes() == FAR["global_step6/rank2.pt"]
    assert Pool(Path("/nowhere/run"), []).path().is_dir()


# Derived paths.


def test_derived_paths_stay_in_the_pool(run: PooledPath) -> None:
    file = run / "global_step6" / "rank2.pt"
    derived = [
        run.joinpath("global_step6", "rank2.pt"),
        run / "global_step6/rank2.pt",
        run / "global_step6" / "." / "rank2.pt",
        run.parent / "run" / "global_step6" / "rank2.pt",
        file.parent / "rank2.pt",
        file.parent.parent / "global_step6" / "rank2.pt",
        list(file.parents)[1] / "global_step6" / "rank2.pt",
        file.with_name("rank1.pt").with_name("rank2.pt"),
        file.with_suffix(".bin").with_suffix(".pt"),
        next(path for path in file.parent.iterdir() if path.name == "rank2.pt"),
        next(file.parent.glob("rank2*")),
        next(run.rglob("rank2*")),
        file.absolute(),
        copy.copy(file),
        copy.deepcopy(file),
    ]
    for path in derived:
        assert isinstance(path, PooledPath)
        assert path.within == "global_step6/rank2.pt"
        assert path == file
        assert hash(path) == hash(file)
        assert path.read_bytes() == FAR["global_step6/rank2.pt"]
    assert (file.name, file.stem, file.suffix) == ("rank2.pt", "rank2", ".pt")
    assert file.match("*/rank2.pt")
    assert file.parts[-3:] == ("run", "global_step6", "rank2.pt")


def test_dots_and_links_lead_to_the_same_file(pool: Pool, here: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(here.parent)
    linked = Pool(tmp_path / "link" / "run", pool.places).path()
    for path in (
        pool.path() / "global_step6" / ".." / "latest",
        pool.path().parent / "run" / ".." / "run" / "latest",
        linked / "latest",
        linked.resolve() / "latest",
        (linked / "latest").resolve(),
        (linked / "latest").resolve(strict=True),
    ):
        assert path.within == "latest"
        assert path.read_bytes() == HERE["latest"]
    assert (linked / "latest").resolve().as_posix() == (here / "latest").as_posix()
    assert (pool.path() / ".." / "run2").within is None


def test_outside_the_tree_it_is_a_plain_path(run: PooledPath, tmp_path: Path) -> None:
    above = run.parent
    (tmp_path / "here" / "config.json").write_text("{}")
    config = above / "config.json"
    assert isinstance(config, PooledPath)
    assert config.within is None
    assert config.read_text() == "{}"
    assert config.stat() == (tmp_path / "here" / "config.json").stat()
    assert config == tmp_path / "here" / "config.json"
    assert hash(config) == hash(tmp_path / "here" / "config.json")
    assert {path.name for path in above.iterdir()} == {"run", "config.json"}
    assert (above.exists(), above.is_dir(), config.is_file()) == (True, True, True)
    assert str(config) == os.fspath(config) == str(tmp_path / "here" / "config.json")
    assert above.resolve() == above
    assert local_paths(config) == [tmp_path / "here" / "config.json"]
    assert searched(config) == []
    assert not (above / "run2").exists()
    (above / "made").write_text("plain paths can be written")
    assert [path.name for path in (above / "run").glob("latest")] == ["latest"]


@pytest.mark.parametrize("root", ["run", ".", "./run", "../here/run", ".."])
def test_a_root_may_be_spelt_in_any_way(
    here: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir({"run": here.parent, "./run": here.parent}.get(root, here))
    if root == "../here/run":
        monkeypatch.chdir(here.parent)
    if root == "..":
        monkeypatch.chdir(here / "global_step6")
    run = Pool(Path(root), [DirectoryPlace(Path(root))]).path()
    for path in (run, run.absolute(), run.resolve()):
        assert path.within == ""
        assert [entry.name for entry in path.iterdir()] == ["global_step6", "latest"]
        assert (path / "latest").read_bytes() == HERE["latest"]
        assert (path / "latest").within == "latest"
    assert str(run / "latest") == str(Path(root) / "latest")


def test_a_way_to_a_file_is_no_path_of_the_tree(run: PooledPath, here: Path) -> None:
    file = run / "global_step6" / "rank1.pt"
    for above in (run, here, str(here)):
        way = file.relative_to(above)
        assert not isinstance(way, PooledPath)
        assert str(way) == "global_step6/rank1.pt"
        assert file.is_relative_to(above)
    assert not file.is_relative_to(here / "other")
    with pytest.raises(ValueError, match="is not in the subpath"):
        file.relative_to(here / "other")


# What it is to others.


def test_its_text_says_where_the_file_is(run: PooledPath, here: Path, there: Path) -> None:
    assert str(run / "latest") == str(here / "latest")
    assert str(run / "global_step6" / "rank1.pt") == str(there / "global_step6/rank1.pt")
    assert f"{run / 'global_step6' / 'rank2.pt'}" == f"machine node7:{here}/global_step6/rank2.pt"
    assert str(run / "global_step6") == str(here / "global_step6")
    assert str(run / "gone") == str(here / "gone")
    assert (run / "global_step6/rank1.pt").as_posix() == str(here / "global_step6/rank1.pt")
    assert repr(run / "latest") == f"PooledPath('{here}/latest')"


def test_an_error_names_the_real_file_and_outlives_the_pool(run: PooledPath, there: Path) -> None:
    error = DamagedCheckpoint("it is cut short", path=run / "global_step6" / "rank1.pt")
    assert type(error.path) is type(there)
    assert str(error) == f"{there}/global_step6/rank1.pt: it is cut short"
    far = DamagedCheckpoint("it is cut short", path=run / "global_step6" / "rank2.pt")
    assert str(far).startswith("machine node7:")
    assert pickle.loads(pickle.dumps(far.path)) == far.path


def test_the_system_gets_the_real_file_or_a_clear_no(run: PooledPath, there: Path) -> None:
    step = run / "global_step6"
    assert os.fspath(step / "rank1.pt") == str(there / "global_step6/rank1.pt")
    assert Path(os.fspath(step / "deep")) == there / "global_step6/deep"
    fd = os.open(step / "rank1.pt", os.O_RDONLY)
    assert os.pread(fd, 99, 0) == THERE["global_step6/rank1.pt"]
    os.close(fd)
    with pytest.raises(OSError, match="read from machine node7 and has no path here") as caught:
        os.open(step / "rank2.pt", os.O_RDONLY)
    assert caught.value.errno == errno.EREMOTE
    with pytest.raises(OSError, match="has no path here"):  # half of its files would be missed
        os.listdir(step)
    with pytest.raises(FileNotFoundError):
        os.listdir(run / "gone")


def test_paths_are_equal_and_sorted_by_what_they_are_called(
    run: PooledPath, pool: Pool, here: Path, there: Path
) -> None:
    other = Pool(here, pool.places).path()
    assert run / "latest" == pool.path("latest")
    assert run / "latest" != here / "latest"
    assert here / "latest" != run / "latest"
    assert run / "latest" != other / "latest"
    assert run != "run"
    assert len({run, pool.path(), here, other, Path(here)}) == 3
    names = ["a", "a/b", "a-b", "a.b", "A", "b/a", "latest"]
    pooled = [run / name for name in names]
    plain = [here / name for name in names]
    mixed = [*pooled, *plain, *(other / name for name in names)]
    for seed in range(20):
        random.Random(seed).shuffle(mixed)
        ordered = sorted(mixed)
        called = [Path(path.as_posix()) for path in ordered]
        assert called == sorted(called)
        mixed.reverse()
        assert ordered == sorted(mixed)
    for low, high in zip(sorted(pooled), sorted(pooled)[1:], strict=False):
        assert (low < high, low <= high, low > high, low >= high) == (True, True, False, False)
    assert run <= run
    assert run >= pool.path()


def test_places_that_are_searched(run: PooledPath, here: Path, there: Path) -> None:
    assert searched(run / "gone") == [str(here), str(there), "machine node7"]
    assert searched(here) == []
    assert local_paths(run / "global_step6") == [here / "global_step6", there / "global_step6"]
    assert local_paths(run / "global_step6/rank2.pt") == []
    assert local_paths(here) == [here]
    assert folders_of(run / "latest") == [here / "latest", here, there]
    assert folders_of(here) == [here]


# Another process.


def test_a_pickled_path_finds_the_pool_of_its_key(pool: Pool, here: Path, there: Path) -> None:
    for name in ("", "latest", "global_step6/rank2.pt", "gone"):
        path = pool.path(name)
        again = pickle.loads(pickle.dumps(path))
        assert again == path
        assert type(again) is type(path)
    outside = pickle.loads(pickle.dumps(pool.path().parent))
    assert type(outside) is type(here)
    assert outside == here.parent


def test_a_pickled_path_without_its_pool_is_refused(here: Path) -> None:
    data = pickle.dumps(Pool(here, [DirectoryPlace(here)], key="short-lived").path() / "latest")
    import gc

    gc.collect()
    with pytest.raises(LookupError, match="no pool 'short-lived'"):
        pickle.loads(data)


def test_in_another_process_it_is_read_from_the_places_there(
    here: Path, there: Path, tmp_path: Path
) -> None:
    """The process there has the files of another machine, and what is far here is near there."""
    pool = Pool(here, [DirectoryPlace(here), Memory(THERE)], key="shared")
    paths = [pool.path(name) for name in ("latest", "global_step6/rank1.pt")]
    program = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from ckpt_tools.storage.places import DirectoryPlace\nfrom ckpt_tools.storage.pool import Pool\n"
        "from tests.support.in_memory import Memory\n"
        f"places = [DirectoryPlace(Path({str(there)!r})), Memory({HERE!r}, 'rank 0')]\n"
        f"pool = Pool(Path({str(here)!r}), places, key='shared')\n"
        "paths = pickle.load(sys.stdin.buffer)\n"
        "answer = [(str(path), path.read_bytes()) for path in paths]\n"
        "sys.stdout.buffer.write(pickle.dumps((answer, paths)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(paths),
        capture_output=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    answer, returned = pickle.loads(done.stdout)
    assert answer == [
        (f"rank 0:{here}/latest", HERE["latest"]),
        (f"{there}/global_step6/rank1.pt", THERE["global_step6/rank1.pt"]),
    ]
    assert returned == paths
    assert str(returned[1]) == f"machine node7:{here}/global_step6/rank1.pt"


def test_the_newest_pool_of_a_key_is_meant(here: Path, there: Path) -> None:
    old = Pool(here, [DirectoryPlace(here)], key="again")
    new = Pool(here, [DirectoryPlace(there)], key="again")
    assert pickle.loads(pickle.dumps(old.path())).pool is new
    assert Pool(here, []).key != Pool(here, []).key


# Reading at positions.


def places_with(data: bytes, tmp_path: Path) -> list[Place]:
    (tmp_path / "file").write_bytes(data)
    return [DirectoryPlace(tmp_path), Memory({"file": data}, short=7)]


def test_bytes_are_read_at_positions(tmp_path: Path) -> None:
    data = bytes(range(256))
    for place in places_with(data, tmp_path):
        path = Pool(tmp_path, [place]).path("file")
        for at, count in ((0, 10), (100, 100), (250, 20), (256, 5), (300, 5), (7, 0)):
            assert read_at(path, at, count) == data[at : at + count]
        file = open_for_reading(path)
        view = memoryview(bytearray(300))
        assert read_fully(file, view[:256], 0) == 256
        assert read_fully(file, view, 6) == 250
        assert view[:250] == data[6:]
        file.close()
        file.close()
    assert read_at(tmp_path / "file", 3, 4) == data[3:7]


def test_closing_twice_closes_no_file_of_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    file = LocalFile(tmp_path / "file")
    file.close()
    other = os.open(tmp_path / "file", os.O_RDONLY)  # it may get the number that became free
    file.close()
    assert os.fstat(other).st_size == 1
    os.close(other)


def test_a_region_is_a_file_of_its_own(tmp_path: Path) -> None:
    data = bytes(range(200))
    for place in places_with(data, tmp_path):
        with io.BufferedReader(Region(place.open("file"), 50, 100)) as stream:
            assert stream.read() == data[50:150]
            assert stream.seek(-10, os.SEEK_END) == 90
            assert stream.read(100) == data[140:150]
            assert stream.seek(5) == 5
            assert stream.seek(5, os.SEEK_CUR) == 10
            assert stream.read(3) == data[60:63]
            with pytest.raises(OSError, match="before the start"):
                stream.seek(-1000, os.SEEK_CUR)


def test_threads_read_one_file_at_once(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1 << 16)
    for place in places_with(data, tmp_path):
        file = place.open("file")
        wrong: list[int] = []

        def read(seed: int, file=file, wrong=wrong) -> None:  # type: ignore[no-untyped-def]
            for _ in range(50):
                at = random.Random(seed).randrange(len(data) - 300)
                view = memoryview(bytearray(300))
                read_fully(file, view, at)
                if view != data[at : at + 300]:
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.close()
        assert not wrong
