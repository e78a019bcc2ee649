"""The frozen dataclasses that travel between rooms. No logic beyond what a reader of one value would compute."""

from lora_export.contracts.adapters import Adapter, TargetUpdate, Update
from lora_export.contracts.benchmark import (
    ArmTimes,
    BenchmarkArm,
    BenchmarkOptions,
    BenchmarkResult,
    Cell,
    GraphComparison,
    Percentile,
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
from lora_export.contracts.story import Story, StoryOptions
from lora_export.contracts.tensors import ByteSink, RowReader, TensorInfo, TensorSource
from lora_export.contracts.validation import (
    AdapterSurvival,
    BaseComparison,
    Check,
    CompareBases,
    Deviation,
    ExportedPair,
    Perplexity,
    ValidationOptions,
    ValidationResult,
)
from lora_export.contracts.verification import Finding, Findings, Verification, VerifyOptions

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
    "ByteSink",
    "Cell",
    "Check",
    "CompareBases",
    "Deviation",
    "ExportOptions",
    "ExportResult",
    "ExportedPair",
    "Finding",
    "Findings",
    "GraphComparison",
    "Interference",
    "MergeOptions",
    "MergeResult",
    "PackageOptions",
    "PackageResult",
    "Percentile",
    "Perplexity",
    "Progress",
    "QuantizationOptions",
    "RowReader",
    "Source",
    "Story",
    "StoryOptions",
    "TargetUpdate",
    "TensorInfo",
    "TensorRecord",
    "TensorSource",
    "Update",
    "ValidationOptions",
    "ValidationResult",
    "Verification",
    "VerifyOptions",
]
