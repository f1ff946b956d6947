"""Adapters with a classifier's head on a base that generates: the model that transformers and PEFT make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from ckpt_tools import merge_lora, verify
from ckpt_tools.errors import UsageError

TINY: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
) | dict(max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)


class Kind(NamedTuple):
    """A base, and the classifier that is trained on it."""

    base: type[Any]
    auto: Any
    task: str
    target: str
    labels: int
    head: str


KINDS = {
    "reward": Kind(
        hf.Olmo2ForCausalLM, hf.AutoModelForSequenceClassification, "SEQ_CLS", "q_proj", 1, "score"
    ),
    # Both heads of BERT have the name "classifier"; the task tells which class it is.
    "tokens": Kind(
        hf.BertForMaskedLM,
        hf.AutoModelForTokenClassification,
        "TOKEN_CLS",
        "query",
        3,
        "classifier",
    ),
}


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, Path]:
    """Directories of a base, of an adapter of it, and of what PEFT merges."""
    from peft import LoraConfig, get_peft_model

    kind = KINDS[request.param]
    torch.manual_seed(0)
    kind.base(kind.base.config_class(**TINY)).bfloat16().save_pretrained(tmp_path / "base")
    more: dict[str, Any] = {"num_labels": kind.labels, "dtype": torch.bfloat16}
    classifier = kind.auto.from_pretrained(tmp_path / "base", **more)
    settings: Any = LoraConfig(
        r=2, task_type=kind.task, target_modules=[kind.target], init_lora_weights=False
    )
    adapted: Any = get_peft_model(classifier, settings, autocast_adapter_dtype=False)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.double().merge_and_unload().bfloat16().save_pretrained(tmp_path / "truth")
    return kind, tmp_path


def _is_as_peft_wrote(out: Path, truth: Path) -> None:
    ours, theirs = (load_file(each / "model.safetensors") for each in (out, truth))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    configs = [json.loads((each / "config.json").read_text()) for each in (out, truth)]
    assert configs[0] == configs[1]
    assert not [problem for problem in verify(out).problems if problem.is_error]


@pytest.mark.slow
def test_the_head_of_the_base_is_left_out(trained: tuple[Kind, Path]) -> None:
    """With the classifier's config, and with that of the base alone; the adapter tells the class."""
    kind, at = trained

    for number, named in enumerate([None, at / "truth"]):
        out = at / f"out{number}"
        report = merge_lora(at / "base", out, adapter_dir=at / "adapter", config=named)
        _is_as_peft_wrote(out, at / "truth")
        assert not [warning for warning in report.warnings if "tokenizer" not in warning]
        left = [note for note in report.notes if note.startswith("left out, because")]
        assert len(left) == 1

    # The config of the base by name is another class; the step that the refusal names works.
    with pytest.raises(UsageError, match=f"hold {kind.head}") as caught:
        merge_lora(at / "base", at / "no", adapter_dir=at / "adapter", config=at / "base")
    trained_class = json.loads((at / "truth/config.json").read_text())["architectures"][0]
    keys = f'"architectures": ["{trained_class}"] and "num_labels": {kind.labels}'
    assert keys in str(caught.value.hint)
    step = json.loads((at / "base/config.json").read_text())
    step |= {"architectures": [trained_class], "num_labels": kind.labels}
    (at / "copy.json").write_text(json.dumps(step))
    merge_lora(at / "base", at / "copied", adapter_dir=at / "adapter", config=at / "copy.json")
    copied = load_file(at / "copied/model.safetensors")
    assert copied.keys() == load_file(at / "truth/model.safetensors").keys()
