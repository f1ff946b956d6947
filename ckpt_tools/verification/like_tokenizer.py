"""Owns the comparison of two tokenizers and their chat templates, file by file.

A vocabulary may grow where the embedding was resized, or by added tokens. An entry that is lost or has
another id is an error, and so is any other step of the tokenizer that differs. Two versions of the tokenizers
library write merges and defaults in different forms; these are made equal first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptError, listed
from ckpt_tools.hub.files import read_object
from ckpt_tools.hub.tokenizer import Tokenizer
from ckpt_tools.verification.problem import Findings

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Vocabularies of other forms; one file is compared byte for byte with its like.
_OTHERS = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Settings that say who wrote a file, or how a batch is padded and cut.
_FREE = {
    "_commit_hash",
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "chat_template",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "max_length",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_class",
    "transformers_version",
    "truncation",
    "truncation_side",
    "truncation_strategy",
}


def compare_tokenizers(ours: Path, theirs: Path, findings: Findings, *, may_grow: bool) -> None:
    """Note what differs between two tokenizers.

    Args:
        ours: the directory that is checked.
        theirs: the directory to compare with.
        findings: takes the problems.
        may_grow: whether the embedding was resized.
    """
    if not any((theirs / name).is_file() for name in (_FILE, *_OTHERS)):
        findings.skipped.append(f"tokenizer against {theirs}: it has none")
        return
    if not any((ours / name).is_file() for name in (_FILE, *_OTHERS)):
        findings.add(
            "tokenizer-differs", "there is no tokenizer, and --like has one", severity="warning"
        )
        return
    try:
        _compare_fast(ours, theirs, findings, may_grow)
        _compare_settings(ours, theirs, findings)
        _compare_templates(ours, theirs, findings)
    except CkptError as error:
        findings.skipped.append(f"tokenizer against {theirs}: {error.fact}")
        return
    for name in _OTHERS:
        a, b = ours / name, theirs / name
        if a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes():
            _note(findings, name, "its bytes are not those of the file of --like")


def _note(findings: Findings, file: str, detail: str) -> None:
    findings.add(
        "tokenizer-differs",
        detail,
        file=file,
        hint="Take the tokenizer that the model was trained with.",
    )


def _compare_fast(ours: Path, theirs: Path, findings: Findings, may_grow: bool) -> None:
    if not ((ours / _FILE).is_file() and (theirs / _FILE).is_file()):
        return
    first, second = read_object(ours / _FILE), read_object(theirs / _FILE)
    a, b = _model(first), _model(second)
    _compare_ids(a.pop("vocab"), b.pop("vocab"), "vocabulary", findings, may_grow)
    _compare_ids(_added(first), _added(second), "added tokens", findings, True)
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            _note(findings, _FILE, f"model.{key} is not that of --like")
    for key in _STEPS:
        if first.get(key) != second.get(key):
            _note(findings, _FILE, f"its {key} is not that of --like")


def _model(data: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a tokenizer, with its vocabulary as a mapping and its merges as pairs."""
    given = data.get("model")
    model = (
        {k: v for k, v in given.items() if v not in (None, False)}
        if isinstance(given, dict)
        else {}
    )
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        # Unigram: the place in the list is the id, and each piece has a score.
        model["pieces"] = vocabulary
        vocabulary = {
            piece[0]: number
            for number, piece in enumerate(vocabulary)
            if isinstance(piece, list) and piece
        }
    model["vocab"] = vocabulary
    if "merges" in model:
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return model


def _added(data: Mapping[str, Any]) -> dict[str, Any]:
    """Each added token: its id and how it is matched."""
    tokens = data.get("added_tokens")
    return {
        token["content"]: {k: v for k, v in token.items() if k != "content" and v}
        for token in (tokens if isinstance(tokens, list) else [])
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _compare_ids(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    title: str,
    findings: Findings,
    may_grow: bool,
) -> None:
    changed = [token for token, entry in theirs.items() if ours.get(token) != entry]
    if changed:
        _note(
            findings, _FILE, f"{len(changed)} entries of the {title} differ: {listed(changed, 3)}"
        )
    grown = [token for token in ours if token not in theirs]
    if grown:
        detail = f"{len(grown)} entries of the {title} are not in --like: {listed(grown, 3)}"
        findings.add(
            "tokenizer-differs", detail, file=_FILE, severity="warning" if may_grow else None
        )


def _compare_settings(ours: Path, theirs: Path, findings: Findings) -> None:
    if not ((ours / _SETTINGS).is_file() and (theirs / _SETTINGS).is_file()):
        return
    first, second = read_object(ours / _SETTINGS), read_object(theirs / _SETTINGS)
    for key in sorted({*first, *second} - _FREE):
        a, b = _content(first.get(key)), _content(second.get(key))
        if a == b or (not a and not b):
            continue
        # Tuning gives a model an end and a padding of its own; their ids are checked with the configs.
        one_sided = key not in first or key not in second
        findings.add(
            "tokenizer-differs",
            f"{key} is {a!r}, and {b!r} in the directory of --like",
            file=_SETTINGS,
            severity="warning" if one_sided or key.endswith("_token") else None,
        )


def _content(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _compare_templates(ours: Path, theirs: Path, findings: Findings) -> None:
    first, second = Tokenizer(ours).chat_template, Tokenizer(theirs).chat_template
    if first == second:
        return
    if second is None:
        findings.add(
            "chat-template-differs",
            "there is a chat template, and --like has none",
            severity="warning",
        )
        return
    fact = "there is no chat template, and --like has one" if first is None else "its text differs"
    findings.add(
        "chat-template-differs",
        fact,
        file="chat_template.jinja" if (ours / "chat_template.jinja").is_file() else None,
        hint="Take the chat template that the model was trained with.",
    )
