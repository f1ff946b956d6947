"""average: the mean of checkpoints, against the same sum of the live masters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import average, consolidate
from ckpt_tools.cli import cli
from ckpt_tools.errors import UsageError
from tests.conftest import FIXTURES

ZERO = FIXTURES / "zero"
FIRST, SECOND = ZERO / "zero2-bf16-llama-3ranks", ZERO / "zero3-bf16-llama-7ranks"
OTHER = ZERO / "zero2-bf16-gpt2-2ranks"


def mean(weights: tuple[float, ...], *cases: Path) -> dict[str, torch.Tensor]:
    """The live masters times their weights, added in fp64 in the order of the cases, rounded to fp32."""
    masters = [load_file(case / "truth" / "masters.safetensors") for case in cases]
    total = {name: torch.zeros_like(tensor).double() for name, tensor in masters[0].items()}
    for state, weight in zip(masters, weights, strict=True):
        for name, tensor in state.items():
            total[name] += tensor.double() * weight
    return {name: tensor.float() for name, tensor in total.items()}


@pytest.mark.parametrize(
    ("coefficients", "weights"), [(None, (0.5, 0.5)), ([0.3, 0.7], (0.3, 0.7))]
)
def test_the_mean_is_computed_from_the_masters(
    coefficients: list[float] | None, weights: tuple[float, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    checkpoints = [FIRST / "checkpoint", SECOND / "checkpoint"]

    average(checkpoints, out, coefficients=coefficients, dtype="fp32", config=FIRST / "hf")

    found, truth = load_file(out / "model.safetensors"), mean(weights, FIRST, SECOND)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    # Neither checkpoint alone would pass.
    alone = load_file(FIRST / "truth" / "masters.safetensors")
    assert any(not torch.equal(found[name], alone[name]) for name in alone)


def test_the_mean_of_equal_checkpoints_is_each_of_them(tmp_path: Path) -> None:
    """A third is not a number of fp64, and its sums still round to the masters."""
    same = [FIRST / "checkpoint"] * 3

    average(same, tmp_path / "out", dtype="fp32", weights_only=True)

    found = load_file(tmp_path / "out" / "model.safetensors")
    masters = load_file(FIRST / "truth" / "masters.safetensors")
    assert found.keys() == masters.keys()
    assert all(torch.equal(found[name], masters[name]) for name in masters)


@pytest.mark.parametrize("spelling", ["same", "with a tag", "a link", "hard links"])
def test_a_checkpoint_that_is_named_twice_is_warned_of(spelling: str, tmp_path: Path) -> None:
    named = FIRST / "checkpoint"
    (tag,) = named.glob("global_step*")
    again = tmp_path / "again"
    match spelling:
        case "same":
            again = named
        case "with a tag":
            again = named / "." / tag.name
        case "a link":
            again.symlink_to(named)
        case "hard links":
            shutil.copytree(named, tmp_path / "own")
            named = tmp_path / "own"
            shutil.copytree(named, again, copy_function=os.link)

    asked = [named, SECOND / "checkpoint", again]
    report = average(asked, tmp_path / "out", weights_only=True, dry_run=True)

    (warning,) = report.warnings
    assert "checkpoints 1 and 3 have the same files" in warning
    assert "counts them 2 times" in warning


def test_other_checkpoints_of_a_run_are_not_warned_of(tmp_path: Path) -> None:
    """A copy has the same values and is another file; it is not claimed to be the same."""
    shutil.copytree(FIRST / "checkpoint", tmp_path / "copy")

    for second in (SECOND / "checkpoint", tmp_path / "copy"):
        asked = [FIRST / "checkpoint", second]
        assert not average(asked, tmp_path / "out", weights_only=True, dry_run=True).warnings


def test_auto_rounds_the_mean_once_to_the_training_dtype(tmp_path: Path) -> None:
    out = tmp_path / "out"

    average([FIRST / "checkpoint", SECOND / "checkpoint"], out, weights_only=True)

    truth = mean((0.5, 0.5), FIRST, SECOND)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], truth[name].bfloat16()) for name in truth)


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    consolidate(SECOND / "checkpoint", tmp_path / "hf", dtype="fp32", config=SECOND / "hf")

    average(
        [FIRST / "checkpoint", tmp_path / "hf"],
        tmp_path / "out",
        dtype="fp32",
        weights_only=True,
    )

    truth = mean((0.5, 0.5), FIRST, SECOND)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_what_is_not_floating_is_that_of_the_last(tmp_path: Path) -> None:
    """Counters and masks have no mean."""
    for number in (1, 2, 3):
        (tmp_path / f"{number}").mkdir()
        state = {"count": torch.tensor([number]), "w": torch.full((2,), float(number))}
        save_file(state, tmp_path / f"{number}" / "model.safetensors")

    average([tmp_path / "1", tmp_path / "2", tmp_path / "3"], tmp_path / "out", weights_only=True)

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["count"].tolist() == [3]
    assert found["w"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("cases", "coefficients", "fact"),
    [
        ((FIRST, OTHER), None, "differ in"),
        ((FIRST, SECOND), [1.0], "2 checkpoints, and the number of coefficients is 1"),
        ((FIRST, SECOND), [0.5, 0.6], "add up to 1.1, not to 1"),
        ((FIRST,), None, "two checkpoints or more"),
    ],
)
def test_what_is_no_mean_is_refused(
    cases: tuple[Path, ...], coefficients: list[float] | None, fact: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=fact):
        average(
            [case / "checkpoint" for case in cases],
            tmp_path / "out",
            coefficients=coefficients,
            weights_only=True,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_model_may_have_the_hubs_names_and_those_in_memory(tmp_path: Path) -> None:
    """Experts are fused in memory, and a checkpoint stores either end of the tied pair, or both."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = MixtralConfig(
        vocab_size=9,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        **sizes,
    )
    torch.manual_seed(0)
    first, second = MixtralForCausalLM(config), MixtralForCausalLM(config)
    first.save_pretrained(tmp_path / "hub")
    second.config.save_pretrained(tmp_path / "run")
    live = {name: value.clone() for name, value in second.state_dict().items()}
    save_file(live, tmp_path / "run/model.safetensors", metadata={"format": "pt"})
    ends = ["model.embed_tokens.weight", "lm_head.weight"]
    for end in ends:
        first.config.save_pretrained(tmp_path / end)
        lean = {n: v.clone() for n, v in first.state_dict().items() if n == end or n not in ends}
        save_file(lean, tmp_path / end / "model.safetensors", metadata={"format": "pt"})
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        one.data = (one.double() * 0.25 + other.double() * 0.75).float()
    first.save_pretrained(tmp_path / "truth")
    truth = load_file(tmp_path / "truth/model.safetensors")

    both = [tmp_path / "hub", tmp_path / "run"]
    for order, weights in ((both, [0.25, 0.75]), (both[::-1], [0.75, 0.25])):
        out = tmp_path / f"out-{order[0].name}"
        report = average(order, out, coefficients=weights, config=tmp_path / "hub")
        found = load_file(out / "model.safetensors")
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        which = order.index(tmp_path / "hub") + 1
        assert (
            f"checkpoint {which} was brought into the layout of the model in memory" in report.notes
        )
    for end in ends:
        out = tmp_path / f"out-{end}"
        average([tmp_path / end, tmp_path / "run"], out, coefficients=[0.25, 0.75])
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[name], truth[name]) for name in truth)

    with pytest.raises(UsageError, match="differ in") as caught:
        average(both, tmp_path / "none", weights_only=True)
    assert "consolidate and the same --like DIR" in (caught.value.hint or "")
    for one in both:
        consolidate(one, tmp_path / f"like-{one.name}", like=tmp_path / "hub")
    average([tmp_path / "like-hub", tmp_path / "like-run"], tmp_path / "next", weights_only=True)


def test_the_command_takes_any_number_of_checkpoints(tmp_path: Path) -> None:
    from click.testing import CliRunner

    out = tmp_path / "out"
    words = ["average", FIRST / "checkpoint", SECOND / "checkpoint", out, "--weights-only"]
    done = CliRunner().invoke(cli, [*map(str, words), "--coefficients", "0.5,0.5", "--quiet"])

    assert done.exit_code == 0, done.output
    truth = mean((0.5, 0.5), FIRST, SECOND)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], truth[name].bfloat16()) for name in truth)
