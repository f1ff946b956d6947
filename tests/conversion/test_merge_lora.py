"""merge-lora: PEFT's merge_and_unload, computed on the spot, rounded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import consolidate, merge_lora
from ckpt_tools.errors import DamagedCheckpoint, MissingAsset, UnsupportedLayout, UsageError
from tests.support.adapted import (
    CASES,
    PREFIX,
    adapter_config,
    base_directory,
    facts,
    files_but_manifests,
    lora_state,
    write_checkpoint,
)
from tests.support.merges import (
    assert_all_rounded,
    assert_merged,
    assert_rounded,
    merged_in_fp32,
    ties,
    with_exact_factors,
)
from tests.support.models import loaded, same_logits
from tests.support.sampled import sampled

# One of a trait whose scale is exact in fp32; DoRA's norms are not.
EXACT = [
    ("zero2-qwen3-moe-experts", "default"),
    ("zero2-qwen3-tied-embedding", "default"),
    ("zero3-gpt2-fan-in-fan-out", "default"),
    ("zero3-olmo2-embedding", "default"),
    ("zero3-olmo2-lora", "default"),
    ("zero3-olmo2-modules-to-save", "default"),
    ("zero3-olmo2-new-tokens", "default"),
    ("zero3-olmo2-rslora", "default"),
    ("zero3-olmo2-two-adapters", "second"),
    ("zero3-qwen2-lora-bias-fp32", "default"),
    ("zero3-qwen3-tied-head", "default"),
]
MERGES = [
    (case, adapter)
    for case in CASES
    for adapter, kind in facts(case)["adapters"].items()
    if kind in ("LORA", "TRAINABLE_TOKENS")
]
TUNERS = ["zero2-olmo2-ia3", "zero2-olmo2-loha", "zero2-olmo2-oft", "zero2-olmo2-vera"]
NAME = "layers.0.q_proj.weight"


def _merge(source: Path, adapter: str, out: Path, **options: Any) -> Any:
    checkpoint = options.pop("checkpoint", source / "checkpoint")
    folder = "" if adapter == "default" else adapter
    if (source / "base").is_dir():
        options.setdefault("base", source / "base")
    return merge_lora(
        checkpoint,
        out,
        adapter=adapter,
        adapter_config=source / "truth/adapter" / folder / "adapter_config.json",
        config=source / "hf",
        **options,
    )


@pytest.mark.parametrize(("case", "adapter"), sampled(MERGES))
def test_it_is_the_exact_merge_rounded(
    case: str, adapter: str, fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft" / case

    report = _merge(source, adapter, tmp_path / "out")

    assert_merged(tmp_path / "out", source, adapter, tmp_path)
    assert any(f"merged adapter {adapter!r}" in note for note in report.notes)


@pytest.mark.parametrize(("case", "adapter"), EXACT)
def test_it_is_pefts_fp32_merge_bit_for_bit_where_that_is_exact(
    case: str, adapter: str, fixtures: Path, tmp_path: Path
) -> None:
    """And transformers loads it with no key amiss, to the logits of PEFT's merged model."""
    source = fixtures / "peft" / case
    state = with_exact_factors(load_file(source / "truth/model.safetensors"))
    run = write_checkpoint(tmp_path / "run", state)

    _merge(source, adapter, tmp_path / "out", checkpoint=run)

    theirs = merged_in_fp32(source, adapter, state)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = (tmp_path / "out/model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs/model.safetensors").read_bytes()
    assert ties(tmp_path / "out") == ties(tmp_path / "theirs")
    assert same_logits(loaded(tmp_path / "out"), theirs)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_output_does_not_depend_on_workers_or_shards(
    workers: int, fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft/zero3-olmo2-lora"
    state = with_exact_factors(load_file(source / "truth/model.safetensors"))
    run = write_checkpoint(tmp_path / "run", state)
    _merge(
        source, "default", tmp_path / "out", checkpoint=run, workers=workers, max_shard_size=2000
    )

    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        found |= load_file(path)
    expected = merged_in_fp32(source, "default", state).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_pefts_fp32_merge_is_as_near_as_the_docs_say(rank: int, tmp_path: Path) -> None:
    """The bound in :mod:`ckpt_tools.transforms.merge`, which rests on the products of fp32 sums."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(rank)
    linear = torch.nn.Sequential(torch.nn.Linear(130, 70, bias=False))
    config = LoraConfig(r=rank, lora_alpha=24, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(linear, config)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    state = {name: value.clone() for name, value in model.state_dict().items()}
    settings = adapter_config(r=rank, lora_alpha=24, target_modules=["0"])
    run = write_checkpoint(tmp_path / "run", state, settings)

    merge_lora(run, tmp_path / "out", weights_only=True, dtype="fp32")

    ours = load_file(tmp_path / "out/model.safetensors")["0.weight"].double()
    theirs = model.merge_and_unload().state_dict()["0.weight"].double()
    b, a = (state[f"base_model.model.0.lora_{f}.default.weight"].double() for f in "BA")
    magnitudes = (b.abs() @ a.abs()) * (24 / rank)
    bound = 2.0**-24 * ((rank + 2) * magnitudes + 2 * ours.abs())
    # The terms of the second order, and of fp64.
    assert ((ours - theirs).abs() <= bound * (1 + 2.0**-15)).all()


# -- where base and adapter come from ----------------------------------------------------------


def test_an_adapter_directory_on_a_plain_base(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero3-olmo2-lora"
    base = base_directory(source.name, tmp_path / "base")

    merge_lora(base, tmp_path / "out", adapter_dir=source / "truth/adapter")

    assert_merged(tmp_path / "out", source, "default", tmp_path)


@pytest.mark.parametrize("case", ["zero3-olmo2-modules-to-save", "zero2-qwen2-bias"])
def test_what_an_adapter_directory_holds_of_the_base_replaces_it(
    case: str, fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft" / case
    tensors = {
        name.removeprefix(PREFIX).replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in load_file(source / "truth/model.safetensors").items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    # As the base was before training: what the adapter brings is not in it.
    for name in [name for name in tensors if name.endswith(("q_proj.bias", "v_proj.bias"))]:
        tensors[name] = torch.zeros_like(tensors[name])
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})

    merge_lora(
        tmp_path / "base",
        tmp_path / "out",
        adapter_dir=source / "truth/adapter",
        config=source / "hf",
    )

    assert_merged(tmp_path / "out", source, "default", tmp_path)


def test_without_a_base_the_hint_is_the_base(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero3-olmo2-lora-frozen-excluded"
    with pytest.raises(MissingAsset, match="the base has no weight of ") as caught:
        _merge(source, "default", tmp_path / "out", base=None)
    assert "--base DIR" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_the_runs_own_tokenizer_comes_before_the_bases(tmp_path: Path) -> None:
    state = {name: value for name, value in lora_state().items() if "lora_" in name}
    base = {"layers.0.q_proj.weight": torch.ones(6, 5).bfloat16()}
    run = write_checkpoint(tmp_path / "run", state, adapter_config())
    write_checkpoint(tmp_path / "base", base)
    for directory in (run, tmp_path / "base"):
        vocabulary = {"type": "WordLevel", "vocab": {directory.name: 0}}
        (directory / "tokenizer.json").write_text(json.dumps({"model": vocabulary}))
    config = {"model_type": "unheard_of", "architectures": ["Unheard"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))

    merge_lora(run, tmp_path / "out", base=tmp_path / "base")

    tokenizer = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == {"run": 0}
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "unheard_of"


# -- the scale ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {r"layers\.1\..*": 6}}, 2.0),
    ],
)
def test_the_scale(changes: dict[str, Any], scale: float, tmp_path: Path) -> None:
    state = lora_state()
    run = write_checkpoint(tmp_path / "run", state, adapter_config(**changes))

    merge_lora(run, tmp_path / "out", weights_only=True, dtype="fp32")

    name = PREFIX + "layers.0.q_proj."
    a, b = (state[f"{name}lora_{f}.default.weight"].double() for f in "AB")
    base = state[f"{name}base_layer.weight"].double()
    exact = base + (b @ a) * scale
    # Each of the two is off by (r + 2) roundings at most.
    error = 2 * 4 * 2.0**-53 * (base.abs() + (b.abs() @ a.abs()) * scale)
    assert_rounded(load_file(tmp_path / "out/model.safetensors")[NAME], exact, error)


def test_alpha_can_be_given(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state())
    with pytest.raises(MissingAsset, match="no usable lora_alpha"):
        merge_lora(run, tmp_path / "out", weights_only=True)

    merge_lora(run, tmp_path / "out", weights_only=True, lora_alpha=4)
    merge_lora(
        write_checkpoint(tmp_path / "other", lora_state(), adapter_config()),
        tmp_path / "same",
        weights_only=True,
    )

    assert files_but_manifests(tmp_path / "out") == files_but_manifests(tmp_path / "same")


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"velora_config": {"num_groups": 2}}, "velora_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"a_setting_of_next_year": 1}, "a_setting_of_next_year"),
        ({"peft_type": "NEXT_YEAR"}, "of type 'NEXT_YEAR'"),
        ({"init_lora_weights": "next_year"}, "init_lora_weights 'next_year' is not known"),
    ],
)
def test_a_setting_whose_effect_is_not_known_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config(**changes))
    with pytest.raises(UnsupportedLayout, match=named):
        merge_lora(run, tmp_path / "out", weights_only=True)
    assert not (tmp_path / "out").exists()


def test_every_default_of_peft_is_merged(tmp_path: Path) -> None:
    """A new PEFT that writes a setting by default that is not on the list fails here."""
    from peft import LoraConfig

    written = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]).to_dict()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in written.items()}
    run = write_checkpoint(tmp_path / "run", lora_state(), config)

    merge_lora(run, tmp_path / "out", weights_only=True)

    assert load_file(tmp_path / "out/model.safetensors").keys() == {NAME, "norm.weight"}


def test_a_linear_layer_that_is_targeted_by_its_parameter(tmp_path: Path) -> None:
    """PEFT wraps the parameter and not the layer; another layer is targeted as usual."""
    from peft import LoraConfig, get_peft_model

    base = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 10), "down": torch.nn.Linear(10, 6)})
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up"], target_parameters=["down.weight"])
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    live = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    runs: list[tuple[Path, dict[str, Any]]] = [
        (write_checkpoint(tmp_path / "run", live, settings), {}),
        (write_checkpoint(tmp_path / "base", plain), {"adapter_dir": tmp_path / "adapter"}),
    ]
    exact = model.double().merge_and_unload().state_dict()  # type: ignore[operator]

    for number, (source, options) in enumerate(runs):
        merge_lora(source, tmp_path / f"out{number}", weights_only=True, **options)
        found = load_file(tmp_path / f"out{number}/model.safetensors")
        assert_all_rounded(found, exact)
        assert not torch.equal(found["down.weight"], plain["down.weight"])


CHANGES_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
KEEPS_BASE = ["gaussian", "eva", "orthogonal", "mica", True, False]


def _parts(tmp_path: Path, start: object) -> tuple[Path, Path, Path]:
    """A whole run, its adapter as PEFT saves it, and a plain base."""
    state = lora_state()
    config = adapter_config(init_lora_weights=start)
    whole = write_checkpoint(tmp_path / "whole", state, config)
    factors = {n.replace(".default", ""): v for n, v in state.items() if "lora_" in n}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plain = {
        name.removeprefix(PREFIX).replace(".base_layer", ""): value
        for name, value in state.items()
        if "lora_" not in name
    }
    return whole, adapter, write_checkpoint(tmp_path / "base", plain)


@pytest.mark.parametrize("start", [*CHANGES_BASE, *KEEPS_BASE])
def test_a_start_that_changed_the_base_needs_that_base(start: object, tmp_path: Path) -> None:
    """The whole run holds the base that it trained on; a plain base is another."""
    whole, adapter, base = _parts(tmp_path, start)
    state = {n: v for n, v in lora_state().items() if ".base_layer." not in n}
    slim = write_checkpoint(tmp_path / "slim", state, adapter_config(init_lora_weights=start))
    merge_lora(whole, tmp_path / "out", weights_only=True)
    onto_plain: list[tuple[Path, dict[str, Any]]] = [
        (base, {"adapter_dir": adapter}),
        (slim, {"base": base}),
    ]
    for number, (source, options) in enumerate(onto_plain):
        out = tmp_path / f"out{number}"
        if start in KEEPS_BASE:
            merge_lora(source, out, weights_only=True, **options)
            assert files_but_manifests(out) == files_but_manifests(tmp_path / "out")
            continue
        with pytest.raises(UnsupportedLayout, match=f"init_lora_weights '{start}'") as caught:
            merge_lora(source, out, weights_only=True, **options)
        assert "whole checkpoint" in (caught.value.hint or "")
        (tmp_path / "plain.json").write_text(json.dumps(adapter_config(init_lora_weights=True)))
        merge_lora(
            source, out, weights_only=True, adapter_config=tmp_path / "plain.json", **options
        )
        assert files_but_manifests(out) == files_but_manifests(tmp_path / "out")


# -- the account -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", "AB")
def test_a_merge_that_changes_nothing_is_refused(factor: str, tmp_path: Path) -> None:
    state = lora_state(modules=("q_proj", "v_proj"))
    state[f"{PREFIX}layers.0.v_proj.lora_{factor}.default.weight"].zero_()
    config = adapter_config(target_modules=["q_proj", "v_proj"])
    run = write_checkpoint(tmp_path / "run", state, config)
    report = merge_lora(run, tmp_path / "partly", weights_only=True)
    assert any("1 of 2 targets do not change" in text for text in report.warnings)
    base = state[PREFIX + "layers.0.v_proj.base_layer.weight"]
    assert torch.equal(
        load_file(tmp_path / "partly/model.safetensors")["layers.0.v_proj.weight"], base
    )

    state[PREFIX + "layers.0.q_proj.lora_B.default.weight"].zero_()
    run = write_checkpoint(tmp_path / "untrained", state, config)
    with pytest.raises(UsageError, match=r"would not change any of 2 targets.*layers.0.q_proj"):
        merge_lora(run, tmp_path / "out", weights_only=True)
    assert not (tmp_path / "out").exists()


def test_a_pair_without_a_target_is_refused(tmp_path: Path) -> None:
    state = lora_state()
    del state[PREFIX + "layers.0.q_proj.base_layer.weight"]
    run = write_checkpoint(tmp_path / "run", state, adapter_config())
    with pytest.raises(UsageError, match=r"the base has no weight of layers.0.q_proj"):
        merge_lora(run, tmp_path / "out", weights_only=True)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    state = lora_state()
    del state[PREFIX + "layers.0.q_proj.lora_A.default.weight"]
    run = write_checkpoint(tmp_path / "run", state, adapter_config())
    with pytest.raises(DamagedCheckpoint, match=r"lora_B.weight and no lora_A.weight"):
        merge_lora(run, tmp_path / "out", weights_only=True)


def test_a_square_matrix_needs_to_be_told_which_way_it_lies(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(rows=5), adapter_config())
    with pytest.raises(UsageError, match="is square") as caught:
        merge_lora(run, tmp_path / "out", weights_only=True)
    assert "fan_in_fan_out" in (caught.value.hint or "")


@pytest.mark.parametrize("case", TUNERS)
def test_other_tuners_are_refused(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft" / case
    with pytest.raises(UnsupportedLayout, match="is not plain LoRA or DoRA"):
        _merge(source, "default", tmp_path / "out")


def test_trained_tokens_need_their_indices(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero2-olmo2-new-tokens"
    config = json.loads((source / "truth/adapter/adapter_config.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(config | {"trainable_token_indices": [3]}))
    with pytest.raises(MissingAsset, match=r"3 rows of model.embed_tokens are trained"):
        merge_lora(
            source / "checkpoint",
            tmp_path / "out",
            adapter_config=tmp_path / "c.json",
            config=source / "hf",
        )


@pytest.mark.parametrize("index", [100_000, -1])
def test_trained_tokens_are_rows_of_the_embedding(
    index: int, fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft/zero2-olmo2-new-tokens"
    config = json.loads((source / "truth/adapter/adapter_config.json").read_text())
    config["trainable_token_indices"] = [3, 4, index]
    (tmp_path / "c.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="rows that the base does not have"):
        merge_lora(
            source / "checkpoint",
            tmp_path / "out",
            adapter_config=tmp_path / "c.json",
            config=source / "hf",
        )
    assert not (tmp_path / "out").exists()


def test_consolidate_names_the_commands_for_adapters(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero2-olmo2-lora"
    with pytest.raises(UsageError, match="holds a LoRA adapter") as caught:
        consolidate(source / "checkpoint", tmp_path / "out", config=source / "hf")
    assert "extract-lora" in (caught.value.hint or "")
    assert "merge-lora" in (caught.value.hint or "")
