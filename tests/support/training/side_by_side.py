"""One rank of trainings that save themselves twice at one step: as open-instruct does, and with ckpt-tools.

side_by_side.py OUT FRAMEWORK:ARCHITECTURE:KIND ...

Each case goes to ``OUT/CASE``: ``theirs``, ``ours``, and ``checkpoint``, which Accelerate saved. The
adapter's tensors, as they were gathered from the live model, go to ``live.pt``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ckpt_tools import training
from ckpt_tools.cli.signals import leave_at_once
from tests.support.training import open_instruct
from tests.support.training.frameworks import BASE_NAME, FIXTURES, FRAMEWORKS
from tests.support.warm import warm_children

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "lora": {"adapter": "default"},
    "policy": {"attribute": "policy"},
}


class PolicyAndValue(nn.Module):
    """What PPO trains."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.config.hidden_size, 1)

    def forward(self, **batch: torch.Tensor) -> Any:
        output = self.policy(**batch, output_hidden_states=True)
        values = self.value_head(output.hidden_states[-1].to(self.value_head.weight.dtype))
        return output.loss + values.float().square().mean()


def recipe(architecture: str, kind: str) -> Any:
    """A chat model of OLMo 2 or 3, with a random start, an adapter or a value head."""
    models = importlib.import_module("zero_models")
    transformers: Any = importlib.import_module("transformers")
    transformers.integrations.unset_hf_deepspeed_config()
    made = models.olmo2_chat()
    config = made.language_model.config
    if architecture == "olmo3":
        layers = ["sliding_attention", "full_attention"]
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        keys += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        sizes = {key: getattr(config, key) for key in (*keys, "eos_token_id", "pad_token_id")}
        config = transformers.Olmo3Config(
            **sizes, bos_token_id=None, sliding_window=4, layer_types=layers
        )
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        made.module = made.language_model = model
    if kind == "policy":
        made.module = PolicyAndValue(made.language_model)
    if kind == "lora":
        peft: Any = importlib.import_module("peft")
        adapter = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        made.module = peft.get_peft_model(made.language_model, adapter)
        made.module.peft_config["default"].base_model_name_or_path = BASE_NAME
    return made


def run(case: str, out: Path) -> None:
    """Train and save one case."""
    framework, architecture, kind = case.split(":")
    torch.manual_seed(1234)
    what = recipe(architecture, kind)
    trained = FRAMEWORKS[f"accelerate-{framework}"](what)
    trained.checkpoint(out / "checkpoint")
    if dist.get_rank() == 0:
        (out / "hf").mkdir()
        what.language_model.config.save_pretrained(out / "hf")
        what.tokenizer.save_pretrained(out / "hf")
        if kind == "lora":
            what.module.peft_config["default"].save_pretrained(str(out / "hf"))
    training.save(
        trained.model,
        out / "ours",
        accelerator=trained.accelerator,
        tokenizer=what.tokenizer,
        **OPTIONS[kind],
    )
    # Last, because it gives the model another generation config.
    state = open_instruct.save(
        trained.accelerator,
        trained.model,
        what.tokenizer,
        out / "theirs",
        adapter=kind == "lora",
        attribute="policy" if kind == "policy" else None,
        template_name="olmo",
    )
    if kind == "lora" and dist.get_rank() == 0:
        torch.save({name: t for name, t in state.items() if ".lora_" in name}, out / "live.pt")
    dist.barrier()


if __name__ == "__main__":
    sys.path.insert(0, str(FIXTURES))
    dist.init_process_group("gloo")
    with warm_children():
        for each in sys.argv[2:]:
            run(each, Path(sys.argv[1]) / each.replace(":", "-"))
    dist.barrier()
    # A thread of gloo may abort an interpreter that shuts down.
    leave_at_once(0)
