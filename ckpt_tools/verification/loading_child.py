"""Owns the child process that loads a directory, runs a forward pass, and generates a few tokens.

All loading code of transformers and PEFT for checks runs here, because a model can need more memory than the
machine has, or crash its process. Each step is reported as soon as it is done. So a missing step is the one
that ended the process.

It reads one JSON object on standard input and prints one for each step on standard output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckpt_tools.hub.reference.process import question_and_answers

_TOKENS = 6
_NEW_TOKENS = 5
# A model with one of these inputs may need more than text.
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values", "bbox"}
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}

Step = dict[str, Any]


def main() -> None:
    """Answer the question on standard input."""
    with question_and_answers() as (question, answers):
        for step in steps(question):
            answers.write(json.dumps(step) + "\n")
            answers.flush()


def steps(question: Mapping[str, Any]) -> Iterator[Step]:
    """Each step's name and result; ``failure``, ``unknown`` or ``skipped`` if it failed."""
    import torch

    held: list[Any] = []
    yield {
        "step": "load",
        **_tried(lambda: (_adapted if question["base"] else _loaded)(question, held)),
    }
    if not held:
        return
    model = held[0].eval()
    with torch.no_grad():
        forward = _tried(lambda: _called(model))
        yield {"step": "forward", **forward}
        if "tensors" in forward and not forward["not_finite"] and model.can_generate():
            yield {"step": "generation", **_tried(lambda: _generated(model))}


class _NoClassError(Exception):
    """transformers does not have the model."""


class _NoBaseError(Exception):
    """The base of an adapter cannot be loaded."""


def _tried(action: Callable[[], Step]) -> Step:
    try:
        return action()
    except _NoClassError as error:
        return {"unknown": str(error)}
    except (_NoBaseError, ImportError) as error:
        return {"skipped": str(error)}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def _loaded(question: Mapping[str, Any], held: list[Any]) -> Step:
    """Load a full model into ``held``, and return what transformers reports about its keys."""
    model, info = _from_pretrained(question["directory"], question["trust_remote_code"])
    held.append(model)
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(
            [k, list(ours), list(its)] for k, ours, its in info["mismatched_keys"]
        ),
    }


def _from_pretrained(
    directory: str, trust_remote_code: bool, auto: str | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    import transformers
    from transformers.utils import logging

    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    model_class: Any = getattr(transformers, auto or architecture, None)
    if model_class is None and trust_remote_code:
        model_class = _custom_class(config, architecture, directory)
    if model_class is None:
        raise _NoClassError(f"transformers {transformers.__version__} has no {architecture}")
    loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
        directory,
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        **options,
    )
    return loaded


def _custom_class(config: Mapping[str, Any], architecture: str, directory: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = (config.get("auto_map") or {}).values()
    place = next((p for p in places if str(p).endswith(f".{architecture}")), None)
    return None if place is None else get_class_from_dynamic_module(place, directory)


def _adapted(question: Mapping[str, Any], held: list[Any]) -> Step:
    """Load base and adapter into ``held``, and return what PEFT reports about the adapter's keys."""
    try:
        from peft import PeftConfig, PeftModel
    except Exception as error:
        # An installation that is broken is not the adapter's fault, whatever its import raises.
        raise ImportError(f"PEFT cannot be imported: {error}") from error

    task = PeftConfig.from_pretrained(question["directory"]).task_type
    options = {} if question["labels"] is None else {"num_labels": question["labels"]}
    auto = _CLASSES.get(str(getattr(task, "value", task))) if options else None
    try:
        base, _ = _from_pretrained(question["base"], question["trust_remote_code"], auto, **options)
        rows = question["rows"]
        if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)
    except Exception as error:
        raise _NoBaseError(f"its base cannot be loaded: {error}") from error
    model: Any = PeftModel.from_pretrained(base, question["directory"])
    # A second time, because the first call does not return the report.
    account = model.load_adapter(question["directory"], model.active_adapter)
    held.append(model)
    return {
        "missing": sorted(account.missing_keys),
        "unexpected": sorted(account.unexpected_keys),
        "mismatched": [],
    }


def _called(model: Any) -> Step:
    """Run a forward pass on a few tokens, and return which outputs are not finite."""
    import inspect

    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = set(inspect.signature(inner.forward).parameters)
    if inner.main_input_name != "input_ids" or "input_ids" not in takes:
        return {"skipped": f"the model takes {inner.main_input_name}, not tokens"}
    try:
        tokens = _tokens(inner)
        asked = {"input_ids": tokens}
        if inner.config.is_encoder_decoder and "decoder_input_ids" in takes:
            asked["decoder_input_ids"] = tokens
        answer = model(**asked)
    except Exception as error:
        others = sorted(takes & _OTHER_INPUTS)
        if others:
            return {"skipped": f"the model takes {others[0]} besides tokens ({error})"}
        raise
    named = answer.items() if isinstance(answer, Mapping) else enumerate(answer)
    tensors = {
        str(name): value
        for name, value in named
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return {
        "tensors": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "not_finite": [n for n, tensor in tensors.items() if not tensor.isfinite().all()],
    }


def _tokens(model: Any) -> Any:
    """A few ordinary ids, and the end-of-text id, which some classifiers need."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    special = set(_special_ids(model.config.to_dict()))
    usual = [number for number in range(min(rows, 1000)) if number not in special]
    end = next(
        (
            n
            for n in _special_ids({"eos_token_id": getattr(model.config, "eos_token_id", None)})
            if n < rows
        ),
        None,
    )
    numbers = (usual or [0])[:_TOKENS] + ([] if end is None else [end])
    return torch.tensor([numbers])


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            yield from (
                n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)
            )


def _generated(model: Any) -> Step:
    """The number of tokens of a greedy generation."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = _tokens(inner)
    written = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
    )
    given = 1 if inner.config.is_encoder_decoder else tokens.shape[1]
    return {"tokens": written.shape[1] - given}


if __name__ == "__main__":
    main()
