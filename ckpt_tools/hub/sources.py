"""Owns the options for the source of assets, and the order in which directories are searched.

The order is the same for config, tokenizer and generation config: the user's directories first, then those
near the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt_tools.errors import MissingAsset

Compat = Literal["transformers-4"]

# verl writes config and tokenizer to this folder beside the shards of each role.
_BESIDE_SHARDS = "huggingface"
_NAME_OF_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class AssetOptions:
    """The user's options, and the directories to search without them.

    Attributes:
        config: ``--config``, a config file or a directory with ``config.json``.
        tokenizer: ``--tokenizer``, a directory.
        chat_template: ``--chat-template``, a file with the chat template of the output.
        like: ``--like``, a Hugging Face directory from which every asset is taken.
        generation_config: ``--generation-config``: ``auto``, ``olmo``, ``none``, or a path.
        search: directories near the checkpoint, nearest first.
        compat: ``--compat``: an older reader that must read the directory too, or None.
        follow_links: copy files and follow tags whose links lead out of the directory that was named.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    like: Path | None = None
    generation_config: str = "auto"
    search: tuple[Path, ...] = ()
    compat: Compat | None = None
    follow_links: bool = False


def hub_hint(option: str, named: Path) -> str:
    """A sentence with the address that was meant, where a path looks like a name of the Hub; else nothing.

    Args:
        option: the option.
        named: its value.
    """
    if _NAME_OF_THE_HUB.fullmatch(str(named)) is None or named.exists():
        return ""
    return f" For a repository of the Hub, pass {option} hf://{named}."


def unique(directories: Iterable[Path]) -> tuple[Path, ...]:
    """The directories in order, without duplicates."""
    return tuple(dict.fromkeys(directories))


def nearby(options: AssetOptions) -> tuple[Path, ...]:
    """Directories to search if the user gave none: ``--like``, then those near the checkpoint.

    Raises:
        MissingAsset: ``--like`` is not a directory.
    """
    places: list[Path] = []
    if options.like is not None:
        if not options.like.is_dir():
            raise MissingAsset(
                "--like is not a directory",
                path=options.like,
                hint="Pass --like with the directory of a model."
                f"{hub_hint('--like', options.like)}",
            )
        places.append(options.like)
    for directory in options.search:
        places += [directory, directory / _BESIDE_SHARDS]
    return unique(place for place in places if place.is_dir())


def with_config_directory(options: AssetOptions, config_directory: Path) -> tuple[Path, ...]:
    """As :func:`nearby`, with the directory of the config between ``--like`` and the others.

    Raises:
        MissingAsset: ``--like`` is not a directory.
    """
    first = (options.like,) if options.like is not None else ()
    return unique((*first, config_directory, *nearby(options)))
