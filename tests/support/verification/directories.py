"""Finished directories, made by transformers and PEFT themselves, and the means to damage copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from ckpt_tools import consolidate, extract_lora
from ckpt_tools.hub import reference
from ckpt_tools.hub.reference import child
from ckpt_tools.verification import KINDS, Verdict, text, verify
from tests.conftest import FIXTURES
from tests.transforms.test_hub_layout import ARCHITECTURES, fill

if TYPE_CHECKING:
    import pytest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Header = dict[str, Any]
Maker = Callable[[Path], Path]


def save(directory: Path, title: str, *, shard: int | None = None, **changes: Any) -> Path:
    """What ``save_pretrained`` writes of a tiny model in bf16, its values random."""
    model_class = getattr(transformers, title.split()[0])
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(ARCHITECTURES[title] | changes)))
    fill(model)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard or "1GB")
    return directory


def save_sharded_llama(directory: Path) -> Path:
    return save(directory, "LlamaForCausalLM", shard=12_000)


def save_llama(directory: Path) -> Path:
    return save(directory, "LlamaForCausalLM")


def save_tied(directory: Path) -> Path:
    return save(directory, "Qwen3ForCausalLM tied")


def save_mixture(directory: Path) -> Path:
    return save(directory, "MixtralForCausalLM")


def save_gpt2(directory: Path) -> Path:
    return save(directory, "GPT2LMHeadModel")


def save_vision(directory: Path) -> Path:
    return save(directory, "LlavaForConditionalGeneration")


def save_translator(directory: Path) -> Path:
    return save(directory, "MarianMTModel")


def save_pickled(directory: Path) -> Path:
    """A directory as transformers 4 wrote it with ``safe_serialization=False``, in two shards."""
    save_llama(directory)
    state = load(directory / SINGLE)
    (directory / SINGLE).unlink()
    names = sorted(state)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    weight_map: dict[str, str] = {}
    for number, held in halves.items():
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in held}, directory / file)
        weight_map |= dict.fromkeys(held, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def copy_adapter(directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "peft/zero3-olmo2-patterns/truth/adapter", directory))


def copy_adapter_beside_its_base(directory: Path) -> Path:
    """Its config names a directory with the base's layers."""
    copy_adapter(directory)
    base = FIXTURES / "peft/zero3-olmo2-patterns/truth/merged"
    edit_json(
        directory / "adapter_config.json",
        lambda data: data.update(base_model_name_or_path=str(base)),
    )
    return directory


def copy_adapter_with_head(directory: Path) -> Path:
    source = FIXTURES / "peft/zero3-olmo2-modules-to-save/truth/adapter"
    return Path(shutil.copytree(source, directory))


def copy_norms(directory: Path) -> Path:
    source = FIXTURES / "peft/zero2-olmo2-ln-tuning/truth/adapter"
    return Path(shutil.copytree(source, directory))


def write_chat_model(directory: Path) -> Path:
    """What this package writes of a chat model, with manifest and checksums."""
    source = FIXTURES / "zero/zero3-bf16-olmo2-chat-2ranks"
    consolidate(source / "checkpoint", directory, config=source / "hf", sha256=True)
    return directory


def write_adapters(directory: Path) -> Path:
    """What this package writes of two adapters: the second in a folder, with a manifest of its own."""
    source = FIXTURES / "peft/zero3-olmo2-two-adapters"
    extract_lora(
        source / "checkpoint",
        directory,
        adapter="all",
        adapter_config=source / "truth/adapter",
        sha256=True,
    )
    return directory


_HOME = TemporaryDirectory(prefix="verify-")
_made: dict[Maker, Path] = {}


def copy_of(maker: Maker, directory: Path) -> Path:
    """A copy of a good directory, which is made once for all tests."""
    if maker not in _made:
        _made[maker] = maker(Path(_HOME.name, maker.__name__))
    return Path(shutil.copytree(_made[maker], directory))


class Damage(NamedTuple):
    """A way to damage a copy of a good directory.

    Attributes:
        kind: what it must be called.
        do: does it, and may return the file or the tensor that must be named.
        to: makes the directory.
        also: other kinds that it is, besides.
        severity: how bad it is.
    """

    kind: str
    do: Callable[[Path], object]
    to: Maker = save_sharded_llama
    also: frozenset[str] = frozenset()
    severity: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}-{getattr(self.do, '__name__', 'do')}"

    def must_be_found(self, scratch: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        """Verify a damaged copy: it has this problem, those that come with it, and no other."""
        answer_here(monkeypatch)
        directory = copy_of(self.to, scratch / "directory")
        assert not verify(directory, **options).problems or self.to is save_pickled
        where = self.do(directory)
        verdict = verify(directory, **options)
        assert kinds(verdict) == {self.kind, *self.also}, verdict.problems
        named = [problem for problem in verdict.problems if problem.kind == self.kind]
        places = {place for problem in named for place in (problem.file, problem.tensor)}
        assert where is None or where in places, (where, named)
        severity = self.severity or KINDS[self.kind].severity
        assert {problem.severity for problem in named} == {severity}, named


def also(*names: str) -> frozenset[str]:
    return frozenset(names)


def answer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask transformers in this process, where it is loaded anyway; tokenizers have their own tests."""
    monkeypatch.setattr(reference, "ask", lambda _, question: child._answer(json.loads(question)))
    monkeypatch.setattr(text, "check_text", lambda directory, findings: None)


def kinds(verdict: Verdict) -> set[str]:
    return {problem.kind for problem in verdict.problems}


# -- files ------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def store(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Load, change and save the tensors of one file."""
    state = load(path)
    change(state)
    store(state, path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def split(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Header | str, data: bytes, *, padded: bool = True) -> None:
    """A safetensors file of any header and any data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8 if padded else 1 - len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(path: Path, change: Callable[[Header], Any]) -> None:
    header, data = split(path)
    change(header)
    join(path, header, data)


def first(path: Path) -> str:
    """The tensor that lies first in a file."""
    header, _ = split(path)
    header.pop("__metadata__", None)
    return min(header, key=lambda name: header[name]["data_offsets"])


def last(path: Path) -> str:
    header, _ = split(path)
    header.pop("__metadata__", None)
    return max(header, key=lambda name: header[name]["data_offsets"])


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def rename(directory: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a model in one file other names."""
    state = load(directory / SINGLE)
    store({change(name): tensor for name, tensor in state.items()}, directory / SINGLE)


def change_tensor(
    directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put another tensor in the place of one, in a model or an adapter of one file."""
    path = next(
        p for p in (directory / SINGLE, directory / "adapter_model.safetensors") if p.exists()
    )

    def put(state: dict[str, torch.Tensor]) -> None:
        state[name] = change(state[name]).contiguous()

    edit_state(path, put)
