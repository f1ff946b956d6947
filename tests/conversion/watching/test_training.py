"""A real training saves while it is watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ckpt_tools import verify
from tests.support.answers import shared_answers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

# Weights as the trainer holds them are written by the training itself, apart from its checkpoints.
TRAINING = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

run, truth = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
model = LlamaForCausalLM(config)
rows = [{"input_ids": torch.randint(0, 64, (8,)), "labels": torch.randint(0, 64, (8,))} for _ in range(8)]

class Truth(TrainerCallback):
    def on_save(self, args, state, control, model=None, **kwargs):
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file(tensors, truth / f"checkpoint-{state.global_step}.safetensors")
        # The watch reads a checkpoint while the next steps are made; the limit must not delete it before.
        while state.global_step >= 4 and not (truth / "go-on").exists():
            time.sleep(0.01)

arguments = TrainingArguments(run, max_steps=6, save_steps=2, save_total_limit=2, report_to=[], use_cpu=True,
                              per_device_train_batch_size=1, learning_rate=0.01, disable_tqdm=True)
Trainer(model, arguments, train_dataset=rows, callbacks=[Truth()]).train()
"""


def test_a_training_that_saves_is_watched(tmp_path: Path) -> None:
    run, out, truth, log = (tmp_path / name for name in ("run", "out", "truth", "log"))
    run.mkdir(), truth.mkdir()
    environment = {
        **os.environ,
        **shared_answers(),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = f'basename "$CKPT_TOOLS_OUTPUT" >> {log}; touch {truth}/go-on'
    options = ("--verify", "--quiet", "--poll", "0.05", "--exec", command)
    watch = subprocess.Popen(
        [sys.executable, "-m", "ckpt_tools", "watch", run, out, *options], env=environment
    )
    training = subprocess.Popen([sys.executable, "-c", TRAINING, run, truth], env=environment)
    try:
        # The last checkpoint is the last record; earlier ones may be deleted before they are read.
        wait_until(lambda: (out / "checkpoint-6.done").exists(), watch)
        assert training.wait() == 0
        watch.send_signal(signal.SIGTERM)
        assert watch.wait() == 143
    finally:
        training.kill()
        watch.kill()

    names = log.read_text().split()
    assert names[0] == "checkpoint-2" or names[0] == "checkpoint-4"
    assert names == sorted(set(names)) and names[-1] == "checkpoint-6"
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(names)
    for name in names:
        saved = load_file(truth / f"{name}.safetensors")
        found = load_file(out / name / "model.safetensors")
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved)
        assert verify(out / name, read_data=True).errors == ()
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint-6")
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"])
