"""lora-export merge: adapters into base weights."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands import merging_options, options
from lora_export.commands.talk import megabytes, table, talking
from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.merging import MergePlan


@click.command("merge")
@options.base_option
@options.adapter_or_none_option
@options.output_option
@merging_options.merge_options
@options.dry_run_option
@options.force_option
@options.talk_options
def merge(
    base: str, adapters: tuple[str, ...], output: Any, dry_run: bool, force: bool, as_json: bool, quiet: bool,
    verbose: bool, **words: Any,
) -> None:  # fmt: skip
    """Merge adapters into their base and write a Hugging Face folder.

    The arithmetic is fp32 and rounded once. Tensors that the adapter does not touch are copied byte for byte,
    and so are tokenizer, chat template and generation config. A certificate says what happened to each tensor
    and how much of the adapter's change survived the rounding.

    Several adapters are applied in turn, or made one change by --combine; what they do to each other (cosines,
    signs in conflict, norms) is shown first, and in --dry-run. Without an adapter a quantized base is dequantized.

    \b
        lora-export merge -b BASE -a A:0.7 -a B:0.3 --combine ties --density 0.2 -o OUT
    """
    with talking(as_json, quiet, verbose) as talk:
        from lora_export import api
        from lora_export.checkpoint.sources import resolve
        from lora_export.commands import gather
        from lora_export.commands.words import interference_lines, merge_rows
        from lora_export.merging import interference, plan

        settings = gather.merge_options_of(words, force)
        if not adapters:
            gather.refuse_mere_copy(base, settings)
        if dry_run:
            choices = gather.chosen(adapters)
            planned = plan(resolve(base).folder, choices, settings)
            found = interference(planned) if len(planned.adapters) > 1 else []
            document = plan_document(planned) | {"interference": [asdict(i) for i in found]}
            lines = [plan_words(planned), *interference_lines(found)]
            talk.result({"output": str(output)} | document, "\n".join(lines))
            return
        result = api.merge(base, gather.weighted(adapters), output, settings, progress=talk.progress)
        lines = [table([*merge_rows(result), ("output", str(output))]), *interference_lines(result.interference)]
        talk.result(result, "\n".join(lines))


def plan_document(planned: "MergePlan") -> dict[str, Any]:
    used = sum(a.tensor_count for a in planned.adapters)
    return {
        "dry_run": True,
        "tensors": planned.counts,
        "adapter_tensors": {"used": used, "total": used},
        "bytes": planned.nbytes,
        "shards": [s.file for s in planned.shards],
        "dtype": planned.dtype,
        "model": asdict(planned.model) if planned.model else None,
        "config_changes": dict(planned.config_changes),
        "config_removals": sorted(planned.config_removals),
        "plan": [
            {
                "name": t.output.name,
                "operation": t.operation,
                "dtype": t.output.dtype,
                "shape": list(t.output.shape),
                "kinds": [u.kind for u in t.updates],
            }
            for t in planned.tensors.values()
        ],
    }


def plan_words(planned: "MergePlan") -> str:
    lines = [
        f"{t.operation:<12} {t.output.dtype:<5} {_shape(t.output.shape):<14} {shown(t.output.name)}"
        for t in planned.tensors.values()
        if t.operation != "copied"
    ]
    changes = ", ".join(f"{k} = {v}" for k, v in planned.config_changes.items()) or "none"
    rows = [("model", shown(planned.model.words))] if planned.model else []
    rows += [
        ("copied", f"{planned.counts['copied']} tensors"),
        ("output", f"{megabytes(planned.nbytes)} in {len(planned.shards)} file(s), {planned.dtype}"),
        ("config", f"changes: {changes}; removed: {', '.join(planned.config_removals) or 'none'}"),
        ("dry run", "nothing was written"),
    ]
    return "\n".join([*lines, table(rows)])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
