"""Others' functions under their own names: their answer where they have one, and else the truth."""

from __future__ import annotations

import inspect
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import get_fp32_state_dict_from_zero_checkpoint as ours
from ckpt_tools import merge_fsdp_weights
from ckpt_tools.errors import (
    AmbiguousCheckpoint,
    CkptError,
    DamagedCheckpoint,
    NotACheckpoint,
    OutputFailed,
    UnsupportedLayout,
    UsageError,
)
from ckpt_tools.writing import single_file
from tests.conftest import FIXTURES
from tests.conversion.test_end_to_end import CASES, Case, cast, different, every
from tests.support.ranks.launching import ended, start

# Read when deepspeed is imported, which otherwise looks for a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

CURRENT = [case for case in CASES if case.facts["deepspeed_version"] == "0.19.8"]
STAGE_0 = [case for case in CURRENT if case.facts["stage"] == 0]
BF16_OPTIMIZER = [case for case in CURRENT if case.facts["optimizer_wrapper"] == "BF16_Optimizer"]
# Frozen parameters of ZeRO-1 are in `module` alone, where DeepSpeed's function does not look.
FROZEN_1 = [
    case
    for case in CURRENT
    if case.facts["stage"] == 1
    and case.facts["frozen"]
    and not case.facts["frozen_excluded"]
    and case not in BF16_OPTIMIZER
]
# Files without a zip, and a class of the training script in the pickle.
UNLOADABLE = [case for case in CURRENT if "legacy" in case.path.name or "object" in case.path.name]
WORKING = [
    case for case in CURRENT if case not in (*STAGE_0, *BF16_OPTIMIZER, *FROZEN_1, *UNLOADABLE)
]


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    zero_to_fp32 = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    function = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    assert callable(function)
    return function


def widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSpeed leaves frozen parameters and 16-bit masters in 16 bits, in an "fp32" state dict."""
    return cast(state, torch.float32)


def truth(case: Case) -> dict[str, torch.Tensor]:
    """Every name as fp32, second names included where the files tell them."""
    state = case.held(case.model() | case.masters())
    ties = case.facts["tied"]
    if case.facts["stage"] == 3 and "no record of tied names" in case.facts["note"]:
        return widened({name: tensor for name, tensor in state.items() if name not in ties})
    return widened(state | {alias: state[kept] for alias, kept in ties.items()})


def plain(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """What a caller sees of a signature."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind) for p in parameters]


def test_the_signature_is_deepspeeds(theirs: Callable[..., Any]) -> None:
    assert plain(ours) == plain(theirs)


@every(WORKING)
def test_where_deepspeeds_works_ours_says_the_same(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint))

    found = ours(str(case.checkpoint))

    assert isinstance(found, OrderedDict)
    assert different(found, truth(case)) == []
    # It takes tensors without elements for one another, with each other's shape.
    unlike = different(found, widened(expected))
    assert [name for name in unlike if found[name].numel()] == []


@every([case for case in WORKING if case.facts["frozen"] and not case.facts["frozen_excluded"]])
def test_frozen_parameters_can_be_left_out(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint), exclude_frozen_parameters=True)

    found = ours(str(case.checkpoint), exclude_frozen_parameters=True)

    assert different(found, widened(expected)) == []
    assert not found.keys() & set(case.facts["frozen"])
    assert found.keys() < ours(str(case.checkpoint)).keys()


@every([case for case in WORKING if case.facts["tied"]])
def test_tied_names_are_one_tensor(case: Case, theirs: Callable[..., Any]) -> None:
    for state in (theirs(str(case.checkpoint)), ours(case.checkpoint)):
        for alias, kept in case.facts["tied"].items():
            assert state[alias].data_ptr() == state[kept].data_ptr()
    assert len(ours(case.checkpoint, exclude_frozen_parameters=False)) == len(case.model())


@every(WORKING[::7])
def test_lazy_mode_reads_when_it_is_told_to(case: Case, theirs: Callable[..., Any]) -> None:
    expected = theirs(str(case.checkpoint), lazy_mode=True)

    found = ours(case.checkpoint, lazy_mode=True)

    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert not isinstance(tensor, torch.Tensor)
        assert tuple(tensor.shape) == tuple(expected[name].shape)
        assert tensor.dtype == torch.float32
    read = {name: tensor.contiguous() for name, tensor in found.items()}
    assert different(read, widened({n: t.contiguous() for n, t in expected.items()})) == []


