"""Tensors, config and the model that it describes: what does not fit is found, what does is clean."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckpt_tools import consolidate
from ckpt_tools.errors import CkptError
from ckpt_tools.hub import reference
from ckpt_tools.verification import Verdict, verify
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    SINGLE,
    Damage,
    also,
    answer_here,
    change_tensor,
    copy_of,
    edit_json,
    edit_state,
    kinds,
    load,
    rename,
    save,
    save_gpt2,
    save_llama,
    save_mixture,
    save_tied,
    save_translator,
    save_vision,
    store,
)
from tests.transforms.test_hub_layout import ARCHITECTURES

CONFIG = "config.json"
NORM = "model.layers.1.post_attention_layernorm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(**changes: Any) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_json(directory / CONFIG, lambda data: data.update(changes))
        return CONFIG

    return do


def without(key: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_json(directory / CONFIG, lambda data: data.pop(key))
        return CONFIG

    return do


def remove_the_config(directory: Path) -> str:
    (directory / CONFIG).unlink()
    return CONFIG


def cut_the_config(directory: Path) -> str:
    (directory / CONFIG).write_text((directory / CONFIG).read_text()[:-3])
    return CONFIG


def put_deepspeeds_config(directory: Path) -> str:
    (directory / CONFIG).write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return CONFIG


def swap_the_head(directory: Path) -> str:
    rename(directory, lambda name: name.replace("lm_head", "score"))
    return CONFIG


def custom_code_with_too_large_a_vocabulary(directory: Path) -> str:
    edit_json(
        directory / CONFIG,
        lambda data: data.update(
            architectures=["OurModel"], auto_map={"AutoModel": "our.OurModel"}, vocab_size=97
        ),
    )
    return CONFIG


def prefixed(prefix: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        rename(directory, lambda name: prefix + name)
        return f"{prefix}{HEAD}"

    return do


def compile_one_layer(directory: Path) -> str:
    rename(directory, lambda name: name.replace("layers.1.", "layers.1._orig_mod."))
    return "model.layers.1._orig_mod.input_layernorm.weight"


def leave_the_adapted_model(directory: Path) -> None:
    """The state of a PEFT model, as the trainer's ``save_state`` writes it."""

    def adapt(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            module = name.removesuffix(".weight")
            if module.endswith("q_proj"):
                state[f"base_model.model.{module}.base_layer.weight"] = state.pop(name)
                state[f"base_model.model.{module}.lora_A.default.weight"] = torch.ones(2, 32)
                state[f"base_model.model.{module}.lora_B.default.weight"] = torch.ones(32, 2)
            else:
                state[f"base_model.model.{name}"] = state.pop(name)

    edit_state(directory / SINGLE, adapt)


def leave_adapter_tensors(directory: Path) -> str:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_state(directory / SINGLE, lambda state: state.update({name: torch.ones(2, 32)}))
    return name


def put_another_models_config(directory: Path) -> None:
    data = dict(
        ARCHITECTURES["BertForMaskedLM"], model_type="bert", architectures=["BertForMaskedLM"]
    )
    (directory / CONFIG).write_text(json.dumps(data))


def save_without_head(directory: Path) -> None:
    """As the hub's own ``gpt2`` is."""
    rename(directory, lambda name: name.removeprefix("transformer."))


def save_as_in_memory(directory: Path) -> None:
    """What ``torch.save(model.state_dict())`` and its like leave: transformers 5's own names."""
    data = json.loads((directory / CONFIG).read_text())
    model_class = getattr(transformers, data["architectures"][0])
    state = model_class.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
    store(state, directory / SINGLE)


def remove(name: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_state(directory / SINGLE, lambda state: state.pop(name))
        return name

    return do


def add(name: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        tensor = torch.ones(4, dtype=torch.bfloat16)
        edit_state(directory / SINGLE, lambda state: state.update({name: tensor}))
        return name

    return do


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        change_tensor(directory, name, to)
        return name

    return do


def write_the_other_name(directory: Path) -> str:
    edit_state(directory / SINGLE, lambda state: state.update({HEAD: state.pop(EMBEDDING)}))
    return EMBEDDING


def write_both_names(directory: Path) -> str:
    edit_state(directory / SINGLE, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    return HEAD


DAMAGES = [
    Damage("config-missing", remove_the_config, save_llama),
    Damage("config-invalid", cut_the_config, save_llama),
    Damage("config-invalid", put_deepspeeds_config, save_llama),
    Damage("config-invalid", without("model_type"), save_llama),
    Damage("config-invalid", config(architectures="Llama"), save_llama, also("config-architecture")),
    Damage("config-invalid", config(dtype="float17"), save_llama),
    Damage("config-invalid", config(hidden_size="large"), save_llama),
    Damage("config-architecture", without("architectures"), save_llama, severity="warning"),
    Damage("config-architecture", swap_the_head, save_llama, also("tensor-missing", "tensor-unexpected")),
    Damage("config-dtype", config(dtype="float32"), save_llama),
    Damage("config-dtype", config(torch_dtype="float16", dtype=None), save_llama),
    Damage("config-vocabulary", config(vocab_size=100), save_llama),
    Damage("config-vocabulary", custom_code_with_too_large_a_vocabulary, save_llama),
    Damage("name-wrapped", prefixed("module."), save_llama),
    Damage("name-wrapped", prefixed("_fsdp_wrapped_module."), save_llama),
    Damage("name-wrapped", prefixed("policy."), save_llama),
    Damage("name-wrapped", lambda d: rename(d, lambda n: "actor." + n), save_tied),
    Damage("name-wrapped", compile_one_layer, save_llama),
    Damage("name-peft", leave_the_adapted_model, save_llama, also("name-lora", "dtype-mixed")),
    Damage("name-lora", leave_adapter_tensors, save_llama, also("dtype-mixed")),
    Damage("name-foreign", put_another_models_config, save_llama),
    Damage("name-headless", save_without_head, save_gpt2),
    Damage("name-in-memory", save_as_in_memory, save_mixture),
    Damage("name-in-memory", save_as_in_memory, save_vision, severity="warning"),
    Damage("tensor-missing", remove(NORM), save_llama),
    Damage("tensor-missing", remove(HEAD), save_llama),
    Damage("tensor-missing", remove("model.layers.0.block_sparse_moe.experts.2.w1.weight"), save_mixture),
    Damage("tensor-unexpected", add("model.layers.2.mlp.up_proj.weight"), save_llama),
    Damage("tensor-unexpected", add("module.up_proj.weight"), save_llama),
    Damage(
        "tensor-unexpected",
        add("model.layers.0.self_attn.rotary_emb.inv_freq"),
        save_llama,
        severity="warning",
    ),
    Damage("shape-mismatch", change("model.layers.0.mlp.up_proj.weight", lambda t: t.T), save_llama),
    Damage("shape-mismatch", change(NORM, lambda t: t[:-1]), save_llama),
    Damage("dtype-integer", change(NORM, lambda t: t.view(torch.int16)), save_llama),
    Damage("tie-missing", remove(EMBEDDING), save_tied),
    Damage("tie-other-name", write_the_other_name, save_tied),
    Damage("tie-written-twice", write_both_names, save_tied),
    Damage("dtype-mixed", change(NORM, lambda t: t.float()), save_llama),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found_and_called_what_it_is(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch)


def test_each_missing_tensor_is_named_and_one_wrapper_is_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    gone = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    edit_state(directory / SINGLE, lambda state: [state.pop(name) for name in gone])
    rename(directory, lambda name: "module." + name)

    found = verify(directory)

    assert [(p.kind, p.tensor) for p in found.problems] == [
        *(("tensor-missing", name) for name in gone),
        ("name-wrapped", "module.lm_head.weight"),
    ]


def test_fused_experts_say_what_a_directory_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_mixture, tmp_path / "model")
    save_as_in_memory(directory)

    problems = {p.tensor: p for p in verify(directory).problems}

    fused = problems["model.layers.0.mlp.experts.gate_up_proj"]
    assert "block_sparse_moe.experts.0.w1.weight" in fused.detail
    assert fused.severity == "error" and fused.hint is not None and "vLLM" in fused.hint


def test_custom_code_is_not_run_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    config(architectures=["OurModel"], auto_map={"AutoModel": "our.OurModel"})(directory)

    found = verify(directory)

    assert not found.problems
    assert any("custom code" in reason and "OurModel" in reason for reason in found.skipped)


def test_an_unreadable_file_is_one_problem_and_not_one_for_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    (directory / SINGLE).write_bytes(b"x" * 100)

    found = verify(directory)

    assert kinds(found) == {"header-invalid"}
    assert any(SINGLE in reason for reason in found.skipped)


def test_quantized_weights_are_left_to_the_quantizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_llama, tmp_path / "model")
    config(quantization_config={"quant_method": "gptq", "bits": 4})(directory)
    name = "model.layers.0.mlp.up_proj"

    def quantize(state: dict[str, torch.Tensor]) -> None:
        del state[f"{name}.weight"]
        state[f"{name}.qweight"] = torch.ones(4, 48, dtype=torch.int32)
        state[f"{name}.scales"] = torch.ones(1, 48, dtype=torch.float16)

    edit_state(directory / SINGLE, quantize)

    found = verify(directory)

    assert not found.problems
    assert any("quantizers" in reason for reason in found.skipped)


def test_a_model_that_transformers_cannot_tell_of_is_skipped_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*question: object) -> None:
        raise CkptError("transformers failed to describe the model: out of luck")

    answer_here(monkeypatch)
    monkeypatch.setattr(reference, "ask", fail)
    monkeypatch.setattr(reference, "_answers", {})
    directory = copy_of(save_llama, tmp_path / "model")

    found = verify(directory)

    assert not found.problems
    assert any("out of luck" in reason for reason in found.skipped)


def test_names_of_older_versions_that_transformers_still_reads_are_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = save(tmp_path / "model", "BertForMaskedLM")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename(
        directory,
        lambda name: next((name.replace(a, b) for a, b in old.items() if a in name), name),
    )

    must_be_clean(verify(directory, read_data=True))


def test_a_buffer_that_transformers_does_without_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(save_translator, tmp_path / "model")
    remove("final_logits_bias")(directory)

    must_be_clean(verify(directory, read_data=True))


JUDGED = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM tied", "T5ForConditionalGeneration"),
    *("MixtralForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "LlavaForConditionalGeneration"),
)


@pytest.mark.slow
@pytest.mark.parametrize("title", JUDGED)
def test_what_transformers_reports_when_it_loads_is_an_error_here(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random edits of random tensors; transformers' own account of what it loaded is the judge."""
    answer_here(monkeypatch)
    directory = save(tmp_path / "model", title)
    model_class = getattr(transformers, title.split()[0])
    whole = load(directory / SINGLE)
    draw = random.Random(0)
    edits: list[Callable[[dict[str, torch.Tensor], str], object]] = [
        lambda state, name: state.pop(name),
        lambda state, name: state.update({f"{name}_copy": state.pop(name)}),
        lambda state, name: state.update({name.replace(".", ".extra.", 1): state[name].clone()}),
        lambda state, name: state.update({name: torch.cat([state[name], state[name]])}),
    ]
    reported = 0
    for number in range(16):
        state = dict(whole)
        edits[number % 4](state, draw.choice(sorted(whole)))
        store(state, directory / SINGLE)
        if complaint := loading_complains(model_class, directory):
            reported += 1
            assert verify(directory).errors, complaint
    assert reported > 10


def loading_complains(model_class: Any, directory: Path) -> object:
    try:
        _, info = model_class.from_pretrained(
            directory, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RuntimeError as error:
        return error
    return {key: names for key, names in info.items() if names}


# -- what is good ------------------------------------------------------------------------------------

QUICK = (
    *("LlamaForCausalLM tied", "Olmo2ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"),
    *("MixtralForCausalLM", "OlmoeForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"),
)


def must_be_clean(found: Verdict, allowed: frozenset[str] = frozenset()) -> None:
    assert [p for p in found.problems if p.kind not in allowed] == []
    assert found.tensors and found.nbytes
    assert not any("against the model" in reason for reason in found.skipped), found.skipped


@pytest.mark.parametrize(
    "title",
    [*QUICK, *(pytest.param(t, marks=pytest.mark.slow) for t in ARCHITECTURES if t not in QUICK)],
)
def test_what_save_pretrained_writes_is_clean(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    if not hasattr(transformers, title.split()[0]):
        pytest.skip("this transformers does not have the class")
    shard = 20_000 if title in QUICK else None

    must_be_clean(verify(save(tmp_path / "model", title, shard=shard), read_data=True))


@pytest.mark.parametrize(
    "title", ["LlamaForCausalLM", "Gemma2ForCausalLM", "T5ForConditionalGeneration"]
)
def test_a_model_that_was_never_trained_is_clean(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of ones, of zeros in Gemma, and biases of zeros belong where they are."""
    answer_here(monkeypatch)
    model_class = getattr(transformers, title)
    model_class(model_class.config_class(**ARCHITECTURES[title])).save_pretrained(
        tmp_path / "model"
    )

    must_be_clean(verify(tmp_path / "model", read_data=True))


@pytest.mark.slow
def test_one_answer_of_the_child_process_itself(tmp_path: Path) -> None:
    """With nothing replaced: a process of its own for the model, another for the tokenizer."""
    directory = copy_of(save_tied, tmp_path / "model")

    found = verify(directory, read_data=True)

    must_be_clean(found)
    assert "names and shapes of Qwen3ForCausalLM (24 tensors)" in found.checked


# Adapters, several models in one checkpoint or directory, and those that are refused.
NO_MODELS = ("lora", "two-models", "policy-value", "frozen-excluded", "automatic-naming")
REFUSED = ("torchtitan-2ranks", "flat-param-nameless-2ranks")
PLAIN = [
    path.parent
    for kind in ("zero", "dcp", "rank_files", "accelerate")
    for path in sorted(FIXTURES.glob(f"{kind}/*/hf/config.json"))
    if path.parts[-3] not in REFUSED and not any(name in path.parts[-3] for name in NO_MODELS)
]


@pytest.mark.slow
@pytest.mark.parametrize("hf", PLAIN, ids=lambda hf: hf.parent.name)
def test_what_consolidate_writes_of_every_fixture_is_clean(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    consolidate(hf.parent / "checkpoint", tmp_path / "out", config=hf, generation_config="none")

    must_be_clean(verify(tmp_path / "out", read_data=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "merged", sorted(FIXTURES.glob("peft/*/truth/merged")), ids=lambda p: p.parts[-3]
)
def test_what_peft_merged_is_clean(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    must_be_clean(verify(merged, read_data=True))


@pytest.mark.slow
def test_custom_code_is_run_in_a_process_of_its_own_when_it_is_trusted(tmp_path: Path) -> None:
    directory = copy_of(save_llama, tmp_path / "model")
    (directory / "ours.py").write_text(
        "import sys\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OurConfig(LlamaConfig):\n"
        "    model_type = 'ours'\n"
        "class OurModel(LlamaForCausalLM):\n"
        "    config_class = OurConfig\n"
    )
    places = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
    config(model_type="ours", architectures=["OurModel"], auto_map=places)(directory)
    remove(NORM)(directory)

    found = verify(directory, trust_remote_code=True)

    assert [(p.kind, p.tensor) for p in found.problems] == [("tensor-missing", NORM)]
    assert not any("ours" in name for name in sys.modules)
