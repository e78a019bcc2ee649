"""lora-export merge-and-export: the whole story."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.talk import Talk, table
from lora_export.contracts.options import StoryOptions


@derive.command(
    "merge-and-export", derive.BASE, derive.ADAPTERS, derive.OUTPUT, derive.options_of(StoryOptions), derive.DRY_RUN
)
def merge_and_export(
    talk: Talk, base: str, adapters: tuple[str, ...], output: Path, dry_run: bool, **given: Any
) -> None:
    """Merge an adapter, prove the result, export it to ONNX and measure it.

    OUT gets merged/ (a Hugging Face folder), onnx/, report/ (report.html, report.md, report.json) and
    manifest.json. Three gates guard it: the merged model against the unmerged one, the ONNX graph against the
    unmerged one, and the latency against the base. If one fails, OUT is not written; everything is kept in
    OUT.failed and the exit code is 3.

    The graph does not depend on the adapter: with --graph-from, an earlier export of the same base (OUT/onnx of an
    earlier run) provides it, and the adapter costs a copy of the weights. With --no-merged-folder the merged
    weights are written once, into onnx/, instead of twice.

    A base with model_index.json is a pipeline of images, and an adapter may be a .safetensors file: each model is
    merged, exported and compared, the denoiser's step is measured, and the report shows pictures.

    \b
        lora-export merge-and-export -b HuggingFaceTB/SmolLM2-135M -a ./my-lora -o ./out
        lora-export merge-and-export -b ./base -a ./my-qlora --training-quantization nf4 -o ./out
        lora-export merge-and-export -b ./sdxl -a style.safetensors:0.8 -o ./out
    """
    from lora_export import api, wording
    from lora_export.commands import words
    from lora_export.commands.plans import plan_document, plan_words
    from lora_export.report import budget

    derive.check_benchmark()
    options = derive.build(StoryOptions, given, configured=talk.configured)
    memory = options.validation.max_memory or derive.memory_of_validation()
    options = replace(
        options,
        export=derive.as_the_earlier(options.export),
        validation=replace(options.validation, max_memory=memory),
        benchmark=replace(options.benchmark, configured=talk.configured),
    )
    if dry_run:
        planned = api.plan(base, adapters, options.merge)
        talk.result({"output": str(output), "merge": plan_document(planned)}, plan_words(planned))
        return
    story = api.merge_and_export(base, adapters, output, options, progress=talk.progress)
    assert story.export and story.validate and story.benchmark
    rows = [
        *words.merge_rows(story.merge),
        words.validation_row(story.validate),
        words.export_row(story.export),
        *([("budget", budget.sentence(story.budget))] if story.budget else []),
        *words.calibration_rows(story.export),
        *words.benchmark_rows(story.benchmark),
        *([("cache", wording.cache(story.cache))] if story.cache else []),
        ("report", str(output / "report" / "report.html")),
    ]
    talk.result(story, table(rows))
