"""What a merge would do, from headers alone: `--dry-run` of several commands."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_export.commands.talk import megabytes, table
from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.merging import MergePlan
    from lora_export.merging.pipelines.planning import PipelinePlan


def plan_document(planned: "MergePlan | PipelinePlan") -> dict[str, Any]:
    """A plan for JSON."""
    from lora_export.merging import MergePlan

    return _model_document(planned) if isinstance(planned, MergePlan) else _pipeline_document(planned)


def _model_document(planned: "MergePlan") -> dict[str, Any]:
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


def _pipeline_document(planned: "PipelinePlan") -> dict[str, Any]:
    used = planned.adapter_tensors
    return {
        "dry_run": True,
        "tensors": planned.counts,
        "adapter_tensors": {"used": used, "total": used},
        "bytes": planned.nbytes,
        "formats": [a.format for a in planned.adapters],
        "skipped": list(planned.skipped),
        "components": {n: _model_document(p) for n, p in planned.components.items()},
    }


def _pipeline_words(planned: "PipelinePlan") -> str:
    parts = [f"{name}:\n{_model_words(plan)}" for name, plan in planned.components.items()]
    kept = [n for n in planned.pipeline.components if n not in planned.components]
    return "\n".join([*parts, table([("copied as they are", ", ".join(kept) or "none")])])


def plan_words(planned: "MergePlan | PipelinePlan") -> str:
    """A plan for people."""
    from lora_export.merging import MergePlan

    return _model_words(planned) if isinstance(planned, MergePlan) else _pipeline_words(planned)


def _model_words(planned: "MergePlan") -> str:
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
