"""Owns what a rule of ``verify --for`` looks at, and the facts about directories for transformers 4.

The lists of names lie in ``hub/tables``; each states the version and the files that it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ckpt_tools import hub
from ckpt_tools.verification.container import Entry

_THETAS = ("rope_theta", "global_rope_theta", "rotary_emb_base", "rotary_embedding_base")


@dataclass(frozen=True)
class Facts:
    """What a rule looks at: a model, or one adapter.

    Attributes:
        config: ``config.json`` of a model, ``adapter_config.json`` of an adapter.
        tensors: its tensors.
        read: gives the content of another JSON file; empty if there is none.
        files: names of the files beside the config.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    read: Callable[[str], Mapping[str, Any]]
    files: frozenset[str]


@lru_cache(maxsize=8)
def table(reader: str) -> Mapping[str, Any]:
    """What the source of a reader states: lists of names, and the version."""
    path = Path(hub.__file__).with_name("tables") / f"{reader}.json"
    data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def v4_type(facts: Facts) -> str | None:
    """A model type that it lacks."""
    name = facts.config.get("model_type")
    if "auto_map" in facts.config or name in table("transformers-4")["rope_keys"]:
        return None
    return f"has no model type {name!r}"


def v4_rope(facts: Facts) -> str | None:
    """rope_parameters without the keys of version 4: it would take its defaults."""
    keys = table("transformers-4")["rope_keys"]
    parts = {"": facts.config} | {k: v for k, v in facts.config.items() if isinstance(v, dict)}
    for where, part in parts.items():
        rope = part.get("rope_parameters")
        known = keys.get(str(part.get("model_type")), "").split()
        if not isinstance(rope, dict) or not known:
            continue
        first = next((each for each in rope.values() if isinstance(each, dict)), rope)
        theta = first.get("rope_theta")
        spelled = next((key for key in known if key in _THETAS), None)
        inside = f" of {where}" if where else ""
        if spelled is not None and theta is not None and part.get(spelled) is None:
            return f"does not read rope_parameters{inside}, and {spelled} is missing"
        kinds = [
            each.get("rope_type", "default")
            for each in (first, *rope.values())
            if isinstance(each, dict)
        ]
        if set(kinds) - {"default", "axial"} and part.get("rope_scaling") is None:
            return f"does not read rope_parameters{inside}, and rope_scaling is missing"
    return None


def v4_tokenizer(facts: Facts) -> str | None:
    """A tokenizer class that it lacks, a list of extra_special_tokens."""
    data = facts.read("tokenizer_config.json")
    name = data.get("tokenizer_class")
    known = (*table("transformers-4")["tokenizer_classes"], "PreTrainedTokenizerFast")
    if name is not None and "auto_map" not in data and not {name, f"{name}Fast"} & {*known}:
        return f"has no tokenizer class {name}"
    if isinstance(data.get("extra_special_tokens"), list):
        return "takes extra_special_tokens as an object, and it is a list"
    return None


def v4_renamed(facts: Facts) -> str | None:
    """Keys that version 5 renamed: it would take its defaults."""
    renamed = table("transformers-4")["renamed"]
    for part in (facts.config, *(v for v in facts.config.values() if isinstance(v, dict))):
        for old, new in renamed.get(str(part.get("model_type")), {}).items():
            if part.get(new) is not None and part.get(old) is None:
                return f"reads {old}, and the config states {new} alone"
    return None
