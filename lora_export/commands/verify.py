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
@click.option(
    "--key",
    type=options.FOLDER,
    default=None,
    metavar="KEY",
    help="Of a package: the public key of who signed it, in PEM.",
)
@click.option("--run", "run_it", is_flag=True, help="Of a package: have its runtime load it and answer the sample.")
@click.option(
    "--runtime", type=options.FOLDER, default=None, metavar="PATH",
    help="With --run: where the runtime is, if not in this environment: a Python interpreter, or for "
    "transformers-js a folder with node_modules.",
)  # fmt: skip
@click.option(
    "--certify", type=click.Choice(["sampled", "full"]), default="full", show_default=True,
    help="full: every byte of the merge is computed again and compared; sampled: some rows of each tensor, drawn "
    "at random, in float64.",
)  # fmt: skip
@click.option(
    "--rows", type=click.IntRange(min=1), default=64, show_default=True,
    help="With --certify sampled: how many rows of each tensor.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=None,
    help="With --certify sampled: which rows; a new draw each time without it, whose seed is printed.",
)  # fmt: skip
@click.option(
    "--graph/--no-graph", default=True,
    help="Of a run: build the graph of its ONNX export anew and compare it byte for byte. Without this the graph "
    "is only checked to be valid, and the verdict says so.",
)  # fmt: skip
@options.talk_options
def verify(
    path: Path, base: str | None, adapters: tuple[str, ...], key: Path | None, run_it: bool, runtime: Path | None,
    certify: Any, rows: int, seed: int | None, graph: bool, as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Check a merged folder, the folder of a whole run, or a package, again.

    Exit code 3 if a check of the first two fails, and 1 for a package that is not what was made.

    The certificate in it is not believed. With -b and -a the merge is done again, and every byte of the folder,
    every file beside the weights and every figure of the certificate is compared with what comes out. Of a run the
    ONNX export is compared as well: its weights are converted or quantized again, and its graph is built again.
    Without base and adapters only hashes can be checked. Whatever was not checked is named in the verdict.

    Of a package (a folder, .tar.zst or .zip) every file is hashed, its signature is checked with --key, its graphs
    are checked before anything opens them, and with --run its runtime answers as the unmerged model did.
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.commands import gather
        from lora_export.commands.words import verification_words
        from lora_export.errors import EXIT_FAILED, EXIT_GATE
        from lora_export.workflows.delivered import is_package

        result = api.verify(
            path,
            base,
            gather.weighted(adapters),
            certify=certify,
            rows=rows,
            seed=seed,
            graph=graph,
            key=key,
            run=run_it,
            runtime=runtime,
            progress=talk.progress,
        )
        talk.result(result.as_json(), verification_words(result))
        if not result.verified:
            click.echo(f"not verified: {sum(not c.passed for c in result.checks)} checks failed", err=True)
            sys.exit(EXIT_FAILED if is_package(path) else EXIT_GATE)
