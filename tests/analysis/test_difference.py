"""Two checkpoints differ in what torch finds different between them, and in nothing else."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import Difference, TensorDifference, diff, open_checkpoint
from ckpt_tools.errors import DamagedCheckpoint, NotACheckpoint, UsageError
from ckpt_tools.tensors import windows
from tests.conftest import FIXTURES

ZERO, PEFT = FIXTURES / "zero", FIXTURES / "peft"
PLAIN = ZERO / "zero2-bf16-llama-3ranks"
TIED = ZERO / "zero3-bf16-qwen3-tied-2ranks"
SAVES = ZERO / "zero2-bf16-llama-two-saves-2ranks"
NAME = "model.layers.0.mlp.up_proj.weight"

State = dict[str, torch.Tensor]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


def differing(a: State, b: State, directory: Path, **options: Any) -> Difference:
    directory.mkdir(exist_ok=True)
    first = written(directory / "a.safetensors", a)
    return diff(first, written(directory / "b.safetensors", b), **options)


def by_torch(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """The statistics by torch's own functions, in float64 and all at once."""
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    return {
        "changed": int((x != y).sum()),
        "max_abs": float((x - y).abs().max()),
        "mean_abs": float((x - y).abs().mean()),
        "relative": float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(x)),
        "cosine": float(torch.nn.functional.cosine_similarity(x, y, dim=0)),
    }


def assert_is(found: TensorDifference, a: torch.Tensor, b: torch.Tensor) -> None:
    for key, value in by_torch(a, b).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-12), key
    assert found.shape == tuple(a.shape)
    assert found.numel == a.numel()


# -- real checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["masters", "model"])
@pytest.mark.parametrize("case", [PLAIN, TIED], ids=lambda case: case.name)
def test_a_checkpoint_and_its_export_are_the_same(case: Path, truth: str) -> None:
    """The export holds the masters, or the 16-bit weights that the engine trained with."""
    found = diff(case / "checkpoint", case / "truth" / f"{truth}.safetensors")

    state = load_file(case / "truth" / f"{truth}.safetensors")
    assert found.is_empty
    assert (found.compared, found.same) == (len(state), len(state))
    assert found.elements == sum(tensor.numel() for tensor in state.values())
    count = len(state) if truth == "model" else 0
    assert [note.split(",")[0] for note in found.notes] == (
        [f"A: {count} float32 masters are compared as bfloat16 weights"] if count else []
    )
    assert diff(case / "truth" / f"{truth}.safetensors", case / "checkpoint").is_empty


def test_two_saves_of_a_run_differ_as_the_live_engine_did() -> None:
    found = diff(
        SAVES / "checkpoint", SAVES / "checkpoint", tag_a="global_step2", tag_b="global_step4"
    )

    a = load_file(SAVES / "truth-global_step2" / "masters.safetensors")
    b = load_file(SAVES / "truth" / "masters.safetensors")
    assert {each.name for each in found.changed} == {n for n in a if not a[n].equal(b[n])}
    for each in found.changed:
        assert_is(each, a[each.name], b[each.name])
        assert each.dtypes == ("float32", "float32")
    sizes = [each.relative or 0.0 for each in found.changed]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    assert (found.a["step"], found.b["step"]) == (2, 4)
    assert found.a["path"].endswith("global_step2")


def test_the_weights_of_two_saves_are_compared_where_they_are_asked_for() -> None:
    found = diff(
        SAVES / "checkpoint",
        SAVES / "checkpoint",
        tag_a="global_step2",
        weights="model",
    )

    a = load_file(SAVES / "truth-global_step2" / "model.safetensors")
    b = load_file(SAVES / "truth" / "model.safetensors")
    assert {each.name for each in found.changed} == {n for n in a if not a[n].equal(b[n])}
    for each in found.changed:
        assert_is(each, a[each.name], b[each.name])
        assert each.dtypes == ("bfloat16", "bfloat16")


