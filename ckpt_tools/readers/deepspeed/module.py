"""The ``module`` of a DeepSpeed model file: its tensors, under the names of the parameters.

DeepSpeed saves what the module's own ``state_dict`` answers, and calls parameters by their place in the
module. Nearly always the two agree; a wrapper that changes the names in its ``state_dict`` (TRL's value
head) leaves a prefix out, which is put back here. Knows one file's content and no layout.
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
        parameters: names of parameters, as the optimizer's files list them.

    Raises:
        UnsafePickle: a tensor of a kind that only code could rebuild: it may be a weight.
    """
    tensors = _tensors(model)
    lacking = [name for name in parameters if name not in tensors]
    prefix = _left_out(lacking, tensors)
    if not prefix:
        return tensors
    short = {name.removeprefix(prefix): name for name in lacking}
    return {short.get(name, name): ref for name, ref in tensors.items()}


def _left_out(lacking: list[str], tensors: dict[str, TensorRef]) -> str:
    """The prefix without which all these names are in the module; empty if there is none."""
    segments = lacking[0].split(".") if lacking else []
    for depth in range(1, len(segments)):
        prefix = ".".join(segments[:depth]) + "."
        if all(n.startswith(prefix) and n.removeprefix(prefix) in tensors for n in lacking):
            return prefix
    return ""


def _tensors(model: ModelState) -> dict[str, TensorRef]:
    """The tensors of `module`; what else a module keeps there (extra state) is no weight.

    Raises:
        UnsafePickle: a tensor of a kind that only code could rebuild: it may be a weight.
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
                hint="Nothing of it was run. If it is a weight, please report its layout.",
            )
    return tensors
