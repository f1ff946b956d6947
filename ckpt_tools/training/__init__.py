"""Saves a model in training as a Hugging Face directory, without a checkpoint on disk.

    from ckpt_tools import training

    training.save(model, "model-step-1000", accelerator=accelerator, tokenizer=tokenizer)

Every rank calls ``save`` with the wrapped model. The memory of each rank is a place that bytes are read from.
The pipeline of conversion does the rest, so the directory is the one that a conversion writes, byte for byte.
This is the only room that imports deepspeed, and only if the model is a DeepSpeed engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_tools.training.saving import save

if TYPE_CHECKING:
    from ckpt_tools.training.callback import CleanCheckpointCallback

__all__ = ["CleanCheckpointCallback", "save"]


def __getattr__(name: str) -> Any:
    # Its base class comes from transformers, which takes seconds to import.
    if name != "CleanCheckpointCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckpt_tools.training.callback import CleanCheckpointCallback

    return CleanCheckpointCallback
