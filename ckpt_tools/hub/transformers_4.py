"""Owns ``--compat transformers-4``: the same files in the form that transformers 4.57 and 5 both read.

transformers 5 states rope in ``rope_parameters``, the dtype in ``dtype``, names tokenizer classes that
version 4 lacks, and keeps the config of image and sound processors in ``processor_config.json``. Version 4
takes defaults of its own for what it does not find, and fails on the tokenizer. Here the keys of version 4
are added beside those of version 5. What version 4.57 states (model types, keys of rope, tokenizer classes)
lies in ``tables/transformers-4.json``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.hub.files import AssetFile, json_bytes

NAME = "transformers-4"
COMPATIBLE = (NAME,)

_ROPE = "rope_parameters"
_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR_CONFIG = "processor_config.json"
_ANY_FAST = "PreTrainedTokenizerFast"

# Configs inside processor_config.json, and the files in which version 4.57.6 looks first. It also reads them
# inside processor_config.json, but `get_image_processor_config` reads the file alone
# (models/auto/image_processing_auto.py).
_PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
# Version 4.57 checks that rope_scaling has these keys and no others
# (Phi3Config._rope_scaling_validation, Phi4MultimodalConfig._rope_scaling_validation).
_THREE_KEYS = ("phi3", "phi4_multimodal")
# Version 4.57 checks that rope_scaling has these two keys, for linear and dynamic scaling alone
# (`_rope_scaling_validation` of these configs).
_TWO_KEYS = ("chameleon", "fuyu", "olmo", "olmo2")
# Configs of version 5 that version 4.57 cannot read, and the keys that it stumbles over.
_UNREADABLE = {
    "csm": "tie_word_embeddings",
    "dbrx": "attn_config",
    "lightglue": "keypoint_detector_config",
    "mlcd": "model_type",
    "mlcd_vision_model": "model_type",
}
# Names of kinds of layers that version 5 changed.
_KINDS_OF_LAYERS: Mapping[str, Mapping[str, str]] = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
    "zamba": {"linear_attention": "mamba"},
    "zamba2": {"linear_attention": "mamba"},
}
# Version 4.57 rotates sliding layers without scaling, by the same rope_theta
# (modeling_olmo3.py, Olmo3Model.rotary_embs).
_ONE_THETA = ("olmo3",)
# Numbers that version 4.57 has in its code and reads from no config (configuration_bamba.py,
# rotary embeddings of vision encoders).
_FIXED: Mapping[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
_FIXED_OF: Mapping[str, Mapping[str, Any]] = {"bamba": {"partial_rotary_factor": 0.5}}


@dataclass(frozen=True)
class Table:
    """What transformers 4.57 states of itself.

    Attributes:
        version: the version that was read.
        rope_types: the kinds of rope that it computes.
        tokenizer_classes: the classes that ``AutoTokenizer`` knows.
        rope_keys: for each model type, the keys of rope that its config takes.
        renamed: for each model type, the names of keys that version 5 changed, and the new ones.
        sub_configs: for each model type, the model type of each part of its config.
    """

    version: str
    rope_types: frozenset[str]
    tokenizer_classes: frozenset[str]
    rope_keys: Mapping[str, frozenset[str]]
    renamed: Mapping[str, Mapping[str, str]]
    sub_configs: Mapping[str, Mapping[str, str]]


@lru_cache(maxsize=1)
def table() -> Table:
    """The table of transformers 4.57."""
    path = Path(__file__).with_name("tables") / f"{NAME}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    return Table(
        data["version"],
        frozenset(data["rope_types"]),
        frozenset(data["tokenizer_classes"]),
        {name: frozenset(keys.split()) for name, keys in data["rope_keys"].items()},
        data["renamed"],
        data["sub_configs"],
    )


def for_transformers_4(
    config: Mapping[str, Any], path: Path, files: Sequence[AssetFile]
) -> tuple[dict[str, Any], tuple[AssetFile, ...], tuple[str, ...]]:
    """The config and the files beside it, in the form that transformers 4.57 reads too.

    Args:
        config: the content of ``config.json``.
        path: where it came from, for errors.
        files: the other files, each name once.

    Returns:
        The config, the files without it, and notes.

    Raises:
        UnsupportedLayout: version 4.57 has no such model, kind of rope or tokenizer.
    """
    changed = copy.deepcopy(dict(config))
    model_type = str(changed.get("model_type"))
    if "auto_map" not in changed and model_type not in table().rope_keys:
        _refuse(f"transformers {table().version} has no model type {model_type!r}", path)
    if model_type in _UNREADABLE:
        _refuse(
            f"transformers {table().version} cannot read the {_UNREADABLE[model_type]} that transformers 5 "
            f"writes for {model_type}",
            path,
        )
    if _hides_scale(changed, model_type):
        _refuse(
            f"transformers {table().version} scales the output of the decoder of {model_type} where "
            "tie_word_embeddings is true, and transformers 5 states that apart",
            path,
        )
    _convert(changed, model_type, path)
    note = f"config.json states rope and dtype as transformers {table().version} reads them"
    beside, notes = files_for_transformers_4(files)
    return changed, beside, (note, *notes)


def files_for_transformers_4(
    files: Sequence[AssetFile],
) -> tuple[tuple[AssetFile, ...], tuple[str, ...]]:
    """Files of a tokenizer or processor in the form that transformers 4.57 reads too, and notes.

    Raises:
        UnsupportedLayout: version 4.57 has no such tokenizer.
    """
    notes: list[str] = []
    named = {file.name: file for file in files}
    if _TOKENIZER_CONFIG in named:
        named[_TOKENIZER_CONFIG] = _tokenizer_config(named[_TOKENIZER_CONFIG], named, notes)
    if _PROCESSOR_CONFIG in named:
        named |= _processor_configs(named, notes)
    return tuple(named[name] for name in sorted(named)), tuple(notes)


def _refuse(fact: str, path: Path | None) -> NoReturn:
    raise UnsupportedLayout(
        fact,
        path=path,
        hint=f"Leave out --compat {NAME}. The directory is then one for transformers 5.",
    )


def _convert(config: dict[str, Any], model_type: str, path: Path) -> None:
    """Add the keys of version 4 to a config and to the configs inside it."""
    if isinstance(config.get("dtype"), str):
        config["torch_dtype"] = config["dtype"]
    for key in ("layer_types", "layers_block_type"):
        kinds = _KINDS_OF_LAYERS.get(model_type)
        if kinds is not None and isinstance(config.get(key), list):
            config[key] = [kinds.get(kind, kind) for kind in config[key]]
    for key, value in config.items():
        config[key] = _as_number(value)
    for old, new in table().renamed.get(model_type, {}).items():
        if config.get(new) is not None:
            config.setdefault(old, config[new])
    keys = table().rope_keys.get(model_type)
    if isinstance(config.get(_ROPE), Mapping):
        if keys is not None:
            _add_rope(config, model_type, keys, path)
        elif "auto_map" not in config:
            _refuse(
                f"transformers {table().version} has no model type {model_type!r}, and the config states its "
                "rope",
                path,
            )
    parts = table().sub_configs.get(model_type, {})
    for key, part in config.items():
        if isinstance(part, dict) and ("model_type" in part or _ROPE in part):
            _convert(part, parts.get(key, str(part.get("model_type"))), path)


def _hides_scale(config: Mapping[str, Any], model_type: str) -> bool:
    """Whether version 4 would scale, and version 5 would not, or might not."""
    if not config.get("tie_word_embeddings", True):
        return False
    return model_type in ("mt5", "umt5") or config.get("scale_decoder_outputs") is False


def _as_number(value: Any) -> Any:
    """A float that version 5 writes as an object, ``{"__float__": "Infinity"}``, as a number."""
    if isinstance(value, list):
        return [_as_number(each) for each in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _add_rope(config: dict[str, Any], model_type: str, keys: frozenset[str], path: Path) -> None:
    """Add the keys of rope of version 4.

    Raises:
        UnsupportedLayout: they cannot state it.
    """
    rope = config[_ROPE]
    of_layers = {name: part for name, part in rope.items() if isinstance(part, Mapping)}
    full = of_layers.get("full_attention", rope) if of_layers else rope
    sliding = of_layers.get("sliding_attention", full)
    if set(of_layers) - {"full_attention", "sliding_attention"}:
        _refuse(f"transformers {table().version} has one rope for all layers of {model_type}", path)
    stated = dict(_stated(full, model_type, keys, path))
    if "global_rope_theta" in keys:
        stated |= {
            "global_rope_theta": full.get("rope_theta"),
            "local_rope_theta": sliding.get("rope_theta"),
        }
        if _scaling(full) or _scaling(sliding):
            _refuse(f"transformers {table().version} has no scaling of rope for {model_type}", path)
    elif "rope_local_base_freq" in keys:
        stated["rope_local_base_freq"] = sliding.get("rope_theta")
        if of_layers and _scaling(sliding):
            _refuse(
                f"transformers {table().version} has no scaling of rope in sliding layers of {model_type}",
                path,
            )
    elif of_layers and model_type in _ONE_THETA:
        if _scaling(sliding) or sliding.get("rope_theta") != full.get("rope_theta"):
            _refuse(
                f"transformers {table().version} has one rope_theta for all layers of {model_type}, and no "
                "scaling in sliding layers",
                path,
            )
    elif of_layers and any(part != full for part in of_layers.values()):
        _refuse(f"transformers {table().version} has one rope for all layers of {model_type}", path)
    config.update(stated)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What ``rope_scaling`` has to say; empty for rope without scaling."""
    apart = ("rope_theta", "partial_rotary_factor")
    rest = {key: value for key, value in rope.items() if key not in apart}
    plain = rest.get("rope_type", "default") == "default" and not set(rest) - {"rope_type", "type"}
    return {} if plain else rest


