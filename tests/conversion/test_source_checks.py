"""Sources that are not what was saved: flipped bits, exchanged files, files that change while they are read.

Every damage is found, or the output is the same: never another output with status 0.
"""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import (
    consolidate,
    extract_lora,
    get_fp32_state_dict_from_zero_checkpoint,
    merge_fsdp_weights,
    open_checkpoint,
)
from ckpt_tools.errors import CkptError, DamagedCheckpoint
from ckpt_tools.writing import delivery
from tests.conftest import FIXTURES

# FLIPS=1000 flips as many bits, and EXCHANGES=1 tries every pair of files.
FLIPS = int(os.environ.get("FLIPS", "60"))
EVERY_PAIR = bool(os.environ.get("EXCHANGES"))
FLIPPED = [
    "zero/zero1-bf16-llama-2ranks",
    "zero/zero2-bf16-llama-groups-3ranks",
    "zero/zero3-bf16-llama-frozen-3ranks",
    "dcp/fsdp2-model-3ranks",
    "accelerate/plain-bin-tied",
    "rank_files/verl-fsdp2-bf16-2ranks",
]


def copied(case: str, directory: Path) -> Path:
    copy = directory / "checkpoint"
    shutil.copytree(FIXTURES / case / "checkpoint", copy)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def weights(
    source: Path, out: Path, *, report: list[Any] | None = None, **options: Any
) -> dict[str, bytes]:
    """The files of weights that a conversion writes; its report is appended to ``report``."""
    shutil.rmtree(out, ignore_errors=True)
    done = consolidate(source, out, weights_only=True, workers=1, **options)
    if report is not None:
        report.append(done)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors*")}


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("case", "copy"),
    [(case, "master") for case in FLIPPED]
    + [(case, "model") for case in FLIPPED if "zero1" in case or "zero2" in case],
)
def test_a_flipped_bit_is_found_or_changes_nothing(case: str, copy: str, tmp_path: Path) -> None:
    source, out = copied(case, tmp_path), tmp_path / "out"
    expected = weights(source, out, weights=copy)
    chance = random.Random(f"{case} {copy}")
    files = files_of(source)
    sizes = [path.stat().st_size for path in files]
    found = 0
    for _ in range(max(FLIPS // (len(FLIPPED) + 2), 1)):
        (path,) = chance.choices(files, sizes)
        data = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        original = path.read_bytes()
        path.write_bytes(data)
        try:
            assert weights(source, out, weights=copy) == expected, (path, bit)
        except CkptError:
            found += 1
            assert not out.exists()
        path.write_bytes(original)
    print(f"{case} {copy}: {found} found")


def records_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each storage of a torch file, as zipfile finds them."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for info in archive.infolist():
            if "/data/" in info.filename and "serialization" not in info.filename:
                stream.seek(info.header_offset + 26)
                name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
                yield info.filename, info.header_offset + 30 + name + extra, info.file_size


@pytest.mark.parametrize("case", ["zero/zero3-bf16-llama-7ranks", "rank_files/verl-single"])
def test_a_damaged_record_is_named_and_nothing_appears(case: str, tmp_path: Path) -> None:
    source, out = copied(case, tmp_path), tmp_path / "out"
    read = dict(read_from(source))
    path, at = next(iter(read.items()))
    data = bytearray(path.read_bytes())
    data[at - 1] ^= 0x40
    path.write_bytes(data)
    name = next(n for n, start, size in records_of(path) if start <= at - 1 < start + size)

    with pytest.raises(DamagedCheckpoint) as caught:
        weights(source, out)

    assert f"the bytes of record {name} are not those that were saved" in caught.value.fact
    assert caught.value.path == path
    assert list(tmp_path.iterdir()) == [source]
    assert weights(source, out, check_source=False)


def test_functions_of_other_projects_check_their_sources(tmp_path: Path) -> None:
    zero = copied("zero/zero3-bf16-llama-7ranks", tmp_path / "zero")
    sharded = copied("accelerate/fsdp2-sharded-3ranks", tmp_path / "sharded")
    model = next(sharded.rglob("pytorch_model_fsdp_0"))
    for source in (zero, model):
        path, at = next(iter(dict(read_from(source)).items()))
        data = bytearray(path.read_bytes())
        data[at - 1] ^= 0x40
        path.write_bytes(data)

    with pytest.raises(DamagedCheckpoint, match="are not those that were saved"):
        get_fp32_state_dict_from_zero_checkpoint(zero)
    with pytest.raises(DamagedCheckpoint, match="are not those that were saved"):
        merge_fsdp_weights(model, tmp_path / "out", remove_checkpoint_dir=True)
    assert model.is_dir()
    assert not (tmp_path / "out").exists()


def read_from(source: Path) -> Iterator[tuple[Path, int]]:
    """Each file that weights are read from, with the end of one of its runs."""
    for tensor in open_checkpoint(source).catalogue("master").values():
        for move in tensor.moves(0, tensor.numel):
            yield move.file, move.offset + move.nbytes


def test_local_headers_are_held_against_the_directory(tmp_path: Path) -> None:
    """The length of the extra field says where data begins: 64 more shift every element."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.arange(64.0), "b.weight": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("pytorch_model/data/0")
    for at, bit in [(28, 6), (26, 1), (6, 3), (8, 3)]:
        data = bytearray(path.read_bytes())
        data[info.header_offset + at] ^= 1 << bit
        damaged = tmp_path / "damaged" / "pytorch_model.bin"
        damaged.parent.mkdir(exist_ok=True)
        damaged.write_bytes(data)

        with pytest.raises(DamagedCheckpoint, match="header of record pytorch_model/data/0"):
            weights(damaged.parent, tmp_path / "out", check_source=False)


def test_files_that_torch_saved_without_checksums_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    tensors = {"a.weight": torch.arange(64.0), "b.weight": torch.ones(64)}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(before)

    report = consolidate(path.parent, tmp_path / "out", weights_only=True)

    assert report.checksums == {"checked": 0, "partly": 0, "without": 512}


@pytest.mark.parametrize("case", FLIPPED[:3])
def test_every_byte_that_is_read_is_checked(case: str, tmp_path: Path) -> None:
    source = FIXTURES / case / "checkpoint"
    report = consolidate(source, tmp_path / "out", weights_only=True)

    needed = open_checkpoint(source).catalogue("master").nbytes
    assert report.checksums == {"checked": needed, "partly": 0, "without": 0}


def test_what_an_adapter_leaves_unread_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ckpt_tools.writing.source._REST_BYTES", 0)
    source = FIXTURES / "peft" / "fsdp2-olmo2-two-adapters"
    settings = {"adapter_config": source / "truth" / "adapter", "adapter": "default"}
    whole = extract_lora(source / "checkpoint", tmp_path / "whole", **settings)
    assert not any("checksums" in note for note in whole.notes)

    zero = FIXTURES / "peft" / "zero3-olmo2-two-adapters"
    settings = {"adapter_config": zero / "truth" / "adapter", "adapter": "default"}
    report = extract_lora(zero / "checkpoint", tmp_path / "out", **settings)

    assert report.checksums["partly"] > 0
    assert any("not compared with the checksums" in note for note in report.notes)


def dcp_of(state: dict[str, torch.Tensor], directory: Path) -> Path:
    """A Distributed Checkpoint of one process, with one file for each tensor."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False)
    dcp.save({"model": state}, storage_writer=writer, no_dist=True)
    return directory


def test_files_of_equal_tensors_are_sound(tmp_path: Path) -> None:
    """Tied weights are saved twice, and every layer may have the same mask."""
    tied, mask = torch.randn(16, 32), torch.ones(32, 32).tril()
    state = {"a.weight": tied, "b.weight": tied, "c.mask": mask, "d.mask": mask.clone()}

    report = consolidate(dcp_of(state, tmp_path / "in"), tmp_path / "out", weights_only=True)

    (note,) = [note for note in report.notes if "hold the same bytes" in note]
    assert note.count(".distcp") == 4
    found = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name].load(), value) for name, value in state.items())


