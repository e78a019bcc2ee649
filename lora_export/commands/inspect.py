"""lora-export inspect: what is this folder?"""

from pathlib import Path

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking


@click.command("inspect")
@click.argument("path", required=False)
@click.option(
    "-a",
    "--adapter",
    default=None,
    metavar="ADAPTER",
    help="Read the numbers of this adapter and say what it has learnt.",
)
@click.option(
    "-b",
    "--base",
    default=None,
    help="For an adapter: the base to check it against; with -a also to compare its change with.",
)
@click.option(
    "--picture",
    type=options.FOLDER,
    default=None,
    metavar="FILE",
    help="With -a: a heat map by layer and module, as FILE.svg, or FILE.html with everything.",
)
@options.force_option
@options.talk_options
def inspect(
    path: str | None, adapter: str | None, base: str | None, picture: Path | None, force: bool, as_json: bool,
    quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Say what PATH is (base, adapter, ONNX export or run) and what a person would ask about it.

    Reads headers only, and answers at once. With -b, an adapter is matched with that base, tensor by tensor.

    With -a it reads an adapter's numbers: for each weight rank, alpha and scaling, ‖ΔW‖ and (with -b) ‖ΔW‖/‖W‖,
    singular values, effective rank, and what each lower rank would keep; whether the rank was too large or too
    small, which modules did the work, and signs of trouble. -v lists every weight, --json every figure.

    \b
        lora-export inspect FOLDER
        lora-export inspect -a ADAPTER -b BASE --picture adapter.html
    """
    if (path is None) == (adapter is None):
        raise click.UsageError("Give either a PATH or -a ADAPTER.")
    if picture is not None and adapter is None:
        raise click.UsageError("--picture is of the numbers of an adapter: give it as -a ADAPTER.")
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint.sources import resolve
        from lora_export.workflows.inspection import inspect_folder

        if adapter is not None:
            from lora_export.commands.learnt import learnt

            learnt(resolve(adapter).folder, resolve(base).folder if base else None, picture, force, verbose, talk)
            return
        assert path is not None
        document = inspect_folder(resolve(path).folder, resolve(base).folder if base else None)
        rows = [(k.replace("_", " "), _words(v)) for k, v in document.items()]
        talk.result(document, table(rows))


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
