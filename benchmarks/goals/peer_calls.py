"""Calls of other libraries, each as a program: ``peer_calls.py NAME INPUT... OUT``."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace


def dcp_to_torch_save(state: str, out: str) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    Path(out).mkdir()
    dcp_to_torch_save(state, Path(out, "model.pt"))


def consolidate_safetensors(shards: str, out: str) -> None:
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files_on_every_rank,
    )

    names: dict[str, int] = {}
    for file in Path(shards).glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            names |= dict.fromkeys(stream.keys(), 1)
    Path(out).mkdir()
    consolidate_safetensors_files_on_every_rank(shards, out, names, num_threads=2)


def merge_and_unload(base: str, adapter: str, out: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def mergekit(first: str, second: str, out: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": name, "parameters": {"weight": 0.5}} for name in (first, second)]
    config = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as cache:
        options = MergeOptions(transformers_cache=cache, copy_tokenizer=False)
        run_merge(MergeConfiguration.model_validate(config), out, options)


def verl(state: str, out: str) -> None:
    """The arithmetic of verl's merger for FSDP, and huggingface_hub's way to write shards.

    The package around it imports ray. The merger itself does not need it, so the packages are empty here.
    """
    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:
        raise SystemExit("verl is not installed")
    home = Path(found.origin).parent
    for name, folder in (("verl", home), ("verl.model_merger", home / "model_merger")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    base = ModuleType("verl.model_merger.base_model_merger")
    base.BaseModelMerger = object  # type: ignore[attr-defined]
    sys.modules[base.__name__] = base
    merging = importlib.import_module("verl.model_merger.fsdp_model_merger")

    from huggingface_hub import save_torch_state_dict

    Path(out).mkdir()
    merger = merging.FSDPModelMerger()
    merger.config = SimpleNamespace(local_dir=state, operation="merge", hf_upload=False)
    merger.save_hf_model_and_tokenizer = lambda merged: save_torch_state_dict(merged, out)
    merger.merge_and_save()


CALLS: dict[str, Callable[..., None]] = {
    call.__name__: call
    for call in (dcp_to_torch_save, consolidate_safetensors, merge_and_unload, mergekit, verl)
}

if __name__ == "__main__":
    CALLS[sys.argv[1]](*sys.argv[2:])
