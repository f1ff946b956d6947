"""A client: llama.cpp, which reads what its own converter makes of a directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import LONGEST, Answer, serve
from llama_cpp import Llama, llama_vocab_is_eog


def converted(script: Path, directory: str, output: Path, *more: str) -> str:
    """The file that a script of llama.cpp makes of a directory."""
    command = [
        sys.executable,
        str(script),
        directory,
        "--outtype",
        "f32",
        "--outfile",
        str(output),
        *more,
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(
            f"{script.name}: {(ended.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    return str(output)


def read(case: dict[str, Any]) -> Answer:
    """Convert, load, and generate until a token that the file calls an end of generation."""
    (scripts,) = Path(case["llama.cpp"]).glob("*/vendor/llama.cpp")
    scratch = Path(case["scratch"])
    model = converted(scripts / "convert_hf_to_gguf.py", case["directory"], scratch / "model.gguf")
    lora = None
    if case["adapter"]:
        script = scripts / "convert_lora_to_gguf.py"
        lora = converted(
            script, case["adapter"], scratch / "lora.gguf", "--base", case["directory"]
        )
    llm = Llama(model, lora_path=lora, n_ctx=128, n_threads=1, verbose=False)
    prompt = llm.tokenize(case["text"].encode(), add_bos=False, special=True)
    tokens: list[int] = []
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(int(token))
        if llama_vocab_is_eog(llm._model.vocab, token) or len(tokens) == LONGEST:
            break
    return {"prompt": list(prompt), "tokens": tokens}


if __name__ == "__main__":
    serve(read, "llama_cpp_python", "gguf", "transformers")
