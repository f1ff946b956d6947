"""The files beside the weights of a live model: its config, tokenizer and adapter config.

Owns the step from live objects to the files that ``hub`` and ``model.adapter`` find near a checkpoint, so
that a save and a conversion treat them alike. The files are in a temporary directory, which is removed
after the save. The objects write the files themselves; no object is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import MissingAsset
from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.storage.temporary import TemporaryFolder
from ckpt_tools.training.wrappers import class_name, innermost


@dataclass(frozen=True)
class Beside:
    """Where the files are.

    Attributes:
        config: ``config.json`` or its directory.
        tokenizer: the tokenizer's directory.
        adapter_configs: a directory with a folder for each adapter.
    """

    config: Path | None
    tokenizer: Path | None
    adapter_configs: Path | None


@contextmanager
def beside(
    module: Any, *, config: Any, tokenizer: Any, is_adapter: bool, is_needed: bool
) -> Iterator[Beside]:
    """The files that belong to a module.

    Args:
        module: the model that is written, without wrappers.
        config: a config, its file or directory; None for the model's own.
        tokenizer: a tokenizer or processor, its directory, or None.
        is_adapter: whether adapters are written: the module is a PEFT model then, and the config is that
            of its base.
        is_needed: whether there must be a config.

    Raises:
        MissingAsset: there is none.
    """
    with TemporaryFolder() as home:
        model = innermost(module.get_base_model()) if is_adapter else module
        yield Beside(
            _config(model, config, home, is_needed=is_needed),
            _tokenizer(tokenizer, home / "tokenizer"),
            _adapter_configs(module, home / "adapters") if is_adapter else None,
        )


def _config(model: Any, config: Any, home: Path, *, is_needed: bool) -> Path | None:
    if _is_path(config):
        return Path(config)
    own = getattr(model, "config", None) if config is None else config
    if own is None or not hasattr(own, "to_json_string"):
        if not is_needed:
            return None
        raise MissingAsset(
            f"a {class_name(model)} has no config",
            hint="Pass config= the config of a transformers model or its directory, attribute= the part "
            "that is one, or weights_only=True.",
        )
    data = json.loads(own.to_json_string(use_diff=True))
    if getattr(model, "config", None) is own:
        # As save_pretrained of the model writes it; a config alone may name another class or none.
        data["architectures"] = [class_name(model)]
    path = home / "config.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    # A generation config that was made from the config adds nothing to it.
    if generation is not None and not getattr(generation, "_from_model_config", True):
        text = generation.to_json_string(use_diff=True)
        (home / "generation_config.json").write_text(text, encoding="utf-8")
    return path


def _tokenizer(tokenizer: Any, home: Path) -> Path | None:
    if tokenizer is None or _is_path(tokenizer):
        return None if tokenizer is None else Path(tokenizer)
    tokenizer.save_pretrained(str(home))
    return home


def _adapter_configs(module: Any, home: Path) -> Path:
    """The config of every adapter, as PEFT's ``save_pretrained`` of the model writes it."""
    for name, config in module.peft_config.items():
        mapping = None
        if config.task_type is None:
            base = module._get_base_model_class(is_prompt_tuning=config.is_prompt_learning)
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        path = home / name / ADAPTER_CONFIG
        config.save_pretrained(str(path.parent), auto_mapping_dict=mapping)
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("base_model_name_or_path") is None:
            base = getattr(module.get_base_model(), "name_or_path", None)
            data["base_model_name_or_path"] = base or None
            path.write_text(json.dumps(data), encoding="utf-8")
    return home


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))
