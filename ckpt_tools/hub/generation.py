"""Owns ``generation_config.json``: its four sources, and the check of its token ids.

The sources are: none, a given file, OLMo's rule, automatic. The check is that an id exists in the embedding
and in the vocabulary. An id is written only if the tokenizer or a config states it.

A model counts as OLMo if its ``model_type`` starts with ``olmo`` or is ``flex_olmo`` or ``hf_olmo``, or if
its chat template holds the word OLMo in any case (``Molmo`` is another model).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import MissingAsset, UsageError
from ckpt_tools.hub.architectures import never_generates
from ckpt_tools.hub.chat_template import closing_tokens, own_closing_tokens
from ckpt_tools.hub.config import text_value
from ckpt_tools.hub.files import AssetFile, json_bytes, read_object
from ckpt_tools.hub.tokenizer import Role, Tokenizer
from ckpt_tools.storage.naming import as_path

GENERATION_NAME = "generation_config.json"
MODES = ("auto", "olmo", "none")

# open-instruct's rule, in this order (get_olmo3_generation_config).
OLMO_END_TOKENS = ("<|im_end|>", "<|endoftext|>")

_OLMO_MODEL = re.compile(r"olmo.*|flex_olmo|hf_olmo")
_OLMO_TEMPLATE = re.compile(r"(?<![a-z])olmo", re.IGNORECASE)
_CHECKED_IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
_ROLES: tuple[Role, ...] = ("eos", "bos", "pad")
_ONLY_IN_CONFIG = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")

# Flags of sampling and the values that switch them off. transformers refuses to save other values without
# do_sample.
_SAMPLING_OFF: Mapping[str, float | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_OTHER_MODES = "pass --generation-config none, or FILE to give your own."


@dataclass(frozen=True)
class Generation:
    """The chosen file, if any, and remarks about the choice.

    Attributes:
        file: the output's ``generation_config.json``, or None for no such file.
        notes: what was decided.
        warnings: what the user should check.
    """

    file: AssetFile | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """The facts on which the choice of a generation config depends.

    Attributes:
        config: the finished model config.
        config_path: the file it is from.
        tokenizer: the output's tokenizer, or None if there is none.
        rows: rows of the input embedding, or None if unknown.
        places: directories to search for the source's own generation config, in order.
    """

    config: Mapping[str, Any]
    config_path: Path
    tokenizer: Tokenizer | None
    rows: int | None
    places: tuple[Path, ...]


def choose(mode: str, model: Model) -> Generation:
    """The generation config of the output.

    Args:
        mode: ``auto``, ``olmo``, ``none``, or the path of a file or directory.
        model: the model of the output.

    Raises:
        MissingAsset: the given file, or a token that OLMo's rule needs, is missing.
        UsageError: an id is not a row of the embedding, or not a number.
        DamagedCheckpoint: a generation config or tokenizer file is damaged.
    """
    if mode == "none":
        return Generation(None, notes=("no generation_config.json, as requested",))
    if mode == "olmo":
        return _olmo(model)
    if mode == "auto":
        return _auto(model)
    return _given(_named_file(mode), model)


def is_olmo(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> bool:
    """Whether the model is OLMo by its model type or chat template.

    Raises:
        DamagedCheckpoint: a file that holds the chat template is damaged.
    """
    if _OLMO_MODEL.fullmatch(str(config.get("model_type"))):
        return True
    template = tokenizer.chat_template if tokenizer is not None else None
    return template is not None and _OLMO_TEMPLATE.search(template) is not None


def _auto(model: Model) -> Generation:
    classes = [str(name) for name in model.config.get("architectures") or ()]
    if classes and all(never_generates(name) for name in classes):
        return Generation(
            None, notes=(f"no generation_config.json: {classes[0]} does not generate text",)
        )
    olmo = is_olmo(model.config, model.tokenizer)
    if olmo and model.tokenizer is not None:
        return _with_template_ends(_olmo_as_found(model, model.tokenizer), model)
    own = _own_file(model)
    if own is not None:
        found = _given(own, model)
        if not olmo:
            return _with_template_ends(found, model)
        unchecked = (
            f"no tokenizer was found, so the token ids in {own} were not checked against tokens"
        )
        return Generation(found.file, found.notes, (*found.warnings, unchecked))
    if olmo:
        absent = "no generation_config.json: OLMo's end tokens need a tokenizer (--tokenizer DIR)"
        return Generation(None, warnings=(absent,))
    return _with_template_ends(_from_ids(model), model)


def _own_file(model: Model) -> Path | None:
    files = (place / GENERATION_NAME for place in model.places)
    return next((path for path in files if path.is_file()), None)


def _olmo_as_found(model: Model, tokenizer: Tokenizer) -> Generation:
    """OLMo's rule for a chat model whose tokenizer has both ends; else the source's own settings.

    The tokenizer of OLMo 1 and OLMoE has no ``<|im_end|>``, and a base model ends at ``<|endoftext|>`` alone.
    """
    absent = [token for token in OLMO_END_TOKENS if tokenizer.id_of(token) is None]
    template = tokenizer.chat_template
    if template is not None and not absent:
        return _olmo(model, required=False)
    reason = f"the tokenizer has no {absent[0]}" if absent else "there is no chat template"
    notes = [f"OLMo's rule of two end tokens was not applied, because {reason}"]
    written = [token for token in absent if template is not None and token in template]
    warnings = [
        f"the chat template writes {token}, which is not a token of the tokenizer in"
        f" {tokenizer.directory}: the model cannot stop there"
        for token in written
    ]
    own = _own_file(model)
    if own is not None:
        try:
            found = _given(own, model)
        except UsageError as error:
            warnings.append(f"{own} was not used: {error.fact}")
        else:
            return Generation(found.file, (*notes, *found.notes), (*warnings, *found.warnings))
    # OLMo has no beginning of a text, whatever the tokenizer calls its bos token.
    made = _from_ids(model, roles=("eos", "pad"))
    return Generation(made.file, (*notes, *made.notes), (*warnings, *made.warnings))


def _with_template_ends(chosen: Generation, model: Model) -> Generation:
    """The settings with the tokens at which the chat template closes a turn among the end tokens.

    A template of ``--chat-template`` changes every setting. The tokenizer's own template changes those that
    no generation config states; beside a stated one, a token that is not among its ends is a warning.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None or chosen.file is None:
        return chosen
    data, notes, warnings = json.loads(chosen.file.read()), [*chosen.notes], [*chosen.warnings]
    found = data.get("eos_token_id")
    held = found if isinstance(found, list) else [] if found is None else [found]
    given, source = tokenizer.template is not None, chosen.file.source
    named = tokenizer.template or f"the chat template of {tokenizer.directory}"
    try:
        closing = closing_tokens(tokenizer) if given else own_closing_tokens(tokenizer, held)
    except UsageError as error:
        if given:
            raise
        notes.append(f"the end tokens were not compared with the chat template: {error.fact}")
        return Generation(chosen.file, tuple(notes), chosen.warnings)
    if given and not closing:
        warnings.append(
            f"no token closes an assistant's turn in {named}: the end tokens were not changed"
        )
    new = {token: number for token, number in closing.items() if number not in held}
    listed = ", ".join(f"{token} ({number})" for token, number in new.items())
    if new and source is not None and not given:
        warnings.append(
            f"{named} closes a turn with {listed}, which is no end token in {source}: the model may not"
            " stop there; add it to eos_token_id of a copy, and pass --generation-config COPY"
        )
    elif new:
        for token, number in new.items():
            _check_row(f"{token} of the chat template", number, model.rows, tokenizer.directory)
        ends = [*new.values(), *held]
        data["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        notes.append(f"eos_token_id also has {listed}, which closes a turn in {named}")
        return Generation(_written(data), tuple(notes), tuple(warnings))
    return Generation(chosen.file, tuple(notes), tuple(warnings))


def _olmo(model: Model, *, required: bool = True) -> Generation:
    if model.tokenizer is None:
        raise MissingAsset(
            "OLMo's generation config needs the ids of "
            f"{' and '.join(OLMO_END_TOKENS)}, and no tokenizer was found",
            hint=f"Pass --tokenizer DIR, or {_OTHER_MODES}",
        )
    ends = [_required_id(token, model.tokenizer) for token in OLMO_END_TOKENS]
    for token, number in zip(OLMO_END_TOKENS, ends, strict=True):
        _check_row(f"{token} of the tokenizer", number, model.rows, model.tokenizer.directory)
    data: dict[str, Any] = {"eos_token_id": ends}
    warnings: list[str] = []
    pad = model.tokenizer.special("pad")
    if pad is not None:
        padding = model.tokenizer.id_of(pad)
        if padding is None and required:
            raise _no_token(pad, model.tokenizer)
        if padding is None:
            warnings.append(_unknown_token("pad", pad))
        elif _is_row(padding, model.rows):
            data["pad_token_id"] = padding
        else:
            warnings.append(_pad_left_out(f"id {padding} of the padding token {pad}", model.rows))
    note = (
        f"generation_config.json by OLMo's rule: greedy, ends at {' or '.join(OLMO_END_TOKENS)}"
        f" (ids {', '.join(map(str, ends))})"
    )
    return Generation(_written(data), notes=(note,), warnings=tuple(warnings))


def _required_id(token: str, tokenizer: Tokenizer) -> int:
    number = tokenizer.id_of(token)
    if number is None:
        raise _no_token(token, tokenizer)
    return number


def _no_token(token: str, tokenizer: Tokenizer) -> MissingAsset:
    return MissingAsset(
        f"the tokenizer has no token {token}, which OLMo's generation config needs",
        path=tokenizer.directory,
        hint="Pass --generation-config auto, which takes the end tokens of this tokenizer, or"
        " --tokenizer DIR with the tokenizer of the training run.",
    )


def _unknown_token(role: Role, token: str) -> str:
    return f"the tokenizer's {role} token is {token}, which is not in its vocabulary"


def _from_ids(model: Model, roles: tuple[Role, ...] = _ROLES) -> Generation:
    """A generation config with the tokenizer's special tokens, or with those of config.json."""
    data: dict[str, Any] = {}
    warnings: list[str] = []
    origins: list[str] = []
    for role in roles:
        key = f"{role}_token_id"
        value: Any = _tokenizer_id(role, model.tokenizer, warnings)
        origin = "config.json" if value is None else "the tokenizer"
        if value is None:
            value = text_value(model.config, key)
        numbers = [number for _, number in _ids({key: value}, model.config_path)]
        if role == "pad" and not all(_is_row(number, model.rows) for number in numbers):
            warnings.append(_pad_left_out(f"the padding id {value} of {origin}", model.rows))
            continue
        for number in numbers:
            _check_row(f"{key} of {origin}", number, model.rows, model.config_path)
        if numbers:
            data[key] = value
            origins.append(f"{key} of {origin}")
    for key in _ONLY_IN_CONFIG:
        value = text_value(model.config, key)
        if value is not None:
            data[key] = value
            origins.append(f"{key} of config.json")
    if not data:
        return Generation(None, notes=("no generation_config.json: no special tokens are known",))
    note = f"generation_config.json made from {', '.join(origins)}"
    return Generation(_written(data), notes=(note,), warnings=tuple(warnings))


def _tokenizer_id(role: Role, tokenizer: Tokenizer | None, warnings: list[str]) -> int | None:
    token = tokenizer.special(role) if tokenizer is not None else None
    if tokenizer is None or token is None:
        return None
    number = tokenizer.id_of(token)
    if number is None:
        warnings.append(_unknown_token(role, token))
    return number


def _pad_left_out(what: str, rows: int | None) -> str:
    """The warning for a padding id outside the embedding: -1, or a token added without a resize."""
    extent = f"the {rows} rows of the embedding" if rows is not None else "any embedding"
    return f"{what} lies outside {extent}: pad_token_id was left out of generation_config.json"


def _named_file(named: str) -> Path:
    path = as_path(named)
    file = path / GENERATION_NAME if path.is_dir() else path
    if not file.is_file():
        raise MissingAsset(
            "--generation-config is neither a mode nor a generation config on this machine",
            path=file,
            hint=f"Pass {', '.join(MODES)}, a file, or a directory that holds {GENERATION_NAME}.",
        )
    return file


def _given(path: Path, model: Model) -> Generation:
    """A given generation config, unchanged, after a check of its ids."""
    data = read_object(path)
    warnings: list[str] = []
    known = model.tokenizer.id_count if model.tokenizer is not None else None
    for key, number in _ids(data, path):
        if key == "pad_token_id" and number < 0:
            warnings.append(
                f"{path} has pad_token_id {number}, which is not a row of any embedding"
            )
            continue
        _check_row(key, number, model.rows, path)
        if known is not None and number >= known:
            warnings.append(
                f"{path} has {key} {number}, but the tokenizer's ids end at {known - 1}"
            )
    flags = _sampling_flags(data)
    if flags:
        warnings.append(
            f"{path} sets {', '.join(flags)} without do_sample; it was copied unchanged, but"
            " transformers refuses to save it again after a change"
        )
    file = AssetFile(GENERATION_NAME, source=path)
    return Generation(
        file, notes=(f"generation_config.json copied from {path}",), warnings=tuple(warnings)
    )


def _ids(data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, int]]:
    """Every id that is set, with its key.

    Raises:
        UsageError: an id is not a whole number; other converters write null for an unknown token.
    """
    for key in _CHECKED_IDS:
        value = data.get(key)
        if value is None:
            continue
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int) or isinstance(number, bool):
                raise UsageError(
                    f"{key} holds {number!r}, which is not a token id",
                    path=path,
                    hint=f"Correct the file, or {_OTHER_MODES}",
                )
            yield key, number


def _check_row(what: str, number: int, rows: int | None, path: Path) -> None:
    if not _is_row(number, rows):
        extent = f"has {rows} rows" if rows is not None else "has no negative rows"
        raise UsageError(
            f"{what} is id {number}, but the model's embedding {extent}",
            path=path,
            hint=f"Pass the tokenizer of the training run, --tokenizer DIR, or {_OTHER_MODES}",
        )


def _is_row(number: int, rows: int | None) -> bool:
    return number >= 0 and (rows is None or number < rows)


def _sampling_flags(data: Mapping[str, Any]) -> list[str]:
    if data.get("do_sample") is True:
        return []
    return [key for key, off in _SAMPLING_OFF.items() if data.get(key) not in (None, off)]


def _written(data: Mapping[str, Any]) -> AssetFile:
    return AssetFile(GENERATION_NAME, content=json_bytes(data))
