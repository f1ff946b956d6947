"""Writes what the tools of goal 10 read: a base, two fine-tuned models, an adapter, shards of a save.

Owns nothing of the layouts: transformers, PEFT and torch write them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from models import choose_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM

RANKS = 4


def shards(rank: int, store: str, out: str, verl: str, base: str) -> None:
    """One rank's part of a save by HuggingFaceStorageWriter, and of one by verl."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    state: dict[str, Any] = AutoModelForCausalLM.from_pretrained(base).state_dict()
    cut = {
        name: DTensor.from_local(
            tensor.chunk(RANKS)[rank].clone(),
            mesh,
            [Shard(0)],
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        for name, tensor in state.items()
    }
    writer = checkpoint.HuggingFaceStorageWriter(out, save_distributed=True)
    checkpoint.save(cut, storage_writer=writer)
    # verl/utils/checkpoint/fsdp_checkpoint_manager.py
    torch.save(cut, Path(verl, f"model_world_size_{RANKS}_rank_{rank}.pt"))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--params", type=float, default=3e8)
    options = parser.parse_args()
    config = choose_config("llama", int(options.params))
    for number, name in enumerate(("base", "tuned-a", "tuned-b")):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(options.out / name)
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(options.out / "base", dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(options.out / "adapter")
    (options.out / "verl").mkdir()
    (options.out / "verl" / "fsdp_config.json").write_text(json.dumps({"world_size": RANKS}))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (
            str(Path(scratch) / "store"),
            str(options.out / "shards"),
            str(options.out / "verl"),
            str(options.out / "base"),
        )
        spawn(shards, arguments, nprocs=RANKS)


if __name__ == "__main__":
    sys.exit(main())
