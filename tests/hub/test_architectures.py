"""The class is deduced from real models' tensor names, or asked for; it is never guessed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.errors import MissingAsset
from ckpt_tools.hub import ConfigSource, architectures
from ckpt_tools.hub.config import finish
from ckpt_tools.tensors.dtypes import BFLOAT16

TINY = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 32,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}
GPT2 = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}


def saved_names(
    class_name: str, config: dict[str, Any], *, untied: bool = False
) -> tuple[str, list[str]]:
    """Model type and the names that ``save_pretrained`` keeps of a live model of the class."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    tied = {} if untied else model.all_tied_weights_keys
    return model.config.model_type, [name for name in model.state_dict() if name not in tied]


def finish_without_architectures(
    model_type: str, names: list[str], **config: Any
) -> tuple[Any, Any]:
    source = ConfigSource(Path("run/config.json"), {"model_type": model_type, **config})
    tensors = dict.fromkeys(names, (BFLOAT16, (32, 8)))
    return finish(source, tensors, dtype=BFLOAT16, untied=False), source


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("Olmo2ForCausalLM", TINY),
        ("LlamaForCausalLM", TINY | {"tie_word_embeddings": True}),
        ("LlamaForSequenceClassification", TINY),
        ("LlamaForTokenClassification", TINY),
        ("LlamaModel", TINY),
        ("Qwen3ForQuestionAnswering", TINY),
        ("GPT2LMHeadModel", GPT2),
        ("GPTNeoXForCausalLM", TINY),
        ("BartForConditionalGeneration", BART),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_class_of_a_live_model_is_recognised(class_name: str, config: dict[str, Any]) -> None:
    model_type, names = saved_names(class_name, config)
    result, _ = finish_without_architectures(model_type, names)
    assert result.data["architectures"] == [class_name]
    assert any(note.startswith(f"architectures set to {class_name}") for note in result.notes)


def test_a_head_that_is_no_longer_tied_tells_t5_from_its_bare_model() -> None:
    model_type, names = saved_names("T5ForConditionalGeneration", T5, untied=True)
    result, _ = finish_without_architectures(model_type, names)
    assert result.data["architectures"] == ["T5ForConditionalGeneration"]


@pytest.mark.parametrize(
    ("model_type", "names", "config", "fact"),
    [
        (
            "roberta",
            ["roberta.embeddings.word_embeddings.weight", "lm_head.bias"],
            {},
            "the tensors fit RobertaForCausalLM and RobertaForMaskedLM",
        ),
        (
            "t5",
            ["shared.weight", "encoder.block.0.w", "decoder.block.0.w"],
            {},
            "the tensors fit T5ForConditionalGeneration and T5Model",
        ),
        ("llama", ["model.embed_tokens.weight"], {"tie_word_embeddings": False}, "no known head"),
        ("llama", ["model.embed_tokens.weight", "v_head.summary.weight"], {}, "no known head"),
        ("llama", ["lm_head.weight", "score.weight"], {}, "the tensors hold lm_head and score"),
        ("olmo3", ["layers.0.weight"], {}, "no known head"),
    ],
    ids=["masked-or-causal", "t5-tied-or-bare", "untied-headless", "value-head", "two", "nothing"],
)
def test_tensors_that_leave_a_choice_are_an_error_that_says_what_to_pass(
    model_type: str, names: list[str], config: dict[str, Any], fact: str
) -> None:
    with pytest.raises(MissingAsset) as raised:
        finish_without_architectures(model_type, names, **config)
    assert "the tensors do not determine it" in raised.value.fact
    assert fact in raised.value.fact
    assert raised.value.path == Path("run/config.json")
    assert "pass it: --config FILE" in str(raised.value.hint)
    assert '"architectures": [' in str(raised.value.hint)


def test_the_head_inside_the_language_model_of_older_layouts_is_a_head() -> None:
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    result, _ = finish_without_architectures("llava", [*names, "vision_tower.x.weight"])
    assert result.data["architectures"] == ["LlavaForConditionalGeneration"]


def test_without_transformers_every_model_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    architectures._tables.cache_clear()
    try:
        assert not architectures.is_known("llama")
    finally:
        architectures._tables.cache_clear()


@pytest.mark.parametrize(
    "config",
    [{"model_type": "no_such_model"}, {"model_type": "llama", "auto_map": {"AutoModel": "m.M"}}],
    ids=["unknown", "custom"],
)
def test_custom_models_are_left_without_architectures_and_warned_about(
    config: dict[str, Any],
) -> None:
    result, _ = finish_without_architectures(names=["lm_head.weight"], **config)
    assert "architectures" not in result.data
    assert any("no architectures" in warning for warning in result.warnings)
