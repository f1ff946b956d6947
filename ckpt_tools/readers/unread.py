"""Owns the formats that are recognised by the names of their files and not read, and what to do with each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.storage.folders import entries_of


@dataclass(frozen=True)
class _Format:
    files: re.Pattern[str]
    title: str
    advice: str


_FORMATS = (
    _Format(
        re.compile(r"(?:mp_rank_\d+\w*/)?model_optim_rng\.pt"),
        "a checkpoint of Megatron-LM (model_optim_rng.pt), with names and fused weights of its own,",
        "Convert it with the converter of the training framework to a Hugging Face directory.",
    ),
    _Format(
        re.compile(r"ds_inference_config\.json"),
        "a checkpoint that DeepSpeed-Inference cut for its kernels (ds_inference_config.json)",
        "Use the model that it was made from: init_inference did not change its weights.",
    ),
    _Format(
        re.compile(r"(?:default/)?(?:_CHECKPOINT_METADATA|manifest\.ocdbt)"),
        "a checkpoint of Orbax (JAX)",
        "Restore it with Orbax, and save the parameters as safetensors.",
    ),
    _Format(
        re.compile(r".*\.gguf"),
        "a GGUF file of llama.cpp",
        "transformers reads it: from_pretrained(DIR, gguf_file=NAME), then save_pretrained.",
    ),
    _Format(
        re.compile(r"tf_model\.h5|flax_model\.msgpack|.*\.ckpt\.index"),
        "the weights of a TensorFlow or Flax model",
        "transformers up to release 4 reads them: from_pretrained with from_tf=True or from_flax=True, then "
        "save_pretrained.",
    ),
    _Format(
        re.compile(r".*\.nemo"),
        "an archive of NeMo",
        "Convert it with NeMo's own export to a Hugging Face directory.",
    ),
)


def unread(path: Path) -> UnsupportedLayout | None:
    """The refusal of a format that is known and not read; None for other files.

    Args:
        path: a file or a directory; the names in it and one level below are looked at.
    """
    found = [path.name]
    for entry in entries_of(path) if path.is_dir() else ():
        below = entries_of(entry) if entry.is_dir() else ()
        found += [entry.name, *(f"{entry.name}/{child.name}" for child in below)]
    for known in _FORMATS:
        name = next((name for name in found if known.files.fullmatch(name)), None)
        if name is not None:
            return UnsupportedLayout(f"{known.title} is not read", path=path, hint=known.advice)
    return None
