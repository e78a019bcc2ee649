"""What ends a run: a gate that did not pass."""

from lora_export.contracts import (
    Story,
    ValidationResult,
)
from lora_export.errors import GateFailed
from lora_export.workflows.latency import refuse_slower


def refuse_failed(story: Story) -> None:
    """Raise GateFailed for the first gate that did not pass; the report says it in full."""
    if story.validate is not None and not story.validate.passed:
        lost = _only_survival_failed(story.validate)
        raise GateFailed(
            "validation failed: " + failures(story.validate),
            where=story.output.with_name(story.output.name + ".failed"),
            tensor=next(iter(_suspects(story.validate)), None),
            expected="an export that keeps the adapter's effect"
            if lost
            else "a merged model that computes what the unmerged one computes",
            next_step=story.validate.advice[-1] if lost else "read report/report.html in that folder",
        )
    if story.benchmark is not None:
        refuse_slower(story.benchmark, story.output, "report/report.html")


def _suspects(result: ValidationResult) -> tuple[str, ...]:
    """Tensors at fault: those of the first module that goes wrong, then all others."""
    return (*(result.deviation.tensors if result.deviation else ()), *result.weight_errors)


def _only_survival_failed(result: ValidationResult) -> bool:
    return bool(result.advice) and all(c.passed or c.name.endswith("adapter_survival") for c in result.checks)


def failures(result: ValidationResult) -> str:
    """The failed checks in one line (name, value and threshold), and the first module that goes wrong."""
    failed = [
        f"{c.name} is {c.value:.4g}" + (f", allowed {c.threshold:.4g}" if c.threshold is not None else "")
        for c in result.checks
        if not c.passed
    ]
    where = [f"the first module that differs is {result.deviation.module}"] if result.deviation else []
    return "; ".join([*failed, *where])
