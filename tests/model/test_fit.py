"""A state is brought to the names of its model, or the run stops and says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.hub import AssetOptions, ConfigSource, find_config
from ckpt_tools.model.fit import Fitted, fit_to_model
from ckpt_tools.tensors.catalogue import Catalogue, Tensor
from ckpt_tools.tensors.dtypes import BFLOAT16, DType
from tests.conversion.test_end_to_end import Case
from tests.writing.test_bytes import on_disk

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied() -> Case:
    from tests.conftest import FIXTURES

    return Case(FIXTURES / "zero" / "zero2-bf16-qwen3-tied-2ranks")


@pytest.fixture(scope="module")
def state(tied: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of a model whose config ties the head to the embedding; the head is there too."""
    return dict(on_disk(tmp_path_factory.mktemp("state"), tied.model()))


def config_of(case: Case, directory: Path, **changes: Any) -> ConfigSource:
    data = json.loads((case.hf / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(data))
    return find_config(AssetOptions(config=directory / "config.json"))


def fit(
    tensors: Mapping[str, Tensor],
    config: ConfigSource,
    *,
    ties: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    dtype: DType = BFLOAT16,
) -> Fitted:
    also = None if extra is None else Catalogue(extra)
    return fit_to_model(Catalogue(tensors, ties), config, also, dtype)


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert set(names) <= tensors.keys()
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_equal_values_under_tied_names_are_written_once(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted = fit(state, config_of(tied, tmp_path))

    assert set(fitted.catalogue) == set(state) - {HEAD}
    assert fitted.catalogue[EMBEDDING] is state[EMBEDDING]
    assert fitted.untied == ()
    assert [note for note in fitted.notes if HEAD in note and EMBEDDING in note]


def test_a_tie_that_training_lists_the_other_way_round_is_turned(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted = fit(without(state, EMBEDDING), config_of(tied, tmp_path), ties={EMBEDDING: HEAD})

    assert set(fitted.catalogue) == set(state) - {HEAD}
    assert fitted.catalogue[EMBEDDING] is state[HEAD]


def test_a_head_alone_is_the_embedding_of_a_tied_model(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted = fit(without(state, EMBEDDING), config_of(tied, tmp_path))

    assert set(fitted.catalogue) == set(state) - {HEAD}
    assert fitted.catalogue[EMBEDDING] is state[HEAD]


def test_one_element_of_difference_unties(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    head = tied.model()[HEAD].clone()
    head[-1, -1] += 1
    other = on_disk(tmp_path / "other", {HEAD: head})

    fitted = fit({**state, **other}, config_of(tied, tmp_path))

    assert set(fitted.catalogue) == set(state)
    assert fitted.catalogue[HEAD] is other[HEAD]
    assert fitted.untied == (HEAD,)
    assert [w for w in fitted.warnings if HEAD in w and "tie_word_embeddings becomes false" in w]


def test_the_order_is_that_of_the_model(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    config = config_of(tied, tmp_path)
    backwards = dict(reversed(state.items()))

    names = list(fit(backwards, config).catalogue)

    assert names == list(fit(state, config).catalogue)
    assert names[0] == EMBEDDING
    assert names[-1] == "model.norm.weight"


@pytest.mark.parametrize("count", [1, 3, 9])
def test_missing_tensors_are_named(
    tied: Case, state: dict[str, Tensor], tmp_path: Path, count: int
) -> None:
    missing = [name for name in state if ".mlp." in name or ".self_attn." in name][:count]

    with pytest.raises(DamagedCheckpoint) as caught:
        fit(without(state, *missing), config_of(tied, tmp_path))

    assert set(caught.value.missing) == set(missing)
    assert caught.value.exit_code == 4
    assert "--like DIR" in str(caught.value.hint)
    assert caught.value.missing[0] in caught.value.fact
    unnamed = [name for name in missing if name not in caught.value.fact]
    assert not unnamed or f"and {len(unnamed)} more" in caught.value.fact


def test_missing_tensors_come_from_the_other_directory_and_no_others(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tied.model().items()}
    extra = on_disk(tmp_path / "extra", zeros)

    fitted = fit(without(state, lost, HEAD), config_of(tied, tmp_path), extra=extra)

    assert fitted.catalogue[lost] is extra[lost]
    others = [name for name in fitted.catalogue if name != lost]
    assert len(others) == len(state) - 2
    assert all(fitted.catalogue[name] is state[name] for name in others)
    (warning,) = [warning for warning in fitted.warnings if "--like" in warning]
    assert lost in warning


def test_a_tensor_of_another_shape_is_refused(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rows, columns = state[name].shape
    short = on_disk(tmp_path / "short", {name: tied.model()[name][:-1].clone()})

    with pytest.raises(UsageError) as caught:
        fit({**state, **short}, config_of(tied, tmp_path))

    assert caught.value.tensor == name
    assert str((rows - 1, columns)) in caught.value.fact
    assert str((rows, columns)) in caught.value.fact


def test_a_tensor_whose_axes_are_turned_is_written_and_mentioned(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    turned = on_disk(tmp_path / "turned", {name: tied.model()[name].T.contiguous()})

    fitted = fit({**state, **turned}, config_of(tied, tmp_path))

    assert fitted.catalogue[name] is turned[name]
    assert [warning for warning in fitted.warnings if name in warning]


def test_what_the_other_directory_lacks_too_is_missing(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    found, lost = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    extra = on_disk(tmp_path / "extra", {found: tied.model()[found]})

    with pytest.raises(DamagedCheckpoint) as caught:
        fit(without(state, found, lost), config_of(tied, tmp_path), extra=extra)

    assert caught.value.missing == (lost,)


def test_a_tensor_that_the_model_does_not_have_is_written_and_mentioned(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    extra = on_disk(tmp_path / "extra", {"value_head.weight": torch.zeros(1, 10)})

    fitted = fit({**state, **extra}, config_of(tied, tmp_path))

    assert fitted.catalogue["value_head.weight"] is extra["value_head.weight"]
    assert [warning for warning in fitted.warnings if "value_head.weight" in warning]


def test_the_config_of_another_model_is_refused(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    other = Case(tied.path.parent / "zero2-bf16-gpt2-2ranks")

    with pytest.raises(UsageError, match="the config describes GPT2LMHeadModel") as caught:
        fit(state, config_of(other, tmp_path))

    assert "--weights-only" in str(caught.value.hint)
    assert caught.value.path == tmp_path / "config.json"


def test_the_config_of_a_related_model_is_not_damage_of_the_checkpoint(
    state: dict[str, Tensor], tied: Case, tmp_path: Path
) -> None:
    """Most names are those of the model. What is missing has a counterpart that the model does not have."""
    norm = "model.layers.0.self_attn.q_norm.weight"
    renamed = without(state, norm) | {"model.layers.0.pre_norm.weight": state[norm]}

    with pytest.raises(UsageError, match="and the model has no model"):
        fit(renamed, config_of(tied, tmp_path))


def test_a_shape_that_does_not_fit_comes_before_a_tensor_that_is_missing(
    state: dict[str, Tensor], tied: Case, tmp_path: Path
) -> None:
    """The config of a larger model has more layers too, but the checkpoint is whole."""
    larger = {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "intermediate_size": 99,
    }

    with pytest.raises(UsageError, match="the config describes"):
        fit(state, config_of(tied, tmp_path, **larger))


def test_a_model_under_an_attribute_is_refused_and_the_attributes_are_named(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    wrapped = {f"policy.{name}": tensor for name, tensor in state.items()}
    wrapped |= on_disk(tmp_path / "value", {"value_model.head.weight": torch.zeros(3)})

    with pytest.raises(UsageError) as caught:
        fit(wrapped, config_of(tied, tmp_path))

    assert "policy, value_model" in str(caught.value.hint)


def test_a_config_of_more_layers_lacks_their_tensors(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    config = config_of(tied, tmp_path, num_hidden_layers=3, layer_types=["full_attention"] * 3)

    with pytest.raises(DamagedCheckpoint, match=r"model\.layers\.2\."):
        fit(state, config)


def test_a_model_that_transformers_does_not_know_is_written_unchecked(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    config = config_of(tied, tmp_path, model_type="novelty", architectures=["NoveltyForCausalLM"])

    fitted = fit(without(state, EMBEDDING), config)

    assert list(fitted.catalogue) == list(without(state, EMBEDDING))
    (warning,) = fitted.warnings
    assert "not checked" in warning


def test_what_is_written_unchecked_says_which_names_are_left_out(state: dict[str, Tensor]) -> None:
    fitted = Fitted.unchecked(Catalogue(without(state, HEAD), {HEAD: EMBEDDING}))

    assert set(fitted.catalogue) == set(state) - {HEAD}
    (note,) = fitted.notes
    assert HEAD in note
    assert EMBEDDING in note


def scored(state: Mapping[str, Tensor], directory: Path, name: str) -> dict[str, Tensor]:
    """The state without its head, and with one of another kind in its place."""
    return {**without(state, HEAD), **on_disk(directory, {name: torch.ones(1, 16).bfloat16()})}


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("like", [True, False])
def test_a_reward_model_with_a_causal_config_is_refused_with_its_class(
    tied: Case, state: dict[str, Tensor], tmp_path: Path, tied_head: bool, like: bool
) -> None:
    """``--like`` a causal model must not make a causal model of it."""
    config = config_of(tied, tmp_path, tie_word_embeddings=tied_head)
    tensors = scored(state, tmp_path, "score.weight")

    with pytest.raises(UsageError, match=r"score\.weight") as caught:
        fit(tensors, config, extra={HEAD: state[HEAD]} if like else None)

    assert "they are those of Qwen3ForSequenceClassification" in caught.value.fact
    needed = '"architectures": ["Qwen3ForSequenceClassification"] and "num_labels": 1,'
    assert needed in str(caught.value.hint)


def test_a_head_with_more_rows_than_the_embedding_is_not_blamed_on_the_config(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """The directory of an adapter on a resized head, merged into the base before the resize."""
    rows, columns = state[EMBEDDING].shape
    head = on_disk(tmp_path, {HEAD: torch.ones(rows + 4, columns).bfloat16()})

    with pytest.raises(
        UsageError, match=f"{rows + 4} rows, and the embedding .* has {rows}"
    ) as caught:
        fit({**state, **head}, config_of(tied, tmp_path, tie_word_embeddings=False))

    assert "Merge the checkpoint of the training run" in str(caught.value.hint)


def test_a_head_of_a_reward_model_beside_the_head_of_its_base_is_refused(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """An adapter of a reward model on a causal base: the base has a head of its own."""
    tensors = {**state, **scored(state, tmp_path, "score.weight")}

    with pytest.raises(UsageError, match=r"hold score\.weight: they are those of") as caught:
        fit(tensors, config_of(tied, tmp_path, tie_word_embeddings=False))

    assert '"architectures": ["Qwen3ForSequenceClassification"]' in str(caught.value.hint)


def test_a_value_head_beside_a_tied_language_model_is_written_with_a_warning(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = scored(state, tmp_path, "v_head.summary.weight")

    fitted = fit(tensors, config_of(tied, tmp_path, tie_word_embeddings=True))

    assert "v_head.summary.weight" in fitted.catalogue
    assert any("v_head.summary.weight" in warning for warning in fitted.warnings)


def test_complex_numbers_for_a_real_parameter_are_refused(
    tied: Case, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """from_pretrained casts to the dtype of the parameter, and drops the imaginary part."""
    name = "model.norm.weight"
    values = torch.full(state[name].shape, 1 + 2j, dtype=torch.complex64)
    odd = {**state, **on_disk(tmp_path, {name: values})}

    with pytest.raises(
        UsageError, match=r"its dtype is complex64, and .* real parameter"
    ) as caught:
        fit(odd, config_of(tied, tmp_path))

    assert caught.value.tensor == name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("quantised", [False, True])
def test_integers_for_a_floating_parameter_are_written_with_a_warning(
    tied: Case, state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype, quantised: bool
) -> None:
    """from_pretrained casts them, so they stay the same numbers; a quantizer converts them."""
    name = "model.norm.weight"
    odd = {**state, **on_disk(tmp_path, {name: torch.ones(state[name].shape, dtype=dtype)})}
    changes = {"quantization_config": {"quant_method": "gptq"}} if quantised else {}

    fitted = fit(odd, config_of(tied, tmp_path, **changes))

    told = [warning for warning in fitted.warnings if "floating-point parameters" in warning]
    wanted = f"cast these from {str(dtype).removeprefix('torch.')}: {name}"
    assert [warning.endswith(wanted) for warning in told] == ([] if quantised else [True])
