"""Every file of the output directory that is not tensors.

Owns config, generation config, tokenizer, chat template, processor files and the custom code of the
source: which there are, and which bytes they hold. It must not know how tensors are read or
written, and writes nothing itself: the caller gets a list of files. No number is invented, no code
of the source is run, torch is never imported, and transformers only for vocabularies that nothing
else reads.

    config = find_config(options)                       # stops the run early when there is none
    assets = collect(options, config, tensors, dtype=BFLOAT16, untied=False)
    for file in assets.files: ...                       # file.name, and file.content or file.source
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import UsageError
from ckpt_tools.hub.config import (
    CONFIG_NAME,
    ConfigSource,
    Shapes,
    embedding_rows,
    find_config,
    finish,
)
from ckpt_tools.hub.custom_code import code_files, hub_repositories
from ckpt_tools.hub.files import AssetFile, json_bytes
from ckpt_tools.hub.generation import Model, choose
from ckpt_tools.hub.sources import AssetOptions, with_config_directory
from ckpt_tools.hub.tokenizer import Tokenizer, find_tokenizer, processor_files
from ckpt_tools.tensors.dtypes import DType

__all__ = ["AssetFile", "AssetOptions", "Assets", "ConfigSource", "collect", "find_config"]


@dataclass(frozen=True)
class Assets:
    """What goes beside the tensors.

    Attributes:
        files: every file, each name once.
        config: the content of the output's ``config.json``.
        notes: what was changed or decided, one sentence each, for the report.
        warnings: what the user should look at, one sentence each.
    """

    files: tuple[AssetFile, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def collect(
    options: AssetOptions, config: ConfigSource, tensors: Shapes, *, dtype: DType, untied: bool
) -> Assets:
    """The files that belong beside the tensors.

    Args:
        options: what the user asked for, and where to look.
        config: the model config, from :func:`find_config`.
        tensors: name to dtype and shape of every output tensor.
        dtype: dtype of the output as a whole, for ``config.json``.
        untied: whether tied names hold different values and both were written.

    Raises:
        MissingAsset: a file, class or token that the output needs is not there.
        UsageError: a token id is no row of the embedding, or two sources give one file different
            contents.
        DamagedCheckpoint: a JSON or Python file of the source is damaged.
    """
    finished = finish(config, tensors, dtype=dtype, untied=untied)
    notes, warnings = list(finished.notes), list(finished.warnings)
    home = config.path.parent
    places = with_config_directory(options, home)
    rows = embedding_rows(tensors)

    tokenizer = find_tokenizer(options.tokenizer, places)
    beside = tokenizer.files if tokenizer is not None else processor_files(places)
    _report_tokenizer(tokenizer, rows, notes, warnings)

    model = Model(finished.data, config.path, tokenizer, rows, places)
    generation = choose(options.generation_config, model)

    auto_map = finished.data.get("auto_map")
    code = code_files(auto_map, home, hint="pass --config DIR, a directory that holds it")
    for repository in hub_repositories(auto_map):
        warnings.append(
            f"config.json uses code of the Hub repository {repository}; none was copied"
        )

    finished_config = AssetFile(CONFIG_NAME, content=json_bytes(finished.data))
    made = (generation.file,) if generation.file is not None else ()
    return Assets(
        files=_each_once((finished_config, *made, *beside, *code)),
        config=finished.data,
        notes=(*notes, *generation.notes),
        warnings=(*warnings, *generation.warnings),
    )


def _report_tokenizer(
    tokenizer: Tokenizer | None, rows: int | None, notes: list[str], warnings: list[str]
) -> None:
    if tokenizer is None:
        warnings.append("no tokenizer was found, and none was written; pass --tokenizer DIR")
        return
    notes.append(f"tokenizer copied from {tokenizer.directory}")
    count = tokenizer.id_count
    if rows is not None and count is not None and count > rows:
        warnings.append(
            f"the tokenizer in {tokenizer.directory} has ids up to {count - 1}, but the embedding"
            f" has {rows} rows; pass --tokenizer DIR, the tokenizer that the model was trained with"
        )


def _each_once(files: Iterable[AssetFile]) -> tuple[AssetFile, ...]:
    """The files with duplicates of equal content dropped, in order of name.

    Raises:
        UsageError: two files of one name differ.
    """
    chosen: dict[str, AssetFile] = {}
    for file in files:
        other = chosen.setdefault(file.name, file)
        if other != file and other.read() != file.read():
            raise UsageError(
                f"config and tokenizer bring different files named {file.name}",
                path=file.source,
                hint="pass --config and --tokenizer directories that agree, such as one directory",
            )
    return tuple(chosen[name] for name in sorted(chosen))
