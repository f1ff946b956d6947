"""Owns ``verify --for``: what a reader other than the installed transformers and PEFT does not take.

Each rule is one entry of ``RULES``: the reader, the kind of problem, the place in the reader's source that
states it, and a function that gives the fact. Lists of names (architectures, tokenizer classes) lie in
``hub/tables``, one file a reader, with the version that they were read from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import listed
from ckpt_tools.hub.adapter_config import NAME as ADAPTER_CONFIG
from ckpt_tools.verification import sglang_facts
from ckpt_tools.verification.container import Entry
from ckpt_tools.verification.directory import Directory, read_object
from ckpt_tools.verification.problem import Findings, Kind
from ckpt_tools.verification.reader_facts import (
    Facts,
    table,
    v4_renamed,
    v4_rope,
    v4_tokenizer,
    v4_type,
)
from ckpt_tools.verification.run import Run

ORDER = 75
READERS = ("transformers-4", "vllm", "sglang", "llama.cpp", "peft")

# The versions whose source the rules cite.
VERSIONS = {
    "transformers-4": "transformers 4.57.6",
    "vllm": "vLLM 0.32.0",
    "sglang": "SGLang 0.5.23",
    "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36",
    "peft": "PEFT 0.17.0",
}
KINDS = {
    "transformers-4-refuses": Kind("error", "--for: transformers 4.57 fails on it"),
    "transformers-4-differs": Kind("error", "--for: transformers 4.57 computes something else"),
    "vllm-refuses": Kind("error", "--for: vLLM fails on it"),
    "vllm-limits": Kind("warning", "--for: vLLM needs an option, or runs it another way"),
    "sglang-refuses": Kind("error", "--for: SGLang fails on it"),
    "sglang-differs": Kind("error", "--for: SGLang computes something else"),
    "sglang-limits": Kind("warning", "--for: SGLang needs an option, or runs it another way"),
    "llama.cpp-refuses": Kind("error", "--for: the converters of llama.cpp fail on it"),
    "llama.cpp-differs": Kind("error", "--for: llama.cpp computes something else"),
    "peft-refuses": Kind("error", "--for: the oldest supported PEFT fails on it"),
    "peft-differs": Kind(
        "error", "--for: the oldest supported PEFT leaves out what it does not know"
    ),
}

_COMPAT = "Write the directory again with --compat transformers-4."
_MERGE = "Serve the merged model: ckpt-tools merge-lora CKPT OUT."


@dataclass(frozen=True)
class Rule:
    """One thing that a reader does not take.

    Attributes:
        reader: the reader.
        kind: the kind of problem.
        of: what it is about: a model or an adapter.
        source: where the reader's source states it.
        find: the fact, as the end of a sentence that starts with the reader; None if there is none.
        hint: the next step.
    """

    reader: str
    kind: str
    of: str
    source: str
    find: Callable[[Facts], str | None]
    hint: str | None = None

    @property
    def about(self) -> str:
        """What it looks at, for a list of rules."""
        return (self.find.__doc__ or "").partition(":")[0].rstrip(".")


def check(run: Run) -> None:
    """Apply the rules of each reader that was named."""
    for reader in run.request.readers:
        for file, of, facts in _subjects(run.directory):
            for rule in RULES:
                if rule.reader != reader or rule.of != of:
                    continue
                fact = rule.find(facts)
                if fact is not None:
                    detail = f"{VERSIONS[reader]} {fact} ({rule.source})"
                    run.findings.add(rule.kind, detail, file=file, hint=rule.hint)
        run.findings.checked.append(f"what {VERSIONS[reader]} takes")


def _subjects(directory: Directory) -> Iterator[tuple[str, str, Facts]]:
    """The model of a directory, and its adapters."""
    if directory.config is not None:
        yield "config.json", "model", _facts(directory, "", directory.config, directory.tensors)
    for folder, tensors in directory.adapters.items():
        start = f"{folder}/" if folder else ""
        config = read_object(directory, f"{start}{ADAPTER_CONFIG}", "config-invalid", Findings())
        if config is not None:
            yield f"{start}{ADAPTER_CONFIG}", "adapter", _facts(directory, start, config, tensors)


def _facts(
    directory: Directory, start: str, config: Mapping[str, Any], tensors: Mapping[str, Entry]
) -> Facts:
    names = frozenset(
        name.removeprefix(start) for name in directory.files if name.startswith(start)
    )

    def read(name: str) -> Mapping[str, Any]:
        if name not in names:
            return {}
        return read_object(directory, f"{start}{name}", "config-invalid", Findings()) or {}

    return Facts(config, tensors, read, names)


def _architecture(facts: Facts) -> str | None:
    names = facts.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _is(key: str, text: str) -> Callable[[Facts], str | None]:
    """The fact where a key of the config is set."""

    def find(facts: Facts) -> str | None:
        return text if facts.config.get(key) else None

    find.__doc__ = f"{key}."
    return find


def _unlisted(reader: str, text: str) -> Callable[[Facts], str | None]:
    """The fact where the architecture is not in the reader's list."""

    def find(facts: Facts) -> str | None:
        name = _architecture(facts)
        known = table(reader)
        if name is None or name in known["architectures"] or name in known.get("dropped", {}):
            return None
        return text.format(name=name)

    find.__doc__ = "An architecture that it lacks."
    return find


