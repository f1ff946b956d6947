"""Owns ``config.json``: the search for a model's config, and the values in it that the conversion decides.

These values are dtype, vocabulary size, tying and, if it is absent, the class. Settings that a run made for
training alone are put right. All other values are kept as they were read. A number that neither the config
nor the tensors hold is never filled in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub import architectures, olmo_core
from ckpt_tools.hub.files import read_object
from ckpt_tools.hub.links import refuse_leaving
from ckpt_tools.hub.sources import AssetOptions, hub_hint, nearby
from ckpt_tools.tensors.dtypes import DType

CONFIG_NAME = "config.json"

# Sub-configs that describe the language model inside a composite one.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_NOT_MODELS = ("quantization_config", "compression_config", "generation_config")

# In T5 and similar models tie_word_embeddings=false also means that the decoder's output is not scaled
# before the head, so writing it would change what the model computes.
TIE_SCALES_OUTPUT = (
    "longt5",
    "mt5",
    "pop2piano",
    "switch_transformers",
    "t5",
    "udop",
    "umt5",
)

Shapes = Mapping[str, tuple[DType, tuple[int, ...]]]


@dataclass(frozen=True)
class ConfigSource:
    """A model config as it was found.

    Attributes:
        path: the file.
        data: the content of the file.
        is_named: whether ``--config`` names it.

    Raises:
        DamagedCheckpoint: its ``architectures`` are not a list of names.
    """

    path: Path
    data: Mapping[str, Any]
    is_named: bool = False

    def __post_init__(self) -> None:
        names = self.data.get("architectures")
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not is_list:
            raise DamagedCheckpoint(
                "its `architectures` are not a list of names",
                path=self.path,
                hint="Restore the file as save_pretrained of the model wrote it.",
            )


@dataclass(frozen=True)
class FinishedConfig:
    """A model config that fits the output.

    Attributes:
        data: the content of the output's ``config.json``.
        notes: what was changed or decided.
        warnings: what the user should check.
    """

    data: dict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def find_config(options: AssetOptions) -> ConfigSource:
    """The model config: ``--config``, else the nearest one.

    A ``config.json`` without ``model_type`` and ``architectures``, such as DeepSpeed's, is not a model
    config. The search skips it, and ``--config`` with it is refused. A config of OLMo-core is translated.

    Raises:
        MissingAsset: there is none; every place looked at is named.
        UsageError: it is a link that leads out of its directory.
        DamagedCheckpoint: the file is not a JSON object.
    """
    if options.config is not None:
        if options.config.is_dir() and not options.follow_links:
            refuse_leaving(options.config / CONFIG_NAME, options.config)
        return replace(_named_config(options.config), is_named=True)
    places = []
    for directory in nearby(options):
        path = directory / CONFIG_NAME
        if not path.is_file():
            places.append(str(directory))
            continue
        if not options.follow_links:
            refuse_leaving(path, directory)
        data = _model_config(read_object(path), path)
        if data is not None:
            return ConfigSource(path, data)
        places.append(f"{directory} (its config.json is not a model config)")
    raise MissingAsset(
        f"no config.json of a model was found; searched: {', '.join(places) or 'no directory'}",
        hint="Pass --config FILE|DIR or --like DIR, or pass --weights-only to write the weights alone.",
    )


def _model_config(data: dict[str, Any], path: Path) -> dict[str, Any] | None:
    if olmo_core.is_experiment(data):
        return olmo_core.hub_config(data, path)
    return data if _is_model_config(data) else None


def _named_config(named: Path) -> ConfigSource:
    path = named / CONFIG_NAME if named.is_dir() else named
    if not path.is_file():
        raise MissingAsset(
            "--config is neither a file nor a directory with a config.json",
            path=path,
            hint="Pass --config with a file, or with a directory that holds config.json."
            f"{hub_hint('--config', named)}",
        )
    data = _model_config(read_object(path), path)
    if data is None:
        raise MissingAsset(
            "--config is not a model config: model_type and architectures are missing",
            path=path,
            hint="Pass --config with the config.json of the model, as save_pretrained writes it.",
        )
    return ConfigSource(path, data)


def _is_model_config(data: Mapping[str, Any]) -> bool:
    named = data.get("model_type"), data.get("architectures")
    return isinstance(named[0], str) or (isinstance(named[1], list) and bool(named[1]))


def of_attribute(source: ConfigSource, path: str) -> ConfigSource:
    """The config of one attribute of a composite model.

    A composite config may hold the configs of its parts (``policy``, ``policy_config``). A config without
    them is taken for the attribute's own.
    """
    data: Mapping[str, Any] = source.data
    for segment in path.split("."):
        for key in (segment, f"{segment}_config"):
            part = data.get(key)
            if isinstance(part, Mapping) and "model_type" in part:
                data = part
                break
    return replace(source, data=data)


def finish(source: ConfigSource, tensors: Shapes, *, dtype: DType, untied: bool) -> FinishedConfig:
    """The config with the values that follow from the output.

    Args:
        source: the config as it was found.
        tensors: name to dtype and shape of every output tensor.
        dtype: dtype of the output as a whole.
        untied: whether tied names hold different values and both were written.

    Raises:
        MissingAsset: ``architectures`` is missing, and the tensors do not determine it.
    """
    config = copy.deepcopy(dict(source.data))
    notes: list[str] = []
    warnings: list[str] = []
    if untied:
        _untie(config, notes, warnings)
    _set_architectures(config, source.path, tensors, notes, warnings)
    _set_dtype(config, dtype, notes)
    _set_vocabulary(config, tensors, notes, warnings)
    _clear_leftovers(config, source, notes, warnings)
    return FinishedConfig(config, tuple(notes), tuple(warnings))


def embedding_rows(tensors: Shapes) -> int | None:
    """Rows of the input embedding of tokens; None if there is none, or if several differ."""
    shapes = [tensors[name][1] for name in architectures.input_embeddings(tensors)]
    rows = {shape[0] for shape in shapes if len(shape) == 2}
    return rows.pop() if len(rows) == 1 else None


def text_value(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or else of the language model inside it; None if neither has it."""
    for place in (config, *text_configs(config)):
        if place.get(key) is not None:
            return place[key]
    return None


