"""The child process answers from the config alone, runs nothing it was not told to, and fails clearly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.hub import reference
from ckpt_tools.hub.reference import (
    Joined,
    Live,
    LiveTensor,
    NewValues,
    Strided,
    child,
    describe,
    process,
    start,
)
from ckpt_tools.hub.reference.recipes import Recipe, from_json, leaves, to_json
from ckpt_tools.hub.reference.tracing import Tracer
from tests.support.warm import cold_child, warm_children

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OLMOE: dict[str, Any] = dict(
    TINY,
    model_type="olmoe",
    architectures=["OlmoeForCausalLM"],
    num_experts=2,
    num_experts_per_tok=1,
    tie_word_embeddings=True,
)


@pytest.fixture
def no_answers() -> Iterator[None]:
    """Forget answers before and after."""
    kept = dict(reference._answers)
    reference._answers.clear()
    yield
    reference._answers.clear()
    reference._answers.update(kept)


# -- what a config describes -----------------------------------------------------------------------


@pytest.fixture
def in_process(no_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer without a child: starting one takes seconds, and what it says is the same."""
    monkeypatch.setattr(
        reference, "ask", lambda module, question: child._answer(json.loads(question))
    )


def test_a_model_with_fused_experts_and_tied_embeddings(in_process: None) -> None:
    model = describe(OLMOE)
    assert model is not None
    assert (model.architecture, model.model_type) == ("OlmoeForCausalLM", "olmoe")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert model.live[fused] == LiveTensor((2, 96, 32), "parameter")
    assert next(iter(model.live)) == "model.embed_tokens.weight"
    assert fused not in model.saved
    saved = model.saved["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert saved.shape == (48, 32)
    assert list(leaves(saved.recipe)) == [Live(fused)]
    assert model.ties == model.hub_ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert list(model.tied) == ["lm_head.weight"]
    assert "lm_head.weight" in model.live and "lm_head.weight" not in model.saved
    assert model.saved["model.norm.weight"].recipe == Live("model.norm.weight")


def test_buffers_ignored_names_and_tensors_kept_in_float32(in_process: None) -> None:
    marian = describe(
        dict(
            model_type="marian",
            architectures=["MarianMTModel"],
            vocab_size=96,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )
    assert marian is not None
    assert marian.live["final_logits_bias"].kind == "buffer"
    assert "final_logits_bias" in marian.saved
    assert marian.ignored == {
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
    }
    assert not marian.ignored & marian.saved.keys()

    t5 = dict(model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=96)
    model = describe(dict(t5, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    assert model is not None
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert wo in model.float32_under_float16
    assert wo not in model.float32_under_bfloat16


def test_buffers_that_are_not_persistent_are_not_there(in_process: None) -> None:
    model = describe(dict(TINY, model_type="llama", architectures=["LlamaForCausalLM"]))
    assert model is not None
    assert not [name for name in model.live if "inv_freq" in name]


def test_floats_that_json_does_not_have(in_process: None) -> None:
    config = dict(
        model_type="mamba2",
        architectures=["Mamba2ForCausalLM"],
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        time_step_limit=[0.0, {"__float__": "Infinity"}],
    )
    assert describe(config) is not None


def test_names_of_a_directory_decide_the_layout(in_process: None) -> None:
    live = describe(OLMOE)
    assert live is not None
    fused = describe(OLMOE, like_names=live.live)
    assert fused is not None
    assert set(fused.saved) == live.live.keys() - live.ties.keys()
    split = describe(OLMOE, like_names=live.saved)
    assert split is not None
    assert split.saved == live.saved


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": []},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "novel", "architectures": ["NovelForCausalLM"]},
        {"model_type": "llama", "architectures": ["Trainer"]},
        {"model_type": "novel", "architectures": ["LlamaForCausalLM"]},
    ],
    ids=json.dumps,
)
def test_unknown_models_are_none(config: dict[str, Any], in_process: None) -> None:
    assert describe(config) is None


# -- the process -----------------------------------------------------------------------------------


def test_a_config_that_transformers_refuses(in_process: None) -> None:
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size="wide")
    with pytest.raises(UsageError, match="hidden_size") as error:
        describe(config)
    assert "--config" in (error.value.hint or "")


def test_a_question_is_asked_once(no_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        reference, "ask", lambda module, question: asked.append(question) or {"unknown": 1}
    )
    answers = [start(OLMOE) for _ in range(3)]
    assert [answer.result() for answer in answers] == [None] * 3
    assert start(dict(OLMOE, num_experts=3)).result() is None
    assert start(OLMOE, like_names=["a"]).result() is None
    assert len(asked) == 3


@pytest.fixture
def cold(no_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question starts an interpreter, as outside the tests."""
    monkeypatch.setattr(process, "run_child", cold_child)


@pytest.mark.slow
def test_a_new_interpreter_answers_as_one_that_was_forked(cold: None) -> None:
    answer = describe(OLMOE)
    reference._answers.clear()
    with warm_children():
        assert describe(OLMOE) == answer


def test_a_child_that_takes_too_long(cold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_TIMEOUT_SECONDS", 0.01)
    with pytest.raises(CkptError, match=r"within 0\.01 seconds"):
        describe(OLMOE)


def test_a_child_that_dies(cold: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncat >/dev/null\necho 'ImportError: no torch' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CkptError, match="ImportError: no torch") as error:
        describe(OLMOE)
    assert not isinstance(error.value, UsageError)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(CkptError, match="cannot be started"):
        describe(dict(OLMOE, num_experts=3))


@pytest.mark.slow
def test_the_process_that_asks_imports_nothing_heavy(tmp_path: Path) -> None:
    """Nor does it matter what lies in the directory it is asked from."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('not this one')")
    program = (
        "import sys, json\n"
        f"sys.path[0] = {str(Path(reference.__file__).parents[3])!r}\n"
        "from ckpt_tools.hub.reference import describe\n"
        f"model = describe(json.loads({json.dumps(OLMOE)!r}))\n"
        "assert 'model.layers.0.mlp.experts.1.up_proj.weight' in model.saved\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'peft', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


# -- custom code -----------------------------------------------------------------------------------

CONFIGURATION = """
import sys
from pathlib import Path
from transformers import PretrainedConfig

Path(__file__).parent.joinpath("ran").touch()
Path({ran!r}).touch()
print("noise on standard output")
assert sys.modules.get("accelerate") is None

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_own import OwnConfig

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, 2)
        self.post_init()
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = tmp_path / "code"
    code.mkdir()
    text = CONFIGURATION.format(ran=str(tmp_path / "ran"))
    (code / "configuration_own.py").write_text(text)
    (code / "modeling_own.py").write_text(MODELING)
    config = dict(
        model_type="own",
        architectures=["OwnModel"],
        width=5,
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModel": "modeling_own.OwnModel",
        },
    )
    (code / "config.json").write_text(json.dumps(config))
    return config, code


def test_custom_code_does_not_run_unless_it_is_trusted(
    custom: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, code = custom
    assert describe(config) is None
    assert describe(config, code_dir=code) is None
    assert not (tmp_path / "ran").exists()


def test_trusted_custom_code_runs_in_the_child(
    custom: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, code = custom
    model = describe(config, code_dir=code, trust_remote_code=bool(code))
    assert model is not None
    assert model.live["layer.weight"] == LiveTensor((2, 5), "parameter")
    assert (tmp_path / "ran").exists()


# -- recipes ---------------------------------------------------------------------------------------

RECIPES: list[Recipe] = [
    Live("a.weight"),
    Strided(Live("a"), 3, (2, 2), (1, 4)),
    Joined((Live("a"), Strided(Live("b"), 0, (2,), (1,))), 1),
    NewValues("aten.exp.default"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def traced(make: Any) -> Recipe:
    tensors = {name: torch.empty(4, 6, device="meta") for name in "ab"}
    with Tracer(tensors) as tracer:
        return tracer.recipe(make(**tensors))


class TestTracing:
    def test_views(self) -> None:
        assert traced(lambda a, b: a) == Live("a")
        assert traced(lambda a, b: a[1:, 2:5]) == Strided(Live("a"), 8, (3, 3), (6, 1))
        assert traced(lambda a, b: a.T) == Strided(Live("a"), 0, (6, 4), (1, 6))
        assert traced(lambda a, b: b.view(2, 12)) == Strided(Live("b"), 0, (2, 12), (12, 1))

    def test_copies(self) -> None:
        assert traced(lambda a, b: a.clone()) == Live("a")
        turned = Strided(Live("a"), 0, (6, 4), (1, 6))
        assert traced(lambda a, b: a.T.contiguous()) == turned
        assert traced(lambda a, b: a.T.clone()) == turned
        assert traced(lambda a, b: a.T.reshape(24)) == Strided(turned, 0, (24,), (1,))

    def test_joins(self) -> None:
        assert traced(lambda a, b: torch.cat([b, a], -1)) == Joined((Live("b"), Live("a")), 1)
        stacked = traced(lambda a, b: torch.stack([a, b]))
        rows = tuple(Strided(Live(n), 0, (1, 4, 6), (24, 6, 1)) for n in "ab")
        assert stacked == Joined(rows, 0)

    def test_what_is_computed_says_by_what(self) -> None:
        for make in (
            lambda a, b: -a,
            lambda a, b: a.to(torch.float16),
            lambda a, b: a.view(torch.int32),
            lambda a, b: torch.zeros(3, device="meta"),
            lambda a, b: a.clone().fill_(0),
            lambda a, b: a.flip(0),
        ):
            assert isinstance(traced(make), NewValues)
        assert traced(lambda a, b: (a + b)[1:]) == NewValues("aten.add.Tensor")
