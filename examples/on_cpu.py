"""What Accelerate and DeepSpeed need to train on processors alone. On GPUs nothing of this is needed."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Read when torch and deepspeed are imported.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}

import torch
import torch.distributed as dist

import ckpt_tools

SHIPPED = Path(__file__).resolve().parent.parent / "fixtures/zero/zero3-bf16-olmo2-chat-2ranks"


def prepare_backends() -> None:
    """Let Accelerate take gloo, and DeepSpeed torch's own all_reduce in place of one that spins."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    # By its full name: `deepspeed.comm.torch` is torch itself, once all of DeepSpeed is imported.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    dist.init_process_group("gloo")
    torch.manual_seed(0)


def accelerator(stage: int) -> Any:
    """An accelerator with DeepSpeed's ZeRO of a stage, in bf16."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False))


def base_model(out: Path) -> Path:
    """A small OLMo-2 chat model to start from: the shipped checkpoint, converted."""
    base = out / "base"
    if dist.get_rank() == 0:
        hf = SHIPPED / "hf"
        ckpt_tools.consolidate(SHIPPED / "checkpoint", base, config=hf, tokenizer=hf)
    dist.barrier()
    return base


def same_files(directory: Path, other: Path) -> bool:
    """Whether two directories hold the same files byte for byte, but for what says where they are from."""

    def contents(directory: Path) -> dict[str, bytes]:
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        del files["ckpt_tools_manifest.json"]
        return files

    return contents(directory) == contents(other)


def leave() -> None:
    """End this rank without the interpreter's shutdown.

    A thread of gloo that lets go of its last tensor while the interpreter shuts down aborts the process, and
    torchrun then calls the whole run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
