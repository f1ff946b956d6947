"""Quantised weights: dequantised as their library does it, merged, extracted past, kept whole, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import average, consolidate, extract_lora, merge_lora
from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError
from ckpt_tools.verification import verify
from tests.support.adapted import PREFIX, adapter_config
from tests.support.merges import assert_rounded
from tests.support.verification.directories import edit_json

FIXTURES = Path(__file__).parents[2] / "fixtures/quantised"
WEIGHTS = sorted(path.name for path in FIXTURES.iterdir() if not path.name.startswith("qlora"))
RUNS = ["qlora-accelerate", "qlora-zero2"]


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("case", WEIGHTS)
def test_it_is_the_librarys_own_dequantisation(case: str, tmp_path: Path) -> None:
    truth = load_file(FIXTURES / case / "truth.safetensors")

    consolidate(FIXTURES / case, tmp_path / "out", dequantize=True, weights_only=True, dtype="keep")

    found = _tensors(tmp_path / "out")
    assert found.keys() == truth.keys()
    assert all(_same(found[name], value) for name, value in truth.items())


@pytest.mark.parametrize("case", WEIGHTS)
def test_sixteen_bits_are_the_default(case: str, tmp_path: Path) -> None:
    truth = load_file(FIXTURES / case / "truth.safetensors")

    consolidate(FIXTURES / case, tmp_path / "out", dequantize=True, weights_only=True)

    for name, value in _tensors(tmp_path / "out").items():
        wanted = value.dtype if truth[name].dtype == torch.float32 else truth[name].dtype
        assert value.dtype.itemsize == 2
        assert _same(value, truth[name].to(wanted))


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_output_does_not_depend_on_windows_and_verify_replays_it(
    case: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dequantize": True, "weights_only": True}
    consolidate(FIXTURES / case, tmp_path / "out", workers=3, max_shard_size=100, **options)

    verdict = verify(tmp_path / "out", against=FIXTURES / case)

    assert not verdict.errors, verdict.errors


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
def test_without_dequantize_every_tensor_is_copied(case: str, dtype: Any, tmp_path: Path) -> None:
    consolidate(FIXTURES / case, tmp_path / "out", weights_only=True, dtype=dtype)

    found, held = _tensors(tmp_path / "out"), _tensors(FIXTURES / case)
    assert found.keys() == held.keys()
    for name, value in held.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("case", RUNS)
def test_an_adapter_is_extracted_from_a_run_on_four_bits(case: str, tmp_path: Path) -> None:
    """The packed shape of a frozen weight says nothing of the adapter."""
    source = FIXTURES / case
    extract_lora(
        source / "state",
        tmp_path / "out",
        config=source / "hf",
        adapter_config=source / "adapter",
    )

    theirs = load_file(source / "adapter/adapter_model.safetensors")
    ours = load_file(tmp_path / "out/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(_same(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("plain_base", [True, False])
def test_a_run_on_four_bits_is_merged(case: str, plain_base: bool, tmp_path: Path) -> None:
    source = FIXTURES / case
    base = load_file(source / "base/model.safetensors")
    factors = load_file(source / "adapter/adapter_model.safetensors")
    expected = base if plain_base else base | load_file(source / "truth.safetensors")

    merge_lora(
        source / "state",
        tmp_path / "out",
        adapter_config=source / "adapter",
        config=source / "hf",
        base=source / "base" if plain_base else None,
    )

    found = _tensors(tmp_path / "out")
    assert found.keys() == base.keys()
    changed = 0
    for name, value in expected.items():
        key = f"{PREFIX}{name.removesuffix('weight')}lora_"
        if f"{key}A.weight" not in factors:
            assert _same(found[name], value)
            continue
        a, b = (factors[f"{key}{factor}.weight"].double() for factor in "AB")
        assert_rounded(found[name], value.double() + 2 * (b @ a), 1e-14)
        changed += 1
    assert changed == 2
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not verify(tmp_path / "out").errors


def _adapter(directory: Path, rows: int, columns: int) -> Path:
    """An adapter on the one weight of a fixture."""
    directory.mkdir()
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_"
    factors = {f"{name}A.weight": torch.randn(2, columns), f"{name}B.weight": torch.randn(rows, 2)}
    save_file(factors, directory / "adapter_model.safetensors")
    config = adapter_config(target_modules=["up_proj"], fan_in_fan_out=False)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("case", [case for case in WEIGHTS if case != "mxfp4"])
def test_an_update_is_added_to_the_values_and_not_to_the_codes(case: str, tmp_path: Path) -> None:
    ((name, value),) = load_file(FIXTURES / case / "truth.safetensors").items()
    adapter = _adapter(tmp_path / "adapter", *value.shape)

    merge_lora(
        FIXTURES / case, tmp_path / "out", adapter_dir=adapter, weights_only=True, dtype="fp32"
    )

    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}{name[:-6]}lora_{f}.weight"].double() for f in "AB")
    found = _tensors(tmp_path / "out")
    assert found.keys() == {name}
    assert_rounded(found[name], value.double() + 2 * (b @ a), 1e-12)


def _stored(directory: Path, tensors: dict[str, torch.Tensor], quantizer: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantizer}))
    return directory


def _gptq(directory: Path) -> Path:
    name = "model.layers.0.mlp.up_proj."
    tensors = {
        "model.norm.weight": torch.ones(16).half(),
        f"{name}qweight": torch.randint(0, 2**31 - 1, (4, 16), dtype=torch.int32),
        f"{name}qzeros": torch.zeros(1, 2, dtype=torch.int32),
        f"{name}scales": torch.ones(1, 16).half(),
        f"{name}g_idx": torch.zeros(32, dtype=torch.int32),
    }
    return _stored(directory, tensors, {"quant_method": "gptq", "bits": 4})


def test_gptq_is_refused_by_name_and_the_hint_works(tmp_path: Path) -> None:
    source, adapter = _gptq(tmp_path / "gptq"), _adapter(tmp_path / "adapter", 16, 32)
    options: dict[str, Any] = {"adapter_dir": adapter, "weights_only": True}
    with pytest.raises(UnsupportedLayout, match=r"quantised \(GPTQ\)") as caught:
        merge_lora(source, tmp_path / "out", **options)
    assert "--base" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()

    plain = {"model.layers.0.mlp.up_proj.weight": torch.randn(16, 32).half()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    merge_lora(source, tmp_path / "out", base=base, **options)

    assert _tensors(tmp_path / "out").keys() == {"model.norm.weight", *plain}


@pytest.mark.parametrize(
    "ends",
    [
        ["weight._data", "weight._scale"],
        ["W_q", "scale", "zero", "meta"],
        ["codes", "codebooks", "scales"],
        ["centroids.weight", "indices", "weight_scale"],
    ],
)
def test_tensors_of_any_quantiser_are_left_out_where_a_base_has_the_weight(
    tmp_path: Path, ends: list[str]
) -> None:
    module = "model.layers.0.mlp.up_proj"
    tensors = {f"{module}.{end}": torch.ones(16, 4, dtype=torch.int32) for end in ends}
    tensors["model.norm.weight"] = torch.ones(16).half()
    source = _stored(tmp_path / "in", tensors, {"quant_method": "new"})
    plain = {f"{module}.weight": torch.randn(16, 32).half()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    options: dict[str, Any] = {"adapter_dir": _adapter(tmp_path / "adapter", 16, 32)}

    with pytest.raises((UnsupportedLayout, UsageError), match=r"quantiser|has no weight of"):
        merge_lora(source, tmp_path / "out", weights_only=True, **options)
    merge_lora(source, tmp_path / "out", weights_only=True, base=base, **options)

    assert _tensors(tmp_path / "out").keys() == {"model.norm.weight", *plain}


@pytest.mark.parametrize(
    ("columns", "scales", "method"),
    [(16, 16, "GPTQ"), (2, 16, "AWQ"), (16, None, "GPTQ or AWQ")],
)
def test_packed_words_without_an_order_are_named_by_what_they_pack(
    tmp_path: Path, columns: int, scales: int | None, method: str
) -> None:
    """GPTQ may leave out g_idx; its words hold rows, and those of AWQ hold columns."""
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.qweight": torch.zeros(4, columns, dtype=torch.int32)}
    if scales is not None:
        tensors[f"{name}.scales"] = torch.ones(1, scales).half()
    source = _stored(tmp_path / "in", tensors, {"quant_method": "gptq", "bits": 4})

    with pytest.raises(UnsupportedLayout) as caught:
        consolidate(source, tmp_path / "out", weights_only=True, dequantize=True)

    assert f"quantised ({method})" in caught.value.fact


@pytest.mark.parametrize(
    ("case", "quantizer", "fact"),
    [
        ("fp8-blocks", {}, "names the method None"),
        ("fp8-blocks", {"quant_method": "other"}, "names the method 'other'"),
        ("compressed-fp8-channel", {"quant_method": "fbgemm_fp8"}, "names method 'fbgemm_fp8'"),
        (
            "compressed-fp8-channel",
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "nvfp4",
        ),
    ],
)
def test_scales_of_a_method_that_is_not_known_are_refused(
    case: str, quantizer: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    source = _stored(tmp_path / "in", _tensors(FIXTURES / case), quantizer)
    with pytest.raises(UnsupportedLayout, match=fact):
        consolidate(source, tmp_path / "out", dequantize=True, weights_only=True)


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    weight = torch.ones(4, 4, dtype=torch.int8)
    source = _stored(tmp_path / "in", {"a.weight": weight}, {"quant_method": "mine"})
    with pytest.raises(UnsupportedLayout, match="an unknown quantiser"):
        consolidate(source, tmp_path / "out", dequantize=True, weights_only=True)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("bitsandbytes-nf4-nested", "weight.nested_absmax"),
        ("bitsandbytes-nf4-nested", "weight.absmax"),
        ("bitsandbytes-8bit", "SCB"),
        ("fp8-blocks", "weight_scale_inv"),
        ("compressed-fp8-channel", "weight_scale"),
    ],
)
def test_scales_of_another_size_are_refused(case: str, part: str, tmp_path: Path) -> None:
    tensors = _tensors(FIXTURES / case)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    source = shutil.copytree(FIXTURES / case, tmp_path / "in")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpoint, match="do not fit each other"):
        consolidate(source, tmp_path / "out", dequantize=True, weights_only=True)


def test_a_quantised_state_is_copied_with_its_config(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    held = _tensors(FIXTURES / "bitsandbytes-nf4-nested")
    held |= {"model.embed_tokens.weight": torch.randn(64, 64).bfloat16()}
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    plain = json.loads((FIXTURES / "qlora-zero2/base/config.json").read_text())
    quantised = plain | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (source / "config.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="the config has no quantization_config"):
        consolidate(source, tmp_path / "out")

    (source / "config.json").write_text(json.dumps(quantised))
    report = consolidate(source, tmp_path / "out")

    assert _tensors(tmp_path / "out").keys() == held.keys()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization_config"] == quantised["quantization_config"]
    assert any("were not compared" in warning for warning in report.warnings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_config_of_codes_has_the_dtype_that_the_model_computes_in(
    dtype: str, tmp_path: Path
) -> None:
    """transformers creates modules in the dtype of the config, and torch has none of 8-bit floats."""
    plain = json.loads((FIXTURES / "qlora-zero2/base/config.json").read_text())
    held = _tensors(FIXTURES / "fp8-blocks") | {"model.norm.weight": torch.ones(8).bfloat16()}
    source = _stored(tmp_path / "in", held, {"quant_method": "fp8"})
    edit_json(source / "config.json", lambda config: config.update(plain))

    consolidate(source, tmp_path / "out", dtype={"bfloat16": "auto", "float32": "fp32"}[dtype])

    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_plain_weights_get_no_quantization_config(tmp_path: Path) -> None:
    """The config of a quantised base may be the only one at hand for a run that trained plain weights."""
    base = FIXTURES / "qlora-zero2/base"
    config = tmp_path / "config.json"
    shutil.copyfile(base / "config.json", config)
    edit_json(config, lambda data: data.update(quantization_config={"quant_method": "gptq"}))

    report = consolidate(base, tmp_path / "out", config=config)

    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert any("quantization_config was left out" in note for note in report.notes)


@pytest.mark.parametrize(
    ("case", "weight", "scale"),
    [
        ("fp8-blocks", "mlp.up_proj.weight", "mlp.up_proj.activation_scale"),
        ("fp8-blocks", "mlp.experts.up", "mlp.experts.up_activation_scale"),
        ("compressed-fp8-channel", "self_attn.k_proj.weight", "self_attn.k_scale"),
        ("compressed-fp8-channel", "self_attn.k_proj.weight", "self_attn.v_zero_point"),
        ("compressed-fp8-channel", "self_attn.k_proj.weight", "self_attn.k_proj.input_scale"),
    ],
)
def test_scales_of_activations_go_with_the_codes(
    case: str, weight: str, scale: str, tmp_path: Path
) -> None:
    quantizer = json.loads((FIXTURES / case / "config.json").read_text())["quantization_config"]
    old, layer = "model.layers.0.mlp.up_proj.weight", "model.layers.0."
    held = {name.replace(old, layer + weight): t for name, t in _tensors(FIXTURES / case).items()}
    source = _stored(tmp_path / "in", held | {layer + scale: torch.ones(1)}, quantizer)

    consolidate(source, tmp_path / "out", dequantize=True, weights_only=True)

    assert _tensors(tmp_path / "out").keys() == {layer + weight}


def test_a_quantiser_whose_tensors_are_not_known_is_named_by_its_config(tmp_path: Path) -> None:
    """The names do not fit the model, but another config or a key map would not help."""
    plain = json.loads((FIXTURES / "qlora-zero2/base/config.json").read_text())
    module = "model.layers.0.self_attn.q_proj."
    held = {"model.norm.weight": torch.ones(16), f"{module}codebooks": torch.ones(2, 8)}
    held[f"{module}codes"] = torch.ones(16, 2, dtype=torch.int8)
    source = _stored(tmp_path / "in", held, {"quant_method": "aqlm"})
    edit_json(source / "config.json", lambda config: config.update(plain))
    merging = {"adapter_dir": FIXTURES / "qlora-zero2/adapter"}

    for convert, options in ((consolidate, {}), (merge_lora, merging)):
        with pytest.raises(UnsupportedLayout, match=rf"'aqlm'.*{module}codes") as caught:
            convert(source, tmp_path / "out", **options)
        assert "--base DIR, and --weights-only" in (caught.value.hint or "")
    consolidate(source, tmp_path / "out", weights_only=True)

    assert _tensors(tmp_path / "out").keys() == held.keys()


def test_a_mean_of_codes_is_refused(tmp_path: Path) -> None:
    source = FIXTURES / "fp8-blocks"
    with pytest.raises(UnsupportedLayout, match="mean of quantised weights"):
        average([source, source], tmp_path / "out", weights_only=True)
    average([source, source], tmp_path / "out", weights_only=True, dequantize=True)
    truth = load_file(source / "truth.safetensors")
    assert all(_same(value, truth[name]) for name, value in _tensors(tmp_path / "out").items())