def test_the_masters_and_a_rounded_export_are_recast_where_masters_are_asked_for() -> None:
    found = diff(PLAIN / "checkpoint", PLAIN / "truth" / "model.safetensors", weights="master")

    a = load_file(PLAIN / "truth" / "masters.safetensors")
    b = load_file(PLAIN / "truth" / "model.safetensors")
    assert found.recast == dict.fromkeys(a, ("float32", "bfloat16"))
    assert {each.name for each in found.changed} == {n for n in a if not a[n].equal(b[n].float())}
    for each in found.changed:
        assert_is(each, a[each.name], b[each.name])


def test_a_state_with_an_adapter_is_compared_with_the_adapter() -> None:
    case = PEFT / "zero2-olmo2-dora"
    found = diff(case / "checkpoint", case / "truth" / "adapter")

    assert found.is_empty
    assert found.compared == len(load_file(case / "truth/adapter/adapter_model.safetensors"))
    assert "only the adapter" in found.notes[0]


def test_checkpoints_that_are_open_already_are_taken() -> None:
    assert diff(open_checkpoint(TIED / "checkpoint"), TIED / "checkpoint").is_empty


def test_a_wrapper_is_no_difference(tmp_path: Path) -> None:
    state = load_file(PLAIN / "truth" / "model.safetensors")
    found = differing(state, {f"module.{n}": t for n, t in state.items()}, tmp_path)

    assert found.is_empty
    assert found.notes == (f"B: stripped module. from {len(state)} names",)


# -- known edits -----------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path: Path) -> tuple[State, State, Difference]:
    """A real model, and a copy of it in which everything was done that can be."""
    a = load_file(PLAIN / "truth" / "masters.safetensors")
    a |= {"count": torch.tensor(7), "mask": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b[NAME].view(-1)[[3, 200]] += torch.tensor([0.5, -0.25])
    b["model.norm.weight"] *= 3
    b["count"] += 2
    b["mask"][1] = True
    b["lm_head.weight"] = b["lm_head.weight"].T.contiguous()
    b["model.embed_tokens.weight"] = b["model.embed_tokens.weight"].double()
    b["added"] = torch.zeros(2, 3, dtype=torch.int8)
    del b["model.layers.1.input_layernorm.weight"]
    return a, b, differing(a, b, tmp_path)


def test_every_edit_is_found(edited: tuple[State, State, Difference]) -> None:
    a, b, found = edited

    changed = {each.name: each for each in found.changed}
    assert {*changed} == {NAME, "model.norm.weight", "count", "mask"}
    for name, each in changed.items():
        assert_is(each, a[name], b[name])
    assert found.recast == {"model.embed_tokens.weight": ("float32", "float64")}
    assert {n: (str(x), str(y)) for n, (x, y) in found.reshaped.items()} == {
        "lm_head.weight": ("float32 [67, 10]", "float32 [10, 67]")
    }
    assert {n: str(held) for n, held in found.added.items()} == {"added": "int8 [2, 3]"}
    removed = {"model.layers.1.input_layernorm.weight": "float32 [10]"}
    assert {n: str(held) for n, held in found.removed.items()} == removed
    assert found.compared == len(a) - 2
    assert found.same == len(a) - 2 - 4
    assert not found.is_empty


def test_the_largest_change_comes_first(edited: tuple[State, State, Difference]) -> None:
    a, b, found = edited

    def size(name: str) -> float:
        return by_torch(a[name], b[name])["relative"]

    names = [each.name for each in found.changed]
    assert names == sorted(names, key=size, reverse=True)
    assert names[0] == "model.norm.weight"


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {NAME, "model.norm.weight", "count", "mask"}),
        ({"atol": 0.3}, {NAME, "model.norm.weight", "count", "mask"}),
        ({"atol": 0.6}, {"model.norm.weight", "count", "mask"}),
        ({"atol": 1.0}, {"model.norm.weight", "count"}),
        ({"rtol": 0.7, "atol": 1.0}, set()),
    ],
)
def test_a_tolerance_lets_small_changes_pass(
    options: dict[str, Any],
    changed: set[str],
    edited: tuple[State, State, Difference],
    tmp_path: Path,
) -> None:
    a, b, _ = edited
    expected = {
        name
        for name in a
        if name in b
        and a[name].shape == b[name].shape
        and not torch.allclose(
            a[name].double(),
            b[name].double(),
            rtol=options.get("rtol", 0.0),
            atol=options.get("atol", 0.0),
        )
    }
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)

    assert {each.name for each in found.changed} == expected
    assert expected == changed
    # What lies within the tolerance is still of another shape, or not there.
    assert len(found.added) == len(found.removed) == len(found.reshaped) == len(found.recast) == 1


