"""Every shipped state of Accelerate, FSDP, torch DCP, OLMo-core, verl and the Trainer, by one function.

Whatever the format, `consolidate` is called the same way and gives what the live model held, and
`inspect` says what lies there. The truth was read from the training process; see fixtures/README.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ckpt_tools import consolidate, inspect
from tests.conftest import FIXTURES
from tests.conversion.test_end_to_end import (
    Case,
    State,
    different,
    loads_as_the_live_model,
    saved_by_transformers,
    written,
)
from tests.support.sampled import sampled

KINDS = ("accelerate", "dcp", "rank_files", "trainer")
# Which of several in one directory, and where the truth of each lies.
SEVERAL: dict[str, list[tuple[dict[str, Any], str]]] = {
    "automatic-naming": [
        ({"tag": "checkpoint_0"}, "truth-checkpoint_0"),
        ({"tag": "checkpoint_1"}, "truth"),
    ],
    "deepspeed-two-models-2ranks": [
        ({"model": 0}, "truth"),
        ({"model": 1}, "truth-pytorch_model_1"),
    ],
    "plain-two-models": [({"model": 0}, "truth"), ({"model": 1}, "truth-model_1")],
    "torchtitan-2ranks": [({"tag": "step-1"}, "truth-step-1"), ({"tag": "step-2"}, "truth")],
}
# These FSDP1 LOCAL files hold no names, and this directory of the Trainer's no model but an adapter.
REFUSED = {"flat-param-nameless-2ranks", "trainer-lora"}
# FSDP1 LOCAL files hold the names and no shapes; these come from the config.
SHAPELESS = {"flat-param-2ranks", "fsdp1-local-2ranks"}
# What facts.json calls a format, and what `inspect` does.
FORMATS = {
    "accelerate": "accelerate",
    "accelerate-deepspeed": "deepspeed",
    "accelerate-fsdp-local": "rank-files",
    "accelerate-rank-files": "rank-files",
    "dcp": "torch-dcp",
    "dcp-hf": "torch-dcp-huggingface",
    "dcp-rank-metadata": "torch-dcp",
    "olmo-core": "olmo-core",
    "rank-files": "rank-files",
    "safetensors": "huggingface",
    "torchtitan": "torch-dcp",
    "verl": "rank-files",
}
# Of the Trainer's and of Accelerate's FSDP directories it depends on what was asked of them.
FORMAT_OF = {
    "fsdp1-full-2ranks": "accelerate",
    "fsdp1-sharded-2ranks": "torch-dcp",
    "fsdp2-full-2ranks": "accelerate",
    "fsdp2-lora-2ranks": "torch-dcp",
    "fsdp2-sharded-3ranks": "torch-dcp",
    "fsdp2-tied-2ranks": "torch-dcp",
    "trainer-fsdp1-2ranks": "torch-dcp",
    "trainer-fsdp2-2ranks": "torch-dcp",
    "trainer-plain": "huggingface",
    "trainer-zero2-llama": "deepspeed",
    "trainer-zero3-olmo2": "deepspeed",
}
# What wrote the files, as far as they record it. torch numbers its checkpoint formats, not itself.
FRAMEWORKS = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed 0.19.8",
    "olmo-core": "ai2-olmo-core 3.0.0",
    "torch-dcp": "torch.distributed.checkpoint 1.0.0",
    "torch-dcp-huggingface": "torch.distributed.checkpoint 1.0",
}
FRAMEWORK_OF = {
    "flat-param-2ranks": "torch",
    "olmo-core-hybrid": "ai2-olmo-core",
    "olmo-core-model-only": "ai2-olmo-core",
    "save-model-sharded": None,
    "trainer-plain": "transformers 5.23.0",
}


@dataclass(frozen=True)
class StateCase(Case):
    """A shipped state.

    Attributes:
        choice: which of several, as arguments of `consolidate` and `inspect`.
        truth: directory of what the live model held.
    """

    choice: tuple[tuple[str, Any], ...] = ()
    truth: str = "truth"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        saved = sorted(self.path.glob("checkpoint*"))
        assert len(saved) == 1
        return saved[0]

    @property
    def hf(self) -> Path:
        """Where the config is; the Trainer saves it itself."""
        return next(path for path in (self.path / "hf", self.checkpoint) if path.exists())

    @property
    def is_whole_model(self) -> bool:
        """Whether the state is, under its own names, the model that the config describes."""
        config, adapter = (self.hf / f"{kind}config.json" for kind in ("", "adapter_"))
        own = self.name != "torchtitan-2ranks" and ("model", 1) not in self.choice
        return config.exists() and not adapter.exists() and own

    @property
    def step(self) -> int | None:
        """Of the older of two."""
        number = str(dict(self.choice).get("tag", "")).rpartition("-")[2]
        return int(number) if number.isdigit() else None

    def model(self) -> State:
        """The live state, every name of a tied tensor in it."""
        hub = self.path / self.truth / "hf.safetensors"
        if hub.exists() and self.is_whole_model:
            return load_file(hub)
        state = load_file(self.path / self.truth / "model.safetensors")
        if self.name == "hf-storage-awkward-2ranks":
            # Live it is (3, 0). Each rank wrote (0, 0), the last as of row 2, and there is no more to it.
            state["empty.bias"] = state["empty.bias"][:2]
        return state


def expanded(path: Path) -> list[StateCase]:
    choices = SEVERAL.get(path.name, [({}, "truth")])
    return [StateCase(path, tuple(choice.items()), truth) for choice, truth in choices]


def label(case: StateCase) -> str:
    return "-".join([case.name, *(str(value) for _, value in case.choice)])


def each(cases: list[Any], slow: tuple[StateCase, ...] = ()) -> Any:
    assert cases
    marked = [pytest.param(c, marks=pytest.mark.slow) if c in slow else c for c in cases]
    return pytest.mark.parametrize("case", marked, ids=label)


FOUND = [path.parent for kind in KINDS for path in sorted(FIXTURES.glob(f"{kind}/*/facts.json"))]
STATES = [case for path in FOUND if path.name not in REFUSED for case in expanded(path)]
MODELS = [case for case in STATES if case.is_whole_model]


def unusual(cases: list[StateCase]) -> tuple[StateCase, ...]:
    """Those without the config that most have: the layout of each is asked for once, in seconds."""
    configs = {case: (case.hf / "config.json").read_text() for case in cases}
    usual = Counter(configs.values()).most_common(1)[0][0]
    return tuple(case for case, config in configs.items() if config != usual)


def test_every_shipped_state_is_among_them() -> None:
    assert {path.name for path in FOUND} >= REFUSED
    assert {case.name for case in STATES} == {path.name for path in FOUND} - REFUSED
    assert len(STATES) >= 60
    assert len(MODELS) >= 45


@each(sampled(STATES))
def test_the_weights_are_those_of_the_live_model(tmp_path: Path, case: StateCase) -> None:
    if case.name in SHAPELESS:
        consolidate(case.checkpoint, tmp_path / "out", config=case.hf)
    else:
        consolidate(case.checkpoint, tmp_path / "out", weights_only=True, **dict(case.choice))

    found = written(tmp_path / "out")
    # Some formats keep the second name of a tied tensor as a tensor of its own, and others drop it.
    dropped = case.facts["tied"].keys() - found.keys()
    live = {name: tensor for name, tensor in case.model().items() if name not in dropped}
    assert different(found, live) == []


@each(MODELS, slow=unusual(MODELS))
def test_the_directory_is_what_save_pretrained_writes_of_the_live_model(
    tmp_path: Path, case: StateCase
) -> None:
    """And transformers loads it with no key amiss, to the live model's logits."""
    consolidate(case.checkpoint, tmp_path / "out", config=case.hf, **dict(case.choice))

    theirs = saved_by_transformers(case, case.model(), tmp_path / "theirs")
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (theirs / "model.safetensors").read_bytes()
    assert loads_as_the_live_model(tmp_path / "out", case)


@each(STATES)
def test_inspect_names_format_framework_and_ranks(case: StateCase) -> None:
    found = inspect(case.checkpoint, **dict(case.choice))

    kind = FORMAT_OF.get(case.name) or FORMATS[case.facts["format"]]
    assert found.format == kind
    written_by = FRAMEWORKS.get(kind, "accelerate" if "accelerate" in case.path.parts else "verl")
    assert found.framework == FRAMEWORK_OF.get(case.name, written_by)
    name, _, version = str(found.framework).partition(" ")
    if version and name == case.facts.get("framework"):
        assert version == case.facts["framework_version"]
    ranks = None if case.name == "save-model-sharded" else case.facts["world_size"]
    assert found.world_size == ranks
    assert found.step in (None, case.facts["step"], case.step)
    assert found.problems == ()
