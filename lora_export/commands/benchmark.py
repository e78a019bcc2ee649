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
        from lora_export.onnx_export import check_model, model_files
        from lora_export.report import write
        from lora_export.runtime import resolve_provider

        settings = gather.benchmark_options_of(words)
        settings = replace(settings, provider=resolve_provider(settings.provider))
        arms = [model_files(p) if p else () for p in (merged, base, unmerged)]
        merged_graphs, base_graphs, unmerged_graphs = arms
        _refuse_other_kind(arms)
        graphs = [path for arm in arms for path in arm]
        for path in graphs:
            check_model(path)
        with output_folder(output, force, inputs=[p.parent for p in graphs]) as stage:
            result = pipeline.benchmark(merged_graphs, base_graphs, unmerged_graphs, settings, talk.progress)
            report = pipeline.new_report("benchmark", {"benchmark": words})
            write(report | {"benchmark": result.as_json()}, stage, dict(result.samples))
        rows = [*benchmark_rows(result), ("report", str(output / "report.html"))]
        talk.result(result.as_json(), summary(rows))


def _refuse_other_kind(arms: list[tuple[Path, ...]]) -> None:
    """Arms with another number of graphs are other kinds of models."""
    from lora_export.errors import InputError

    counts = {len(arm) for arm in arms if arm}
    if len(counts) > 1:
        raise InputError(
            f"exports with {' and '.join(map(str, sorted(counts)))} graphs",
            where=next(arm for arm in arms if len(arm) == max(counts))[0].parent,
            expected="exports of one model, made the same way",
        )
