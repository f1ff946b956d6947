"""The whole: which files a directory gets, from which source, and what is said about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_tools.hub
from ckpt_tools.errors import DamagedCheckpoint, MissingAsset, UsageError
from ckpt_tools.hub import AssetFile, AssetOptions, Assets, collect, find_config
from ckpt_tools.hub.custom_code import code_files
from ckpt_tools.tensors.dtypes import BFLOAT16

from .conftest import LLAMA, OLMO, language_model, names, put_down, write_json

MakeCheckpoint = Callable[..., Path]


def gathered(*search: Path, rows: int = 400, untied: bool = False, **named: Any) -> Assets:
    options = AssetOptions(search=search, **named)
    config = find_config(options)
    return collect(options, config, language_model(rows=rows), dtype=BFLOAT16, untied=untied)


def test_transformers_loads_what_is_put_down(
    checkpoint: MakeCheckpoint, chat_tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = checkpoint(OLMO | {"torch_dtype": "float32"}, chat_tokenizer)
    output = put_down(gathered(source, source.parent, rows=404), tmp_path / "out")

    config = AutoConfig.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    generation = GenerationConfig.from_pretrained(output)
    assert (config.vocab_size, str(config.dtype)) == (404, "torch.bfloat16")
    assert config.architectures == ["Olmo2ForCausalLM"]
    texts = tokenizer.convert_ids_to_tokens(generation.eos_token_id)
    assert texts == ["<|im_end|>", "<|endoftext|>"]
    assert generation.pad_token_id == tokenizer.pad_token_id
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "You are OLMo.hello"


def test_each_file_has_its_own_source(
    checkpoint: MakeCheckpoint, chat_tokenizer: Path, plain_tokenizer: Path, tmp_path: Path
) -> None:
    run = checkpoint(LLAMA, chat_tokenizer)
    like = Path(shutil.copytree(plain_tokenizer, tmp_path / "like"))
    write_json(like / "config.json", LLAMA | {"from": "like"})
    write_json(like / "generation_config.json", {"eos_token_id": 1})
    config = write_json(tmp_path / "elsewhere" / "config.json", LLAMA | {"from": "named"})

    assets = gathered(run, like=like, config=config)

    sources = {file.name: file.source for file in assets.files}
    assert assets.config["from"] == "named"
    assert sources["generation_config.json"] == like / "generation_config.json"
    assert sources["tokenizer.json"] == like / "tokenizer.json"
    assert sources["config.json"] is None
    assert f"tokenizer copied from {like}" in assets.notes


def test_the_tokenizer_beside_the_named_config_comes_before_that_of_the_checkpoint(
    checkpoint: MakeCheckpoint, chat_tokenizer: Path, plain_tokenizer: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(plain_tokenizer, tmp_path / "base"))
    write_json(base / "config.json", LLAMA)
    assets = gathered(checkpoint(LLAMA, chat_tokenizer), config=base)
    assert f"tokenizer copied from {base}" in assets.notes


def test_without_a_tokenizer_the_config_goes_alone_and_the_user_is_told(
    checkpoint: MakeCheckpoint,
) -> None:
    assets = gathered(checkpoint(LLAMA))
    assert names(assets) == ["config.json"]
    assert any("no tokenizer was found" in warning for warning in assets.warnings)


def test_a_tokenizer_with_more_tokens_than_rows_is_warned_about(
    checkpoint: MakeCheckpoint, chat_tokenizer: Path
) -> None:
    assets = gathered(checkpoint(OLMO, chat_tokenizer), rows=100)
    assert any("but the embedding has 100 rows" in warning for warning in assets.warnings)


def test_notes_of_every_part_are_reported(checkpoint: MakeCheckpoint, chat_tokenizer: Path) -> None:
    config = {"model_type": "olmo2"}
    assets = gathered(checkpoint(config, chat_tokenizer), untied=True)
    subjects = ("tie_word_embeddings", "architectures", "dtype", "vocab_size", "tokenizer")
    for subject in (*subjects, "generation_config.json"):
        assert any(note.startswith(subject) for note in assets.notes), subject


class TestCustomCode:
    CONFIG: dict[str, Any] = LLAMA | {
        "auto_map": {"AutoConfig": "configuration_my.C", "AutoModel": "modeling_my.M"}
    }

    @staticmethod
    def write(directory: Path, **modules: str) -> None:
        for name, text in modules.items():
            path = directory / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def test_it_is_copied_with_what_it_imports_and_is_never_run(
        self, checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        source = checkpoint(self.CONFIG)
        self.write(
            source,
            configuration_my="raise SystemExit('ran')",
            modeling_my="import torch\nfrom .layers import (\n  A,\n  B)\nfrom . import rope\n",
            layers="from .ops.fast import f\nfrom .modeling_my import M\n",
            rope="from .outside import E",
            ops__in__fast="from ..rope import r\n",
            unrelated="",
            outside="from ..elsewhere import E\nfrom . import CONSTANT\n",
        )
        assets = gathered(source)
        code = [name for name in names(assets) if name.endswith(".py")]
        assert code == [
            "configuration_my.py",
            "layers.py",
            "modeling_my.py",
            "ops/fast.py",
            "outside.py",
            "rope.py",
        ]
        output = put_down(assets, tmp_path / "out")
        assert (output / "ops/fast.py").read_bytes() == (source / "ops/fast.py").read_bytes()

    def test_code_on_the_hub_is_not_looked_for_and_is_reported(
        self, checkpoint: MakeCheckpoint
    ) -> None:
        config = LLAMA | {"auto_map": {"AutoModel": "owner/name--modeling_my.M"}}
        assets = gathered(checkpoint(config))
        assert any("the Hub repository owner/name" in warning for warning in assets.warnings)

    def test_a_missing_module_is_an_error(self, checkpoint: MakeCheckpoint) -> None:
        source = checkpoint(self.CONFIG)
        self.write(source, configuration_my="", modeling_my="from .layers import A")
        with pytest.raises(MissingAsset, match="custom code that auto_map needs") as raised:
            gathered(source)
        assert raised.value.path == source / "layers.py"
        assert "--config DIR" in str(raised.value.hint)

    @pytest.mark.parametrize("reference", ["../../etc/secret.M", "M", "a b.M"])
    def test_a_reference_that_is_no_module_is_an_error(
        self, tmp_path: Path, reference: str
    ) -> None:
        with pytest.raises(DamagedCheckpoint, match="not module"):
            code_files({"AutoModel": reference}, tmp_path, hint="")

    def test_a_file_that_is_not_python_is_an_error(self, tmp_path: Path) -> None:
        self.write(tmp_path, modeling_my="def (")
        with pytest.raises(DamagedCheckpoint, match="is not valid Python") as raised:
            code_files({"AutoModel": "modeling_my.M"}, tmp_path, hint="")
        assert raised.value.path == tmp_path / "modeling_my.py"

    @pytest.mark.parametrize("same", [True, False], ids=["same", "different"])
    def test_config_and_tokenizer_may_share_a_file_but_not_a_name(
        self, checkpoint: MakeCheckpoint, tmp_path: Path, same: bool
    ) -> None:
        config = LLAMA | {"auto_map": {"AutoModel": "mine.M"}}
        source, tokenizer = checkpoint(config), tmp_path / "tokenizer"
        settings = {"auto_map": {"AutoTokenizer": ["mine.T", None]}}
        write_json(tokenizer / "tokenizer_config.json", settings)
        self.write(source, mine="M = 1")
        self.write(tokenizer, mine="M = 1" if same else "T = 1")
        if same:
            assert names(gathered(source, tokenizer=tokenizer)).count("mine.py") == 1
            return
        with pytest.raises(UsageError, match="have different files named mine") as raised:
            gathered(source, tokenizer=tokenizer)
        assert "Pass one directory" in str(raised.value.hint)


class TestAssetFile:
    @pytest.mark.parametrize("both", [True, False])
    def test_it_is_bytes_or_a_copy_and_not_both(self, both: bool) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            AssetFile("x", content=b"" if both else None, source=Path("x") if both else None)

    def test_an_empty_file_is_a_file(self) -> None:
        assert (AssetFile("x", content=b"").nbytes, AssetFile("x", content=b"").read()) == (0, b"")

    def test_a_link_counts_as_what_it_points_to(self, tmp_path: Path) -> None:
        (tmp_path / "blob").write_bytes(b"12345")
        os.symlink(tmp_path / "blob", tmp_path / "tokenizer.json")
        assert AssetFile("tokenizer.json", source=tmp_path / "tokenizer.json").nbytes == 5


def test_the_public_names_are_those_offered() -> None:
    assert all(hasattr(ckpt_tools.hub, name) for name in ckpt_tools.hub.__all__)


def test_a_conversion_of_a_chat_model_imports_neither_torch_nor_transformers(
    checkpoint: MakeCheckpoint, chat_tokenizer: Path
) -> None:
    source = checkpoint({"model_type": "olmo2"}, chat_tokenizer)
    program = (
        "import sys; from pathlib import Path\n"
        "from ckpt_tools.hub import AssetOptions, collect, find_config\n"
        "from ckpt_tools.tensors.dtypes import BFLOAT16\n"
        f"options = AssetOptions(search=(Path({str(source)!r}),))\n"
        "shapes = {n: (BFLOAT16, (400, 8)) for n in ('model.embed_tokens.weight', 'lm_head.weight')}\n"
        "assets = collect(options, find_config(options), shapes, dtype=BFLOAT16, untied=False)\n"
        "print(assets.config['architectures'], {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "['Olmo2ForCausalLM'] set()", done.stderr
