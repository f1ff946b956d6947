"""Loading a directory: what transformers and PEFT make of it is told, and the process's end too.

The steps run in this process, so that the libraries are imported once; ``TestTheProcess`` is about the
child.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckpt_tools.verification import loading, loading_child
from ckpt_tools.verification.container import read_container
from ckpt_tools.verification.directory import list_directory
from ckpt_tools.verification.loading import check_loading
from ckpt_tools.verification.problem import KINDS, Findings, Problem
from tests.support.verification.chat import change, read

hf: Any = transformers
TINY: dict[str, Any] = dict(
    vocab_size=67, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
DECODER: dict[str, Any] = dict(
    **TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=None
)
SEEN: dict[str, Any] = dict(image_size=8, patch_size=4, num_channels=3)
MODELS: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**DECODER)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "reward": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**{**DECODER, "pad_token_id": 0}, num_labels=1)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=67, n_embd=12, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=67,
            d_model=12,
            d_kv=6,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TINY)),
}
# Models that tokens are not enough for.
SEEING: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **SEEN
        )
    ),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config=dict(**TINY, eos_token_id=2, bos_token_id=1, projection_dim=8),
            vision_config=dict(**TINY, **SEEN),
            projection_dim=8,
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=67,
            d_model=12,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(module: str, question: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert module == loading_child.__name__
        steps = [json.dumps(step) for step in loading_child.steps(json.loads(question))]
        return subprocess.CompletedProcess([], 0, "\n".join(steps), "")

    monkeypatch.setattr(loading, "run_child", run_child)


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that ``save_pretrained`` of a model writes."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            {**MODELS, **SEEING}[name]().save_pretrained(made[name])
        return made[name]

    return save


@pytest.fixture
def llama(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A directory of its own, to be damaged."""
    return Path(shutil.copytree(saved("olmo2"), tmp_path / "out"))


