"""Owns the inference of the transformers class from model type and tensor names, if a config has no class.

The class names come from transformers' own tables. They are parsed as text, because an import of
``modeling_auto`` imports torch and takes seconds. If more than one class remains, an error lists them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from ckpt_tools.errors import MissingAsset

_LANGUAGE = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
)

# A module that only the head of a class has, and the tables whose classes have it.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "lm_head": _LANGUAGE,
    "embed_out": ("CAUSAL_LM",),
    "proj_out": ("SPEECH_SEQ_2_SEQ",),
    "final_logits_bias": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "cls": ("MASKED_LM", "CAUSAL_LM", "PRETRAINING", "NEXT_SENTENCE_PREDICTION"),
    "score": ("SEQUENCE_CLASSIFICATION",),
    "classifier": ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "MULTIPLE_CHOICE"),
    "classification_head": ("SEQUENCE_CLASSIFICATION",),
    "qa_outputs": ("QUESTION_ANSWERING",),
}
# The tables of the task types of PEFT whose classes have a head that PEFT saves with the adapter.
_TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
_GENERATING_HEADS = {"lm_head", "embed_out", "proj_out"}
# Heads that trainers put beside a language model, such as TRL's value head.
BESIDE_LANGUAGE_MODELS = frozenset({"v_head", "value_head"})
_VALUE_HEADS = {"v_head", "value_head", "score", "classifier", "classification_head", "qa_outputs"}

# Attributes under which classes with a head keep the model without a head.
_BASE_PREFIXES = {"model", "transformer", "gpt_neox", "backbone"}
_EMBEDDINGS = {
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
    "embeddings",
}
_GENERATING_CLASS = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$")
_CLASSIFIER_CLASS = re.compile(r"(Classification|QuestionAnswering|MultipleChoice)$")
_HEADLESS_TASK = re.compile(
    r"(Classification|QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction|PreTraining)$"
)


def input_embeddings(names: Iterable[str]) -> tuple[str, ...]:
    """The names that have the structure of input embeddings of tokens."""
    return tuple(name for name in names if _is_embedding(name.split(".")))


def classifies_beside(class_name: str, surplus: Iterable[str]) -> str | None:
    """A head of a classifier among tensors that a class of language models lacks; None if there is none.

    An adapter of a reward model on a causal base has it beside the base's own head.
    """
    if _GENERATING_CLASS.search(class_name) is None:
        return None
    return min(_heads(surplus) & _VALUE_HEADS - BESIDE_LANGUAGE_MODELS, default=None)


def without_generating_heads(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are not of a head of a language model."""
    return tuple(name for name in names if not _heads([name]) & _GENERATING_HEADS)


def never_generates(class_name: str) -> bool:
    """Whether the name of a class is that of a task without text generation."""
    return _HEADLESS_TASK.search(class_name) is not None


def contradiction(class_name: str, names: Iterable[str]) -> str | None:
    """A head among the tensors that the class does not have, or None if class and tensors agree."""
    heads = _heads(names)
    if _GENERATING_CLASS.search(class_name) and not heads & _GENERATING_HEADS:
        return min(heads & _VALUE_HEADS, default=None)
    if class_name.endswith("Classification"):
        return min(heads & _GENERATING_HEADS, default=None)
    return None


def fitting(model_type: str, names: Iterable[str], *, tied: bool | None) -> str | None:
    """The only class of a model type that has these tensors; None if none or several have."""
    candidates, _ = _candidates(model_type, tuple(names), tied=tied)
    return candidates.pop() if len(candidates) == 1 else None


def is_head(name: str) -> bool:
    """Whether a tensor is of a head that only some classes of a model have."""
    return bool(_heads([name]) & _HEADS.keys())


def classifying_heads(names: Iterable[str]) -> set[str]:
    """The heads of classifiers among the names."""
    return _heads(names) & _VALUE_HEADS - BESIDE_LANGUAGE_MODELS


def classifies(class_name: str) -> bool:
    """Whether the name of a class is that of a classifier."""
    return _CLASSIFIER_CLASS.search(class_name) is not None


def classifier_of(model_type: str, names: Iterable[str], task: str | None) -> str | None:
    """The only class of a model type and of a task of PEFT that has these tensors; None if none or several.

    Args:
        model_type: the config's model type.
        names: tensor names, without heads that the class does not have.
        task: PEFT's task type; None if it is not known.
    """
    candidates, _ = _candidates(model_type, tuple(names), tied=None)
    if task is not None:
        candidates &= _classes(model_type, [_TASKS[task]] if task in _TASKS else [])
    return candidates.pop() if len(candidates) == 1 else None


