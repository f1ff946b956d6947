"""The parts of the documentation that are derived: from the command line, the source and the fixtures.

    python docs/generate.py

replaces what is between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->`` in each page. A test
does the same and compares, so a page cannot differ from what it describes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import error_messages

import ckpt_tools
from ckpt_tools import errors
from ckpt_tools.cli import cli
from ckpt_tools.verification import checks
from ckpt_tools.verification.other_readers import RULES, VERSIONS
from ckpt_tools.verification.problem import KINDS

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
    context = click.Context(cli, info_name="ckpt-tools", **cli.context_settings)
    known: dict[str, list[click.Option]] = {}
    parts = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        options = (p for p in command.params if isinstance(p, click.Option))
        known[name] = [option for option in options if not option.hidden]
        usage = command.collect_usage_pieces(click.Context(command, parent=context))
        parts += [f"## {name}\n", f"`ckpt-tools {name} {' '.join(usage)}`\n"]
        parts.append(_command(name, command, known[name], known.get("consolidate", [])))
    return "\n".join(parts)


def _command(
    name: str, command: click.Command, options: list[click.Option], shared: list[click.Option]
) -> str:
    parts = list(_help(command.help or ""))
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


_FRAMEWORKS = {"ai2-olmo-core": "OLMo-core", "transformers": "the Trainer of transformers"}


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
        counts[_layout(found, case, facts), str(facts.get("deepspeed_version", recorded))] += 1
    versions = sorted({v for _, v in counts}, key=lambda v: [int(part) for part in v.split(".")])
    rows = [
        (title, *(str(counts[title, version] or "") for version in versions))
        for title in sorted({title for title, _ in counts})
    ]
    return table(("", *versions), rows)


# What the title of a checkpoint does not say of its layout, by the shape or the name of its fixture.
_SHAPES = {"sequence": "Ulysses", "mics": "MiCS"}
_TRAITS = {
    "hpz": "hpZ",
    "nvme": "optimizer on NVMe",
    "offload": "optimizer on the CPU",
    "elastic": "elastic",
}


def _layout(found: ckpt_tools.Inspection, case: Path, facts: Mapping[str, object]) -> str:
    title = found.title
    if found.problems:
        title = (
            f"DeepSpeed ZeRO-{facts['stage']}, tensor parallel without a record; with `--config`"
        )
    words = case.name.split("-")
    more = [_SHAPES.get(str(facts.get("shape")), ""), *(_TRAITS.get(word, "") for word in words)]
    return ", ".join(filter(None, [title, *more]))


def others() -> str:
    """How many fixtures there are of every other kind, by what wrote them."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for case, facts in _facts():
        found = _inspected(_checkpoint(case))
        if isinstance(found, str):
            kind, answer = "adapter directory of PEFT", "an adapter: `merge-lora --adapter-dir`"
        elif found.format == "deepspeed":
            continue
        elif found.problems:
            kind, answer = "FSDP1 `LOCAL_STATE_DICT` files", "refused"
        else:
            kind, answer = found.title, "read"
        counts[kind[0].upper() + kind[1:], _writer(facts), answer] += 1
    rows = [
        (kind, writer, str(count), answer)
        for (kind, writer, answer), count in sorted(
            counts.items(), key=lambda item: (item[0][2] != "read", item[0])
        )
    ]
    return table(("what", "written by", "fixtures", "answer"), rows)


def _writer(facts: Mapping[str, object]) -> str:
    """What wrote a fixture, with versions."""
    torch = f"torch {str(facts['torch_version']).partition('+')[0]}"
    name = str(facts.get("framework") or "accelerate")
    version = facts.get("framework_version") or facts.get("accelerate_version")
    if name == "torch" or not version:
        return torch
    return f"{_FRAMEWORKS.get(name, name)} {version}, {torch}"


# -- messages ---------------------------------------------------------------------------------------


def messages() -> str:
    """Every message, by the status with which it ends a command."""
    parts = []
    for status, found in error_messages.by_status().items():
        rows = [
            (prose(fact), "<br>".join(map(prose, hints)), f"[refused](refused.md#{section})")
            for fact, hints, section in found
        ]
        parts += [f"## Exit status {status}\n", table(("message", "next step", "see"), rows)]
    return "\n".join(parts)


# -- kinds of problems ------------------------------------------------------------------------------


def kinds() -> str:
    """Every kind of problem that verify can find."""
    checks()  # they bring kinds of their own
    rows = [(f"`{kind}`", severity, meaning) for kind, (severity, meaning) in KINDS.items()]
    return table(("kind", "severity", "meaning"), rows)


# -- other readers ----------------------------------------------------------------------------------


def readers() -> str:
    """Every rule of ``verify --for``, with its source."""
    rows = [
        (VERSIONS[rule.reader], rule.of, f"`{rule.kind}`", rule.about, f"`{rule.source}`")
        for rule in RULES
    ]
    return table(("reader", "of", "kind", "what", "source"), rows)


# -- security ---------------------------------------------------------------------------------------


def security() -> str:
    """SECURITY.md, without its title."""
    return (ROOT / "SECURITY.md").read_text().partition("\n\n")[2]


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "deepspeed": deepspeed,
    "kinds": kinds,
    "messages": messages,
    "others": others,
    "readers": readers,
    "security": security,
}

if __name__ == "__main__":
    sys.exit(main())
