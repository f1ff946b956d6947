"""Manifest and checksums: what was recorded, what is there, and every way in which the two can differ."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save

from ckpt_tools import consolidate
from ckpt_tools.verification import model, verify
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    SINGLE,
    Damage,
    also,
    answer_here,
    copy_of,
    edit_state,
    kinds,
    write_adapters,
    write_chat_model,
)

MANIFEST, SUMS = "ckpt_tools_manifest.json", "SHA256SUMS"


def dumped(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def sealed(data: dict[str, Any]) -> str:
    """The text of a manifest that is intact."""
    data["xxh3_128"] = xxhash.xxh3_128_hexdigest(dumped({**data, "xxh3_128": ""}).encode())
    return dumped(data)


def edit(change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> Callable[[Path], None]:
    """Change the manifest, and make it whole again, as only malice would."""

    def do(directory: Path) -> None:
        data = json.loads((directory / MANIFEST).read_text())
        change(data)
        (directory / MANIFEST).write_text(sealed(data) if seal else dumped(data))

    return do


def rewrite(change: Callable[[str], str], file: str = MANIFEST) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        (directory / file).write_text(change((directory / file).read_text()))
        return file

    return do


def remove(file: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        (directory / file).unlink()
        return file

    return do


def lengthen(directory: Path) -> str:
    with (directory / "config.json").open("a") as stream:
        stream.write("\n")
    return "config.json"


def add_a_file(directory: Path) -> str:
    (directory / "notes.txt").write_text("tried at lunch")
    return "notes.txt"


def add_a_tensor(directory: Path) -> str:
    name = "model.norm.bias"
    edit_state(directory / SINGLE, lambda state: state.update({name: torch.ones(4).bfloat16()}))
    return name


def lose_a_tensor(directory: Path) -> str:
    edit_state(directory / SINGLE, lambda state: state.pop("model.norm.weight"))
    return "model.norm.weight"


def upper(text: str) -> str:
    return text[:64].upper() + text[64:]


def forge_the_first_sum(directory: Path) -> str:
    rewrite(lambda text: "0" * 64 + text[64:], SUMS)(directory)
    return (directory / SUMS).read_text().split()[1]


def shorten_a_digest(data: dict[str, Any]) -> None:
    data["files"]["config.json"]["xxh3_128"] = "abc"


SIZE = also("manifest-file-size")
STRUCTURE = [
    Damage("manifest-invalid", rewrite(lambda text: text[:-5]), write_chat_model),
    Damage("manifest-invalid", rewrite(lambda text: "[]"), write_chat_model),
    Damage("manifest-invalid", rewrite(lambda text: text.replace("\n", "")), write_chat_model),
    Damage("manifest-invalid", rewrite(lambda text: text.replace('"step"', '"stop"')), write_chat_model),
    Damage("manifest-invalid", edit(lambda data: data.update(version=2)), write_chat_model),
    Damage("manifest-invalid", edit(lambda data: data.update(unit_bytes=0)), write_chat_model),
    Damage("manifest-invalid", edit(lambda data: data.pop("options")), write_chat_model),
    Damage("manifest-invalid", edit(lambda data: data["files"].update(x={"bytes": 1})), write_chat_model),
    Damage("manifest-invalid", edit(shorten_a_digest), write_chat_model),
    Damage("manifest-invalid", edit(lambda data: data.update(tool="ours"), seal=False), write_chat_model),
    Damage(
        "manifest-invalid",
        rewrite(lambda text: text[:-5], f"second/{MANIFEST}"),
        write_adapters,
        SIZE,
    ),
    Damage("manifest-file-missing", remove("tokenizer_config.json"), write_chat_model),
    Damage("manifest-file-size", lengthen, write_chat_model),
    Damage("manifest-file-unlisted", add_a_file, write_chat_model),
    Damage("manifest-tensor", add_a_tensor, write_chat_model, SIZE | also("tensor-unexpected")),
    Damage("manifest-tensor", lose_a_tensor, write_chat_model, SIZE | also("tensor-missing")),
]  # fmt: skip
CHECKSUMS = [
    Damage("sha256-invalid", rewrite(str.strip, SUMS), write_chat_model),
    Damage("sha256-invalid", rewrite(upper, SUMS), write_chat_model),
    Damage("sha256-invalid", rewrite(lambda text: text.replace("  ", " *", 1), SUMS), write_chat_model),
    Damage("sha256-invalid", rewrite(lambda text: text + text.split("\n")[0] + "\n", SUMS), write_chat_model),
    Damage("sha256-invalid", lambda d: (d / SUMS).write_bytes(b"\xff\n") and SUMS, write_chat_model),
    Damage("sha256-file-missing", remove("tokenizer.json"), write_chat_model, also("manifest-file-missing")),
    Damage("sha256-mismatch", forge_the_first_sum, write_chat_model),
]  # fmt: skip


@pytest.mark.parametrize("damage", STRUCTURE, ids=str)
def test_damage_is_found_without_reading_data(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch)


@pytest.mark.parametrize("damage", CHECKSUMS, ids=str)
def test_damage_of_checksums_is_found(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch, read_data=True)


@pytest.mark.parametrize("maker", [write_chat_model, write_adapters])
def test_what_this_package_writes_is_clean(
    maker: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(maker, tmp_path / "out")

    found = verify(directory, read_data=True)

    assert not found.problems
    assert any(what.startswith(MANIFEST) for what in found.checked)
    assert (
        subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=directory, check=False).returncode
        == 0
    )


def test_a_directory_without_a_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(write_chat_model, tmp_path / "out")
    (directory / MANIFEST).unlink()
    (directory / SUMS).unlink()

    found = verify(directory, read_data=True)

    assert not found.problems
    assert any(MANIFEST in reason for reason in found.skipped)


def test_sums_of_what_find_lists_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(write_chat_model, tmp_path / "out")
    command = f"find . -type f ! -name {SUMS} | xargs sha256sum > ../sums && mv ../sums {SUMS}"
    subprocess.run(command, shell=True, cwd=directory, check=True)

    assert "  ./config.json" in (directory / SUMS).read_text()
    assert not verify(directory, read_data=True).problems


def test_weights_that_were_written_alone_lack_a_config_and_that_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    source = FIXTURES / "zero/zero2-bf16-llama-3ranks/checkpoint"
    consolidate(source, tmp_path / "out", weights_only=True)

    found = verify(tmp_path / "out", read_data=True)

    assert [(p.kind, p.severity) for p in found.problems] == [("config-missing", "warning")]
    assert not verify(copy_of(write_chat_model, tmp_path / "whole")).problems
    (tmp_path / "whole/config.json").unlink()
    assert not verify(tmp_path / "whole").clean()


def test_hidden_files_are_nobodys_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_here(monkeypatch)
    directory = copy_of(write_chat_model, tmp_path / "out")
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs")
    (directory / ".git").mkdir()
    (directory / ".git/config").write_text("")

    assert not verify(directory).problems


@pytest.mark.parametrize("unit_bytes", [64, 4096])
def test_digests_are_those_of_the_definition(
    unit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written down once more, as in docs/verify.md: a manifest by hand is believed, and changes are seen."""
    answer_here(monkeypatch)
    torch.manual_seed(0)
    state = {
        "long": torch.randn(50, 70),
        "odd": torch.randn(3),
        "one": torch.randn(()),
        "none": torch.zeros(0, 4),
        "whole": torch.arange(300),
    }
    content = save(state, metadata={"format": "pt"})
    (tmp_path / SINGLE).write_bytes(content)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name in sorted(state):
        low, high = (start + offset for offset in header[name]["data_offsets"])
        units = []
        for at in range(low, high):
            if at == low or at % unit_bytes == 0:
                units.append(b"")
            units[-1] += content[at : at + 1]
        digests = [xxhash.xxh3_128_digest(unit) for unit in units]
        digest = digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))
        tensors[name] = {"file": SINGLE, "xxh3_128": digest.hex()}
    data: dict[str, Any] = {
        "version": 1,
        "tool": "by hand",
        "command": "test",
        "sources": [],
        "options": {},
        "versions": {},
        "unit_bytes": unit_bytes,
        "tensors": tensors,
        "files": {
            SINGLE: {
                "bytes": len(content),
                "header_xxh3_128": xxhash.xxh3_128_hexdigest(content[:start]),
            }
        },
    }
    (tmp_path / MANIFEST).write_text(sealed(data))

    assert kinds(verify(tmp_path, read_data=True)) == {"config-missing"}

    data["tensors"]["none"]["xxh3_128"] = "0" * 32
    (tmp_path / MANIFEST).write_text(sealed(data))
    (wrong,) = (p for p in verify(tmp_path, read_data=True).problems if p.kind != "config-missing")
    assert (wrong.kind, wrong.tensor) == ("digest-mismatch", "none")


