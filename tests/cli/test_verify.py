"""``ckpt-tools verify`` as it is typed: its exit status, and its report in every format."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ckpt_tools.errors import DamagedCheckpoint, UsageError
from ckpt_tools.verification.problem import KINDS, Findings, Problem, Verdict, ordered
from tests.cli.test_consolidate import CHAT, run, run_program
from tests.cli.test_help import README, options

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "verify.md").read_text()
SCHEMA = json.loads((ROOT / "docs" / "verify.schema.json").read_text())

# A name from a checkpoint that would do harm in a log, a terminal, XML, or the log of a workflow.
HOSTILE = "w\n::error::x\x1b[31m\x00<&\"]]>%0A\u202e\udcff,:'"

Answer = Verdict | Exception | dict[str, Any]


def verdict(directory: Path, *problems: Problem, skipped: tuple[str, ...] = ()) -> Verdict:
    checked = ("2 files listed", "tokenizer")
    return Verdict(directory, ordered(problems), checked, skipped, 25, 55_776, 1.25)


def problem(kind: str, detail: str = "it is bad", **where: Any) -> Problem:
    findings = Findings()
    findings.add(kind, detail, **where)
    return findings.problems[0]


ERROR = problem(
    "nan", "3 elements", file="model.safetensors", tensor="a.weight", hint="Train anew."
)
WARNING = problem("dtype-mixed", "float32 and bfloat16", file="config.json")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What is found in a directory of a name, in the place of looking."""
    held: dict[str, Answer] = {}

    def verify(directory: Path, **asked: Any) -> Answer:
        answer = held[directory.name]
        held["asked"] = asked
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(sys.modules["ckpt_tools.verification"], "verify", verify)
    return held


