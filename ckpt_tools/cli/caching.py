"""Owns the option that switches off the cache on disk for one command."""

from __future__ import annotations

import click


def _without_cache(ctx: click.Context, _: click.Parameter, is_set: bool) -> None:
    if is_set:
        from ckpt_tools.hub.reference.kept import switched_off

        ctx.with_resource(switched_off())


no_cache = click.option(
    "--no-cache",
    is_flag=True,
    expose_value=False,
    callback=_without_cache,
    help="Ask transformers and PEFT anew, and keep no answer on disk.",
)
