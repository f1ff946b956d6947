"""The picture: a valid file, with the numbers in it, that never replaces another unasked."""

from __future__ import annotations

import errno
import os
import struct
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ckpt_tools.analysis.interval import draw
from ckpt_tools.errors import CkptError, OutputExists, OutputFailed, UsageError
from tests.analysis.interval.test_choice import advised

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: Path) -> list[str]:
    return [element.text or "" for element in ET.parse(picture).iter(f"{SVG}text")]


def test_an_svg_tells_the_costs(tmp_path: Path) -> None:
    draw(advised(every=500, restart_time="10m"), tmp_path / "a.svg")

    assert ET.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    found = texts(tmp_path / "a.svg")
    for text in (
        "the whole cost: the sum of the others",
        "training waits for saves",
        "failures undo work and saves",
        "restarts after failures",
        "steps between two saves",
        "expected cost, hours",
        "Young's formula: 201 steps, 6.58 h",
        "Daly's formula: 196 steps, 6.59 h",
    ):
        assert text in found
    assert any(text.startswith("least cost: 200 steps, 6.57 h") for text in found)
    assert any(text.startswith("--every: 500 steps, ") for text in found)
    assert not any(text.startswith("disk, ") for text in found)


@pytest.mark.slow
def test_disk_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    draw(advised(checkpoint_size="140GB"), tmp_path / "all.svg")
    draw(advised(checkpoint_size="140GB", keep=3), tmp_path / "kept.svg")

    kept = "the last 3 kept, and the one being written"
    assert kept not in texts(tmp_path / "all.svg")
    assert {kept, "disk, GB"} <= set(texts(tmp_path / "kept.svg"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "unit"), [("900B", "kB"), ("3GB", "GB"), ("3TB", "TB"), ("4000TB", "PB")]
)
def test_disk_is_drawn_in_the_unit_that_fits(tmp_path: Path, size: str, unit: str) -> None:
    draw(advised(checkpoint_size=size, keep=3), tmp_path / "a.svg")

    assert f"disk, {unit}" in texts(tmp_path / "a.svg")


@pytest.mark.slow
def test_a_png_is_a_picture(tmp_path: Path) -> None:
    draw(advised(), tmp_path / "a.PNG")

    content = (tmp_path / "a.PNG").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    pixels = imread(tmp_path / "a.PNG", format="png")
    assert pixels.shape[:2] == (height, width)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        draw(advised(), tmp_path / folder / name)

    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1},
        {"steps": 2, "checkpoint_size": 1, "keep": 1},
        {"mtbf": "5m", "every": 20_000},
        {"mtbf": "100000d"},
    ],
    ids=str,
)
def test_any_run_can_be_drawn(tmp_path: Path, changes: dict[str, object]) -> None:
    draw(advised(**changes), tmp_path / "a.svg")

    assert "expected cost, hours" in texts(tmp_path / "a.svg")


@pytest.mark.slow
def test_a_cost_without_end_is_told(tmp_path: Path) -> None:
    for mtbf in ("5m", "10m"):
        draw(advised(mtbf=mtbf, every=20_000), tmp_path / f"{mtbf}.svg")

        assert "--every: 20,000 steps, for ever" in texts(tmp_path / f"{mtbf}.svg")


def test_a_file_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("somebody's")

    with pytest.raises(OutputExists, match="--plot"):
        draw(advised(), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "somebody's"

    draw(advised(), tmp_path / "a.svg", overwrite=True)
    assert texts(tmp_path / "a.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_a_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()

    with pytest.raises(OutputExists):
        draw(advised(), tmp_path / "a.svg", overwrite=True)


@pytest.mark.parametrize("name", ["a.pdf", "a", ".svg"])
def test_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--plot: .* neither \.svg nor \.png"):
        draw(advised(), tmp_path / name)


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for target in (tmp_path / "nowhere" / "a.svg", tmp_path / "file" / "a.svg"):
        with pytest.raises(OutputFailed, match="cannot be written"):
            draw(advised(), target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_picture_that_cannot_be_put_in_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", refuse)

    with pytest.raises(OutputFailed, match="Input/output error"):
        draw(advised(), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(CkptError, match="`matplotlib` is not installed") as raised:
        draw(advised(), tmp_path / "a.svg")
    assert raised.value.hint == 'Install it with pip install "ckpt-tools[plot]".'
