"""Owns the text of the model card, ``README.md`` of the output.

Every statement is a fact about the weights, the config or the conversion. The card does not describe what
the model can do or how a checkpoint was stored: the same weights have the same card, and the manifest has
the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError
from ckpt_tools.hub.files import AssetFile
from ckpt_tools.storage.regular import content_of
from ckpt_tools.text import markdown, markdown_code

CARD_NAME = "README.md"
# The metadata of a card is a block of YAML at its start.
_METADATA = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# YAML takes seconds a megabyte, and the metadata of cards has a few kilobytes.
_LARGEST_CARD, _LARGEST_METADATA = 1 << 20, 1 << 16
# What the Hub takes for each: names, and the link or the file of the text.
_LICENSE = {
    "license": re.compile(r"[\w.+-]+", re.ASCII),
    "license_name": re.compile(r"[\w.+ -]+", re.ASCII),
    "license_link": re.compile(r"https?://[^\s<>\"'()]+|[\w./-]+", re.ASCII),
}


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card states.

    Attributes:
        made_of: the sources, if there was more than one checkpoint, as Markdown.
        step: optimizer step, if known.
        weights: the copy that was taken: ``master`` or ``model``.
        parameters: number of elements written.
        nbytes: bytes of the weights.
        dtypes: number of elements written in each dtype, by its name.
        attribute: the part of a composite model that was taken, if any.
        notes: what the conversion decided or changed.
        version: version of ckpt-tools.
        manifest: name of the manifest, which states how the weights were made.
    """

    made_of: str | None
    step: int | None
    weights: str
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    attribute: str | None
    notes: Sequence[str]
    version: str
    manifest: str


def license_beside(config: Path) -> dict[str, str]:
    """The license that the card beside a config states, as fields of a card; empty where none does."""
    import yaml

    path = config.parent / CARD_NAME
    try:
        if path.stat().st_size > _LARGEST_CARD:
            return {}
        block = _METADATA.match(content_of(path).decode())
        data = yaml.safe_load(block[1]) if block and len(block[1]) <= _LARGEST_METADATA else None
    except (OSError, ValueError, CkptError, RecursionError, yaml.YAMLError):
        return {}
    stated = {
        key: text
        for key, text in (data.items() if isinstance(data, dict) else ())
        if key in _LICENSE and isinstance(text, str) and _LICENSE[key].fullmatch(text)
    }
    return stated if "license" in stated else {}


def model_card(
    facts: CardFacts, config: Mapping[str, Any], license: Mapping[str, str] | None = None
) -> AssetFile:
    """The card of a model, as ``huggingface_hub`` writes one.

    Args:
        facts: what it states.
        config: the config of the model.
        license: the fields of its license, where it is known.
    """
    # ModelCard would import the client of the hub, which takes longer than all other work on a small model.
    from huggingface_hub import ModelCardData

    base, stated = config.get("_name_or_path"), license or {}
    data = ModelCardData(
        library_name="transformers",
        base_model=base if isinstance(base, str) and _is_hub_name(base) else None,
        tags=["ckpt-tools"],
        license=stated.get("license"),
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
    )
    card = f"---\n{data.to_yaml()}\n---\n\n{_body(facts, config)}"
    return AssetFile(CARD_NAME, content=card.encode())


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The ``architectures`` of a config that are names of classes."""
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    return [name for name in names if isinstance(name, str) and name.isidentifier()]


def _is_hub_name(name: str) -> bool:
    """Whether it is ``owner/model``, and not a path on the machine of the training run."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def _body(facts: CardFacts, config: Mapping[str, Any]) -> str:
    rows = [
        ("Parameters", f"{facts.parameters:,}"),
        ("Dtype", ", ".join(f"{name} ({count:,})" for name, count in facts.dtypes.items())),
        ("Size of the weights", f"{facts.nbytes:,} bytes"),
        ("Training step", "unknown" if facts.step is None else f"{facts.step:,}"),
    ]
    if facts.weights == "model":
        rows.append(
            ("Weights", "the copy that the model computed with, not the optimizer's masters")
        )
    if facts.attribute is not None:
        rows.insert(0, ("Part of a composite model", markdown_code(facts.attribute)))
    if facts.made_of is not None:
        rows.insert(0, ("Made of", facts.made_of))
    model = ", ".join(class_names(config)) or "Model"
    # The output's name is left out: the same checkpoint gives the same files in any directory.
    lines = [f"# {model}", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    lines += [
        "",
        f"ckpt-tools {facts.version} made this directory from the weights of a training run.",
    ]
    lines += [
        f"`{facts.manifest}` states their source, and for each tensor its derivation and digest."
    ]
    lines += ["", *(f"- {markdown(note)}" for note in facts.notes)] if facts.notes else []
    return "\n".join(lines) + "\n"
