"""Every real checkpoint becomes what its live engine held, and transformers loads it as it was.

The truth was read from the training process; see fixtures/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import consolidate
from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.tensors.dtypes import BY_SHORT_NAME
from tests.conftest import FIXTURES
from tests.support.models import live_model, loaded, of_config, same_logits
from tests.support.sampled import sampled

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A shipped checkpoint and what is known of it."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = json.loads((self.path / "facts.json").read_text())
        assert isinstance(facts, dict)
        return facts

    @property
    def is_whole_model(self) -> bool:
        """Whether the checkpoint as a whole is the model that ``hf/`` describes."""
        if not (self.hf / "config.json").exists() or (self.hf / "adapter_config.json").exists():
            return False
        return self.facts["hf_prefix"] in ("", "module.", "_orig_mod.")

    def masters(self) -> State:
        return load_file(self.path / "truth" / "masters.safetensors")

    def model(self) -> State:
        return load_file(self.path / "truth" / "model.safetensors")

    def named(self, state: State) -> State:
        """The state under the names that the model itself gives."""
        prefix = self.facts["hf_prefix"] if self.is_whole_model else ""
        assert all(name.startswith(prefix) for name in state)
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    @property
    def lost(self) -> list[str]:
        """Frozen parameters that are in no file: left out on request, or by an old ZeRO-3 always."""
        if self.facts["frozen_excluded"] or "frozen weights are in no file" in self.facts["note"]:
            return list(self.facts["frozen"])
        return []

    def held(self, state: State) -> State:
        """What of the state the checkpoint holds."""
        return {name: tensor for name, tensor in state.items() if name not in self.lost}


CASES = [Case(path.parent) for path in sorted(FIXTURES.glob("zero/*/facts.json"))]
MODELS = [case for case in CASES if case.is_whole_model]
WHOLE = [case for case in MODELS if not case.facts["frozen_excluded"]]
EXCLUDED = [case for case in MODELS if case.facts["frozen_excluded"]]


def one_of_each_kind() -> list[Case]:
    """Of what is alike in its stage, optimizer, dtypes, ties and losses, the first."""
    kinds: dict[tuple[object, ...], Case] = {}
    for case in CASES:
        facts = case.facts
        told = (facts[key] for key in ("stage", "optimizer_wrapper", "dtype", "master_dtype"))
        kinds.setdefault((*told, bool(facts["tied"]), bool(case.lost)), case)
    return list(kinds.values())


def every(cases: list[Any]) -> Any:
    assert cases
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.path.name)


def written(directory: Path) -> State:
    """Every tensor of an output, and every name once."""
    state: State = {}
    for path in directory.glob("*.safetensors"):
        part = load_file(path)
        assert not part.keys() & state.keys()
        state |= part
    return state


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def different(found: State, expected: State) -> list[str]:
    """The names under which two states differ in a name, dtype, shape or bit."""
    return sorted(found.keys() ^ expected.keys()) + [
        name
        for name in found.keys() & expected.keys()
        if found[name].dtype != expected[name].dtype
        or found[name].shape != expected[name].shape
        or not torch.equal(bits(found[name]), bits(expected[name]))
    ]


def once(case: Case, state: State) -> State:
    """The state with tied tensors under their first name alone, as training frameworks list them."""
    tied: Mapping[str, str] = case.facts["tied"]
    return {name: tensor for name, tensor in state.items() if name not in tied}


def cast(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def test_the_fixtures_cover_what_the_readme_promises() -> None:
    facts = [case.facts for case in CASES]
    assert {fact["stage"] for fact in facts} == {0, 1, 2, 3}
    assert {fact["dtype"] for fact in facts} >= {"bfloat16", "float16", "float32"}
    wrappers = {fact["optimizer_wrapper"] for fact in facts}
    assert {"BF16_Optimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"} <= wrappers
    architectures = {
        json.loads((case.hf / "config.json").read_text())["model_type"] for case in MODELS
    }
    assert architectures >= {"olmo2", "olmo3", "llama", "qwen3", "gpt2", "t5"}
    assert len(WHOLE) >= 40
    assert len(EXCLUDED) >= 3


# Masters and 16-bit copies of all checkpoints are proven by the readers' contract.
KINDS = one_of_each_kind()


@pytest.mark.slow
@every(KINDS)
def test_fp32_output_is_the_live_masters(tmp_path: Path, case: Case) -> None:
    """Trained parameters from the optimizer, frozen ones and buffers from the model, all as fp32."""
    consolidate(case.checkpoint, tmp_path / "out", dtype="fp32", weights_only=True)

    expected = case.held(once(case, case.model()) | case.masters())
    assert different(written(tmp_path / "out"), case.named(cast(expected, torch.float32))) == []


@every(sampled(KINDS))
def test_kept_output_is_the_live_masters_in_their_own_dtypes(tmp_path: Path, case: Case) -> None:
    consolidate(case.checkpoint, tmp_path / "out", dtype="keep", weights_only=True)

    expected = case.held(once(case, case.model()) | case.masters())
    assert different(written(tmp_path / "out"), case.named(expected)) == []


@every(sampled(CASES))
def test_auto_output_is_the_live_weights_and_the_input_is_as_it_was(
    tmp_path: Path, case: Case
) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {
            path: (path.stat().st_size, path.stat().st_mtime_ns) for path in case.path.rglob("*")
        }

    before = state()
    consolidate(case.checkpoint, tmp_path / "out", weights_only=True)

    expected = case.held(once(case, case.model()))
    assert different(written(tmp_path / "out"), case.named(expected)) == []
    assert state() == before


@every(KINDS)
def test_the_16_bit_copy_is_the_live_weights_or_is_said_to_be_missing(
    tmp_path: Path, case: Case
) -> None:
    """ZeRO-3 keeps no such copy of what it trains."""

    def convert() -> None:
        consolidate(
            case.checkpoint, tmp_path / "out", weights="model", dtype="keep", weights_only=True
        )

    if case.facts["stage"] == 3:
        with pytest.raises(UsageError, match="no 16-bit weights are kept") as caught:
            convert()
        assert "--weights master" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
        return
    convert()
    expected = case.held(once(case, case.model()))
    assert different(written(tmp_path / "out"), case.named(expected)) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@every([case for case in CASES if case.path.name.endswith(("buffers-5ranks", "router-2ranks"))])
def test_only_floating_tensors_are_cast(tmp_path: Path, case: Case, dtype: Any) -> None:
    consolidate(case.checkpoint, tmp_path / "out", dtype=dtype, weights_only=True)

    expected = once(case, case.model()) | case.masters()
    wanted = BY_SHORT_NAME[dtype].torch
    assert different(written(tmp_path / "out"), case.named(cast(expected, wanted))) == []


def test_the_older_of_two_saves_is_found_by_its_tag(tmp_path: Path) -> None:
    cases = [case for case in CASES if len(case.facts["tags"]) > 1]
    assert cases
    for case in cases:
        for truth in case.path.glob("truth-*"):
            tag = truth.name.removeprefix("truth-")
            out = tmp_path / case.path.name / tag
            consolidate(case.checkpoint, out, tag=tag, dtype="fp32", weights_only=True)
            masters = load_file(truth / "masters.safetensors")
            assert different(written(out), case.named(cast(masters, torch.float32))) == []
            assert different(masters, case.masters()) != []


def saved_by_transformers(case: Case, state: State, directory: Path, **options: Any) -> Path:
    """What ``save_pretrained`` writes of the live model: a model of the config with the live weights."""
    model = of_config(case.hf)
    model.to(next(tensor.dtype for tensor in state.values() if tensor.is_floating_point()))
    if not state.keys() <= model.state_dict().keys():
        # Of another framework's own converter, under names of the hub: transformers loads them.
        state = live_model(case.hf, state).state_dict()
    model.load_state_dict(state, strict=True)
    model.save_pretrained(directory, **options)
    return directory


def loads_as_the_live_model(out: Path, case: Case) -> bool:
    """Whether transformers reads a directory with no key amiss, and it then gives the live model's logits."""
    return same_logits(loaded(out), live_model(case.hf, case.named(case.model())))


