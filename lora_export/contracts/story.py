"""The whole story: what a run is asked for, and what it left."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.contracts.benchmark import BenchmarkResult
from lora_export.contracts.budget import BudgetSearch
from lora_export.contracts.export import ExportResult
from lora_export.contracts.merging import MergeResult
from lora_export.contracts.pipelines import AdapterFormat
from lora_export.contracts.validation import ValidationResult


@dataclass(frozen=True)
class StyleAdapter:
    """An adapter of a pipeline, as it was understood. format: whose names it has; modules: component → how many it
    trained there; kinds: how many modules are of each; vectors: new words; metadata: what was read of it."""

    name: str
    format: AdapterFormat
    weight: float
    modules: Mapping[str, int]
    kinds: Mapping[str, int]
    vectors: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineFacts:
    """A pipeline of images. class_name: None for a denoiser alone; models: component → its class; skipped: changed
    by the adapter, and left as they are because the run says so."""

    class_name: str | None
    models: Mapping[str, str]
    adapters: tuple[StyleAdapter, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class CachePart:
    """Something that a run needs of its base alone. what: export, measurement, or the name of an answer of the
    validation; taken: from the cache, or else computed; sha256: of its files, or of all that an answer depends on;
    note: why it was not taken, or is not kept."""

    what: str
    taken: bool
    sha256: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class CacheUse:
    """What a run took from the cache of its base. key: of the base with its options and versions, "" where nothing
    was shared; notes: why not, and what was found damaged."""

    key: str
    parts: tuple[CachePart, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Story:
    """What a run left: its folder and the result of each stage that ran. budget: None where no size or share of the
    adapter's effect was to be reached; pipeline: None for a model alone; cache: None for a run without one."""

    output: Path
    merge: MergeResult
    validate: ValidationResult | None = None
    export: ExportResult | None = None
    benchmark: BenchmarkResult | None = None
    budget: BudgetSearch | None = None
    pipeline: PipelineFacts | None = None
    cache: CacheUse | None = None
    report: Path = field(init=False)  # the page to read

    def __post_init__(self) -> None:
        object.__setattr__(self, "report", self.output / "report" / "report.html")
