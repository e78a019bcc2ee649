"""lora-export merge-and-export: the whole story."""

from typing import Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import talking


@click.command("merge-and-export")
@options.base_option
@options.adapter_option
@options.output_option
@merging_options.merge_options
@options.export_options
@options.graph_from_option
@options.merged_folder_option
@options.provider_option
@options.check_options
@options.benchmark_options
@options.extra_arms_option
@options.dry_run_option
@options.force_option
@options.talk_options
def merge_and_export(
    base: str, adapters: tuple[str, ...], output: Any, dry_run: bool, as_json: bool, quiet: bool, verbose: bool,
    **words: Any,
) -> None:  # fmt: skip
    """Merge an adapter, prove the result, export it to ONNX and measure it.

    OUT gets merged/ (a Hugging Face folder), onnx/, report/ (report.html, report.md, report.json) and
    manifest.json. Three gates guard it: the merged model against the unmerged one, the ONNX graph against the
    unmerged one, and the latency against the base. If one fails, OUT is not written; everything is kept in
    OUT.failed and the exit code is 3.

    The graph does not depend on the adapter: with --graph-from, an earlier export of the same base (OUT/onnx of an
    earlier run) gives it, and the adapter costs a copy of the weights. With --no-merged-folder the merged weights
    are written once, into onnx/, instead of twice.

    \b
        lora-export merge-and-export -b HuggingFaceTB/SmolLM2-135M -a ./my-lora -o ./out
        lora-export merge-and-export -b ./base -a ./my-qlora --training-quantization nf4 -o ./out
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands import gather
        from lora_export.commands import words as say
        from lora_export.commands.merge import plan_document, plan_words

        if words["graph_from"] is not None:
            words = gather.as_the_earlier(words)
        story_options = gather.story_options_of(words)
        if dry_run:
            from lora_export.merging import plan

            choices = gather.chosen(adapters)
            planned = plan(resolve(base).folder, choices, story_options.merge)
            talk.result({"output": str(output), "merge": plan_document(planned)}, plan_words(planned))
            return
        story = api.merge_and_export(base, gather.weighted(adapters), output, story_options, progress=talk.progress)
        assert story.export and story.validate and story.benchmark
        rows = [
            *say.merge_rows(story.merge),
            say.validation_row(story.validate),
            say.export_row(story.export),
            *say.benchmark_rows(story.benchmark),
            ("report", str(output / "report" / "report.html")),
        ]
        talk.result(story, say.summary(rows))
