"""What a tokenizer must be: loadable, with ids that are rows of the embedding and tokens that exist.

Owns the files of a tokenizer as a check reads them, and the judgement of what the child process found
when it loaded them (:class:`Loaded`). transformers gives a token that is named but not in the vocabulary
a new id without a word, so what is named is compared with the files, not with what was loaded. It must
not know generation configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ckpt_tools.errors import listed
from ckpt_tools.verification.directory import Directory, read_object
from ckpt_tools.verification.problem import Findings

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# OLMo's two ends of a text; asked for always, needed where the model is one.
OLMO_ENDS = ("<|im_end|>", "<|endoftext|>")

# Any of these says that the directory means to hold a tokenizer.
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
# Vocabularies that transformers finds without the class of the tokenizer naming them.
_OTHER_VOCABULARIES = ("tekken.json", "*.tiktoken", "*.model")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class TokenizerFiles:
    """The small files of a tokenizer as they are; empty where there is no such file.

    Attributes:
        settings: ``tokenizer_config.json``.
        special_tokens: ``special_tokens_map.json``.
        added_tokens: ``added_tokens.json``.
        processor_template: the chat template of a processor, where the tokenizer has none.
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
        """Each special token that is named, as (file, name, token)."""
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
        """Each added token whose id a small file states, as (file, token, id)."""
        decoder = self.settings.get("added_tokens_decoder")
        for number, item in decoder.items() if isinstance(decoder, dict) else ():
            if number.isdecimal() and (token := _content(item)) is not None:
                yield SETTINGS, token, int(number)
        for token, number in self.added_tokens.items():
            if isinstance(number, int):
                yield "added_tokens.json", token, number


@dataclass(frozen=True)
class Template:
    """A chat template, and what it puts behind the words of an assistant.

    Attributes:
        name: ``default``, or the name it has among several.
        text: the template.
        failure: why it cannot be rendered; None where it can.
        certain: whether it fails for every conversation, not just for the plain ones that were tried.
        refuses: whether it fails of its own will, by ``raise_exception``.
        tail: the text behind an assistant's last words.
        token: the first special token of the tail, or, where ``opens_next``, of what stands between an
            assistant's words and the user's next ones; None where there is none.
        id: its id.
        opens_next: whether ``token`` was not found behind the last words.
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
        """How a message calls it."""
        return "the chat template" + (f" {self.name!r}" if self.name != "default" else "")


@dataclass(frozen=True)
class Loaded:
    """A tokenizer that transformers has loaded.

    Attributes:
        ids: the id of each token that was asked for, None where it has no such token.
        in_files: those of them that its files hold, not counting what transformers adds.
        moved: added tokens of ``tokenizer.json`` that have another id now: (token, stated, now).
        unknown_ids: those of the ids asked for that no token has.
        outside: ids that are no row of the embedding, each with its token.
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
    """The small files; None where one of them is damaged, which is a problem."""
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
    """What the child process says of a tokenizer; None, and a note why, where it has none to describe."""
    if "lacking" in answer:
        findings.skipped.append(f"tokenizer (it needs: {_first_line(answer['lacking'])})")
        return None
    if "failure" in answer:
        if "auto_map" in files.settings and not directory.trust_remote_code:
            findings.skipped.append("tokenizer (it is custom code: --trust-remote-code)")
        else:
            findings.add(
                "tokenizer-unreadable",
                f"transformers cannot load it: {_first_line(answer['failure'])}",
                file=next((f for f in (FILE, SETTINGS) if f in directory.root_files), None),
            )
        return None
    if not _has_vocabulary(answer["files"], directory):
        findings.add(
            "tokenizer-unreadable",
            f"none of the files of its vocabulary is there: {', '.join(answer['files'])}",
            hint="Copy all files of the tokenizer from where the model came from.",
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
    """Note what is wrong with a tokenizer.

    Args:
        loaded: the tokenizer.
        files: its small files.
        rows: rows of the input embedding, or None where they are not known.
        findings: takes the problems.
    """
    _judge_ids(loaded, files, rows, findings)
    filed = {token for _, token, _ in files.filed_ids}
    for file, name, token in dict.fromkeys(files.named):
        if token not in loaded.in_files and token not in filed:
            now = loaded.ids.get(token)
            findings.add(
                "special-token-missing",
                f"{name} is {token}, which is not in the vocabulary; loaded, it gets the new id {now}",
                file=file,
                hint=f"Add {token} to the tokenizer and resize the embedding, or do not name it.",
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
                f"{template.called} writes eos_token, and the tokenizer names none: nothing is written",
                file=SETTINGS,
            )


def _judge_ids(loaded: Loaded, files: TokenizerFiles, rows: int | None, findings: Findings) -> None:
    stated = [*files.filed_ids, *((FILE, token, number) for token, number, _ in loaded.moved)]
    now = {**loaded.ids, **{token: number for token, _, number in loaded.moved}}
    for file, token, number in stated:
        if now.get(token) != number:
            findings.add(
                "token-id-conflict",
                f"{token} has id {number} there, and {now.get(token)} when it is loaded",
                file=file,
            )
    modal = {
        token
        for _, name, token in files.named
        if name.endswith("_token") and name.removesuffix("_token") not in _ROLES
    }
    # Text models share the tokenizer of their multimodal siblings, and lack the row of an image.
    for severity, outside in (
        ("error", [pair for pair in loaded.outside if pair[1] not in modal]),
        ("warning", [pair for pair in loaded.outside if pair[1] in modal]),
    ):
        if outside:
            tokens = listed([f"{token} ({number})" for number, token in outside], 3)
            findings.add(
                "token-id-outside-embedding",
                f"the embedding has {rows:,} rows; outside are {tokens}",
                file=FILE,
                severity="error" if severity == "error" else "warning",
                hint="Take the tokenizer that the model was trained with, or resize the embedding.",
            )


def _has_vocabulary(named: list[str], directory: Directory) -> bool:
    """Whether a file of the vocabulary is there; without one, some classes load an empty vocabulary."""
    patterns = (*named, *_OTHER_VOCABULARIES)
    held = any(fnmatch(file, pattern) for file in directory.root_files for pattern in patterns)
    return held or not named


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason is given")
