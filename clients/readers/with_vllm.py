"""A client: vLLM on the processor, without compilation, in its own process alone."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from jobs import LONGEST, Answer, serve
from vllm import LLM


def read(case: dict[str, Any]) -> Answer:
    """Load a directory as vLLM does by default: its own generation config and chat template."""
    lora: dict[str, Any] = {}
    if case["adapter"]:
        lora = {"enable_lora": True, "max_lora_rank": 16}
    llm = LLM(
        model=case["directory"],
        tokenizer=case["adapter"] or case["directory"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        **lora,
    )
    request = None
    if case["adapter"]:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, case["adapter"])
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens = 0.0, LONGEST
    said = [{"role": "user", "content": case["question"]}]
    (output,) = llm.chat(said, sampling, lora_request=request, use_tqdm=False)
    return {"prompt": list(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids)}


if __name__ == "__main__":
    serve(read, "vllm-cpu", "torch", "transformers")
