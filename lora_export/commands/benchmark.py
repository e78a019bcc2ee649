"""lora-export benchmark: the latency of ONNX graphs, side by side in one process."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import talking


@click.command("benchmark")
@click.option("-b", "--base", type=options.FOLDER, default=None, help="The base's ONNX folder or file.")
@click.option("-m", "--merged", type=options.FOLDER, required=True, help="The merged ONNX folder or file.")
@click.option(
    "-u", "--unmerged", type=options.FOLDER, default=None,
    help="The unmerged one, which `export --unmerged` writes: the positive control.",
)  # fmt: skip
@click.option(
    "--plugged", type=options.FOLDER, default=None, metavar="ONNX",
    help="A folder that `export -a` wrote, or its .onnx_adapter file: the adapter plugged in as the graph runs.",
)  # fmt: skip
@click.option(
    "--pytorch", nargs=2, default=None, metavar="BASE ADAPTER",
    help="Also PEFT's unmerged model under PyTorch.",
)  # fmt: skip
@click.option(
    "--beside", multiple=True, metavar="NAME=ONNX",
    help="Another graph of the same model, such as optimum=FOLDER. Repeat it for more.",
)  # fmt: skip
@options.output_option
@options.provider_option
@options.benchmark_options
@options.force_option
@options.talk_options
def benchmark(
    base: Path | None, merged: Path, unmerged: Path | None, plugged: Path | None, pytorch: tuple[str, str] | None,
    beside: tuple[str, ...], output: Path, force: bool, as_json: bool, quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Measure base, merged and unmerged graphs in turn, and say whether merging costs latency.

    The verdict is equivalent, slower or inconclusive: the 90 % interval of merged/base lies within the margin,
    above it, or the machine was too noisy to tell. Something that does more work must be found slower in the same
    blocks, or there is no verdict: -u, else --plugged, else the base itself held up by two margins. OUT gets a
    report and every raw sample; if merged is slower, the exit code is 3 and they are in OUT.failed. Asking for cuda
    where it does not work is an error, never a silent fallback.

    \b
        lora-export export -m BASE -a ADAPTER --unmerged -o unmerged-onnx
        lora-export benchmark -b base-onnx -m merged-onnx -u unmerged-onnx --grid standard -o latency
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.commands import gather
        from lora_export.commands.words import benchmark_rows, summary

        result = api.benchmark(
            merged,
            output,
            base=base,
            unmerged=unmerged,
            plugged=plugged,
            pytorch=pytorch,
            beside=gather.named_folders(beside),
            options=gather.benchmark_options_of(words),
            force=force,
            progress=talk.progress,
        )
        rows = [*benchmark_rows(result), ("report", str(output / "report.html"))]
        talk.result(result, summary(rows))
