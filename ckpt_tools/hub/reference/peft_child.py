"""Owns every use of PEFT's saving code: the child process that finds out how PEFT names an adapter's tensors.

``get_peft_model_state_dict`` filters and renames a state without reading its values. The child passes names
as values, so the result maps new names to old names. Model and adapter are built on the meta device. The
child reads one JSON object on standard input and prints one on standard output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt_tools.hub.reference.child import build_on_meta, find_classes
from ckpt_tools.hub.reference.process import question_and_answers

# Initial values do not matter here, and some initializations need the values of the base.
_STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")


def main() -> None:
    """Answer the question on standard input."""
    with question_and_answers() as (question, answers):
        import peft  # noqa: F401  (if it is absent, the parent reports this import's error)

        found = [_answer(question["config"], adapter) for adapter in question["adapters"]]
        json.dump({"adapters": found}, answers)


def _answer(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _described(_adapted(dict(config), adapter), adapter)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def _adapted(config: dict[str, Any], adapter: Mapping[str, Any]) -> Any:
    import torch
    from peft import PeftConfig, get_peft_model

    config.pop("quantization_config", None)
    architecture = next(iter(config.get("architectures") or ()), "")
    found = find_classes(config, {"architecture": architecture, "trust_remote_code": False})
    if found is None:
        raise LookupError(f"transformers has no {architecture}")
    settings = {key: value for key, value in adapter["config"].items() if key not in _STARTS}
    # In inference mode PEFT saves prompts from their table, as after training.
    settings |= {"base_model_name_or_path": None, "inference_mode": True}
    base = build_on_meta(*found)
    with torch.device("meta"):
        configs: Any = PeftConfig
        peft_config = configs.from_peft_type(**settings)
        return get_peft_model(base, peft_config, adapter_name=adapter["name"])


def _described(model: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    options = {
        "adapter_name": adapter["name"],
        "save_embedding_layers": True if adapter["save_embeddings"] else "auto",
    }
    whole = get_peft_model_state_dict(model, state_dict=model.state_dict(), **options)
    tokens: Any = {name: name for name in adapter["names"]}
    saved = get_peft_model_state_dict(model, state_dict=tokens, **options)
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "names": {
            key: value if isinstance(value, str) else parameters[id(value)]
            for key, value in saved.items()
        },
        "shapes": {key: list(tensor.shape) for key, tensor in whole.items()},
    }


if __name__ == "__main__":
    main()
