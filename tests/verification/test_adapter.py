"""Adapters: config against tensors, names as PEFT reads them; what PEFT wrote is clean."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools.verification import verify
from tests.conftest import FIXTURES
from tests.support.verification.directories import (
    Damage,
    also,
    answer_here,
    change_tensor,
    copy_adapter,
    copy_adapter_beside_its_base,
    copy_adapter_with_head,
    copy_norms,
    edit_json,
    edit_state,
    kinds,
    store,
)

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
HEAD = "base_model.model.lm_head.weight"


def config(**changes: Any) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_json(directory / CONFIG, lambda data: data.update(changes))
        return CONFIG

    return do


def without(key: str) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        edit_json(directory / CONFIG, lambda data: data.pop(key))
        return CONFIG

    return do


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        def rename(state: dict[str, torch.Tensor]) -> None:
            for name in list(state):
                state[change(name)] = state.pop(name)

        edit_state(directory / FILE, rename)

    return do


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_state(directory / FILE, lambda state: state.pop(name))


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], str]:
    def do(directory: Path) -> str:
        change_tensor(directory, name, to)
        return name

    return do


def remove_the_weights(directory: Path) -> str:
    (directory / FILE).unlink()
    return CONFIG


def lay_pickles_beside(directory: Path) -> str:
    torch.save({}, directory / "adapter_model.bin")
    return "adapter_model.bin"


def remove_the_config(directory: Path) -> str:
    (directory / CONFIG).unlink()
    return CONFIG


def cut_the_config(directory: Path) -> str:
    (directory / CONFIG).write_text((directory / CONFIG).read_text()[:-3])
    return CONFIG


def lose_a_pair(directory: Path) -> str:
    remove(A)(directory)
    return B


def lose_a_target(directory: Path) -> str:
    for name in (A, B, A.replace("layers.1", "layers.0"), B.replace("layers.1", "layers.0")):
        remove(name)(directory)
    return CONFIG


def add_a_weight_of_the_base(directory: Path) -> str:
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    edit_state(directory / FILE, lambda state: state.update({name: torch.ones(20, 10)}))
    return name


def keep_only_base_weights(directory: Path) -> str:
    name = "base_model.model.model.norm.weight"
    store({name: torch.ones(10)}, directory / FILE)
    return CONFIG


def leave_the_adapters_name(directory: Path) -> None:
    renamed(lambda name: name.replace("lora_A.", "lora_A.default."))(directory)


def store_nothing(directory: Path) -> str:
    store({}, directory / FILE)
    return FILE


def lose_a_layer(directory: Path) -> str:
    remove(A)(directory)
    remove(B)(directory)
    return CONFIG


def copy_dora(directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "peft/zero2-olmo2-dora/truth/adapter", directory))


def copy_loha(directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "peft/zero2-olmo2-loha/truth/adapter", directory))


def copy_prompt(directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "peft/zero2-olmo2-prompt/truth/adapter", directory))


def flatten_the_first(directory: Path) -> str:
    name = min(load_file(directory / FILE))
    return change(name, lambda t: t.flatten())(directory)


def lose_the_last(directory: Path) -> None:
    edit_state(directory / FILE, lambda state: state.pop(max(state)))


BASE = also("adapter-base-tensor")
DAMAGES = [
    Damage("no-weights", remove_the_weights, copy_adapter),
    Damage("pickled-weights-beside", lay_pickles_beside, copy_adapter),
    Damage("adapter-config-invalid", config(rank_pattern=[4]), copy_adapter, also("adapter-rank")),
    Damage("adapter-config-invalid", remove_the_config, copy_adapter),
    Damage("adapter-config-invalid", cut_the_config, copy_adapter),
    Damage("adapter-config-invalid", without("peft_type"), copy_adapter),
    Damage("adapter-type-unknown", config(peft_type="LORAX"), copy_adapter),
    Damage("adapter-base-unnamed", config(base_model_name_or_path=None), copy_adapter),
    Damage("adapter-base-unnamed", config(base_model_name_or_path=""), copy_norms),
    Damage("adapter-alpha", config(lora_alpha=0), copy_adapter),
    Damage("adapter-alpha", without("lora_alpha"), copy_adapter),
    Damage("adapter-alpha", config(alpha_pattern={"q_proj": -1}), copy_adapter),
    Damage("adapter-rank", lambda d: config(r=8)(d) and A, copy_adapter),
    Damage("adapter-rank", without("r"), copy_adapter),
    Damage("adapter-rank", lambda d: config(rank_pattern={})(d) and A.replace("1", "0"), copy_adapter),
    Damage("adapter-rank", change(A, lambda t: t[:3]), copy_adapter),
    Damage("adapter-rank", change(B, lambda t: t[:, :3]), copy_adapter),
    Damage("adapter-shape", change(A, lambda t: t.flatten()), copy_adapter),
    Damage("adapter-shape", change(B, lambda t: t[:0]), copy_adapter),
    Damage("adapter-pair", lose_a_pair, copy_adapter),
    Damage("adapter-pair", lose_the_last, copy_dora),
    Damage("adapter-shape", flatten_the_first, copy_loha),
    Damage("adapter-shape", flatten_the_first, copy_prompt),
    Damage("adapter-pair", lambda d: remove(B)(d) or A, copy_adapter),
    Damage("adapter-target", config(target_modules=["q_proj", "v_proj"]), copy_adapter),
    Damage("adapter-target", config(target_modules=None), copy_adapter),
    Damage("adapter-target", config(target_modules=r".*self_attn\..*"), copy_adapter),
    Damage("adapter-target", config(target_modules="("), copy_adapter),
    Damage("adapter-target", config(rank_pattern={"a{99999999999}": 2}), copy_adapter),
    Damage("adapter-target", lose_a_target, copy_adapter, severity="warning"),
    Damage("adapter-name", renamed(lambda n: n.removeprefix("base_model.model.")), copy_adapter),
    Damage("adapter-name", leave_the_adapters_name, copy_adapter, also("adapter-pair")),
    Damage("adapter-name", renamed(lambda n: "module." + n), copy_adapter),
    Damage("adapter-name", renamed(lambda n: n.replace("base_model", "_orig_mod")), copy_norms),
    Damage("adapter-empty", keep_only_base_weights, copy_adapter, BASE | also("adapter-target")),
    Damage("adapter-empty", store_nothing, copy_adapter),
    Damage("adapter-empty", store_nothing, copy_norms),
    Damage("adapter-shape", change(HEAD, lambda t: t.flatten()[:0]), copy_adapter_with_head),
    Damage("adapter-shape", change(HEAD, lambda t: t.flatten()[:64]), copy_adapter_with_head),
    Damage("adapter-layer-missing", lose_a_layer, copy_adapter_beside_its_base),
    Damage("adapter-shape", change(A, lambda t: t[:, :5]), copy_adapter_beside_its_base),
    Damage("adapter-base-tensor", add_a_weight_of_the_base, copy_adapter),
    Damage("adapter-module-missing", remove(HEAD), copy_adapter_with_head),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found_and_called_what_it_is(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.must_be_found(tmp_path, monkeypatch)


ADAPTERS = sorted(FIXTURES.glob("peft/*/truth/adapter"))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.parts[-3])
def test_what_peft_writes_is_clean(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_here(monkeypatch)

    found = verify(adapter, read_data=True)

    assert not found.problems
    assert found.tensors
    assert any("adapter of" in what for what in found.checked)


def test_a_target_that_the_config_excludes_needs_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    copy_adapter(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / CONFIG, lambda data: data["target_modules"].append("o_proj"))
    for excluded, expected in (
        (["o_proj"], set()),
        (["layers.0.self_attn.o_proj"], {"adapter-target"}),
    ):
        config(exclude_modules=excluded)(tmp_path / "adapter")
        assert kinds(verify(tmp_path / "adapter")) == expected


MERGED = [path for path in ADAPTERS if (path.parent / "merged" / "config.json").is_file()]


@pytest.mark.parametrize("adapter", MERGED, ids=lambda path: path.parts[-3])
def test_what_peft_writes_is_clean_beside_its_base(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged model has the names and shapes of the base."""
    answer_here(monkeypatch)

    assert not verify(adapter, base=adapter.parent / "merged").problems


