"""The directory that open-instruct makes of a model in training, by calls of Accelerate and transformers.

Written anew from what ``save_with_accelerate`` of its ``open_instruct/model_utils.py`` does (read at commit
e6c3044): the whole state is gathered by Accelerate, and transformers or PEFT saves it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.fsdp._flat_param import FlatParamHandle
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
) -> dict[str, Any]:
    """Save as open-instruct does; every rank calls it. Gives the state that was gathered, on the first."""
    model.generation_config = _generation_config(tokenizer, template_name)
    inner = accelerator.unwrap_model(model)
    if attribute is not None:
        inner = getattr(inner, attribute)
    state = _gathered(accelerator, model)
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
    return dict(state or {})


def _gathered(accelerator: Any, model: Any) -> Any:
    """The whole state, as Accelerate gathers it."""
    # FSDP1 frees a flat parameter once it has moved it to the CPU. One that is there already is not copied,
    # so its views read freed memory (torch 2.13: a segmentation fault). Nothing has to be moved here.
    with patch.object(FlatParamHandle, "to_cpu", lambda handle: nullcontext()):
        return accelerator.get_state_dict(model)


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
