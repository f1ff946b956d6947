"""The model card says what the checkpoint, the config and the conversion say, and nothing else."""

from __future__ import annotations

from dataclasses import replace

from huggingface_hub import ModelCard

from ckpt_tools.hub.card import CardFacts, model_card

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
