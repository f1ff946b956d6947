"""Files that belong to a model and are no part of config or tokenizer come along; others are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools.errors import MissingAsset
from ckpt_tools.hub import AssetOptions, Assets, collect, find_config
from ckpt_tools.tensors.dtypes import BFLOAT16

from .conftest import LLAMA, language_model, names, put_down, write_json

MakeCheckpoint = Callable[..., Path]

# As sentence-transformers 5 writes it for Qwen3-Embedding.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {
        "idx": 2,
        "name": "2",
        "path": "2_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]


def gathered(source: Path, **named: Path) -> Assets:
    options = AssetOptions(search=(source,), **named)
    return collect(options, find_config(options), language_model(), dtype=BFLOAT16, untied=False)


def test_modules_and_pooling_of_sentence_transformers(
    checkpoint: MakeCheckpoint, plain_tokenizer: Path, tmp_path: Path
) -> None:
    source = checkpoint(LLAMA, plain_tokenizer)
    write_json(source / "modules.json", MODULES)
    pooling = write_json(source / "1_Pooling/config.json", {"pooling_mode_lasttoken": True})
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        write_json(source / name, {"max_seq_length": 512})
    output = put_down(gathered(source), tmp_path / "out")
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert (output / "1_Pooling/config.json").read_bytes() == pooling.read_bytes()


def test_the_code_of_a_module_comes_along(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(LLAMA)
    write_json(source / "modules.json", [{"path": "", "type": "custom_st.Transformer"}])
    with pytest.raises(MissingAsset, match="custom code"):
        gathered(source)
    (source / "custom_st.py").write_text("class Transformer: ...")
    assert "custom_st.py" in names(gathered(source))


def test_a_folder_outside_is_not_read(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(LLAMA)
    write_json(source.parent / "secret/key.json", {})
    write_json(source / "modules.json", [{"path": "../secret", "type": "sentence_transformers.X"}])
    assert not any("key" in name for name in names(gathered(source)))


def test_processors_beside_the_config_and_templates_beside_the_tokenizer(
    checkpoint: MakeCheckpoint, plain_tokenizer: Path, tmp_path: Path
) -> None:
    source = checkpoint(LLAMA)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        write_json(source / name, {})
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in plain_tokenizer.iterdir():
        (tokenizer / file.name).write_bytes(file.read_bytes())
    (tokenizer / "additional_chat_templates").mkdir()
    (tokenizer / "additional_chat_templates/tool_use.jinja").write_text("{{ 'tools' }}")
    for name in ("tokenizer.model", "tekken.json", "qwen.tiktoken"):
        (tokenizer / name).write_text("{}")
    found = names(gathered(source, tokenizer=tokenizer))
    assert {"preprocessor_config.json", "video_preprocessor_config.json"} <= {*found}
    assert {"tokenizer.model", "tekken.json", "qwen.tiktoken"} <= {*found}
    assert "additional_chat_templates/tool_use.jinja" in found


def test_what_is_left_behind_is_named(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(LLAMA)
    (source / "LICENSE").write_text("terms")
    (source / "handler.py").write_text("")
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
        "latest",
        ".gitattributes",
    ):
        (source / name).write_text("")
    (note,) = [note for note in gathered(source).notes if note.startswith("not copied from ")]
    assert note == f"not copied from {source}: LICENSE, handler.py"
