"""lora-export switch: another adapter in a merged folder or an export."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("switch")
@click.option(
    "-m",
    "--model",
    required=True,
    type=options.FOLDER,
    metavar="MERGED|ONNX",
    help="A merged folder, or an ONNX export of one: it is changed.",
)
@click.option(
    "--from",
    "before",
    required=True,
    multiple=True,
    metavar="ADAPTER",
    help="The adapter that is in it (with its weight, as in A:0.7). Repeat it for several.",
)
@click.option(
    "--to",
    "after",
    required=True,
    multiple=True,
    metavar="ADAPTER",
    help="The adapter that is to be in it. Repeat it for several.",
)
@click.option(
    "-b",
    "--base",
    default=None,
    metavar="BASE",
    help="The base that both belong to.  [default: where the adapter of --to says that its base is]",
)
@merging_options.merge_options
@options.talk_options
def switch(
    model: Path, before: tuple[str, ...], after: tuple[str, ...], base: str | None, as_json: bool,
    quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Put another adapter into a merged folder, or into its ONNX export, in its place.

    The weights are computed from the base, and the result is byte for byte that of a fresh merge, with its
    certificate: nothing drifts, however often it is done. The new folder is made beside the old one, and the two
    exchange their names in one step: the folder is the old one or the new one, whatever kills this command.

    A merged folder knows the options that it was merged with; for an ONNX folder give them again, if they were not
    the defaults (--dtype, --training-quantization, …).

    \b
        lora-export switch -m MERGED --from A --to B -b BASE
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands import gather
        from lora_export.commands.talk import table
        from lora_export.commands.words import switched_rows
        from lora_export.workflows.switching import base_of
        from lora_export.workflows.switching import switch as switch_adapter

        old, new = (gather.chosen(names) for names in (before, after))
        folder = resolve(base or base_of(new[0].folder)).folder
        settings = gather.merge_options_of(words)
        found = switch_adapter(model, folder, old, new, talk.progress, settings)
        talk.result(found.as_json(), table(switched_rows(found)))
