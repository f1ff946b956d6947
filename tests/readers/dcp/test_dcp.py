"""torch Distributed Checkpoint, all that is shipped, against the live models that were saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from safetensors.torch import load_file

from ckpt_tools import inspect, open_checkpoint, readers
from ckpt_tools.errors import AmbiguousCheckpoint, CkptError, UnsupportedLayout, UsageError
from ckpt_tools.readers import dcp
from ckpt_tools.readers.dcp import names
from ckpt_tools.tensors.catalogue import FlatRange
from ckpt_tools.tensors.checkpoint import Checkpoint
from ckpt_tools.tensors.deferred import DeferredFragment, settle
from tests.support.readers.contract import Case, assert_same, opened
from tests.support.readers.dcp_case import DCP, DcpCase, DcpContract, copy_of, dcp_cases

CASES = [case for case in dcp_cases() if not case.name.startswith(("hf-storage", "olmo-core"))]


class TestEveryDcpFixture(DcpContract):
    @pytest.fixture(params=CASES, ids=lambda case: case.name)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    def framework(self, case: Case) -> str:
        return "torch.distributed.checkpoint 1.0.0"

    def test_its_title(self, checkpoint: Checkpoint) -> None:
        assert (checkpoint.title, checkpoint.location.format) == ("torch DCP", "torch-dcp")
        assert checkpoint.remarks == ()


def test_the_fixtures_cover_what_the_contract_is_for() -> None:
    assert len(CASES) >= 17
    assert {case.facts["world_size"] for case in CASES} == {1, 2, 3, 4}


def save(path: Path, state: dict[str, object]) -> Path:
    """Save with torch, from this one process."""
    dist_checkpoint.save(state, checkpoint_id=path, no_dist=True)
    return path


# Which entries are the model.


@pytest.mark.parametrize(
    ("name", "part", "left_alone"),
    [
        ("fsdp2-flat-bf16-3ranks", None, set()),
        ("fsdp2-model-3ranks", "model", set()),
        ("fsdp2-state-model-2ranks", "state.model", {"state.progress"}),
        ("fsdp2-app-2ranks", "app.model", {"app.optim"}),
    ],
)
def test_the_model_is_found_where_the_loop_put_it(
    name: str, part: str | None, left_alone: set[str]
) -> None:
    details = opened(DcpCase(DCP / name)).details
    assert details["model"] == part
    assert set(details["left_alone"]) == left_alone  # type: ignore[call-overload]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(module.parameters())
    for _ in range(3):
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("key", ["optimizer", "optim", "optimizer_0", "opt"])
def test_an_optimizer_is_no_model_whatever_it_is_called(tmp_path: Path, key: str) -> None:
    module, optimizer = trained()
    state = {"net": module.state_dict(), key: optimizer.state_dict(), "rng": torch.get_rng_state()}
    checkpoint = open_checkpoint(save(tmp_path / "saved", state))
    assert list(checkpoint) == list(module.state_dict())
    assert checkpoint.step == 3
    for name, value in module.state_dict().items():
        assert_same(checkpoint[name].load(), value, name)


@pytest.mark.parametrize("key", ["dataloader", "lr_scheduler", "train_state", "rng_states_0"])
def test_what_a_loop_keeps_beside_a_model_is_none(tmp_path: Path, key: str) -> None:
    module, _ = trained()
    state = {"model": module.state_dict(), key: {"seen": torch.ones(2, 3), "epoch": 4}}
    checkpoint = open_checkpoint(save(tmp_path / "saved", state))
    assert list(checkpoint) == list(module.state_dict())


def test_one_object_may_hold_the_whole_loop(tmp_path: Path) -> None:
    module, optimizer = trained()
    state = {
        "model": module.state_dict(),
        "optim": optimizer.state_dict(),
        "seen": torch.ones(2, 2),
    }
    save(tmp_path, {"trainer": state})

    held = readers.read(readers.locate(tmp_path))

    assert held.keys() == module.state_dict().keys()
    assert all(torch.equal(held[name].load(), value) for name, value in module.state_dict().items())


def test_two_models_are_a_choice(tmp_path: Path) -> None:
    module, _ = trained()
    ema = {name: value + 1 for name, value in module.state_dict().items()}
    path = save(tmp_path / "saved", {"model": module.state_dict(), "ema": ema})
    with pytest.raises(AmbiguousCheckpoint) as caught:
        open_checkpoint(path)
    assert caught.value.choices == ("model", "ema")
    checkpoint = open_checkpoint(path, tag="ema")
    assert (checkpoint.location.part, checkpoint.location.name) == ("ema", "ema")
    for name, value in ema.items():
        assert_same(checkpoint[name].load(), value, name)
    with pytest.raises(UsageError, match="one of: model, ema"):
        open_checkpoint(path, tag="teacher")


def test_a_directory_of_optimizer_state_alone_says_so(tmp_path: Path) -> None:
    _, optimizer = trained()
    path = save(tmp_path / "optimizer_0", {"optimizer": optimizer.state_dict()})
    with pytest.raises(UnsupportedLayout, match="no model: its entries are optimizer"):
        open_checkpoint(path)


def test_what_modules_keep_for_themselves_is_left_alone(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(2, 3),
        "block._extra_state": torch.zeros(9, dtype=torch.uint8),
        "other._extra_state": {"amax": torch.ones(4, 4)},
        "none.at.all": None,
    }
    checkpoint = open_checkpoint(save(tmp_path / "saved", {"model": state}))
    assert list(checkpoint) == ["w"]
    assert checkpoint.remarks == ("entries of the model that are not tensors: none.at.all",)


# Tensors as they come.


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.tensor(True),
        torch.empty(0, 4),
        torch.arange(24.0).view(4, 6)[1:3],
        torch.arange(24.0).view(4, 6)[:, 2:5],
        torch.arange(3.0).expand(5, 3),
        torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float8_e4m3fn),
        torch.tensor(2.0) + 1j,
    ],
    ids=["0-d", "0-d bool", "empty", "rows", "columns", "expanded", "fp8", "complex"],
)
def test_awkward_tensors_are_read_as_they_were(tmp_path: Path, tensor: torch.Tensor) -> None:
    state = {"t": tensor, "w": torch.ones(2, 2)}
    assert_same(open_checkpoint(save(tmp_path / "saved", state))["t"].load(), tensor, "t")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6_000_000, dtype=torch.bfloat16).view(2000, 3000).t(),
        torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
    ],
    ids=["transposed", "channels last", "permuted"],
)
def test_permuted_tensors_are_read_in_order(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = save(tmp_path / "saved", {"model": {"w": tensor}})
    raw = torch.load(next(path.glob("*.distcp")), weights_only=True)
    assert not raw.is_contiguous(), "torch saves it as it is: otherwise this tests nothing"
    assert_same(open_checkpoint(path)["w"].load(), tensor, "w")


def test_a_chunk_that_begins_like_another_is_found_as_the_first_was(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((3, 3), float(i)) for i in range(20)}
    checkpoint = open_checkpoint(save(tmp_path / "saved", state))
    assert settle(checkpoint.catalogue().values(), workers=3) == 20
    for name, value in state.items():
        assert_same(checkpoint[name].load(), value, name)


@pytest.mark.parametrize("other", [torch.eye(4)[:, :2].T, torch.arange(8.0).view(4, 2).T])
def test_a_chunk_of_the_same_length_that_lies_otherwise_is_read_in_order(
    tmp_path: Path, other: torch.Tensor
) -> None:
    """Of one shape, dtype and length: that one of the two is transposed stands in its pickle alone."""
    plain = torch.arange(8.0).view(2, 4)
    checkpoint = open_checkpoint(save(tmp_path / "saved", {"a": plain, "b": other, "c": plain}))
    assert_same(checkpoint["a"].load(), plain, "a")
    assert_same(checkpoint["b"].load(), other, "b")
    assert_same(checkpoint["c"].load(), plain, "c")


# Compression.


@pytest.mark.slow
def test_a_compressed_chunk_is_unpacked_when_it_is_read_and_removed_at_the_end() -> None:
    program = (
        "from pathlib import Path\n"
        "from ckpt_tools import open_checkpoint\n"
        f"checkpoint = open_checkpoint({str(DCP / 'zstd-2ranks' / 'checkpoint')!r})\n"
        "name = next(iter(checkpoint))\n"
        "checkpoint[name].load()\n"
        "print(checkpoint.weights[name].model.fragments[0].file)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    copy = Path(run.stdout.strip())
    assert copy.parent.name.startswith("ckpt-tools-")
    assert not copy.parent.exists()


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    checkpoint = open_checkpoint(DCP / "zstd-2ranks" / "checkpoint")
    with pytest.raises(UnsupportedLayout) as caught:
        settle(checkpoint.catalogue().values())
    assert 'pip install "ckpt-tools[zstd]"' in str(caught.value)


# Where it is found.


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_of_its_files_means_the_whole_checkpoint(name: str) -> None:
    path = DCP / "fsdp2-model-3ranks" / "checkpoint"
    assert readers.locate(path / name).directory == path


def test_a_ranks_metadata_means_the_whole_checkpoint() -> None:
    path = DCP / "no-collectives-2ranks" / "checkpoint"
    assert readers.locate(path / "__1.metadata").directory == path


def test_several_steps_are_a_choice_by_tag() -> None:
    path = DCP / "torchtitan-2ranks" / "checkpoint"
    with pytest.raises(AmbiguousCheckpoint) as caught:
        readers.locate(path)
    assert caught.value.choices == ("step-1", "step-2")
    checkpoint = open_checkpoint(path, tag="step-1")
    assert checkpoint.step == 1
    older = load_file(DCP / "torchtitan-2ranks" / "truth-step-1" / "model.safetensors")
    for name, value in older.items():
        assert_same(checkpoint[name].load(), value, name)


def test_the_directory_above_the_only_one_means_it(tmp_path: Path) -> None:
    copy_of("no-dist", tmp_path)
    assert readers.locate(tmp_path).directory == tmp_path / "no-dist"


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0", "model_and_optim"])
def test_parts_of_another_format_are_not_taken_from_above(tmp_path: Path, name: str) -> None:
    shutil.move(copy_of("no-dist", tmp_path), tmp_path / "checkpoint-7" / name)
    assert dcp.find(tmp_path / "checkpoint-7") == []


def test_other_directories_are_not_claimed(tmp_path: Path) -> None:
    (tmp_path / ".metadata").mkdir()
    (tmp_path / "file").write_text("")
    assert dcp.find(tmp_path) == dcp.find(tmp_path / "file") == dcp.find(tmp_path / "none") == []


# Laziness.


def test_inspecting_reads_no_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DeferredFragment) -> tuple[Path, int]:
        raise AssertionError("a chunk was read")

    monkeypatch.setattr(DeferredFragment, "place", fail)
    for name in ("fsdp2-model-3ranks", "fsdp-tp-4ranks", "zstd-2ranks"):
        assert inspect(DCP / name / "checkpoint").problems == ()


def test_the_work_for_a_tensor_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system is asked as often for many tensors as for few, and the model is looked for once."""
    counts = []
    for number in (3, 300):
        state = {f"layers.{i}.weight": torch.ones(2, 2) for i in range(number)}
        path = save(tmp_path / str(number), {"model": state})
        calls: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name in ("stat", "open", "scandir", "listdir"):
                patch.setattr(os, name, counted(getattr(os, name), name, calls))
            patch.setattr(names, "_in_order", counted(names._in_order, "models", calls))
            assert len(open_checkpoint(path)) == number
        counts.append(calls)

    assert counts[0] == counts[1]
    assert counts[1]["models"] == 1


def counted(function: Any, name: str, calls: Counter[str]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return call


def test_reading_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from ckpt_tools import readers\n"
        f"for name in {[case.name for case in dcp_cases() if 'torchtitan' not in case.name]!r}:\n"
        f"    path = readers.Path({str(DCP)!r}) / name / 'checkpoint'\n"
        "    readers.read(readers.locate(path))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_whole_rows_are_ranges_so_that_a_window_finds_its_own() -> None:
    weight = opened(DcpCase(DCP / "fsdp2-model-3ranks")).weights["lm_head.weight"]
    assert weight.model is not None
    regions = [fragment.region for fragment in weight.model.fragments]
    rows, columns = weight.shape
    share = -(-rows // 3) * columns
    assert regions == [
        FlatRange(0, share),
        FlatRange(share, 2 * share),
        FlatRange(2 * share, rows * columns),
    ]


def test_settling_stops_at_the_first_damage(tmp_path: Path) -> None:
    directory = copy_of("fsdp2-model-3ranks", tmp_path)
    path = directory / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    checkpoint = open_checkpoint(directory)
    with pytest.raises(CkptError) as caught:
        settle(checkpoint.catalogue().values(), workers=2)
    assert caught.value.path == path
