"""The options of the commands, in groups; each command takes those that have a meaning for it.

Owns flags, value types and help texts. What the options mean is stated in
:class:`ckpt_tools.conversion.request.Request`, whose fields have the same names and defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ckpt_tools.cli import completing
from ckpt_tools.cli.caching import no_cache
from ckpt_tools.cli.groups import ASSETS as ASSETS
from ckpt_tools.cli.groups import CHECK as CHECK
from ckpt_tools.cli.groups import READ as READ
from ckpt_tools.cli.groups import RUN as RUN
from ckpt_tools.cli.groups import WRITE as WRITE
from ckpt_tools.cli.groups import Command as Command
from ckpt_tools.cli.groups import Option as Option
from ckpt_tools.cli.groups import option as option
from ckpt_tools.cli.kinds import LOCAL as LOCAL
from ckpt_tools.cli.kinds import PATH as PATH
from ckpt_tools.cli.kinds import DTypeName as DTypeName
from ckpt_tools.cli.shapes import Decorator, F, count, place, seconds, tag_of
from ckpt_tools.cli.text import say

also = place(
    "--also",
    group=READ,
    multiple=True,
    help="A further folder with files of CKPT, such as that of another machine; repeatable.",
)
debug = option("--debug", is_flag=True, help="Show a traceback for every error.")
json = option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
tag = tag_of("CKPT")
model = option(
    "--model",
    group=READ,
    metavar="N|NAME",
    shell_complete=completing.names,
    help="Which model of a state that holds several.",
)


class SourceFormat(Option):
    """``--source-format``; its help lists the readers, which are imported for it alone."""

    @property
    def help(self) -> str:
        """The help, with the names of the formats."""
        from ckpt_tools.readers import readers

        return f"Which format, where the directory fits several: {', '.join(readers())}."

    @help.setter
    def help(self, value: str | None) -> None:
        """Nothing is kept."""


def source_format(function: F) -> F:
    """The format to read, under its name and under the one that it had."""
    add = click.option(
        "--source-format",
        cls=SourceFormat,
        group=READ,
        metavar="F",
        shell_complete=completing.formats,
        callback=lambda context, _, value: value or context.meta.get(_FORMAT),
    )
    add_old = option("--format", hidden=True, is_eager=True, expose_value=False, callback=_renamed)
    return add(add_old(function))


_FORMAT = "ckpt_tools.format"  # key of the value of `--format` in the context


def _renamed(context: click.Context, _: click.Parameter, value: str | None) -> None:
    """Keep the value of ``--format`` for ``--source-format``."""
    if value is not None:
        say("--format is now --source-format", label="warning: ", color="yellow", err=True)
        context.meta[_FORMAT] = value


workers = count("--workers", help="Threads. Default: one a core.")
timeout = seconds(
    "--timeout",
    default=1800,
    help="How long ranks of torchrun wait for one without progress, and requests of stores are repeated.",
)

_ADAPTERS: dict[str, Decorator[Any]] = {
    "tag": tag,
    "model": model,
    "source_format": source_format,
    "also": also,
    "weights": option(
        "--weights",
        group=READ,
        type=click.Choice(["master", "model"]),
        default="master",
        show_default=True,
        help="The optimizer's fp32 masters (where there are any), or the 16-bit copy.",
    ),
    "node_local": option(
        "--node-local",
        group=READ,
        is_flag=True,
        help="Under torchrun: each machine sees only its own files of CKPT; the ranks pool them.",
    ),
    "dtype": option(
        "--dtype",
        group=WRITE,
        type=DTypeName(["auto", "keep", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="auto: each tensor in its training dtype. keep: each as stored. The others cast floating "
        "tensors.",
    ),
    "output_format": option(
        "--output-format",
        group=WRITE,
        type=click.Choice(["safetensors", "bin"]),
        default="safetensors",
        show_default=True,
        help="The container of the weights; bin is that of torch.save.",
    ),
    "config": option(
        "--config",
        group=ASSETS,
        type=PATH,
        metavar="FILE|DIR",
        help="The model's config.json. Default: --like, else near the checkpoint.",
    ),
    "tokenizer": option(
        "--tokenizer",
        group=ASSETS,
        type=PATH,
        metavar="DIR",
        help="Tokenizer to copy. Default: the same places as the config.",
    ),
    "chat_template": option(
        "--chat-template",
        group=ASSETS,
        type=PATH,
        metavar="FILE",
        help="Chat template of the output, in the place of the tokenizer's own. The end tokens follow it.",
    ),
    "compat": option(
        "--compat",
        group=ASSETS,
        type=click.Choice(["transformers-4"]),
        help="Write config, tokenizer and processor files that transformers 4.57 reads as well as 5.",
    ),
    "follow_links": option(
        "--follow-links",
        group=READ,
        is_flag=True,
        help="Follow links that lead out of the directory that was named.",
    ),
    "verify": option(
        "--verify",
        group=CHECK,
        is_flag=True,
        help="Verify every byte of the output before it appears.",
    ),
    "dry_run": option(
        "--dry-run", group=CHECK, is_flag=True, help="Check and plan everything, write nothing."
    ),
    "check_all_masters": option(
        "--check-masters",
        "check_all_masters",
        group=CHECK,
        is_flag=True,
        help="Compare all masters with the 16-bit weights, not a sample.",
    ),
    "check_source": option(
        "--no-check-source",
        "check_source",
        group=CHECK,
        flag_value=False,
        default=True,
        help="Do not compare the bytes that are read with the checksums of their files.",
    ),
    "strict": option(
        "--strict",
        group=CHECK,
        is_flag=True,
        help="Refuse a checkpoint whose pickles name functions that no known framework writes.",
    ),
    "sha256": option(
        "--sha256", group=CHECK, is_flag=True, help="Write SHA256SUMS, for sha256sum -c."
    ),
    "marker": option(
        "--marker",
        group=WRITE,
        metavar="NAME",
        help="Also write a file NAME that says COMPLETED, for programs that wait for one.",
    ),
    "overwrite": option(
        "--overwrite", is_flag=True, help="Replace OUT once the new one is complete."
    ),
    "skip_complete": option(
        "--skip-complete",
        is_flag=True,
        help="If the same request has written OUT, say so and end with status 0.",
    ),
    "resume": option(
        "--resume", is_flag=True, help="Continue what an earlier run that failed has left."
    ),
    "scratch": option(
        "--scratch",
        group=WRITE,
        type=LOCAL,
        metavar="DIR",
        help="Where an OUT that is an address is made before it is uploaded.",
    ),
    "push_to_hub": option(
        "--push-to-hub",
        group=WRITE,
        metavar="ORG/REPO",
        help="Upload OUT to this repository of the Hub too, as one commit.",
    ),
    "revision": option(
        "--revision",
        group=WRITE,
        metavar="R",
        help="With --push-to-hub: the branch. Default: main.",
    ),
    "private": option(
        "--private", group=WRITE, is_flag=True, help="Make a new repository of the Hub private."
    ),
    "workers": workers,
    "no_cache": no_cache,
    "timeout": timeout,
    "quiet": option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and --json)."),
    "verbose": option(
        "-v", "--verbose", is_flag=True, help="Print each file and the time of each stage too."
    ),
    "as_json": json,
    "debug": debug,
}

_MODELS: dict[str, Decorator[Any]] = {
    "key_map": option(
        "--key-map",
        group=READ,
        type=PATH,
        metavar="FILE",
        help="A JSON file with the model's names of the checkpoint's tensors, as pipelines need.",
    ),
    "max_shard_size": option(
        "--max-shard-size",
        group=WRITE,
        default="5GB",
        show_default=True,
        metavar="SIZE",
        help="Size limit of one file of weights.",
    ),
    "weights_only": option(
        "--weights-only",
        group=WRITE,
        is_flag=True,
        help="Write weights alone, under the names that they have.",
    ),
    "dequantize": option(
        "--dequantize",
        group=WRITE,
        is_flag=True,
        help="Write quantised weights as the 16-bit weights that their quantiser makes of them.",
    ),
    "like": option(
        "--like",
        group=ASSETS,
        type=PATH,
        metavar="DIR",
        help="A Hugging Face directory with the layout that the output is to have. Frozen tensors that "
        "the checkpoint left out come from it.",
    ),
    "generation_config": option(
        "--generation-config",
        group=ASSETS,
        default="auto",
        show_default=True,
        metavar="auto|olmo|none|FILE|DIR",
        help="olmo: greedy, no bos, <|im_end|> and <|endoftext|> end a text. auto: olmo for OLMo chat models "
        "whose tokenizer has both tokens, else the source's own.",
    ),
    "card": option(
        "--no-card",
        "card",
        group=ASSETS,
        flag_value=False,
        default=True,
        help="Write no model card (README.md).",
    ),
    "trust_remote_code": option(
        "--trust-remote-code",
        group=ASSETS,
        is_flag=True,
        help="Run custom code beside the config, in a process of its own, to learn the layout.",
    ),
}


# Names of the options that adapters do not have.
OF_MODELS = frozenset(_MODELS)
# Of the options that a list shows, those that few need.
_RARE = (
    "marker",
    "scratch",
    "push_to_hub",
    "revision",
    "private",
    "node_local",
    "follow_links",
    "strict",
)
# What means one checkpoint, or one call.
_OF_ONE = {
    *("tag", "also", "node_local", "dry_run", "resume", "skip_complete", "timeout"),
    *("scratch", "push_to_hub", "revision", "private"),
}


def _common_first(options: dict[str, Decorator[F]]) -> dict[str, Decorator[F]]:
    """The options in the order of a list, with the rare ones of each group last."""
    rare = {name: options[name] for name in options if name in _RARE}
    return {name: add for name, add in options.items() if name not in _RARE} | rare


def adapter_writing(function: F) -> F:
    """The options of a command that writes adapters."""
    return added(_common_first(_ADAPTERS).values(), function)


def model_writing(function: F) -> F:
    """The options of a command that writes a model directory."""
    return added(_common_first(_ADAPTERS | _MODELS).values(), function)


def mean_writing(function: F) -> F:
    """Those of several checkpoints; ``--also`` would not say which one the folder belongs to."""
    options = _common_first(_ADAPTERS | _MODELS)
    del options["also"]
    return added(options.values(), function)


def watch_writing(function: F) -> F:
    """Those of a command that converts one checkpoint after the other."""
    options = _common_first(_ADAPTERS | _MODELS)
    return added((add for name, add in options.items() if name not in _OF_ONE), function)


def added(options: Iterable[Decorator[F]], function: F) -> F:
    """A command with further options, listed in this order."""
    for add in reversed(tuple(options)):
        function = add(function)
    return function
