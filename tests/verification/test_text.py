"""Tokenizers, chat templates and generation configs: what is wrong is named, what is published passes.

transformers answers in this process, so that it is imported once; ``TestTheProcess`` is about the child.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.hub import rendering
from ckpt_tools.verification import generation, text, tokenizer, tokenizer_child
from ckpt_tools.verification.container import read_container
from ckpt_tools.verification.directory import list_directory
from ckpt_tools.verification.problem import KINDS, Findings, Problem
from ckpt_tools.verification.text import check_text
from tests.support.verification import chat
from tests.support.verification.chat import (
    CHATML,
    CHATS,
    LLAMA,
    OLMO,
    OLMO3,
    TULU,
    Chat,
    change,
    make,
    read,
    write,
)

Damage = Callable[[Path], object]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(module: str, question: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert module == tokenizer_child.__name__
        answer = json.dumps(tokenizer_child.answer(json.loads(question)))
        return subprocess.CompletedProcess([], 0, answer, "")

    monkeypatch.setattr(text, "run_child", run_child)


def look_at(path: Path, *, trust_remote_code: bool = False) -> Findings:
    findings = Findings()
    directory = list_directory(path, findings)
    directory.trust_remote_code = trust_remote_code
    if (path / "config.json").exists():
        directory.config = read(path / "config.json")
    for file in directory.files:
        if file.endswith(".safetensors"):
            held = read_container(path, file, findings)
            assert held is not None
            if file.startswith("adapter"):
                directory.adapters[""] = dict(held.entries)
            else:
                directory.tensors.update(held.entries)
    check_text(directory, findings)
    return findings


def problems(path: Path, **options: Any) -> list[Problem]:
    return look_at(path, **options).problems


def the_problem(path: Path) -> Problem:
    (problem,) = problems(path)
    return problem


pytestmark = pytest.mark.usefixtures("in_process")


class TestWhatIsPublished:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", CHATS)
    def test_a_chat_model_has_no_problem(self, name: str, tmp_path: Path) -> None:
        findings = look_at(make(tmp_path / "out", CHATS[name]))

        assert findings.problems == []
        assert {"tokenizer", "generation config", "chat template"} <= set(findings.checked)
        assert findings.skipped == []

    @pytest.mark.slow
    @pytest.mark.parametrize("name", CHATS)
    def test_a_chat_model_that_does_not_end_with_its_turn_is_caught(
        self, name: str, tmp_path: Path
    ) -> None:
        family = CHATS[name]
        others = tuple(token for token in family.ends if token != family.closing)
        problem = the_problem(make(tmp_path / "out", family, ends=others))

        assert problem.kind == "eos-not-closing-turn"
        assert f"{family.closing} (id " in problem.detail
        assert problem.severity == ("warning" if name == "glm" else "error")

    def test_a_base_model_has_no_turn_to_close(self, tmp_path: Path) -> None:
        base = CHATML._replace(template="")
        findings = look_at(make(tmp_path / "out", base, ends=("<|endoftext|>",)))

        assert findings.problems == []
        assert "chat template" not in findings.checked

    @pytest.mark.parametrize(
        "fixture", ["zero/zero1-bf16-t5-2ranks", "zero/zero2-bf16-gpt2-2ranks"]
    )
    def test_a_model_without_a_tokenizer_says_so(self, fixture: str, fixtures: Path) -> None:
        findings = look_at(fixtures / fixture / "hf")

        assert findings.problems == []
        assert findings.skipped == ["tokenizer (there is none)"]

    def test_the_tokenizer_of_another_model_is_caught(self, fixtures: Path) -> None:
        """That run had a tokenizer of 370 tokens beside a model with 67 rows."""
        found = problems(fixtures / "rank_files" / "verl-fsdp1-3ranks" / "hf")
        assert [problem.kind for problem in found] == [
            "token-id-outside-embedding",
            "eos-not-closing-turn",
        ]
        assert found[0].detail.startswith("the embedding has 67 rows; these tokens are outside: ")

    def test_a_reward_model_does_not_generate(self, tmp_path: Path) -> None:
        config = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
        assert problems(make(tmp_path / "out", config=config, ends=())) == []

    def test_a_causal_model_of_gpt2_does(self, tmp_path: Path) -> None:
        config = {**LLAMA, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        problem = the_problem(make(tmp_path / "out", config=config, ends=()))
        assert problem.kind == "eos-not-closing-turn"

    def test_a_rowless_token_of_images_in_a_model_of_text_is_a_warning(
        self, tmp_path: Path
    ) -> None:
        family = CHATML._replace(specials=(*CHATML.specials, "<image>"))
        path = make(tmp_path / "out", family)
        move(path, "<image>", chat.ROWS)
        change(path / "tokenizer_config.json", image_token="<image>")

        problem = the_problem(path)
        assert (problem.kind, problem.severity) == ("token-id-outside-embedding", "warning")

    def test_the_configs_of_a_model_that_speaks_count_sounds(self, tmp_path: Path) -> None:
        config = {**LLAMA, "model_type": "bark", "eos_token_id": 10_000}
        path = make(tmp_path / "out", CHATML._replace(template=""), config=config)
        assert problems(path) == []


def move(path: Path, token: str, number: int) -> None:
    """Give a token another id in ``tokenizer.json``."""
    held = read(path / "tokenizer.json")
    for added in held["added_tokens"]:
        if added["content"] == token:
            added["id"] = number
    if token in held["model"]["vocab"]:
        held["model"]["vocab"][token] = number
    write(path / "tokenizer.json", held)


def cut(file: str) -> Damage:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:200])


def without(file: str) -> Damage:
    return lambda path: (path / file).unlink()


def with_json(file: str, **values: Any) -> Damage:
    return lambda path: change(path / file, **values)


def with_text(file: str, content: str) -> Damage:
    return lambda path: (path / file).write_text(content)


def all_of(*damages: Damage) -> Damage:
    def damage(path: Path) -> None:
        for one in damages:
            one(path)

    return damage


def without_model(path: Path) -> None:
    held = read(path / "tokenizer.json")
    del held["model"]
    write(path / "tokenizer.json", held)


def empty_llama(path: Path) -> None:
    """transformers loads this without a word, as a vocabulary of five tokens."""
    (path / "tokenizer.json").unlink()
    change(path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


# What is done to a good directory, and all that must be said: (kind, file, words of the detail).
DAMAGES: dict[str, tuple[Damage, list[tuple[str, str | None, str]]]] = {
    "tokenizer-cut": (
        cut("tokenizer.json"),
        [("tokenizer-unreadable", "tokenizer.json", "transformers cannot load it")],
    ),
    "tokenizer-settings-cut": (
        with_text("tokenizer_config.json", '{"eos_token": '),
        [("tokenizer-unreadable", "tokenizer_config.json", "not JSON")],
    ),
    "tokenizer-not-copied": (
        without("tokenizer.json"),
        [("tokenizer-unreadable", "tokenizer_config.json", "transformers cannot load it")],
    ),
    "tokenizer-without-vocabulary": (
        without_model,
        [("tokenizer-unreadable", "tokenizer.json", "Model missing")],
    ),
    "tokenizer-not-copied-silently-empty": (
        empty_llama,
        [("tokenizer-unreadable", None, "all files of its vocabulary are missing")],
    ),
    "id-conflict-in-settings": (
        with_json(
            "tokenizer_config.json",
            added_tokens_decoder={"7": {"content": "<|im_end|>", "special": True}},
        ),
        [
            (
                "token-id-conflict",
                "tokenizer_config.json",
                "<|im_end|> has id 7 in this file, but 2 after",
            )
        ],
    ),
    "id-conflict-in-added-tokens": (
        with_json("added_tokens.json", **{"<|im_start|>": 299}),
        [
            (
                "token-id-conflict",
                "added_tokens.json",
                "<|im_start|> has id 299 in this file, but 1 after",
            )
        ],
    ),
    "padding-token-without-a-row": (
        all_of(
            with_json("tokenizer_config.json", pad_token="[PAD]"),
            lambda path: add_token(path, "[PAD]", chat.ROWS),
        ),
        [
            (
                "token-id-outside-embedding",
                "tokenizer.json",
                "320 rows; these tokens are outside: [PAD] (320)",
            )
        ],
    ),
    "special-token-missing": (
        with_json("tokenizer_config.json", pad_token="<|pad|>"),
        [("special-token-missing", "tokenizer_config.json", "pad_token is <|pad|>")],
    ),
    "extra-special-token-missing": (
        with_json("tokenizer_config.json", extra_special_tokens=["<|im_start|>", "<|tool|>"]),
        [("special-token-missing", "tokenizer_config.json", "<|tool|>")],
    ),
    "special-token-missing-in-map": (
        with_json("special_tokens_map.json", eos_token={"content": "<|gone|>"}),
        [("special-token-missing", "special_tokens_map.json", "eos_token is <|gone|>")],
    ),
    "template-broken": (
        with_text("chat_template.jinja", "{% for message in messages %}{{ message }"),
        [("chat-template-invalid", None, "cannot be rendered")],
    ),
    "template-with-an-unknown-name": (
        with_text("chat_template.jinja", "{{ messages[0].content + epilogue }}"),
        [("chat-template-invalid", None, "cannot be rendered: 'epilogue' is undefined")],
    ),
    "generation-config-cut": (
        with_text("generation_config.json", '{"eos_token_id": [2'),
        [("generation-config-invalid", "generation_config.json", "not JSON")],
    ),
    "temperature-of-greedy": (
        with_json("generation_config.json", temperature=0.7, top_p=0.9),
        [
            (
                "generation-config-invalid",
                "generation_config.json",
                "`temperature` is set to `0.7`",
            ),
            ("generation-config-invalid", "generation_config.json", "`top_p` is set to `0.9`"),
        ],
    ),
    "early-stopping-without-beams": (
        with_json("generation_config.json", early_stopping=True),
        [("generation-config-invalid", "generation_config.json", "early_stopping")],
    ),
    "no-new-tokens": (
        with_json("generation_config.json", max_new_tokens=0),
        [("generation-config-invalid", "generation_config.json", "must be greater than 0")],
    ),
    "eos-outside-embedding": (
        with_json("generation_config.json", eos_token_id=[2, 400]),
        [
            (
                "eos-unknown",
                "generation_config.json",
                "eos_token_id is 400, but the embedding has 320",
            )
        ],
    ),
    "eos-not-in-vocabulary": (
        with_json("generation_config.json", eos_token_id=[2, 310]),
        [("eos-unknown", "generation_config.json", "310, but the tokenizer has no token")],
    ),
    "eos-in-config": (
        with_json("config.json", eos_token_id=400),
        [("eos-unknown", "config.json", "eos_token_id is 400")],
    ),
    "eos-in-text-config": (
        with_json("config.json", text_config={"eos_token_id": 400}),
        [("eos-unknown", "config.json", "eos_token_id is 400")],
    ),
    "eos-is-a-word": (
        with_json("config.json", eos_token_id="<|im_end|>"),
        [("eos-unknown", "config.json", "'<|im_end|>', which is not an id")],
    ),
    "eos-negative": (
        with_json("config.json", eos_token_id=-1),
        [("eos-unknown", "config.json", "which is not a row of any embedding")],
    ),
    "bos-outside-embedding": (
        with_json("config.json", bos_token_id=50_256),
        [("bos-unknown", "config.json", "bos_token_id is 50256")],
    ),
    "pad-outside-embedding": (
        with_json("generation_config.json", pad_token_id=320),
        [("pad-unknown", "generation_config.json", "pad_token_id is 320")],
    ),
    "decoder-start": (
        with_json("config.json", decoder_start_token_id=999),
        [("decoder-start-unknown", "config.json", "decoder_start_token_id is 999")],
    ),
    "no-end-at-all": (
        with_json("generation_config.json", eos_token_id=None, max_length=99),
        [("eos-not-closing-turn", "generation_config.json", "eos_token_id is missing")],
    ),
    "end-in-the-config-alone": (
        all_of(
            with_json("config.json", eos_token_id=2),
            with_json("generation_config.json", eos_token_id=0),
        ),
        [
            (
                "eos-not-closing-turn",
                "generation_config.json",
                "<|im_end|> (id 2), but eos_token_id is 0",
            )
        ],
    ),
    "closing-words-are-no-token": (
        with_text("chat_template.jinja", CHATML.template.replace("<|im_end|>", "<|turn_end|>")),
        [
            (
                "eos-not-closing-turn",
                "generation_config.json",
                "with <|turn_end|>, which is not a token",
            )
        ],
    ),
}


def add_token(path: Path, token: str, number: int) -> None:
    held = read(path / "tokenizer.json")
    held["added_tokens"].append({**held["added_tokens"][0], "content": token, "id": number})
    # The ids in between, as reserved tokens: the library numbers added tokens one after the other.
    vocabulary = held["model"]["vocab"]
    for filler in range(max(vocabulary.values()) + 1, number):
        vocabulary[f"<reserved{filler}>"] = filler
    write(path / "tokenizer.json", held)


def test_without_damage_there_is_no_problem(tmp_path: Path) -> None:
    assert problems(make(tmp_path / "out")) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, expected = DAMAGES[name]
    path = make(tmp_path / "out")
    damage(path)

    found = problems(path)
    assert [(p.kind, p.file) for p in found] == [(kind, file) for kind, file, _ in expected]
    for problem, (kind, _, words) in zip(found, expected, strict=True):
        assert words in problem.detail
        assert "\n" not in problem.detail
        assert problem.severity == KINDS[kind].severity


def test_every_kind_has_its_damage() -> None:
    caught = {kind for _, expected in DAMAGES.values() for kind, _, _ in expected}
    source = [Path(module.__file__ or "").read_text() for module in (text, tokenizer, generation)]
    mentioned = {kind for kind in KINDS if any(f'"{kind}"' in code for code in source)}

    assert mentioned - caught == {"olmo-eos-incomplete"}  # TestOlmo


class TestOlmo:
    @pytest.mark.parametrize("family", [CHATML, OLMO3], ids=["chatml", "olmo3"])
    def test_both_ends_are_good(self, family: Chat, tmp_path: Path) -> None:
        assert problems(make(tmp_path / "out", family, config=OLMO)) == []

    @pytest.mark.parametrize("model_type", ["olmo", "olmo2", "olmo3", "olmoe", "flex_olmo"])
    def test_one_end_is_not(self, model_type: str, tmp_path: Path) -> None:
        config = {**OLMO, "model_type": model_type}
        path = make(tmp_path / "out", config=config, ends=("<|im_end|>",))

        problem = the_problem(path)
        assert (problem.kind, problem.severity) == ("olmo-eos-incomplete", "error")
        assert "eos_token_id is 2, without <|endoftext|> (0)" in problem.detail
        assert problem.hint == 'Set "eos_token_id": [2, 0] in generation_config.json.'

    def test_the_other_end_alone_does_not_close_a_turn_either(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", config=OLMO, ends=("<|endoftext|>",))
        kinds = {problem.kind for problem in problems(path)}
        assert kinds == {"eos-not-closing-turn", "olmo-eos-incomplete"}

    def test_without_a_generation_config_the_config_is_read(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", config={**OLMO, "eos_token_id": 0})
        (path / "generation_config.json").unlink()
        found = problems(path)
        assert {problem.kind for problem in found} == {
            "eos-not-closing-turn",
            "olmo-eos-incomplete",
        }
        assert {problem.file for problem in found} == {"config.json"}

    def test_a_model_whose_turns_end_otherwise_is_warned_about(self, tmp_path: Path) -> None:
        family = TULU._replace(specials=("<|endoftext|>", "<|im_end|>"))
        problem = the_problem(make(tmp_path / "out", family, config=OLMO))
        assert (problem.kind, problem.severity) == ("olmo-eos-incomplete", "warning")

    def test_the_first_tokenizer_of_olmo_has_one_end(self, tmp_path: Path) -> None:
        assert problems(make(tmp_path / "out", TULU, config=OLMO)) == []

    def test_a_base_model_needs_one(self, tmp_path: Path) -> None:
        base = CHATML._replace(template="")
        path = make(tmp_path / "out", base, config=OLMO, ends=("<|endoftext|>",))
        assert problems(path) == []

    def test_another_model_is_left_alone(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", config={**OLMO, "model_type": "molmo"}, ends=("<|im_end|>",))
        assert problems(path) == []

    @pytest.mark.slow
    def test_the_shipped_run_had_one_end_and_consolidation_gives_it_two(
        self, fixtures: Path, tmp_path: Path
    ) -> None:
        from ckpt_tools import consolidate

        run = fixtures / "zero" / "zero3-bf16-olmo2-chat-2ranks"
        kinds = {problem.kind for problem in problems(run / "hf")}
        assert kinds == {"eos-not-closing-turn", "olmo-eos-incomplete"}

        out = tmp_path / "out"
        consolidate(run / "checkpoint", out, config=run / "hf", tokenizer=run / "hf")
        assert problems(out) == []


class TestTemplates:
    # No token of a turn is one that the tokenizer names, and none is marked as special.
    unmarked = CHATML._replace(named={"eos_token": "<|endoftext|>"})

    def test_an_added_token_that_is_not_marked_as_special_closes_a_turn(
        self, tmp_path: Path
    ) -> None:
        assert problems(make(tmp_path / "good", self.unmarked, special=False)) == []
        ends = ("<|endoftext|>",)
        problem = the_problem(make(tmp_path / "bad", self.unmarked, special=False, ends=ends))
        assert "with <|im_end|> (id 2)" in problem.detail
        assert problem.severity == "error"

    def test_spaces_that_are_a_token_close_nothing(self, tmp_path: Path) -> None:
        family = self.unmarked._replace(
            template=CHATML.template.replace("<|im_end|>' + '\n'", "    <|im_end|>'"),
            specials=("    ", *CHATML.specials),
        )
        assert "    <|im_end|>" in family.template
        assert problems(make(tmp_path / "out", family, special=False)) == []

    def test_each_of_several_templates_is_looked_at(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out")
        (path / "additional_chat_templates").mkdir()
        other = CHATML.template.replace("<|im_end|>", "<|endoftext|>")
        (path / "additional_chat_templates" / "tool_use.jinja").write_text(other)
        assert problems(path) == []

        change(path / "generation_config.json", eos_token_id=2)
        assert "the chat template 'tool_use' closes" in the_problem(path).detail

    def test_templates_inside_the_settings_are_looked_at(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", ends=("<|endoftext|>",))
        (path / "chat_template.jinja").unlink()
        assert problems(path) == []
        change(path / "tokenizer_config.json", chat_template=CHATML.template)
        assert the_problem(path).kind == "eos-not-closing-turn"

    def test_the_template_of_a_processor_is_looked_at(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", ends=("<|endoftext|>",))
        (path / "chat_template.jinja").unlink()
        write(path / "chat_template.json", {"chat_template": CHATML.template})
        assert the_problem(path).kind == "eos-not-closing-turn"

    @pytest.mark.slow
    def test_a_template_for_documents_alone_may_refuse_a_plain_conversation(
        self, tmp_path: Path
    ) -> None:
        path = make(tmp_path / "out")
        (path / "additional_chat_templates").mkdir()
        rag = path / "additional_chat_templates" / "rag.jinja"
        rag.write_text("{% if not documents %}{{ raise_exception('no documents') }}{% endif %}")
        assert problems(path) == []
        rag.write_text("{% if %}")
        assert the_problem(path).kind == "chat-template-invalid"

    def test_a_template_that_refuses_a_plain_conversation_is_a_warning(
        self, tmp_path: Path
    ) -> None:
        path = make(tmp_path / "out")
        (path / "chat_template.jinja").write_text("{{ raise_exception('say what to extract') }}")
        problem = the_problem(path)
        assert (problem.kind, problem.severity) == ("chat-template-invalid", "warning")
        assert problem.detail.endswith("cannot be rendered: say what to extract")

    def test_an_old_jinja_is_no_fault_of_the_template(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers.utils import chat_template_utils

        def fail(*_: Any) -> None:
            raise ImportError("jinja2>=3.1.6")

        monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", fail)
        findings = look_at(make(tmp_path / "out"))
        assert findings.problems == []
        assert "tokenizer (it needs: jinja2>=3.1.6)" in findings.skipped

    @pytest.mark.slow
    def test_a_template_that_never_ends_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rendering, "SECONDS", 1)
        path = make(tmp_path / "out")
        loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        (path / "chat_template.jinja").write_text(loops)
        assert "not rendered within 1 seconds" in the_problem(path).detail

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{% set n = 10 ** 9 %}{{ (7 ** n) % 7 }}", "not rendered within 1 seconds"),
            ("{% set n = 10 ** 10 %}{{ 'x' * n }}", "memory"),
            ("{% for a in range(99) %}{{ 'x' * 99999 }}{% endfor %}", "megabytes"),
        ],
    )
    def test_a_template_that_no_signal_handler_ends_is_given_up(
        self, template: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rendering, "SECONDS", 1 if "seconds" in reason else 60)
        path = make(tmp_path / "out")
        (path / "chat_template.jinja").write_text(template)
        assert reason in the_problem(path).detail

    def test_a_template_without_the_end_token_it_writes(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", OLMO3)
        change(path / "tokenizer_config.json", eos_token=None)
        problem = the_problem(path)
        assert problem.kind == "special-token-missing"
        assert "uses eos_token, but the tokenizer has none" in problem.detail

    @pytest.mark.slow
    def test_words_that_are_left_out_close_nothing(self, tmp_path: Path) -> None:
        template = "{{ messages[0]['content'] }}"
        assert problems(make(tmp_path / "out", CHATML._replace(template=template))) == []


class TestWhatIsBeside:
    def test_padding_that_nothing_uses_is_a_warning(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out")
        change(path / "config.json", pad_token_id=-1, bos_token_id=310)
        found = problems(path)
        assert [(p.kind, p.severity) for p in found] == [
            ("bos-unknown", "warning"),
            ("pad-unknown", "warning"),
        ]

    def test_the_rows_are_those_of_the_weights(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", rows=200)
        change(path / "config.json", vocab_size=400)
        (problem,) = problems(path)
        assert "the embedding has 200 rows; these tokens are outside:" in problem.detail
        assert problem.detail.endswith("and 97 more")

    def test_without_weights_the_config_says_the_rows(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", rows=200)
        (path / "model.safetensors").unlink()
        assert the_problem(path).kind == "token-id-outside-embedding"

    def test_an_adapter_may_have_a_tokenizer_and_no_config(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out")
        for file in ("config.json", "generation_config.json"):
            (path / file).unlink()
        (path / "model.safetensors").rename(path / "adapter_model.safetensors")
        findings = look_at(path)
        assert findings.problems == []
        assert (
            "the end of an assistant's turn (no config says where a text ends)" in findings.skipped
        )

        add_token(path, "<last>", chat.ROWS + 5)
        assert the_problem(path).kind == "token-id-outside-embedding"

    def test_custom_code_is_not_run_unasked(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out")
        (path / "tokenizer.json").unlink()
        change(
            path / "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
        )
        (path / "own.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
            "from transformers import PreTrainedTokenizer as OwnTokenizer\n"
        )
        findings = look_at(path)
        assert findings.problems == []
        assert "tokenizer (custom code needs --trust-remote-code)" in findings.skipped
        assert not (tmp_path / "ran").exists()

    def test_a_missing_package_is_no_fault_of_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoTokenizer

        def fail(*_: Any, **__: Any) -> None:
            raise ImportError("sentencepiece\n\npip install it")

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
        findings = look_at(make(tmp_path / "out"))
        assert findings.problems == []
        assert "tokenizer (it needs: sentencepiece)" in findings.skipped


class TestTheProcess:
    @pytest.fixture(autouse=True)
    def a_real_one(self, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
        from ckpt_tools.hub.reference.process import run_child

        monkeypatch.setattr(text, "run_child", run_child)

    @pytest.mark.slow
    def test_it_finds_the_same(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out", ends=("<|endoftext|>",))
        change(path / "generation_config.json", temperature=0.7)
        kinds = [problem.kind for problem in problems(path)]
        assert kinds == ["generation-config-invalid", "eos-not-closing-turn"]

    @pytest.mark.slow
    def test_custom_code_runs_where_it_is_trusted(self, tmp_path: Path) -> None:
        path = make(tmp_path / "out")
        change(
            path / "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
        )
        (path / "own.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
            "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
        )
        findings = look_at(path, trust_remote_code=True)
        assert "tokenizer" in findings.checked
        assert (tmp_path / "ran").exists()

    def test_its_death_is_a_problem(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = make(tmp_path / "out")
        crash = subprocess.CompletedProcess([], -11, "", "")
        monkeypatch.setattr(text, "run_child", lambda *_, **__: crash)
        problem = the_problem(path)
        assert problem.kind == "tokenizer-unreadable"
        assert "SIGSEGV" in problem.detail

    @pytest.mark.parametrize(
        ("failure", "words"),
        [
            (subprocess.TimeoutExpired("python", 180), "not load it within 180 seconds"),
            (OSError("no memory"), "no process can be started: no memory"),
        ],
        ids=["slow", "none"],
    )
    def test_its_absence_is_said(
        self, failure: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise failure

        path = make(tmp_path / "out")
        monkeypatch.setattr(text, "run_child", fail)
        findings = look_at(path)
        assert findings.problems == []
        assert any(words in skipped for skipped in findings.skipped)

    def test_an_environment_without_transformers_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = make(tmp_path / "out")
        broken = subprocess.CompletedProcess(
            [], 1, "", "Traceback\nModuleNotFoundError: transformers"
        )
        monkeypatch.setattr(text, "run_child", lambda *_, **__: broken)
        assert any("ModuleNotFoundError" in skipped for skipped in look_at(path).skipped)


def test_the_good_directory_is_good_for_transformers_too(tmp_path: Path) -> None:
    """What passes here is saved by transformers without a word, and what is refused is refused there."""
    from transformers import GenerationConfig

    path = make(tmp_path / "out")
    GenerationConfig.from_pretrained(path).validate(strict=True)
    for name, (damage, expected) in DAMAGES.items():
        if any("`" in words for _, _, words in expected):
            copy = tmp_path / name
            shutil.copytree(path, copy)
            damage(copy)
            with pytest.raises(ValueError, match="GenerationConfig is invalid"):
                GenerationConfig.from_pretrained(copy).validate(strict=True)
