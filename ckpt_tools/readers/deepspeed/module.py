"""Owns the tensors in ``module`` of a DeepSpeed model file, and their names as parameters.

DeepSpeed saves the module's ``state_dict`` there, and elsewhere names parameters by their place in the
module. Nearly always the names agree. A wrapper that changes the names in its ``state_dict`` (TRL's value
head) omits a prefix, which is restored here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_tools.errors import UnsafePickle
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.deepspeed.agreement import ModelState


def module_tensors(model: ModelState, parameters: Iterable[str]) -> dict[str, TensorRef]:
    """The tensors of ``module``, each under its parameter's name.

    Args:
        model: rank 0's model file.
        parameters: names of parameters, as the optimizer files list them.

    Raises:
        UnsafePickle: a value may be a weight, but only code from the file can rebuild it.
    """
    tensors = _tensors(model)
    lacking = [name for name in parameters if name not in tensors]
    prefix = _left_out(lacking, tensors)
    if not prefix:
        return tensors
    short = {name.removeprefix(prefix): name for name in lacking}
    return {short.get(name, name): ref for name, ref in tensors.items()}


def _left_out(lacking: list[str], tensors: dict[str, TensorRef]) -> str:
    """The prefix that must be removed so that all names are in the module; empty if there is none."""
    segments = lacking[0].split(".") if lacking else []
    for depth in range(1, len(segments)):
        prefix = ".".join(segments[:depth]) + "."
        if all(n.startswith(prefix) and n.removeprefix(prefix) in tensors for n in lacking):
            return prefix
    return ""


def _tensors(model: ModelState) -> dict[str, TensorRef]:
    """The tensors of `module`, without extra state.

    Raises:
        UnsafePickle: a value may be a weight, but only code from the file can rebuild it.
    """
    tensors = {}
    for name, value in model.content["module"].items():
        if isinstance(value, TensorRef):
            tensors[name] = value
        elif isinstance(value, Opaque) and not name.endswith("_extra_state"):
            raise UnsafePickle(
                f"it is not a plain tensor but a {value.global_name}",
                path=model.path,
                tensor=name,
                hint="No code from the file was run. If it is a weight, please report its layout.",
            )
    return tensors
