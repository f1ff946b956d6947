"""The rules of ARCHITECTURE.md that can be read off the source, and the promise of a fast start.

Each rule is a function from one module to a list of complaints. It is run over every module of the
package, and over snippets that break it, so that a rule which sees nothing fails too.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ckpt_tools"

ROW = re.compile(r"^\| `([\w.]+)/?` \|", re.MULTILINE)


def rooms_of(text: str) -> tuple[str, ...]:
    """The rooms of ARCHITECTURE.md's table, from low to high."""
    rows = ROW.findall(text.partition("\n## Rooms\n")[2].partition("\n## ")[0])
    return tuple(row.removesuffix(".py") for row in reversed(rows))


# A module imports from lower rooms and its own. The package itself (`ckpt_tools/__init__.py`) and
# `__main__` offer everything: the top.
LAYERS = (
    *((room,) for room in rooms_of((PACKAGE.parent / "ARCHITECTURE.md").read_text())),
    ("ckpt_tools", "__main__"),
)
STRANGERS = {
    "readers": {"transforms"},
    "transforms": {"readers"},
    # A check that shares code with the writer checks nothing.
    "verification": {"conversion", "writing"},
}
# The only circles: conveniences such as `Tensor.load()` ask for their module only when they are called.
CIRCLES = {
    ("ckpt_tools.storage.addresses", "ckpt_tools.storage.remote.trees"),
    ("ckpt_tools.tensors.catalogue", "ckpt_tools.tensors.gather"),
    ("ckpt_tools.tensors.catalogue", "ckpt_tools.tensors.rows"),
    ("ckpt_tools.tensors.checkpoint", "ckpt_tools.tensors.listing"),
}
VAGUE_NAMES = {"base", "common", "helper", "helpers", "misc", "util", "utils"}
HEAVY = {"accelerate", "deepspeed", "peft", "torch", "transformers"}
IMPORTERS = {"__import__", "import_module", "importlib.import_module"}
MAX_LINES = 400


# Every rule reads every module.
parsed = functools.cache(ast.parse)


class Module(NamedTuple):
    """One source file: its dotted name (a package has the name of its directory) and its text."""

    name: str
    source: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return parsed(self.source)

    @property
    def room(self) -> str:
        """The name in LAYERS that this module stands under."""
        return room_of(self.name)


def read_modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return modules


MODULES = read_modules()


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def layer_of(room: str) -> int | None:
    return next((height for height, rooms in enumerate(LAYERS) if room in rooms), None)


