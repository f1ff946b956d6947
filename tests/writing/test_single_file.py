"""One file of weights: any tensor, in flat memory, complete or not there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import DamagedCheckpoint, OutputExists
from ckpt_tools.tensors.catalogue import Catalogue
from ckpt_tools.writing import single_file
from ckpt_tools.writing.single_file import SAFETENSORS, TORCH, write_single_file
from tests.conversion.test_end_to_end import different
from tests.writing.test_bytes import on_disk
from tests.writing.test_layout import FORMAT, zoo

BOTH = pytest.mark.parametrize("name", [SAFETENSORS, TORCH])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


def catalogue(source: Path, tensors: Mapping[str, torch.Tensor]) -> Catalogue:
    return Catalogue(on_disk(source, tensors))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    if path.name == SAFETENSORS:
        return load_file(path)
    state = torch.load(path, weights_only=True)
    assert isinstance(state, dict)
    return state


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@BOTH
@pytest.mark.parametrize("prove", [True, False])
def test_every_awkward_tensor_survives(
    tmp_path: Path, source: Path, name: str, prove: bool
) -> None:
    tensors = zoo()

    write_single_file(catalogue(source, tensors), tmp_path / "out" / name, prove=prove)

    assert entries(tmp_path / "out") == {name}
    found = loaded(tmp_path / "out" / name)
    assert different(found, tensors) == []
    if name == TORCH:
        assert [*found] == [*tensors]
    else:
        save_file(tensors, tmp_path / "theirs", metadata=FORMAT)
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs").read_bytes()


@BOTH
def test_it_is_one_file_however_large(tmp_path: Path, source: Path, name: str) -> None:
    tensors = {f"layers.{i}": torch.full((1 << 19,), float(i)) for i in range(3)}

    write_single_file(catalogue(source, tensors), tmp_path / name, prove=True)

    assert entries(tmp_path) == {"source", name}
    assert different(loaded(tmp_path / name), tensors) == []


@BOTH
def test_what_else_the_directory_holds_stays(tmp_path: Path, source: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = catalogue(source, zoo())

    write_single_file(tensors, tmp_path / name, prove=True)
    with pytest.raises(OutputExists, match="exists already"):
        write_single_file(tensors, tmp_path / name, prove=True)
    with pytest.raises(OutputExists, match="is not a directory"):
        write_single_file(tensors, tmp_path / "config.json" / name, prove=True)

    assert entries(tmp_path) == {"source", "config.json", name}


@BOTH
def test_a_link_that_leads_nowhere_is_there_already(
    tmp_path: Path, source: Path, name: str
) -> None:
    (tmp_path / name).symlink_to(tmp_path / "gone")

    with pytest.raises(OutputExists, match="the output exists already"):
        write_single_file(catalogue(source, zoo()), tmp_path / name, prove=True)

    assert (tmp_path / name).is_symlink()
    assert not (tmp_path / "gone").exists()


@BOTH
@pytest.mark.parametrize("beside", [[], ["config.json"]])
def test_a_failure_leaves_nothing(
    tmp_path: Path, source: Path, name: str, beside: list[str]
) -> None:
    out = tmp_path / "made" / "out"
    for other in beside:
        out.mkdir(parents=True)
        (out / other).touch()
    tensors = catalogue(source, zoo())
    rank = source / "rank1"
    rank.write_bytes(rank.read_bytes()[:-100])

    with pytest.raises(DamagedCheckpoint, match="the file ends"):
        write_single_file(tensors, out / name, prove=True)

    assert {path.name for path in (tmp_path / "made").rglob("*")} == {
        *beside,
        *(["out"] * len(beside)),
    }


def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").touch()
    write = single_file._write

    def slowly(layout: object, directory: Path) -> None:
        write(layout, directory)  # type: ignore[arg-type]
        (tmp_path / SAFETENSORS).write_text("somebody else's")

    monkeypatch.setattr(single_file, "_write", slowly)
    with pytest.raises(OutputExists, match="appeared while"):
        write_single_file(catalogue(source, zoo()), tmp_path / SAFETENSORS, prove=False)

    assert (tmp_path / SAFETENSORS).read_text() == "somebody else's"
    assert entries(tmp_path) == {"source", "config.json", SAFETENSORS}


def run_program(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


LARGE = """
    import resource, sys, threading
    from pathlib import Path

    import torch
    from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored
    from ckpt_tools.tensors.dtypes import FLOAT32
    from ckpt_tools.errors import OutputFailed
    from ckpt_tools.writing.single_file import write_single_file

    source, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    x = Stored(FLOAT32, (count,), [Fragment(source, 0, FlatRange(0, count))])


    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024


    def peak_while(work):
        before, peak, done = anonymous(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()
        return peak - before
"""


@pytest.mark.slow
def test_a_full_disk_is_our_error_for_a_pickled_file_too(tmp_path: Path) -> None:
    """The safetensors file still fits under the limit, and torch's container does not."""
    source = tmp_path / "source"
    source.write_bytes(bytes(4_000_000))
    program = (
        LARGE
        + """
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_500, 4_000_500))
    try:
        write_single_file(Catalogue({"x": x}), out / "pytorch_model.bin", prove=False)
    except OutputFailed as error:
        print(error.exit_code, error)
    """
    )

    run = run_program(program, source, tmp_path / "out", 1_000_000)

    assert run.stdout.startswith("6 "), run.stderr
    assert entries(tmp_path) == {"source"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured with Linux's /proc")
@BOTH
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, name: str) -> None:
    """What a process holds of its own; the pages of a mapped file belong to the file."""
    source = tmp_path / "source"
    with source.open("wb") as stream:
        stream.truncate(200_000_000)
    program = (
        LARGE
        + """
    print(peak_while(lambda: write_single_file(Catalogue({"x": x}), out / sys.argv[4], prove=True)))
    """
    )

    run = run_program(program, source, tmp_path / "out", 50_000_000, name)

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / name).stat().st_size > 200_000_000
    assert int(run.stdout) < 60e6
