"""Owns the question what PEFT writes of an adapted model, and its answer: PEFT's own names, for every tuner.

A child process (``peft_child.py``) builds the base without weights, adds the adapter, and lets
``get_peft_model_state_dict`` filter names instead of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ckpt_tools.hub.reference.process import ask
from ckpt_tools.hub.reference.recipes import Shape


@dataclass(frozen=True)
class AdapterQuestion:
    """One adapter of a state.

    Attributes:
        name: the adapter's name.
        config: the adapter's config.
        names: names of the state in the live model, without those of other adapters.
        save_embeddings: whether embeddings are written although the adapter does not target them.
    """

    name: str
    config: Mapping[str, Any]
    names: Iterable[str]
    save_embeddings: bool


@dataclass(frozen=True)
class AdapterAnswer:
    """What PEFT writes of one adapter.

    Attributes:
        names: for each tensor of the file, its name in the live model.
        shapes: for each tensor of the file, its shape.
        failure: why there is no answer; None if there is one.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    failure: str | None


def describe_adapters(
    base: Mapping[str, Any], questions: Sequence[AdapterQuestion]
) -> list[AdapterAnswer]:
    """What PEFT writes of each adapter on a base with the config ``base``.

    Raises:
        CkptError: the child process failed, for example because PEFT is not installed.
    """
    question = {
        "config": dict(base),
        "adapters": [
            {
                "name": q.name,
                "config": dict(q.config),
                "names": list(q.names),
                "save_embeddings": q.save_embeddings,
            }
            for q in questions
        ],
    }
    return [
        AdapterAnswer(
            found.get("names", {}),
            {name: tuple(shape) for name, shape in found.get("shapes", {}).items()},
            found.get("failure"),
        )
        for found in _answers(json.dumps(question))
    ]


@lru_cache(maxsize=8)  # a training run saves the same adapter many times
def _answers(question: str) -> list[dict[str, Any]]:
    answers = ask(f"{__package__}.peft_child", question, "peft")["adapters"]
    assert isinstance(answers, list)
    return answers
