"""The GitHub action and the pipeline of docs/ci.md: their steps are run as a runner would run them.

``Runner`` does what the documentation of GitHub's workflow syntax says of composite actions: expressions are
put into ``env`` before a step, ``bash`` runs with ``-eo pipefail``, outputs are read from a file, and a
step that fails ends the job but for those with ``if: always()``. Only pip and the upload are replaced.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml  # type: ignore[import-untyped]

from ckpt_tools._version import __version__
from tests.cli.test_consolidate import CHAT, run
from tests.support.answers import shared_answers

ROOT = Path(__file__).resolve().parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
DOCS = (ROOT / "docs" / "ci.md").read_text()
BIN = Path(sys.executable).parent

Step = Mapping[str, Any]


@dataclass
class Runner:
    """A machine with a workspace.

    Attributes:
        workspace: the working directory of every step.
        tools: comes first on the PATH; what is replaced lies here.
        values: what expressions stand for, such as ``inputs.directory``.
        env: variables of the whole job.
        shown: what the steps have printed.
    """

    workspace: Path
    tools: Path
    values: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)
    shown: str = ""

    def run(self, steps: list[Step], after: Callable[[Step], object] = lambda step: None) -> int:
        """Run the steps; the exit status of the first that failed."""
        failed = 0
        for step in steps:
            condition = step.get("if", "success()")
            if failed and condition != "always()":
                continue
            if "run" in step:
                status = self._run(step)
                failed = failed or status
                after(step)
        return failed

    def _run(self, step: Step) -> int:
        assert step["shell"] == "bash"
        script = self.workspace.parent / "script.sh"
        script.write_text(step["run"])
        output = self.workspace.parent / "output"
        output.write_text("")
        env = {
            "PATH": f"{self.tools}:{BIN}:/usr/bin:/bin",
            "HOME": str(self.workspace),
            "HF_HUB_OFFLINE": "1",
            **shared_answers(),
            "GITHUB_OUTPUT": str(output),
            **self.env,
            **{key: self.evaluate(str(value)) for key, value in step.get("env", {}).items()},
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=self.workspace,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        self.shown += done.stdout + done.stderr
        if "id" in step:
            for name, value in outputs(output.read_text()).items():
                self.values[f"steps.{step['id']}.outputs.{name}"] = value
        return done.returncode

    def evaluate(self, text: str) -> str:
        return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: self.values[found[1]], text)


def outputs(text: str) -> dict[str, str]:
    """The outputs in the file that a step has written: ``name=value``, or lines up to a delimiter."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, between, rest = line.partition("<<")
        if between and "=" not in name:
            held = iter(lines.__next__, rest)
            found[name] = "\n".join(held)
        else:
            name, _, found_value = line.partition("=")
            found[name] = found_value
    return found


def tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A runner on which ``pip install`` is noted and not done."""
    workspace, tools = tmp_path / "workspace", tmp_path / "tools"
    workspace.mkdir()
    tools.mkdir()
    tool(
        tools / "python",
        f'if [[ "$1 $2" == "-m pip" ]]; then printf "%s\\n" "$@" >> {tmp_path}/pip; exit; fi\n'
        f'exec {sys.executable} "$@"',
    )
    values = {f"inputs.{name}": spec.get("default", "") for name, spec in ACTION["inputs"].items()}
    values["github.action_path"] = str(ROOT)
    return Runner(workspace, tools, values)


def act(runner: Runner, **inputs: str) -> int:
    """Use the action; its exit status."""
    given = {f"inputs.{name.replace('_', '-')}": value for name, value in inputs.items()}
    assert given.keys() <= runner.values.keys()
    runner.values |= given
    return runner.run(ACTION["runs"]["steps"])


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("consolidated") / "out"
    done = run(
        "consolidate", CHAT / "checkpoint", out, "--config", CHAT / "hf", "--tokenizer", CHAT / "hf"
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def out(consolidated: Path, runner: Runner) -> Path:
    return Path(shutil.copytree(consolidated, runner.workspace / "out"))


def flip(path: Path) -> None:
    """Flip a bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class TestTheAction:
    def test_it_is_a_composite_action_with_a_name(self) -> None:
        assert ACTION["runs"]["using"] == "composite"
        assert ACTION["name"] and ACTION["description"]
        assert all(spec["description"] for spec in ACTION["inputs"].values())
        required = [name for name, spec in ACTION["inputs"].items() if spec.get("required")]
        assert required == ["directory"]
        assert all(
            "default" in spec for name, spec in ACTION["inputs"].items() if name != "directory"
        )

    def test_no_script_holds_an_expression(self) -> None:
        scripts = [step["run"] for step in ACTION["runs"]["steps"] if "run" in step]
        assert len(scripts) == 2
        assert not any("${{" in script for script in scripts)

    def test_every_input_is_used(self) -> None:
        text = json.dumps(ACTION["runs"])
        assert all(f"inputs.{name}" in text for name in ACTION["inputs"])

    def test_every_input_is_documented(self) -> None:
        assert all(f"`{name}`" in DOCS or f"\n    {name}: " in DOCS for name in ACTION["inputs"])

    def test_it_installs_itself_or_the_version_that_is_asked_for(
        self, runner: Runner, tmp_path: Path
    ) -> None:
        tool(runner.tools / "ckpt-tools", "exit 0")
        assert act(runner, directory="out") == 0
        assert act(runner, directory="out", version="1.2.3") == 0
        assert (tmp_path / "pip").read_text().splitlines() == [
            *("-m", "pip", "install", "--", str(ROOT)),
            *("-m", "pip", "install", "--", "ckpt-tools==1.2.3"),
        ]

    def arguments(self, runner: Runner, **inputs: str) -> list[str]:
        record = runner.workspace.parent / "arguments"
        tool(runner.tools / "ckpt-tools", f'printf "%s\\n" "$@" > {record}')
        assert act(runner, **inputs) == 0
        return record.read_text().splitlines()

    def test_options_are_passed_on(self, runner: Runner) -> None:
        report = ["verify", "--format", "github", "--output", "ckpt-tools-verify.xml"]
        assert self.arguments(runner, directory="out") == [*report, "--", "out"]
        given = self.arguments(
            runner,
            directory="a\n\nb c\n",
            against="run",
            base="base",
            read_data="true",
            load="true",
            strict="true",
            trust_remote_code="true",
        )
        assert given == [
            *report,
            *("--against", "run", "--base", "base", "--read-data", "--load", "--strict"),
            *("--trust-remote-code", "--", "a", "b c"),
        ]

    @pytest.mark.parametrize(
        "hostile",
        [
            '"; touch pwned; "',
            "$(touch pwned)",
            "`touch pwned`",
            "--help",
            "a b*",
            "'; touch pwned #",
        ],
    )
    def test_a_hostile_input_is_an_argument(self, hostile: str, runner: Runner) -> None:
        given = self.arguments(runner, directory=hostile, against=hostile, report=hostile)

        assert given[-2:] == ["--", hostile]
        assert given[given.index("--against") + 1] == hostile
        assert given[given.index("--output") + 1] == hostile
        assert list(runner.workspace.iterdir()) == []
        assert runner.evaluate(ACTION["outputs"]["report"]["value"]) == hostile

    @pytest.mark.slow
    def test_a_clean_directory_passes(self, runner: Runner, out: Path) -> None:
        assert act(runner, directory="out", strict="true") == 0

        assert "::error" not in runner.shown
        assert "out: clean (25 tensors" in runner.shown
        assert runner.evaluate(ACTION["outputs"]["status"]["value"]) == "0"
        report = runner.evaluate(ACTION["outputs"]["report"]["value"])
        suite = ElementTree.parse(runner.workspace / report).getroot()[0]
        assert (suite.get("name"), suite.get("failures")) == ("out", "0")

    @pytest.mark.slow
    def test_a_bad_one_fails_with_annotations(self, runner: Runner, out: Path) -> None:
        (out / "generation_config.json").write_text('{"eos_token_id": 0}')
        assert act(runner, directory="out\nmissing") == 2

        assert (
            "::error file=out/generation_config.json,title=eos-not-closing-turn::" in runner.shown
        )
        assert "::error file=missing,title=could not be checked::" in runner.shown
        assert runner.evaluate(ACTION["outputs"]["status"]["value"]) == "2"
        suites = ElementTree.parse(runner.workspace / "ckpt-tools-verify.xml").getroot()
        assert [suite.get("errors") for suite in suites] == ["0", "1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


class TestThePipeline:
    @pytest.fixture
    def pipeline(self, runner: Runner) -> Runner:
        """The machine of the pipeline, on which what is uploaded is noted."""
        tool(
            runner.tools / "hf",
            f'printf "%s\\n" "$HF_TOKEN" "$@" > {runner.workspace.parent}/uploaded',
        )
        runner.values["secrets.HF_TOKEN"] = "token"
        runner.env = {
            "RUN": str(CHAT / "checkpoint"),
            "BASE": str(CHAT / "hf"),
            "REPOSITORY": "somebody/olmo-chat",
        }
        return runner

    @property
    def workflow(self) -> Any:
        (workflow,) = [yaml.safe_load(b) for b in blocks("yaml") if b.startswith("name: ")]
        return workflow

    def test_its_variables_are_those_that_are_set_here(self, pipeline: Runner) -> None:
        assert self.workflow["env"].keys() == pipeline.env.keys()
        assert "schedule" in self.workflow[True]  # `on` is a boolean in YAML 1.1

    @pytest.mark.slow
    def test_a_clean_directory_is_uploaded_and_a_later_save_changes_nothing(
        self, pipeline: Runner
    ) -> None:
        run_directory = pipeline.workspace.parent / "run"
        shutil.copytree(CHAT / "checkpoint", run_directory)
        pipeline.env["RUN"] = str(run_directory)
        (chosen,) = (path for path in run_directory.iterdir() if path.is_dir())

        def save(step: Step) -> None:
            if step["name"] == "Choose":
                (run_directory / "global_step999").mkdir()
                (run_directory / "latest").write_text("global_step999")

        steps = self.workflow["jobs"]["publish"]["steps"]
        assert pipeline.run(steps, after=save) == 0, pipeline.shown
        manifest = json.loads((pipeline.workspace / "out" / "ckpt_tools_manifest.json").read_text())
        assert manifest["sources"][0]["name"] == chosen.name
        assert (pipeline.workspace / "verify.html").is_file()
        uploaded = (pipeline.workspace.parent / "uploaded").read_text().splitlines()
        assert uploaded[:5] == ["token", "upload", "somebody/olmo-chat", "out", "."]
        assert ElementTree.parse(pipeline.workspace / "verify.xml").getroot().get("failures") == "0"

    @pytest.fixture
    def already_consolidated(self, pipeline: Runner, consolidated: Path) -> None:
        """``consolidate`` gives what it gave before; all else is done."""
        tool(
            pipeline.tools / "ckpt-tools",
            f'if [[ "$1" == consolidate ]]; then exec cp -r {consolidated} out; fi\n'
            f'exec {BIN}/ckpt-tools "$@"',
        )

    @pytest.mark.slow
    @pytest.mark.usefixtures("already_consolidated")
    def test_a_damaged_one_is_not(self, pipeline: Runner) -> None:
        def damage(step: Step) -> None:
            if step["name"] == "Consolidate":
                flip(pipeline.workspace / "out" / "model.safetensors")

        assert pipeline.run(self.workflow["jobs"]["publish"]["steps"], after=damage) == 1
        assert not (pipeline.workspace.parent / "uploaded").exists()
        assert ElementTree.parse(pipeline.workspace / "verify.xml").getroot().get("failures") != "0"

    @pytest.mark.slow
    def test_a_checkpoint_that_cannot_be_read_uploads_nothing(self, pipeline: Runner) -> None:
        pipeline.env["RUN"] = str(pipeline.workspace)
        assert pipeline.run(self.workflow["jobs"]["publish"]["steps"]) == 3
        assert not (pipeline.workspace.parent / "uploaded").exists()
        assert not (pipeline.workspace / "out").exists()

    @pytest.mark.slow
    @pytest.mark.usefixtures("already_consolidated")
    def test_the_script_without_github_does_the_same(self, pipeline: Runner) -> None:
        (script,) = blocks("bash")
        assert pipeline.run([{"shell": "bash", "run": script}]) == 0, pipeline.shown
        assert (pipeline.workspace.parent / "uploaded").exists()

    def test_the_action_is_used_with_inputs_that_it_has(self) -> None:
        (used,) = [yaml.safe_load(b)[0] for b in blocks("yaml") if b.startswith("- uses")]
        assert used["with"].keys() <= ACTION["inputs"].keys()


class TestTheHook:
    @property
    def shown(self) -> Any:
        (shown,) = (
            found
            for block in blocks("yaml")
            if block.startswith("repos:") and "rev" in (found := yaml.safe_load(block)["repos"][0])
        )
        return shown

    def test_what_is_shown_is_of_this_version(self) -> None:
        assert self.shown["rev"] == f"v{__version__}"
        (used,) = [yaml.safe_load(b)[0] for b in blocks("yaml") if b.startswith("- uses")]
        assert used["uses"].partition("@")[2] == f"v{__version__}"

    def test_its_command_line_is_understood(self, tmp_path: Path, runner: Runner) -> None:
        (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
        (used,) = self.shown["hooks"]
        assert used["id"] == hook["id"]
        assert re.search(hook["files"], "models/chat/model-00001-of-00002.safetensors")
        assert hook["pass_filenames"] is False

        done = run(*hook["entry"].split()[1:], *used["args"])

        assert done.exit_code == 2
        assert "the directory does not exist" in done.output
