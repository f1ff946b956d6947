"""Holds `make_zero.py` to DeepSpeed: its values, by DeepSpeed's own reader, and its layout.

`check_make_zero.py` generates small awkward checkpoints (padding, sub-groups, more ranks than some
parameters have elements), reads them with `get_fp32_state_dict_from_zero_checkpoint` and compares
with the recomputed truth. Given REAL checkpoints from an untied training run and the run's
config, it also generates the same model and compares every file: zip records, keys, order, types,
dtypes, shapes, storage sizes and offsets. Only numbers and strings may differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_zero
import torch
import transformers
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from make_zero import DEFAULT_SUB_GROUP
from models import choose_config

# Stage, ranks, sub-group size: padding in each, and with 64 ranks parts that are all padding.
SMALL = (
    (2, 3, DEFAULT_SUB_GROUP),
    (2, 7, DEFAULT_SUB_GROUP),
    (3, 7, DEFAULT_SUB_GROUP),
    (3, 64, 9_000),
)


def generate(config: transformers.PretrainedConfig, out: Path, **options: Any) -> make_zero.Job:
    settings = {"seed": 7, "moments": True, "sub_group_size": DEFAULT_SUB_GROUP}
    job = make_zero.plan(config, out, **(settings | options))
    manifest = make_zero.write(job)
    (out / make_zero.MANIFEST).write_text(json.dumps(manifest))
    return job


def wrong_values(job: make_zero.Job) -> Iterator[str]:
    found = get_fp32_state_dict_from_zero_checkpoint(str(job.out))
    if list(found) != [p.name for p in job.parameters]:
        yield "names or their order"
    for parameter in job.parameters:
        truth = torch.from_numpy(job.values.take(parameter.name, 0, parameter.numel))
        truth = truth.view(parameter.shape)
        if not torch.equal(found[parameter.name], truth):
            yield parameter.name
        if job.stage == 2:
            path = job.folder / "mp_rank_00_model_states.pt"
            module = torch.load(path, mmap=True, weights_only=True)["module"]
            if not torch.equal(module[parameter.name], truth.to(torch.bfloat16)):
                yield f"{parameter.name} in module"
    needed = sum(p.numel for p in job.parameters) * 4
    masters = json.loads((job.out / make_zero.MANIFEST).read_text())["masters"]
    if sum(entry["bytes"] for entry in masters) < needed:
        yield "manifest"


def listing(value: object, path: str = "") -> Iterator[str]:
    """One line for each node of what a file unpickles to, without its numbers and strings."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    yield f"{path}: {kind} attributes {sorted(getattr(value, '__dict__', {}))}"
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage().nbytes()
        place = f"offset {value.storage_offset()} of {storage} bytes"
        yield f"{path}: {value.dtype} {tuple(value.shape)} {place} grad {value.requires_grad}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from listing(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from listing(item, f"{path}/{index}")
    if hasattr(value, "_metadata"):
        yield from listing(value._metadata, f"{path}#metadata")
    if isinstance(value, (torch.Size, fragment_address, ZeroStageEnum)):
        yield f"{path}: {value!r}"
    if path.endswith(("paddings", "partition_count", "world_size", "ds_version")):
        yield f"{path}: {value!r}"


def layout(file: Path) -> list[str]:
    with zipfile.ZipFile(file) as archive:
        # The pickle's own length depends on numbers in it; the records' order and sizes do not.
        records = [
            f"{entry.filename} {0 if entry.filename.endswith('data.pkl') else entry.file_size}"
            for entry in archive.infolist()
        ]
    return records + list(listing(torch.load(file, weights_only=False)))


def wrong_layout(real: Path, made: Path) -> Iterator[str]:
    real_folder = real / (real / "latest").read_text()
    made_folder = made / (made / "latest").read_text()
    names = sorted(path.name for path in real_folder.iterdir())
    if names != sorted(path.name for path in made_folder.iterdir()):
        yield f"files of {made_folder}"
        return
    for name in names:
        expected, found = layout(real_folder / name), layout(made_folder / name)
        print(f"  {name}: {len(expected)} lines")
        if expected != found:
            yield f"{name}: lacks {sorted(set(expected) - set(found))[:5]}"
            yield f"{name}: invents {sorted(set(found) - set(expected))[:5]}"


def settings_of(real: Path) -> dict[str, int]:
    files = sorted((real / (real / "latest").read_text()).glob("*_model_states.pt"))
    state = torch.load(files[0], weights_only=False)
    zero = state["ds_config"]["zero_optimization"]
    sub_group_size = zero.get("sub_group_size", DEFAULT_SUB_GROUP)
    ranks = state["dp_world_size"]
    return {"stage": zero["stage"], "ranks": ranks, "sub_group_size": sub_group_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("real", nargs="*", type=Path, metavar="REAL")
    parser.add_argument("--config", type=Path, help="config.json of the run that wrote REAL")
    options = parser.parse_args()
    problems = []
    cases = [
        {"stage": stage, "ranks": ranks, "sub_group_size": size} for stage, ranks, size in SMALL
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases):
            config = choose_config("olmo2" if number % 2 else "llama", 2_000_000)
            job = generate(config, Path(scratch, str(number)), **case)
            problems += [f"{case}: {problem}" for problem in wrong_values(job)]
        for number, real in enumerate(options.real):
            made = Path(scratch, f"like-real-{number}")
            config = transformers.AutoConfig.from_pretrained(options.config)
            generate(config, made, **settings_of(real))
            problems += [f"{real}: {problem}" for problem in wrong_layout(real, made)]
    print("\n".join(problems) or "no difference")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
