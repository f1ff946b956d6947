"""Every message of ckpt-tools, read off its source: where an error is made, which texts it can have.

What is only known at run time is an ellipsis in a text.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools import errors

ROOT = Path(__file__).resolve().parent.parent

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

    def __init__(self, modules: Mapping[str, ast.Module]) -> None:
        self.classes = {
            name: error
            for name, error in vars(errors).items()
            if isinstance(error, type) and issubclass(error, errors.CkptError)
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

    @classmethod
    def of_the_package(cls) -> Source:
        """The package as it is."""
        paths = sorted((ROOT / "ckpt_tools").rglob("*.py"))
        names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
        return cls({name: ast.parse(path.read_text()) for path, name in names.items()})

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
            case ast.BoolOp(ast.Or(), values):
                return [
                    text for value in values for text in self.texts(value, scope, depth + 1) if text
                ]
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


# Which section of refused.md explains a message: the first whose words are in the fact or in the next step.
# A message with none of these words is explained by the section of its exit status.
_SECTIONS: Mapping[int, tuple[tuple[str, str], ...]] = {
    1: (("", "exit-status-1-anything-else"),),
    2: (
        (r"adapter|lora|merging|square", "adapters"),
        (
            r"tokenizer|token id|embedding|generation.config|vocabulary",
            "tokenizer-and-generation-config",
        ),
        (r"quantiser", "quantised-weights"),
        (r"16-bit", "16-bit-weights"),
        (
            r"--also|another save|nor of a directory in it|further folder",
            "folders-of-several-machines",
        ),
        (r"begun|another run|begin anew", "the-output"),
        (
            r"tag|checkpoints lie here|no model|no format|names none|there is no",
            "several-checkpoints",
        ),
        (r"attribute", "composite-models"),
        (r"config|architectures|--like", "the-config"),
        (r"exists|output|input|link|appeared", "the-output"),
        (r"size|duration|coefficient|mean|number|tolerance|--\w", "values-of-options"),
        ("", "exit-status-2-the-command-as-typed"),
    ),
    3: (("", "exit-status-3-no-checkpoint"),),
    4: (
        (r"run its code|running its code|Nothing of it was run", "code-in-a-pickle"),
        (r"exclude_frozen", "frozen-weights-that-are-not-there"),
        (r"it names …,", "the-file-latest"),
        (r"of its … storage", "quantised-weights-that-are-damaged"),
        (r"adapter|LoRA|base", "adapters-that-are-damaged"),
        (r"JSON|auto_map|Python|token", "files-of-the-base-model"),
        (r"missing|--also|gone|no .*_states", "missing-files"),
        (r"save|differ|another|stale|disagree|other", "several-saves"),
        ("", "truncated-or-changed-files"),
    ),
    5: (("", "exit-status-5-a-layout-that-is-not-read"),),
    6: (("", "exit-status-6-the-output"),),
    7: (("", "exit-status-7-verification"),),
    8: (("", "exit-status-8-another-rank"),),
    9: (("", "exit-status-9-a-store"),),
}


def by_status() -> dict[int, list[tuple[str, list[str], str]]]:
    """Of each exit status the messages: fact, hints, and the section of refused.md that explains it."""
    found: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for error, fact, hint in Source.of_the_package().errors():
        found[error.exit_code][" ".join(fact.split())].add(" ".join(hint.split()))
    return {
        status: [
            (fact, sorted(filter(None, hints)), _section(status, fact, hints))
            for fact, hints in sorted(facts.items(), key=lambda item: _sorted_by(item[0]))
        ]
        for status, facts in sorted(found.items())
    }


def _section(status: int, fact: str, hints: set[str]) -> str:
    text = " ".join([fact, *sorted(hints)])
    return next(anchor for words, anchor in _SECTIONS[status] if re.search(words, text))


def _sorted_by(fact: str) -> str:
    return re.sub(r"^\W+", "", fact).lower()