def _stated(
    rope: Mapping[str, Any], model_type: str, keys: frozenset[str], path: Path
) -> Iterator[tuple[str, Any]]:
    """The keys of version 4 for one rope.

    Raises:
        UnsupportedLayout: the config of version 4 has no key for one.
    """
    version = table().version
    kind = rope.get("rope_type", "default")
    scaling = _scaling(rope)
    if scaling and kind == "axial" and not set(scaling) - {"rope_type", "type"}:
        scaling = {}  # The rotary embedding of vision encoders: version 4 has it in its code.
    if scaling and kind not in table().rope_types:
        _refuse(f"transformers {version} computes no rope of type {kind!r}", path)
    if scaling and "rope_scaling" not in keys:
        _refuse(f"transformers {version} has no scaling of rope for {model_type}", path)
    if scaling and model_type in _THREE_KEYS:
        scaling = {"type": kind} | {
            key: scaling.get(key) for key in ("short_factor", "long_factor")
        }
    if scaling and model_type in _TWO_KEYS:
        if kind not in ("linear", "dynamic"):
            _refuse(
                f"transformers {version} computes no rope of type {kind!r} for {model_type}", path
            )
        scaling = {"type": kind, "factor": scaling.get("factor")}
    if "rope_scaling" in keys:
        yield "rope_scaling", scaling or None
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope" and original is not None:
        yield "original_max_position_embeddings", original
    fixed = {**_FIXED, **_FIXED_OF.get(model_type, {})}
    spellings = {
        "rope_theta": (
            "rope_theta",
            "rotary_emb_base",
            "rotary_embedding_base",
            "global_rope_theta",
        ),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    }
    for name, known in spellings.items():
        value = rope.get(name)
        spelled = next((key for key in known if key in keys), None)
        if value is None:
            continue
        if spelled is not None:
            yield spelled, value
        elif value != fixed[name]:
            _refuse(
                f"transformers {version} computes {model_type} with {name} {fixed[name]}, and the config "
                f"states {value}",
                path,
            )


