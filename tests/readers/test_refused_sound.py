"""Sound checkpoints that are refused: each message has the layout's name, what is lacking, and a next step.

No such message calls a file damaged, missing, or of another model, run or machine where that is not the fact.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import consolidate
from ckpt_tools.errors import CkptError, NotACheckpoint, UnsupportedLayout
from tests.support import damage
from tests.support.readers.contract import FIXTURES

LAYOUTS, ZERO, RANKS = FIXTURES / "layouts", FIXTURES / "zero", FIXTURES / "rank_files"
AUTOTP = LAYOUTS / "autotp-zero2-bf16-qwen2-4ranks"
NVME = LAYOUTS / "zero3-bf16-qwen3-tied-frozen-nvme-2ranks"
PIPELINE = LAYOUTS / "pipeline-zero1-bf16-llama-4ranks"
INFO = "universal_checkpoint_info"
SOUND_IS_NOT = re.compile(
    r"damag|corrupt|missing|truncat|overwrit|was changed|exchanged|malformed"
    r"|(another|other|different|two) (machine|model|run|save|checkpoint)s?\b"
)


def tree(case: Path, tmp_path: Path) -> Path:
    """A copy of a case; returns the directory of its shards, beside which the rest of the copy lies."""
    root = tmp_path / case.name
    shutil.copytree(case, root, dirs_exist_ok=True)
    pointer = next(iter((root / "checkpoint").glob("latest*")), None)
    return root / "checkpoint" / (pointer.read_text() if pointer is not None else "")


def recorded(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """AutoTP whose model files were changed."""

    def make(tmp_path: Path) -> Path:
        directory = tree(AUTOTP, tmp_path)
        for path in damage.model_files(directory):
            damage.edit(path, change)
        return directory

    return make


def scaled(content: dict[str, Any]) -> None:
    for rank in content[INFO]["affine_map"]["params"][r"^model\.norm\.weight$"]["ranks"].values():
        rank["pieces"][0]["scale"] = 0.5


def averaged(content: dict[str, Any]) -> None:
    del content[INFO]["affine_map"]
    content[INFO]["parameter_to_average_patterns"] = [r".*norm\.weight"]


def undescribed(content: dict[str, Any]) -> None:
    del content[INFO]["affine_map"]["params"][r"^lm_head\.weight$"]
    content[INFO]["autotp_unsupported_parameter_patterns"] = {r"^lm_head\.weight$": "interleaved"}


def fused(tmp_path: Path) -> Path:
    """Gate and up in one parameter, and no record of how its rows are cut."""
    directory = tree(LAYOUTS / "autotp-zero1-bf16-phi3-fused-2ranks", tmp_path)
    for path in damage.model_files(directory):
        damage.edit(path, lambda content: content.pop(INFO))
    return directory


def without(case: Path, *patterns: str) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        directory = tree(case, tmp_path)
        for pattern in patterns:
            for path in list(directory.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return directory

    return make


def swapped_together(tmp_path: Path) -> Path:
    """Swap files as DeepSpeed 0.16 copied them: those of one rank, without its number."""
    directory = tree(NVME, tmp_path)
    for path in (directory / "offloaded_tensors" / "rank00").iterdir():
        path.rename(directory / "offloaded_tensors" / path.name)
    for rank in ("rank00", "rank01"):
        shutil.rmtree(directory / "offloaded_tensors" / rank)
    return directory


def renumbered(tmp_path: Path) -> Path:
    """Numbers of parameters that follow another order than the module's; two files of one size."""
    directory = tree(NVME, tmp_path)
    for folder in (directory / "offloaded_tensors").iterdir():
        (folder / "1_7.tensor.swp").rename(folder / "8_3.tensor.swp")
    return directory


def zenflow(tmp_path: Path) -> Path:
    """A checkpoint whose settings say ZenFlow, which writes the files that plain ZeRO-2 does."""
    directory = tree(ZERO / "zero2-bf16-llama-cpu-offload-2ranks", tmp_path)
    for path in (*damage.model_files(directory), *damage.optim_files(directory)):
        damage.edit(
            path, lambda c: c["ds_config"]["zero_optimization"].update(zenflow={"topk_ratio": 0.1})
        )
    return directory


def of_experts(tmp_path: Path) -> Path:
    directory = tree(PIPELINE, tmp_path)
    source = LAYOUTS / "moe-zero1-bf16-native-2ranks" / "checkpoint" / "global_step2"
    shutil.copy(next(source.glob("layer_0_expert_0_*")), directory)
    return directory


