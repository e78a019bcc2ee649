"""lora-export benchmark: the latency of ONNX graphs, side by side in one process."""

from pathlib import Path
from typing import Any

import click

from lora_export.commands import options
from lora_export.commands.talk import talking


@click.command("benchmark")
@click.option("-b", "--base", type=options.FOLDER, default=None, help="The base's ONNX folder or file.")
@click.option("-m", "--merged", type=options.FOLDER, required=True, help="The merged ONNX folder or file.")
@click.option("-u", "--unmerged", type=options.FOLDER, default=None, help="The unmerged one: the control.")
@options.output_option
@options.provider_option
@options.benchmark_options
@options.force_option
@options.talk_options
def benchmark(
    base: Path | None, merged: Path, unmerged: Path | None, output: Path, force: bool, as_json: bool,
    quiet: bool, verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Measure base, merged and unmerged graphs in turn, and say whether merging costs latency.

    The verdict is equivalent, slower or inconclusive: the 90 % interval of merged/base lies within the
    margin, above it, or the machine was too noisy to tell. OUT gets a report and every raw sample.
    Asking for cuda where it does not work is an error, never a silent fallback.
    """
    with talking(as_json, quiet, verbose) as talk:
        from dataclasses import replace

        from lora_export import pipeline
        from lora_export.commands import gather
        from lora_export.commands.words import benchmark_rows, summary
        from lora_export.files import output_folder
        from lora_export.onnx_export import check_model, compare, model_file
        from lora_export.report import write
        from lora_export.runtime import resolve_provider

        settings = gather.benchmark_options_of(words)
        settings = replace(settings, provider=resolve_provider(settings.provider))
        merged_file, *others = [model_file(p) if p else None for p in (merged, base, unmerged)]
        base_file, unmerged_file = others
        assert merged_file is not None
        graphs = [p for p in (merged_file, base_file, unmerged_file) if p]
        for path in graphs:
            check_model(path)
        with output_folder(output, force, inputs=[p.parent for p in graphs]) as stage:
            identity = compare(base_file, merged_file, settings.provider) if base_file else None
            result = pipeline.benchmark(merged_file, base_file, unmerged_file, settings, talk.progress, identity)
            report = pipeline.new_report("benchmark", {"benchmark": words})
            write(report | {"benchmark": result.as_json()}, stage, dict(result.samples))
        rows = [*benchmark_rows(result), ("report", str(output / "report.html"))]
        talk.result(result.as_json(), summary(rows))
