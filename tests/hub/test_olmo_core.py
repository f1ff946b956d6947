"""The Hugging Face config made of OLMo-core's, against the one OLMo-core makes of the live model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.hub.olmo_core import hub_config, is_experiment

Data = dict[str, Any]
DCP = Path(__file__).resolve().parents[2] / "fixtures" / "dcp"
TRAINED = sorted(DCP.glob("olmo-core-*/checkpoint/step*/config.json"))
PATH = Path("config.json")
# OLMo-core makes a config of a model alone, which knows no tokenizer.
TOKENS = {"pad_token_id": 2, "bos_token_id": None, "eos_token_id": 1}


@pytest.fixture
def data() -> Data:
    content = json.loads((DCP / "olmo-core-olmo2-2ranks/checkpoint/step2/config.json").read_text())
    assert isinstance(content, dict)
    return content


def loaded(config: Data) -> Data:
    """What transformers makes of a config, every default filled in."""
    from transformers import AutoConfig

    model_type = config["model_type"]
    values: Data = AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    assert values["model_type"] == model_type
    return values


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.parents[2].name)
def test_it_is_the_config_of_the_live_model(path: Path) -> None:
    content = json.loads(path.read_text())
    assert is_experiment(content)
    config = hub_config(content, path)
    theirs = json.loads((path.parents[2] / "hf" / "config.json").read_text())
    assert loaded(config) == {**loaded(theirs), **TOKENS}


def test_transformers_4_finds_the_base_of_the_rotations(data: Data) -> None:
    assert hub_config(data, PATH)["rope_theta"] == 500_000


def window(pattern: list[int], first: bool, last: bool) -> Data:
    return {
        "pattern": pattern,
        "force_full_attention_on_first_layer": first,
        "force_full_attention_on_last_layer": last,
        "_CLASS_": "olmo_core.nn.attention.SlidingWindowAttentionConfig",
    }


@pytest.mark.parametrize(
    ("pattern", "first", "last", "kinds"),
    [
        ([4096, 4096, 4096, -1], False, True, "sssfsssf"),
        ([4096, 4096, 4096, -1], True, True, "fsssfssf"),
        ([4096, -1], False, False, "sfsfsfsf"),
        ([4096], False, False, "ssssssss"),
        ([4096], False, True, "sssssssf"),
    ],
)
def test_layers_with_windows_make_an_olmo3(
    data: Data, pattern: list[int], first: bool, last: bool, kinds: str
) -> None:
    data["model"]["n_layers"] = 8
    data["model"]["block"]["sequence_mixer"]["sliding_window"] = window(pattern, first, last)
    config = hub_config(data, PATH)
    assert (config["model_type"], config["architectures"]) == ("olmo3", ["Olmo3ForCausalLM"])
    assert config["sliding_window"] == 4096
    assert "".join(kind[0] for kind in config["layer_types"]) == kinds


def test_windows_that_no_layer_has_make_an_olmo2(data: Data) -> None:
    data["model"]["block"]["sequence_mixer"]["sliding_window"] = window([9], True, True)
    assert hub_config(data, PATH)["model_type"] == "olmo2"


def test_the_older_name_of_the_attention_is_known(data: Data) -> None:
    older = copy.deepcopy(data)
    block = older["model"]["block"]
    block["attention"] = block.pop("sequence_mixer")
    del block["attention"]["type"]
    assert hub_config(older, PATH) == hub_config(data, PATH)


def test_a_bias_that_is_not_mentioned_is_there(data: Data) -> None:
    del data["model"]["block"]["sequence_mixer"]["bias"]
    assert hub_config(data, PATH)["attention_bias"] is True


HYBRID = DCP / "olmo-core-hybrid/checkpoint/step1/config.json"


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("gdn", "sequence_mixer", "conv_bias"), True, "conv_bias=True"),
        (("gdn", "sequence_mixer", "norm_eps"), 1e-6, "norm_eps=1e-06"),
        (("gdn", "sequence_mixer", "type"), "kda", "blocks gdn, attn in its block_pattern"),
        (("gdn", "feed_forward", "hidden_size"), 6, "feed_forward of two sizes"),
        (("gdn", "layer_norm", "eps"), 1e-5, "norms with several eps"),
        (("gdn", "name"), "reordered_norm", "`gdn` with name='reordered_norm'"),
        (("attn", "name"), "default", "`block` with name='default'"),
        (("attn", "sequence_mixer", "gate"), {"x": 1}, "gate="),
    ],
)
def test_a_hybrid_that_transformers_does_not_have_is_refused(
    where: tuple[str, ...], value: object, reason: str
) -> None:
    content = json.loads(HYBRID.read_text())
    change("model", "block", *where, value=value)(content)
    with pytest.raises(UnsupportedLayout, match=reason):
        hub_config(content, PATH)


def change(*path: str, value: object) -> Callable[[Data], None]:
    def apply(data: Data) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return apply


MIXER = ("model", "block", "sequence_mixer")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (change("model", "block", "name", value="default"), "`block` with name='default'"),
        (change("model", "name", value="moe"), "`model` with name='moe'"),
        (change("model", "block_overrides", value={"0": {}}), "`model` with block_overrides"),
        (change("model", "embed_scale", value=2.0), "`model` with embed_scale=2.0"),
        (change("model", "embedding_norm", value={"name": "rms"}), "embedding_norm"),
        (change("model", "block", "feed_forward_moe", value={"x": 1}), "feed_forward_moe"),
        (change("model", "block", "attention_residual_alpha", value=0.5), "residual_alpha"),
        (change(*MIXER, "clip_qkv", value=8.0), "clip_qkv=8.0"),
        (change(*MIXER, "use_head_qk_norm", value=True), "use_head_qk_norm=True"),
        (change(*MIXER, "attention_sinks", value=True), "attention_sinks=True"),
        (change(*MIXER, "gate", value={"granularity": "headwise"}), "gate="),
        (change(*MIXER, "qk_norm", value=None), "no single `qk_norm`"),
        (change(*MIXER, "qk_norm", "eps", value=1e-5), r"norms with eps \[1e-06, 1e-05\]"),
        (change(*MIXER, "head_dim", value=6), "heads of 6 elements"),
        (change(*MIXER, "rope", value=None), "no single `rope`"),
        (change(*MIXER, "rope", "no_global_rope", value=True), "no_global_rope=True"),
        (change(*MIXER, "rope", "scaling", value={"factor": 8}), "scaling="),
        (change(*MIXER, "rope", "partial_rotary_factor", value=0.5), "partial_rotary_factor=0.5"),
        (
            change(*MIXER, "sliding_window", value=window([4, 8], False, False)),
            r"windows of \[4, 8",
        ),
        (change("model", "block", "layer_norm", "name", value="default"), "name='default'"),
        (change("model", "block", "feed_forward", "activation", value="gelu"), "activation='gelu'"),
        (change("model", "lm_head", "bias", value=True), "bias=True"),
        (change("model", "vocab_size", value=None), "no vocab_size"),
        (change("model", "block", value={"a": {}, "b": {}}), "`block` with"),
    ],
)
def test_what_no_config_says_is_refused(
    data: Data, edit: Callable[[Data], None], reason: str
) -> None:
    data["model"]["n_layers"] = 4
    edit(data)
    with pytest.raises(UnsupportedLayout, match=reason) as caught:
        hub_config(data, PATH)
    assert "--config" in str(caught.value.hint)


def test_a_length_that_is_not_stated_is_not_made_up(data: Data) -> None:
    del data["train_module"]["max_sequence_length"]
    assert hub_config(data, PATH)["max_position_embeddings"] == 8, "the dataset says it too"
    del data["dataset"]["sequence_length"]
    with pytest.raises(UnsupportedLayout, match="no max_sequence_length"):
        hub_config(data, PATH)


@pytest.mark.parametrize("other", [{}, {"model": "x"}, {"model": {}}, {"model_type": "olmo2"}])
def test_other_configs_are_none_of_olmo_cores(other: Data) -> None:
    assert not is_experiment(other)
