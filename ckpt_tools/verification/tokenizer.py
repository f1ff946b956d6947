"""Owns the check of a tokenizer: it loads, its ids are rows of the embedding, and its tokens exist.

The child process loads the tokenizer (:class:`Loaded`). transformers gives a special token that is not in the
vocabulary a new id without a warning. So special tokens are compared with the files, not with the loaded
tokenizer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ckpt_tools.errors import listed
from ckpt_tools.verification.directory import Directory, read_object
from ckpt_tools.verification.problem import Findings

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# OLMo's two end tokens. They are always requested, and needed for OLMo models.
OLMO_ENDS = ("<|im_end|>", "<|endoftext|>")

# Any of these files shows that the directory holds a tokenizer.
SIGNS = (
    FILE,
    SETTINGS,
    "special_tokens_map.json",
    "tokenizer.model*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jinja",
)
# Vocabularies that transformers finds although the tokenizer class does not name them.
_OTHER_VOCABULARIES = ("tekken.json", "*.tiktoken", "*.model")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class TokenizerFiles:
    """The small files of a tokenizer; empty if a file is missing.

    Attributes:
        settings: ``tokenizer_config.json``.
        special_tokens: ``special_tokens_map.json``.
        added_tokens: ``added_tokens.json``.
        processor_template: the chat template of a processor, if the tokenizer has none.
    """

    settings: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    processor_template: str | None

    @property
    def tokens(self) -> list[str]:
        """Every token whose id must be known."""
        named = (token for _, _, token in self.named)
        filed = (token for _, token, _ in self.filed_ids)
        return sorted({*named, *filed, *OLMO_ENDS})

    @property
    def named(self) -> Iterator[tuple[str, str, str]]:
        """Each special token, as (file, name, token)."""
        for file, held in (
            (SETTINGS, self.settings),
            ("special_tokens_map.json", self.special_tokens),
        ):
            for key, value in held.items():
                if key.endswith("_token") and (token := _content(value)) is not None:
                    yield file, key, token
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = held.get(key)
                listed = [(key, item) for item in value] if isinstance(value, list) else []
                for name, item in value.items() if isinstance(value, dict) else listed:
                    if (token := _content(item)) is not None:
                        yield file, name, token

    @property
    def filed_ids(self) -> Iterator[tuple[str, str, int]]:
        """Each added token with an id in a small file, as (file, token, id)."""
        decoder = self.settings.get("added_tokens_decoder")
        for number, item in decoder.items() if isinstance(decoder, dict) else ():
            if number.isdecimal() and (token := _content(item)) is not None:
                yield SETTINGS, token, int(number)
        for token, number in self.added_tokens.items():
            if isinstance(number, int):
                yield "added_tokens.json", token, number


@dataclass(frozen=True)
class Template:
    """A chat template, and the text that it writes after an assistant's words.

    Attributes:
        name: ``default``, or its name among several.
        text: the template.
        failure: why it cannot be rendered; None if it can.
        certain: whether it fails for every conversation, not only for those that were tried.
        refuses: whether it fails through its own ``raise_exception``.
        tail: the text after an assistant's last words.
        token: the first special token of the tail; with ``opens_next``, of the text between an assistant's
            words and the user's next words; None if there is none.
        id: its id.
        opens_next: whether ``token`` was not found after the last words.
    """

    name: str
    text: str
    failure: str | None = None
    certain: bool = False
    refuses: bool = False
    tail: str = ""
    token: str | None = None
    id: int | None = None
    opens_next: bool = False

    @property
    def called(self) -> str:
        """Its name in a message."""
        return "the chat template" + (f" {self.name!r}" if self.name != "default" else "")


@dataclass(frozen=True)
class Loaded:
    """A tokenizer that transformers has loaded.

    Attributes:
        ids: the id of each requested token; None if there is no such token.
        in_files: the requested tokens in its files, without those that transformers adds.
        moved: added tokens of ``tokenizer.json`` with another id after loading: (token, stated, loaded).
        unknown_ids: the requested ids that no token has.
        outside: ids that are not a row of the embedding, each with its token.
        roles: the names of its special tokens, such as ``eos_token``.
        templates: its chat templates, the default one first.
    """

    ids: Mapping[str, int | None]
    in_files: frozenset[str]
    moved: tuple[tuple[str, int, int | None], ...]
    unknown_ids: frozenset[int]
    outside: tuple[tuple[int, str], ...]
    roles: frozenset[str]
    templates: tuple[Template, ...]


def read_tokenizer(directory: Directory, findings: Findings) -> TokenizerFiles | None:
    """The small files; None, and a problem, if one of them is damaged."""
    held: dict[str, dict[str, Any] | None] = {}
    for file, kind in (
        (SETTINGS, "tokenizer-unreadable"),
        ("special_tokens_map.json", "tokenizer-unreadable"),
        ("added_tokens.json", "tokenizer-unreadable"),
        ("chat_template.json", "chat-template-invalid"),
    ):
        present = file in directory.root_files
        held[file] = read_object(directory, file, kind, findings) if present else {}
    settings, special, added, processor = held.values()
    if settings is None or special is None or added is None:
        return None
    template = (processor or {}).get("chat_template")
    return TokenizerFiles(settings, special, added, template if isinstance(template, str) else None)


def read_answer(
    answer: Mapping[str, Any], directory: Directory, files: TokenizerFiles, findings: Findings
) -> Loaded | None:
    """The tokenizer that the child process loaded; None, and a finding, if it could not."""
    if "lacking" in answer:
        findings.skipped.append(f"tokenizer (it needs: {_first_line(answer['lacking'])})")
        return None
    if "failure" in answer:
        if "auto_map" in files.settings and not directory.trust_remote_code:
            findings.skipped.append("tokenizer (custom code needs --trust-remote-code)")
        else:
            findings.add(
                "tokenizer-unreadable",
                f"transformers cannot load it: {_first_line(answer['failure'])}",
                file=next((f for f in (FILE, SETTINGS) if f in directory.root_files), None),
                hint="Copy all files of the tokenizer from the source of the model.",
            )
        return None
    if not _has_vocabulary(answer["files"], directory):
        findings.add(
            "tokenizer-unreadable",
            f"all files of its vocabulary are missing: {', '.join(answer['files'])}",
            hint="Copy all files of the tokenizer from the source of the model.",
        )
        return None
    return Loaded(
        ids=answer["ids"],
        in_files=frozenset(answer["in_files"]),
        moved=tuple((token, stated, now) for token, stated, now in answer["moved"]),
        unknown_ids=frozenset(answer["unknown_ids"]),
        outside=tuple((number, token) for number, token in answer["outside"]),
        roles=frozenset(answer["roles"]),
        templates=tuple(Template(**template) for template in answer["templates"]),
    )


def judge_tokenizer(
    loaded: Loaded, files: TokenizerFiles, rows: int | None, findings: Findings
) -> None:
    """Judge a tokenizer.

    Args:
        loaded: the tokenizer.
        files: its small files.
        rows: rows of the input embedding; None if they are not known.
        findings: takes the problems.
    """
    _judge_ids(loaded, files, rows, findings)
    filed = {token for _, token, _ in files.filed_ids}
    for file, name, token in dict.fromkeys(files.named):
        if token not in loaded.in_files and token not in filed:
            now = loaded.ids.get(token)
            findings.add(
                "special-token-missing",
                f"{name} is {token}, which is not in the vocabulary; transformers gives it the new id {now}",
                file=file,
                hint=f"Add {token} to the tokenizer and resize the embedding, or remove {name}.",
            )
    for template in loaded.templates:
        if template.failure is not None and (template.certain or template.name == "default"):
            findings.add(
                "chat-template-invalid",
                f"{template.called} cannot be rendered: {_first_line(template.failure)}",
                severity="warning" if template.refuses else "error",
            )
        if "eos_token" in template.text and "eos_token" not in loaded.roles:
            findings.add(
                "special-token-missing",
                f"{template.called} uses eos_token, but the tokenizer has none: nothing is written",
                file=SETTINGS,
            )


def _judge_ids(loaded: Loaded, files: TokenizerFiles, rows: int | None, findings: Findings) -> None:
    stated = [*files.filed_ids, *((FILE, token, number) for token, number, _ in loaded.moved)]
    now = {**loaded.ids, **{token: number for token, _, number in loaded.moved}}
    for file, token, number in stated:
        if now.get(token) != number:
            findings.add(
                "token-id-conflict",
                f"{token} has id {number} in this file, but {now.get(token)} after loading",
                file=file,
            )
    modal = {
        token
        for _, name, token in files.named
        if name.endswith("_token") and name.removesuffix("_token") not in _ROLES
    }
    # Text models share the tokenizer of multimodal models, but lack the row of an image token.
    for severity, outside in (
        ("error", [pair for pair in loaded.outside if pair[1] not in modal]),
        ("warning", [pair for pair in loaded.outside if pair[1] in modal]),
    ):
        if outside:
            tokens = listed([f"{token} ({number})" for number, token in outside], 3)
            findings.add(
                "token-id-outside-embedding",
                f"the embedding has {rows:,} rows; these tokens are outside: {tokens}",
                file=FILE,
                severity="error" if severity == "error" else "warning",
                hint="Use the tokenizer of the training run, or resize the embedding.",
            )


def _has_vocabulary(named: list[str], directory: Directory) -> bool:
    """Whether a vocabulary file exists. Without one, some classes load an empty vocabulary."""
    patterns = (*named, *_OTHER_VOCABULARIES)
    held = any(fnmatch(file, pattern) for file in directory.root_files for pattern in patterns)
    return held or not named


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _first_line(text: str) -> str:
    """The first line, or the text as one line where the first one only begins a list."""
    lines = [line.strip() for line in text.strip().splitlines()] or ["no reason is given"]
    return textwrap.shorten(" ".join(lines), 300) if lines[0].endswith(":") else lines[0]
