"""The whole story: what a run is asked for, and what it left."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts.benchmark import BenchmarkResult
from lora_export.contracts.export import ExportResult
from lora_export.contracts.merging import MergeResult
from lora_export.contracts.validation import ValidationResult


@dataclass(frozen=True)
class Story:
    """What a run left: its folder and the result of each stage that ran."""

    output: Path
    merge: MergeResult
    export: ExportResult | None = None
    validate: ValidationResult | None = None
    benchmark: BenchmarkResult | None = None

    def as_json(self) -> dict[str, Any]:
        stages = {
            "merge": self.merge,
            "validate": self.validate,
            "export": self.export,
            "benchmark": self.benchmark,
        }
        return {
            "output": str(self.output),
            **{name: result.as_json() if result else None for name, result in stages.items()},
            "report": str(self.output / "report" / "report.html"),
        }
