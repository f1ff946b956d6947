"""extract-lora: the directory that PEFT wrote of the live, gathered model, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools import extract_lora, merge_lora
from ckpt_tools.errors import (
    DamagedCheckpoint,
    MissingAsset,
    UnsupportedLayout,
    UsageError,
)
from tests.support.adapted import (
    CASES,
    PREFIX,
    adapter_config,
    base_directory,
    base_in_place,
    facts,
    files,
    files_but_manifests,
    lora_state,
    write_checkpoint,
)
from tests.support.models import same_logits
from tests.support.peft_models import live_adapted
from tests.support.sampled import sampled

LORA = [case for case in CASES if set(facts(case)["adapters"].values()) == {"LORA"}]
OTHERS = [case for case in CASES if case not in LORA]
# Each asks PEFT, which takes seconds to import: one of a trait.
ASKED = [
    *(case for case in OTHERS if case.startswith("zero2")),
    *("zero3-olmo2-patterns", "zero2-qwen3-moe-experts", "zero3-olmo2-resized"),
    *("zero3-qwen3-tied-embedding", "zero2-qwen2-bias", "fsdp2-olmo2-two-adapters"),
]


@pytest.mark.parametrize("case", sampled(LORA))
def test_rules_alone_give_pefts_directory(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft" / case
    with base_in_place(case, tmp_path):
        report = extract_lora(
            source / "checkpoint",
            tmp_path / "out",
            adapter="all",
            adapter_config=source / "truth/adapter",
        )

    assert files_but_manifests(tmp_path / "out") == files(source / "truth/adapter")
    assert not report.warnings
    assert report.files == {n: len(b) for n, b in files(tmp_path / "out").items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ASKED)
def test_peft_itself_gives_the_same_names(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft" / case
    with base_in_place(case, tmp_path):
        report = extract_lora(
            source / "checkpoint",
            tmp_path / "out",
            adapter="all",
            adapter_config=source / "truth/adapter",
            config=source / "hf",
        )

    assert files_but_manifests(tmp_path / "out") == files(source / "truth/adapter")
    assert not [note for note in (*report.notes, *report.warnings) if "PEFT" in note]


@pytest.mark.parametrize("case", ["zero2-olmo2-lora", "zero3-olmo2-dora", "zero3-olmo2-rslora"])
def test_peft_loads_it_and_gives_the_live_logits(case: str, fixtures: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = fixtures / "peft" / case
    extract_lora(source / "checkpoint", tmp_path / "out", adapter_config=source / "truth/adapter")
    base: Any = AutoModelForCausalLM.from_pretrained(
        base_directory(case, tmp_path / "base"), dtype="auto", attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False)

    assert same_logits(model, live_adapted(source))


@pytest.mark.parametrize(
    "case",
    sorted(p.parent.name for p in Path(__file__).parents[2].glob("fixtures/zero/*lora*/hf")),
)
def test_zero_checkpoints_hold_adapters_whole(case: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "zero" / case
    extract_lora(
        source / "checkpoint",
        tmp_path / "out",
        adapter_config=source / "hf",
        base_model="owner/base",
    )

    live = load_file(source / "truth/model.safetensors")
    expected = {n.replace(".default", ""): v for n, v in live.items() if ".lora_" in n}
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


# -- which adapter, and where to ---------------------------------------------------------------


def test_one_of_several_is_written_where_it_is_asked_for(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero3-olmo2-two-adapters"
    with base_in_place(source.name, tmp_path):
        report = extract_lora(
            source / "checkpoint",
            tmp_path / "out",
            adapter="second",
            adapter_config=source / "truth/adapter",
        )

    assert files_but_manifests(tmp_path / "out") == files(source / "truth/adapter/second")
    assert "left out: adapters default" in report.notes


def test_several_must_be_chosen_from(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero3-olmo2-two-adapters"
    with pytest.raises(UsageError, match="2 adapters") as caught:
        extract_lora(source / "checkpoint", tmp_path / "out")
    assert "default (6 tensors), second (4 tensors)" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_config_and_tokenizer_are_found_near_the_checkpoint(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    (run / "tokenizer.json").write_text("{}")

    extract_lora(run, tmp_path / "out")

    assert set(files(tmp_path / "out")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ckpt_tools_manifest.json",
        "tokenizer.json",
    }


# -- only its bytes ----------------------------------------------------------------------------


def test_the_base_is_not_read(tmp_path: Path) -> None:
    state = lora_state(rows=1000, columns=1000, modules=("q_proj", "v_proj"))
    config = adapter_config(target_modules=["q_proj", "v_proj"])
    run = write_checkpoint(tmp_path / "run", state, config)

    report = extract_lora(run, tmp_path / "out")

    adapter = sum(v.nbytes for n, v in state.items() if "lora_" in n)
    assert report.bytes_read == adapter == 2 * 2 * 2 * 2 * 1000
    assert (run / "model.safetensors").stat().st_size > 4_000_000


# -- a config from the tensors -----------------------------------------------------------------


def test_a_config_is_inferred_where_there_is_none(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero3-olmo2-patterns"
    report = extract_lora(
        source / "checkpoint", tmp_path / "out", lora_alpha=8, base_model="owner/base"
    )

    found = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert found == {
        "base_model_name_or_path": "owner/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_bias": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": found["r"],
        "rank_pattern": found["rank_pattern"],
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "use_dora": False,
    }
    ranks = {f"model.layers.{i}.{m}": r for i, m, r in (
        (0, "self_attn.q_proj", 2), (1, "self_attn.q_proj", 4), (0, "self_attn.v_proj", 4),
        (1, "self_attn.v_proj", 4), (0, "mlp.down_proj", 5), (1, "mlp.down_proj", 5),
    )}  # fmt: skip
    assert found["r"] == 4
    assert found["rank_pattern"] == {m: r for m, r in ranks.items() if r != 4}
    assert any("use_rslora and alpha_pattern are not visible" in note for note in report.notes)


INFERRED = [
    ("zero2-olmo2-dora", {"use_dora": True}),
    ("zero2-qwen2-bias", {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    ("zero3-qwen2-lora-bias-fp32", {"lora_bias": True, "bias": "none"}),
    ("zero3-olmo2-modules-to-save", {"modules_to_save": ["lm_head"]}),
    ("zero3-gpt2-fan-in-fan-out", {"fan_in_fan_out": True}),
    (
        "zero2-qwen3-moe-experts",
        {"r": 2, "target_modules": [], "rank_pattern": {}},
    ),
]


@pytest.mark.parametrize(("case", "expected"), INFERRED)
def test_what_the_tensors_tell_is_inferred(
    case: str, expected: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft" / case
    extract_lora(source / "checkpoint", tmp_path / "out", lora_alpha=8, base_model="owner/base")

    found = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert expected.items() <= found.items()
    written = "adapter_model.safetensors"
    assert (tmp_path / "out" / written).read_bytes() == (
        source / "truth/adapter" / written
    ).read_bytes()


def test_peft_reads_an_inferred_config(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftConfig

    run = write_checkpoint(tmp_path / "run", lora_state())
    extract_lora(run, tmp_path / "out", lora_alpha=4, base_model="owner/base")

    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 4, {"q_proj"})


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"base_model": "owner/base"}, "no usable lora_alpha", "--lora-alpha"),
        ({"lora_alpha": 4}, "base model of the adapter is unknown", "--base-model"),
        ({"lora_alpha": 0, "base_model": "b"}, "--lora-alpha must be positive", "lora_alpha"),
    ],
)
def test_nothing_is_invented(
    given: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state())
    with pytest.raises(UsageError, match=message) as caught:
        extract_lora(run, tmp_path / "out", **given)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"lora_alpha": 0}, {"base_model_name_or_path": None}])
def test_a_config_that_does_nothing_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config(**change))
    with pytest.raises(MissingAsset):
        extract_lora(run, tmp_path / "out")


def test_biases_that_nobody_knows_of_need_a_config(tmp_path: Path) -> None:
    """A file of weights does not say what was trained."""
    state = lora_state()
    state[PREFIX + "layers.0.q_proj.base_layer.bias"] = torch.ones(6)
    run = write_checkpoint(tmp_path / "run", state)
    with pytest.raises(MissingAsset, match="do not show whether biases were trained"):
        extract_lora(run, tmp_path / "out", lora_alpha=8, base_model="b")


# -- what is wrong with the input --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, "r of layers.0.q_proj is 2 in the checkpoint and 3 in the config"),
        ({"rank_pattern": {"q_proj": 5}}, "2 in the checkpoint and 5 in the config"),
        (
            {"target_modules": ["v_proj"]},
            "adapts layers.0.q_proj, which the config does not target",
        ),
        ({"target_modules": ".*v_proj"}, "which the config does not target"),
    ],
)
def test_a_config_of_another_adapter_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config(**change))
    with pytest.raises(UsageError, match=message):
        extract_lora(run, tmp_path / "out")


def test_empty_tensors_are_refused(tmp_path: Path) -> None:
    state = lora_state()
    name = PREFIX + "layers.0.q_proj.lora_B.default.weight"
    state[name] = state[name][:0]
    run = write_checkpoint(tmp_path / "run", state, adapter_config())
    with pytest.raises(
        DamagedCheckpoint, match="adapter 'default' has 1 tensor without elements"
    ) as error:
        extract_lora(run, tmp_path / "out")
    assert name in error.value.fact


def test_a_tensor_without_its_partner_is_named(tmp_path: Path) -> None:
    state = lora_state()
    del state[PREFIX + "layers.0.q_proj.lora_B.default.weight"]
    run = write_checkpoint(tmp_path / "run", state, adapter_config())
    with pytest.raises(DamagedCheckpoint, match=r"layers.0.q_proj has .* no lora_B.weight"):
        extract_lora(run, tmp_path / "out")


def test_another_tuner_needs_pefts_word(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero2-olmo2-ia3"
    with pytest.raises(MissingAsset, match="only a LoRA config can be inferred"):
        extract_lora(source / "checkpoint", tmp_path / "out")
    with pytest.raises(UnsupportedLayout, match="what PEFT saves of a IA3 adapter is not known"):
        extract_lora(
            source / "checkpoint", tmp_path / "out", adapter_config=source / "truth/adapter"
        )


def test_a_config_that_targets_more_than_was_saved_is_refused(
    fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "peft/zero2-olmo2-lora"
    config = json.loads((source / "truth/adapter/adapter_config.json").read_text())
    config["target_modules"].append("k_proj")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="has 4 tensors that the checkpoint lacks"):
        extract_lora(
            source / "checkpoint", tmp_path / "out", adapter_config=tmp_path, config=source / "hf"
        )


def test_an_embedding_of_the_base_that_was_left_out_is_said_to_be_frozen(
    fixtures: Path, tmp_path: Path
) -> None:
    """Trainer leaves out frozen weights, and PEFT writes the embedding that an adapter targets."""
    source = fixtures / "peft/zero3-olmo2-embedding"
    live = load_file(source / "truth/model.safetensors")
    factors = {name: value for name, value in live.items() if "lora_" in name}
    given: Any = {"adapter_config": source / "truth/adapter"}
    run = write_checkpoint(tmp_path / "run", factors)
    with pytest.raises(UsageError, match=r"lacks: .*embed_tokens\.base_layer\.weight") as raised:
        extract_lora(run, tmp_path / "out", config=source / "hf", **given)
    assert "run merge-lora with --base DIR" in str(raised.value.hint)

    base = base_directory("zero3-olmo2-embedding", tmp_path / "base")
    merge_lora(run, tmp_path / "merged", base=base, **given)

    merged, before = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", base))
    theirs = load_file(source / "truth/merged-peft.safetensors")
    changed = "model.embed_tokens.weight"
    assert not torch.equal(merged[changed], before[changed])
    torch.testing.assert_close(merged[changed], theirs[changed].to(merged[changed].dtype))


def test_trained_tensors_that_peft_leaves_out_are_named(fixtures: Path, tmp_path: Path) -> None:
    """Biases were trained, and the config says none belong to the adapter."""
    source = fixtures / "peft/zero2-qwen2-bias"
    config = json.loads((source / "truth/adapter/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))

    report = extract_lora(source / "checkpoint", tmp_path / "out", adapter_config=tmp_path)

    (warning,) = report.warnings
    assert warning.startswith("trained, but not part of an adapter as PEFT saves it: ")
    assert warning.count("base_layer.bias") == 2


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("keep", torch.float32), ("fp16", torch.float16)],
)
def test_dtypes(dtype: Any, expected: torch.dtype, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "peft/zero2-olmo2-lora"
    config = source / "truth/adapter"
    extract_lora(source / "checkpoint", tmp_path / "out", adapter_config=config, dtype=dtype)

    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {expected}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    with pytest.raises(UsageError, match="'int3' is not a dtype"):
        extract_lora(run, tmp_path / "out", dtype="int3")  # type: ignore[arg-type]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())

    report = extract_lora(run, tmp_path / "out", dry_run=True)

    assert not (tmp_path / "out").exists()
    assert [file["file"] for file in report.plan] == ["adapter_model.safetensors"]
    assert report.bytes_read == 0


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", lora_state(), adapter_config())
    before = files(run)
    with pytest.raises(UsageError, match="would delete the input"):
        extract_lora(run, run, overwrite=True)
    assert files(run) == before
