"""report.json: what a run was asked for, and the result of each stage that ran."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_export.contracts.benchmark import BenchmarkResult
from lora_export.contracts.budget import BudgetSearch
from lora_export.contracts.export import ExportResult
from lora_export.contracts.merging import MergeResult
from lora_export.contracts.story import CacheUse, PipelineFacts
from lora_export.contracts.validation import ValidationResult

SCHEMA_VERSION: Literal[1] = 1


@dataclass(frozen=True)
class NamedSource:
    """A base or an adapter as documents name it: never by a path of this machine. commit: of a Hub repository."""

    name: str
    commit: str | None = None


@dataclass(frozen=True)
class NamedAdapter(NamedSource):
    """weight: the factor that its update was multiplied with."""

    weight: float = 1.0


@dataclass(frozen=True)
class NamedSources:
    base: NamedSource | None = None
    adapters: tuple[NamedAdapter, ...] = ()


@dataclass(frozen=True)
class Report:
    """created: in ISO 8601; options: every option of the run; a stage that did not run is None."""

    schema_version: Literal[1]
    title: str
    created: str
    tool_version: str
    status: Literal["passed", "failed"]
    options: Mapping[str, object]
    sources: NamedSources
    merge: MergeResult | None = None
    validate: ValidationResult | None = None
    export: ExportResult | None = None
    benchmark: BenchmarkResult | None = None
    budget: BudgetSearch | None = None
    pipeline: PipelineFacts | None = None
    cache: CacheUse | None = None


@dataclass(frozen=True)
class ReportPages:
    """The pages that `report` wrote."""

    html: Path
    markdown: Path