def text_configs(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sub-configs that describe a language model, outermost first."""
    for key, nested in _sub_configs(config):
        if key in _TEXT_CONFIGS:
            yield nested


def _sub_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in config.items():
        if not isinstance(value, dict) or key in _NOT_MODELS:
            continue
        if key.endswith("_config") or "model_type" in value:
            yield key, value
            yield from _sub_configs(value)


def _untie(config: dict[str, Any], notes: list[str], warnings: list[str]) -> None:
    if config.get("model_type") in TIE_SCALES_OUTPUT:
        warnings.append(
            "the tied tensors hold different values, but tie_word_embeddings was not changed:"
            f" in {config['model_type']} models it also scales the output; transformers 5 detects that"
            " the tensors differ and keeps both, transformers 4 ties them again"
        )
        return
    for place in (config, *text_configs(config)):
        place["tie_word_embeddings"] = False
    for _, nested in _sub_configs(config):
        if "tie_word_embeddings" in nested:
            nested["tie_word_embeddings"] = False
    notes.append("tie_word_embeddings set to false: the tied tensors hold different values")


def _set_architectures(
    config: dict[str, Any], path: Path, tensors: Shapes, notes: list[str], warnings: list[str]
) -> None:
    names = config.get("architectures")
    if names:
        odd = architectures.contradiction(str(names[0]), tensors)
        if odd is not None:
            warnings.append(
                f"the class in config.json is {names[0]}, which has no {odd}, but the tensors hold {odd};"
                " pass the config of the trained model: --config FILE|DIR"
            )
        return
    model_type = str(config.get("model_type"))
    if "auto_map" in config or not architectures.is_known(model_type):
        warnings.append(
            f"config.json has no architectures, and model type {model_type!r} has custom code or is"
            " unknown to the installed transformers, so architectures was not written"
        )
        return
    tied = config.get("tie_word_embeddings")
    name, evidence = architectures.infer(model_type, tensors, tied=tied, path=path)
    config["architectures"] = [name]
    notes.append(f"architectures set to {name}: model type {model_type!r}, and {evidence}")


def _set_dtype(config: dict[str, Any], dtype: DType, notes: list[str]) -> None:
    before = config.get("dtype", config.get("torch_dtype"))
    config["dtype"] = dtype.name
    for place in (config, *(nested for _, nested in _sub_configs(config))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(place.get(key), str):
                place[key] = dtype.name
    if before != dtype.name:
        notes.append(f"dtype set to {dtype.name} (was {before or 'absent'})")


def _set_vocabulary(
    config: dict[str, Any], tensors: Shapes, notes: list[str], warnings: list[str]
) -> None:
    rows = embedding_rows(tensors)
    if rows is None:
        return
    texts = list(text_configs(config))
    # As in `resize_token_embeddings`: if a language model has a value of its own, the outer value is not
    # changed (PaliGemma's, for example).
    places = [place for place in texts if "vocab_size" in place]
    if not places:
        places = [config] if "vocab_size" in config or not texts else texts[:1]
    for place in places:
        before = place.get("vocab_size")
        if before != rows:
            place["vocab_size"] = rows
            text = f"vocab_size set to {rows}, the rows of the embedding (was {before})"
            (notes if before is None else warnings).append(text)


def _clear_leftovers(
    config: dict[str, Any], source: ConfigSource, notes: list[str], warnings: list[str]
) -> None:
    """Put right what a training run set for itself; in a config that was named, only name it."""
    found = [
        (place, key)
        for place in (config, *(nested for _, nested in _sub_configs(config)))
        for key, is_leftover in _LEFTOVERS.items()
        if key in place and is_leftover(place[key])
    ]
    names = config.get("architectures") or ()
    if any(architectures.never_generates(str(name)) for name in names):
        found = [(place, key) for place, key in found if key != "use_cache"]
    for place, key in found:
        text = f"{key} {json.dumps(place[key])} was for training alone"
        if source.is_named:
            warnings.append(f"{text}; it was kept, because --config names this config")
        elif key == "use_cache":
            place[key] = True
            notes.append(f"{text}; set to true")
        else:
            del place[key]
            notes.append(f"{text}; left out of config.json")


def _is_local(name: object) -> bool:
    """Whether a name is a path: one of the Hub has at most one slash, between two words."""
    if not isinstance(name, str) or not name:
        return False
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


_LEFTOVERS: Mapping[str, Callable[[object], bool]] = {
    "use_cache": lambda value: value is False,
    "gradient_checkpointing": lambda value: value is True,
    "gradient_checkpointing_kwargs": lambda value: value is not None,
    "_name_or_path": _is_local,
    "_attn_implementation_autoset": lambda value: True,
}
