"""Owns the files of tokenizers and processors: which they are, where they are found, and the facts in them.

Files are copied byte for byte and always from one directory, because a tokenizer that another version wrote
anew, or that mixes two directories, fails silently. Token ids and chat templates are read here without
transformers; it is imported only for vocabularies in other forms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset, UsageError
from ckpt_tools.hub.custom_code import code_files
from ckpt_tools.hub.files import AssetFile, json_bytes, read_json, read_object
from ckpt_tools.hub.sources import hub_hint
from ckpt_tools.storage.regular import content_of

Role = Literal["eos", "bos", "pad"]

# A directory with any of these has a tokenizer: AutoTokenizer can load it.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "spm*.model",
    "*.tiktoken",
    "*.spm",
    "bpe.codes",
    "prophetnet.tokenizer",
)
# Files beside a vocabulary: merges, tables of single tokenizers, special tokens, templates.
_BESIDE_VOCABULARY = (
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.bpe",
    "encoder.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "byte_maps.json",
    "normalizer.json",
    "word_shape.json",
    "word_pronunciation.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
# Files with templates, and files of which one entry is a template.
_TEMPLATE_FILE = re.compile(r"chat_template\.jinja|chat_template\.json|additional_chat_templates/")
_WITH_TEMPLATE = ("tokenizer_config.json", "processor_config.json")
_WITH_AUTO_MAP = ("tokenizer_config.json", *_PROCESSORS)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of one directory.

    Attributes:
        directory: the directory of its files.
        template: a file with a chat template that replaces those of the directory, or None.
    """

    directory: Path
    template: Path | None = None

    @cached_property
    def files(self) -> tuple[AssetFile, ...]:
        """Every file of the tokenizer and its processor, and their custom code.

        Raises:
            MissingAsset: a file of its custom code is missing.
            DamagedCheckpoint: a JSON file that must be read is damaged.
        """
        patterns = (*_VOCABULARIES, *_BESIDE_VOCABULARY, *_PROCESSORS)
        copies = _copies(self.directory, patterns)
        if self.template is None:
            return copies
        kept = [file for file in copies if not _TEMPLATE_FILE.match(file.name)]
        made = [AssetFile("chat_template.jinja", content=content_of(self.template))]
        for file in [file for file in kept if file.name in _WITH_TEMPLATE]:
            data = read_object(self.directory / file.name)
            if data.pop("chat_template", None) is not None:
                kept.remove(file)
                made.append(AssetFile(file.name, content=json_bytes(data)))
        return tuple(sorted((*kept, *made), key=lambda file: file.name))

    @cached_property
    def chat_template(self) -> str | None:
        """The default chat template, chosen as transformers does.

        Raises:
            DamagedCheckpoint: a file that holds templates is damaged.
        """
        jinja = self.template or self.directory / "chat_template.jinja"
        if jinja.is_file():
            return content_of(jinja).decode("utf-8", "replace")
        template = self._settings.get("chat_template")
        if template is None:
            template = self._object("chat_template.json").get("chat_template")
        if isinstance(template, list):
            items = [item for item in template if isinstance(item, dict)]
            named = {item.get("name"): item.get("template") for item in items}
            template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None

    def special(self, role: Role) -> str | None:
        """The text of the end, begin or padding token, or None if the tokenizer has none.

        Raises:
            DamagedCheckpoint: a file that states it is damaged.
        """
        for place in (self._settings, self._object("special_tokens_map.json")):
            token = place.get(f"{role}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return text
        return None

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text, or None if the tokenizer does not have it.

        Raises:
            DamagedCheckpoint: two files state different ids for the token, or a file is damaged.
            MissingAsset: only transformers reads vocabularies of this form, and it fails.
        """
        found = {name: ids[token] for name, ids in self._vocabularies.items() if token in ids}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{number} in {name}" for name, number in found.items())
            raise DamagedCheckpoint(
                f"token {token} has more than one id: {listed}",
                path=self.directory,
                hint="Pass the tokenizer of the training run: --tokenizer DIR.",
            )
        if found:
            return next(iter(found.values()))
        if "tokenizer.json" in self._vocabularies:
            return None
        return self._ids_by_transformers.get(token)

    @cached_property
    def id_count(self) -> int | None:
        """The highest id of a ``tokenizer.json`` plus one; None for other vocabularies.

        Raises:
            DamagedCheckpoint: a vocabulary file is damaged.
        """
        if "tokenizer.json" not in self._vocabularies:
            return None
        ids = (number for ids in self._vocabularies.values() for number in ids.values())
        return max(ids, default=-1) + 1

    @cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """Id of each token that was added to the vocabulary, such as ``<|im_end|>``.

        Raises:
            DamagedCheckpoint: a vocabulary file is damaged.
        """
        path = self.directory / "tokenizer.json"
        listed = read_object(path).get("added_tokens") if path.is_file() else None
        fast = {str(token["content"]): token["id"] for token in listed or ()}
        return {**_added(self._settings.get("added_tokens_decoder")), **fast}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self._object("tokenizer_config.json")

    def _object(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return read_object(path) if path.is_file() else {}

    @cached_property
    def _vocabularies(self) -> Mapping[str, Mapping[str, int]]:
        """Token to id, for each file that states ids in JSON."""
        tables: dict[str, Mapping[str, int]] = {}
        path = self.directory / "tokenizer.json"
        if path.is_file():
            tables["tokenizer.json"] = _fast_vocabulary(path)
        tables["tokenizer_config.json"] = _added(self._settings.get("added_tokens_decoder"))
        tables["added_tokens.json"] = _numbers(self._object("added_tokens.json"))
        return tables

    @cached_property
    def _ids_by_transformers(self) -> Mapping[str, int]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                os.fspath(self.directory), local_files_only=True, trust_remote_code=False
            )
            vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        except Exception as error:  # backends of transformers raise errors of any class
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MissingAsset(
                f"the vocabulary cannot be read: it needs the tokenizer's own code or a missing"
                f" package ({reason})",
                path=self.directory,
                hint="Pass --tokenizer DIR with a tokenizer.json, or pass --generation-config none|FILE.",
            ) from error
        return vocabulary


def find_tokenizer(named: Path | None, places: tuple[Path, ...]) -> Tokenizer | None:
    """The given tokenizer, or the first one in ``places``; None if there is none.

    Args:
        named: ``--tokenizer``.
        places: directories to search, in order.

    Raises:
        MissingAsset: ``named`` is not a directory with a tokenizer.
    """
    if named is None:
        return next((Tokenizer(place) for place in places if _has_any(place, _VOCABULARIES)), None)
    if not named.is_dir():
        raise MissingAsset(
            "--tokenizer is not a directory",
            path=named,
            hint=f"Pass a directory that holds tokenizer.json.{hub_hint('--tokenizer', named)}",
        )
    if not _has_any(named, _VOCABULARIES):
        raise MissingAsset(
            "--tokenizer holds no tokenizer",
            path=named,
            hint="Pass a directory with tokenizer.json, tokenizer_config.json or tokenizer.model.",
        )
    return Tokenizer(named)


def with_template(tokenizer: Tokenizer | None, template: Path | None) -> Tokenizer | None:
    """The tokenizer with the chat template of ``--chat-template``, if one was given.

    Raises:
        MissingAsset: the template is not a file, or there is no tokenizer that it belongs to.
        UsageError: the file is not text.
    """
    if template is None:
        return tokenizer
    if not template.is_file():
        raise MissingAsset(
            "--chat-template is not a file",
            path=template,
            hint="Pass a file that holds one Jinja template, such as chat_template.jinja.",
        )
    if tokenizer is None:
        raise MissingAsset(
            "--chat-template needs a tokenizer, and none was found",
            path=template,
            hint="Pass --tokenizer DIR.",
        )
    try:
        content_of(template).decode()
    except ValueError as error:
        raise UsageError(
            f"the chat template is not UTF-8 text ({error})",
            path=template,
            hint="Pass a file that holds one Jinja template, such as chat_template.jinja.",
        ) from error
    return replace(tokenizer, template=template)


def is_processor(name: str) -> bool:
    """Whether a file is of a processor: of images, video or sound."""
    return name in _PROCESSORS


def processor_files(places: tuple[Path, ...]) -> tuple[AssetFile, ...]:
    """Processor files of the first place that has any; a pure image model has no tokenizer.

    Raises:
        MissingAsset: a file of custom code is missing.
        DamagedCheckpoint: a processor file is damaged.
    """
    place = next((place for place in places if _has_any(place, _PROCESSORS)), None)
    return () if place is None else _copies(place, _PROCESSORS)


def _has_any(directory: Path, patterns: tuple[str, ...]) -> bool:
    return next(_matches(directory, patterns), None) is not None


def _matches(directory: Path, patterns: tuple[str, ...]) -> Any:
    return (path for pattern in patterns for path in directory.glob(pattern) if path.is_file())


def _copies(directory: Path, patterns: tuple[str, ...]) -> tuple[AssetFile, ...]:
    files: dict[PurePosixPath, AssetFile] = {}
    for path in _matches(directory, patterns):
        name = PurePosixPath(path.relative_to(directory).as_posix())
        files[name] = AssetFile(str(name), source=path)
        if str(name) in _WITH_AUTO_MAP:
            hint = f"Put the file there, or remove auto_map from {name}."
            for code in code_files(read_object(path).get("auto_map"), directory, hint=hint):
                files[PurePosixPath(code.name)] = code
    return tuple(files[name] for name in sorted(files))


def _fast_vocabulary(path: Path) -> dict[str, int]:
    """Token to id from a ``tokenizer.json``; the vocabulary's id counts, as in tokenizers."""
    data = read_json(path)
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: a list of pieces with their scores
            vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        return _numbers({**added, **vocabulary})
    except (KeyError, TypeError, IndexError) as error:
        raise DamagedCheckpoint(
            "not a tokenizer.json: the vocabulary is missing or malformed",
            path=path,
            hint="Copy the file anew from the source of the model, or pass --tokenizer DIR.",
        ) from error


def _added(decoder: Any) -> dict[str, int]:
    """Token to id from ``added_tokens_decoder``, whose keys are ids as text."""
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return {
        token["content"]: int(number)
        for number, token in entries
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal()
    }


def _numbers(table: Mapping[str, Any]) -> dict[str, int]:
    """The entries whose value is an integer; a damaged or foreign file may hold others."""
    return {token: number for token, number in table.items() if isinstance(number, int)}
