"""The frozen dataclasses that travel between rooms. No logic beyond what a reader of one value would compute."""

from lora_export.contracts.adapters import Adapter, TargetUpdate, Update
from lora_export.contracts.benchmark import (
    ArmTimes,
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    Cell,
    Environment,
    Gpu,
    GpuReading,
    GraphComparison,
    Machine,
    Percentile,
    Reading,
    Samples,
)
from lora_export.contracts.export import ExportOptions, ExportResult, QuantizationOptions
from lora_export.contracts.merging import (
    AdapterChoice,
    BaseCheck,
    Interference,
    MergeOptions,
    MergeResult,
    TensorRecord,
)
from lora_export.contracts.packages import PackageOptions, PackageResult
from lora_export.contracts.progress import Progress, Source
from lora_export.contracts.report import NamedAdapter, NamedSource, NamedSources, Report
from lora_export.contracts.story import Story, StoryOptions
from lora_export.contracts.tensors import TensorInfo, TensorSource
from lora_export.contracts.understanding import ModuleFigures, Truncation, TypeFigures, Understanding
from lora_export.contracts.validation import (
    AdapterSurvival,
    BaseComparison,
    Check,
    CompareBases,
    Continuation,
    Deviation,
    ExportedPair,
    Perplexity,
    ValidationOptions,
    ValidationResult,
)
from lora_export.contracts.verification import Finding, Verification, VerifyOptions

__all__ = [
    "Adapter",
    "AdapterChoice",
    "AdapterSurvival",
    "ArmTimes",
    "BaseCheck",
    "BaseComparison",
    "BenchmarkArm",
    "BenchmarkOptions",
    "BenchmarkResult",
    "Cell",
    "Check",
    "CompareBases",
    "Continuation",
    "Deviation",
    "Environment",
    "ExportOptions",
    "ExportResult",
    "ExportedPair",
    "Finding",
    "Gpu",
    "GpuReading",
    "GraphComparison",
    "Interference",
    "Machine",
    "MergeOptions",
    "MergeResult",
    "ModuleFigures",
    "NamedAdapter",
    "NamedSource",
    "NamedSources",
    "PackageOptions",
    "PackageResult",
    "Percentile",
    "Perplexity",
    "Progress",
    "QuantizationOptions",
    "Reading",
    "Report",
    "Samples",
    "Source",
    "Story",
    "StoryOptions",
    "TargetUpdate",
    "TensorInfo",
    "TensorRecord",
    "TensorSource",
    "Truncation",
    "TypeFigures",
    "Understanding",
    "Update",
    "ValidationOptions",
    "ValidationResult",
    "Verification",
    "VerifyOptions",
]
