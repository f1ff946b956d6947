"""Writes a ZeRO-3 checkpoint of a huge model: its metadata is real, its values are holes in sparse files.

Owns the huge models. The layout is that of `make_zero.py`. All ranks of such a run have the same metadata, so
it is made once and saved under the name of each rank.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from make_zero import (
    DEFAULT_SUB_GROUP,
    STEP,
    Job,
    adam_state,
    model_state,
    optimizer_state,
    sub_groups,
)
from models import Values, lay_out

COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
MODELS = {
    "70B": lambda: transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **COMMON,
    ),
    "405B": lambda: transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
        **COMMON,
    ),
    "1T": lambda: transformers.Qwen3MoeConfig(
        vocab_size=163_840,
        hidden_size=7168,
        moe_intermediate_size=2048,
        num_experts=384,
        num_experts_per_tok=8,
        num_hidden_layers=61,
        num_attention_heads=64,
        head_dim=128,
        **COMMON,
    ),
}


def optimizer(job: Job) -> dict[str, Any]:
    """The optimizer file of any rank. The kernel gives no memory to tensors that nobody touches."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    masters, moments = [], []
    for group in sub_groups(job):
        tensor = torch.empty(sum(math.ceil(p.numel / job.ranks) for p in group)).requires_grad_()
        tensor.ds_id = f"{group[0].index}_{group[-1].index}"  # type: ignore[attr-defined]
        masters.append(tensor)
        # As a number: the value of a tensor would be a hole.
        moments.append(adam_state(job, "", 0) | {"step": STEP})
    state = {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": job.ranks,
        "optimizer_state_dict": optimizer_state(moments),
        "fp32_flat_groups": masters,
    }
    import deepspeed

    return {
        "optimizer_state_dict": state,
        "ds_config": job.config,
        "ds_version": deepspeed.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--model", choices=MODELS, default="405B")
    parser.add_argument("--ranks", type=int, default=1024)
    options = parser.parse_args()
    config = MODELS[options.model]()
    parameters, state = lay_out(config)
    ranks = options.ranks
    job = Job(options.out, 3, ranks, 0, False, DEFAULT_SUB_GROUP, parameters, state, Values(0))
    job.folder.mkdir(parents=True)
    names = (
        ("bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt", optimizer(job)),
        ("zero_pp_rank_{}_mp_rank_00_model_states.pt", model_state(job)),
    )
    for name, content in names:
        for rank in range(ranks):
            with torch.serialization.skip_data():
                torch.save(content, job.folder / name.format(rank))
    (job.out / "latest").write_text(job.folder.name)
    config.save_pretrained(job.out / "hf")
    total = sum(parameter.numel for parameter in parameters)
    facts = {
        "model": options.model,
        "ranks": ranks,
        "parameters": total,
        "tensors": len(parameters),
    }
    (job.out / "benchmark.json").write_text(json.dumps(facts) + "\n")
    print(f"{total:,} parameters, {len(parameters):,} tensors, {ranks:,} ranks in {job.out}")


if __name__ == "__main__":
    main()