def _tokenizer_config(
    file: AssetFile, named: Mapping[str, AssetFile], notes: list[str]
) -> AssetFile:
    """``tokenizer_config.json`` with a class that version 4 has.

    Raises:
        UnsupportedLayout: only version 5 has a class for it.
    """
    data = json.loads(file.read())
    before = copy.deepcopy(data)
    name = data.get("tokenizer_class")
    fast = "tokenizer.json" in named
    known = table().tokenizer_classes | {_ANY_FAST}
    is_known = name is None or name in known or f"{name}Fast" in known
    # A file of version 5 states its backend. Its tokenizer.json is complete; classes of version 4 would
    # change it again.
    by_5 = "backend" in data
    if fast and (by_5 or not is_known) and "auto_map" not in data and name != _ANY_FAST:
        data["tokenizer_class"] = _ANY_FAST
        notes.append(
            f"tokenizer_class set to {_ANY_FAST} (was {name}): it reads tokenizer.json as it is"
        )
    elif not is_known and "auto_map" not in data:
        _refuse(
            f"transformers {table().version} has no tokenizer class {name}, and there is no tokenizer.json",
            file.source,
        )
    extra = data.get("extra_special_tokens")
    if isinstance(extra, list):
        data.pop("extra_special_tokens")
        data["additional_special_tokens"] = extra
        notes.append("extra_special_tokens written as additional_special_tokens")
    return file if data == before else AssetFile(file.name, content=json_bytes(data))


def _processor_configs(named: Mapping[str, AssetFile], notes: list[str]) -> dict[str, AssetFile]:
    """The config of each processor in the file where version 4 looks for it first."""
    data = json.loads(named[_PROCESSOR_CONFIG].read())
    made: dict[str, AssetFile] = {}
    for key, name in _PROCESSORS.items():
        part = data.get(key)
        if isinstance(part, dict) and name not in named and name not in made:
            whole = {**part, "processor_class": data.get("processor_class")}
            made[name] = AssetFile(name, content=json_bytes(whole))
            del data[key]
            notes.append(f"{key} of {_PROCESSOR_CONFIG} written as {name}")
    if made:
        made[_PROCESSOR_CONFIG] = AssetFile(_PROCESSOR_CONFIG, content=json_bytes(data))
    return made
