"""The parts of the documentation that are derived: from the command line, the source and the fixtures.

    python docs/generate.py

replaces what is between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->`` in each page. A test does
the same and compares, so a page cannot differ from what it describes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

import ckpt_tools
from ckpt_tools import errors
from ckpt_tools.cli import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FIXTURES = ROOT / "fixtures"

_REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Each page that has a derived part, as it should be."""
    found = {}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        if _REGION.search(text):
            found[path] = _REGION.sub(lambda m: f"{m[1]}\n{PARTS[m[2]]()}\n{m[3]}", text)
    return found


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def prose(text: str) -> str:
    """Text for a cell or a paragraph: nothing in it is markup."""
    text = " ".join(text.split())
    return re.sub(r"([|<>*_\\\[\]])", r"\\\1", text)


# -- commands and options ---------------------------------------------------------------------------


def commands() -> str:
    """Every command, as it explains itself."""
    context = click.Context(cli, info_name="ckpt-tools")
    known: dict[str, list[click.Option]] = {}
    parts = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        known[name] = [p for p in command.params if isinstance(p, click.Option)]
        parts.append(_command(name, command, known[name], known.get("consolidate", [])))
    return "\n".join(parts)


def _command(
    name: str, command: click.Command, options: list[click.Option], shared: list[click.Option]
) -> str:
    usage = " ".join(command.collect_usage_pieces(click.Context(command)))
    parts = [f"## {name}\n", f"`ckpt-tools {name} {usage}`\n", *_help(command.help or "")]
    if name != "consolidate" and len({_key(o) for o in options} & {_key(o) for o in shared}) > 9:
        own = [o for o in options if _key(o) not in {_key(s) for s in shared}]
        lacking = [o for o in shared if o.name not in {option.name for option in options}]
        less = " and ".join(f"`{o.opts[0]}`" for o in lacking[-2:])
        less = ", ".join([*(f"`{o.opts[0]}`" for o in lacking[:-2]), less]) if lacking else ""
        parts.append(
            f"It has all options of [consolidate](#consolidate){f' except {less}' if less else ''}"
            f"{', and these:' if own else '.'}\n"
        )
        options = own
    if options:
        parts.append(table(("option", "meaning", "default"), [_option(o) for o in options]))
    return "\n".join(parts)


def _key(option: click.Option) -> tuple[str, str]:
    return option.opts[0], option.help or ""


def _option(option: click.Option) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in reversed(option.opts))
    value = option.metavar
    if value is None and isinstance(option.type, click.Choice):
        value = "|".join(map(str, option.type.choices))
    if value is None and not option.is_flag:
        value = option.type.name.upper()
    if value and not option.is_flag:
        names = names[:-1] + " " + value.replace("|", r"\|") + "`"
    default = str(option.default) if option.show_default else ""
    text = prose(option.help or "The largest size of one output file.")
    if option.required:
        text += " Required."
    if option.multiple and "repeat" not in text:
        text += " Repeatable."
    return names, text, f"`{default}`" if default else ""


