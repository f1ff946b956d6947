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
    from ckpt_tools._version import __version__ as __version__
    from ckpt_tools.analysis.difference import Difference as Difference
    from ckpt_tools.analysis.difference import TensorDifference as TensorDifference
    from ckpt_tools.analysis.difference import diff as diff
    from ckpt_tools.analysis.inspection import Inspection as Inspection
    from ckpt_tools.analysis.inspection import inspect as inspect
    from ckpt_tools.analysis.interval import CheckpointInterval as CheckpointInterval
    from ckpt_tools.analysis.interval import checkpoint_interval as checkpoint_interval
    from ckpt_tools.conversion.api import average as average
    from ckpt_tools.conversion.api import consolidate as consolidate
    from ckpt_tools.conversion.api import extract_lora as extract_lora
    from ckpt_tools.conversion.api import merge_lora as merge_lora
    from ckpt_tools.conversion.api import open_checkpoint as open_checkpoint
    from ckpt_tools.conversion.compat import (
        get_fp32_state_dict_from_zero_checkpoint as get_fp32_state_dict_from_zero_checkpoint,
    )
    from ckpt_tools.conversion.compat import merge_fsdp_weights as merge_fsdp_weights
    from ckpt_tools.conversion.report import Report as Report
    from ckpt_tools.conversion.watching.api import watch as watch
    from ckpt_tools.errors import CkptError as CkptError
    from ckpt_tools.tensors.checkpoint import Checkpoint as Checkpoint
    from ckpt_tools.verification import Problem as Problem
    from ckpt_tools.verification import Verdict as Verdict
    from ckpt_tools.verification import verify as verify

_HOMES = {
    "analysis.difference": ("Difference", "TensorDifference", "diff"),
    "analysis.inspection": ("Inspection", "inspect"),
    "analysis.interval": ("CheckpointInterval", "checkpoint_interval"),
    "conversion.api": ("average", "consolidate", "extract_lora", "merge_lora", "open_checkpoint"),
    "conversion.compat": ("get_fp32_state_dict_from_zero_checkpoint", "merge_fsdp_weights"),
    "conversion.report": ("Report",),
    "conversion.watching.api": ("watch",),
    "errors": ("CkptError",),
    "tensors.checkpoint": ("Checkpoint",),
    "verification": ("Problem", "Verdict", "verify"),
    "_version": ("__version__",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "training":
        return import_module(f"{__name__}.training")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
