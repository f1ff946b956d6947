"""The directory that open-instruct makes of a model in training, by calls of Accelerate and transformers.

Written anew from what ``save_with_accelerate`` of its ``open_instruct/model_utils.py`` does (read at commit
e6c3044): the whole state is gathered by Accelerate, and transformers or PEFT saves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig


def save(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    output: Path,
    *,
    adapter: bool = False,
    attribute: str | None = None,
    template_name: str = "tulu",
) -> None:
    """Save as open-instruct does; every rank calls it."""
    model.generation_config = _generation_config(tokenizer, template_name)
    inner = accelerator.unwrap_model(model)
    if attribute is not None:
        inner = getattr(inner, attribute)
    state = accelerator.get_state_dict(model)
    leads = accelerator.is_main_process
    if attribute is not None and leads:
        start = f"{attribute}."
        state = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    if not adapter:
        inner.save_pretrained(
            output, is_main_process=leads, save_function=accelerator.save, state_dict=state
        )
    elif leads:
        inner.save_pretrained(output, state_dict=state)
    if leads:
        tokenizer.save_pretrained(output)


def _generation_config(tokenizer: Any, template_name: str) -> GenerationConfig:
    """Greedy. With a template of OLMo, generation ends at either of its two tokens."""
    if "olmo" in template_name:
        ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
        return GenerationConfig(temperature=None, top_p=None, eos_token_id=ends)
    return GenerationConfig(
        temperature=None,
        top_p=None,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