def test_the_result_does_not_depend_on_threads_and_windows_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 1000)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 10_000)
    a = {f"{i}": randn(77, 91, seed=i) for i in range(6)}
    # In half of the windows nothing changes: their elements count in the norms all the same.
    b = {name: tensor + 1e-3 * (randn(77, 91, seed=9) > 1) for name, tensor in a.items()}
    b["3"] = a["3"].clone()
    b["3"].view(-1)[5000] += 1

    results = [differing(a, b, tmp_path, workers=workers) for workers in (1, 2, 7)]

    assert results[0] == results[1] == results[2]
    for each in results[0].changed:
        assert_is(each, a[each.name], b[each.name])
    assert len(results[0].changed) == 6


def test_a_single_bit_anywhere_is_found(tmp_path: Path) -> None:
    a = {"x": randn(1 << 20), "y": randn(333)}
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        name = "xy"[int(torch.randint(2, (1,), generator=generator))]
        at = int(torch.randint(a[name].numel(), (1,), generator=generator))
        bit = int(torch.randint(32, (1,), generator=generator))
        b = {n: t.clone() for n, t in a.items()}
        b[name].view(torch.int32)[at] ^= 1 << bit if bit < 31 else -(1 << 31)

        (each,) = differing(a, b, tmp_path).changed

        assert (each.name, each.changed) == (name, 1)


def test_what_is_not_finite_comes_first_and_is_counted(tmp_path: Path) -> None:
    a = {"far": torch.ones(4), "nan": torch.ones(4), "same": torch.tensor([math.nan, math.inf])}
    b = {"far": torch.full((4,), 100.0), "nan": torch.ones(4), "same": a["same"].clone()}
    b["nan"][:3] = torch.tensor([math.nan, math.inf, 1.5])

    first, second = differing(a, b, tmp_path).changed

    assert (first.name, first.changed, first.nan, first.inf) == ("nan", 3, (0, 1), (0, 1))
    assert first.max_abs == 0.5
    assert second.name == "far"


def test_a_zero_that_changed_sign_is_a_change_of_no_size(tmp_path: Path) -> None:
    a = {"zero": torch.zeros(3), "one": torch.ones(3)}
    found = differing(a, {"zero": -a["zero"], "one": a["one"] + 1e-6}, tmp_path)

    assert [each.name for each in found.changed] == ["one", "zero"]
    assert found.changed[1].changed == 3
    assert found.changed[1].max_abs == 0.0
    assert differing(a, {"zero": -a["zero"], "one": a["one"]}, tmp_path, atol=1e-9).is_empty


# -- the answer ------------------------------------------------------------------------------------


def test_json_is_json(edited: tuple[State, State, Difference], tmp_path: Path) -> None:
    _, _, found = edited
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))

    assert data["version"] == 1
    assert data["identical"] is False
    assert (data["compared"], data["same"]) == (found.compared, found.same)
    first = found.changed[0]
    assert data["changed"][0]["name"] == first.name
    assert data["changed"][0]["relative"] == first.relative
    assert data["changed"][0]["numel"] == first.numel
    assert data["recast"] == [{"name": "model.embed_tokens.weight", "a": "float32", "b": "float64"}]
    (reshaped,) = data["reshaped"]
    assert reshaped["a"] == {"dtype": "float32", "shape": [67, 10]}
    assert data["added"] == [{"name": "added", "dtype": "int8", "shape": [2, 3]}]
    assert data["a"]["name"] == "a.safetensors"
    assert {"removed", "notes", "rtol", "atol", "elements", "b"} <= data.keys()


def test_a_number_that_json_has_not_is_null(tmp_path: Path) -> None:
    a = {"x": torch.tensor([1.7e308], dtype=torch.float64)}
    found = differing(a, {"x": -a["x"]}, tmp_path)

    assert found.changed[0].max_abs == math.inf
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["changed"][0]["max_abs"] is None