def is_known(model_type: str) -> bool:
    """Whether transformers has classes for a model type."""
    return any(model_type in table for table in _tables().values())


def infer(
    model_type: str, names: Iterable[str], *, tied: bool | None, path: Path
) -> tuple[str, str]:
    """The only class of a model type that has these tensors, and the evidence for it.

    Args:
        model_type: the config's model type; :func:`is_known` must be true of it.
        names: tensor names of the output.
        tied: ``tie_word_embeddings`` of the config; None if it is absent.
        path: the config file, for the error.

    Raises:
        MissingAsset: no class, or more than one class, has these tensors.
    """
    names = tuple(names)
    candidates, evidence = _candidates(model_type, names, tied=tied)
    if len(candidates) == 1:
        return next(iter(candidates)), evidence
    fits = f"the tensors fit {' and '.join(sorted(candidates))}" if candidates else evidence
    example = min(candidates, default="<the class of the model>")
    raise MissingAsset(
        f"architectures is missing, and the tensors do not determine it: {fits}",
        path=path,
        hint=f'Add "architectures": ["{example}"] to a copy of the file, and pass it: --config FILE.',
    )


def _candidates(
    model_type: str, names: tuple[str, ...], *, tied: bool | None
) -> tuple[set[str], str]:
    """The classes that may have these tensors, and the evidence among the tensors."""
    heads = sorted(_heads(names) & _HEADS.keys())
    if heads:
        fitting = [_classes(model_type, _tables_of(head, names)) for head in heads]
        found = _by_stacks(set.intersection(*fitting), model_type, names)
        return found, f"the tensors hold {' and '.join(heads)}"
    roots = {name.split(".")[0] for name in names}
    if any(name.split(".")[:-2] in ([], ["embeddings"]) for name in input_embeddings(names)):
        # T5 classes have no prefix: bare model, encoder and tied language model have the same names.
        decodes = any("decoder" in name.split(".") for name in names)
        twin = "SEQ_TO_SEQ_CAUSAL_LM" if decodes else "TEXT_ENCODING"
        found = _classes(model_type, ("BASE", twin))
        return found, "the embedding has no prefix and there is no head"
    if roots <= _BASE_PREFIXES and len(roots) == 1 and tied is not False:
        found = _by_stacks(_classes(model_type, _LANGUAGE), model_type, names)
        return found, f"all tensors lie under {min(roots)}. and only a tied head can be absent"
    return set(), "they hold no known head"


def _tables_of(head: str, names: tuple[str, ...]) -> tuple[str, ...]:
    # In Llama and similar models, classifiers of sequences and of tokens differ only in the bias.
    if head == "score" and "score.bias" in names:
        return ("TOKEN_CLASSIFICATION",)
    return _HEADS[head]


def _by_stacks(candidates: set[str], model_type: str, names: tuple[str, ...]) -> set[str]:
    """Tell encoder-decoders from decoders by the stacks among the tensors."""
    both = _classes(model_type, ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"))
    parts = {part for name in names for part in name.split(".")}
    if "decoder" not in parts or not both:
        return candidates
    return candidates & both if "encoder" in parts else candidates - both


def _heads(names: Iterable[str]) -> set[str]:
    """First parts of the names; in older layouts ``language_model.lm_head`` is a head."""
    return {name.removeprefix("language_model.").split(".")[0] for name in names}


def _is_embedding(parts: list[str]) -> bool:
    return len(parts) >= 2 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def _classes(model_type: str, tables: Iterable[str]) -> set[str]:
    return {name for table in tables for name in _tables().get(table, {}).get(model_type, ())}


@cache
def _tables() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """For each table and model type the class names, from the source of ``modeling_auto``."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    tables: dict[str, dict[str, tuple[str, ...]]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        title = re.fullmatch(r"MODEL_(?:FOR_(\w+)_)?MAPPING_NAMES", node.targets[0].id)
        if title and isinstance(node.value, ast.Call) and node.value.args:
            tables[title[1] or "BASE"] = _pairs(node.value.args[0])
    return tables


def _pairs(node: ast.expr) -> dict[str, tuple[str, ...]]:
    pairs: dict[str, tuple[str, ...]] = {}
    for item in node.elts if isinstance(node, ast.List) else ():
        if isinstance(item, ast.Tuple):
            model_type, names = ast.literal_eval(item)
            pairs[model_type] = (names,) if isinstance(names, str) else tuple(names)
    return pairs
