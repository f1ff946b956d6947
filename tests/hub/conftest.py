"""Real tokenizers, trained here in milliseconds, and small builders of sources and outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ckpt_tools.hub import Assets
from ckpt_tools.tensors.dtypes import BFLOAT16, DType

TEXT = ["the quick brown fox jumps over the lazy dog", "a checkpoint is a catalogue of tensors"] * 9
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
OLMO_TEMPLATE = "{{ 'You are OLMo.' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"

Shapes = dict[str, tuple[DType, tuple[int, ...]]]
MakeTokenizer = Callable[..., Path]


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def language_model(rows: int = 400, **extra: tuple[int, ...]) -> Shapes:
    shapes = {"model.embed_tokens.weight": (rows, 8), "lm_head.weight": (rows, 8), **extra}
    return {name: (BFLOAT16, shape) for name, shape in shapes.items()}


def put_down(assets: Assets, directory: Path) -> Path:
    """What the caller of the package does with it, in its plainest form."""
    for file in assets.files:
        target = directory / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read())
        assert target.stat().st_size == file.nbytes
    return directory


def names(assets: Assets) -> list[str]:
    return [file.name for file in assets.files]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Build a directory as ``save_pretrained`` of a byte-level BPE tokenizer leaves it."""

    def make(
        *, tokens: tuple[str, ...] = CHAT_TOKENS, template: str | None = None, **special: str
    ) -> Path:
        from transformers import PreTrainedTokenizerFast

        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(tokens), initial_alphabet=alphabet
        )
        fast.train_from_iterator(TEXT, trainer)
        directory = tmp_path_factory.mktemp("tokenizer")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer: MakeTokenizer) -> Path:
    return make_tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>", template=OLMO_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer(make_tokenizer: MakeTokenizer) -> Path:
    return make_tokenizer(
        tokens=("<s>", "</s>", "<pad>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Build a checkpoint directory with a config, and the files of a tokenizer if one is given."""

    def make(config: dict[str, Any] | None, tokenizer: Path | None = None) -> Path:
        directory = tmp_path / "run" / "global_step1"
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
        if config is not None:
            write_json(directory / "config.json", config)
        return directory

    return make


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
OLMO = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 400}
