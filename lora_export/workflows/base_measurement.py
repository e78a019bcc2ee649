"""The latency of a base's graph, measured for one adapter, and kept as a report for the others."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.choices import Provider
from lora_export.contracts import AdapterChoice, BenchmarkOptions, BenchmarkResult, Report, Source, StoryOptions
from lora_export.contracts.option import kept
from lora_export.storage.documents import as_json
from lora_export.wording import VERDICTS


def write_measurement(
    measured: BenchmarkResult,
    folder: Path,
    base: Source,
    adapters: Sequence[AdapterChoice],
    options: StoryOptions,
) -> str:
    """Write it as a report, with what was asked for; what is claimed of it, in words."""
    from lora_export.report import write
    from lora_export.workflows.run_report import new_report

    how = {"benchmark": conditions(options.benchmark, options.export.provider)}
    report = replace(new_report("benchmark", how, base, adapters), benchmark=measured)
    write(replace(report, status="failed" if measured.verdict == "slower" else "passed"), folder)
    return claim_of(report)


def read_measurement(folder: Path, options: StoryOptions) -> tuple[BenchmarkResult, str] | None:
    """The same with its claim, if it was made as these options ask; None otherwise."""
    from lora_export.report import load

    if not folder.is_dir():
        return None
    report = load(folder)
    asked = conditions(options.benchmark, options.export.provider)
    if report.benchmark is None or report.options.get("benchmark") != asked:
        return None
    return report.benchmark, claim_of(report)


def claim_of(report: Report) -> str:
    """In words: what was measured, when, on what."""
    assert report.benchmark is not None
    names, environment = " and ".join(a.name for a in report.sources.adapters), report.benchmark.environment
    machine = environment.cpu or "a CPU without a name"
    gpus = ", ".join(g.name for g in environment.gpus if g.name)
    where = f"{gpus} with {machine}" if gpus and report.benchmark.provider != "cpu" else machine
    said = VERDICTS[report.benchmark.verdict]
    return f"{said}, measured once for this graph, with the adapter {names}, at {report.created}, on {where}"


def conditions(options: BenchmarkOptions, provider: Provider) -> dict[str, Any]:
    """What a measurement was asked for, as it decides whether another run asks for the same."""
    asked: dict[str, Any] = as_json(kept(replace(options, provider=provider, configured="")))
    return asked
