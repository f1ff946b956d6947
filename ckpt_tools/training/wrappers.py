"""Unwraps a model in training.

Owns the step from the object that a training loop calls to the module whose state a checkpoint holds, and to
the engine around it. Classes of frameworks are recognised by name, so that no framework is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import AttributeNotFound, UnsupportedLayout, UsageError

_PARALLEL = {"DistributedDataParallel", "DataParallel"}
_ENGINE = "DeepSpeedEngine"
# The child of each wrapper that stays in the names of a state.
_CHILDREN = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    **dict.fromkeys(_PARALLEL, "module"),
}


@dataclass(frozen=True)
class Unwrapped:
    """A model in training.

    Attributes:
        module: the module whose state a checkpoint holds; it may contain wrappers.
        engine: the DeepSpeed engine around it.
        outer: the object that was passed, and every wrapper that was taken off.
    """

    module: Any
    engine: Any
    outer: tuple[Any, ...]


def is_a(thing: object, *names: str) -> bool:
    """Whether the class of an object, or a base class, has one of these names."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def unwrapped(model: Any) -> Unwrapped:
    """Take the outer wrappers off.

    Raises:
        UsageError: it is not a module.
        UnsupportedLayout: an engine of pipeline stages.
    """
    outer = [model]
    engine = None
    while True:
        if is_a(model, "PipelineEngine"):
            raise UnsupportedLayout(
                "a pipeline-parallel engine: each rank holds other layers",
                hint="Save with engine.save_checkpoint.",
            )
        if is_a(model, _ENGINE):
            engine = model
        elif not is_a(model, *_PARALLEL) and not _hides_a_wrapper(model):
            break
        model = _child(model)
        outer.append(model)
    if not hasattr(model, "state_dict") or not hasattr(model, "named_modules"):
        raise UsageError(
            f"a {type(outer[0]).__name__} is not a model",
            hint="Pass the object that accelerator.prepare or deepspeed.initialize returned for the model.",
        )
    return Unwrapped(model, engine, tuple(outer))


def _hides_a_wrapper(model: Any) -> bool:
    """Whether it is a compiled engine or data-parallel model."""
    while is_a(model, "OptimizedModule"):
        model = _child(model)
        if is_a(model, _ENGINE, *_PARALLEL):
            return True
    return False


def _child(model: Any) -> Any:
    if is_a(model, _ENGINE):
        return model.module
    return getattr(model, _CHILDREN[_wrapper(model)])


def _wrapper(model: Any) -> str:
    return next((name for name in _CHILDREN if is_a(model, name)), "")


def innermost(module: Any) -> Any:
    """The module itself, without wrappers."""
    while _wrapper(module):
        module = _child(module)
    return module


def attribute_of(module: Any, path: str) -> Any:
    """The module at a dotted path; wrappers on the way may be named or left out.

    Raises:
        AttributeNotFound: there is none.
    """
    found = module
    for segment in path.split("."):
        inner = found if segment in _children(found) else innermost(found)
        children = _children(inner)
        if segment not in children:
            sizes = {n: sum(1 for _ in c.parameters()) for n, c in children.items()}
            raise AttributeNotFound(f"the model has no attribute {path!r}", choices=sizes)
        found = children[segment]
    return innermost(found)


def _children(module: Any) -> dict[str, Any]:
    return dict(module.named_children())


def class_name(module: Any) -> str:
    """Name of the class of a model; FSDP2 derives a class from it."""
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = cls.__bases__[1]
    return cls.__name__
