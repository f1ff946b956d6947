"""Facts of a model in training: step, ranks, framework.

The texts are the same as those of the reader of the framework's own checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ckpt_tools.training.wrappers import Unwrapped, is_a

_ENGINE = "DeepSpeedEngine"


@dataclass(frozen=True)
class Facts:
    """Facts of a checkpoint beside its tensors; see ``Checkpoint``."""

    step: int | None
    world_size: int | None
    framework: str | None


def facts_of(model: Unwrapped, step: int | None, ranks: int) -> Facts:
    """The facts of a model.

    Args:
        model: the model.
        step: optimizer steps taken, where the caller knows.
        ranks: number of processes.
    """
    engine = model.engine
    if engine is None:
        return Facts(step, ranks, _version_of("torch"))
    size = getattr(engine, "seq_dp_world_size", engine.dp_world_size)
    return Facts(engine.global_steps if step is None else step, size, _version_of("deepspeed"))


def engine_of(model: Unwrapped, accelerator: Any) -> Any:
    """The DeepSpeed engine of the model: that of the wrapper, or the one that the accelerator made."""
    for prepared in [] if accelerator is None else accelerator._models:
        if is_a(prepared, _ENGINE) and prepared.module is model.module:
            return prepared
    return model.engine


def _version_of(library: str) -> str:
    version = getattr(sys.modules.get(library), "__version__", None)
    return f"{library} {version}" if version else library
