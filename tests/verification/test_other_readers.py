"""verify --for: each rule finds what its reader's source refuses, and takes what the reader takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from ckpt_tools.cli.commands.verify import command
from ckpt_tools.errors import UsageError
from ckpt_tools.verification import Findings, checks, verify
from ckpt_tools.verification.config import read_config
from ckpt_tools.verification.directory import list_directory
from ckpt_tools.verification.layout import read_weights
from ckpt_tools.verification.other_readers import KINDS, READERS, RULES, check
from ckpt_tools.verification.run import Request, Run

MODEL = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "rope_theta": 5e5}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
LORA |= {"target_modules": ["q_proj", "v_proj"]}
ATTENTION = "base_model.model.model.layers.0.self_attn"
Q, K, V = (
    (f"{ATTENTION}.{name}.lora_A.weight", f"{ATTENTION}.{name}.lora_B.weight")
    for name in ("q_proj", "k_proj", "v_proj")
)
PAIR = (*Q, *V)
IN_5 = {"rope_type": "default", "rope_theta": 7.0}


def found(
    directory: Path,
    reader: str,
    config: dict[str, Any],
    *,
    tensors: tuple[str, ...] = PAIR,
    **files: dict[str, Any],
) -> list[tuple[str, str]]:
    """Kind and detail of what a reader does not take; a config with peft_type is an adapter."""
    is_adapter = "peft_type" in config
    name = "adapter_config.json" if is_adapter else "config.json"
    (directory / name).write_text(json.dumps(config))
    for file, content in files.items():
        (directory / f"{file}.json").write_text(json.dumps(content))
    weights = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    state = {name: torch.ones(1) for name in tensors}
    save_file(state, directory / weights, metadata={"format": "pt"})
    checks()  # adds the kinds of every check
    findings, told = Findings(), Findings()
    listed = list_directory(directory, findings)
    read_weights(listed, findings)
    read_config(listed, findings, weights_alone=False)
    check(Run(Request(readers=(reader,)), listed, told))
    return [(problem.kind, problem.detail) for problem in told.problems]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("config", [MODEL, LORA], ids=["model", "adapter"])
def test_what_every_reader_takes(tmp_path: Path, reader: str, config: dict[str, Any]) -> None:
    assert found(tmp_path, reader, config) == []


# What the reader's source takes, though it looks odd: no rule may find it.
TAKEN = [
    ("vllm", LORA | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}),
    ("vllm", LORA | {"use_rslora": True, "modules_to_save": ["score"]}),
    ("vllm", LORA | {"init_lora_weights": "gaussian"}),
    ("vllm", MODEL | {"quantization_config": {"quant_method": "gptq"}}),
    ("llama.cpp", LORA | {"rank_pattern": {"q_proj": 4}}),
    ("sglang", LORA | {"target_modules": "all-linear", "rank_pattern": {"q_proj": 8}}),
    ("transformers-4", MODEL | {"rope_parameters": IN_5, "rope_theta": 7.0}),
    ("peft", LORA | {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.21.2"}),
    ("peft", LORA | {"init_lora_weights": "pissa_niter_4", "kasa_config": None, "lora_dtype": "x"}),
]


@pytest.mark.parametrize(("reader", "config"), TAKEN)
def test_what_a_reader_takes(tmp_path: Path, reader: str, config: dict[str, Any]) -> None:
    assert found(tmp_path, reader, config) == []


def test_transformers_4_57_reads_processors_inside_processor_config(tmp_path: Path) -> None:
    nested = {"image_processor": {}, "feature_extractor": {}, "video_processor": {}}
    assert found(tmp_path, "transformers-4", MODEL, processor_config=nested) == []


NO_THETA = {key: value for key, value in MODEL.items() if key != "rope_theta"}
YARN = {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0}
NOT_TAKEN: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("transformers-4", "refuses", MODEL | {"model_type": "gemma4"}, {}, "no model type 'gemma4'"),
    (
        "transformers-4",
        "differs",
        NO_THETA | {"rope_parameters": IN_5},
        {},
        "rope_theta is missing",
    ),
    ("transformers-4", "differs", MODEL | {"rope_parameters": YARN}, {}, "rope_scaling is missing"),
    (
        *("transformers-4", "differs", MODEL | {"model_type": "qwen3_moe", "num_local_experts": 4}),
        *({}, "reads num_experts"),
    ),
    (
        *("transformers-4", "refuses", MODEL),
        *(
            {"tokenizer_config": {"tokenizer_class": "TokenizersBackend"}},
            "class TokenizersBackend",
        ),
    ),
    (
        *("transformers-4", "refuses", MODEL),
        *({"tokenizer_config": {"extra_special_tokens": ["<a>"]}}, "takes extra_special_tokens"),
    ),
    (
        *("transformers-4", "refuses", LORA),
        *(
            {"tokenizer_config": {"tokenizer_class": "TokenizersBackend"}},
            "class TokenizersBackend",
        ),
    ),
    (
        "vllm",
        "refuses",
        MODEL | {"architectures": ["MPTForCausalLM"]},
        {},
        "has dropped MPTForCausalLM",
    ),
    (
        "vllm",
        "limits",
        MODEL | {"architectures": ["MyForCausalLM"]},
        {},
        "no MyForCausalLM of its own",
    ),
    (
        *("vllm", "refuses", MODEL | {"quantization_config": {"quant_method": "eetq"}}),
        *({}, "no quantisation method 'eetq'"),
    ),
    ("vllm", "refuses", LORA | {"peft_type": "IA3", "r": None}, {}, "reads LoRA alone"),
    ("vllm", "refuses", LORA | {"modules_to_save": ["lm_head"]}, {}, "here: lm_head"),
    ("vllm", "refuses", LORA | {"use_dora": True}, {}, "takes no DoRA"),
    ("vllm", "refuses", LORA | {"lora_bias": True}, {}, "takes no lora_bias"),
    ("vllm", "refuses", LORA | {"bias": "all"}, {}, "takes bias 'none' alone"),
    ("vllm", "refuses", LORA | {"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa'"),
    (
        "vllm",
        "refuses",
        LORA | {"alora_invocation_tokens": [1]},
        {},
        "takes no alora_invocation_tokens",
    ),
    ("vllm", "refuses", LORA | {"layer_replication": [[0, 1]]}, {}, "takes no layer_replication"),
    ("vllm", "refuses", LORA | {"use_bdlora": {"a": 1}}, {}, "takes no use_bdlora"),
    ("vllm", "refuses", LORA | {"use_qalora": True}, {}, "takes no use_qalora"),
    (
        "vllm",
        "refuses",
        LORA,
        {"tensors": (*PAIR, f"{ATTENTION}.q_proj.token_adapter.weight")},
        "token_adapter",
    ),
    ("vllm", "limits", LORA | {"rank_pattern": {"q_proj": 64}}, {}, "--max-lora-rank 64"),
    (
        "sglang",
        "limits",
        MODEL | {"architectures": ["MyForCausalLM"]},
        {},
        "no MyForCausalLM of its own",
    ),
    ("sglang", "refuses", LORA | {"r": None}, {}, "the config has no r"),
    ("sglang", "refuses", LORA | {"use_dora": True}, {}, "takes no DoRA"),
    ("sglang", "limits", LORA, {"added_tokens": {"<a>": 9, "<b>": 7}}, "added_tokens.json is 9"),
    ("sglang", "refuses", LORA | {"target_modules": ".*q_proj"}, {}, "not as a pattern"),
    ("sglang", "refuses", LORA | {"rank_pattern": {"q_proj": 4}}, {}, "r is 8, and rank_pattern"),
    ("sglang", "refuses", LORA, {"tensors": Q}, "fails without"),
    ("sglang", "differs", LORA, {"tensors": (*K, *V)}, "in a layer without q_proj"),
    ("sglang", "differs", LORA | {"use_rslora": True}, {}, "does not read use_rslora"),
    ("llama.cpp", "refuses", MODEL | {"architectures": ["MyForCausalLM"]}, {}, "converts no MyFor"),
    (
        "llama.cpp",
        "refuses",
        LORA,
        {"tensors": (*PAIR, f"{ATTENTION}.q_proj.lora_magnitude_vector")},
        "magnitude",
    ),
    ("llama.cpp", "differs", LORA | {"use_rslora": True}, {}, "does not read use_rslora"),
    ("peft", "refuses", LORA | {"peft_type": "ROAD"}, {}, "has no type ROAD"),
    (
        "peft",
        "refuses",
        LORA | {"init_lora_weights": "mica"},
        {},
        "fails on init_lora_weights 'mica'",
    ),
    ("peft", "differs", LORA | {"kasa_config": {"beta": 1}}, {}, "does not know kasa_config"),
    ("peft", "differs", LORA | {"alora_invocation_tokens": [1]}, {}, "does not know alora_inv"),
]


@pytest.mark.parametrize(("reader", "ending", "config", "files", "fact"), NOT_TAKEN)
def test_what_a_reader_does_not_take(
    tmp_path: Path,
    reader: str,
    ending: str,
    config: dict[str, Any],
    files: dict[str, Any],
    fact: str,
) -> None:
    ((kind, detail),) = found(tmp_path, reader, config, **files)
    assert kind == f"{reader}-{ending}"
    assert fact in detail


def test_every_rule_has_a_directory_that_it_finds() -> None:
    # Those of rope and of the tokenizer have two facts, and one of PEFT's keys is another example.
    assert len(NOT_TAKEN) == len(RULES) + 3
    assert {rule.kind for rule in RULES} == {*KINDS}


def test_a_reader_without_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rules for the reader 'tgi'"):
        verify(tmp_path, readers=("tgi",))


def test_the_command_takes_several_readers(tmp_path: Path) -> None:
    found(tmp_path, "vllm", LORA | {"use_dora": True})
    asked = [str(tmp_path), "--for", "vllm", "--for", "sglang"]
    shown = CliRunner().invoke(command, asked).stdout
    assert "vllm-refuses" in shown
    assert "sglang-refuses" in shown
