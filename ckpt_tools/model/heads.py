"""The head of a model: which class has it, and what becomes of the head of an adapter's base.

Owns the class of a model whose adapter brings a head of its own, such as a reward model on a causal base,
and the refusal of a config whose class has another head than the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_tools.errors import UsageError, listed
from ckpt_tools.hub import ConfigSource
from ckpt_tools.hub.architectures import (
    BESIDE_LANGUAGE_MODELS,
    classifier_of,
    classifies,
    classifies_beside,
    classifying_heads,
    contradiction,
    fitting,
    is_head,
    never_generates,
    without_generating_heads,
)
from ckpt_tools.hub.reference import ReferenceModel
from ckpt_tools.model.state import State
from ckpt_tools.tensors.catalogue import Catalogue, Tensor

# Where the weight lies whose rows are the labels: in the head itself, or in its last layer.
_LAST_LAYERS = ("weight", "out_proj.weight")


def of_adapter(config: ConfigSource | None, state: State) -> tuple[ConfigSource | None, State]:
    """The config of the model that an adapter with a classifier's head makes of its base.

    transformers and PEFT train it so: ``from_pretrained`` of the classifier reads the base without its
    head, and ``save_pretrained`` writes the class and the labels. The config is that of the base.

    Returns:
        The config with this class, and the state with what was decided. The config of a classifier stays
        as it is.

    Raises:
        UsageError: the adapter and the base do not determine the class, or ``--config`` names another one.
    """
    if config is None or not state.of_base:
        return config, state
    own = [name for name in state.catalogue if name not in state.of_base]
    heads = classifying_heads(own) - classifying_heads(state.of_base)
    named = config.data.get("architectures") or ["no class"]
    if not heads or classifies(str(named[0])):
        return config, state
    head = min(heads)
    names = [*own, *(name for name in state.of_base if not is_head(name))]
    model_type = str(config.data.get("model_type"))
    meant = classifier_of(model_type, names, state.task)
    labels = _labels(head, state.catalogue)
    changes: dict[str, Any] = {"architectures": [meant]}
    if labels is not None and labels != _stated_labels(config):
        changes["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
        changes["label2id"] = {f"LABEL_{label}": label for label in range(labels)}
    if meant is None or labels is None or config.is_named:
        raise _other_class(config, [n for n in own if _top(n) == head], [], meant, labels)
    notes = [f"architectures set to {meant}: the adapter has {head}, and the base does not"]
    if len(changes) > 1:
        notes.append(
            f"{head} has {labels} rows, so id2label and label2id have {labels} labels, with the names that "
            "transformers gives them"
        )
    return replace(config, data={**config.data, **changes}), replace(
        state, notes=(*state.notes, *notes)
    )


def without_heads_of_base(
    catalogue: Catalogue, of_base: Collection[str], reference: ReferenceModel
) -> tuple[Catalogue, list[str]]:
    """The tensors without those of a head of the base that the class of the model does not have.

    ``from_pretrained`` leaves them out when it loads the base as another class. Anything else that the model
    lacks stays, and is reported.
    """
    if not never_generates(reference.architecture):
        return catalogue, []
    known = {_top(name) for name in (*reference.saved, *reference.tied)}
    every = (*catalogue, *catalogue.ties)
    left = {name for name in every if name in of_base and _top(name) not in known}
    if not left:
        return catalogue, []
    kept = Catalogue(
        {name: tensor for name, tensor in catalogue.items() if name not in left},
        {alias: to for alias, to in catalogue.ties.items() if not left & {alias, to}},
    )
    note = f"left out, because {reference.architecture} does not have this head of the base: "
    return kept, [note + listed(sorted(left))]


def refuse_other_head(
    lacking: Sequence[str],
    tensors: Mapping[str, Tensor],
    reference: ReferenceModel,
    config: ConfigSource,
) -> None:
    """Refuse a config of the same model with another head: a reward model with a causal config.

    The missing head and the surplus one together name the class. ``--like`` would fill in the missing head
    and write the surplus one beside it, and so would the base of an adapter. A value head beside a tied
    language model is left alone.
    """
    surplus = [name for name in tensors if name not in reference.saved]
    odd = contradiction(reference.architecture, tensors)
    beside = classifies_beside(reference.architecture, surplus)
    odd = odd or beside
    if odd is None or (not lacking and odd in BESIDE_LANGUAGE_MODELS):
        return
    head = [name for name in surplus if name.startswith(f"{odd}.")]
    if not head or (not lacking and never_generates(reference.architecture)):
        return
    tied = config.data.get("tie_word_embeddings")
    meant = fitting(
        reference.model_type, without_generating_heads(tensors) if beside else tensors, tied=tied
    )
    labels = _labels(odd, tensors) if "Classification" in (meant or "") else None
    raise _other_class(config, head, lacking, meant, labels)


def _other_class(
    config: ConfigSource,
    head: Sequence[str],
    lacking: Sequence[str],
    meant: str | None,
    labels: int | None,
) -> UsageError:
    named = (config.data.get("architectures") or ["no class"])[0]
    lacks = f" and lack {listed(lacking)}" if lacking else ""
    key = "" if labels in (None, _stated_labels(config)) else f' and "num_labels": {labels}'
    return UsageError(
        f"the config names {named}, but the tensors of the checkpoint hold "
        f"{listed(head)}{lacks}" + (f": they are those of {meant}" if meant else ""),
        path=config.path,
        hint="Pass --config FILE, a copy of the config with "
        f'"architectures": ["{meant or "<the class that was trained>"}"]{key}, or --weights-only.',
    )


def _labels(head: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of labels of a classifier's head: the rows of its last layer."""
    for end in _LAST_LAYERS:
        last = tensors.get(f"{head}.{end}")
        if last is not None and len(last.shape) == 2:
            return last.shape[0]
    return None


def _stated_labels(config: ConfigSource) -> object:
    """The number of labels that a config states; transformers counts the names of labels first."""
    named = config.data.get("id2label")
    return len(named) if isinstance(named, dict) else config.data.get("num_labels", 2)


def _top(name: str) -> str:
    return name.split(".")[0]
