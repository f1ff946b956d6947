"""The options of the functions that write directories: what they are called, and what each means.

One list for all of them, because all are read, planned and delivered alike. Values only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from ckpt_tools.model.state import DTypeChoice
from ckpt_tools.tensors.checkpoint import Copy
from ckpt_tools.writing.bytes import default_workers
from ckpt_tools.writing.output import Progress, Writing

if TYPE_CHECKING:
    from ckpt_tools.ranks import Ranks

PathLike = str | os.PathLike[str]


class ReadingOptions(TypedDict, total=False):
    """Which checkpoint is meant.

    Attributes:
        tag: which of several checkpoints, by name.
        model: which of several models of one state, by number.
        format: name of the format, where the directory fits several.
        also: further directories with files of the same checkpoint: copies of what other machines hold.
    """

    tag: str | None
    model: int | None
    format: str | None
    also: Sequence[PathLike]


class DeliveryOptions(TypedDict, total=False):
    """How an output is written.

    Attributes:
        workers: number of threads; by default one a processor. The output does not depend on it.
        dry_run: plan and check everything, write nothing.
        overwrite: replace an existing output once the new one is complete.
        progress: called with bytes done and bytes in all, from any thread.
        resume: go on with what an earlier run of the same kind left.
        sha256: write ``SHA256SUMS``, which ``sha256sum -c`` accepts.
        verify: verify every byte before the output appears.
        ranks: the ranks that carry out the same call together; every one of them must make it.
        node_local: each machine sees only its own files of the checkpoint; the ranks pool them.
    """

    workers: int | None
    dry_run: bool
    overwrite: bool
    progress: Progress | None
    resume: bool
    sha256: bool
    verify: bool
    ranks: Ranks | None
    node_local: bool


class AdapterOptions(ReadingOptions, DeliveryOptions, total=False):
    """The options of :func:`ckpt_tools.extract_lora`.

    Attributes:
        dtype: ``auto`` gives each tensor its training dtype, ``keep`` leaves each as it lies,
            ``fp32``, ``bf16`` and ``fp16`` cast every floating tensor.
        weights: ``master`` takes the optimizer's copy where there is one, ``model`` the 16-bit copy.
        config: a model's ``config.json`` or its directory; by default looked for in ``like`` and
            near the checkpoint. Of an adapter, that of its base: with it PEFT itself is asked.
        tokenizer: directory of the tokenizer; by default looked for in the same places.
        check_all_masters: compare every element of masters and 16-bit weights, not a sample.
    """

    dtype: DTypeChoice
    weights: Copy
    config: PathLike | None
    tokenizer: PathLike | None
    check_all_masters: bool


class WritingOptions(AdapterOptions, total=False):
    """The options of every function that writes a model directory.

    Attributes:
        generation_config: ``auto``, ``olmo``, ``none``, or a file or directory.
        like: a Hugging Face directory that the output is to be like; tensors that the checkpoint
            does not hold (frozen ones that were left out) are taken from it.
        max_shard_size: bytes, or a number with a decimal unit; ``5GB`` by default.
        weights_only: write weights alone: no config, no tokenizer, names as they are.
        card: write a model card, ``README.md``; the default.
        trust_remote_code: run custom code that lies beside the config, in a process of its own, to
            learn the model's layout.
    """

    generation_config: str
    like: PathLike | None
    max_shard_size: int | str
    weights_only: bool
    card: bool
    trust_remote_code: bool


def writing_of(options: DeliveryOptions) -> Writing:
    """How an output is written, with the defaults."""
    return Writing(
        workers=options.get("workers") or default_workers(),
        dry_run=options.get("dry_run", False),
        overwrite=options.get("overwrite", False),
        progress=options.get("progress"),
        resume=options.get("resume", False),
        sha256=options.get("sha256", False),
        verify=options.get("verify", False),
        ranks=options.get("ranks"),
    )
