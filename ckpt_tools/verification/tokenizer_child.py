"""Owns the child process that loads tokenizer and generation config with transformers, and describes them.

A separate process protects the caller from endless templates, parser crashes and slow imports. torch is
hidden, which saves a second. Custom code runs only if the question allows it.

It reads one JSON object on standard input and prints one on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ckpt_tools.hub.reference.process import question_and_answers
from ckpt_tools.hub.rendering import in_time

_ABSENT = ("torch", "accelerate", "peft", "deepspeed", "sklearn", "tensorflow", "flax")
# Words that no template changes, and that are not tokens of any tokenizer.
_ASKED, _ANSWERED = "Sentinelquestion", "Sentinelanswer"


def main() -> None:
    """Answer the question on standard input."""
    with question_and_answers() as (question, answers):
        if not question["trust_remote_code"]:
            for name in _ABSENT:
                sys.modules[name] = None  # type: ignore[assignment]
        json.dump(answer(question), answers)


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """The descriptions of tokenizer and generation config; None for one that was not requested."""
    has_generation, has_tokenizer = question["has_generation_config"], question["has_tokenizer"]
    return {
        "generation": _generation(question["directory"]) if has_generation else None,
        "tokenizer": _tokenizer(question) if has_tokenizer else None,
    }


def _generation(directory: str) -> dict[str, Any]:
    """The error of transformers about the file; empty if it accepts the file."""
    from transformers import GenerationConfig

    loaded: Any = GenerationConfig
    try:
        loaded.from_pretrained(directory, local_files_only=True).validate(strict=True)
    except Exception as error:
        return {"failure": str(error) or type(error).__name__}
    return {}


def _tokenizer(question: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(
            question["directory"],
            local_files_only=True,
            trust_remote_code=question["trust_remote_code"],
        )
        return _described(tokenizer, question)
    except ImportError as error:
        return {"lacking": str(error)}
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if not _reads_config(question["directory"]):
            return {"lacking": "a config.json that transformers reads"}
        return {"failure": f"{type(error).__name__}: {error}"}


def _reads_config(directory: str) -> bool:
    """Whether transformers reads the model's config, so that it cannot be the cause of a failure."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: Any = PretrainedConfig
    try:
        held, _ = config.get_config_dict(directory, local_files_only=True)
        if held.get("model_type") in CONFIG_MAPPING:
            CONFIG_MAPPING[held["model_type"]].from_dict(held)
    except Exception:
        return not os.path.isfile(os.path.join(directory, "config.json"))
    return True


def _described(tokenizer: Any, question: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    base = vocabulary if backend is None else backend.get_vocab(with_added_tokens=False)
    known = set(vocabulary.values())
    rows = question["rows"]
    outside = sorted((n, t) for t, n in vocabulary.items() if rows is not None and n >= rows)
    filed = _added_in_file(question["directory"])
    return {
        "files": sorted(set(type(tokenizer).vocab_files_names.values())),
        "roles": sorted(tokenizer.special_tokens_map),
        "ids": {token: vocabulary.get(token) for token in question["tokens"]},
        "in_files": [token for token in question["tokens"] if token in base or token in filed],
        "moved": [[t, n, vocabulary.get(t)] for t, n in filed.items() if vocabulary.get(t) != n],
        "unknown_ids": [number for number in question["ids"] if number not in known],
        "outside": outside,
        "templates": [
            {"name": name, "text": text, **_rendered(tokenizer, text)}
            for name, text in _templates(tokenizer, question["template"])
        ],
    }


def _added_in_file(directory: str) -> dict[str, int]:
    """The added tokens of ``tokenizer.json``."""
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as stream:
        return {token["content"]: token["id"] for token in json.load(stream)["added_tokens"]}


def _templates(tokenizer: Any, processors: str | None) -> Iterator[tuple[str, str]]:
    """Every chat template, the default first; ``processors`` if the tokenizer has none."""
    held = tokenizer.chat_template or processors or {}
    if isinstance(held, str):
        held = {"default": held}
    yield from sorted(held.items(), key=lambda item: (item[0] != "default", item[0]))


def _rendered(tokenizer: Any, template: str) -> dict[str, Any]:
    """The text that closes the words of an assistant.

    Returns:
        ``failure``, and whether it is ``certain`` for every conversation; or ``tail``, the text after an
        assistant's last words, with ``token`` and ``id``, its first special token, or the one before the
        user's next words (``opens_next``) if the tail has none.
    """
    last = _asked_both_ways(tokenizer, template, _ASKED, _ANSWERED)
    if "failure" in last:
        return last
    tail = last["text"].rpartition(_ANSWERED)[2] if _ANSWERED in last["text"] else ""
    closing = _first_special(tokenizer, tail)
    if closing is not None:
        return {"tail": tail, "opens_next": False, **closing}
    middle = _asked_both_ways(tokenizer, template, "Earlier", _ANSWERED, _ASKED).get("text", "")
    between = middle.partition(_ANSWERED)[2].partition(_ASKED)[0] if _ASKED in middle else ""
    opening = _first_special(tokenizer, between) or {"id": None, "token": None}
    return {"tail": tail, "opens_next": True, **opening}


def _asked_both_ways(tokenizer: Any, template: str, *words: str) -> dict[str, Any]:
    """The conversation as text. Templates differ in the form of content and in needing a system turn."""
    failure: dict[str, Any] = {}
    text = ""
    for system in (False, True):
        for in_parts in (False, True):
            roles = ["user", "assistant"] * 2
            said = list(zip(roles, words, strict=False))
            if system:
                said.insert(0, ("system", "Earlier"))
            chat = [
                {"role": r, "content": [{"type": "text", "text": w}] if in_parts else w}
                for r, w in said
            ]
            answer = in_time(
                partial(tokenizer.apply_chat_template, chat, chat_template=template, tokenize=False)
            )
            if answer.get("certain"):
                return answer
            if "failure" in answer:
                failure = failure or answer
                continue
            text = answer["text"]
            if all(word in text for word in words):
                return {"text": text}
    return {"text": text} if text or not failure else failure


def _first_special(tokenizer: Any, text: str) -> dict[str, Any] | None:
    """The first special token of a text; the first added token if none is special."""
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # Runs of spaces are added tokens in some vocabularies.
    marked = {number for number, token in added.items() if str(token).strip()}
    for kind in (special, marked):
        for number in numbers:
            if number in kind:
                return {"id": number, "token": tokenizer.convert_ids_to_tokens(number)}
    return None


if __name__ == "__main__":
    main()
