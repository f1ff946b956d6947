"""transformers' own models: of a directory, and of a config with the values of the live engine.

Logits are compared bit for bit between two models of one process. Floating-point kernels are free to sum in
another order on another processor, with another number of threads or at another address; so both models
hold their values at addresses that torch chose, and one thread computes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = Mapping[str, torch.Tensor]


def auto_class(hf: Path) -> Any:
    """The class that loads what ``hf/config.json`` names."""
    import transformers

    (architecture,) = json.loads((hf / "config.json").read_text())["architectures"]
    if architecture.endswith("ForCausalLM") or architecture == "GPT2LMHeadModel":
        return transformers.AutoModelForCausalLM
    if architecture.endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification
    return getattr(transformers, architecture)


def of_config(hf: Path) -> Any:
    """The model of a config, with random values."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf)
    model_class = auto_class(hf)
    if hasattr(model_class, "from_config"):
        return model_class.from_config(config, attn_implementation="eager")
    config._attn_implementation = "eager"
    return model_class(config)


def live_model(hf: Path, state: State) -> Any:
    """The model of a config with the values, and in the dtypes, of a live state: every name, no other.

    A state under names of the hub, as another framework's own converter gives it, is loaded by transformers.
    """
    model = of_config(hf)
    if not state.keys() <= model.state_dict().keys():
        with tempfile.TemporaryDirectory() as directory:
            shutil.copy(hf / "config.json", directory)
            save_file(dict(state), Path(directory) / "model.safetensors", metadata={"format": "pt"})
            return loaded(Path(directory))
    # Buffers that are not saved, such as rotary frequencies, keep the dtype in which the model makes them.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return model


def loaded(directory: Path) -> Any:
    """The model that transformers makes of a directory, which must not lack or add a key."""
    model, info = auto_class(directory).from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    return model


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Two rows of ids; for an encoder and decoder, of each."""
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(7))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def logits(model: Any) -> torch.Tensor:
    """The logits of a model for an input that is always the same, computed in fp32.

    In bf16 a wrong rotary base or epsilon is lost in the rounding.
    """
    for each in (*model.parameters(), *model.buffers()):
        each.data = each.data.float() if each.is_floating_point() else each.data
        each.data = each.data.clone()
    with one_thread(), torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs_of(model), use_cache=False).logits
    return found


def same_logits(one: Any, other: Any) -> bool:
    """Whether two models have the same dtypes and give the same logits, bit for bit."""
    if _dtypes(one) != _dtypes(other):
        return False
    found, expected = logits(one), logits(other)
    assert expected.isfinite().all()
    return torch.equal(found, expected)


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: parameter.dtype for name, parameter in parameters}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
