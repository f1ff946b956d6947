"""What an adapter's config says of a module, by PEFT's own rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub.adapter_config import NAME, AdapterConfig, find_adapter_config

MODULES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj_extra",
    "model.layers.1.mlp.up_proj",
    "q_proj",
]
KEYS = ["q_proj", "layers.1.self_attn.q_proj", r"layers\.1.*", "up", r".*\.up_proj", "proj"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("module", MODULES)
def test_a_pattern_fits_the_modules_that_peft_says_it_fits(module: str, key: str) -> None:
    from peft.utils.other import get_pattern_key

    ranks, alphas = {key: 2}, {key: 1}
    data = {"r": 8, "lora_alpha": 16, "rank_pattern": ranks, "alpha_pattern": alphas}
    theirs = get_pattern_key([key], module)

    config = AdapterConfig(data)

    assert config.rank(module) == ranks.get(theirs, 8)
    assert config.alpha(module) == alphas.get(theirs, 16)


@pytest.mark.parametrize(("is_rslora", "scale"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_the_scale_divides_by_the_rank_or_by_its_root(is_rslora: bool, scale: float) -> None:
    config = AdapterConfig({"r": 4, "lora_alpha": 16, "use_rslora": is_rslora})
    assert config.scale("q_proj") == scale


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", "x"),
        ("rank_pattern", []),
        ("target_modules", ["q_proj", None]),
        ("target_modules", 7),
        ("target_parameters", "x"),
        ("modules_to_save", 5),
        ("bias", []),
        ("base_model_name_or_path", ["x"]),
        ("trainable_token_indices", {"embed_tokens": [True]}),
    ],
)
def test_a_value_of_a_type_that_peft_does_not_write_is_damage(
    key: str, value: object, tmp_path: Path
) -> None:
    (tmp_path / NAME).write_text(json.dumps({"peft_type": "LORA", key: value}))

    with pytest.raises(DamagedCheckpoint, match=f"its {key} is .*, which PEFT does not write"):
        find_adapter_config(tmp_path, [], "default", alone=True)


@pytest.mark.parametrize("indices", [[0, 5], {"embed_tokens": [1]}])
def test_a_value_of_a_type_that_peft_writes_is_read(indices: object, tmp_path: Path) -> None:
    data = {"peft_type": "LORA", "trainable_token_indices": indices, "target_modules": "q_proj"}
    data |= {"rank_pattern": {"q_proj": 4}, "bias": "none", "modules_to_save": None}
    (tmp_path / NAME).write_text(json.dumps(data))

    found = find_adapter_config(tmp_path, [], "default", alone=True)

    assert found is not None
    assert found.token_indices == indices


def test_one_of_several_adapters_is_found_in_its_folder_and_above_it(tmp_path: Path) -> None:
    """PEFT writes the config of an adapter that is not `default` into a folder of the adapter's name."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / NAME).write_text(json.dumps({"peft_type": "LORA"}))

    for named in (tmp_path, tmp_path / "b", tmp_path / "b" / NAME):
        found = find_adapter_config(named, [], "b", alone=False)
        assert found is not None and found.path == tmp_path / "b" / NAME
    with pytest.raises(MissingAsset) as caught:
        find_adapter_config(tmp_path / "b", [], "a", alone=False)
    assert caught.value.hint == f"Pass the file, or a directory with a/{NAME}."
