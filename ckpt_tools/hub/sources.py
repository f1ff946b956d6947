"""Where assets may come from: what the user named, then the directories near the checkpoint.

Owns the options and the order of places, so that config, tokenizer and generation config agree on
it. It must not know which files make a config or a tokenizer; it only lists directories.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import MissingAsset

# verl keeps config and tokenizer in this folder beside the shards of each role.
_BESIDE_SHARDS = "huggingface"


@dataclass(frozen=True)
class AssetOptions:
    """What the user asked for, and where to look when they did not say.

    Attributes:
        config: ``--config``, a config file or a directory with ``config.json``.
        tokenizer: ``--tokenizer``, a directory.
        like: ``--like``, a Hugging Face directory to take everything from.
        generation_config: ``--generation-config``: ``auto``, ``olmo``, ``none``, or a path.
        search: directories near the checkpoint, nearest first.
        follow_links: copy files and follow tags whose links lead out of the directory that was named.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    like: Path | None = None
    generation_config: str = "auto"
    search: tuple[Path, ...] = ()
    follow_links: bool = False


def unique(directories: Iterable[Path]) -> tuple[Path, ...]:
    """The directories in order, each once."""
    return tuple(dict.fromkeys(directories))


def nearby(options: AssetOptions) -> tuple[Path, ...]:
    """Directories to look in when the user named none: ``--like``, then near the checkpoint.

    Raises:
        MissingAsset: ``--like`` is not a directory.
    """
    places: list[Path] = []
    if options.like is not None:
        if not options.like.is_dir():
            raise MissingAsset(
                "is not a directory",
                path=options.like,
                hint="pass --like the directory of a model on this machine (not a Hub name)",
            )
        places.append(options.like)
    for directory in options.search:
        places += [directory, directory / _BESIDE_SHARDS]
    return unique(place for place in places if place.is_dir())


def with_config_directory(options: AssetOptions, config_directory: Path) -> tuple[Path, ...]:
    """Like :func:`nearby`, with the directory of the config between ``--like`` and the checkpoint.

    Raises:
        MissingAsset: ``--like`` is not a directory.
    """
    first = (options.like,) if options.like is not None else ()
    return unique((*first, config_directory, *nearby(options)))
