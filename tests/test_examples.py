"""The examples run as their first lines say, and what they leave is what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.answers import shared_answers
from tests.support.merges import assert_all_rounded
from tests.support.ranks.launching import REPOSITORY, ended, start

pytestmark = pytest.mark.slow


def run(name: str, out: Path) -> str:
    """The example under the torchrun that its docstring shows; what it printed."""
    script = REPOSITORY / "examples" / name
    assert f"torchrun --nproc-per-node 2 examples/{name} OUT" in script.read_text()
    result = ended(start([script, out], ranks=2, environment=shared_answers()))
    assert result.status == 0, result.stdout + result.stderr
    return result.stdout


def loads(directory: Path) -> torch.nn.Module:
    """The model, which must be there whole."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = found
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, torch.nn.Module)
    return model


def test_a_fine_tune_leaves_adapters_that_load(tmp_path: Path) -> None:
    from peft import PeftModel

    said = run("finetune_lora.py", tmp_path)

    assert "the same bytes" in said
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step ")]
    assert losses == sorted(losses, reverse=True)
    base: Any = loads(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter-step-6"))
    for parameter in adapted.parameters():
        parameter.data = parameter.data.double()
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    assert_all_rounded(loads(tmp_path / "merged").state_dict(), merged.state_dict())
    assert {path.name for path in tmp_path.glob("adapter-*")} == {
        "adapter-step-3",
        "adapter-step-6",
    }


def test_a_pair_leaves_policies_that_load(tmp_path: Path) -> None:
    said = run("ppo_policy_value.py", tmp_path)

    assert "the same bytes" in said
    first, last = (loads(tmp_path / f"policy-round-{number}").state_dict() for number in (1, 3))
    assert any(not torch.equal(first[name], last[name]) for name in first)
