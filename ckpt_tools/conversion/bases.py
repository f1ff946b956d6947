"""Where the base of an adapter is, if the request does not name it.

Owns the directories that PEFT wrote as the checkpoint of ``merge-lora``, the base that the config of an
adapter names, and the refusal of a directory without weights. A name of the Hub is not a directory; nothing
is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ckpt_tools import readers
from ckpt_tools.conversion.request import Request
from ckpt_tools.errors import CkptError, MissingAsset, NotACheckpoint
from ckpt_tools.hub.adapter_config import find_adapter_config
from ckpt_tools.model.adapter import state_names
from ckpt_tools.model.state import model_state
from ckpt_tools.readers.containers.weight_files import ADAPTER_FILES, entry_in
from ckpt_tools.storage.addresses import PathLike, is_address
from ckpt_tools.storage.naming import as_path
from ckpt_tools.tensors.checkpoint import Checkpoint, Copy
from ckpt_tools.transforms.live_layout import lacking_modules
from ckpt_tools.transforms.lora import plain_name

_DEFAULT = "default"


def with_adapter_as_checkpoint(
    checkpoints: Sequence[PathLike | Checkpoint], request: Request
) -> tuple[list[PathLike | Checkpoint], Request]:
    """The request with the base as the checkpoint, where an adapter's directory was given as it.

    Raises:
        MissingAsset: the adapter's base is not a directory on this machine, or has no weights.
    """
    (given,) = checkpoints
    if isinstance(given, Checkpoint) or request.adapter_dir is not None or not is_adapter(given):
        return [given], request
    directory = as_path(given)
    base = request.base or named_base(request, [directory])
    if base is None:
        raise MissingAsset(
            "it holds an adapter without its base",
            path=directory,
            hint="Pass --base DIR with the directory of the base. The adapter's config names none on this "
            "machine.",
        )
    with weights_named_by("--base", base, None if request.base else "the adapter's config"):
        readers.locate(base, request.tag, model=request.model, format=request.source_format)
    return [base], replace(request, adapter_dir=directory, base=None)


def is_adapter(path: PathLike) -> bool:
    """Whether a path is a directory with an adapter's weights and no state of a training engine."""
    directory = as_path(path)
    if not directory.is_dir() or entry_in(directory, ADAPTER_FILES) is None:
        return False
    # A Trainer's checkpoint-N holds the adapter beside the state of DeepSpeed or FSDP.
    return not any(directory.glob("global_step*")) and not any(
        directory.glob("pytorch_model_fsdp*")
    )


def named_base(request: Request, search: Sequence[Path]) -> Path | None:
    """The base that the adapter's config names, if that is a directory; PEFT looks from where it runs."""
    config = find_adapter_config(
        request.adapter_config,
        search,
        request.adapter or _DEFAULT,
        alone=True,
        follow_links=request.follow_links,
    )
    text = None if config is None else config.data.get("base_model_name_or_path")
    if config is None or config.path is None or not isinstance(text, str) or not text:
        return None
    if is_address(text):
        return None
    places = (Path(text), config.path.parent / text)
    return next((place for place in places if place.is_dir()), None)


def read_like(path: Path) -> Checkpoint:
    """The model in the directory of ``--like``.

    Raises:
        MissingAsset: it is a file, or has no weights.
    """
    if path.exists() and not path.is_dir():
        raise MissingAsset(
            "--like is not a directory",
            path=path,
            hint="Pass --like with the directory of a model.",
        )
    with weights_named_by("--like", path):
        return readers.read(readers.locate(path))


@contextmanager
def weights_named_by(option: str, path: Path, by: str | None = None) -> Iterator[None]:
    """Say in the refusal of a directory without weights who named it.

    Args:
        option: the option that names such a directory.
        path: the directory.
        by: what named it, if that was not the option.

    Raises:
        MissingAsset: the directory has no weights.
    """
    try:
        yield
    except NotACheckpoint as error:
        if not path.is_dir() or is_adapter(path):
            raise
        raise MissingAsset(
            f"{by or option} names a directory without weights",
            path=path,
            hint="The directory of a whole model has model.safetensors, or shards and their index, beside "
            f"config.json. Copy the weights there, or pass {option} with another directory.",
        ) from error


def lacks_base(source: Checkpoint, copy: Copy) -> bool:
    """Whether a checkpoint holds an adapter, and not the weights that it adapts."""
    try:
        names = state_names(model_state(source, copy))
    except CkptError:  # merging says what is wrong with it
        return False
    wrapped = {
        plain_name(part.module)
        for parts in names.adapters.values()
        for part in parts
        if not part.replaces
    }
    return bool(lacking_modules(wrapped, names.plain.values()))