def test_the_fixtures_have_every_trait() -> None:
    assert len(ADAPTERS) > 45


def test_an_adapter_beside_the_model_is_checked_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of the adapters' names, as PEFT saves several."""
    answer_here(monkeypatch)
    source = FIXTURES / "peft/zero3-olmo2-two-adapters/truth/adapter"
    folder = next(path.parent for path in source.glob("*/adapter_config.json"))
    copy_adapter(tmp_path / "out")
    copy_adapter(tmp_path / "out" / folder.name)
    config(lora_alpha=None)(tmp_path / "out" / folder.name)

    (problem,) = verify(tmp_path / "out").problems

    assert (problem.kind, problem.file) == ("adapter-alpha", f"{folder.name}/{CONFIG}")


def test_a_classifier_names_two_heads_and_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_here(monkeypatch)
    reward = FIXTURES / "peft/zero3-olmo2-reward/truth/adapter"

    assert '"classifier"' in (reward / CONFIG).read_text()
    assert kinds(verify(reward)) == set()


def test_factors_of_stacked_experts_may_have_several_times_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here(monkeypatch)
    source = FIXTURES / "peft/zero2-qwen3-moe-experts/truth/adapter"
    directory = tmp_path / "adapter"
    directory.mkdir()
    for file in (CONFIG, FILE):
        (directory / file).write_bytes((source / file).read_bytes())
    assert kinds(verify(directory)) == set()

    config(r=4)(directory)

    assert kinds(verify(directory)) == {"adapter-rank"}
