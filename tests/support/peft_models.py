"""The adapted models of the PEFT fixtures, made again with their live values, and merged by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.models import State, of_config


def adapter_directories(source: Path) -> dict[str, Path]:
    """For each adapter of a fixture, the directory that PEFT wrote of it."""
    names: Mapping[str, str] = json.loads((source / "facts.json").read_text())["adapters"]
    truth = source / "truth" / "adapter"
    return {name: truth if name == "default" else truth / name for name in names}


def live_adapted(source: Path, state: State | None = None) -> Any:
    """The adapted model of a fixture: PEFT's, of its configs, with every live value.

    Args:
        source: the fixture.
        state: other values under the same names.
    """
    from peft import PeftConfig, get_peft_model

    base = of_config(source / "hf")
    configs = {
        name: PeftConfig.from_pretrained(str(directory))
        for name, directory in adapter_directories(source).items()
    }
    (first, config), *others = configs.items()
    base.name_or_path = config.base_model_name_or_path
    model = get_peft_model(base, config, adapter_name=first, autocast_adapter_dtype=False)
    for name, other in others:
        model.add_adapter(name, other, autocast_adapter_dtype=False)
    values = load_file(source / "truth" / "model.safetensors") if state is None else state
    assert model.state_dict().keys() == values.keys()
    # Tied parameters stay one, as they were live.
    for name, parameter in model.named_parameters():
        parameter.data = values[name].clone()
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])
    return model


def merged_by_peft(model: Any, adapter: str, dtype: torch.dtype) -> Any:
    """PEFT's ``merge_and_unload`` of one adapter, computed in ``dtype``; all parameters have it then."""
    _untie(model.get_base_model())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.set_adapter(adapter)
    return model.merge_and_unload(adapter_names=[adapter])


def rounded(source: Path, merged: Any, dtype: torch.dtype) -> Any:
    """A merged model of a fixture, its parameters rounded once to ``dtype``, tied where they still are."""
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    if json.loads((source / "hf" / "config.json").read_text())["tie_word_embeddings"]:
        ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        merged.config.tie_word_embeddings = torch.equal(*ends)
        merged.tie_weights()
    merged.config.dtype = dtype
    return merged


def _untie(base: Any) -> None:
    """Give the head weights of its own: PEFT adds in place, which would reach both ends of a tied pair."""
    if not base.config.tie_word_embeddings:
        return
    head = base.get_output_embeddings()
    head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
