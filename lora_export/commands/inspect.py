"""lora-export inspect: what is this folder?"""

import click

from lora_export.commands import options
from lora_export.commands.talk import table, talking


@click.command("inspect")
@click.argument("path")
@click.option("-b", "--base", default=None, help="For an adapter: the base to check it against.")
@options.talk_options
def inspect(path: str, base: str | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what PATH is (base, adapter, ONNX export or run) and what a person would ask about it.

    Reads headers only, and answers at once. With -b, an adapter is matched with that base, tensor by tensor.
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export.checkpoint.sources import resolve
        from lora_export.inspection import inspect_folder

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
