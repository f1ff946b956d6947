"""Clean saves from a training that runs: what a conversion of its checkpoint would write, without one.

    from ckpt_tools import training

    training.save(model, "model-step-1000", accelerator=accelerator, tokenizer=tokenizer)

Every rank calls it with the model as it is wrapped. Each rank's memory is a place that bytes are read from,
and the pipelines of conversion do the rest; so the result is theirs, byte for byte. The only room that may
import deepspeed, which it does where the model came with it. Knows nothing of the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_tools.training.saving import save

if TYPE_CHECKING:
    from ckpt_tools.training.callback import CleanCheckpointCallback

__all__ = ["CleanCheckpointCallback", "save"]


def __getattr__(name: str) -> Any:
    # Its base class is transformers', which takes seconds to import.
    if name != "CleanCheckpointCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckpt_tools.training.callback import CleanCheckpointCallback

    return CleanCheckpointCallback
