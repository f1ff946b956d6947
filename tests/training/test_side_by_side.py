"""A save equals open-instruct's of the same step, but for the files and keys that docs/training.md names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.support.outputs import contents
from tests.support.ranks.launching import ended, start
from tests.support.training.frameworks import ENVIRONMENT

CASES = [
    "zero2:olmo2:model",
    "zero2:olmo3:lora",
    "zero2:olmo3:policy",
    "zero3:olmo3:model",
    "zero3:olmo2:lora",
    "zero3:olmo2:policy",
    "fsdp1:olmo2:model",
    "fsdp1:olmo2:lora",
    "fsdp1:olmo3:policy",
    "fsdp2:olmo3:model",
    "fsdp2:olmo3:lora",
    "fsdp2:olmo2:policy",
]
ADAPTER = "adapter_model.safetensors"
# What transformers derives from the config where nobody chose a generation config: the engine of DeepSpeed
# took the one that open-instruct sets, and the model inside keeps its own.
DERIVED = {
    "_from_model_config": True,
    "eos_token_id": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "pad_token_id": 1,
    "use_cache": True,
}
# <|im_end|> and <|endoftext|>, of the tokenizer of the fixtures.
# FSDP2 changes the class of the model itself, so the generation config that open-instruct sets is saved.
CHOSEN = {"eos_token_id": [3, 0]}
OURS = {"eos_token_id": [3, 0], "pad_token_id": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained and saved in one torchrun."""
    out = tmp_path_factory.mktemp("side-by-side")
    command = ["-m", "tests.support.training.side_by_side", str(out), *CASES]
    run = ended(start(command, ranks=2, environment=ENVIRONMENT))
    assert run.status == 0, run.said
    return out


@pytest.mark.slow
def test_only_the_named_files_and_keys_differ(saved: Path) -> None:
    for case in CASES:
        home = saved / case.replace(":", "-")
        ours, theirs = contents(home / "ours"), contents(home / "theirs")
        del ours["ckpt_tools_manifest.json"]
        if case.endswith(":lora"):
            del theirs["README.md"]
            live = torch.load(home / "live.pt", weights_only=True)
            saved_by_us = load(ours[ADAPTER])
            assert {*saved_by_us} == {name.replace(".default", "") for name in live}, case
            for name, tensor in live.items():
                assert torch.equal(saved_by_us[name.replace(".default", "")], tensor), (case, name)
            if case.startswith("fsdp1:"):
                # PEFT looks for the names of the wrapped modules, which the gathered state does not have.
                assert load(theirs.pop(ADAPTER)) == {}
                del ours[ADAPTER]
        else:
            del ours["README.md"]
            generation = [
                json.loads(files.pop("generation_config.json")) for files in (ours, theirs)
            ]
            expected = CHOSEN if case == "fsdp2:olmo3:model" else DERIVED
            assert [values(each) for each in generation] == [OURS, expected], case
        assert ours == theirs, case


def values(generation: dict[str, Any]) -> dict[str, Any]:
    """A generation config without the version of its writer."""
    return {key: value for key, value in generation.items() if key != "transformers_version"}
