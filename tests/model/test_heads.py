"""The class of a model whose adapter brings a head, decided from tensors and settings alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.errors import UsageError
from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.reference import ReferenceModel, SavedTensor
from ckpt_tools.hub.reference.recipes import Live
from ckpt_tools.model.heads import of_adapter, without_heads_of_base
from ckpt_tools.model.state import State
from ckpt_tools.tensors.catalogue import Catalogue
from tests.writing.test_bytes import on_disk

QWEN: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
BASE = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
ENCODER = {"bert.embeddings.word_embeddings.weight": (8, 4), "cls.predictions.bias": (8,)}


def state(
    directory: Path, base: dict[str, Any], head: dict[str, Any], task: str | None = None
) -> State:
    shapes = {**base, **head}
    held = on_disk(directory, {name: torch.ones(shape) for name, shape in shapes.items()})
    dtypes = {name: tensor.dtype for name, tensor in held.items()}
    return State(
        Catalogue(held),
        dtypes,
        dict.fromkeys(held, "parameter"),
        of_base=frozenset(base),
        task=task,
    )


def config(data: dict[str, Any]) -> ConfigSource:
    return ConfigSource(Path("config.json"), data)


@pytest.mark.parametrize(
    ("data", "base", "head", "task", "expected"),
    [
        (QWEN, BASE, {"score.weight": (3, 4)}, "SEQ_CLS", "Qwen3ForSequenceClassification"),
        (QWEN, BASE, {"score.weight": (3, 4)}, None, "Qwen3ForSequenceClassification"),
        (
            QWEN,
            BASE,
            {"score.weight": (3, 4), "score.bias": (3,)},
            "TOKEN_CLS",
            "Qwen3ForTokenClassification",
        ),
        (BERT, ENCODER, {"classifier.weight": (3, 4)}, "SEQ_CLS", "BertForSequenceClassification"),
        (BERT, ENCODER, {"classifier.weight": (3, 4)}, "TOKEN_CLS", "BertForTokenClassification"),
    ],
)
def test_task_and_head_tell_the_class_and_its_labels(
    data: dict[str, Any], base: Any, head: Any, task: str | None, expected: str, tmp_path: Path
) -> None:
    found, after = of_adapter(config(data), state(tmp_path, base, head, task))

    assert found is not None and found.data["architectures"] == [expected]
    assert found.data["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert found.data["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert len(after.notes) == 2


def test_names_of_labels_that_the_base_has_are_kept(tmp_path: Path) -> None:
    named = QWEN | {"id2label": {"0": "worse", "1": "better"}}

    found, _ = of_adapter(config(named), state(tmp_path, BASE, {"score.weight": (2, 4)}, "SEQ_CLS"))

    assert found is not None and found.data["id2label"] == named["id2label"]
    assert "label2id" not in found.data


@pytest.mark.parametrize(
    ("data", "base", "head", "task"),
    [
        (QWEN, BASE, {"score.weight": (1, 4)}, "CAUSAL_LM"),
        (QWEN, BASE, {"score.weight": (1, 4), "qa_outputs.weight": (2, 4)}, "SEQ_CLS"),
        (BERT, ENCODER, {"classifier.weight": (3, 4)}, None),
        (QWEN, BASE, {"score.dense.weight": (4, 4)}, "SEQ_CLS"),
    ],
    ids=["task-generates", "two-heads", "several-classes", "no-labels"],
)
def test_a_class_that_is_not_determined_is_refused(
    data: dict[str, Any], base: Any, head: Any, task: str | None, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="but the tensors of the checkpoint hold") as caught:
        of_adapter(config(data), state(tmp_path, base, head, task))

    assert '"architectures": ["' in str(caught.value.hint)


def test_the_config_of_a_classifier_or_of_a_whole_checkpoint_stays(tmp_path: Path) -> None:
    merged = state(tmp_path, BASE, {"score.weight": (1, 4)}, "SEQ_CLS")
    reward = config(QWEN | {"architectures": ["Qwen3ForSequenceClassification"]})

    assert of_adapter(reward, merged) == (reward, merged)
    whole = replace(merged, of_base=frozenset())
    assert of_adapter(config(QWEN), whole) == (config(QWEN), whole)
    valued = state(tmp_path, BASE, {"v_head.summary.weight": (1, 4)})
    assert of_adapter(config(QWEN), valued) == (config(QWEN), valued)


def test_of_the_base_only_a_head_is_left_out(tmp_path: Path) -> None:
    """A tensor that the class lacks beside its own ones may be a mistake, so it stays and is reported."""
    embedding, extra, ours = "model.embed_tokens.weight", "model.extra.weight", "probe.weight"
    held = state(tmp_path, {**BASE, extra: (4,)}, {"score.weight": (1, 4), ours: (4,)})
    model = ReferenceModel(
        architecture="Qwen3ForSequenceClassification",
        model_type="qwen3",
        live={},
        saved={
            name: SavedTensor(held.catalogue[name].shape, Live(name))
            for name in (embedding, "score.weight")
        },
        tied={},
        ties={},
        aliases={},
        ignored=frozenset(),
        float32_under_bfloat16=frozenset(),
        float32_under_float16=frozenset(),
    )

    kept, notes = without_heads_of_base(held.catalogue, held.of_base, model)

    assert {*kept} == {embedding, extra, "score.weight", ours}
    assert notes == [
        f"left out, because {model.architecture} does not have this head of the base: lm_head.weight"
    ]
