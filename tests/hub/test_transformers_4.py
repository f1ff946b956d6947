"""--compat transformers-4: keys as transformers 4.57 itself wrote them, which transformers 5 reads the same.

``written_by_transformers_4.json`` holds what the config classes of transformers 4.57.6 wrote with
``save_pretrained``, for numbers that are no defaults: the model type and every key of rope that the class
takes. The configs of transformers 5 are made by the installed one. ``make clients`` loads whole directories
with 4.57.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.hub import AssetFile
from ckpt_tools.hub.transformers_4 import for_transformers_4

WRITTEN = json.loads(Path(__file__).with_name("written_by_transformers_4.json").read_text())
HERE = Path("config.json")
OF_ROPE = {key for each in WRITTEN for key in each} - {"model_type", "num_experts"}


def of_5(data: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 5 reads and writes it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**json.loads(json.dumps(data)))
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return written


def converted(data: dict[str, Any], *files: AssetFile) -> dict[str, Any]:
    return for_transformers_4(data, HERE, files)[0]


def test_keys_of_rope_are_those_that_version_4_wrote() -> None:
    compared = 0
    for four in WRITTEN:
        five = {key: value for key, value in of_5(four).items() if key not in OF_ROPE}
        both = converted(five)
        for key in four:
            assert both.get(key) == four[key], (four, key)
        assert of_5(both)["rope_parameters"] == five["rope_parameters"], four
        compared += 1
    assert compared > 100


NEST = {"rope_type": "default", "rope_theta": 700.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_olmo_3_scales_full_layers_alone() -> None:
    # modeling_olmo3.py of 4.57: sliding layers have rope_type "default" and the same rope_theta.
    rope = {"full_attention": {**YARN, "rope_theta": 700.0}, "sliding_attention": NEST}
    both = converted({"model_type": "olmo3", "rope_parameters": rope, "dtype": "bfloat16"})
    assert (both["rope_theta"], both["rope_scaling"]) == (700.0, YARN)
    assert both["torch_dtype"] == both["dtype"] == "bfloat16"
    assert of_5(both)["rope_parameters"] == rope


def test_a_part_of_a_config_is_converted_by_its_place() -> None:
    rope = {"rope_type": "default", "rope_theta": 700.0, "mrope_section": [2, 3, 3]}
    part = {"model_type": "qwen2_vl_text", "rope_parameters": rope}
    text = converted({"model_type": "qwen2_vl", "text_config": part})["text_config"]
    assert text["rope_theta"] == 700.0
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gemma4"}, "no model type 'gemma4'"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "proportional"}},
            "'proportional'",
        ),
        ({"model_type": "olmo2", "rope_parameters": YARN}, "no rope of type 'yarn' for olmo2"),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {
                    "full_attention": {**NEST, "rope_theta": 9.0},
                    "sliding_attention": NEST,
                },
            },
            "one rope_theta for all layers",
        ),
        ({"model_type": "csm"}, "cannot read the tie_word_embeddings"),
        ({"model_type": "mt5"}, "scales the output of the decoder"),
        (
            {"model_type": "glm", "rope_parameters": {**YARN, "rope_theta": 1.0}},
            "no scaling of rope for glm",
        ),
        (
            {"model_type": "bamba", "rope_parameters": {**NEST, "partial_rotary_factor": 0.25}},
            "and the config states 700.0",
        ),
    ],
)
def test_what_version_4_cannot_state_is_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedLayout) as refusal:
        converted(config)
    assert why in str(refusal.value)
    assert "Leave out --compat transformers-4" in str(refusal.value)


def files_of(*files: tuple[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    given = [AssetFile(name, content=json.dumps(data).encode()) for name, data in files]
    _, made, _ = for_transformers_4({"model_type": "olmo2"}, HERE, given)
    return {file.name: json.loads(file.read()) for file in made}


def test_the_tokenizer_has_a_class_that_version_4_has() -> None:
    made = files_of(
        ("tokenizer.json", {}),
        (
            "tokenizer_config.json",
            {
                "backend": "tokenizers",
                "tokenizer_class": "TokenizersBackend",
                "extra_special_tokens": ["<a>"],
            },
        ),
    )
    config = made["tokenizer_config.json"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # tokenization_utils_base.py of 4.57 takes a dict there, and a list under the other name.
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<a>"]


def test_a_tokenizer_of_version_4_is_not_touched() -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert (
        files_of(("tokenizer.json", {}), ("tokenizer_config.json", config))["tokenizer_config.json"]
        == config
    )


def test_a_tokenizer_without_a_file_that_version_4_reads_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="no tokenizer class MistralCommonBackend"):
        files_of(("tokenizer_config.json", {"tokenizer_class": "MistralCommonBackend"}))


def test_processors_lie_where_version_4_looks() -> None:
    image = {"image_processor_type": "CLIPImageProcessor", "size": 8}
    made = files_of(
        (
            "processor_config.json",
            {"processor_class": "LlavaProcessor", "image_processor": image, "k": 1},
        )
    )
    assert made["preprocessor_config.json"] == {**image, "processor_class": "LlavaProcessor"}
    assert made["processor_config.json"] == {"processor_class": "LlavaProcessor", "k": 1}
