"""The model card says what the checkpoint, the config and the conversion say, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from ckpt_tools.hub.card import CARD_NAME, CardFacts, license_beside, model_card

FACTS = CardFacts(
    made_of=None,
    step=500,
    weights="master",
    parameters=1_500_000,
    nbytes=3_000_000,
    dtypes={"bfloat16": 1_500_000},
    attribute=None,
    notes=("lm_head.weight is tied to model.embed_tokens.weight and left out",),
    version="0.1.0",
    manifest="manifest.json",
)
CONFIG = {"architectures": ["Olmo2ForCausalLM"], "_name_or_path": "allenai/OLMo-2-0425-1B"}


def text(facts: CardFacts, config: dict[str, object]) -> str:
    content = model_card(facts, config).content
    assert content is not None
    return content.decode()


def test_the_card_states_every_fact() -> None:
    card = text(FACTS, CONFIG)

    for fact in ("Olmo2ForCausalLM", "1,500,000", "3,000,000 bytes", "bfloat16", "| 500 |"):
        assert fact in card
    assert (
        "ckpt-tools 0.1.0 made this directory from the weights of a training run.\n`manifest.json` states"
        in card
    )
    assert FACTS.notes[0] in card


def test_huggingface_hub_reads_it() -> None:
    data = ModelCard(text(FACTS, CONFIG)).data

    assert data.library_name == "transformers"
    assert data.base_model == "allenai/OLMo-2-0425-1B"


def test_a_base_that_was_a_directory_is_not_named() -> None:
    assert "base_model" not in text(FACTS, {**CONFIG, "_name_or_path": "/data/models/olmo"})
    assert "base_model" not in text(FACTS, {**CONFIG, "_name_or_path": "runs/olmo/final"})
    assert "base_model" not in text(FACTS, {"architectures": ["Olmo2ForCausalLM"]})


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    assert "| Training step | unknown |" in text(replace(FACTS, step=None), CONFIG)


def test_an_attribute_is_named() -> None:
    assert "`policy`" in text(replace(FACTS, attribute="policy"), CONFIG)


def test_a_mean_says_of_what() -> None:
    card = text(replace(FACTS, made_of="mean of 2 checkpoints: `a`, `b`"), CONFIG)

    assert "| Made of | mean of 2 checkpoints: `a`, `b` |" in card


def test_the_weights_are_said_to_be_the_model_s_where_they_were_asked_for() -> None:
    row = "| Weights | the copy that the model computed with, not the optimizer's masters |"

    assert row in text(replace(FACTS, weights="model"), CONFIG)
    assert row not in text(FACTS, CONFIG)


def test_the_license_is_that_of_the_card_beside_the_config(tmp_path: Path) -> None:
    stated = {"license": "other", "license_name": "a-name", "license_link": "LICENSE"}
    beside = ModelCardData(language="en", base_model="org/older", tags=["x"], **stated)
    ModelCard(f"---\n{beside.to_yaml()}\n---\n\nlicense: mit\n").save(tmp_path / CARD_NAME)

    content = model_card(FACTS, CONFIG, license_beside(tmp_path / "config.json")).content

    assert content is not None
    data = ModelCard(content.decode()).data.to_dict()
    assert {key: data.get(key) for key in stated} == stated
    # The base of that model is not the base of this one.
    assert data["base_model"] == "allenai/OLMo-2-0425-1B"
    assert data["tags"] == ["ckpt-tools"]


def test_a_license_that_is_no_name_and_a_link_that_runs_are_left_out(tmp_path: Path) -> None:
    for stated, kept in (
        ({"license": "mit\n---\n# x", "license_name": "x"}, []),
        ({"license": "other", "license_name": "<b>x", "license_link": "javascript:x"}, ["license"]),
        ({"license": "other", "license_link": "https://a.b/c"}, ["license", "license_link"]),
    ):
        text = ModelCardData(**stated).to_yaml()
        (tmp_path / CARD_NAME).write_text(f"---\n{text}\n---\n")
        assert [*license_beside(tmp_path / "config.json")] == kept


@pytest.mark.parametrize(
    "card",
    [
        b"license: mit\n",
        b"---\ntags: [a]\n---\nlicense: mit\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        b"---\nlicense: [mit, apache-2.0]\nlicense_name: x\n---\n",
        b"\xff\xfe",
    ],
)
def test_a_card_that_states_no_license_gives_none(tmp_path: Path, card: bytes) -> None:
    (tmp_path / CARD_NAME).write_bytes(card)
    assert license_beside(tmp_path / "config.json") == {}
    assert license_beside(tmp_path / "missing" / "config.json") == {}
