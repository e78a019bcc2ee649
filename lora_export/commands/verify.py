"""lora-export verify: what an earlier run left, checked again."""

import sys
from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import talking


@click.command("verify")
@click.argument("path", type=options.FOLDER)
@click.option("-b", "--base", default=None, metavar="BASE", help="The base that was merged into.")
@click.option(
    "-a", "--adapter", "adapters", multiple=True, metavar="ADAPTER",
    help="The adapter that was merged, with its weight if it had one; repeat it as for the merge.",
)  # fmt: skip
@options.certify_option
@options.talk_options
def verify(
    path: Path, base: str | None, adapters: tuple[str, ...], certify: Any, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Check a merged folder, or the folder of a whole run, again. Exit code 3 if a check fails.

    The certificate in it is not believed: with -b and -a the merge is planned anew, rows are computed in float64
    and compared, files are compared with what a merge would write, all bytes are hashed again, and every figure
    of the certificate must come out. Without them only hashes can be checked, and the answer says so.
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import pipeline
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands import gather
        from lora_export.commands.words import verification_words
        from lora_export.errors import EXIT_GATE

        source = resolve(base) if base else None
        result = pipeline.verify(path, source, gather.adapters_of(adapters), certify, talk.progress)
        talk.result(result.as_json(), verification_words(result))
        if not result.verified:
            click.echo(f"not verified: {sum(not c.passed for c in result.checks)} checks failed", err=True)
            sys.exit(EXIT_GATE)
