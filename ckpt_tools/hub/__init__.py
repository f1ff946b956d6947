"""Owns every file of the output directory that does not hold tensors.

These are config, generation config, tokenizer, chat template, processor files and the custom code of the
source. The caller gets a list of files with their content; nothing is written here. Every number comes from
the source or from the tensors, and no code of the source is run. torch is never imported, transformers only
for vocabularies that have no other reader.

    config = find_config(options)                       # stops the run early when there is none
    assets = collect(options, config, tensors, dtype=BFLOAT16, untied=False)
    for file in assets.files: ...                       # file.name, and file.content or file.source
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import UsageError
from ckpt_tools.hub import transformers_4
from ckpt_tools.hub.companions import companion_files, left_behind
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
from ckpt_tools.hub.tokenizer import (
    Tokenizer,
    find_tokenizer,
    is_processor,
    processor_files,
    with_template,
)
from ckpt_tools.tensors.dtypes import DType

__all__ = ["AssetFile", "AssetOptions", "Assets", "ConfigSource", "collect", "find_config"]


@dataclass(frozen=True)
class Assets:
    """The files that go beside the tensors.

    Attributes:
        files: every file, each name once.
        config: the content of the output's ``config.json``.
        notes: what was changed or decided, one sentence each, for the report.
        warnings: what the user should check, one sentence each.
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
        options: the user's options, and where to look.
        config: the model config, from :func:`find_config`.
        tensors: name to dtype and shape of every output tensor.
        dtype: dtype of the output as a whole, for ``config.json``.
        untied: whether tied names hold different values and both were written.

    Raises:
        MissingAsset: a file, class or token that the output needs is missing.
        UsageError: a token id is not a row of the embedding, or two sources have different contents for
            one file.
        DamagedCheckpoint: a JSON or Python file of the source is damaged.
        UnsupportedLayout: transformers 4 cannot read the model, and ``--compat`` asks for it.
    """
    finished = finish(config, tensors, dtype=dtype, untied=untied)
    notes, warnings = list(finished.notes), list(finished.warnings)
    home = config.path.parent
    places = with_config_directory(options, home)
    rows = embedding_rows(tensors)

    tokenizer = with_template(find_tokenizer(options.tokenizer, places), options.chat_template)
    beside = tokenizer.files if tokenizer is not None else ()
    if not any(is_processor(file.name) for file in beside):
        beside += processor_files(places)
    beside += companion_files(places)
    _report_tokenizer(tokenizer, rows, notes, warnings)

    model = Model(finished.data, config.path, tokenizer, rows, places)
    generation = choose(options.generation_config, model)

    auto_map = finished.data.get("auto_map")
    code = code_files(auto_map, home, hint="Pass --config DIR, a directory that holds it.")
    for repository in hub_repositories(auto_map):
        warnings.append(
            f"config.json uses code of the Hub repository {repository}, which was not copied"
        )

    made = (generation.file,) if generation.file is not None else ()
    files = _each_once((*made, *beside, *code))
    written = finished.data
    if options.compat == transformers_4.NAME:
        written, files, changes = transformers_4.for_transformers_4(written, config.path, files)
        notes += changes
    files = _each_once((AssetFile(CONFIG_NAME, content=json_bytes(written)), *files))
    homes = [home, *([] if tokenizer is None else [tokenizer.directory])]
    return Assets(
        files=files,
        config=written,
        notes=(*notes, *generation.notes, *left_behind(homes, files)),
        warnings=(*warnings, *generation.warnings),
    )


def _report_tokenizer(
    tokenizer: Tokenizer | None, rows: int | None, notes: list[str], warnings: list[str]
) -> None:
    if tokenizer is None:
        warnings.append("no tokenizer was found, so none was written; pass --tokenizer DIR")
        return
    notes.append(f"tokenizer copied from {tokenizer.directory}")
    if tokenizer.template is not None:
        notes.append(
            f"chat template copied from {tokenizer.template}; the tokenizer's own is left out"
        )
    count = tokenizer.id_count
    if rows is not None and count is not None and count > rows:
        warnings.append(
            f"the tokenizer in {tokenizer.directory} has ids up to {count - 1}, but the embedding"
            f" has {rows} rows; pass the tokenizer of the training run: --tokenizer DIR"
        )


def _each_once(files: Iterable[AssetFile]) -> tuple[AssetFile, ...]:
    """The files in order of name, without duplicates of equal content.

    Raises:
        UsageError: two files with one name differ.
    """
    chosen: dict[str, AssetFile] = {}
    for file in files:
        other = chosen.setdefault(file.name, file)
        if other != file and other.read() != file.read():
            raise UsageError(
                f"the directories of config and tokenizer have different files named {file.name}",
                path=file.source,
                hint="Pass one directory to both --config and --tokenizer, or directories that agree.",
            )
    return tuple(chosen[name] for name in sorted(chosen))
