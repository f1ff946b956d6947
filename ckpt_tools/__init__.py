"""ckpt-tools: what training leaves on disk becomes what people load.

    import ckpt_tools

    checkpoint = ckpt_tools.open_checkpoint("run/global_step500")
    checkpoint["model.embed_tokens.weight"].load()           # a torch.Tensor, read now
    ckpt_tools.consolidate("run/global_step500", "model")    # a Hugging Face directory

Names are imported when they are first used, so that ``import ckpt_tools`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tools import training as training
    from ckpt_tools.analysis.difference import Difference, TensorDifference, diff
    from ckpt_tools.analysis.inspection import Inspection, inspect
    from ckpt_tools.analysis.interval import CheckpointInterval, checkpoint_interval
    from ckpt_tools.conversion.api import (
        average,
        consolidate,
        extract_lora,
        merge_lora,
        open_checkpoint,
    )
    from ckpt_tools.conversion.compat import (
        get_fp32_state_dict_from_zero_checkpoint,
        merge_fsdp_weights,
    )
    from ckpt_tools.conversion.report import Report
    from ckpt_tools.errors import CkptError
    from ckpt_tools.tensors.checkpoint import Checkpoint
    from ckpt_tools.verification import Problem, Verdict, verify

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "ckpt_tools.tensors.checkpoint",
    "CheckpointInterval": "ckpt_tools.analysis.interval",
    "CkptError": "ckpt_tools.errors",
    "Difference": "ckpt_tools.analysis.difference",
    "Inspection": "ckpt_tools.analysis.inspection",
    "Problem": "ckpt_tools.verification",
    "Report": "ckpt_tools.conversion.report",
    "TensorDifference": "ckpt_tools.analysis.difference",
    "Verdict": "ckpt_tools.verification",
    "average": "ckpt_tools.conversion.api",
    "checkpoint_interval": "ckpt_tools.analysis.interval",
    "consolidate": "ckpt_tools.conversion.api",
    "diff": "ckpt_tools.analysis.difference",
    "extract_lora": "ckpt_tools.conversion.api",
    "get_fp32_state_dict_from_zero_checkpoint": "ckpt_tools.conversion.compat",
    "inspect": "ckpt_tools.analysis.inspection",
    "merge_fsdp_weights": "ckpt_tools.conversion.compat",
    "merge_lora": "ckpt_tools.conversion.api",
    "open_checkpoint": "ckpt_tools.conversion.api",
    "verify": "ckpt_tools.verification",
}

__all__ = [
    "Checkpoint",
    "CheckpointInterval",
    "CkptError",
    "Difference",
    "Inspection",
    "Problem",
    "Report",
    "TensorDifference",
    "Verdict",
    "__version__",
    "average",
    "checkpoint_interval",
    "consolidate",
    "diff",
    "extract_lora",
    "get_fp32_state_dict_from_zero_checkpoint",
    "inspect",
    "merge_fsdp_weights",
    "merge_lora",
    "open_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "training":
        return import_module("ckpt_tools.training")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
