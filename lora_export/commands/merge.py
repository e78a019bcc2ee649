"""lora-export merge: adapters into base weights."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.commands import derive
from lora_export.commands.talk import Talk, megabytes, table
from lora_export.contracts.options import MergeOptions
from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.merging import MergePlan


@derive.command(
    "merge",
    derive.BASE,
    derive.ADAPTERS_OR_NONE,
    derive.OUTPUT,
    derive.options_of(MergeOptions),
    derive.DRY_RUN,
)
def merge(talk: Talk, base: str, adapters: tuple[str, ...], output: Path, dry_run: bool, **given: Any) -> None:
    """Merge adapters into their base and write a Hugging Face folder.

    The arithmetic is fp32 and rounded once. Tensors that the adapter does not touch are copied byte for byte, and
    so are tokenizer, chat template and generation config. A certificate says what happened to each tensor and how
    much of the adapter's change survived the rounding.

    Several adapters are applied one after the other, or become one change with --combine; how they interfere
    (cosines, conflicting signs, norms) is shown first, and in --dry-run. Without an adapter a quantized base is
    dequantized.

    \b
        lora-export merge -b BASE -a A:0.7 -a B:0.3 --combine ties --density 0.2 -o OUT
    """
    from lora_export import api
    from lora_export.commands.words import interference_lines, merge_rows
    from lora_export.errors import InputError

    options = derive.build(MergeOptions, given)
    if not adapters and not api.plan(base, adapters, options).computes:
        raise InputError(
            "no adapter is given, and this base is not quantized: there is nothing to merge",
            where=base,
            expected="an adapter, or a quantized base to dequantize",
            next_step="-a ADAPTER",
        )
    if dry_run:
        from lora_export.merging import interference

        planned = api.plan(base, adapters, options)
        pairs = interference(planned) if len(planned.adapters) > 1 else []
        document = plan_document(planned) | {"interference": [asdict(pair) for pair in pairs]}
        lines = [plan_words(planned), *interference_lines(pairs)]
        talk.result({"output": str(output)} | document, "\n".join(lines))
        return
    result = api.merge(base, adapters, output, options, progress=talk.progress)
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
