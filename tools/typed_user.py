# pyright: strict
"""A user's program that calls the whole API. It is not run: `make release` has pyright check it with the wheel."""

from pathlib import Path
from typing import Any, assert_type

import lora_export
from lora_export import api
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkOptions,
    BenchmarkResult,
    Cell,
    Check,
    ExportOptions,
    ExportResult,
    FleetOptions,
    FleetResult,
    MergeOptions,
    MergeResult,
    PackageOptions,
    PackageResult,
    PlannedRow,
    QuantizationOptions,
    RankOptions,
    Story,
    StoryOptions,
    Understanding,
    ValidationOptions,
    ValidationResult,
    Verification,
    VerifyOptions,
)
from lora_export.errors import GateFailed, JobsError, LoraExportError
from lora_export.progress import Silent
from lora_export.serving import Plugged, Swapped


class Mine(Silent):
    def advance(self, done: int, total: int) -> None:
        print(f"{done / total:.0%}")


def stages(base: Path, adapter: Path, out: Path) -> Story:
    options = MergeOptions(dtype="float16")
    merged = lora_export.merge(base, [(adapter, 0.5), "other:0.5"], out, options, progress=Mine())
    assert_type(merged, MergeResult)
    assert_type(merged.peak_rss_bytes, int)
    validated = lora_export.validate(base, adapter, out, options=ValidationOptions(tolerance=4.0))
    assert_type(validated, ValidationResult)
    assert_type(validated.checks[0], Check)
    exported = lora_export.export(
        out, "onnx", options=ExportOptions(precision="int4", quantization=QuantizationOptions(algorithm="gptq"))
    )
    assert_type(exported, ExportResult)
    measured = lora_export.benchmark("onnx", "measured", base="base-onnx", options=BenchmarkOptions(margin=0.01))
    assert_type(measured, BenchmarkResult)
    assert_type(measured.cells[0], Cell)
    story = lora_export.merge_and_export("owner/base@main", AdapterChoice(adapter, 1.0), out, StoryOptions())
    assert_type(story.merge, MergeResult)
    return story


def tools(base: Path, adapter: Path, run: Path) -> dict[str, Any]:
    assert_type(lora_export.package(run, "genai", "package", PackageOptions()), PackageResult)
    assert_type(lora_export.verify("package", base, adapter, VerifyOptions()), Verification)
    assert_type(lora_export.understand(adapter, base), Understanding)
    print(lora_export.plan(base, adapter), lora_export.switch(run, adapter, "next", base))
    print(lora_export.combine([adapter, "other"], "both", rank=RankOptions()))
    print(lora_export.extract(base, "tuned", "taken", rest="drop"), lora_export.truncate(adapter, "shorter"))
    print(api.report(run).html, lora_export.inspect(run)["kind"])
    return lora_export.env()


def fleets(jobs: Path) -> FleetResult:
    assert_type(lora_export.plan_fleet(jobs, "root"), tuple[PlannedRow, ...])
    return api.fleet(jobs, "root", FleetOptions())


def serve(folder: Path) -> list[Any]:
    swapped = Swapped(folder)
    swapped.switch(swapped.folder)
    return Plugged(folder, "cpu").run(None, {}, adapter="one")


def failures(error: LoraExportError) -> str:
    assert_type(error.where, str | None)
    if isinstance(error, JobsError):
        assert_type(error.faults, tuple[str, ...])
    return f"{error.found}; try: {error.next_step}" if isinstance(error, GateFailed) else error.found
