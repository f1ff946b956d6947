"""Names of ``module`` that hooks changed, matched with the parameters' places in the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import open_checkpoint
from ckpt_tools.conversion.masters import check_masters
from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.deepspeed.agreement import ModelState
from ckpt_tools.readers.deepspeed.module import matched_module
from ckpt_tools.tensors.dtypes import BFLOAT16
from tests.support import damage
from tests.support.readers.contract import Case, assert_same

STAGE_2 = "zero2-bf16-llama-3ranks"
STAGE_3 = "zero3-bf16-llama-7ranks"
MODEL = "mp_rank_00_model_states.pt"


def renamed(fixture: str, tmp_path: Path, names: dict[str, str]) -> Path:
    """A copy in whose ``module`` each tensor has the name that a hook gave it."""
    directory = damage.copy_of(fixture, tmp_path)

    def change(content: damage.Content) -> None:
        content["module"] = {names.get(name, name): t for name, t in content["module"].items()}

    for path in damage.model_files(directory):
        damage.edit(path, change)
    return directory


def hooked(fixture: str, old: str, new: str) -> dict[str, str]:
    """The names in which a hook puts ``new`` for ``old``."""
    names = Case(damage.ZERO / fixture).model
    return {name: name.replace(old, new) for name in names if old in name}


def assert_read(directory: Path, fixture: str, names: dict[str, str], doubts: int = 0) -> None:
    """Every tensor is the live engine's, under the name that ``state_dict`` gives it."""
    checkpoint, case = open_checkpoint(directory), Case(damage.ZERO / fixture)
    assert set(checkpoint) == {names.get(name, name) for name in case.model}
    assert len(checkpoint.doubts) == doubts
    for name, truth in case.masters.items():
        assert_same(checkpoint[names.get(name, name)].load(), truth, name)
    assert {weight.kind for weight in checkpoint.weights.values()} == {"parameter"}
    check_masters(checkpoint, check_all_masters=True, workers=1)


@pytest.mark.parametrize("fixture", [STAGE_2, STAGE_3])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".self_attn.", "."),  # of some modules, a name between others
        ("model.layers.0.", "model.layers.0.inner.wrapped."),  # `state_dict` has more, in one layer
        ("layers.1.mlp.", "layers.1."),
    ],
)
def test_segments_that_a_hook_leaves_out_or_adds(
    fixture: str, old: str, new: str, tmp_path: Path
) -> None:
    names = hooked(fixture, old, new)
    assert_read(renamed(fixture, tmp_path, names), fixture, names)


def test_two_hooks_at_once(tmp_path: Path) -> None:
    names = hooked(STAGE_2, ".self_attn.", ".")
    names |= hooked(STAGE_2, ".mlp.", ".")
    assert_read(renamed(STAGE_2, tmp_path, names), STAGE_2, names)


def test_a_prefix_that_state_dict_leaves_out_is_put_back(tmp_path: Path) -> None:
    """TRL's value head: the parameters' own names are the model's."""
    names = hooked(STAGE_2, "model.", "")
    names = {name: new for name, new in names.items() if name.startswith("model.")}
    assert_read(renamed(STAGE_2, tmp_path, names), STAGE_2, {})


def test_names_that_each_need_segments_of_their_own_are_not_all_tried(tmp_path: Path) -> None:
    """Each combination takes a look at all names, so that thousands of them take minutes."""
    storage: Any = None
    ref = TensorRef(storage, BFLOAT16, 0, (0,), (1,))
    names = {f"p{at}": (1,) for at in range(20_000)}
    module = {f"x{at}.p{at}": ref for at in range(20_000)}
    model = ModelState(tmp_path, 0, {"module": module})
    with pytest.raises(UnsupportedLayout, match="20000 parameters have different names"):
        matched_module(model, names, placeholders=True, others=())


def test_other_names_are_matched_by_shapes_in_order_and_compared(tmp_path: Path) -> None:
    names = {name: f"transformer.{at}" for at, name in enumerate(Case(damage.ZERO / STAGE_2).model)}
    directory = renamed(STAGE_2, tmp_path, names)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.doubts == (
        "hooks renamed parameters in `module`: matched by their shapes in order",
    )
    assert_read(directory, STAGE_2, names, doubts=1)


def test_a_match_by_shapes_that_the_values_contradict_is_found_out(tmp_path: Path) -> None:
    """Two weights of one shape in the wrong order: nothing but the values tells."""
    names = {name: f"transformer.{at}" for at, name in enumerate(Case(damage.ZERO / STAGE_2).model)}
    directory = renamed(STAGE_2, tmp_path, names)
    gate = names["model.layers.0.mlp.gate_proj.weight"]
    up = names["model.layers.0.mlp.up_proj.weight"]

    def exchange(content: damage.Content) -> None:
        module: dict[str, Any] = content["module"]
        module[gate], module[up] = module[up], module[gate]

    damage.edit(directory / MODEL, exchange)
    with pytest.raises(DamagedCheckpoint, match="is not its 16-bit weight"):
        check_masters(open_checkpoint(directory), check_all_masters=False, workers=1)


def test_placeholders_without_shapes_are_not_matched_by_order(tmp_path: Path) -> None:
    names = {name: f"transformer.{at}" for at, name in enumerate(Case(damage.ZERO / STAGE_3).model)}
    with pytest.raises(UnsupportedLayout, match="21 parameters have different names") as caught:
        open_checkpoint(renamed(STAGE_3, tmp_path, names))
    assert "zero_to_fp32.py" in str(caught.value)


def test_a_weight_that_module_lacks_is_not_made_up(tmp_path: Path) -> None:
    directory = damage.copy_of(STAGE_2, tmp_path)
    damage.edit(directory / MODEL, lambda content: content["module"].pop("model.norm.weight"))
    with pytest.raises(DamagedCheckpoint, match="it has a master, but is missing in `module`"):
        open_checkpoint(directory)


def test_a_match_by_shapes_that_is_not_the_only_one_is_refused(tmp_path: Path) -> None:
    """The frozen layer has the shapes of the trained one."""
    fixture = "zero1-bf16-llama-frozen-2ranks"
    names = {name: f"transformer.{at}" for at, name in enumerate(Case(damage.ZERO / fixture).model)}
    with pytest.raises(UnsupportedLayout, match="have no single match"):
        open_checkpoint(renamed(fixture, tmp_path, names))
