"""Names of adapted models, and what their factors adapt: rules over names and shapes."""

from __future__ import annotations

import pytest

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.transforms.lora import (
    adapted_names,
    choose_adapter,
    is_adapted,
    plain_name,
    saved_names,
    with_adapter_name,
    wrapped_embeddings,
)
from ckpt_tools.transforms.lora_targets import factors, find_targets

P = "base_model.model."
# A name in a training state, and in the file that PEFT writes.
SAVED = [
    ("q_proj.lora_A.default.weight", "q_proj.lora_A.weight"),
    ("q_proj.lora_B.default.bias", "q_proj.lora_B.bias"),
    ("embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_A"),
    ("q_proj.lora_magnitude_vector.default.weight", "q_proj.lora_magnitude_vector"),
    ("q_proj.lora_magnitude_vector.default", "q_proj.lora_magnitude_vector"),
    ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
    ("score.modules_to_save.default.dense.bias", "score.dense.bias"),
    (
        "embed_tokens.token_adapter.trainable_tokens_delta.default",
        "embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    ("experts.base_layer.lora_A.default.weight", "experts.base_layer.lora_A.weight"),
]


@pytest.mark.parametrize(("live", "saved"), SAVED)
@pytest.mark.parametrize("prefix", ["", P, P + P, "policy." + P])
def test_a_name_is_saved_as_peft_saves_it(live: str, saved: str, prefix: str) -> None:
    (part,) = adapted_names([prefix + live]).adapters["default"]

    assert part.saved == P + saved


@pytest.mark.parametrize(("live", "saved"), SAVED)
def test_an_adapter_name_goes_back_in(live: str, saved: str) -> None:
    if "modules_to_save" in live:
        assert with_adapter_name(P + saved, "default") == P + saved
    else:
        name = with_adapter_name(P + saved, "default")
        (part,) = adapted_names([name]).adapters["default"]
        assert part.saved == P + saved


def test_a_module_that_is_called_like_the_adapter_keeps_its_name() -> None:
    (part,) = adapted_names([P + "default.q_proj.lora_A.default.weight"]).adapters["default"]

    assert part.saved == P + "default.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("inner", "plain"),
    [
        ("q_proj.base_layer.weight", "q_proj.weight"),
        ("experts.base_layer.base_layer.down_proj", "experts.down_proj"),
        ("lm_head.original_module.weight", "lm_head.weight"),
        ("embed_tokens.token_adapter.base_layer.weight", "embed_tokens.weight"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_wrappers_go(inner: str, plain: str) -> None:
    assert plain_name(inner) == plain
    assert adapted_names([P + inner]).plain == {P + inner: plain}


def test_what_is_beside_the_adapted_model_is_outside() -> None:
    names = adapted_names(
        ["policy." + P + "q.lora_A.default.weight", "policy." + P + "norm.weight", "v_head.weight"]
    )

    assert names.outside == ("v_head.weight",)
    assert names.base == {"policy." + P + "norm.weight": "norm.weight"}


def test_adapters_of_two_models_are_refused() -> None:
    with pytest.raises(UsageError, match=r"in 2 models: policy\., value\."):
        adapted_names([f"{a}.{P}q.lora_A.default.weight" for a in ("policy", "value")])


def test_choosing_an_adapter() -> None:
    two = adapted_names([P + "q.lora_A.one.weight", P + "q.lora_A.two.weight"])

    assert choose_adapter(two, "two") == "two"
    with pytest.raises(UsageError, match="2 adapters") as caught:
        choose_adapter(two, None)
    assert "one (1 tensor), two (1 tensor)" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no adapter 'three'"):
        choose_adapter(two, "three")
    with pytest.raises(UsageError, match="holds no adapter"):
        choose_adapter(adapted_names(["model.norm.weight"]), None)


def test_only_lora_makes_a_state_adapted() -> None:
    assert is_adapted([P + "q.lora_A.default.weight"])
    assert not is_adapted(["model.exploration.weight", "lora_alphabet.weight"])


STATE = [
    P + name
    for name in (
        "embed_tokens.base_layer.weight",
        "embed_tokens.lora_embedding_A.default",
        "embed_tokens.lora_embedding_B.default",
        "q_proj.base_layer.bias",
        "q_proj.base_layer.weight",
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
        "k_proj.bias",
        "lm_head.weight",
    )
]


@pytest.mark.parametrize(
    ("bias", "biases"),
    [
        ("none", set()),
        ("lora_only", {"q_proj.base_layer.bias"}),
        ("all", {"q_proj.base_layer.bias", "k_proj.bias"}),
    ],
)
def test_biases_and_targeted_embeddings_are_saved(bias: str, biases: set[str]) -> None:
    names = adapted_names(STATE)
    embeddings = wrapped_embeddings(names)

    saved = saved_names(names, "default", bias=bias, embeddings=embeddings, aliases={})

    assert [*embeddings] == [P + "embed_tokens.base_layer.weight"]
    assert {n for n in saved if n.endswith("bias")} == {P + b for b in biases}
    assert P + "embed_tokens.base_layer.weight" in saved
    assert P + "lm_head.weight" not in saved


# -- what factors adapt ------------------------------------------------------------------------


def _parts(*modules: str) -> list[str]:
    return [f"{P}{m}.lora_{f}.default.weight" for m in modules for f in "AB"]


def _targets(
    shapes: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]]
) -> dict[str, object]:
    pairs = factors(adapted_names(shapes).adapters["default"])
    found = find_targets(pairs, shapes, base)
    return {m: (t.weight, t.rank, t.experts, t.transposed) for m, t in found.items()}


def test_square_matrices_are_stored_like_the_others() -> None:
    a, b, c, d = _parts("c_attn", "c_proj")
    shapes = {a: (2, 6), b: (18, 2), c: (3, 6), d: (6, 3)}

    assert _targets(shapes, {"c_attn.weight": (6, 18), "c_proj.weight": (6, 6)}) == {
        "c_attn": ("c_attn.weight", 2, 1, True),
        "c_proj": ("c_proj.weight", 3, 1, True),
    }
    assert _targets({c: (3, 6), d: (6, 3)}, {"c_proj.weight": (6, 6)}) == {
        "c_proj": ("c_proj.weight", 3, 1, None)
    }


def test_nested_wrappers_find_their_parameters_by_shape() -> None:
    a, b, c, d = _parts("experts", "experts.base_layer")
    shapes = {a: (6, 8), b: (16, 6), c: (6, 16), d: (16, 6)}
    base = {"experts.gate_up_proj": (3, 16, 16), "experts.down_proj": (3, 16, 8)}

    assert _targets(shapes, base) == {
        "experts.base_layer": ("experts.gate_up_proj", 2, 3, False),
        "experts": ("experts.down_proj", 2, 3, False),
    }


def test_nested_wrappers_of_parameters_of_one_shape_are_those_that_peft_makes() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Parameter(torch.zeros(4, 6, 6))
            self.down = torch.nn.Parameter(torch.zeros(4, 6, 6))

    config = LoraConfig(r=2, target_parameters=["experts.down", "experts.gate"])
    model = get_peft_model(torch.nn.ModuleDict({"experts": Experts()}), config)  # type: ignore[arg-type]
    wrapped = {
        name.removeprefix(P): f"experts.{module.parameter_name}"
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = adapted_names(state)
    base = {plain: state[name] for name, plain in names.plain.items()}

    found = find_targets(factors(names.adapters["default"]), state, base)

    assert {module: target.weight for module, target in found.items()} == wrapped
    assert len(wrapped) == 2


def test_factors_that_fit_nothing_are_refused() -> None:
    a, b = _parts("q_proj")
    with pytest.raises(UsageError, match=r"fits no tensor of the base \(q_proj.weight"):
        _targets({a: (2, 6), b: (18, 2)}, {"q_proj.weight": (6, 7)})
    with pytest.raises(DamagedCheckpoint, match="does not fit"):
        _targets({a: (2, 6), b: (18, 3)}, {"q_proj.weight": (18, 6)})


def test_a_factor_without_its_partner_is_refused() -> None:
    a, _ = _parts("q_proj")
    with pytest.raises(DamagedCheckpoint, match=r"q_proj has lora_A.weight and no lora_B.weight"):
        factors(adapted_names([a]).adapters["default"])


def test_a_lora_tensor_that_nothing_is_known_of_is_refused() -> None:
    names = [*_parts("q_proj"), P + "q_proj.lora_A.default.scale"]
    with pytest.raises(DamagedCheckpoint, match=r"unknown LoRA tensors: .*lora_A.default.scale"):
        factors(adapted_names(names).adapters["default"])