def test_a_tag_chooses_the_save(theirs: Callable[..., Any]) -> None:
    (case,) = [case for case in CURRENT if len(case.facts["tags"]) > 1]
    newest = ours(case.checkpoint)
    for tag in case.facts["tags"]:
        expected = theirs(str(case.checkpoint), tag=tag)
        assert different(ours(case.checkpoint, tag), expected) == []
        assert different(ours(case.checkpoint / tag), expected) == []
        assert (different(newest, expected) == []) == (tag == case.facts["tags"][-1])


@every(STAGE_0)
def test_stage_0_works_here_and_not_there(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every(BF16_OPTIMIZER)
def test_bf16_optimizer_works_here_and_not_there(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="is not a zero checkpoint"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every(FROZEN_1)
def test_frozen_parameters_of_zero_1_are_here_and_not_there(
    case: Case, theirs: Callable[..., Any]
) -> None:
    lost = set(case.model()) - set(theirs(str(case.checkpoint)))

    assert lost == set(case.facts["frozen"])
    assert different(ours(case.checkpoint), truth(case)) == []


@every(UNLOADABLE)
def test_what_deepspeed_cannot_load_is_read(case: Case, theirs: Callable[..., Any]) -> None:
    with pytest.raises((RuntimeError, AttributeError), match=r"mmap can only|Can't get attribute"):
        theirs(str(case.checkpoint))

    assert different(ours(case.checkpoint), truth(case)) == []


@every([case for case in CASES if case not in CURRENT])
def test_old_checkpoints_are_read(case: Case) -> None:
    assert different(ours(case.checkpoint), truth(case)) == []


def test_failures_are_our_errors(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        ours(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint with the tag"):
        ours(WORKING[0].checkpoint, tag="global_step999")
    assert issubclass(NotACheckpoint, CkptError)


# -- merge_fsdp_weights ------------------------------------------------------------------------

SHARDED = FIXTURES / "accelerate" / "fsdp2-sharded-3ranks" / "checkpoint"
MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
STATES = sorted(
    path.parent
    for kind in ("accelerate", "dcp")
    for path in FIXTURES.glob(f"{kind}/*/checkpoint/**/.metadata")
    if path.parent.name not in (OPTIMIZER, "model_and_optim") and "olmo-core" not in str(path)
)
# Saved as safetensors, of a tensor subclass that torch.load refuses, or with more than a model in them.
BEYOND_ACCELERATE = {
    "dcp/torchao-float8-2ranks/checkpoint",
    "dcp/fsdp2-app-2ranks/checkpoint",
    "dcp/fsdp2-state-model-2ranks/checkpoint",
    "dcp/safetensors-format-2ranks/checkpoint",
    "dcp/torchtitan-2ranks/checkpoint/step-1",
}
WRAPPER = {"fsdp2-compiled-2ranks": "_orig_mod."}


def named(path: Path) -> str:
    return str(path.relative_to(FIXTURES))


def each(paths: list[Path]) -> Any:
    assert paths
    return pytest.mark.parametrize("path", paths, ids=named)


@pytest.fixture(scope="module")
def accelerates() -> Callable[..., Any]:
    function = pytest.importorskip("accelerate.utils").merge_fsdp_weights
    assert callable(function)
    return function


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A `save_state` of FSDP2 that a test may change."""
    return Path(shutil.copytree(SHARDED, tmp_path / "save"))


def test_the_signature_is_accelerates(accelerates: Callable[..., Any]) -> None:
    assert plain(merge_fsdp_weights) == plain(accelerates)


@each([path for path in STATES if named(path) not in BEYOND_ACCELERATE])
def test_the_file_is_accelerates_byte_for_byte(
    path: Path, tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    accelerates(str(path), str(tmp_path / "theirs"))

    merge_fsdp_weights(str(path), str(tmp_path / "ours"))

    (theirs,), (mine,) = (tmp_path / "theirs").iterdir(), (tmp_path / "ours").iterdir()
    assert mine.name == theirs.name == "model.safetensors"
    assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@each([path for path in STATES if named(path) not in BEYOND_ACCELERATE])
def test_the_pickled_file_is_accelerates_dict(
    path: Path, tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    accelerates(str(path), str(tmp_path / "theirs"), safe_serialization=False)

    merge_fsdp_weights(path, tmp_path / "ours", safe_serialization=False)

    (theirs,), (mine,) = (tmp_path / "theirs").iterdir(), (tmp_path / "ours").iterdir()
    assert mine.name == theirs.name == "pytorch_model.bin"
    expected = torch.load(theirs, weights_only=True)
    found = torch.load(mine, weights_only=True)
    assert type(found) is type(expected) is dict
    assert different(found, expected) == []
    assert different(torch.load(mine, weights_only=True, mmap=True), expected) == []
    # Each tensor can be kept without the others' memory.
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("state", sorted(BEYOND_ACCELERATE))
def test_what_accelerate_cannot_merge_is_merged(
    state: str, tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    """Its exceptions are torch's and safetensors', and it leaves an empty directory."""
    with pytest.raises(BaseException):  # noqa: B017, PT011 - CheckpointException derives from it
        accelerates(str(FIXTURES / state), str(tmp_path / "theirs"))
    assert list((tmp_path / "theirs").iterdir()) == []

    merge_fsdp_weights(FIXTURES / state, tmp_path / "ours")

    fixture = FIXTURES.joinpath(*Path(state).parts[:2])
    truth = next(iter([*fixture.glob("truth-step-1"), fixture / "truth"]))
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert different(found, load_file(truth / "model.safetensors")) == []


def test_the_parts_of_other_ranks_are_not_left_to_chance(
    tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    """Saved without collectives there is no `.metadata`: it takes rank 0's, and what memory holds."""
    fixture = FIXTURES / "dcp" / "no-collectives-2ranks"
    truth = load_file(fixture / "truth" / "model.safetensors")
    accelerates(str(fixture / "checkpoint"), str(tmp_path / "theirs"))

    merge_fsdp_weights(fixture / "checkpoint", tmp_path / "ours")

    assert "norm.bias" in different(load_file(tmp_path / "theirs" / "model.safetensors"), truth)
    assert different(load_file(tmp_path / "ours" / "model.safetensors"), truth) == []


@pytest.mark.parametrize("name", ["fsdp2-model-3ranks", "fsdp2-compiled-2ranks", "awkward-2ranks"])
def test_the_file_is_what_the_live_model_held(name: str, tmp_path: Path) -> None:
    merge_fsdp_weights(FIXTURES / "dcp" / name / "checkpoint", tmp_path)

    truth = load_file(FIXTURES / "dcp" / name / "truth" / "model.safetensors")
    expected = {WRAPPER.get(name, "") + key: tensor for key, tensor in truth.items()}
    assert different(load_file(tmp_path / "model.safetensors"), expected) == []


@each([SHARDED, FIXTURES / "accelerate" / "trainer-fsdp1-2ranks" / "checkpoint" / "checkpoint-2"])
def test_the_directory_above_will_do(
    path: Path, tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    """Accelerate has a message for this mistake, behind a condition that is never true."""
    with pytest.raises(BaseException, match=r"No such file or directory: .*\.metadata"):
        accelerates(str(path), str(tmp_path / "theirs"))

    merge_fsdp_weights(path, tmp_path / "above")
    merge_fsdp_weights(path / MODEL, tmp_path / "itself")

    found = (tmp_path / "above" / "model.safetensors").read_bytes()
    assert found == (tmp_path / "itself" / "model.safetensors").read_bytes()


def test_a_wrong_directory_is_our_error_with_the_right_one(tmp_path: Path, save: Path) -> None:
    def error_of(path: Path) -> CkptError:
        with pytest.raises(CkptError) as caught:
            merge_fsdp_weights(path, tmp_path / "deep" / "out")
        assert not (tmp_path / "deep").exists()
        return caught.value

    gone, empty = error_of(tmp_path / "gone"), error_of(tmp_path / "deep.")
    assert isinstance(gone, NotACheckpoint)
    assert isinstance(empty, NotACheckpoint)
    assert "pytorch_model_fsdp_0" in str(gone.hint)
    optimizer = error_of(save / OPTIMIZER)
    assert isinstance(optimizer, UnsupportedLayout)
    assert optimizer.hint == "The weights are in pytorch_model_fsdp_0 beside it."
    zero = error_of(WORKING[0].checkpoint)
    assert isinstance(zero, UsageError)
    assert (zero.fact, zero.hint) == (
        "it is not a sharded FSDP state; its format is deepspeed",
        "ckpt_tools.consolidate reads it.",
    )
    shutil.copytree(save / MODEL, save / "pytorch_model_fsdp_1")
    several = error_of(save)
    assert isinstance(several, AmbiguousCheckpoint)
    assert several.choices == (MODEL, "pytorch_model_fsdp_1")
    assert several.hint == f"Name the directory of one of them: {MODEL}, pytorch_model_fsdp_1"
    (save / MODEL / "__1_0.distcp").unlink()
    assert isinstance(error_of(save / MODEL), DamagedCheckpoint)


def test_the_source_is_removed_once_the_file_is_in_place(
    save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = []

    def removes(path: Path, **options: Any) -> None:
        complete.append((path, load_file(save / "merged" / "model.safetensors").keys()))

    with monkeypatch.context() as patched:
        patched.setattr("ckpt_tools.conversion.compat.shutil.rmtree", removes)
        merge_fsdp_weights(save, save / "merged", remove_checkpoint_dir=True)
    merge_fsdp_weights(save, save / "again", remove_checkpoint_dir=True)

    ((removed, names),) = [call for call in complete if call[0] == save / MODEL]
    truth = load_file(SHARDED.parent / "truth" / "model.safetensors")
    assert (removed, names) == (save / MODEL, truth.keys())
    assert not (save / MODEL).exists()
    assert (save / OPTIMIZER / ".metadata").exists()
    assert different(load_file(save / "again" / "model.safetensors"), truth) == []


@pytest.mark.parametrize("safe", [True, False])
def test_the_source_stays_when_one_bit_of_the_file_differs(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    write = single_file._write

    def writes_a_wrong_bit(layout: Any, directory: Path) -> None:
        write(layout, directory)
        (file,) = layout.files
        place = max(slot.offset for slot in file.slots)
        with (directory / file.name).open("r+b") as stream:
            stream.seek(place)
            last = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([last ^ 1]))

    monkeypatch.setattr(single_file, "_write", writes_a_wrong_bit)
    before = sorted(save.rglob("*"))

    with pytest.raises(OutputFailed, match="differs from its source"):
        merge_fsdp_weights(save, tmp_path / "out", safe, remove_checkpoint_dir=True)

    assert sorted(save.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_a_source_with_more_than_the_weights_is_not_removed(save: Path, tmp_path: Path) -> None:
    with_optimizer = tmp_path / "app"
    shutil.copytree(FIXTURES / "dcp" / "fsdp2-app-2ranks" / "checkpoint", with_optimizer)
    (save / MODEL / "notes.txt").touch()
    (tmp_path / "link").symlink_to(save / MODEL)

    for source, fact in {
        with_optimizer: "not in the result: app.optim",
        save: "not in the result: notes.txt",
        tmp_path / "link": "not in the result: notes.txt",
    }.items():
        with pytest.raises(UsageError, match=fact):
            merge_fsdp_weights(source, tmp_path / "out", remove_checkpoint_dir=True)
    (save / MODEL / "notes.txt").unlink()
    with pytest.raises(UsageError, match="it is a link"):
        merge_fsdp_weights(tmp_path / "link", tmp_path / "out", remove_checkpoint_dir=True)

    assert (save / MODEL / ".metadata").exists()
    assert (with_optimizer / ".metadata").exists()
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_lie_in_the_source(save: Path) -> None:
    for output in (save / MODEL, save / MODEL / "merged"):
        with pytest.raises(UsageError, match="lies in the input"):
            merge_fsdp_weights(save, output)
    assert not list(save.rglob("model.safetensors"))


def test_an_older_file_is_replaced_as_accelerate_does(
    tmp_path: Path, accelerates: Callable[..., Any]
) -> None:
    for output, function in (("theirs", accelerates), ("ours", merge_fsdp_weights)):
        (tmp_path / output).mkdir()
        (tmp_path / output / "config.json").write_text("{}")
        for path in (SHARDED / MODEL, STATES[0]):
            function(str(path), str(tmp_path / output))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    assert {path.name for path in ours.iterdir()} == {"config.json", "model.safetensors"}
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_a_merge_that_fails_keeps_the_older_file(tmp_path: Path, save: Path) -> None:
    merge_fsdp_weights(SHARDED, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    shard = max((save / MODEL).glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DamagedCheckpoint):
        merge_fsdp_weights(save, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_every_rank_calls_it_at_once_and_again(tmp_path: Path) -> None:
    command = ["-m", "tests.support.training.merging", str(tmp_path)]
    run = ended(start(command, ranks=2, environment={"ACCELERATE_USE_CPU": "true"}))
    assert run.status == 0, run.stdout + run.stderr
    for function in ("theirs", "ours"):
        left = {path.name for path in (tmp_path / function).iterdir()}
        assert left == {"model.safetensors", "pytorch_model.bin"}