def look_at(path: Path, base: Path | None = None, *, trust_remote_code: bool = False) -> Findings:
    findings = Findings()
    directory = list_directory(path, findings)
    directory.trust_remote_code = trust_remote_code
    if (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        directory.config = read(path / "config.json")
    for file in directory.files:
        if file.endswith(".safetensors"):
            held = read_container(path, file, findings)
            assert held is not None
            if file.startswith("adapter"):
                directory.adapters[""] = dict(held.entries)
            else:
                directory.tensors.update(held.entries)
    findings.checked.clear()
    check_loading(directory, findings, base)
    return findings


def problems(path: Path, base: Path | None = None) -> list[Problem]:
    return look_at(path, base).problems


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a directory."""
    file = next(path.glob("*.safetensors"))
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


class TestModels:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", MODELS)
    def test_what_transformers_saved_is_loaded_and_put_to_work(
        self, name: str, saved: Callable[[str], Path]
    ) -> None:
        findings = look_at(saved(name))

        assert findings.problems == []
        assert findings.skipped == []
        works = "loading, a forward pass"
        if name not in ("bert", "reward"):
            works += ", a short generation"
        assert findings.checked == [f"{works} with transformers"]

    @pytest.mark.parametrize("name", SEEING)
    def test_a_model_that_takes_more_than_tokens_is_only_loaded(
        self, name: str, saved: Callable[[str], Path]
    ) -> None:
        findings = look_at(saved(name))

        assert findings.problems == []
        assert findings.checked == ["loading with transformers"]
        (skipped,) = findings.skipped
        assert skipped.startswith("a forward pass (the model takes ")

    def test_a_model_in_half_precision_is_called_in_it(self, llama: Path) -> None:
        change(llama / "config.json", dtype="bfloat16")
        edit(llama, lambda held: held.update({n: t.bfloat16() for n, t in held.items()}))
        assert problems(llama) == []

    def test_a_missing_tensor(self, llama: Path) -> None:
        edit(llama, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
        (problem,) = problems(llama)
        assert problem.kind == "load-missing-keys"
        assert problem.tensor == "model.layers.1.mlp.up_proj.weight"

    def test_a_tensor_too_many(self, llama: Path) -> None:
        edit(llama, lambda held: held.update({"value_head.weight": torch.ones(1, 12)}))
        (problem,) = problems(llama)
        assert (problem.kind, problem.tensor) == ("load-unexpected-keys", "value_head.weight")

    def test_a_tensor_of_another_shape(self, llama: Path) -> None:
        edit(llama, lambda held: held.update({"lm_head.weight": torch.ones(60, 12)}))
        (problem,) = problems(llama)
        assert (problem.kind, problem.tensor) == ("load-mismatched", "lm_head.weight")
        assert "[60, 12], the model needs [67, 12]" in problem.detail

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value: float, llama: Path) -> None:
        edit(llama, lambda held: held["model.norm.weight"].fill_(value))
        (problem,) = problems(llama)
        assert problem.kind == "forward-not-finite"
        assert problem.detail.startswith("logits of a forward pass")

    def test_a_generation_config_that_cannot_be_used(self, llama: Path) -> None:
        change(llama / "generation_config.json", forced_eos_token_id=999)
        (problem,) = problems(llama)
        assert problem.kind == "generation-failed"

    def test_an_encoder_decoder_without_a_start(
        self, saved: Callable[[str], Path], tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(saved("t5"), tmp_path / "out"))
        change(path / "generation_config.json", decoder_start_token_id=None)
        change(path / "config.json", decoder_start_token_id=None)
        kinds = [problem.kind for problem in problems(path)]
        assert kinds == ["generation-failed"]

    def test_it_ends_at_its_limits(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run_child(*_: Any, timeout: float, memory: int, **__: Any) -> None:
            assert memory == 16 * 2**30 + 8 * (llama / "model.safetensors").stat().st_size
            raise subprocess.TimeoutExpired([], timeout)

        monkeypatch.setattr(loading, "run_child", run_child)
        (skipped,) = look_at(llama).skipped
        assert skipped == (
            "loading (it did not end within 3600 seconds; --load-seconds allows more)"
        )

    def test_a_config_of_another_model(self, llama: Path) -> None:
        change(llama / "config.json", num_hidden_layers=3)
        found = problems(llama)
        assert {problem.kind for problem in found} == {"load-missing-keys"}
        assert all(str(problem.tensor).startswith("model.layers.2.") for problem in found)

    def test_a_config_that_transformers_refuses(self, llama: Path) -> None:
        change(llama / "config.json", hidden_act="bananas")
        (problem,) = problems(llama)
        assert problem.kind == "load-failed"
        assert "bananas" in problem.detail

    def test_a_file_that_was_cut(self, llama: Path) -> None:
        file = llama / "model.safetensors"
        held = list_directory(llama, Findings())
        held.config = read(llama / "config.json")
        file.write_bytes(file.read_bytes()[:-100])
        findings = Findings()
        check_loading(held, findings)
        (problem,) = findings.problems
        assert problem.kind == "load-failed"
        assert problem.detail.startswith("loading fails: ")

    def test_a_class_that_transformers_does_not_have(self, llama: Path) -> None:
        change(llama / "config.json", architectures=["OlmoNextForCausalLM"])
        (problem,) = problems(llama)
        assert problem.kind == "load-failed"
        assert problem.detail.endswith("has no OlmoNextForCausalLM")

    def test_a_forward_pass_that_fails(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("the shapes do not fit")

        monkeypatch.setattr(hf.models.olmo2.modeling_olmo2.Olmo2MLP, "forward", fail)
        (problem,) = problems(llama)
        assert problem.kind == "forward-failed"
        assert "the shapes do not fit" in problem.detail

    def test_custom_code_is_not_run_unasked(self, llama: Path, tmp_path: Path) -> None:
        own_code(llama, tmp_path / "ran")
        findings = look_at(llama)
        assert findings.problems == []
        assert findings.skipped == ["loading (custom code needs --trust-remote-code)"]
        assert not (tmp_path / "ran").exists()

    def test_custom_code_runs_where_it_is_trusted(self, llama: Path, tmp_path: Path) -> None:
        own_code(llama, tmp_path / "ran")
        findings = look_at(llama, trust_remote_code=True)
        assert findings.problems == []
        assert findings.checked == ["loading, a forward pass, a short generation with transformers"]
        assert (tmp_path / "ran").exists()

    def test_a_missing_package_is_no_fault_of_the_directory(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ImportError("needs bitsandbytes")

        monkeypatch.setattr(hf.Olmo2ForCausalLM, "from_pretrained", fail)
        findings = look_at(llama)
        assert findings.problems == []
        assert findings.skipped == ["loading (needs bitsandbytes)"]

    def test_without_a_config_or_weights_there_is_nothing_to_load(self, tmp_path: Path) -> None:
        assert look_at(tmp_path).skipped == ["loading (the directory holds no model or adapter)"]
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
        assert look_at(tmp_path).skipped == ["loading (there is no readable config)"]


def own_code(path: Path, witness: Path) -> None:
    """A model class of the directory's own, whose import leaves a trace."""
    change(
        path / "config.json",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (path / "own.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import Olmo2ForCausalLM\n"
        "class OwnForCausalLM(Olmo2ForCausalLM):\n    pass\n"
    )


class TestAdapters:
    @pytest.fixture
    def adapter(self, saved: Callable[[str], Path], tmp_path: Path) -> Path:
        """A LoRA adapter on the tiny model, which it names by its path."""
        from peft import LoraConfig, get_peft_model

        base: Any = hf.Olmo2ForCausalLM.from_pretrained(saved("olmo2"))
        config: Any = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        change(
            tmp_path / "adapter" / "adapter_config.json",
            base_model_name_or_path=str(saved("olmo2")),
        )
        return tmp_path / "adapter"

    def test_an_adapter_is_loaded_onto_its_base(self, adapter: Path) -> None:
        findings = look_at(adapter)
        assert findings.problems == []
        assert findings.checked == ["loading, a forward pass, a short generation with peft"]

    def test_its_base_can_be_named(self, adapter: Path, saved: Callable[[str], Path]) -> None:
        change(adapter / "adapter_config.json", base_model_name_or_path="somebody/model")
        findings = look_at(adapter)
        assert findings.problems == []
        assert findings.skipped == [
            "loading (the base 'somebody/model' is not a directory of a model on this machine)"
        ]
        assert look_at(adapter, saved("olmo2")).checked

    def test_a_base_that_cannot_be_loaded_is_not_its_fault(
        self, adapter: Path, llama: Path
    ) -> None:
        (llama / "model.safetensors").write_bytes(b"nothing")
        findings = look_at(adapter, llama)
        assert findings.problems == []
        assert findings.skipped[0].startswith("loading (its base cannot be loaded: ")

    def test_a_missing_tensor(self, adapter: Path) -> None:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        edit(adapter, lambda held: held.pop(name))
        (problem,) = problems(adapter)
        assert problem.kind == "load-missing-keys"
        assert "layers.0.self_attn.q_proj.lora_B" in str(problem.tensor)

    def test_a_tensor_too_many(self, adapter: Path) -> None:
        name = "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"
        edit(adapter, lambda held: held.update({name: torch.ones(12, 2)}))
        (problem,) = problems(adapter)
        assert problem.kind == "load-unexpected-keys"
        assert "layers.7" in str(problem.tensor)

    def test_a_rank_that_is_not_the_configs(self, adapter: Path) -> None:
        change(adapter / "adapter_config.json", r=4)
        (problem,) = problems(adapter)
        assert problem.kind == "load-mismatched"
        assert "size mismatch" in problem.detail

    def test_a_base_with_more_tokens_is_resized(
        self, saved: Callable[[str], Path], tmp_path: Path
    ) -> None:
        from peft import LoraConfig, get_peft_model

        base: Any = hf.Olmo2ForCausalLM.from_pretrained(saved("olmo2"))
        base.resize_token_embeddings(80, mean_resizing=False)
        config: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=True
        )
        assert problems(tmp_path / "adapter", saved("olmo2")) == []

    def test_a_reward_model_is_made_of_a_base_that_generates(
        self, saved: Callable[[str], Path], tmp_path: Path
    ) -> None:
        from peft import LoraConfig, get_peft_model

        auto: Any = hf.AutoModelForSequenceClassification
        base = auto.from_pretrained(saved("llama-tied"), num_labels=1)
        base.config.pad_token_id = 0
        config: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
        get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        findings = look_at(tmp_path / "adapter", saved("llama-tied"))
        assert findings.problems == []
        assert findings.checked == ["loading, a forward pass with peft"]

    def test_a_config_that_cannot_be_read(self, adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text("{")
        assert look_at(adapter).skipped == ["loading (adapter_config.json cannot be read)"]


class TestTheProcess:
    @pytest.fixture(autouse=True)
    def a_real_one(self, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
        from ckpt_tools.hub.reference.process import run_child

        monkeypatch.setattr(loading, "run_child", run_child)

    @pytest.mark.slow
    def test_it_finds_the_same(self, llama: Path) -> None:
        assert look_at(llama).checked == [
            "loading, a forward pass, a short generation with transformers"
        ]
        edit(llama, lambda held: held.pop("lm_head.weight"))
        assert [problem.kind for problem in problems(llama)] == ["load-missing-keys"]

    @pytest.mark.slow
    def test_a_crash_is_its_own(self, llama: Path) -> None:
        own_code(llama, llama / "ran")
        with (llama / "own.py").open("a") as stream:
            stream.write("    def forward(self, input_ids=None):\n        import os; os.abort()\n")
        findings = look_at(llama, trust_remote_code=True)
        (problem,) = findings.problems
        assert (problem.kind, problem.detail) == (
            "forward-failed",
            "a forward pass ends the process with SIGABRT",
        )
        assert findings.checked == ["loading with transformers"]

    @pytest.mark.parametrize(
        ("told", "kind"),
        [
            ([], "load-failed"),
            (["load"], "forward-failed"),
            (["load", "forward"], "generation-failed"),
        ],
    )
    def test_the_step_that_is_not_told_is_the_one_that_failed(
        self, told: list[str], kind: str, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys: dict[str, Any] = dict(missing=[], unexpected=[], mismatched=[])
        answers = {"load": keys, "forward": {"tensors": {}, "not_finite": []}}
        output = "\n".join(json.dumps({"step": step, **answers[step]}) for step in told)
        killed = subprocess.CompletedProcess([], -signal.SIGKILL, output, "")
        monkeypatch.setattr(loading, "run_child", lambda *_, **__: killed)
        (problem,) = problems(llama)
        assert problem.kind == kind
        assert "SIGKILL, as when memory runs out" in problem.detail
        assert problem.hint == "Try it on a machine with more memory."

    def test_an_environment_without_transformers_is_said(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: torch")
        monkeypatch.setattr(loading, "run_child", lambda *_, **__: broken)
        assert look_at(llama).skipped == ["loading (ModuleNotFoundError: torch)"]

    def test_no_process_at_all_is_said(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no memory")

        monkeypatch.setattr(loading, "run_child", fail)
        assert look_at(llama).skipped == ["loading (no process can be started: no memory)"]


def test_every_kind_is_caught_here() -> None:
    source = Path(__file__).read_text()
    kinds = {kind for kind in KINDS if kind.startswith(("load-", "forward-", "generation-failed"))}
    assert len(kinds) == 7
    assert all(f'"{kind}"' in source for kind in kinds)
