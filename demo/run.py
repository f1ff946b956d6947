"""`make demo`: a raw ZeRO-3 checkpoint becomes a Hugging Face directory, and its model answers.

Every command is shown as one would type it. Ends with status 1 when the result is not right.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the result is complete: nothing is fetched

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = "fixtures/zero/zero3-bf16-olmo2-chat-2ranks"
OUTPUT = "demo-output"
QUESTION = "What is a checkpoint?"


def main() -> int:
    os.chdir(ROOT)
    # The console script lies beside the interpreter that runs this file: found by its bare name.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

    title("What lies in the checkpoint")
    run("ckpt-tools", "inspect", f"{FIXTURE}/checkpoint")

    title("From shards to a Hugging Face directory")
    run(
        *("ckpt-tools", "consolidate", f"{FIXTURE}/checkpoint", OUTPUT),
        *("--config", f"{FIXTURE}/hf"),
        *("--tokenizer", f"{FIXTURE}/hf"),
        "--overwrite",
    )
    run("ls", "-l", OUTPUT)

    title("transformers loads it and answers with its chat template")
    return ask(QUESTION)


def ask(question: str) -> int:
    """Load OUTPUT with transformers, put the question to it and print what it says."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    model, loading = AutoModelForCausalLM.from_pretrained(
        OUTPUT, dtype="auto", output_loading_info=True
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {parameters:,} parameters, {model.dtype}")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        print(f"{kind}: {sorted(loading[kind]) or 'none'}")
    print(f"end-of-sequence ids: {model.generation_config.eos_token_id}\n")

    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**prompt, max_new_tokens=64)[0]
    start = prompt["input_ids"].shape[1]
    print(tokenizer.decode(written))
    last = tokenizer.convert_ids_to_tokens(int(written[-1]))

    stopped = last == "<|im_end|>"
    print(f"\n{len(written) - start} tokens generated; ", end="")
    print(f"stopped at {last}" if stopped else f"did not stop: the last one is {last}")
    complete = not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))
    return 0 if stopped and complete else 1


def title(text: str) -> None:
    print(f"== {text}\n", flush=True)


def run(*command: str) -> None:
    """Show a command as typed, options on lines of their own when it is long, and run it."""
    typed = "$ " + shlex.join(command)
    if len(typed) > 100:
        typed = typed.replace(" --", " \\\n      --")
    print(typed, flush=True)
    subprocess.run(command, check=True)
    print(flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
