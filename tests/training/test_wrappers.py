"""Whatever training puts around a model, the model within is found, and its own class and parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckpt_tools.errors import AttributeNotFound, UnsupportedLayout, UsageError
from ckpt_tools.training.wrappers import attribute_of, class_name, innermost, unwrapped


class DeepSpeedEngine(nn.Module):
    """Told by its name, as the real one is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class PipelineEngine(DeepSpeedEngine):
    pass


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def model() -> nn.Module:
    return nn.ModuleDict({"policy": nn.Linear(2, 3), "value": nn.Linear(2, 1)})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        lambda m: compiled(nn.DataParallel(m)),
        DeepSpeedEngine,
        lambda m: compiled(DeepSpeedEngine(m)),
    ],
)
def test_outer_wrappers_are_taken_off(wrap: Any) -> None:
    inner = model()

    found = unwrapped(wrap(inner))

    assert found.module is inner
    assert found.outer[-1] is inner


def test_the_engine_is_kept() -> None:
    engine = DeepSpeedEngine(model())

    assert unwrapped(compiled(engine)).engine is engine
    assert unwrapped(nn.DataParallel(model())).engine is None


def test_a_wrapper_that_stays_in_the_names_is_left_to_them() -> None:
    inner = compiled(model())

    assert unwrapped(nn.DataParallel(inner)).module is inner


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="a dict is not a model"):
        unwrapped({})
    with pytest.raises(UnsupportedLayout, match="pipeline-parallel"):
        unwrapped(PipelineEngine(model()))


def test_an_attribute_is_found_behind_wrappers() -> None:
    inner: Any = model()
    inner.policy = compiled(inner.policy)
    inner.value = checkpoint_wrapper(inner.value)
    outer = compiled(inner)

    assert type(attribute_of(outer, "policy")) is nn.Linear
    assert attribute_of(outer, "_orig_mod.policy") is attribute_of(inner, "policy")
    assert type(attribute_of(inner, "value")) is nn.Linear
    assert innermost(outer) is inner
    with pytest.raises(AttributeNotFound, match=r"no attribute 'police'") as error:
        attribute_of(outer, "police")
    assert error.value.choices == {"policy": 2, "value": 2}


def test_the_class_is_the_model_s_own() -> None:
    sharding = type("FSDPModule", (), {})
    sharded = type("FSDPLinear", (sharding, nn.Linear), {})

    assert class_name(nn.Linear(1, 1)) == "Linear"
    assert class_name(sharded(1, 1)) == "Linear"
    assert class_name(SimpleNamespace()) == "SimpleNamespace"