@pytest.mark.slow
@every(WHOLE)
def test_transformers_loads_the_live_model(tmp_path: Path, case: Case) -> None:
    """The same file that save_pretrained writes, no key amiss, and the live engine's logits."""
    consolidate(case.checkpoint, tmp_path / "out", config=case.hf, check_all_masters=True)

    theirs = saved_by_transformers(case, case.named(case.model()), tmp_path / "theirs")
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (theirs / "model.safetensors").read_bytes()
    assert loads_as_the_live_model(tmp_path / "out", case)


WRONG_ROPE = {"rope_theta": 510_000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": WRONG_ROPE},
        {"rms_norm_eps": 1.1e-5},
        {"hidden_act": "gelu_new"},
        {"sliding_window": 5},
        {"tie_word_embeddings": True},
        {},
    ],
    ids=lambda changes: next(iter(changes), "a-bit-of-a-weight"),
)
def test_logits_tell_a_wrong_directory(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The comparison that the test above rests on: a config or a weight that is slightly wrong fails it."""
    case = Case(FIXTURES / "zero" / "zero3-bf16-olmo3-2ranks")
    out = tmp_path / "out"
    consolidate(case.checkpoint, out, config=case.hf)
    assert loads_as_the_live_model(out, case)

    config = json.loads((out / "config.json").read_text())
    if "rope_parameters" in changes:
        changes = {"rope_parameters": dict.fromkeys(config["rope_parameters"], WRONG_ROPE)}
    (out / "config.json").write_text(json.dumps(config | changes))
    state = load_file(out / "model.safetensors")
    if not changes:
        state["model.layers.1.mlp.down_proj.weight"].view(torch.int16)[4, 7] ^= 1
    elif "tie_word_embeddings" in changes:
        del state["lm_head.weight"]
    save_file(state, out / "model.safetensors", {"format": "pt"})
    assert not loads_as_the_live_model(out, case)


@pytest.mark.slow
@every(WHOLE)
def test_the_config_that_is_written_is_that_of_the_live_model(tmp_path: Path, case: Case) -> None:
    consolidate(case.checkpoint, tmp_path / "out", config=case.hf)

    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((case.hf / "config.json").read_text())
    assert ours["dtype"] == case.facts["dtype"]
    assert {k: v for k, v in ours.items() if k != "dtype"} == {
        k: v for k, v in theirs.items() if k != "dtype"
    }


FP32 = ("zero2-bf16-llama-3ranks", "zero3-bf16-qwen3-tied-2ranks", "zero1-bf16-t5-2ranks")


@every([case for case in WHOLE if case.path.name in FP32])
def test_an_fp32_directory_is_the_masters_and_says_so(tmp_path: Path, case: Case) -> None:
    consolidate(case.checkpoint, tmp_path / "out", config=case.hf, dtype="fp32")

    masters = case.masters()
    masters |= {alias: masters[kept] for alias, kept in case.facts["tied"].items()}
    theirs = saved_by_transformers(case, case.named(masters), tmp_path / "theirs")
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (theirs / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in loaded(tmp_path / "out").parameters()} == {torch.float32}


@every([case for case in WHOLE if case.facts["tied"]])
def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path, case: Case) -> None:
    report = consolidate(case.checkpoint, tmp_path / "out", config=case.hf)

    names = written(tmp_path / "out").keys()
    (kept,) = set(case.facts["tied"].values())
    assert kept in names
    assert not names & case.facts["tied"].keys()
    assert [note for note in report.notes if "tied" in note]
    model = loaded(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["zero2-bf16-llama-3ranks", "zero3-bf16-olmo3-2ranks"])
def test_values_of_their_own_under_a_tie_of_the_config_are_both_written(
    tmp_path: Path, name: str
) -> None:
    """The run untied what its config ties."""
    case = Case(FIXTURES / "zero" / name)
    config = json.loads((case.hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    report = consolidate(case.checkpoint, tmp_path / "out", config=tmp_path / "config.json")

    assert different(written(tmp_path / "out"), case.model()) == []
    output = json.loads((tmp_path / "out" / "config.json").read_text())
    assert output["tie_word_embeddings"] is False
    assert [w for w in report.warnings if "lm_head.weight" in w and "values of its own" in w]
    assert loads_as_the_live_model(tmp_path / "out", case)


def test_a_tie_that_the_config_does_not_have_is_written_twice(tmp_path: Path) -> None:
    case = Case(FIXTURES / "zero" / "zero3-bf16-qwen3-tied-2ranks")
    config = json.loads((case.hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    consolidate(case.checkpoint, tmp_path / "out", config=tmp_path / "config.json")

    assert different(written(tmp_path / "out"), case.model()) == []
    assert loads_as_the_live_model(tmp_path / "out", case)


@every(EXCLUDED)
def test_frozen_tensors_that_were_left_out_are_named(tmp_path: Path, case: Case) -> None:
    with pytest.raises(DamagedCheckpoint) as caught:
        consolidate(case.checkpoint, tmp_path / "out", config=case.hf)

    assert set(caught.value.missing) == set(case.facts["frozen"])
    assert f"{len(case.facts['frozen'])} tensors" in caught.value.fact
    assert case.facts["frozen"][0] in caught.value.fact or caught.value.missing[0] in str(
        caught.value
    )
    assert "--like DIR" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@every(EXCLUDED)
def test_frozen_tensors_that_were_left_out_are_taken_from_the_base_model(
    tmp_path: Path, case: Case
) -> None:
    """In the base model the trained tensors have other values, which must not be taken."""
    base = {
        name: tensor if name in case.facts["frozen"] else torch.zeros_like(tensor)
        for name, tensor in case.model().items()
    }
    like = saved_by_transformers(case, base, tmp_path / "base")

    report = consolidate(case.checkpoint, tmp_path / "out", like=like)

    assert different(written(tmp_path / "out"), case.model()) == []
    assert [w for w in report.warnings if "taken from --like" in w and case.facts["frozen"][0] in w]
    assert loads_as_the_live_model(tmp_path / "out", case)


def test_like_does_not_fill_in_a_whole_other_model(tmp_path: Path) -> None:
    """The result would be the base, with the trained tensors beside it under names that nobody reads."""
    case = FIXTURES / "peft" / "zero3-olmo2-lora-frozen-excluded"
    state = load_file(case / "base" / "model.safetensors")
    headless = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    torch.save(headless, tmp_path / "pytorch_model.bin")

    with pytest.raises(UsageError, match="those of the checkpoint are called"):
        consolidate(tmp_path, tmp_path / "out", like=case / "base")
    with pytest.raises(UsageError, match="the checkpoint holds a LoRA adapter"):
        consolidate(case / "checkpoint", tmp_path / "out", like=case / "base")


def test_frozen_tensors_from_the_base_model_are_cast_like_the_others(tmp_path: Path) -> None:
    case = EXCLUDED[0]
    like = saved_by_transformers(case, case.model(), tmp_path / "base")

    consolidate(case.checkpoint, tmp_path / "out", like=like, dtype="fp32")

    expected = cast(case.model() | case.masters(), torch.float32)
    assert different(written(tmp_path / "out"), expected) == []


@every([case for case in CASES if case.lost and not case.facts["frozen_excluded"]])
def test_weights_alone_come_with_a_warning_that_names_what_is_not_there(
    tmp_path: Path, case: Case
) -> None:
    report = consolidate(case.checkpoint, tmp_path / "out", weights_only=True)

    said = " ".join(report.warnings)
    assert [name for name in case.lost[:4] if name not in said] == []


@every([case for case in CASES if (case.hf / "adapter_config.json").exists()])
def test_a_lora_checkpoint_is_no_model_by_itself(tmp_path: Path, case: Case) -> None:
    with pytest.raises(UsageError, match="LoRA") as caught:
        consolidate(case.checkpoint, tmp_path / "out", config=case.hf)

    assert "--weights-only" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_with_a_value_model_is_no_model_by_itself(tmp_path: Path) -> None:
    cases = [case for case in CASES if case.facts["hf_prefix"] == "policy."]
    assert cases
    for case in cases:
        with pytest.raises(UsageError) as caught:
            consolidate(case.checkpoint, tmp_path / "out", config=case.hf)
        assert "policy, value_model" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_shards_and_index_are_those_of_save_pretrained(tmp_path: Path) -> None:
    case = Case(FIXTURES / "zero" / "zero3-bf16-llama-7ranks")
    consolidate(case.checkpoint, tmp_path / "out", config=case.hf, max_shard_size=2_000, workers=3)

    theirs = saved_by_transformers(case, case.model(), tmp_path / "theirs", max_shard_size=2_000)
    names = {path.name for path in theirs.glob("model*")}
    assert len(names) > 3
    assert names == {path.name for path in (tmp_path / "out").glob("model*")}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (theirs / name).read_bytes(), name
    assert loads_as_the_live_model(tmp_path / "out", case)


CHAT = Case(FIXTURES / "zero" / "zero3-bf16-olmo2-chat-2ranks")


def test_a_chat_model_keeps_its_tokenizer_and_stops_where_turns_end(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    out = tmp_path / "out"
    consolidate(CHAT.checkpoint, out, config=CHAT.hf, tokenizer=CHAT.hf)

    copied = [
        p.name for p in CHAT.hf.iterdir() if p.name not in ("config.json", "generation_config.json")
    ]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(copied)
    for name in copied:
        assert (out / name).read_bytes() == (CHAT.hf / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    generation = GenerationConfig.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(generation.eos_token_id) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    model = loaded(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a checkpoint?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**prompt, max_new_tokens=8)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_two_conversions_give_the_same_directory(tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("two", 5)):
        consolidate(
            CHAT.checkpoint, tmp_path / out, config=CHAT.hf, tokenizer=CHAT.hf, workers=workers
        )

    one, two = ({p.name: p.read_bytes() for p in (tmp_path / o).iterdir()} for o in ("one", "two"))
    assert one == two


def test_a_comparison_sees_a_single_bit() -> None:
    """The comparison that all of the above rests on."""
    one = {"x": torch.tensor([1.0, -0.0]), "y": torch.tensor([float("nan")])}
    assert different(one, {name: tensor.clone() for name, tensor in one.items()}) == []
    assert different(one, one | {"x": torch.tensor([1.0, 0.0])}) == ["x"]
    assert different(one, {"x": one["x"]}) == ["y"]
    assert different(one, one | {"x": one["x"].view(2, 1)}) == ["x"]
    assert different(one, one | {"x": one["x"].view(torch.int32)}) == ["x"]


def test_the_output_can_be_read_again(tmp_path: Path) -> None:
    """A Hugging Face directory is a checkpoint too."""
    save_file(case_state := CHAT.model(), tmp_path / "model.safetensors", {"format": "pt"})

    consolidate(tmp_path, tmp_path / "out", weights_only=True, dtype="keep")

    assert different(written(tmp_path / "out"), case_state) == []
