"""Children end: at a limit of time, of processor time or of memory that their parent sets."""

from __future__ import annotations

import subprocess

import pytest

from ckpt_tools.errors import UsageError
from ckpt_tools.hub import reference
from ckpt_tools.hub.reference import process
from tests.support.verification.directories import answer_here

CHILD = "tests.support.hungry_child"


@pytest.mark.slow
def test_a_child_that_waits_is_killed_with_what_it_started() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        process.run_child(CHILD, "wait", timeout=1)


@pytest.mark.slow
def test_a_child_that_takes_memory_is_refused_it() -> None:
    done = process.run_child(CHILD, "take", timeout=60, memory=1 << 28)

    assert done.returncode == 1
    assert process.failure_of(done) == "MemoryError"


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layer": 10**9}},
        {"num_local_experts": 10**7},
    ],
)
def test_a_config_that_asks_for_endless_layers_is_refused(config: dict[str, object]) -> None:
    whole = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}

    with pytest.raises(UsageError, match="no model has more than 10,000"):
        reference.start(whole)


def test_a_model_of_many_more_modules_than_tensors_is_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers can be in any key of a config, such as the depths of a Swin model."""
    answer_here(monkeypatch)
    monkeypatch.setattr(reference, "_MOST_MODULES", 300)
    sizes = {"embed_dim": 8, "num_heads": [1, 1, 1, 1], "depths": [10, 10, 10, 10]}
    config = {"model_type": "swin", "architectures": ["SwinForImageClassification"], **sizes}

    with pytest.raises(UsageError, match="of more than 304 modules"):
        reference.describe(config, tensors=38)

    assert reference.describe(config, tensors=2_000) is not None