def _vllm_dropped(facts: Facts) -> str | None:
    """An architecture that was dropped."""
    name = _architecture(facts)
    last = table("vllm")["dropped"].get(name)
    return f"has dropped {name}; {last} was the last version with it" if last else None


def _vllm_quantization(facts: Facts) -> str | None:
    """A quantisation method that it lacks."""
    quantization = facts.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None or str(method).lower() in table("vllm")["quantization"]:
        return None
    return f"has no quantisation method {method!r}"


def _vllm_modules(facts: Facts) -> str | None:
    """Modules in `modules_to_save` but classifier and score."""
    saved = facts.config.get("modules_to_save") or ()
    others = [name for name in saved if name not in ("classifier", "score")]
    return (
        f"takes no modules_to_save but classifier and score; here: {listed(others)}"
        if others
        else None
    )


def _vllm_init(facts: Facts) -> str | None:
    """A value of init_lora_weights that changes the base."""
    init = facts.config.get("init_lora_weights")
    fine = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    if not isinstance(init, str) or init.lower() in fine:
        return None
    return f"refuses init_lora_weights {init!r}, which changes the base"


def _vllm_bias(facts: Facts) -> str | None:
    """A bias but none."""
    bias = facts.config.get("bias")
    return (
        f"takes bias 'none' alone, and the config states {bias!r}"
        if bias not in (None, "none")
        else None
    )


def _vllm_names(facts: Facts) -> str | None:
    """Names of tensors that it does not read."""
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    heads = tuple(
        f"{module}.{end}" for module in ("score", "classifier") for end in ("weight", "bias")
    )
    odd = [
        n for n in facts.tensors if not n.endswith((*endings, *heads)) and ".base_layer." not in n
    ]
    return f"does not read tensors of these names: {listed(sorted(odd))}" if odd else None


def _not_lora(facts: Facts) -> str | None:
    """No r, lora_alpha or target_modules."""
    missing = [
        key for key in ("r", "lora_alpha", "target_modules") if facts.config.get(key) is None
    ]
    return f"reads LoRA alone; the config has no {listed(missing)}" if missing else None


