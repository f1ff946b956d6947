"""Every option is stated once: what type checkers, the command line and the record say is the same."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest

import ckpt_tools
from ckpt_tools.cli import cli
from ckpt_tools.conversion.request import AdapterOptions, ModelOptions, Request

FIELDS = {field.name: field for field in fields(Request)}
# Options of the command line alone: how it speaks, how long its ranks wait for each other, and the variable
# that it sets for its process; `format` is the old name of `source_format`; the page is made of the report.
SPOKEN = {
    *("timeout", "quiet", "verbose", "as_json", "debug", "help", "no_cache", "format", "attr"),
    *("report", "statistics"),
}
WRITING = ["consolidate", "extract-attr", "extract-lora", "merge-lora", "average"]


def options_of(command: str) -> dict[str, click.Option]:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    return {str(p.name): p for p in found.params if isinstance(p, click.Option)}


def default_of(name: str) -> Any:
    default = FIELDS[name].default
    return None if default is MISSING or default == () else default


@pytest.mark.parametrize("options", [AdapterOptions, ModelOptions])
def test_what_type_checkers_see_are_fields_of_the_record(options: Any) -> None:
    for name, annotation in options.__annotations__.items():
        stated = str(FIELDS[name].type)
        seen = annotation.__forward_arg__
        if name == "workers":
            assert (stated, seen) == ("int", "int | None")
        else:
            # The record holds paths that are made ready.
            assert seen.replace("PathLike", "Path") == stated.replace("PathLike", "Path"), name


@pytest.mark.parametrize("command", WRITING)
def test_an_option_of_the_command_line_has_name_and_default_of_the_record(command: str) -> None:
    options = {name: o for name, o in options_of(command).items() if name not in SPOKEN}

    assert options.keys() <= FIELDS.keys()
    for name, option in options.items():
        default = option.default
        if type(default).__name__ == "Sentinel" or default in ((), False):
            default = None
        assert default == (default_of(name) or None), name


def test_every_field_is_documented_where_it_is_stated() -> None:
    for owner in Request.__mro__[:-1]:
        documented = set(re.findall(r"^ {8}(\w+): ", owner.__doc__ or "", re.MULTILINE))
        assert documented == set(inspect.get_annotations(owner)), owner


@pytest.mark.parametrize(
    ("call", "option", "meant"),
    [
        (ckpt_tools.consolidate, "verfy", "verify"),
        (ckpt_tools.extract_lora, "overwrit", "overwrite"),
        (ckpt_tools.merge_lora, "generation_conf", "generation_config"),
        (ckpt_tools.average, "max_shards_size", "max_shard_size"),
    ],
)
def test_a_misspelt_option_is_a_type_error(
    call: Any, option: str, meant: str, tmp_path: Path
) -> None:
    source = [tmp_path, tmp_path] if call is ckpt_tools.average else tmp_path
    with pytest.raises(TypeError, match=rf"unexpected option '{option}'. Did you mean '{meant}'?"):
        call(source, tmp_path / "out", **{option: True})
    assert not (tmp_path / "out").exists()


def test_an_option_of_models_is_none_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'card'"):
        ckpt_tools.extract_lora(tmp_path, tmp_path / "out", card=False)  # type: ignore[call-arg]