def imported_names(module: Module) -> Iterator[tuple[str, int]]:
    """Every name that the module imports, at any depth, as (dotted name, line).

    `from a import b` gives `a.b`, be `b` a module or something in one: the room is the same.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.name.split(".") + (["__init__"] if module.is_package else [])
                base = ".".join(here[: -node.level] + ([node.module] if node.module else []))
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
            yield from ((arg.value, node.lineno) for arg in node.args[:1] if is_text(arg))


def is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def own_imports(module: Module) -> Iterator[tuple[str, int]]:
    """Imports from this package, as (room, line).

    `import ckpt_tools` by itself is none, but what is then taken from it is; `__version__` and
    `__file__` are no rooms.
    """
    names = list(imported_names(module))
    names += [
        (dotted(node), node.lineno)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute)
    ]
    for name, line in names:
        package, _, rest = name.partition(".")
        if package == "ckpt_tools" and rest not in {"", "__version__", "__file__"}:
            room = room_of(name)
            known = layer_of(room) is not None or f"ckpt_tools.{room}" in MODULES
            yield (room if known else "ckpt_tools"), line


def called(node: ast.Call) -> str:
    """The dotted name of what is called, such as `sys.exit`; empty for anything but plain names."""
    return dotted(node.func)


def dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def calls(module: Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))


# -- the rules ---------------------------------------------------------------------------------


def has_a_layer(module: Module) -> list[str]:
    if layer_of(module.room) is not None:
        return []
    return [f"{module.name}: `{module.room}` has no place in LAYERS; give it one"]


def imports_point_down(module: Module) -> list[str]:
    height = layer_of(module.room)
    if height is None:
        return []
    problems = []
    for room, line in own_imports(module):
        other = layer_of(room)
        if other is not None and other > height:
            problems.append(f"{module.name}:{line}: {module.room} must not know {room} above it")
    return problems


def strangers_do_not_meet(module: Module) -> list[str]:
    banned = STRANGERS.get(module.room, set())
    return [
        f"{module.name}:{line}: {module.room} must not know {room}"
        for room, line in own_imports(module)
        if room in banned
    ]


def deepspeed_only_in_training(module: Module) -> list[str]:
    if module.room == "training":
        return []
    return [
        f"{module.name}:{line}: imports deepspeed"
        for name, line in imported_names(module)
        if name.split(".")[0] == "deepspeed"
    ]


def torch_distributed_only_in_ranks(module: Module) -> list[str]:
    if module.room == "ranks":
        return []
    used = [
        line for name, line in imported_names(module) if f"{name}.".startswith("torch.distributed.")
    ]
    used += [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed"
    ]
    return [f"{module.name}:{line}: uses torch.distributed" for line in used]


def only_the_command_line_prints_or_exits(module: Module) -> list[str]:
    if module.room == "cli":
        return []
    ends = {"print", "exit", "quit", "SystemExit", "sys.exit", "os._exit", "os.abort"}
    return [
        f"{module.name}:{node.lineno}: calls {called(node)}"
        for node in calls(module)
        if called(node) in ends
    ]


def runs_no_code_from_a_checkpoint(module: Module) -> list[str]:
    pickles = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    runners = {
        f"{library}.{name}"
        for library in pickles
        for name in ("load", "loads", "open", "Unpickler", "_Unpickler")
    }
    problems = []
    for name, line in imported_names(module):
        if name in runners:
            problems.append(f"{module.name}:{line}: imports {name}")
    for node in calls(module):
        name, line = called(node), node.lineno
        options = {
            keyword.arg: keyword.value.value
            for keyword in node.keywords
            if isinstance(keyword.value, ast.Constant)
        }
        # A subclass of pickle.Unpickler is how a safe reader is made; an instance of it is not. What ranks
        # of one command tell each other comes from no checkpoint.
        told = module.room == "ranks" and name == "pickle.loads"
        if (name in runners and not told) or name in {"eval", "exec"}:
            problems.append(f"{module.name}:{line}: calls {name}")
        if options.get("weights_only") is False or (
            name == "torch.load" and options.get("weights_only") is not True
        ):
            problems.append(f"{module.name}:{line}: {name} without weights_only=True")
        for option in ("trust_remote_code", "allow_pickle"):
            if options.get(option) is True:
                problems.append(f"{module.name}:{line}: {name} with {option}=True")
    return problems


def says_what_it_owns(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else [f"{module.name}: no module docstring"]


def is_read_in_one_sitting(module: Module) -> list[str]:
    count = len(module.source.splitlines())
    return [f"{module.name}: {count} lines, over {MAX_LINES}"] if count > MAX_LINES else []


def has_a_name_that_explains(module: Module) -> list[str]:
    last = module.name.rpartition(".")[2]
    return [f"{module.name}: a vague name"] if last.lstrip("_") in VAGUE_NAMES else []


Rule = Callable[[Module], list[str]]

# Each rule with modules that break it: (name, source).
BREACHES: list[tuple[Rule, str, str]] = [
    (has_a_layer, "ckpt_tools.novelty", ""),
    (imports_point_down, "ckpt_tools.tensors.dtypes", "import ckpt_tools.readers.dcp"),
    (
        imports_point_down,
        "ckpt_tools.readers.deepspeed.reader",
        "def f():\n    from ... import writing, model",
    ),
    (
        imports_point_down,
        "ckpt_tools.readers.deepspeed.reader",
        "from ...conversion.api import consolidate",
    ),
    (imports_point_down, "ckpt_tools.writing.layout", "from .. import cli"),
    (imports_point_down, "ckpt_tools.writing.bytes", "from ckpt_tools import consolidate"),
    (imports_point_down, "ckpt_tools.writing.bytes", "import ckpt_tools\nckpt_tools.consolidate()"),
    (
        imports_point_down,
        "ckpt_tools.conversion.api",
        "importlib.import_module('ckpt_tools.cli.main')",
    ),
    (
        strangers_do_not_meet,
        "ckpt_tools.readers.deepspeed.reader",
        "from ckpt_tools.transforms import cast",
    ),
    (strangers_do_not_meet, "ckpt_tools.transforms.cast", "from ckpt_tools import readers"),
    (
        strangers_do_not_meet,
        "ckpt_tools.verification",
        "if True:\n    from ckpt_tools.writing.layout import Plan",
    ),
    (
        deepspeed_only_in_training,
        "ckpt_tools.conversion.api",
        "from deepspeed.utils import zero_to_fp32",
    ),
    (torch_distributed_only_in_ranks, "ckpt_tools.writing.bytes", "from torch import distributed"),
    (
        torch_distributed_only_in_ranks,
        "ckpt_tools.writing.bytes",
        "import torch.distributed.tensor",
    ),
    (
        torch_distributed_only_in_ranks,
        "ckpt_tools.writing.bytes",
        "torch.distributed.barrier()",
    ),
    (only_the_command_line_prints_or_exits, "ckpt_tools.conversion.api", "print('done')"),
    (only_the_command_line_prints_or_exits, "ckpt_tools.conversion.api", "import sys\nsys.exit(1)"),
    (only_the_command_line_prints_or_exits, "ckpt_tools.conversion.api", "raise SystemExit(1)"),
    (runs_no_code_from_a_checkpoint, "ckpt_tools.readers.deepspeed.reader", "pickle.load(f)"),
    (
        runs_no_code_from_a_checkpoint,
        "ckpt_tools.readers.deepspeed.reader",
        "from pickle import loads",
    ),
    (
        runs_no_code_from_a_checkpoint,
        "ckpt_tools.readers.deepspeed.reader",
        "pickle.Unpickler(f)",
    ),
    (runs_no_code_from_a_checkpoint, "ckpt_tools.readers.deepspeed.reader", "torch.load(f)"),
    (
        runs_no_code_from_a_checkpoint,
        "ckpt_tools.readers.deepspeed.reader",
        "read(f, weights_only=False)",
    ),
    (runs_no_code_from_a_checkpoint, "ckpt_tools.hub", "load(d, trust_remote_code=True)"),
    (says_what_it_owns, "ckpt_tools.writing.layout", "x = 1"),
    (is_read_in_one_sitting, "ckpt_tools.writing.layout", "x = 1\n" * (MAX_LINES + 1)),
    (has_a_name_that_explains, "ckpt_tools.readers.utils", ""),
]
# What looks like a breach and is none.
ALLOWED: list[tuple[Rule, str, str]] = [
    (imports_point_down, "ckpt_tools.cli.main", "from ckpt_tools import __version__, conversion"),
    (
        imports_point_down,
        "ckpt_tools.readers.deepspeed.reader",
        "from ckpt_tools import __version__, errors",
    ),
    (imports_point_down, "ckpt_tools.writing.bytes", "import ckpt_tools\nckpt_tools.__file__"),
    (
        imports_point_down,
        "ckpt_tools.readers.deepspeed.reader",
        "from .torch_file import TorchFile",
    ),
    (deepspeed_only_in_training, "ckpt_tools.training", "def f():\n    import deepspeed"),
    (torch_distributed_only_in_ranks, "ckpt_tools.ranks", "import torch.distributed"),
    (only_the_command_line_prints_or_exits, "ckpt_tools.cli.main", "print('done')"),
    (
        runs_no_code_from_a_checkpoint,
        "ckpt_tools.readers.deepspeed.reader",
        "class R(pickle.Unpickler): pass",
    ),
    (runs_no_code_from_a_checkpoint, "ckpt_tools.hub", "torch.load(f, weights_only=True)"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BREACHES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module(rule: Rule) -> None:
    assert {"ckpt_tools", "ckpt_tools.errors"} <= MODULES.keys()
    problems = [problem for module in MODULES.values() for problem in rule(module)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(("rule", "name", "source"), BREACHES)
def test_rule_sees_a_breach(rule: Rule, name: str, source: str) -> None:
    assert rule(Module(name, source))


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED)
def test_rule_lets_pass(rule: Rule, name: str, source: str) -> None:
    assert rule(Module(name, source)) == []


def test_no_two_modules_import_each_other() -> None:
    """Below the package itself, the modules form no circle, however long."""
    below = {
        module.name: {
            target
            for name, _ in imported_names(module)
            for target in [name if name in MODULES else name.rpartition(".")[0]]
            if target in MODULES and target != "ckpt_tools" and (module.name, target) not in CIRCLES
        }
        for module in MODULES.values()
        if module.name != "ckpt_tools"
    }
    # Take away, again and again, what imports nothing that is left.
    while leaves := [name for name, targets in below.items() if not targets & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"import each other in a circle, or stand above one: {sorted(below)}"


COMMANDS = [
    [],
    ["--help"],
    ["--version"],
    ["inspect", "--help"],
    ["consolidate", "--help"],
]


@pytest.mark.parametrize(
    "arguments", COMMANDS, ids=lambda arguments: " ".join(arguments) or "import"
)
def test_starts_without_heavy_imports(arguments: list[str]) -> None:
    """Importing the command line, or asking it for help, loads neither PyTorch nor a framework."""
    program = (
        "import sys\n"
        "import ckpt_tools.cli\n"
        f"sys.argv = ['ckpt-tools', *{arguments!r}]\n"
        "try:\n"
        f"    {arguments!r} and ckpt_tools.cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('loaded:', *sorted({HEAVY!r} & sys.modules.keys()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "loaded:"
    assert not arguments or len(run.stdout.splitlines()) > 1, "the command said nothing"
