"""Tokenizer files are copied whole from one place, and read without transformers where possible."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from ckpt_tools.errors import DamagedCheckpoint, MissingAsset
from ckpt_tools.hub.tokenizer import Tokenizer, find_tokenizer, processor_files

from .conftest import CHAT_TOKENS, OLMO_TEMPLATE, MakeTokenizer, write_json


@pytest.fixture
def copied(chat_tokenizer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_tokenizer, tmp_path / "tokenizer"))


def change(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_bytes()) | changes)


class TestFiles:
    def test_every_file_of_save_pretrained_is_copied(self, chat_tokenizer: Path) -> None:
        saved = {path.name for path in chat_tokenizer.iterdir()}
        files = Tokenizer(chat_tokenizer).files
        assert {file.name for file in files} == saved
        assert {"tokenizer.json", "chat_template.jinja"} <= saved
        assert all(file.source == chat_tokenizer / file.name for file in files)

    def test_several_chat_templates_are_copied(self, tmp_path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=FastTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        )
        tokenizer.chat_template = {"default": "d", "tool_use": "t"}
        tokenizer.save_pretrained(tmp_path)
        names = [file.name for file in Tokenizer(tmp_path).files]
        assert "additional_chat_templates/tool_use.jinja" in names
        assert Tokenizer(tmp_path).chat_template == "d"

    def test_weights_configs_and_training_states_are_not_copied(self, copied: Path) -> None:
        before = [file.name for file in Tokenizer(copied).files]
        others = (
            "config.json",
            "generation_config.json",
            "adapter_config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
            "trainer_state.json",
            "training_args.bin",
            "scheduler.pt",
            "latest",
            "zero_to_fp32.py",
            "README.md",
        )
        for name in others:
            (copied / name).write_text("{}")
        assert [file.name for file in Tokenizer(copied).files] == before

    @pytest.mark.parametrize(
        "name",
        [
            "tokenizer.model",
            "spiece.model",
            "sentencepiece.bpe.model",
            "source.spm",
            "qwen.tiktoken",
            "tekken.json",
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "preprocessor_config.json",
            "video_preprocessor_config.json",
            "processor_config.json",
            "chat_template.json",
        ],
    )
    def test_files_of_other_tokenizers_and_processors_are_copied(
        self, copied: Path, name: str
    ) -> None:
        (copied / name).write_text("{}")
        assert name in [file.name for file in Tokenizer(copied).files]

    def test_custom_tokenizer_code_comes_along_with_what_it_imports(self, copied: Path) -> None:
        change(
            copied / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]},
        )
        (copied / "tokenization_mine.py").write_text("from .words import WORDS\n")
        (copied / "words.py").write_text("WORDS = []\n")
        names = {file.name for file in Tokenizer(copied).files}
        assert {"tokenization_mine.py", "words.py"} <= names

    def test_a_model_of_images_alone_has_processor_files_and_no_tokenizer(
        self, tmp_path: Path
    ) -> None:
        write_json(tmp_path / "preprocessor_config.json", {"image_processor_type": "X"})
        assert find_tokenizer(None, (tmp_path,)) is None
        assert [file.name for file in processor_files((tmp_path,))] == ["preprocessor_config.json"]


class TestSearch:
    def test_all_files_come_from_the_first_place_with_a_tokenizer(
        self, copied: Path, plain_tokenizer: Path, tmp_path: Path
    ) -> None:
        empty = tmp_path / "empty"
        write_json(empty / "special_tokens_map.json", {"eos_token": "</s>"})
        (plain_tokenizer / "preprocessor_config.json").write_text("{}")
        found = find_tokenizer(None, (empty, copied, plain_tokenizer))
        assert found is not None
        assert {file.source.parent for file in found.files if file.source} == {copied}

    def test_any_file_that_ends_in_model_does_not_make_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "reward.model").write_bytes(b"")
        assert find_tokenizer(None, (tmp_path,)) is None

    def test_the_named_one_comes_first(self, copied: Path, plain_tokenizer: Path) -> None:
        assert find_tokenizer(plain_tokenizer, (copied,)) == Tokenizer(plain_tokenizer)

    def test_none_is_found_where_none_is(self, tmp_path: Path) -> None:
        assert find_tokenizer(None, (tmp_path, tmp_path / "absent")) is None

    @pytest.mark.parametrize(
        ("name", "fact", "hint"),
        [
            ("absent", "--tokenizer is not a directory", "Pass a directory that holds"),
            ("file.json", "--tokenizer is not a directory", "holds tokenizer.json"),
            ("empty", "--tokenizer holds no tokenizer", "tokenizer.model"),
        ],
    )
    def test_a_named_place_without_one_is_an_error(
        self, tmp_path: Path, copied: Path, name: str, fact: str, hint: str
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.json").write_text("{}")
        with pytest.raises(MissingAsset) as raised:
            find_tokenizer(tmp_path / name, (copied,))
        assert raised.value.fact == fact
        assert raised.value.path == tmp_path / name
        assert hint in str(raised.value.hint)


class TestIds:
    def test_ids_equal_those_of_transformers(self, chat_tokenizer: Path) -> None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(chat_tokenizer).get_vocab()
        ours = Tokenizer(chat_tokenizer)
        assert {token: ours.id_of(token) for token in theirs} == theirs
        assert ours.id_of("no such token") is None
        assert ours.id_count == max(theirs.values()) + 1

    def test_a_unigram_vocabulary_is_numbered_by_position(self, tmp_path: Path) -> None:
        fast = FastTokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
        fast.add_special_tokens(["<end>"])
        fast.save(str(tmp_path / "tokenizer.json"))
        assert [Tokenizer(tmp_path).id_of(token) for token in ("b", "<end>")] == [2, 3]

    @pytest.mark.parametrize("kind", [{"type": "WordLevel"}, {"type": "BPE", "merges": []}])
    def test_a_token_that_was_added_again_has_the_id_of_the_vocabulary(
        self, tmp_path: Path, kind: dict[str, Any]
    ) -> None:
        """The tokenizers library looks into the vocabulary first, whatever the file says of the token."""
        added = {"id": 7, "content": "a", "special": True, "normalized": False}
        added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        vocabulary = {"vocab": {"a": 0, "b": 1}, "unk_token": "b"}
        path = tmp_path / "tokenizer.json"
        write_json(path, {"version": "1.0", "added_tokens": [added], "model": kind | vocabulary})

        theirs = FastTokenizer.from_file(str(path))

        assert theirs.token_to_id("a") == Tokenizer(tmp_path).id_of("a") == 0

    def test_tokens_added_in_the_older_files_are_known(self, copied: Path) -> None:
        decoder = {"900": {"content": "<new>", "special": True}}
        change(copied / "tokenizer_config.json", added_tokens_decoder=decoder)
        write_json(copied / "added_tokens.json", {"<newer>": 901})
        tokenizer = Tokenizer(copied)
        assert (tokenizer.id_of("<new>"), tokenizer.id_of("<newer>")) == (900, 901)

    def test_two_ids_for_one_token_are_an_error_that_names_the_files(self, copied: Path) -> None:
        write_json(copied / "added_tokens.json", {"<|im_end|>": 7})
        with pytest.raises(DamagedCheckpoint) as raised:
            Tokenizer(copied).id_of("<|im_end|>")
        assert "more than one id: 2 in tokenizer.json, 7 in added_tokens.json" in str(raised.value)
        assert "--tokenizer DIR" in str(raised.value.hint)

    def test_a_vocabulary_of_another_form_is_read_by_transformers(self, tmp_path: Path) -> None:
        write_json(tmp_path / "vocab.json", {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3})
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
        tokenizer = Tokenizer(tmp_path)
        assert (tokenizer.id_of("ab"), tokenizer.id_of("absent")) == (3, None)
        assert tokenizer.id_count is None

    def test_a_vocabulary_that_needs_code_of_the_source_is_an_error_and_no_code_runs(
        self, tmp_path: Path
    ) -> None:
        ran = tmp_path / "ran"
        (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
        (tmp_path / "mine.tiktoken").write_text("")
        settings = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
        write_json(tmp_path / "tokenizer_config.json", settings)
        with pytest.raises(MissingAsset, match="cannot be read") as raised:
            Tokenizer(tmp_path).id_of("<|im_end|>")
        assert "tokenizer.json" in str(raised.value.hint)
        assert not ran.exists()

    def test_entries_that_are_no_ids_are_no_tokens(self, copied: Path) -> None:
        decoder = {"x": {"content": "<a>"}, "8": "<b>", "9": {}, "10": {"content": "<c>"}}
        change(copied / "tokenizer_config.json", added_tokens_decoder=decoder)
        write_json(copied / "added_tokens.json", {"<d>": "11", "<e>": 12})
        tokenizer = Tokenizer(copied)
        ids = [tokenizer.id_of(f"<{letter}>") for letter in "abcde"]
        assert ids == [None, None, 10, None, 12]

    @pytest.mark.parametrize("content", ["{}", '{"model": {"vocab": 3}}', "[]"])
    def test_a_tokenizer_without_vocabulary_is_an_error(self, copied: Path, content: str) -> None:
        (copied / "tokenizer.json").write_text(content)
        with pytest.raises(DamagedCheckpoint, match="vocabulary is missing") as raised:
            Tokenizer(copied).id_of("a")
        assert raised.value.path == copied / "tokenizer.json"


class TestSpecialTokens:
    def test_they_are_read_from_the_settings(self, chat_tokenizer: Path) -> None:
        tokenizer = Tokenizer(chat_tokenizer)
        named = [tokenizer.special(role) for role in ("eos", "bos", "pad")]
        assert named == ["<|endoftext|>", None, "<|pad|>"]

    def test_the_older_map_is_read_where_the_settings_say_nothing(self, copied: Path) -> None:
        change(copied / "tokenizer_config.json", bos_token=None)
        bos = {"content": "<|im_start|>", "lstrip": False}
        write_json(copied / "special_tokens_map.json", {"bos_token": bos})
        assert Tokenizer(copied).special("bos") == "<|im_start|>"


class TestChatTemplate:
    def test_the_file_comes_before_the_setting(self, copied: Path) -> None:
        change(copied / "tokenizer_config.json", chat_template="older")
        assert Tokenizer(copied).chat_template == OLMO_TEMPLATE

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ("text", "text"),
            ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
            ([{"name": "rag", "template": "r"}], "r"),
            (None, "of the processor"),
        ],
        ids=["text", "default-of-list", "only-of-list", "processor"],
    )
    def test_the_setting_has_several_forms(self, copied: Path, setting: Any, expected: str) -> None:
        (copied / "chat_template.jinja").unlink()
        change(copied / "tokenizer_config.json", chat_template=setting)
        write_json(copied / "chat_template.json", {"chat_template": "of the processor"})
        assert Tokenizer(copied).chat_template == expected

    def test_there_may_be_none(self, plain_tokenizer: Path) -> None:
        assert Tokenizer(plain_tokenizer).chat_template is None


def test_the_pure_reader_imports_neither_torch_nor_transformers(chat_tokenizer: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ckpt_tools.hub.tokenizer import Tokenizer;"
        f"t = Tokenizer(Path({str(chat_tokenizer)!r}));"
        f"ids = [t.id_of(token) for token in {CHAT_TOKENS!r}]; t.files; t.chat_template;"
        "print(ids, {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[0, 1, 2, 3] set()", done.stderr


def test_copies_load_as_the_original(
    make_tokenizer: MakeTokenizer, tmp_path: Path, chat_tokenizer: Path
) -> None:
    from transformers import AutoTokenizer

    for file in Tokenizer(chat_tokenizer).files:
        (tmp_path / file.name).write_bytes(file.read())
    load: Callable[[Path], Any] = AutoTokenizer.from_pretrained
    original, copy = load(chat_tokenizer), load(tmp_path)
    text = "the fox<|im_end|>"
    assert copy(text).input_ids == original(text).input_ids
    assert copy.chat_template == original.chat_template == OLMO_TEMPLATE
