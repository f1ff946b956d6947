"""``ckpt-tools interval`` as it is typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ckpt_tools.analysis.interval import TrainingRun, expected_cost
from tests.cli.test_consolidate import run, run_program
from tests.cli.test_help import options

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "interval.md").read_text()
RUN = ("--step-time", "12s", "--save-time", "90s", "--steps", "20000", "--mtbf", "9h")


def test_the_worked_example_is_what_is_printed() -> None:
    (block,) = re.findall(r"^```console\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    command, _, shown = block.partition("\n")
    done = run_program(*command.removeprefix("$ ckpt-tools ").split())

    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == shown


def test_the_text_says_how_often_at_what_cost() -> None:
    lines = run("interval", *RUN).stdout.splitlines()

    assert lines[0].split() == ["save", "every", "200", "steps,", "40m", "of", "work"]
    assert "66.7 h of work, 71.9 h expected" in lines[1]
    assert "7.99 expected, one every 9h; one undoes 20m29s" in lines[2]
    assert "201 steps, from 40m15s of work" in lines[3]
    assert "196 steps, from 39m15s of work" in lines[4]
    rows = {line[:10]: " ".join(line.replace(" h", "h").split()[2:]) for line in lines[6:]}
    assert rows["half of it"] == "it 100 200 5h 1.45h 6.45h 9.67% +1.22h +1.7%"
    assert rows["least cost"] == "200 100 2.5h 2.73h 5.23h 7.84%"
    assert rows["twice it  "] == "400 50 1.25h 5.39h 6.64h 9.96% +1.42h +1.97%"
    assert not any(line.endswith(" ") for line in lines)


def test_every_is_one_more_row_and_restarts_one_more_column() -> None:
    shown = run("interval", *RUN, "--every", "500", "--restart-time", "20m").stdout

    (row,) = [line.split() for line in shown.splitlines() if line.startswith("--every")]
    cost = expected_cost(TrainingRun(20_000, 12, 90, 32_400, 1200), 500)
    assert row[1:3] == ["500", "40"]
    assert row[7] == f"{cost.restart_seconds / 3600:.3g}"
    assert "restarts" in shown
    assert "restarts" not in run("interval", *RUN).stdout


def test_json_is_one_object_with_the_documented_keys() -> None:
    done = run_program("interval", *RUN, "--checkpoint-size", "140GB", "--keep", "3", "--json")

    assert done.returncode == 0
    assert done.stderr == ""
    told = json.loads(done.stdout)
    section = DOCS.partition("## JSON")[2].partition("## From Python")[0]
    documented = set(re.findall(r"`(\w+)`", section)) - {"null"}
    costs = [told[key] for key in ("exact", "half", "double", "young", "daly")] + told["curve"]
    keys = {*told, *told["run"], *told["checkpoint"]}.union(*costs)
    assert keys == documented
    assert {frozenset(cost) - {"formula_seconds"} for cost in costs} == {frozenset(told["exact"])}
    assert (told["exact"]["interval"], told["young"]["interval"], told["daly"]["interval"]) == (
        *(200, 201, 196),
    )
    assert told["every"] is None
    assert told["exact"]["disk_bytes"] == 14 * 10**12
    assert told["exact"]["disk_kept_bytes"] == 420 * 10**9
    assert told["exact"]["disk_peak_bytes"] == 560 * 10**9
    assert told["half"]["extra_seconds"] / 3600 == pytest.approx(1.22, abs=0.005)
    assert told["half"]["extra_percent"] == pytest.approx(1.70, abs=0.005)


def test_the_size_is_taken_from_a_checkpoint(fixtures: Path) -> None:
    checkpoint = fixtures / "zero" / "zero3-bf16-llama-7ranks" / "checkpoint"
    size = sum(file.stat().st_size for file in (checkpoint / "global_step2").iterdir())

    told = json.loads(run("interval", *RUN, "--from", checkpoint, "--json").stdout)
    assert told["checkpoint"] == {
        "bytes": size,
        "path": str(checkpoint / "global_step2"),
        "files": 14,
    }
    assert told["exact"]["disk_bytes"] == 100 * size

    shown = run("interval", *RUN, "--from", checkpoint).stdout
    assert f"158 kB, as {checkpoint / 'global_step2'} (14 files)" in shown
    assert "15.8 MB for all 100" in shown


def test_a_tag_chooses_among_several(fixtures: Path) -> None:
    checkpoint = fixtures / "zero" / "zero2-bf16-llama-two-saves-2ranks" / "checkpoint"

    for tag in ("global_step2", "global_step4"):
        done = run("interval", *RUN, "--from", checkpoint, "--tag", tag, "--json")
        assert json.loads(done.stdout)["checkpoint"]["path"] == str(checkpoint / tag)


def test_a_damaged_checkpoint_is_status_4(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "zero" / "zero2-bf16-llama-3ranks" / "checkpoint", tmp_path / "run")
    (lost,) = (tmp_path / "run").glob("*/*rank_1_mp_rank_00_optim_states.pt")
    lost.unlink()

    done = run("interval", *RUN, "--from", tmp_path / "run")

    assert done.exit_code == 4
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_written(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"interval{suffix}"
    done = run("interval", *RUN, "--checkpoint-size", "140GB", "--plot", picture)

    assert done.exit_code == 0, done.stderr
    assert "200 steps" in done.stdout
    if suffix == ".svg":
        assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    else:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    again = run("interval", *RUN, "--plot", picture, "--json")
    assert again.exit_code == 2
    assert "--overwrite" in json.loads(again.stdout)["error"]["hint"]
    assert run("interval", *RUN, "--plot", picture, "--overwrite").exit_code == 0


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    done = run("interval", *RUN, "--plot", tmp_path / "a.svg")

    assert done.exit_code == 1
    assert '  next: Install it with pip install "ckpt-tools[plot]".' in done.stderr
    assert done.stdout == ""
    assert run("interval", *RUN).exit_code == 0


@pytest.mark.parametrize(
    ("typed", "option"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--steps", "99999999999"], "--steps"),
        (["--step-time", "0s"], "--step-time"),
        (["--step-time", "12 parsecs"], "--step-time"),
        (["--save-time", "-90s"], "--save-time"),
        (["--save-time", "nan"], "--save-time"),
        (["--mtbf", "0"], "--mtbf"),
        (["--mtbf", "inf"], "--mtbf"),
        (["--mtbf", "1ms"], "--mtbf"),
        (["--restart-time", "-1s"], "--restart-time"),
        (["--every", "0"], "--every"),
        (["--every", "20001"], "--every"),
        (["--keep", "0", "--checkpoint-size", "1GB"], "--keep"),
        (["--keep", "2"], "--keep"),
        (["--checkpoint-size", "big"], "--checkpoint-size"),
        (["--checkpoint-size", "0GB"], "--checkpoint-size"),
        (["--checkpoint-size", "1GB", "--from", "run"], "--from"),
        (["--tag", "global_step2"], "--tag"),
        (["--plot", "a.pdf"], "--plot"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_status_2_and_named(typed: list[str], option: str) -> None:
    done = run("interval", *RUN, *typed)

    assert done.exit_code == 2
    assert option in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.output


@pytest.mark.parametrize("option", RUN[::2])
def test_what_must_be_given_is_named(option: str) -> None:
    at = RUN.index(option)

    done = run("interval", *RUN[:at], *RUN[at + 2 :])

    assert done.exit_code == 2
    assert f"missing option '{option}'" in done.stderr


def test_a_save_longer_than_the_time_between_failures_is_answered_with_a_remark() -> None:
    done = run("interval", *RUN, "--save-time", "10h")

    assert done.exit_code == 0
    assert (
        "one save takes 10h, and there is a failure every 9h: the run hardly progresses"
        in done.stdout
    )


def test_an_interval_that_never_ends_is_told_without_a_number() -> None:
    done = run("interval", *RUN, "--mtbf", "5m", "--every", "20000")

    assert done.exit_code == 0
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("--every")]
    assert row.split()[-8:] == ["for", "ever", "for", "ever", "-", "for", "ever", "-"]
    assert "inf" not in done.stdout
    assert "nan" not in done.stdout


@pytest.mark.parametrize("option", [option.opts[0] for option in options("interval")])
def test_an_option_is_in_the_docs(option: str) -> None:
    assert option == "--debug" or re.search(rf"`{option}\b", DOCS)


def test_the_arithmetic_needs_no_heavy_package() -> None:
    heavy = {"torch", "numpy", "transformers", "safetensors", "rich", "matplotlib"}
    program = (
        "import sys\n"
        "from ckpt_tools.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        f"print('loaded:', *sorted({heavy!r} & sys.modules.keys()))\n"
    )
    typed = ["interval", *RUN, "--checkpoint-size", "140GB", "--keep", "3"]
    done = subprocess.run(
        [sys.executable, "-c", program, *typed], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[0].startswith("save every")
    assert done.stdout.splitlines()[-1] == "loaded:"
