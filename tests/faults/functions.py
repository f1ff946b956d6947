"""The functions of the package that write: each takes an input and an output."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ckpt_tools.errors import CkptError


def _merge_fsdp_weights(source: str, out: str) -> None:
    """One file of weights."""
    from ckpt_tools.conversion.compat import merge_fsdp_weights

    merge_fsdp_weights(source, out)


def _save(source: str, out: str) -> None:
    """A live model, with the weights of a checkpoint."""
    import torch

    import ckpt_tools
    from ckpt_tools.training import save

    model = torch.nn.Module()
    for number, tensor in enumerate(ckpt_tools.open_checkpoint(source).values()):
        model.register_parameter(f"p{number}", torch.nn.Parameter(tensor.load()))
    save(model, out, weights_only=True, verify=True)


FUNCTIONS: dict[str, Callable[[str, str], None]] = {
    "merge_fsdp_weights": _merge_fsdp_weights,
    "training.save": _save,
}


def called(words: list[str]) -> int:
    """The exit status of a function, as a command would have it."""
    name, source, out = words
    try:
        FUNCTIONS[name](source, out)
    except CkptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
