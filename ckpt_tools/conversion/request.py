"""One request: everything that a caller asked for, stated once and passed whole.

Owns the names, types and defaults of the options of every function that writes a directory. The command
line, the Python functions and :func:`ckpt_tools.training.save` all build a :class:`Request`.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import xxhash

from ckpt_tools.hub.sources import AssetOptions, Compat
from ckpt_tools.model.combining import Combination
from ckpt_tools.model.state import DTypeChoice
from ckpt_tools.storage.addresses import Address, PathLike, is_address, parsed
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.tensors.dtypes import short_name
from ckpt_tools.tensors.threads import default_workers
from ckpt_tools.writing.layout import OutputFormat
from ckpt_tools.writing.output import Progress, Writing

if TYPE_CHECKING:
    from ckpt_tools.ranks import Ranks

_PATHS = (
    *("config", "key_map", "tokenizer", "chat_template", "like"),
    *("adapter_dir", "adapter_config", "base", "scratch"),
)


@dataclass(frozen=True, kw_only=True)
class Request(AssetOptions, Writing):
    """What a caller asked for.

    Attributes:
        command: the command, as it is typed.
        output: the directory to make.
        tag: which of several checkpoints, by name.
        model: which of several models of one state, by number or name.
        source_format: name of the format, where the directory fits several.
        also: further directories with files of the same checkpoint: copies of what other machines hold.
        attribute: dotted path of the part of a composite model, and of its config.
        key_map: a JSON file with the model's names of the checkpoint's tensors.
        weights: ``master`` takes the optimizer's fp32 copy where there is one, ``model`` the 16-bit copy.
        check_all_masters: compare every element of masters and 16-bit weights, not a sample.
        coefficients: of a mean, one a checkpoint, adding up to 1; None if all are equal.
        adapter: name of the adapter; ``all`` for each, where adapters are extracted; several with their
            weights (``a=0.7,b=0.3``), where they are merged.
        combination: how several adapters become one: ``cat`` adds their updates, ``linear`` their factors.
        adapter_dir: a directory that PEFT wrote, to take the adapter from.
        adapter_config: the adapter's config, or a directory with it.
        lora_alpha: ``lora_alpha`` of the training run, where no config says it.
        base_model: what an adapter's base is called, where no config says it.
        base: a Hugging Face directory with what the checkpoint lacks of the base.
        dtype: ``auto`` gives each tensor its training dtype, ``keep`` leaves each as stored, ``fp32``,
            ``bf16`` and ``fp16`` cast every floating tensor. Torch's names and a ``torch.dtype`` are
            understood too.
        output_format: the container of the weights: ``safetensors``, or ``bin`` as ``torch.save`` writes it.
        max_shard_size: bytes, or a number with a decimal unit.
        weights_only: write weights alone: no config, no tokenizer, names as stored.
        dequantize: write quantised weights as the 16-bit weights that their quantiser makes of them.
        card: write a model card, ``README.md``.
        trust_remote_code: run custom code that lies beside the config, in a process of its own, to learn
            the model's layout.
        node_local: each machine sees only its own files of the checkpoint; the ranks pool them.
        strict: refuse checkpoints whose pickles name functions that no known framework writes.
        skip_complete: do nothing, and say so, where the same request has written the output already.
        destination: the address that the output is uploaded to; ``output`` is on this machine.
        scratch: the folder in which an output is made that is uploaded; the system's own by default.
        push_to_hub: the repository of the Hub, ``ORG/REPO``, to which the output is uploaded too.
        revision: the branch of that repository; ``main`` by default.
        private: a repository of the Hub that does not exist is made private.
        names_base: an adapter without the name of its base is refused; PEFT itself writes it.
    """

    command: str
    output: Path
    tag: str | None = None
    model: int | str | None = None
    source_format: str | None = None
    also: Sequence[PathLike] = ()
    attribute: str | None = None
    key_map: Path | None = None
    weights: Copy = "master"
    check_all_masters: bool = False
    coefficients: Sequence[float] | None = None
    adapter: str | None = None
    combination: Combination = "cat"
    adapter_dir: Path | None = None
    adapter_config: Path | None = None
    lora_alpha: float | None = None
    base_model: str | None = None
    base: Path | None = None
    dtype: DTypeChoice = "auto"
    output_format: OutputFormat = "safetensors"
    max_shard_size: int | str = "5GB"
    weights_only: bool = False
    dequantize: bool = False
    card: bool = True
    trust_remote_code: bool = False
    node_local: bool = False
    strict: bool = False
    skip_complete: bool = False
    names_base: bool = True
    destination: Address | None = None
    scratch: Path | None = None
    push_to_hub: str | None = None
    revision: str | None = None
    private: bool = False

    @property
    def named_inputs(self) -> list[Path]:
        """Paths that were named beside the checkpoints: they are read, so they must not be replaced."""
        named = (
            self.config,
            self.key_map,
            self.tokenizer,
            self.chat_template,
            self.like,
            self.adapter_dir,
            self.adapter_config,
        )
        return [path for path in named if path is not None]


class ConversionOptions(TypedDict, total=False):
    """The options of every function that converts: fields of :class:`Request`, for type checkers."""

    model: int | str | None
    source_format: str | None
    weights: Copy
    check_all_masters: bool
    dtype: DTypeChoice
    output_format: OutputFormat
    config: PathLike | None
    tokenizer: PathLike | None
    chat_template: PathLike | None
    compat: Compat | None
    workers: int | None
    overwrite: bool
    marker: str | None
    progress: Progress | None
    sha256: bool
    verify: bool
    check_source: bool
    follow_links: bool
    strict: bool


class AdapterOptions(ConversionOptions, total=False):
    """The options of :func:`ckpt_tools.extract_lora`: also those of one call about one checkpoint."""

    tag: str | None
    also: Sequence[PathLike]
    dry_run: bool
    skip_complete: bool
    resume: bool
    ranks: Ranks | None
    node_local: bool
    scratch: PathLike | None
    push_to_hub: str | None
    revision: str | None
    private: bool


class _OfModels(TypedDict, total=False):
    """The options of whole models."""

    key_map: PathLike | None
    generation_config: str
    like: PathLike | None
    max_shard_size: int | str
    weights_only: bool
    dequantize: bool
    card: bool
    trust_remote_code: bool


class ModelOptions(AdapterOptions, _OfModels, total=False):
    """The options of every function that writes a model directory."""


class WatchOptions(ConversionOptions, _OfModels, total=False):
    """The options of :func:`ckpt_tools.watch`."""


def requested(
    command: str,
    output: PathLike,
    accepted: type[ConversionOptions],
    options: Mapping[str, Any],
    **named: Any,
) -> Request:
    """The request of one call.

    Args:
        command: the command, as it is typed.
        output: the directory to make.
        accepted: the options that the function takes.
        options: those that were passed.
        named: what the function declares itself.

    Raises:
        TypeError: an option has a name that the function does not take.
    """
    names = accepted.__annotations__
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            meant = f". Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{command} got an unexpected option {name!r}{meant}")
    values = {**options, **named}
    for name in _PATHS:
        if values.get(name) is not None:
            values[name] = as_path(values[name])
    if "dtype" in values:
        values["dtype"] = short_name(values["dtype"])
    values["workers"] = values.get("workers") or default_workers()
    if is_address(output):
        values["destination"] = parsed(str(output))
        output = staged(values["destination"], values.get("scratch"))
    return Request(command=command, output=Path(output), **values)


def staged(address: Address, scratch: Path | None) -> Path:
    """The directory on this machine that is made before it is uploaded; the same in every run."""
    digest = xxhash.xxh3_64_hexdigest(str(address).encode())
    return (scratch or Path(tempfile.gettempdir())) / f"ckpt-tools-upload-{digest}" / "output"


def paths_of(checkpoints: Sequence[PathLike | Checkpoint]) -> list[Path]:
    """The paths among checkpoints that may be open already."""
    return [as_path(each) for each in checkpoints if not isinstance(each, Checkpoint)]
