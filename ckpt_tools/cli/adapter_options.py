"""The options that name an adapter and its config, for the commands that read one."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_tools.cli import completing
from ckpt_tools.cli.options import PATH, READ, added, option
from ckpt_tools.cli.shapes import F

base_model = option(
    "--base-model",
    group=READ,
    metavar="NAME",
    help="Name of the base, on the Hub or a directory, if no config states it.",
)


def of_adapter(adapter_help: str) -> Callable[[F], F]:
    """The options that name an adapter and its config."""
    options = (
        option(
            "--adapter",
            group=READ,
            metavar="NAME",
            shell_complete=completing.adapters,
            help=adapter_help,
        ),
        option(
            "--adapter-config",
            group=READ,
            type=PATH,
            metavar="FILE|DIR",
            help="The adapter's adapter_config.json. Default: near the checkpoint.",
        ),
        option(
            "--lora-alpha",
            group=READ,
            type=float,
            metavar="X",
            help="lora_alpha of the training run, where no config says it.",
        ),
    )
    return lambda function: added(options, function)