def test_a_name_that_its_keys_do_not_make_up_is_refused(tmp_path: Path) -> None:
    directory = dcp_of({"a.weight": torch.ones(2)}, tmp_path / "in")
    metadata = directory / ".metadata"
    data = metadata.read_bytes()
    assert data.count(b"a.weight") > 1
    metadata.write_bytes(data[::-1].replace(b"a.weight"[::-1], b"b.weight"[::-1], 1)[::-1])

    with pytest.raises(DamagedCheckpoint, match="do not make up its name"):
        open_checkpoint(directory)


# -- files of other ranks ----------------------------------------------------------------------


def several_ranks() -> list[str]:
    """Every fixture whose directory holds files of several ranks."""
    found = []
    for checkpoint in sorted(FIXTURES.glob("*/*/checkpoint")):
        case = f"{checkpoint.parent.parent.name}/{checkpoint.parent.name}"
        if len(alike(checkpoint)) > 0:
            found.append(case)
    return found


def alike(checkpoint: Path) -> list[tuple[Path, Path]]:
    """Pairs of files of one size and kind: what a wrong copy may exchange."""
    files = [p for p in files_of(checkpoint) if p.suffix in {".pt", ".bin", ".distcp"}]
    return [
        (a, b)
        for number, a in enumerate(files)
        for b in files[number + 1 :]
        if a.parent == b.parent and kind_of(a) == kind_of(b)
    ]


