"""Real frameworks around tiny models: each trains two steps and saves its own checkpoint.

For the processes of a torchrun, and for one alone. Knows nothing of ckpt_tools: what is saved here is what a
conversion is given.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
# Of the processes: read when torch, deepspeed and transformers are imported.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
BASE_NAME = "base"


@dataclass
class Subject:
    """A model to train, and how it is saved.

    Attributes:
        recipe: the module and its data, from the fixtures.
        model: the transformers model whose config is passed to the conversion; None for weights alone.
        options: of the save.
    """

    recipe: Any
    model: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trained:
    """A model after its steps.

    Attributes:
        model: as training calls it.
        checkpoint: saves the framework's own checkpoint in a directory.
        accelerator: the accelerator, if there is one.
    """

    model: Any
    checkpoint: Callable[[Path], None]
    accelerator: Any = None


class Small(nn.Module):
    """Odd sizes and persistent buffers, and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 7, bias=False)
        self.third = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        loss: torch.Tensor = self.third(torch.tanh(self.second(hidden))).square().mean()
        return loss


@dataclass
class SmallRecipe:
    """What the fixtures' recipes have too."""

    module: nn.Module
    language_model: Any = None
    tokenizer: Any = None

    def batch(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random features."""
        return {"x": torch.randn(6, 5, generator=generator)}


def subject(name: str) -> Subject:
    """A model by its name."""
    if name == "small":
        return Subject(SmallRecipe(Small()), None, {"weights_only": True})
    if str(FIXTURES) not in sys.path:
        sys.path.insert(0, str(FIXTURES))
    if name == "two_heads":
        recipe = importlib.import_module("sharded").two_heads()
    else:
        # An engine that Accelerate made would still partition every new model.
        importlib.import_module("transformers.integrations").unset_hf_deepspeed_config()
        recipe = importlib.import_module("zero_models").MODELS[name]()
    if name == "policy_and_value":
        return Subject(recipe, recipe.language_model, {"attribute": "policy"})
    if name.startswith("olmo2_lora"):
        recipe.module.peft_config["default"].base_model_name_or_path = BASE_NAME
        return Subject(recipe, recipe.language_model, {"adapter": "default"})
    if recipe.language_model is None:
        return Subject(recipe, None, {"weights_only": True})
    return Subject(recipe, recipe.language_model)


def train(
    recipe: Any, module: Any, backward: Callable[[Any], Any], step: Callable[[], Any]
) -> None:
    """Two steps, each rank on data of its own; running statistics are made to agree."""
    module.train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(2):
        output = module(**recipe.batch(generator))
        backward(output if isinstance(output, torch.Tensor) else output.loss)
        step()
        if dist.is_initialized():
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def stepper(module: nn.Module) -> Callable[[], None]:
    """An optimizer's step."""
    trained = [p for p in module.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


# -- DeepSpeed ----------------------------------------------------------------------------------------


def quiet_deepspeed() -> Any:
    """DeepSpeed, without its shared-memory all_reduce, which spins on every core."""
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    import deepspeed

    if dist.is_initialized():
        deepspeed.init_distributed("gloo")
    return deepspeed


def zero(
    stage: int,
    recipe: Any,
    *,
    zero: dict[str, Any] | None = None,
    flat_masters: bool = False,
    **config: Any,
) -> Trained:
    """A bare engine.

    Args:
        stage: of ZeRO.
        recipe: what to train.
        zero: the config's ``zero_optimization``.
        flat_masters: keep the masters of stage 0 in flat groups, as DeepSpeed does for its own FusedAdam.
        **config: the rest of the config.
    """
    deepspeed = quiet_deepspeed()
    trained = [p for p in recipe.module.parameters() if p.requires_grad]
    adamw = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}
    # Which Adam steps does not matter to where masters lie, and FusedAdam is compiled for a minute.
    fused = torch.optim.AdamW if flat_masters else deepspeed.ops.adam.FusedAdam
    with patch("deepspeed.runtime.engine.FusedAdam", fused):
        engine, *_ = deepspeed.initialize(
            model=recipe.module,
            model_parameters=trained,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": adamw,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": stage, **(zero or {})},
                "bf16": {"enabled": True},
                **config,
            },
        )
    train(recipe, engine, engine.backward, engine.step)
    return Trained(engine, lambda path: engine.save_checkpoint(str(path)))


# -- FSDP ---------------------------------------------------------------------------------------------


def blocks(recipe: Any) -> list[nn.Module]:
    """The decoder layers."""
    return [] if recipe.language_model is None else list(recipe.language_model.model.layers)


def fsdp2(recipe: Any, mesh: Any = None) -> Trained:
    """FSDP2, saved by torch's distributed checkpoint."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in recipe.module.parameters():
        # FSDP2 cannot reduce the gradient of a tensor without elements.
        parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    for block in blocks(recipe):
        fully_shard(block, mesh=mesh)
    module = fully_shard(recipe.module, mesh=mesh)
    train(recipe, module, torch.Tensor.backward, stepper(module))
    return Trained(module, functools.partial(save_dcp, module))


def hsdp(recipe: Any) -> Trained:
    """Replicas of shards."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (2, dist.get_world_size() // 2)
    return fsdp2(recipe, init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")))


def fsdp_and_tensor_parallel(recipe: Any) -> Trained:
    """Boxes: tensor parallel over two ranks, and FSDP2 on top of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plans = importlib.import_module("sharded")
    parallelize_module(recipe.module, mesh["tp"], plans.ENDS_TP_PLAN)
    for block in blocks(recipe):
        parallelize_module(block, mesh["tp"], plans.LAYER_TP_PLAN)
    return fsdp2(recipe, mesh["dp"])


def save_dcp(module: nn.Module, path: Path) -> None:
    """What loops do with FSDP."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": module.state_dict()}, checkpoint_id=path)