def _help(text: str) -> Iterator[str]:
    """The paragraphs of a help text. What stands in lines of its own there is a list or examples."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b"):
            yield prose(paragraph).replace("\\`", "`") + "\n"
            continue
        title, *lines = paragraph.removeprefix("\b").strip().splitlines()
        yield title + "\n"
        if "ckpt-tools" in lines[0]:
            body = "".join(f"$ {line.strip()}\n" for line in lines)
            yield f"<!-- not run: the paths are examples -->\n```console\n{body}```\n"
        else:
            rows = [tuple(map(prose, line.strip().split("  ", 1))) for line in lines]
            yield table(("status", "meaning"), rows)


# -- formats and versions ---------------------------------------------------------------------------


def _facts() -> Iterator[tuple[Path, Mapping[str, object]]]:
    for path in sorted(FIXTURES.glob("*/*/facts.json")):
        yield path.parent, json.loads(path.read_text())


def _checkpoint(case: Path) -> Path:
    return next(iter(sorted(case.glob("checkpoint*"))))


def _inspected(path: Path) -> ckpt_tools.Inspection | str:
    """What a shipped checkpoint is; of several the last one; or why it is refused."""
    try:
        return ckpt_tools.inspect(path)
    except errors.AmbiguousCheckpoint as several:
        return ckpt_tools.inspect(path, tag=several.choices[-1])
    except errors.CkptError as error:
        return error.fact


def deepspeed() -> str:
    """How many fixtures there are of each kind of DeepSpeed checkpoint and each version."""
    counts: Counter[tuple[str, str]] = Counter()
    for case, facts in _facts():
        found = _inspected(_checkpoint(case))
        if isinstance(found, str) or found.format != "deepspeed":
            continue
        recorded = str(found.framework).removeprefix("deepspeed").strip()
        counts[found.title, str(facts.get("deepspeed_version", recorded))] += 1
    versions = sorted({v for _, v in counts}, key=lambda v: [int(part) for part in v.split(".")])
    rows = [
        (title, *(str(counts[title, version] or "") for version in versions))
        for title in sorted({title for title, _ in counts})
    ]
    return table(("", *versions), rows)


def others() -> str:
    """How many fixtures there are of every other kind, by what wrote them."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for case, facts in _facts():
        found = _inspected(_checkpoint(case))
        if not isinstance(found, str) and found.format == "deepspeed":
            continue
        torch = f"torch {str(facts['torch_version']).partition('+')[0]}"
        name = str(facts.get("framework") or "accelerate")
        version = facts.get("framework_version") or facts.get("accelerate_version")
        writer = f"{name} {version}, {torch}" if name != "torch" and version else torch
        if isinstance(found, str):
            counts[found, writer, "refused"] += 1
        elif found.problems:
            counts["FSDP1 `LOCAL_STATE_DICT` files", writer, "refused"] += 1
        else:
            counts[found.title, writer, "read"] += 1
    rows = [
        (title[0].upper() + title[1:], writer, str(count), answer)
        for (title, writer, answer), count in sorted(
            counts.items(), key=lambda item: (item[0][2], item[0])
        )
    ]
    return table(("what", "written by", "fixtures", "answer"), rows)


# -- messages ---------------------------------------------------------------------------------------

_UNKNOWN = "…"
_DEPTH = 5


@dataclass(frozen=True)
class Scope:
    """Where a text is built: a module, and a function of it."""

    module: str
    function: ast.FunctionDef | None = None

    @property
    def parameters(self) -> list[str]:
        """The names of the function's parameters."""
        if self.function is None:
            return []
        held = self.function.args
        names = [a.arg for a in (*held.posonlyargs, *held.args, *held.kwonlyargs)]
        return names[1:] if names[:1] == ["self"] else names


