"""A policy and a value model that PPO trains as one module, and a clean policy after every round.

    torchrun --nproc-per-node 2 examples/ppo_policy_value.py OUT

Trainers of this kind wrap two models in one, so that one engine trains both; what people want is the policy.
It is saved alone after each round, under its own names and with its tokenizer, and once more out of the
framework's state when training is over: the same bytes. The reward is made up: words that end soon.
"""

from __future__ import annotations

import sys
from pathlib import Path

import on_cpu  # isort: skip  # first: it sets the environment

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools import training

ROUNDS, EPOCHS, NEW_TOKENS, CLIP = 3, 2, 8, 0.2
QUESTIONS = ["What is a checkpoint?", "What does a shard hold?"]


class PolicyAndValue(nn.Module):
    """Two models with a backbone each; the losses of PPO over one batch of answers."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoModel, AutoModelForCausalLM

        super().__init__()
        self.policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        backbone = AutoModel.from_pretrained(base, dtype=torch.bfloat16)
        score = nn.Linear(backbone.config.hidden_size, 1, dtype=torch.bfloat16)
        self.value_model = nn.ModuleDict({"backbone": backbone, "score": score})

    def log_probabilities(self, ids: Tensor, prompt: int) -> Tensor:
        """Of each token after the prompt, shape (answers, tokens)."""
        logits = self.policy(input_ids=ids).logits[:, prompt - 1 : -1].float()
        chosen = ids[:, prompt:].unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)

    def values(self, ids: Tensor, prompt: int) -> Tensor:
        """What the value model expects of each answer, token by token, shape (answers, tokens)."""
        hidden = self.value_model["backbone"](input_ids=ids).last_hidden_state
        return self.value_model["score"](hidden)[:, prompt - 1 : -1, 0].float()

    def forward(self, ids: Tensor, prompt: int, before: Tensor, rewards: Tensor) -> Tensor:
        """The clipped objective of the policy, and the squared error of the value model."""
        values = self.values(ids, prompt)
        advantages = rewards - values.detach()
        ratio = (self.log_probabilities(ids, prompt) - before).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        return policy_loss + (values - rewards).square().mean()


def main(out: Path) -> None:
    on_cpu.prepare_backends()
    base = on_cpu.base_model(out)

    from transformers import AutoTokenizer

    accelerator = on_cpu.accelerator(stage=2)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    pair = PolicyAndValue(base)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(QUESTIONS * dist.get_world_size(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(pair, optimizer, loader)

    for number in range(1, ROUNDS + 1):
        for questions in loader:
            ids, prompt, rewards = answers(pair.policy, tokenizer, questions)
            with torch.no_grad():
                before = pair.log_probabilities(ids, prompt)
            for _ in range(EPOCHS):
                accelerator.backward(model(ids, prompt, before, rewards))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"round {number}: mean reward {rewards.mean().item():.2f}")
        training.save(
            model,
            out / f"policy-round-{number}",
            accelerator=accelerator,
            tokenizer=tokenizer,
            attribute="policy",
        )
    accelerator.save_state(str(out / "state"))
    dist.barrier()
    if accelerator.is_main_process:
        convert(out, base)
    accelerator.end_training()


def answers(
    policy: nn.Module, tokenizer: object, questions: list[str]
) -> tuple[Tensor, int, Tensor]:
    """What the policy says: ids, length of the prompts, and a reward for each token of an answer."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    ids = policy.generate(
        **prompts, do_sample=True, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    prompt = prompts["input_ids"].shape[1]
    lengths = torch.tensor(
        [len(word) for word in tokenizer.batch_decode(ids[:, prompt:].reshape(-1, 1))]
    )
    return ids, prompt, 1.0 - lengths.view(len(questions), -1) / 4


def convert(out: Path, base: Path) -> None:
    """What somebody does who has only the framework's state: no DeepSpeed is needed for it."""
    last = out / f"policy-round-{ROUNDS}"
    ckpt_tools.consolidate(
        out / "state", out / "policy", attribute="policy", config=base, tokenizer=last
    )
    if not on_cpu.same_files(out / "policy", last):
        raise SystemExit("the policy that was saved differs from the one that was converted")
    print(f"saved while training: {last}; converted after it: {out / 'policy'}: the same bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    on_cpu.leave()
