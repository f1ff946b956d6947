"""What a program may import is a tested list, and says what it does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import ckpt_tools
from ckpt_tools import errors

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    "Checkpoint",
    "CheckpointInterval",
    "CkptError",
    "Difference",
    "Inspection",
    "Problem",
    "Report",
    "TensorDifference",
    "Verdict",
    "__version__",
    "average",
    "checkpoint_interval",
    "consolidate",
    "diff",
    "extract_lora",
    "get_fp32_state_dict_from_zero_checkpoint",
    "inspect",
    "merge_fsdp_weights",
    "merge_lora",
    "open_checkpoint",
    "verify",
    "watch",
]
CALLABLES = [name for name in PUBLIC if callable(getattr(ckpt_tools, name))]
FUNCTIONS = [name for name in CALLABLES if not name[0].isupper()]
ERRORS = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, errors.CkptError)
]


def test_all_is_this_list() -> None:
    assert ckpt_tools.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(ckpt_tools))
    assert len(CALLABLES) == len(PUBLIC) - 1


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ckpt_tools' has no attribute 'consolidated'"):
        ckpt_tools.consolidated  # noqa: B018


@pytest.mark.parametrize("name", CALLABLES)
def test_a_public_name_says_what_it_does(name: str) -> None:
    text = inspect.getdoc(getattr(ckpt_tools, name))

    assert text is not None
    first = text.splitlines()[0]
    assert len(first.split()) > 1
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_documents_each_argument_and_its_errors(name: str) -> None:
    function = getattr(ckpt_tools, name)
    text = inspect.getdoc(function) or ""

    assert "Raises:" in text
    for parameter in inspect.signature(function).parameters:
        if name != "inspect":  # two arguments, told in its first line and in open_checkpoint
            assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), parameter
    assert function.__annotations__.keys() == {*inspect.signature(function).parameters, "return"}


@pytest.mark.parametrize("name", [n for n in CALLABLES if n[0].isupper() and n != "CkptError"])
def test_a_public_value_documents_each_field(name: str) -> None:
    value = getattr(ckpt_tools, name)
    text = inspect.getdoc(value) or ""

    for field in value.__dataclass_fields__:
        assert re.search(rf"^[ \w,]*\b{field}\b[\w, ]*: ", text, re.MULTILINE), field


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_stands_in_the_tree_with_its_exit_status(error: type[errors.CkptError]) -> None:
    line = re.search(rf"^[ │├└─]*{error.__name__} +(\d) ", errors.__doc__ or "", re.MULTILINE)

    assert line is not None
    assert int(line[1]) == error.exit_code
    assert error.__doc__


def test_an_error_says_where_what_and_what_next() -> None:
    error = errors.DamagedCheckpoint("it is cut off", path="a/b", tensor="x.y", hint="Copy it.")

    assert str(error) == "a/b: x.y: it is cut off\nCopy it."
    assert (error.path, error.tensor, error.hint) == (Path("a/b"), "x.y", "Copy it.")
    assert str(errors.CkptError("it is cut off")) == "it is cut off"


def test_the_exit_statuses_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "exit-statuses.md").read_text()
    documented = set(re.findall(r"^\| (\d) \|", page, re.MULTILINE))

    assert documented == {"0", *(str(error.exit_code) for error in ERRORS)}


def test_the_python_page_names_what_is_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text()

    for name in FUNCTIONS:
        assert f"`{name}(" in page or f"import {name}\n" in page, name
    assert "`ckpt_tools.CkptError`" in page


def test_the_version_is_that_of_the_installed_package() -> None:
    assert ckpt_tools.__version__ == version("ckpt-tools")


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    (script,) = entry_points(group="console_scripts", name="ckpt-tools")
    from ckpt_tools.__main__ import main

    assert script.load() is main


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, ckpt_tools; dir(ckpt_tools); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert "ckpt_tools" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "click", "rich", "huggingface_hub"}
    assert [name for name in loaded if name.startswith("ckpt_tools.")] == []
