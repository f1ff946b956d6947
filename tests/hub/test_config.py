"""The config: where it is found, and what the tensors make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub import AssetOptions, ConfigSource, find_config
from ckpt_tools.hub.config import embedding_rows, finish
from ckpt_tools.hub.files import json_bytes, read_object
from ckpt_tools.hub.tokenizer import find_tokenizer
from ckpt_tools.tensors.dtypes import BFLOAT16, FLOAT32
from tests.support.models import same_logits

from .conftest import LLAMA, Shapes, language_model, write_json


def finished(config: dict[str, Any], tensors: Shapes | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {"dtype": BFLOAT16, "untied": False} | changes
    source = ConfigSource(Path("config.json"), config)
    return finish(source, tensors if tensors is not None else language_model(), **options)


class TestSearch:
    def test_the_named_config_comes_before_like_and_the_checkpoint(self, tmp_path: Path) -> None:
        for place in ("named", "like", "run"):
            write_json(tmp_path / place / "config.json", LLAMA | {"from": place})
        run, like = (tmp_path / "run",), tmp_path / "like"

        named = find_config(AssetOptions(config=tmp_path / "named", like=like, search=run))
        liked = find_config(AssetOptions(like=like, search=run))
        found = find_config(AssetOptions(search=run))

        assert [source.data["from"] for source in (named, liked, found)] == ["named", "like", "run"]

    def test_a_config_file_may_have_any_name(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "my-llama.json", LLAMA)
        assert find_config(AssetOptions(config=path)) == ConfigSource(path, LLAMA, is_named=True)

    def test_the_folder_that_verl_keeps_beside_the_shards_is_looked_at(
        self, tmp_path: Path
    ) -> None:
        path = write_json(tmp_path / "actor" / "huggingface" / "config.json", LLAMA)
        assert find_config(AssetOptions(search=(tmp_path / "actor", tmp_path))).path == path

    @pytest.mark.parametrize(
        "other",
        [
            {"train_batch_size": 8, "zero_optimization": {"stage": 3}},
            {"model": {"d_model": 64, "n_layers": 2}, "dataset": {}},
            {"architectures": []},
        ],
        ids=["deepspeed", "olmo-core", "empty"],
    )
    def test_a_config_of_something_else_is_passed_over(
        self, tmp_path: Path, other: dict[str, Any]
    ) -> None:
        write_json(tmp_path / "run" / "step" / "config.json", other)
        path = write_json(tmp_path / "run" / "config.json", LLAMA)
        search = (tmp_path / "run" / "step", tmp_path / "run")
        assert find_config(AssetOptions(search=search)).path == path

    def test_a_like_directory_without_config_leaves_the_search_to_the_checkpoint(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "like").mkdir()
        path = write_json(tmp_path / "run" / "config.json", LLAMA)
        options = AssetOptions(like=tmp_path / "like", search=(tmp_path / "run",))
        assert find_config(options).path == path


class TestMessages:
    """What a user reads: the fact, the file, the next step."""

    def test_nothing_found_names_every_place_and_the_options(self, tmp_path: Path) -> None:
        write_json(tmp_path / "step" / "config.json", {"train_batch_size": 8})
        with pytest.raises(MissingAsset) as raised:
            find_config(AssetOptions(search=(tmp_path / "step", tmp_path)))
        assert (
            str(raised.value)
            == f"no config.json of a model was found; searched: {tmp_path / 'step'}"
            f" (its config.json is not a model config), {tmp_path}\n"
            "Pass --config FILE|DIR or --like DIR, or pass --weights-only to write the weights alone."
        )

    def test_a_file_that_cannot_be_read_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedCheckpoint, match="cannot be read") as raised:
            read_object(tmp_path)
        assert "permissions" in str(raised.value.hint)

    def test_a_named_directory_without_config_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            MissingAsset, match="--config is neither a file nor a directory with a config"
        ) as raised:
            find_config(AssetOptions(config=tmp_path, search=(tmp_path,)))
        assert raised.value.path == tmp_path / "config.json"
        assert "a directory that holds config.json" in str(raised.value.hint)

    def test_a_name_of_the_hub_is_recognised(self) -> None:
        """The address that the hint names is one that is read; see tests/storage/remote."""
        name = Path("allenai/OLMo-2-0425-1B")
        with pytest.raises(MissingAsset) as of_config:
            find_config(AssetOptions(config=name))
        with pytest.raises(MissingAsset) as of_tokenizer:
            find_tokenizer(name, ())

        for option, raised in (("config", of_config), ("tokenizer", of_tokenizer)):
            said = f" For a repository of the Hub, pass --{option} hf://allenai/OLMo-2-0425-1B."
            assert str(raised.value.hint).endswith(said)

    def test_a_named_config_of_something_else_is_an_error(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "ds.json", {"train_batch_size": 8})
        with pytest.raises(
            MissingAsset, match="model_type and architectures are missing"
        ) as raised:
            find_config(AssetOptions(config=path))
        assert "save_pretrained" in str(raised.value.hint)

    def test_a_like_that_is_no_directory_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(MissingAsset, match="is not a directory") as raised:
            find_config(AssetOptions(like=Path("allenai/OLMo-2-1124-7B"), search=(tmp_path,)))
        assert "pass --like hf://allenai/OLMo-2-1124-7B" in str(raised.value.hint)

    @pytest.mark.parametrize(
        ("content", "fact"),
        [
            (b'{"model_type": "llama",', "is not valid JSON (Expecting property name"),
            (b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec can't decode"),
            (b"", "is not valid JSON (Expecting value: line 1 column 1"),
            (b"[" * 100_000, "is not valid JSON ("),
            (b"[1]", "holds a JSON list, not an object"),
        ],
        ids=["truncated", "binary", "empty", "bottomless", "list"],
    )
    def test_a_damaged_config_is_named_with_the_place_of_the_damage(
        self, tmp_path: Path, content: bytes, fact: str
    ) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(DamagedCheckpoint) as raised:
            find_config(AssetOptions(search=(tmp_path,)))
        assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: {fact}")
        assert "Copy the file anew" in str(raised.value.hint)


class TestFinish:
    def test_what_the_conversion_does_not_decide_is_kept(self) -> None:
        config = LLAMA | {
            "dtype": "bfloat16",
            "rope_scaling": {"factor": 8.0, "dtype": 3},
            "transformers_version": "4.55.0",
            "_name_or_path": "x",
        }
        result = finished(config)
        assert result.data == config
        assert (result.notes, result.warnings) == ((), ())

    def test_the_source_is_not_changed(self) -> None:
        config = {"model_type": "gemma3", "architectures": ["X"], "text_config": {"vocab_size": 1}}
        before = json.dumps(config)
        finished(config)
        assert json.dumps(config) == before

    def test_dtype_is_written_for_new_readers_and_corrected_for_old_ones(self) -> None:
        result = finished(LLAMA | {"torch_dtype": "float32"})
        assert (result.data["dtype"], result.data["torch_dtype"]) == ("bfloat16", "bfloat16")
        assert "dtype set to bfloat16 (was float32)" in result.notes

    def test_torch_dtype_is_not_added(self) -> None:
        assert "torch_dtype" not in finished(LLAMA).data

    def test_nested_configs_follow_the_dtype_where_they_state_one(self) -> None:
        config = LLAMA | {
            "text_config": {"dtype": "float32"},
            "vision_config": {"hidden_size": 4},
            "thinker_config": {"audio_config": {"torch_dtype": "float32"}},
            "quantization_config": {"dtype": "int4"},
        }
        data = finished(config).data
        assert data["text_config"]["dtype"] == "bfloat16"
        assert data["vision_config"] == {"hidden_size": 4}
        assert data["thinker_config"]["audio_config"]["torch_dtype"] == "bfloat16"
        assert data["quantization_config"]["dtype"] == "int4"

    def test_the_vocabulary_is_as_large_as_the_embedding(self) -> None:
        result = finished(LLAMA, language_model(rows=512))
        assert result.data["vocab_size"] == 512
        assert "vocab_size set to 512, the rows of the embedding (was 400)" in result.warnings

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "transformer.wte.weight",
            "shared.weight",
            "bert.embeddings.word_embeddings.weight",
            "gpt_neox.embed_in.weight",
            "model.language_model.embed_tokens.weight",
            "model.embeddings.tok_embeddings.weight",
            "backbone.embeddings.weight",
        ],
    )
    def test_the_embedding_is_found_by_structure(self, name: str) -> None:
        others = ("transformer.wpe.weight", "lm_head.weight", "model.layers.0.mlp.weight")
        tensors: Shapes = dict.fromkeys(others, (FLOAT32, (9, 9)))
        assert embedding_rows(tensors | {name: (FLOAT32, (77, 9))}) == 77

    def test_embeddings_of_different_sizes_leave_the_vocabulary_alone(self) -> None:
        tensors = language_model() | {"talker.model.embed_tokens.weight": (BFLOAT16, (99, 8))}
        assert embedding_rows(tensors) is None
        assert finished(LLAMA | {"vocab_size": 5}, tensors).data["vocab_size"] == 5

    def test_the_nested_vocabulary_follows_and_none_is_added_above_it(self) -> None:
        config = {"model_type": "gemma3", "architectures": ["X"], "text_config": {"vocab_size": 1}}
        data = finished(config).data
        assert data["text_config"]["vocab_size"] == 400
        assert "vocab_size" not in data

    @pytest.mark.parametrize("nested", [400, 399])
    def test_a_vocabulary_above_that_of_the_language_model_stays(self, nested: int) -> None:
        """So does `resize_token_embeddings` with PaliGemma's, whose two differ from the start."""
        config = {
            "model_type": "paligemma",
            "architectures": ["X"],
            "vocab_size": 999,
            "text_config": {"vocab_size": nested},
        }
        result = finished(config)
        assert result.data["text_config"]["vocab_size"] == 400
        assert result.data["vocab_size"] == 999
        assert bool([note for note in result.warnings if "vocab_size" in note]) == (nested != 400)

    def test_the_outer_vocabulary_follows_where_no_other_is_stated(self) -> None:
        config = LLAMA | {"vocab_size": 1, "text_config": {"hidden_size": 8}}
        data = finished(config).data
        assert (data["vocab_size"], data["text_config"]) == (400, {"hidden_size": 8})

    def test_untied_weights_are_said_to_be_untied_on_every_level(self) -> None:
        config = LLAMA | {
            "tie_word_embeddings": True,
            "text_config": {},
            "vision_config": {},
            "talker_config": {"tie_word_embeddings": True},
        }
        result = finished(config, untied=True)
        for place in ("text_config", "talker_config"):
            assert result.data[place]["tie_word_embeddings"] is False
        assert result.data["tie_word_embeddings"] is False
        assert "tie_word_embeddings" not in result.data["vision_config"]
        assert any("different values" in note for note in result.notes)

    def test_tied_weights_leave_the_config_alone(self) -> None:
        assert finished(LLAMA | {"tie_word_embeddings": True}).data["tie_word_embeddings"] is True

    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("LlamaForCausalLM", "score"),
            ("LlamaForCausalLM", "v_head"),
            ("LlamaForSequenceClassification", "lm_head"),
        ],
    )
    def test_a_class_that_lacks_the_head_among_the_tensors_is_warned_about(
        self, name: str, head: str
    ) -> None:
        tensors: Shapes = {
            "model.embed_tokens.weight": (BFLOAT16, (400, 8)),
            f"{head}.weight": (BFLOAT16, (1, 8)),
        }
        (warning,) = finished(LLAMA | {"architectures": [name]}, tensors).warnings
        assert f"is {name}, which has no {head}, but the tensors hold {head}" in warning

    @pytest.mark.parametrize("head", ["score", "classifier"])
    def test_a_class_that_has_the_head_is_not_warned_about(self, head: str) -> None:
        tensors: Shapes = {f"{head}.weight": (BFLOAT16, (1, 8))}
        config = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
        assert finished(config, tensors).warnings == ()


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "longt5", "switch_transformers"])
def test_relatives_of_t5_stay_tied_by_their_config_and_that_is_warned_of(model_type: str) -> None:
    """What the setting means to them is read in ``forward``: ``if self.config.tie_word_embeddings``."""
    import inspect

    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = AutoModelForSeq2SeqLM._model_mapping[CONFIG_MAPPING[model_type]]
    source = inspect.getsource(inspect.getmodule(model_class))
    assert "scale_decoder_outputs" in source or "tie_word_embeddings" in source

    config = {"model_type": model_type, "architectures": [model_class.__name__]}
    result = finished(config | {"tie_word_embeddings": True}, untied=True)

    assert result.data["tie_word_embeddings"] is True
    assert any("also scales the output" in warning for warning in result.warnings)


