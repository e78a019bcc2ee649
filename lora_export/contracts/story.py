"""The whole story: what a run is asked for, and what it left."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_export.choices import MIN_SURVIVAL, ExtraArm, Optimize, Precision, Provider
from lora_export.contracts.benchmark import BenchmarkOptions, BenchmarkResult
from lora_export.contracts.export import ExportResult, QuantizationOptions
from lora_export.contracts.merging import MergeOptions, MergeResult
from lora_export.contracts.validation import ValidationResult


@dataclass(frozen=True)
class StoryOptions:
    merge: MergeOptions = field(default_factory=MergeOptions)
    precision: Precision = "fp32"
    provider: Provider = "auto"
    engine: str | None = None
    optimize: Optimize = "full"
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    graph_from: Path | None = None  # an earlier export of the same base: its graph, its precision, its engine
    merged_folder: bool = True  # False: base and adapter go straight into the export
    benchmark: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    extra_arms: tuple[ExtraArm, ...] = ()  # measured besides base, merged and unmerged
    prompts: Path | None = None
    text: Path | None = None
    rows: int | None = 64
    tolerance: float = 4.0
    min_survival: float = MIN_SURVIVAL
    validation_memory: int | None = None  # bytes for the weights that validation compares; None: as there is
    validation_seed: int | None = None  # of what validation draws; None: another one at each run
    force: bool = False
    configured: str = ""  # a configuration file and what it gave, for the report


@dataclass(frozen=True)
class Story:
    """What a run left: its folder and the result of each stage that ran."""

    output: Path
    merge: MergeResult
    validate: ValidationResult | None = None
    export: ExportResult | None = None
    benchmark: BenchmarkResult | None = None
    report: Path = field(init=False)  # the page to read

    def __post_init__(self) -> None:
        object.__setattr__(self, "report", self.output / "report" / "report.html")
