"""The model card: ``README.md`` of the output, which says what the weights are.

Owns its words. Every statement is a fact of the weights, the config or the conversion; nothing is said of
what the model can do, and nothing of how a checkpoint was stored: that stands in the manifest, so that the
same weights have the same card. Knows neither tensors nor formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_tools.hub.files import AssetFile

CARD_NAME = "README.md"


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        made_of: what was put together, where it was more than one checkpoint.
        step: optimizer step, where known.
        weights: ``master`` or ``model``: which copy was taken.
        parameters: elements written.
        nbytes: bytes of the weights.
        dtypes: dtype name to elements written in it.
        attribute: the part of a composite model that this is, if it is one.
        notes: what the conversion decided or changed.
        version: of ckpt-tools.
        manifest: name of the file beside it that says how the weights were made.
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


def model_card(facts: CardFacts, config: Mapping[str, Any]) -> AssetFile:
    """The card of a model, as ``huggingface_hub`` writes one."""
    from huggingface_hub import ModelCard, ModelCardData

    base = config.get("_name_or_path")
    data = ModelCardData(
        library_name="transformers",
        base_model=base if isinstance(base, str) and _is_hub_name(base) else None,
        tags=["ckpt-tools"],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts, config)}")
    return AssetFile(CARD_NAME, content=str(card).encode())


def _is_hub_name(name: str) -> bool:
    """Whether it is ``owner/model``; a path on the machine that trained means nothing elsewhere."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _body(facts: CardFacts, config: Mapping[str, Any]) -> str:
    rows = [
        ("Parameters", f"{facts.parameters:,}"),
        ("Dtype", ", ".join(f"{name} ({count:,})" for name, count in facts.dtypes.items())),
        ("Size of the weights", f"{facts.nbytes:,} bytes"),
        ("Training step", "unknown" if facts.step is None else f"{facts.step:,}"),
    ]
    if facts.weights == "model":
        rows.append(("Weights", "those that the model computed with, not the optimizer's masters"))
    if facts.attribute is not None:
        rows.insert(0, ("Part of a composite model", f"`{facts.attribute}`"))
    if facts.made_of is not None:
        rows.insert(0, ("Made of", facts.made_of))
    model = ", ".join(config.get("architectures") or ()) or "Model"
    # Never the output's own name: the same checkpoint gives the same files, wherever they are written.
    lines = [f"# {model}", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    lines += ["", f"Made of a training run's weights by ckpt-tools {facts.version}."]
    lines += [f"`{facts.manifest}` says which, how each tensor was derived, and its digest."]
    lines += ["", *(f"- {note}" for note in facts.notes)] if facts.notes else []
    return "\n".join(lines) + "\n"