class Source:
    """The source of the package, as far as texts of errors are built in it."""

    def __init__(self) -> None:
        self.classes = {
            name: error
            for name, error in vars(errors).items()
            if isinstance(error, type) and issubclass(error, errors.CkptError)
        }
        modules = {
            ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
            for path in sorted((ROOT / "ckpt_tools").rglob("*.py"))
        }
        self.constants: dict[str, dict[str, ast.expr]] = {}
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = defaultdict(list)
        for name, module in modules.items():
            self.constants[name] = {
                target.id: node.value
                for node in module.body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
        for name, module in modules.items():
            for node in module.body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    known = self.constants.get(node.module, {})
                    known = known or self.constants.get(f"{node.module}.__init__", {})
                    for alias in node.names:
                        if alias.name in known:
                            self.constants[name][alias.asname or alias.name] = known[alias.name]
            for scope, node in _walk(name, module):
                if isinstance(node, ast.Call) and (called := _called(node)):
                    self.calls[called].append((node, scope))

    def errors(self) -> Iterator[tuple[type[errors.CkptError], str, str]]:
        """Class, fact and hint of every error that is made."""
        for name, error in self.classes.items():
            for call, scope in self.calls[name]:
                if not call.args:
                    continue
                hint = next((k.value for k in call.keywords if k.arg == "hint"), None)
                hints = self.texts(hint, scope) if hint is not None else [""]
                for fact, next_step in itertools.product(self.texts(call.args[0], scope), hints):
                    if fact.strip(f" {_UNKNOWN}:'()"):
                        yield error, fact, next_step if next_step != _UNKNOWN else ""

    def texts(self, node: ast.expr, scope: Scope, depth: int = 0) -> list[str]:
        """What a string in the source may say; what is only known at run time is an ellipsis."""
        if depth > _DEPTH:
            return [_UNKNOWN]
        match node:
            case ast.Constant(str(text)):
                return [text]
            case ast.Constant(None):
                return [""]
            case ast.JoinedStr(values):
                parts = [self._inserted(value, scope, depth) for value in values]
                return ["".join(chosen) for chosen in itertools.product(*parts)]
            case ast.BinOp(left, ast.Add(), right):
                halves = (self.texts(half, scope, depth + 1) for half in (left, right))
                return ["".join(chosen) for chosen in itertools.product(*halves)]
            case ast.IfExp(_, body, orelse):
                return [*self.texts(body, scope, depth + 1), *self.texts(orelse, scope, depth + 1)]
            case ast.Name(name):
                return self._named(name, scope, depth) or self._passed(name, scope, depth)
        return [_UNKNOWN]

    def _inserted(self, value: ast.expr, scope: Scope, depth: int) -> list[str]:
        """What stands in a place of an f-string."""
        if not isinstance(value, ast.FormattedValue):
            return self.texts(value, scope, depth + 1)
        match value.value:
            case ast.Name(name):
                return self._named(name, scope, depth) or [_UNKNOWN]
            case ast.IfExp() as choice:
                return self.texts(choice, scope, depth + 1)
        return [_UNKNOWN]

    def _named(self, name: str, scope: Scope, depth: int) -> list[str]:
        """What a variable of the function or a constant of the module holds."""
        assigned = [
            node.value
            for node in ast.walk(scope.function or ast.Module([], []))
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        ]
        if not assigned and name not in scope.parameters and name in self.constants[scope.module]:
            assigned = [self.constants[scope.module][name]]
        return [text for value in assigned for text in self.texts(value, scope, depth + 1)]

    def _passed(self, name: str, scope: Scope, depth: int) -> list[str]:
        """What the callers of a function pass as one of its parameters."""
        found: list[str] = []
        if scope.function is None or name not in scope.parameters:
            return [_UNKNOWN]
        for call, caller in self.calls[scope.function.name]:
            given = next((k.value for k in call.keywords if k.arg == name), None)
            place = scope.parameters.index(name)
            if given is None and place < len(call.args):
                given = call.args[place]
            if given is not None and caller.module == scope.module:
                found.extend(self.texts(given, caller, depth + 1))
        return found or [_UNKNOWN]


def _walk(module: str, tree: ast.Module) -> Iterator[tuple[Scope, ast.AST]]:
    """Each node with the innermost function that holds it."""
    queue: list[tuple[Scope, ast.AST]] = [(Scope(module), tree)]
    while queue:
        scope, node = queue.pop()
        yield scope, node
        inner = Scope(module, node) if isinstance(node, ast.FunctionDef) else scope
        queue.extend((inner, child) for child in ast.iter_child_nodes(node))


def _called(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else None


def messages() -> str:
    """Every message, by the status with which it ends a command."""
    found: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for error, fact, hint in Source().errors():
        found[error.exit_code][" ".join(fact.split())].add(" ".join(hint.split()))
    parts = []
    for status, facts in sorted(found.items()):
        rows = [
            (prose(fact), "<br>".join(prose(hint) for hint in sorted(hints) if hint))
            for fact, hints in sorted(facts.items(), key=lambda item: _sorted_by(item[0]))
        ]
        parts += [f"## Exit status {status}\n", table(("message", "next step"), rows)]
    return "\n".join(parts)


def _sorted_by(fact: str) -> str:
    return re.sub(r"^\W+", "", fact).lower()


# -- security ---------------------------------------------------------------------------------------


def security() -> str:
    """SECURITY.md, without its title."""
    return (ROOT / "SECURITY.md").read_text().partition("\n\n")[2]


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "deepspeed": deepspeed,
    "messages": messages,
    "others": others,
    "security": security,
}

if __name__ == "__main__":
    sys.exit(main())