def kind_of(path: Path) -> str:
    return "".join(c for c in path.name if not c.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("case", several_ranks())
def test_files_of_two_ranks_exchanged_are_found_or_change_nothing(
    case: str, tmp_path: Path
) -> None:
    source, out = copied(case, tmp_path), tmp_path / "out"
    expected = attempt(lambda: weights(source, out))
    pairs = alike(source)
    report: list[Any] = []
    if not EVERY_PAIR:
        pairs = random.Random(case).sample(pairs, min(len(pairs), 1))
    for first, second in pairs:
        if first.suffix != ".distcp":
            # A DCP file names no rank: shards of one shape cannot be told apart, see docs/security.md.
            exchange(first, second)
            assert attempt(lambda: weights(source, out)) in (expected, None), (first, second)
            exchange(first, second)
        content = second.read_bytes()
        shutil.copyfile(first, second)
        report.clear()
        got = attempt(lambda: weights(source, out, report=report))
        if got not in (expected, None):
            # Equal tensors in files that name no rank look the same: a note says so. One number says nothing.
            assert first.suffix == ".distcp", (first, second)
            noted = any("hold the same bytes" in note for note in report[0].notes)
            assert noted or different_bytes(got, expected) <= 8, (first, second)
        second.write_bytes(content)


def different_bytes(got: dict[str, bytes], expected: dict[str, bytes]) -> int:
    """The number of bytes that differ."""
    assert got.keys() == expected.keys()
    return sum(a != b for name in got for a, b in zip(got[name], expected[name], strict=True))


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except CkptError:
        return None


def test_an_exchanged_file_is_named_with_what_it_is(tmp_path: Path) -> None:
    source = copied("zero/zero3-bf16-llama-7ranks", tmp_path)
    first, second = sorted(source.rglob("*rank_[12]_mp*optim_states.pt"))
    shutil.copyfile(second, first)

    with pytest.raises(DamagedCheckpoint, match=f"saved as {second.name}") as caught:
        open_checkpoint(source)
    assert caught.value.path == first


def test_a_file_that_its_user_renamed_is_read(tmp_path: Path) -> None:
    """Nothing depends on the name of a file that is no rank's."""
    torch.save({"a.weight": torch.ones(4)}, tmp_path / "model_step_3.bin")
    (tmp_path / "model_step_3.bin").rename(tmp_path / "pytorch_model.bin")

    assert open_checkpoint(tmp_path)["a.weight"].load().tolist() == [1.0] * 4


# -- files that change -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["touched", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read_stops_the_run(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = copied("zero/zero3-bf16-llama-7ranks", tmp_path), tmp_path / "out"
    victim = next(source.rglob("*rank_3_mp*optim_states.pt"))
    shares = delivery.write_shares

    def then(*arguments: Any) -> Any:
        done = shares(*arguments)
        if how == "touched":
            os.utime(victim, ns=(1, victim.stat().st_mtime_ns + 1))
        elif how == "replaced":
            facts, content = victim.stat(), victim.read_bytes()
            other = victim.with_name("other")
            other.write_bytes(content)
            os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            other.replace(victim)
        else:
            victim.unlink()
        return done

    monkeypatch.setattr(delivery, "write_shares", then)
    with pytest.raises(DamagedCheckpoint, match="changed while they were read") as caught:
        weights(source, out, check_source=False)
    assert victim.name in caught.value.fact
    assert not out.exists()


def test_a_source_that_is_written_before_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are not those of its checksums then, which a damaged file's are not either."""
    source, out = copied("zero/zero3-bf16-llama-7ranks", tmp_path), tmp_path / "out"
    victim = next(source.rglob("*rank_3_mp*optim_states.pt"))
    shares = delivery.write_shares

    def after(*arguments: Any) -> Any:
        content = bytearray(victim.read_bytes())
        with zipfile.ZipFile(victim) as archive:
            for data in (archive.read(name) for name in archive.namelist() if "/data/" in name):
                content[content.index(data) + len(data) // 2] ^= 1
        victim.write_bytes(content)
        return shares(*arguments)

    monkeypatch.setattr(delivery, "write_shares", after)
    with pytest.raises(DamagedCheckpoint, match="changed while they were read") as caught:
        weights(source, out)
    assert victim.name in caught.value.fact
    assert not out.exists()
