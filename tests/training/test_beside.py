"""Config, tokenizer and adapter config of live objects become the files that they would have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ckpt_tools.errors import MissingAsset
from ckpt_tools.training.beside import beside


class Config:
    """As transformers' configs write themselves."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_json_string(self, *, use_diff: bool) -> str:
        assert use_diff
        return json.dumps(self.values)


class Generation(Config):
    def __init__(self, *, from_model: bool, **values: Any) -> None:
        super().__init__(**values)
        self._from_model_config = from_model


class Model(nn.Module):
    def __init__(self, config: Any = None, generation: Any = None) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation
        self.name_or_path = "the/base"


class Tokenizer:
    def save_pretrained(self, directory: str) -> None:
        Path(directory).mkdir()
        (Path(directory) / "tokenizer.json").write_text("{}")


class AdapterConfig:
    is_prompt_learning = False

    def __init__(self, task_type: str | None, **values: Any) -> None:
        self.task_type, self.values = task_type, values

    def save_pretrained(self, directory: str, auto_mapping_dict: Any) -> None:
        Path(directory).mkdir(parents=True)
        text = json.dumps({**self.values, "auto_mapping": auto_mapping_dict})
        (Path(directory) / "adapter_config.json").write_text(text)


class Adapted(Model):
    """As PEFT's model is."""

    def __init__(self, **adapters: AdapterConfig) -> None:
        super().__init__()
        self.peft_config = adapters
        self.base = Model(Config(model_type="llama"))

    def get_base_model(self) -> nn.Module:
        return self.base

    def _get_base_model_class(self, *, is_prompt_tuning: bool) -> type:
        return Model


def files(
    model: Any, *, is_adapter: bool = False, needed: bool = True, **given: Any
) -> dict[str, Any]:
    """What is made, by the path in the temporary directory."""
    options = {"config": None, "tokenizer": None, **given}
    with beside(model, is_adapter=is_adapter, is_needed=needed, **options) as found:
        places = [found.config, found.tokenizer, found.adapter_configs]
        held: dict[str, Any] = {}
        for place in filter(None, places):
            home = place.parent
            for path in home.rglob("*.json"):
                held[path.relative_to(home).as_posix()] = json.loads(path.read_text())
    assert not any(
        place.exists() for place in places if place is not None and "ckpt-tools-" in str(place)
    )
    return held


def test_the_config_is_the_model_s_with_its_class() -> None:
    config = Config(model_type="llama", architectures=["Another"])

    assert files(Model(config)) == {
        "config.json": {"model_type": "llama", "architectures": ["Model"]}
    }
    assert config.values["architectures"] == ["Another"]


def test_a_config_that_is_given_is_taken_as_it_is(tmp_path: Path) -> None:
    own = Config(model_type="llama")
    given = Config(model_type="olmo2", architectures=["Olmo2ForCausalLM"])

    assert files(Model(own), config=given) == {"config.json": given.values}
    with beside(
        Model(own), config=tmp_path, tokenizer=str(tmp_path), is_adapter=False, is_needed=True
    ) as found:
        assert (found.config, found.tokenizer) == (tmp_path, tmp_path)


def test_a_generation_config_counts_only_where_it_says_something_of_its_own() -> None:
    made = Generation(from_model=True, eos_token_id=2)
    loaded = Generation(from_model=False, temperature=0.6)

    assert [*files(Model(Config(), made))] == ["config.json"]
    assert files(Model(Config(), loaded))["generation_config.json"] == {"temperature": 0.6}


def test_the_tokenizer_saves_itself() -> None:
    assert "tokenizer/tokenizer.json" in files(Model(Config()), tokenizer=Tokenizer())


def test_without_a_config_there_is_nothing_to_save_it_by() -> None:
    with pytest.raises(MissingAsset, match="a Model has no config"):
        files(Model())
    assert files(Model(), needed=False) == {}


def test_adapter_configs_are_as_peft_writes_them() -> None:
    known = AdapterConfig("CAUSAL_LM", base_model_name_or_path="named")
    bare = AdapterConfig(None, base_model_name_or_path=None)

    found = files(Adapted(default=known, other=bare), is_adapter=True, needed=False)

    assert found["adapters/default/adapter_config.json"] == {
        "base_model_name_or_path": "named",
        "auto_mapping": None,
    }
    assert found["adapters/other/adapter_config.json"] == {
        "base_model_name_or_path": "the/base",
        "auto_mapping": {"base_model_class": "Model", "parent_library": Model.__module__},
    }
    assert found["config.json"] == {"model_type": "llama", "architectures": ["Model"]}