def fsdp1(recipe: Any, *, use_orig_params: bool) -> Trained:
    """FSDP1, saved as a sharded state."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    layers = {type(block) for block in blocks(recipe)}
    module = FullyShardedDataParallel(
        recipe.module,
        auto_wrap_policy=functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls=layers
        ),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    train(recipe, module, torch.Tensor.backward, stepper(module))

    def checkpoint(path: Path) -> None:
        kind = StateDictType.SHARDED_STATE_DICT
        with FullyShardedDataParallel.state_dict_type(module, kind):
            save_dcp(module, path)

    return Trained(module, checkpoint)


# -- data parallel, and a process alone ---------------------------------------------------------------


def data_parallel(recipe: Any) -> Trained:
    """torch's DistributedDataParallel; rank 0 saves the module inside."""
    module = nn.parallel.DistributedDataParallel(recipe.module, find_unused_parameters=True)
    train(recipe, module, torch.Tensor.backward, stepper(module))
    return Trained(module, functools.partial(save_plain, module.module))


def alone(recipe: Any) -> Trained:
    """The model itself."""
    train(recipe, recipe.module, torch.Tensor.backward, stepper(recipe.module))
    return Trained(recipe.module, functools.partial(save_plain, recipe.module))


def compiled(recipe: Any) -> Trained:
    """The model itself, compiled: every name has a prefix."""
    module: Any = torch.compile(recipe.module, backend="eager")
    train(recipe, module, torch.Tensor.backward, stepper(module))
    return Trained(module, functools.partial(save_plain, module))


def save_plain(module: nn.Module, path: Path) -> None:
    """A state dict in one file, written by rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.mkdir(parents=True)
        torch.save(module.state_dict(), path / "pytorch_model.bin")


# -- Accelerate ---------------------------------------------------------------------------------------


def accelerate(recipe: Any, **plugins: Any) -> Trained:
    """Whatever Accelerate makes of the model; saved by ``save_state``."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if plugins:
        # Accelerate shards over accelerators alone.
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerator = Accelerator(cpu=not plugins, **plugins)
    trained = [p for p in recipe.module.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    data: Any = [0] * 8
    loader: Any = torch.utils.data.DataLoader(data, batch_size=2)
    module, optimizer, _ = accelerator.prepare(recipe.module, optimizer, loader)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    train(recipe, module, accelerator.backward, step)
    return Trained(module, lambda path: accelerator.save_state(str(path)), accelerator)


def accelerate_zero(recipe: Any, stage: int) -> Trained:
    """Accelerate's DeepSpeed plugin."""
    from accelerate.utils import DeepSpeedPlugin

    quiet_deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": stage,
                # For what gathers the weights, as open-instruct does.
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": True},
        },
        zero3_init_flag=False,
    )
    try:
        return accelerate(recipe, deepspeed_plugin=plugin)
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def accelerate_fsdp(recipe: Any, version: int, precision: str | None = None) -> Trained:
    """Accelerate's FSDP plugin, sharded; with mixed precision if one is named."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(recipe.language_model.model.layers[0]).__name__],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
    )
    try:
        mixed = {} if precision is None else {"mixed_precision": precision}
        return accelerate(recipe, fsdp_plugin=plugin, **mixed)
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


FRAMEWORKS: dict[str, Callable[[Any], Trained]] = {
    "zero0": functools.partial(zero, 0),
    "zero0-flat": functools.partial(zero, 0, flat_masters=True),
    "zero1": functools.partial(zero, 1),
    "zero2": functools.partial(zero, 2),
    "zero3": functools.partial(zero, 3),
    "zero3-fp32": functools.partial(zero, 3, bf16={"enabled": False}),
    "zero2-round-robin": functools.partial(zero, 2, zero={"round_robin_gradients": True}),
    "zero1-bf16-optimizer": functools.partial(zero, 1, data_types={"grad_accum_dtype": "fp32"}),
    "zero3-offload": functools.partial(
        zero, 3, zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    ),
    "fsdp1": functools.partial(fsdp1, use_orig_params=True),
    "fsdp1-flat": functools.partial(fsdp1, use_orig_params=False),
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "fsdp-tp": fsdp_and_tensor_parallel,
    "ddp": data_parallel,
    "alone": alone,
    "compiled": compiled,
    "accelerate": accelerate,
    "accelerate-zero3": functools.partial(accelerate_zero, stage=3),
    "accelerate-zero2": functools.partial(accelerate_zero, stage=2),
    "accelerate-fsdp1": functools.partial(accelerate_fsdp, version=1),
    "accelerate-fsdp1-bf16": functools.partial(accelerate_fsdp, version=1, precision="bf16"),
    "accelerate-fsdp2": functools.partial(accelerate_fsdp, version=2),
}
