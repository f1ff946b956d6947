"""What an adapter's config says of a module, by PEFT's own rule."""

from __future__ import annotations

import math

import pytest

from ckpt_tools.hub.adapter_config import AdapterConfig

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