def _vllm_rank(facts: Facts) -> str | None:
    """A rank above 16."""
    pattern = facts.config.get("rank_pattern")
    ranks = [facts.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    return (
        f"takes rank {rank} only with --max-lora-rank {rank} or more (16 by default)"
        if rank > 16
        else None
    )


def _llama_scale(facts: Facts) -> str | None:
    """Any of use_rslora and alpha_pattern."""
    found = [key for key in ("use_rslora", "alpha_pattern") if facts.config.get(key)]
    return (
        f"scales every module by lora_alpha / rank and does not read {listed(found)}"
        if found
        else None
    )


def _llama_names(facts: Facts) -> str | None:
    """Tensors that are neither lora_A nor lora_B."""
    parts = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    fine = (*parts, ".base_layer.weight", "_layernorm", ".norm")
    odd = [name for name in facts.tensors if not any(part in name for part in fine)]
    return f"reads lora_A and lora_B alone; here: {listed(sorted(odd))}" if odd else None


def _peft_type(facts: Facts) -> str | None:
    """A peft_type that it lacks."""
    kind = facts.config.get("peft_type")
    known = table("peft")["types"]
    return f"has no type {kind}" if isinstance(kind, str) and kind not in known else None


def _peft_init(facts: Facts) -> str | None:
    """A value of init_lora_weights that it cannot load."""
    start = facts.config.get("init_lora_weights")
    fine = tuple(table("peft")["init_lora_weights"])
    if not isinstance(start, str) or start.lower().startswith(fine):
        return None
    return f"fails on init_lora_weights {start!r}"


def _peft_keys(facts: Facts) -> str | None:
    """Keys that it lacks."""
    if facts.config.get("peft_type") != "LORA":
        return None
    known = table("peft")["lora_keys"]
    found = [key for key, value in facts.config.items() if value and key not in known]
    return f"does not know {listed(found)}, and leaves it out with a warning" if found else None


_HELPER = "vllm/lora/peft_helper.py"
_V4 = "transformers-4"
RULES = (
    Rule(_V4, "transformers-4-refuses", "model", "models/auto/configuration_auto.py", v4_type),
    Rule(_V4, "transformers-4-differs", "model", "modeling_rope_utils.py", v4_rope, _COMPAT),
    Rule(
        _V4, "transformers-4-differs", "model", "models/*/configuration_*.py", v4_renamed, _COMPAT
    ),
    Rule(
        *(_V4, "transformers-4-refuses", "model", "models/auto/tokenization_auto.py"),
        v4_tokenizer,
        _COMPAT,
    ),
    Rule(
        *(_V4, "transformers-4-refuses", "adapter", "models/auto/tokenization_auto.py"),
        v4_tokenizer,
        _COMPAT,
    ),
    Rule("vllm", "vllm-refuses", "model", "model_executor/models/registry.py", _vllm_dropped),
    Rule(
        *("vllm", "vllm-limits", "model", "model_executor/models/registry.py"),
        _unlisted(
            "vllm", "has no {name} of its own and runs it with the code of transformers, if at all"
        ),
    ),
    Rule(
        *("vllm", "vllm-refuses", "model", "model_executor/layers/quantization/__init__.py"),
        _vllm_quantization,
    ),
    Rule("vllm", "vllm-refuses", "adapter", _HELPER, _not_lora, _MERGE),
    Rule("vllm", "vllm-refuses", "adapter", _HELPER, _vllm_modules, _MERGE),
    Rule("vllm", "vllm-refuses", "adapter", _HELPER, _is("use_dora", "takes no DoRA"), _MERGE),
    Rule(
        "vllm", "vllm-refuses", "adapter", _HELPER, _is("lora_bias", "takes no lora_bias"), _MERGE
    ),
    Rule("vllm", "vllm-refuses", "adapter", _HELPER, _vllm_init, _MERGE),
    Rule("vllm", "vllm-refuses", "adapter", _HELPER, _vllm_bias, _MERGE),
    *(
        Rule("vllm", "vllm-refuses", "adapter", _HELPER, _is(key, f"takes no {key}"))
        for key in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    ),
    Rule("vllm", "vllm-refuses", "adapter", "vllm/lora/utils.py", _vllm_names, _MERGE),
    Rule("vllm", "vllm-limits", "adapter", "vllm/config/lora.py", _vllm_rank),
    Rule(
        *("sglang", "sglang-limits", "model", "sglang/srt/models"),
        _unlisted(
            "sglang",
            "has no {name} of its own and runs it with the code of transformers, if at all",
        ),
    ),
    Rule(
        "sglang", "sglang-refuses", "adapter", "sglang/srt/lora/lora_config.py", _not_lora, _MERGE
    ),
    Rule(
        *("sglang", "sglang-refuses", "adapter", "sglang/srt/lora/lora_manager.py"),
        _is("use_dora", "takes no DoRA"),
        _MERGE,
    ),
    Rule(
        *("sglang", "sglang-limits", "adapter", "sglang/srt/lora/lora_config.py (LoRAConfig)"),
        sglang_facts.added_tokens,
        "Compare the id with vocab_size in the config.json of the base. If it is not below that, serve the "
        "merged model: ckpt-tools merge-lora CKPT OUT.",
    ),
    Rule(
        *("sglang", "sglang-refuses", "adapter"),
        "sglang/srt/lora/utils.py (get_normalized_target_modules)",
        sglang_facts.targets,
        "List the names of the modules in adapter_config.json, or serve the merged model: "
        "ckpt-tools merge-lora CKPT OUT.",
    ),
    Rule(
        *("sglang", "sglang-refuses", "adapter"),
        "sglang/srt/lora/mem_pool.py (load_lora_weight_tensor)",
        sglang_facts.ranks,
        _MERGE,
    ),
    Rule(
        *("sglang", "sglang-refuses", "adapter"),
        "sglang/srt/lora/lora.py (normalize_qkv_proj)",
        sglang_facts.stacked,
        _MERGE,
    ),
    Rule(
        *("sglang", "sglang-differs", "adapter"),
        "sglang/srt/lora/mem_pool.py (load_lora_weight_to_buffer)",
        sglang_facts.left_out,
        _MERGE,
    ),
    Rule(
        *("sglang", "sglang-differs", "adapter", "sglang/srt/lora/lora.py (LoRAAdapter)"),
        sglang_facts.not_read,
        _MERGE,
    ),
    Rule(
        *("llama.cpp", "llama.cpp-refuses", "model", "conversion/__init__.py"),
        _unlisted("llama.cpp", "converts no {name}"),
    ),
    Rule(
        "llama.cpp", "llama.cpp-refuses", "adapter", "convert_lora_to_gguf.py", _llama_names, _MERGE
    ),
    Rule(
        "llama.cpp", "llama.cpp-differs", "adapter", "convert_lora_to_gguf.py", _llama_scale, _MERGE
    ),
    Rule("peft", "peft-refuses", "adapter", "peft/utils/peft_types.py", _peft_type),
    Rule("peft", "peft-refuses", "adapter", "peft/tuners/lora/layer.py", _peft_init, _MERGE),
    Rule("peft", "peft-differs", "adapter", "peft/config.py (from_peft_type)", _peft_keys),
)