def with_names(*names: str) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        for name in names:
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return tmp_path / "run"

    return make


def a_model_object(tmp_path: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def torchscript(tmp_path: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def whole(case: Path) -> Callable[[Path], Path]:
    return lambda tmp_path: tree(case, tmp_path)


@dataclass(frozen=True)
class Refusal:
    """A sound input, and what its refusal must say.

    Attributes:
        make: makes it.
        layout: the layout's name.
        lacking: what is lacking for reading it.
        step: the next step.
        options: of ``consolidate``; the config lies beside the checkpoint.
        gone: files of it were never copied, which the message may say.
    """

    make: Callable[[Path], Path]
    layout: str
    lacking: str
    step: str
    options: tuple[tuple[str, Any], ...] = ()
    gone: bool = False


WEIGHTS_ONLY = (("weights_only", True),)
REFUSALS = {
    "tensor parallel, no record": Refusal(
        recorded(lambda content: content.pop(INFO)),
        "a tensor-parallel checkpoint of 2 ranks", "does not record how its slices are cut",
        "--config", WEIGHTS_ONLY),
    "tensor parallel, fused": Refusal(
        fused, "a tensor-parallel checkpoint of 2 ranks", "may fuse several parameters", "AutoTP of DeepSpeed 0.19"),
    "scaled": Refusal(recorded(scaled), "ranks hold it scaled", "scaled", "ds_to_universal.py", WEIGHTS_ONLY),
    "averaged": Refusal(
        recorded(averaged), "tensor-parallel ranks", "must be averaged", "ds_to_universal.py", WEIGHTS_ONLY),
    "undescribed": Refusal(
        recorded(undescribed), "how it is cut", "could not describe", "ds_to_universal.py", WEIGHTS_ONLY),
    "later record": Refusal(
        recorded(lambda content: content[INFO]["affine_map"].update(version=2)),
        "affine_map", "version 2", "ds_to_universal.py", WEIGHTS_ONLY),
    "experts and tensor parallel": Refusal(
        recorded(lambda content: content.update(num_experts=[4])),
        "experts and model parallelism", "2 model-parallel ranks", "torch.save", WEIGHTS_ONLY),
    "experts and pipeline": Refusal(
        of_experts, "a DeepSpeed pipeline with native MoE layers", "files without stages", "torch.save", WEIGHTS_ONLY),
    "pipeline, no key map": Refusal(
        whole(PIPELINE), "numbered by the layers of a pipeline", "called model.embed_tokens", "--key-map"),
    "NVMe, not copied": Refusal(
        without(NVME, "offloaded_tensors"), "ZeRO-3 with the optimizer on NVMe",
        "the save did not copy them", "offloaded_tensors/rankNN", WEIGHTS_ONLY),
    "NVMe, one folder": Refusal(
        swapped_together, "ZeRO-3 with the optimizer on NVMe", "lie in one folder", "save_16bit_model", WEIGHTS_ONLY),
    "NVMe, other numbers": Refusal(
        renumbered, "ZeRO-3 with the optimizer on NVMe", "do not determine which sub-groups",
        "save_16bit_model", WEIGHTS_ONLY),
    "ZenFlow": Refusal(
        zenflow, "a ZeRO-2 checkpoint of ZenFlow", "lack the updates of the selected columns", "--weights model",
        WEIGHTS_ONLY),
    "ZeRO-3, no masters": Refusal(
        without(ZERO / "zero3-bf16-llama-groups-2ranks", "*optim_states.pt"),
        "a ZeRO-3 checkpoint", "without its optimizer files, which hold the weights", "--also", WEIGHTS_ONLY, gone=True),
    "ZeRO-2, no masters": Refusal(
        without(ZERO / "zero2-bf16-llama-3ranks", "*optim_states.pt"),
        "a ZeRO-2 checkpoint", "without its optimizer files, which hold the masters", "--weights model", WEIGHTS_ONLY,
        gone=True),
    "ZeRO-2, no model file": Refusal(
        without(ZERO / "zero2-bf16-llama-3ranks", "*model_states.pt"),
        "a DeepSpeed checkpoint", r"no \*_model_states.pt file", "--also", WEIGHTS_ONLY, gone=True),
    "ZeRO-3, frozen, a model file": Refusal(
        without(ZERO / "zero3-bf16-llama-frozen-3ranks", "zero_pp_rank_1_*model_states.pt"),
        "model_states", "1 of 3", "--also", WEIGHTS_ONLY, gone=True),
    "AutoTP, half of it": Refusal(
        without(AUTOTP, "*mp_rank_01_*"), "model-parallel ranks", "1 of 2", "--also", WEIGHTS_ONLY, gone=True),
    "MoE, an expert": Refusal(
        without(LAYOUTS / "moe-zero2-bf16-native-4ranks", "layer_0_expert_1_*"),
        "files of experts", "layer_0_expert_1", "--also", WEIGHTS_ONLY, gone=True),
    "universal, no model files": Refusal(
        without(LAYOUTS / "universal-zero1-bf16-llama-2ranks", "*model_states.pt"),
        "a universal checkpoint", "without its model files", "ds_to_universal.py again", WEIGHTS_ONLY, gone=True),
    "frozen left out": Refusal(
        whole(ZERO / "zero3-bf16-llama-frozen-excluded-2ranks"),
        "LlamaForCausalLM", "the checkpoint lacks", "exclude_frozen_parameters"),
    "16-bit of ZeRO-3": Refusal(
        whole(ZERO / "zero3-bf16-llama-groups-2ranks"),
        "ZeRO-3", "no 16-bit weights are kept", "--dtype auto", (("weights", "model"),)),
    "no config": Refusal(
        lambda tmp_path: tree(LAYOUTS / "moe-zero0-fp32-native-2ranks", tmp_path),
        "config.json", "no config.json of a model was found", "--weights-only"),
    "Megatron-LM": Refusal(
        with_names("latest_checkpointed_iteration.txt", "mp_rank_00/model_optim_rng.pt"),
        "Megatron-LM", "is not read", "Convert it"),
    "DeepSpeed-Inference": Refusal(
        with_names("ds_inference_config.json", "non-tp.pt", "tp_00_00.pt"),
        "DeepSpeed-Inference", "is not read", "Use the model"),
    "Orbax": Refusal(with_names("_CHECKPOINT_METADATA"), "Orbax", "is not read", "safetensors"),
    "GGUF": Refusal(with_names("model.gguf"), "GGUF", "is not read", "gguf_file"),
    "TensorFlow": Refusal(with_names("tf_model.h5"), "TensorFlow", "is not read", "from_tf"),
    "NeMo": Refusal(with_names("model.nemo"), "NeMo", "is not read", "export"),
    "optimizer only": Refusal(
        with_names("optimizer.pt", "scheduler.pt"), "checkpoint of a known format",
        "optimizer.pt, scheduler.pt", "Pass the directory"),
    "a model object": Refusal(a_model_object, "a pickled", "not a state dict", "state_dict", WEIGHTS_ONLY),
    "TorchScript": Refusal(torchscript, "TorchScript", "not a checkpoint", "torch.jit.load", WEIGHTS_ONLY),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_sound_checkpoint_is_refused_by_its_layout(name: str, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    made = refusal.make(tmp_path)
    options: dict[str, Any] = dict(refusal.options)
    config = made.parent.parent / "hf"
    if config.is_dir() and "weights_only" not in options:
        options["config"] = config
    with pytest.raises(CkptError) as caught:
        consolidate(made, tmp_path / "out", **options)
    error = caught.value
    said = f"{error.fact} {error.hint}"
    assert re.search(refusal.layout, error.fact), error
    assert re.search(refusal.lacking, said), error
    assert error.hint and refusal.step in error.hint, error
    if refusal.gone:
        said = re.sub(r"(files (are|of experts are) |model-parallel ranks are )missing", "", said)
        said = said.replace("on the other machines: copy the folder of every machine", "")
    assert not SOUND_IS_NOT.search(said), error
    assert not (tmp_path / "out").exists()


def every_message() -> set[tuple[type[CkptError], str, str]]:
    """All messages of the package, as docs/messages.md lists them."""
    path = FIXTURES.parent / "docs" / "error_messages.py"
    spec = importlib.util.spec_from_file_location("error_messages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return set(module.Source.of_the_package().errors())


@pytest.mark.slow
def test_no_message_about_an_unread_layout_blames_the_files() -> None:
    """`UnsupportedLayout` and `NotACheckpoint` are said of sound files alone; each has a next step."""
    said = [one for one in every_message() if one[0] in (UnsupportedLayout, NotACheckpoint)]
    assert len(said) > 60
    blaming = [fact for _, fact, hint in said if SOUND_IS_NOT.search(f"{fact} {hint}")]
    assert blaming == []
    spoken = {fact for _, fact, hint in said if hint}
    # A path that does not exist has no next step; the hints of other formats are in a table, walked above.
    spoken |= {"no such file or directory", "… is not read"}
    assert [fact for _, fact, _ in said if fact not in spoken] == []