def test_an_untied_t5_computes_what_it_did_before(tmp_path: Path) -> None:
    """Writing ``tie_word_embeddings: false`` would switch off the scaling of T5's output."""
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dtype="float32"
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(32, 8))
    config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = json.loads((tmp_path / "config.json").read_bytes())
    tensors: Shapes = {name: (FLOAT32, tuple(tensor.shape)) for name, tensor in state.items()}

    result = finished(source, tensors, dtype=FLOAT32, untied=True)
    (tmp_path / "config.json").write_bytes(json_bytes(result.data))
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)

    assert same_logits(loaded, model)
    assert any("also scales the output" in warning for warning in result.warnings)


LEFTOVERS: dict[str, Any] = {
    "use_cache": False,
    "gradient_checkpointing": True,
    "_name_or_path": "/scratch/me/run-7/checkpoint-100",
}


class TestLeftovers:
    """What a run sets for itself: a model that is loaded with it generates slowly, or names a lost path."""

    def config(self, is_named: bool, **changes: Any) -> Any:
        source = ConfigSource(Path("config.json"), LLAMA | LEFTOVERS | changes, is_named=is_named)
        return finish(source, language_model(), dtype=BFLOAT16, untied=False)

    def test_they_are_put_right_and_named(self) -> None:
        found = self.config(False)
        assert found.data["use_cache"] is True
        assert not {"gradient_checkpointing", "_name_or_path"} & found.data.keys()
        assert all(any(note.startswith(key) for note in found.notes) for key in LEFTOVERS)

    def test_in_a_config_that_was_named_they_stay_and_are_named(self) -> None:
        found = self.config(True)
        assert found.data.items() >= LEFTOVERS.items()
        assert all(any(text.startswith(key) for text in found.warnings) for key in LEFTOVERS)

    def test_those_of_a_language_model_inside_are_found(self) -> None:
        found = self.config(False, text_config={"use_cache": False})
        assert found.data["text_config"]["use_cache"] is True

    @pytest.mark.parametrize("name", ["owner/name", "name", ""])
    def test_a_name_of_the_hub_stays(self, name: str) -> None:
        assert self.config(False, _name_or_path=name).data["_name_or_path"] == name

    def test_a_model_that_does_not_generate_keeps_use_cache(self) -> None:
        found = self.config(False, architectures=["LlamaForSequenceClassification"])
        assert found.data["use_cache"] is False


def test_the_config_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, Olmo2Config

    Olmo2Config(vocab_size=400, hidden_size=8, architectures=["Olmo2ForCausalLM"]).save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    config = json.loads(path.read_bytes())
    assert json_bytes(config) == path.read_bytes()

    path.write_bytes(json_bytes(finished(config, language_model(rows=404), untied=True).data))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (str(loaded.dtype), loaded.vocab_size) == ("torch.bfloat16", 404)
    assert loaded.tie_word_embeddings is False