def test_two_models_without_a_name_in_common_are_said_to_be(tmp_path: Path) -> None:
    found = differing(
        {"c": torch.ones(1), "policy.b": torch.ones(1)},
        {"a": torch.ones(1), "b": torch.ones(1)},
        tmp_path,
    )

    assert found.compared == 0
    assert found.notes == ("no tensor has the same name in both: A has c, B has a",)


def test_of_a_composite_model_and_its_part_the_attribute_is_named(tmp_path: Path) -> None:
    part = {"a.w": torch.ones(1), "b": torch.ones(1)}
    whole = {f"policy.{name}": value for name, value in part.items()}
    whole |= {"value_model.b": torch.ones(1), "value_model.score": torch.ones(1)}

    for number, sides in enumerate([(whole, part), (part, whole)]):
        (tmp_path / str(number)).mkdir()
        _, advice = differing(*sides, tmp_path / str(number)).notes
        letters = ("B", "A") if number == 0 else ("A", "B")
        assert advice.startswith(
            "the names suggest that {} is the attribute policy of {}: ".format(*letters)
        )
        assert advice.endswith(f"the output of ckpt-tools extract-attr policy for {letters[1]}")


def test_progress_ends_at_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    a = {"x": randn(1000), "y": randn(5)}
    differing(a, {"x": a["x"], "y": a["y"] + 1}, tmp_path, progress=lambda *t: told.append(t))

    assert told[-1] == (8040, 8040)

    # What is the same in a tensor that changed elsewhere is read again, for its norm.
    monkeypatch.setattr(windows, "WINDOW", 100)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 1000)
    told.clear()
    b = a["x"].clone()
    b[550] += 1
    differing({"x": a["x"]}, {"x": b}, tmp_path, progress=lambda *t: told.append(t), workers=1)
    assert told[-1] == (11600, 11600)
    assert all(done <= total for done, total in told)


# -- trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"rtol": -1.0}, "a tolerance must be a number >= 0"),
        ({"atol": math.nan}, "a tolerance must be a number >= 0"),
        ({"atol": math.inf}, "a tolerance must be a number >= 0"),
        ({"weights": "best"}, "'best' is not a copy"),
        ({"tag_a": "global_step9"}, "no checkpoint with the tag 'global_step9'"),
    ],
)
def test_what_cannot_be_compared_is_an_error(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        diff(SAVES / "checkpoint", SAVES / "checkpoint", **options)


def test_a_checkpoint_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        diff(PLAIN / "checkpoint", tmp_path / "nowhere")
    good = written(tmp_path / "good.safetensors", {"x": randn(1 << 20)})
    bad = opened_and_cut(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="the file ends at byte"):
        diff(good, bad)


def opened_and_cut(directory: Path) -> Any:
    """A checkpoint whose file got shorter after its header was read."""
    (directory / "cut").mkdir()
    path = written(directory / "cut" / "model.safetensors", {"x": randn(1 << 20)})
    opened = open_checkpoint(directory / "cut")
    with path.open("r+b") as stream:
        stream.truncate(3 << 20)
    return opened


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for megabytes in (32, 192):
        for side in "ab":
            state = {
                str(i): torch.full((1 << 23,), float(i + (side == "b")))
                for i in range(megabytes // 32)
            }
            written(tmp_path / f"{side}.safetensors", state)
        program = (
            "import sys\n"
            "from ckpt_tools import diff\n"
            "found = diff(*sys.argv[1:], workers=2)\n"
            "assert len(found.changed) == found.compared\n"
            "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
        )
        paths = [str(tmp_path / f"{side}.safetensors") for side in "ab"]
        done = subprocess.run(
            [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True
        )
        peaks[megabytes] = int(done.stdout.split()[1]) // 1024
    assert peaks[192] < peaks[32] + 48, peaks


@pytest.mark.parametrize("weights", ["auto", "model"])
def test_where_masters_are_lost_the_weights_are_compared(
    fixtures: Path, tmp_path: Path, weights: Literal["auto", "model"]
) -> None:
    whole = fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint"
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").glob("*/*optim_states.pt"):
        path.unlink()
    found = diff(tmp_path / "run", whole, weights=weights)
    assert found.same
    with pytest.raises(DamagedCheckpoint, match="--weights model takes them"):
        diff(tmp_path / "run", whole, weights="master")