# -- bits --------------------------------------------------------------------------------------------


@pytest.fixture
def bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what starts processes; none of it looks at the bytes of weights."""
    answer_here(monkeypatch)
    monkeypatch.setattr(model, "check_model", lambda directory, findings: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("maker", "sums"), [(write_chat_model, True), (write_chat_model, False), (write_adapters, True)]
)
@pytest.mark.usefixtures("bytes_alone")
def test_a_bit_that_is_flipped_anywhere_is_found(
    maker: Callable[[Path], Path], sums: bool, tmp_path: Path
) -> None:
    """Hundreds of places, each file in turn, one bit at a time; with checksums and without."""
    directory = copy_of(maker, tmp_path / "out")
    if not sums:
        for path in directory.rglob(SUMS):
            path.unlink()
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    assert not verify(directory, read_data=True).problems
    draw = random.Random(0)
    unseen = []
    for number in range(400):
        path = files[number % len(files)]
        content = path.read_bytes()
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        if verify(directory, read_data=True).clean():
            unseen.append((path.name, at, bit))
        path.write_bytes(content)
    assert unseen == []
    assert not verify(directory, read_data=True).problems


@pytest.mark.usefixtures("bytes_alone")
def test_a_header_that_means_the_same_and_is_another_is_found(tmp_path: Path) -> None:
    """What pads a header may be any white space; only its digest tells."""
    directory = copy_of(write_chat_model, tmp_path / "out")
    (directory / SUMS).unlink()
    path = directory / SINGLE
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    end = content[:length].rstrip(b" ")
    padding = length - len(end)
    assert padding
    path.write_bytes(end + b"\t" * padding + content[length:])

    (problem,) = verify(directory, read_data=True).problems

    assert (problem.kind, problem.file, problem.tensor) == ("digest-mismatch", SINGLE, None)
    assert "header" in problem.detail


@pytest.mark.slow
@pytest.mark.usefixtures("bytes_alone")
def test_every_bit_of_a_short_file_counts(tmp_path: Path) -> None:
    """Of the checksums and of the end of the manifest, which nothing else vouches for."""
    directory = copy_of(write_chat_model, tmp_path / "out")
    sums, manifest = directory / SUMS, directory / MANIFEST
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if line.endswith("config.json\n")))
    for path, places in ((sums, 150), (manifest, 60)):
        content = path.read_bytes()
        for at in range(len(content) - min(places, len(content)), len(content)):
            changed = bytearray(content)
            changed[at] ^= 1 << at % 8
            path.write_bytes(changed)
            assert not verify(directory, read_data=True).clean(), (path.name, at, bytes(changed))
        path.write_bytes(content)


def test_the_problem_names_the_tensor_that_was_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    directory = copy_of(write_chat_model, tmp_path / "out")
    path = directory / SINGLE
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    name = "model.layers.0.mlp.up_proj.weight"
    content[length + header[name]["data_offsets"][1] - 2] ^= 1
    path.write_bytes(content)

    problems = verify(directory, read_data=True).problems

    assert [(p.kind, p.file, p.tensor) for p in problems] == [
        ("sha256-mismatch", SINGLE, None),
        ("digest-mismatch", SINGLE, name),
    ]
    assert not verify(directory).problems
    wanted = dict(line.split("  ")[::-1] for line in (directory / SUMS).read_text().splitlines())
    assert hashlib.sha256(bytes(content)).hexdigest() != wanted[SINGLE]
