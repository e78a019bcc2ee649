"""The whole story: what a run is asked for, and what it left."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_export.contracts.benchmark import BenchmarkResult
from lora_export.contracts.budget import BudgetSearch
from lora_export.contracts.export import ExportResult
from lora_export.contracts.merging import MergeResult
from lora_export.contracts.validation import ValidationResult


@dataclass(frozen=True)
class Story:
    """What a run left: its folder and the result of each stage that ran. budget: None where no size or share of the
    adapter's effect was to be reached."""

    output: Path
    merge: MergeResult
    validate: ValidationResult | None = None
    export: ExportResult | None = None
    benchmark: BenchmarkResult | None = None
    budget: BudgetSearch | None = None
    report: Path = field(init=False)  # the page to read

    def __post_init__(self) -> None:
        object.__setattr__(self, "report", self.output / "report" / "report.html")
