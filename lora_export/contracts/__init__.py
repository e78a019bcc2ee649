"""The frozen dataclasses that travel between rooms. No logic beyond what a reader of one value would compute."""

from lora_export.contracts.adapters import Adapter, TargetUpdate, Update
from lora_export.contracts.benchmark import (
    ArmTimes,
    BenchmarkArm,
    BenchmarkResult,
    Cell,
    GraphComparison,
    Percentile,
)
from lora_export.contracts.export import ExportResult
from lora_export.contracts.merging import (
    AdapterChoice,
    BaseCheck,
    Interference,
    MergeResult,
    TensorRecord,
)
from lora_export.contracts.options import (
    BenchmarkOptions,
    BenchmarkSizes,
    CompareBases,
    ExportOptions,
    MergeOptions,
    PackageOptions,
    QuantizationOptions,
    RankOptions,
    StoryOptions,
    ValidationOptions,
    VerifyOptions,
)
from lora_export.contracts.packages import PackageResult
from lora_export.contracts.progress import Progress, Source
from lora_export.contracts.story import Story
from lora_export.contracts.tensors import RowReader, TensorInfo, TensorSource
from lora_export.contracts.validation import (
    AdapterSurvival,
    BaseComparison,
    Check,
    Deviation,
    ExportedPair,
    Perplexity,
    ValidationResult,
)
from lora_export.contracts.verification import Finding, Verification

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
    "BenchmarkSizes",
    "Cell",
    "Check",
    "CompareBases",
    "Deviation",
    "ExportOptions",
    "ExportResult",
    "ExportedPair",
    "Finding",
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
    "RankOptions",
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