@pytest.fixture
def three(answers: dict[str, Answer]) -> dict[str, Answer]:
    """A clean directory, one with a warning, and one with an error."""
    answers["good"] = verdict(Path("good"), skipped=("data (--read-data)",))
    answers["fair"] = verdict(Path("fair"), WARNING)
    answers["bad"] = verdict(Path("bad"), WARNING, ERROR)
    answers["gone"] = UsageError("there is no such directory", path=Path("gone"), hint="Name it.")
    answers["crash"] = ZeroDivisionError("division by zero")
    return answers


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that ``consolidate`` makes of the shipped chat checkpoint."""
    out = tmp_path_factory.mktemp("consolidated") / "out"
    done = run(
        "consolidate", CHAT / "checkpoint", out, "--config", CHAT / "hf", "--tokenizer", CHAT / "hf"
    )
    assert done.exit_code == 0, done.output
    return out


class TestExitStatus:
    @pytest.mark.parametrize(
        ("directories", "status", "strict"),
        [
            (["good"], 0, 0),
            (["fair"], 0, 1),
            (["bad"], 1, 1),
            (["good", "bad", "good"], 1, 1),
            (["gone"], 2, 2),
            (["gone", "bad"], 2, 2),
            (["crash", "good"], 2, 2),
        ],
    )
    @pytest.mark.parametrize("form", ["text", "json", "junit", "github"])
    def test_it_is_the_worst_of_all(
        self,
        directories: list[str],
        status: int,
        strict: int,
        form: str,
        three: dict[str, Answer],
    ) -> None:
        assert run("verify", *directories, "--format", form).exit_code == status
        assert run("verify", *directories, "--format", form, "--strict").exit_code == strict

    def test_wrong_usage_is_2(self, three: dict[str, Answer]) -> None:
        assert run("verify").exit_code == 2
        assert run("verify", "good", "--format", "yaml").exit_code == 2

    def test_a_directory_that_is_not_there_does_not_stop_the_others(
        self, three: dict[str, Answer]
    ) -> None:
        lines = run("verify", "gone", "bad").stdout.splitlines()
        assert "gone: could not be checked: there is no such directory" in lines
        assert lines[-2].startswith("bad: not clean, 1 error, 1 warning (")

    def test_an_unforeseen_failure_is_told_and_is_no_problem_of_the_directory(
        self, three: dict[str, Answer]
    ) -> None:
        done = run("verify", "crash")
        assert "Traceback" not in done.stderr
        assert "Traceback" in run("verify", "crash", "--debug").stderr
        assert "crash: could not be checked: unforeseen: ZeroDivisionError" in done.stdout

    def test_debug_shows_where_a_foreseen_one_came_from(self, three: dict[str, Answer]) -> None:
        assert "Traceback" not in run("verify", "gone").stderr
        assert "Traceback" in run("verify", "gone", "--debug").stderr

    def test_an_interruption_is_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["ckpt_tools.verification"], "verify", interrupted)
        assert run("verify", "out").exit_code == 130


class TestText:
    def test_of_a_clean_directory_it_says_how_much_and_what_was_checked(
        self, three: dict[str, Answer]
    ) -> None:
        assert run("verify", "good").stdout == (
            "good: clean (25 tensors, 55.8 kB)\n"
            "  checked: 2 files listed; tokenizer\n"
            "  not checked: data (--read-data)\n"
        )

    def test_a_long_list_of_checks_is_folded_and_a_path_in_it_is_not(
        self, answers: dict[str, Answer]
    ) -> None:
        path = f"/data/{'run-' * 40}/global_step500"
        checks = (*(f"check number {n}" for n in range(30)), f"25 tensors against {path}")
        answers["out"] = replace(verdict(Path("out")), checked=checks)
        head, *lines = run("verify", "out").stdout.splitlines()

        assert head == "out: clean (25 tensors, 55.8 kB)"
        assert lines[0].startswith("  checked: check number 0; check number 1; ")
        assert all(line.startswith("    ") for line in lines[1:])
        assert all(len(line) <= 100 for line in lines if path not in line)
        assert sum(path in line for line in lines) == 1
        assert " ".join(line.strip() for line in lines) == f"checked: {'; '.join(checks)}"

    def test_no_line_of_it_is_a_command_to_github(self, answers: dict[str, Answer]) -> None:
        answers["out"] = replace(verdict(Path("out")), checked=("x" * 95, "::error::hidden"))
        for form in "text", "github":
            lines = run("verify", "out", "--format", form).stdout.splitlines()
            assert not any(line.strip().startswith("::") for line in lines)
            assert any("hidden" in line for line in lines)

    def test_it_says_which_checkpoint_stood_in_the_way_before_what_to_do(
        self, answers: dict[str, Answer]
    ) -> None:
        answers["out"] = DamagedCheckpoint("files are missing", path=Path("run"), hint="Copy them.")
        assert run("verify", "out", "--against", "run").stdout.splitlines() == [
            "out: could not be checked: files are missing (in run)",
            "next: Copy them.",
        ]

    def test_problems_are_a_table_with_the_next_step_below(self, three: dict[str, Answer]) -> None:
        shown = run("verify", "bad").stdout
        head, first, second, *rest = shown.splitlines()

        assert head.split() == ["kind", "file", "tensor", "detail"]
        assert first.split() == ["nan", "model.safetensors", "a.weight", "3", "elements"]
        assert second.split()[:3] == ["dtype-mixed", "(warning)", "config.json"]
        assert rest == [
            "next: Train anew.",
            "bad: not clean, 1 error, 1 warning (25 tensors, 55.8 kB)",
            "  checked: 2 files listed; tokenizer",
        ]

    def test_a_warning_alone_is_clean_unless_strict(self, three: dict[str, Answer]) -> None:
        assert "fair: clean, 1 warning (" in run("verify", "fair").stdout
        assert "fair: not clean, 1 warning (" in run("verify", "fair", "--strict").stdout

    def test_of_very_many_problems_of_a_kind_the_first_are_shown(
        self, answers: dict[str, Answer]
    ) -> None:
        many = [problem("nan", tensor=f"t{number:04}") for number in range(1000)]
        answers["out"] = verdict(Path("out"), *many, ERROR)
        lines = run("verify", "out").stdout.splitlines()

        assert len(lines) == 25
        assert "and 981 more of this kind" in lines[-4]
        assert "out: not clean, 1,001 errors (" in lines[-2]

    def test_a_column_that_nothing_uses_is_left_out(self, answers: dict[str, Answer]) -> None:
        answers["out"] = verdict(Path("out"), WARNING, problem("no-weights"))
        lines = run("verify", "out").stdout.splitlines()
        assert lines[0].split() == ["kind", "file", "detail"]
        assert not any(line.endswith(" ") for line in lines)

    def test_a_long_name_is_folded_and_never_cut(self, answers: dict[str, Answer]) -> None:
        answers["out"] = verdict(Path("out"), problem("nan", tensor="x" * 300, file="f" * 90))
        shown = run("verify", "out").stdout
        assert shown.count("x") == 300
        assert max(map(len, shown.splitlines()[:-1])) <= 160

    def test_quiet_says_nothing(self, three: dict[str, Answer]) -> None:
        done = run("verify", "bad", "good", "--quiet")
        assert done.output == ""
        assert done.exit_code == 1

    def test_a_hostile_name_is_written_as_escapes(self, answers: dict[str, Answer]) -> None:
        answers["out"] = verdict(Path("out"), problem("nan", tensor=HOSTILE))
        shown = run("verify", "out").stdout
        assert "\\n" in shown and "\\x1b" in shown and "\\u202e" in shown
        assert all(line.isprintable() for line in shown.splitlines())
        assert not any(line.startswith("::") for line in shown.splitlines())


class TestJson:
    def test_it_is_as_documented(self, three: dict[str, Answer]) -> None:
        done = run("verify", "good", "fair", "bad", "gone", "--format", "json", "--quiet")
        report = json.loads(done.stdout)

        assert complaints(report, SCHEMA) == []
        assert report["status"] == 2
        good, fair, bad, gone = report["directories"]
        assert [one["clean"] for one in report["directories"]] == [True, True, False, False]
        assert (fair["errors"], fair["warnings"]) == (0, 1)
        assert bad["problems"][0] == {
            "kind": "nan",
            "severity": "error",
            "file": "model.safetensors",
            "tensor": "a.weight",
            "detail": "3 elements",
            "hint": "Train anew.",
        }
        assert good["skipped"] == ["data (--read-data)"]
        assert (good["tensors"], good["nbytes"], good["seconds"]) == (25, 55_776, 1.25)
        assert gone["unchecked"] == {"fact": "there is no such directory", "hint": "Name it."}

    def test_strict_counts_warnings(self, three: dict[str, Answer]) -> None:
        report = json.loads(run("verify", "fair", "--format", "json", "--strict").stdout)
        assert (report["strict"], report["status"], report["directories"][0]["clean"]) == (
            True,
            1,
            False,
        )

    def test_names_are_exact(self, answers: dict[str, Answer]) -> None:
        answers["out"] = verdict(Path("out"), problem("nan", tensor=HOSTILE))
        report = json.loads(run("verify", "out", "--format", "json").stdout)
        assert report["directories"][0]["problems"][0]["tensor"] == HOSTILE

    @pytest.mark.parametrize(
        "damage",
        [
            lambda report: report.pop("version"),
            lambda report: report.update(version=2),
            lambda report: report.update(extra=1),
            lambda report: report["directories"][0].update(clean="yes"),
            lambda report: report["directories"][0]["problems"][0].update(kind="Not A Number"),
            lambda report: report["directories"][0]["problems"][0].update(severity="bad"),
            lambda report: report["directories"][0].update(unchecked={"fact": "x"}),
        ],
    )
    def test_the_schema_refuses_another_report(
        self, damage: Callable[[Any], object], three: dict[str, Answer]
    ) -> None:
        report = json.loads(run("verify", "bad", "--format", "json").stdout)
        damage(report)
        assert len(complaints(report, SCHEMA)) == 1


TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "null": lambda value: value is None,
}


def complaints(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """What a JSON schema has against a value; the words of JSON Schema that ours uses."""
    if "$ref" in schema:
        return complaints(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "const" in schema or "enum" in schema:
        return [] if value in schema.get("enum", [schema.get("const")]) else [f"{at}: {value!r}"]
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(TYPES[name](value) for name in types):
        return [f"{at}: no {types}"]
    found = []
    if isinstance(value, dict):
        properties = schema["properties"]
        found += [f"{at}: no {key}" for key in schema["required"] if key not in value]
        assert schema["additionalProperties"] is False
        found += [f"{at}: {key}" for key in value if key not in properties]
        for key in value.keys() & properties.keys():
            found += complaints(value[key], properties[key], f"{at}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found += complaints(item, schema["items"], f"{at}[{number}]")
    elif isinstance(value, str):
        found += [] if re.search(schema.get("pattern", ""), value) else [f"{at}: {value!r}"]
    elif isinstance(value, float | int):
        found += [] if value >= schema.get("minimum", value) else [f"{at}: {value!r}"]
    return found


class TestJunit:
    def parse(self, done: Any) -> ElementTree.Element:
        return ElementTree.fromstring(done.stdout.encode())

    def test_a_suite_for_each_directory_and_a_case_for_each_check(
        self, three: dict[str, Answer]
    ) -> None:
        root = self.parse(run("verify", "good", "fair", "bad", "gone", "--format", "junit"))

        assert root.tag == "testsuites"
        good, fair, bad, gone = root
        assert [suite.get("name") for suite in root] == ["good", "fair", "bad", "gone"]
        assert [case.get("name") for case in good] == [
            "2 files listed",
            "tokenizer",
            "data (--read-data)",
        ]
        (skipped,) = good.iter("skipped")
        assert skipped.get("message") == "data (--read-data)"
        (failure,) = bad.iter("failure")
        assert (failure.get("type"), failure.get("message")) == ("nan", "a.weight: 3 elements")
        assert failure.text == "bad/model.safetensors: a.weight: 3 elements\n    next: Train anew."
        (warned,) = fair.iter("system-out")
        assert warned.text == "fair/config.json: float32 and bfloat16"
        (error,) = gone.iter("error")
        assert error.get("message") == "there is no such directory"
        assert good.get("time") == "1.250"

    def test_the_numbers_are_those_of_the_cases(self, three: dict[str, Answer]) -> None:
        root = self.parse(run("verify", "good", "fair", "bad", "gone", "--format", "junit"))

        for element in (root, *root):
            for key, tag in (
                ("tests", "testcase"),
                ("failures", "failure"),
                ("errors", "error"),
                ("skipped", "skipped"),
            ):
                assert element.get(key) == str(len(list(element.iter(tag))))
        assert root.get("tests") == "11"
        assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("1", "1", "1")
        assert root.get("time") == "3.750"
        assert all(case.get("classname") and case.get("time") for case in root.iter("testcase"))

    def test_problems_of_a_kind_are_one_case(self, answers: dict[str, Answer]) -> None:
        answers["out"] = verdict(Path("out"), ERROR, problem("nan", tensor="b"), problem("inf"))
        root = self.parse(run("verify", "out", "--format", "junit"))
        nan, inf = sorted(root.iter("failure"), key=lambda failure: failure.get("type") != "nan")
        assert nan.get("message") == "b: it is bad (and 1 more)"
        assert len((nan.text or "").splitlines()) == 3
        assert inf.get("message") == "it is bad"

    def test_a_warning_fails_under_strict(self, three: dict[str, Answer]) -> None:
        root = self.parse(run("verify", "fair", "--format", "junit", "--strict"))
        (failure,) = root.iter("failure")
        assert failure.get("type") == "dtype-mixed"

    def test_a_hostile_name_stays_text(self, answers: dict[str, Answer]) -> None:
        directory = f"out{HOSTILE.replace('/', '')}"
        held = problem("nan", HOSTILE, tensor=HOSTILE, file=HOSTILE, hint=HOSTILE)
        answers[Path(directory.replace("\x00", "")).name] = verdict(Path("out"), held)
        root = self.parse(run("verify", directory.replace("\x00", ""), "--format", "junit"))
        (failure,) = root.iter("failure")
        assert failure.text is not None
        assert '<&"]]>%0A' in failure.text
        assert "\\x00" in failure.text
        assert len(failure.text.splitlines()) == 2


class TestGithub:
    def test_an_annotation_for_each_kind_and_file(self, answers: dict[str, Answer]) -> None:
        more = problem("nan", "1 element", file="model.safetensors", tensor="b", hint="Train anew.")
        answers["out"] = verdict(Path("out"), ERROR, more, WARNING)
        nan = (
            "::error file=out/model.safetensors,title=nan::"
            "a.weight: 3 elements%0Ab: 1 element%0Anext: Train anew."
        )
        assert run("verify", "out", "--format", "github").stdout.splitlines() == [
            nan,
            "::warning file=out/config.json,title=dtype-mixed::float32 and bfloat16",
            "out: not clean, 2 errors, 1 warning (25 tensors, 55.8 kB)",
            "  checked: 2 files listed; tokenizer",
        ]

    def test_a_warning_is_an_error_under_strict(self, three: dict[str, Answer]) -> None:
        assert run("verify", "fair", "--format", "github", "--strict").stdout.startswith("::error ")

    def test_what_could_not_be_checked_is_an_error(self, three: dict[str, Answer]) -> None:
        assert run("verify", "gone", "--format", "github").stdout == (
            "::error file=gone,title=could not be checked::gone: could not be checked: "
            "there is no such directory%0AName it.\n"
        )

    def test_many_problems_of_a_kind_share_it(self, answers: dict[str, Answer]) -> None:
        many = [problem("nan", tensor=f"t{number:02}") for number in range(30)]
        answers["out"] = verdict(Path("out"), *many)
        first, *_ = run("verify", "out", "--format", "github").stdout.splitlines()
        assert first.count("%0A") == 10
        assert first.endswith("t09: it is bad%0Aand 20 more")

    def test_a_hostile_name_is_no_command(self, answers: dict[str, Answer]) -> None:
        directory = f"::error::{HOSTILE}".replace("\x00", "")
        held = problem("nan", HOSTILE, tensor=HOSTILE, file=HOSTILE, hint=HOSTILE)
        answers[Path(directory).name] = verdict(Path("out"), held)
        shown = run("verify", directory, "--format", "github").stdout
        command, line, _ = shown.splitlines()

        told = re.fullmatch(r"::error file=([^:,]*),title=([^:,]*)::(.*)", command)
        assert told is not None
        assert told[2] == "nan"
        assert "%250A" in told[3]
        assert "::" not in line
        assert shown.count("\n") == 3

    def test_commands_of_the_old_form_are_none_either(self, answers: dict[str, Answer]) -> None:
        answers["##[error]out"] = verdict(Path("out"))
        assert not run("verify", "##[error]out", "--format", "github").stdout.startswith("##[")


class TestOutput:
    @pytest.mark.parametrize(
        ("form", "name", "starts", "shown"),
        [
            ("text", "report.json", "{", "kind "),
            ("text", "report.xml", "<?xml", "kind "),
            ("text", "report.txt", "kind ", "kind "),
            ("json", "report.json", "{", "kind "),
            ("json", "report", "{", "kind "),
            ("junit", "report.XML", "<?xml", "kind "),
            ("github", "report.xml", "<?xml", "::error "),
            ("github", "report.log", "::error ", "::error "),
        ],
    )
    def test_the_file_has_the_format_of_its_name(
        self,
        form: str,
        name: str,
        starts: str,
        shown: str,
        three: dict[str, Answer],
        tmp_path: Path,
    ) -> None:
        done = run("verify", "bad", "--format", form, "--output", tmp_path / name)

        assert done.exit_code == 1
        assert (tmp_path / name).read_text().startswith(starts)
        assert done.stdout.startswith(shown)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_quiet_writes_the_file_alone(self, three: dict[str, Answer], tmp_path: Path) -> None:
        done = run("verify", "bad", "--output", tmp_path / "r.json", "--quiet")
        assert done.output == ""
        assert json.loads((tmp_path / "r.json").read_text())["status"] == 1

    @pytest.mark.parametrize(("form", "name"), [("json", "r.xml"), ("junit", "r.json")])
    def test_a_name_that_says_something_else_is_refused(
        self, form: str, name: str, three: dict[str, Answer], tmp_path: Path
    ) -> None:
        done = run("verify", "bad", "--format", form, "--output", tmp_path / name)
        assert done.exit_code == 2
        assert f"--format {form} does not fit" in done.stderr
        assert not (tmp_path / name).exists()

    def test_a_file_that_cannot_be_written_is_2_and_the_report_is_shown(
        self, three: dict[str, Answer], tmp_path: Path
    ) -> None:
        done = run("verify", "good", "--output", tmp_path / "no" / "r.json")
        assert done.exit_code == 2
        assert "cannot be written (No such file or directory)" in done.stderr
        assert done.stdout.startswith("good: clean")

    def test_the_old_report_is_there_until_the_new_one_is_whole(
        self, three: dict[str, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "r.json"
        path.write_text("old")

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        assert run("verify", "good", "--output", path).exit_code == 2
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_pipe_is_written_to_and_not_replaced(self, three: dict[str, Answer]) -> None:
        assert run("verify", "good", "--output", "/dev/null").exit_code == 0
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)

    def test_the_file_has_the_rights_that_others_have(
        self, three: dict[str, Answer], tmp_path: Path
    ) -> None:
        (tmp_path / "usual").touch()
        run("verify", "good", "--output", tmp_path / "r.json")
        assert (tmp_path / "r.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_options_reach_the_library(three: dict[str, Answer]) -> None:
    run(
        *(
            "verify",
            "good",
            "--against",
            "run",
            "--also",
            "node1",
            "--read-data",
            "--load",
            "--base",
            "base",
            "--like",
            "like",
        ),
        *("--trust-remote-code", "--workers", "3", "--quiet"),
    )
    assert three["asked"] == {
        "against": Path("run"),
        "also": (Path("node1"),),
        "read_data": True,
        "load": True,
        "load_seconds": 3600.0,
        "load_memory": None,
        "base": Path("base"),
        "like": Path("like"),
        "trust_remote_code": True,
        "workers": 3,
        "progress": None,
        "ranks": None,
        "readers": (),
    }


class TestOnRealDirectories:
    @pytest.mark.slow
    def test_what_consolidate_writes_is_clean(self, consolidated: Path) -> None:
        done = run("verify", consolidated, "--strict")

        assert done.exit_code == 0, done.stdout
        assert done.stdout.startswith(f"{consolidated}: clean (25 tensors, 55.8 kB)\n  checked: ")
        assert "tokenizer; generation config; chat template" in " ".join(done.stdout.split())

    @pytest.mark.slow
    def test_it_is_loaded_and_generates(self, consolidated: Path) -> None:
        done = run_program("verify", consolidated, "--load", "--format", "json")

        assert done.returncode == 0, done.stderr
        (held,) = json.loads(done.stdout)["directories"]
        assert (
            held["checked"][-1] == "loading, a forward pass, a short generation with transformers"
        )
        assert complaints(json.loads(done.stdout), SCHEMA) == []

    @pytest.mark.slow
    def test_an_adapter_is_loaded_on_the_base_that_is_named(self, tmp_path: Path) -> None:
        case = CHAT.parent.parent / "peft" / "zero2-olmo2-lora-frozen-excluded"
        adapter = tmp_path / "adapter"
        made = run("extract-lora", case / "checkpoint", adapter, "--adapter-config", case / "hf")
        assert made.exit_code == 0, made.output
        (held,) = case.glob("base/**/config.json")

        done = run("verify", adapter, "--load", "--base", held.parent)
        assert done.exit_code == 0, done.stdout
        shown = " ".join(done.stdout.split())
        assert "loading, a forward pass, a short generation with peft" in shown

    @pytest.mark.slow
    def test_a_model_that_would_not_stop_is_told_what_to_write(
        self, consolidated: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        for path in consolidated.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        config = out / "generation_config.json"
        held = json.loads(config.read_text())
        config.write_text(json.dumps({**held, "eos_token_id": 0}))

        done = run("verify", out)
        assert done.exit_code == 1
        (hint,) = re.findall(
            r"next: Set (\"eos_token_id\": .*) in generation_config.json\.", done.stdout
        )
        config.write_text(json.dumps({**held, **json.loads(f"{{{hint}}}")}))
        left = json.loads(run("verify", out, "--format", "json").stdout)
        kinds = {one["kind"] for one in left["directories"][0]["problems"]}
        assert not kinds & {"eos-not-closing-turn", "olmo-eos-incomplete"}


def test_every_kind_is_documented() -> None:
    table = "".join(
        f"| `{kind}` | {severity} | {meaning} |\n" for kind, (severity, meaning) in KINDS.items()
    )
    assert table in DOCS, f"docs/verify.md needs this table:\n{table}"


def test_the_keys_of_the_report_are_documented() -> None:
    defined = SCHEMA["$defs"]
    for part in (SCHEMA, defined["directory"], defined["problem"]):
        for key in part["properties"]:
            assert f"`{key}`" in DOCS


@pytest.mark.parametrize("option", [option.opts[0] for option in options("verify")])
def test_an_option_is_in_the_document(option: str) -> None:
    assert f"`{option}" in DOCS or option == "--debug"


def test_the_readme_leads_to_the_documents() -> None:
    assert "docs/verify.md" in README
    assert "docs/ci.md" in README
