"""report.json of a run: who made it, of what, and what each stage found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_export import manifest
from lora_export.contracts import (
    BenchmarkResult,
    Source,
    Story,
    StoryOptions,
)
from lora_export.contracts.option import kept
from lora_export.version import __version__


def write_report(
    story: Story,
    stage: Path,
    base: Source,
    adapters: Sequence[tuple[Source, float]],
    options: StoryOptions,
) -> None:
    from lora_export.report import write

    passed = story.validate is not None and story.validate.passed
    slower = story.benchmark is not None and story.benchmark.verdict == "slower"
    report = new_report("merge-and-export", options_json(options), base, adapters)
    report |= {
        "status": "passed" if passed and not slower else "failed",
        "merge": _relative(story.merge.as_json(), story.output)
        | {"records": [asdict(r) for r in story.merge.records]},
        "validate": story.validate.as_json() if story.validate else None,
        "export": _relative(story.export.as_json(), story.output) if story.export else None,
        "benchmark": story.benchmark.as_json() if story.benchmark else None,
    }
    write(report, stage / "report", *raw(story.benchmark))


def raw(measured: BenchmarkResult | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Every timing, and the conditions under which each block was measured."""
    return (dict(measured.samples), dict(measured.conditions)) if measured else (None, None)


def new_report(
    title: str,
    options: Mapping[str, Any],
    base: Source | None = None,
    adapters: Sequence[tuple[Source, float]] = (),
) -> dict[str, Any]:
    """report.json without any stage: who made it, when, from what. Names, never folders of this machine."""
    from lora_export.report import SCHEMA_VERSION

    names = [a.folder.resolve().name for a, _ in adapters]
    return {
        "schema_version": SCHEMA_VERSION,
        "title": f"{' + '.join(names)} on {base.folder.resolve().name}" if base and names else title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool_version": __version__,
        "status": "passed",
        "options": dict(options),
        "sources": {
            "base": manifest.named(base) if base else None,
            "adapters": [manifest.named(source) | {"weight": weight} for source, weight in adapters],
        },
        "merge": None,
        "validate": None,
        "export": None,
        "benchmark": None,
    }


def _relative(result: dict[str, Any], output: Path) -> dict[str, Any]:
    prefix = f"{output}/"
    return {k: v.removeprefix(prefix) if isinstance(v, str) else v for k, v in result.items()}


def options_json(options: StoryOptions) -> dict[str, Any]:
    """The options as a report and a manifest keep them."""
    return kept(options)
