"""What a model in training says of itself: step, ranks, framework, and what its checkpoint is called.

The words are those that the reader of the framework's own checkpoint has, so that the model card of a save is
the one that a conversion of that checkpoint writes. Where nobody knows what such a checkpoint is called, the
card says that the weights are from memory. Knows no tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tools.training.wrappers import Unwrapped, is_a

_ENGINE = "DeepSpeedEngine"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself besides its tensors; see :class:`ckpt_tools.checkpoint.Checkpoint`."""

    title: str
    name: str
    step: int | None
    world_size: int | None
    framework: str | None


def facts_of(model: Unwrapped, accelerator: Any, step: int | None, ranks: int) -> Facts:
    """The facts of a model.

    Args:
        model: the model.
        accelerator: the accelerator that prepared it, if one did.
        step: optimizer steps taken, where the caller knows.
        ranks: number of processes.
    """
    models = [] if accelerator is None else list(accelerator._models)
    if model.engine is not None:
        found = _of_engine(model.engine, [m for m in models if is_a(m, _ENGINE)])
    elif accelerator is not None:
        found = _of_accelerator(model, accelerator, models)
    else:
        found = Facts("weights in memory", "live model", None, ranks, _torch())
    return found if step is None else replace(found, step=step)


def engine_of(model: Unwrapped, accelerator: Any) -> Any:
    """The DeepSpeed engine of a model that was passed without it, where the accelerator knows it."""
    for prepared in [] if accelerator is None else accelerator._models:
        if is_a(prepared, _ENGINE) and prepared.module is model.module:
            return prepared
    return model.engine


def _of_engine(engine: Any, prepared: Sequence[Any]) -> Facts:
    stage = engine.zero_optimization_stage()
    kind = f"ZeRO-{stage}" if stage else "without ZeRO"
    if is_a(engine.optimizer, "BF16_Optimizer"):
        kind = "BF16_Optimizer"
    number = _position(engine, prepared)
    name = f"global_step{engine.global_steps}"
    if number is not None:
        name = "pytorch_model" + (f"_{number}" if number else "")
    size = getattr(engine, "seq_dp_world_size", engine.dp_world_size)
    version = getattr(sys.modules.get("deepspeed"), "__version__", None)
    framework = f"deepspeed {version}" if version else "deepspeed"
    return Facts(f"DeepSpeed {kind}", name, engine.global_steps, size, framework)


def _of_accelerator(model: Unwrapped, accelerator: Any, models: Sequence[Any]) -> Facts:
    number = next((n for n in (_position(m, models) for m in model.outer) if n is not None), 0)
    ranks = accelerator.num_processes
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        name = "model" + (f"_{number}" if number else "")
        return Facts("Accelerate save_state (plain)", name, None, ranks, "accelerate")
    if "FULL" in str(plugin.state_dict_type):
        name = "pytorch_model_fsdp" + (f"_{number}" if number else "")
        return Facts("Accelerate save_state (FSDP, full)", name, None, ranks, "accelerate")
    # FSDP has imported it.
    writer = "torch.distributed.checkpoint"
    version = getattr(sys.modules.get(f"{writer}.filesystem"), "CURRENT_DCP_VERSION", None)
    framework = f"{writer} {version}" if version else writer
    return Facts("torch DCP", f"pytorch_model_fsdp_{number}", None, ranks, framework)


def _position(model: Any, models: Sequence[Any]) -> int | None:
    return next((number for number, each in enumerate(models) if each is model), None)


def _torch() -> str:
    return f"torch {sys.modules['torch'].__version__}"
