"""``--report`` as it is typed: what the pages of conversions, ``verify`` and ``diff`` say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.page.test_rendering import Elements
from tests.cli.test_consolidate import run
from tests.cli.test_hostile_text import ESCAPES, NAME, assert_harmless
from tests.conftest import FIXTURES

CASE = FIXTURES / "zero" / "zero3-bf16-qwen3-tied-2ranks"
TRUTH = CASE / "truth" / "model.safetensors"
ADAPTERS = FIXTURES / "peft" / "zero2-olmo2-two-adapters"


def tables_of(page: Path) -> list[dict[str, list[str]]]:
    """The cells of each table of a page, by the titles of its columns."""
    text = page.read_text()
    elements = Elements(text)
    data = [json.loads(held) for kind, held in elements.scripts if kind == "application/json"]
    heads = [part.split("</thead>")[0] for part in text.split("<thead>")[1:]]
    tables = []
    for columns, head in zip(data, heads, strict=True):
        names = [piece.split(">")[1].split("<")[0] for piece in head.split("<th scope")[1:]]
        tables.append({name: column["cells"] for name, column in zip(names, columns, strict=True)})
    return tables


@pytest.mark.slow
def test_the_page_of_a_conversion(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"

    done = run(
        *("consolidate", CASE / "checkpoint", out, "--config", CASE / "hf"),
        *("--report", page, "--statistics", "--verify", "--sha256"),
    )

    assert done.exit_code == 0, done.output
    text = Elements(page.read_text()).text
    assert "Converted, with 1 warning; every byte was verified" in text
    assert text.index("no tokenizer was found") < text.index("DeepSpeed ZeRO-3, by deepspeed")
    assert f"ckpt-tools consolidate {CASE / 'checkpoint'} {out}" in text
    assert f"ckpt-tools verify {out} --against" in text
    assert f"cd {out} && sha256sum -c SHA256SUMS" in text
    tensors, files = tables_of(page)
    truth = load_file(out / "model.safetensors")
    manifest = json.loads((out / "ckpt_tools_manifest.json").read_text())
    assert dict(zip(tensors["tensor"], tensors["XXH3-128"], strict=True)) == {
        name: held["xxh3_128"] for name, held in manifest["tensors"].items()
    }
    for row, name in enumerate(tensors["tensor"]):
        values = truth[name].double()
        assert tensors["min"][row] == f"{float(values.min()):.4g}"
        assert tensors["norm"][row] == f"{float(values.norm()):.4g}"
        assert tensors["dtype"][row] == str(truth[name].dtype).removeprefix("torch.")
        assert tensors["values"][row] == f"{values.numel():,}"
    assert set(files["file"]) == {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_the_page_of_several_adapters_lists_the_tensors_of_each(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"
    checkpoint = ADAPTERS / "checkpoint"

    done = run(
        *("extract-lora", checkpoint, out, "--adapter", "all", "--config", ADAPTERS / "hf"),
        *("--adapter-config", ADAPTERS / "truth" / "adapter", "--report", page, "--statistics"),
    )

    assert done.exit_code == 0, done.output
    tensors, _ = tables_of(page)
    held = {
        (str(path.relative_to(out)), name)
        for path in out.rglob("*.safetensors")
        for name in load_file(path)
    }
    assert len({file for file, _ in held}) == 2
    assert set(zip(tensors["file"], tensors["tensor"], strict=True)) == held
    assert "–" not in tensors["norm"]


def test_the_page_of_verify_has_problems_first(tmp_path: Path) -> None:
    good, bad, page = tmp_path / "good", tmp_path / "bad", tmp_path / "report.html"
    for path, value in ((good, 1.0), (bad, math.nan)):
        path.mkdir()
        save_file({"a.0.w": torch.full((2,), value)}, path / "model.safetensors", {"format": "pt"})

    done = run("verify", good, bad, tmp_path / "gone", "--report", page, "--statistics", "-q")

    assert done.exit_code == 2
    text = Elements(page.read_text()).text
    assert "Verification of 3 directories" in text
    assert text.index("Could not be checked") < text.index("Tensors")
    assert text.index("NaN or infinity") < text.index("Bytes by dtype", text.index("NaN or inf"))
    assert "2 NaN and 0 infinite of 2 values" in text
    assert "the directory does not exist" in text


def test_many_problems_are_a_table(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    state = {f"layers.{n}.w": torch.zeros(2) for n in range(30)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    sums = "".join(f"{'0' * 64}  gone-{n}\n" for n in range(30))
    (tmp_path / "SHA256SUMS").write_text(sums)

    done = run("verify", tmp_path, "--read-data", "--report", page, "-q")

    assert done.exit_code == 1
    problems = tables_of(page)[0]
    assert sum(file.startswith("gone-") for file in problems["file"]) == 30
    assert "more problems are in the table of problems" in page.read_text()


def test_the_page_of_diff_shows_what_changed(tmp_path: Path) -> None:
    state, page = load_file(TRUTH), tmp_path / "report.html"
    changed = next(name for name in state if ".1." in name)
    state[changed][0] += 1.0
    removed = next(name for name in state if name.endswith("norm.weight") and name != changed)
    del state[removed]
    state["added"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")

    done = run("diff", TRUTH, tmp_path / "model.safetensors", "--report", page, "-q")

    assert done.exit_code == 1
    text = Elements(page.read_text()).text
    assert "Different: 1 changed, 1 added, 1 removed" in text
    assert "What changed where" in text
    table, others = tables_of(page)
    assert table["tensor"] == [changed]
    assert dict(zip(others["tensor"], others["what"], strict=True)) == {
        removed: "removed",
        "added": "added",
    }
    assert run("diff", TRUTH, TRUTH, "--report", page, "-q").exit_code == 0
    assert "The same, bit for bit" in Elements(page.read_text()).text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--report", "{}/report.txt"], "does not end in .html"),
        (["--report", "{}/gone/report.html"], "does not exist"),
        (["--report", "{}/report.html", "--dry-run"], "does not fit --dry-run"),
        (["--statistics"], "no place to go without --report"),
        (["--report", "{}/out/report.html"], "lies in the output"),
        (["--report", "{}/folder.html"], "is a directory"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.html").mkdir()
    out = tmp_path / "out"
    if "out" in words[-1]:
        out.mkdir()

    done = run("consolidate", CASE / "checkpoint", out, *(word.format(tmp_path) for word in words))

    assert done.exit_code == 2
    assert said in done.stderr
    assert "  next: " in done.stderr
    assert not list(out.glob("*"))


def test_the_command_on_the_page_names_variables_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    monkeypatch.setenv("CKPT_TOOLS_DIFF_ATOL", "0.5")

    run("diff", TRUTH, TRUTH, "--report", page, "-q")

    assert f"CKPT_TOOLS_DIFF_ATOL=0.5 ckpt-tools diff {TRUTH}" in page.read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two directories whose tensor has a name of escapes and markup, in a folder that has one too."""
    root = tmp_path_factory.mktemp("names") / f"<b>&{ESCAPES.replace('/', '')}"
    for name, value in (("one", 1.0), ("other", 2.0)):
        (root / name).mkdir(parents=True)
        tensors = {f"<script>{NAME}": torch.full((2, 2), value), "model.b": torch.ones(1)}
        save_file(tensors, root / name / "model.safetensors")
    return root


@pytest.mark.parametrize(
    "words",
    [
        ["consolidate", "one", "out", "--weights-only"],
        ["verify", "one", "--statistics"],
        ["diff", "one", "other"],
    ],
    ids=lambda words: words[0],
)
def test_hostile_names_stay_text(words: list[str], hostile: Path, tmp_path: Path) -> None:
    args: list[Any] = [hostile / w if w in ("one", "other", "out") else w for w in words]

    done = run(*args, "--report", tmp_path / "report.html")

    assert done.exit_code in (0, 1), done.output
    page = (tmp_path / "report.html").read_text()
    assert_harmless(page)
    elements = Elements(page)
    assert sum(tag == "script" for tag, _ in elements.tags) == page.count("</script>")
    assert "<script>\\x1b[2J" in elements.text
