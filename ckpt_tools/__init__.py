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
    from ckpt_tools.checkpoint import Checkpoint
    from ckpt_tools.compat import get_fp32_state_dict_from_zero_checkpoint
    from ckpt_tools.convert import (
        average,
        consolidate,
        extract_lora,
        merge_lora,
        open_checkpoint,
    )
    from ckpt_tools.errors import CkptError
    from ckpt_tools.inspection import Inspection, inspect
    from ckpt_tools.report import Report

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "ckpt_tools.checkpoint",
    "CkptError": "ckpt_tools.errors",
    "Inspection": "ckpt_tools.inspection",
    "Report": "ckpt_tools.report",
    "average": "ckpt_tools.convert",
    "consolidate": "ckpt_tools.convert",
    "extract_lora": "ckpt_tools.convert",
    "get_fp32_state_dict_from_zero_checkpoint": "ckpt_tools.compat",
    "inspect": "ckpt_tools.inspection",
    "merge_lora": "ckpt_tools.convert",
    "open_checkpoint": "ckpt_tools.convert",
}

__all__ = [
    "Checkpoint",
    "CkptError",
    "Inspection",
    "Report",
    "__version__",
    "average",
    "consolidate",
    "extract_lora",
    "get_fp32_state_dict_from_zero_checkpoint",
    "inspect",
    "merge_lora",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
