"""A LoRA fine-tune of OLMo-2 under Accelerate and DeepSpeed ZeRO-3 that leaves clean adapters as it goes.

    torchrun --nproc-per-node 2 examples/finetune_lora.py OUT

Every third step the adapter is saved as PEFT would save it, with its tokenizer; no rank gathers anything. At
the end the framework's own state is saved too, and converted afterwards: the same adapter, byte for byte, and
the model that it makes of its base.
"""

from __future__ import annotations

import sys
from pathlib import Path

import on_cpu  # isort: skip  # first: it sets the environment

import torch
import torch.distributed as dist

import ckpt_tools
from ckpt_tools import training

STEPS, EVERY = 6, 3
CHATS = [
    ("What is a checkpoint?", "A checkpoint is what a run can be taken up from."),
    ("What is an adapter?", "An adapter is a small change to a large model."),
]


def main(out: Path) -> None:
    on_cpu.prepare_backends()
    base = on_cpu.base_model(out)

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    accelerator = on_cpu.accelerator(stage=3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(tokenizer), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step in range(1, STEPS + 1):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item():.3f}")
        if step % EVERY == 0:
            training.save(
                model,
                out / f"adapter-step-{step}",
                accelerator=accelerator,
                tokenizer=tokenizer,
                adapter="default",
            )
    accelerator.save_state(str(out / "state"))
    dist.barrier()
    if accelerator.is_main_process:
        convert(out, base)
    accelerator.end_training()


def rows(tokenizer: object) -> list[dict[str, torch.Tensor]]:
    """The chats, padded to one length; every rank has both."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for question, answer in CHATS
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    fields = {**encoded, "labels": labels}
    # Accelerate deals out the rows of one loader: as many copies as there are ranks.
    return [{name: v[i] for name, v in fields.items()} for i in (0, 1)] * dist.get_world_size()


def convert(out: Path, base: Path) -> None:
    """What somebody does who has only the framework's state: no DeepSpeed is needed for it."""
    last = out / f"adapter-step-{STEPS}"
    options = {"config": base, "tokenizer": last, "adapter_config": last}
    ckpt_tools.extract_lora(out / "state", out / "adapter", **options)
    ckpt_tools.merge_lora(out / "state", out / "merged", **options)
    if not on_cpu.same_files(out / "adapter", last):
        raise SystemExit("the adapter that was saved differs from the one that was converted")
    print(f"saved while training: {last}; converted after it: {out / 'adapter'}: the same bytes")
    print(f"merged into its base: {out / 'merged'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    on_cpu.leave()
