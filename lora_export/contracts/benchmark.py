"""What a benchmark is asked for, and what it found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_export.choices import Phase, Verdict


@dataclass(frozen=True)
class GraphComparison:
    """Base and merged graphs after optimization for a provider, and whether they are one and the same.

    base_sha256, merged_sha256: of the canonical forms, which name no weight's value; differences: by node, the
    first ones; warnings: what would make the merged model slower, in the graphs or in how they will be run;
    placement: provider → nodes of the merged graph, as ONNX Runtime assigns them.
    """

    identical: bool
    base_sha256: str
    merged_sha256: str
    nodes: int
    placement: Mapping[str, int]
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkArm:
    """Something that is measured. graphs: .onnx files, an encoder's first; the last of several does a step.

    adapter: an .onnx_adapter file that is active whenever the graph runs; pytorch: folders of a base and an adapter
    that PyTorch runs unmerged, in place of graphs.
    """

    name: str
    graphs: tuple[Path, ...] = ()
    adapter: Path | None = None
    pytorch: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Percentile:
    """Of all calls of an arm in a cell, in milliseconds, with its 90 % interval over blocks."""

    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmTimes:
    """One arm of one cell. ratio: of its block medians over the base's, with its 90 % interval.

    tokens_per_second: new ones in a step, read ones in a prompt; first_token_ms: of a decoder's prompt, the time to
    the logits of the first new token; memory_bytes: what loading and running it took on the device at most.
    """

    p50: Percentile
    p95: Percentile
    p99: Percentile
    tokens_per_second: float
    first_token_ms: float | None
    memory_bytes: int | None
    ratio: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Cell:
    """One batch × prompt length × phase. Times are medians in milliseconds; ratio is merged over base.

    sessions: how often its sessions were opened; kv_in_place: the cache is one buffer, which a step writes into;
    control: the arm that must be found slower, or else there is no verdict; reason: for a verdict that does not
    follow from the interval alone.
    """

    batch: int
    prompt: int
    phase: Phase
    cuda_graph: bool
    base_ms: float | None
    merged_ms: float
    unmerged_ms: float | None
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    verdict: Verdict
    noise_floor: float | None = None  # half-width of the interval of base against base, around no difference
    unmerged_ratio: float | None = None
    unmerged_ci_low: float | None = None
    unmerged_ci_high: float | None = None
    pairs: int = 0
    sessions: int = 1
    kv_in_place: bool = False
    control: str | None = None
    reason: str = ""
    arms: Mapping[str, ArmTimes] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkResult:
    """conditions: cell → one reading a block of load, clocks, power, … as `environment` names them."""

    provider: str
    provider_verified: bool
    cells: tuple[Cell, ...]
    noise_floor: float | None
    graph_identical: bool | None
    verdict: Verdict
    seconds: float
    environment: Mapping[str, Any] = field(default_factory=dict)
    graph: GraphComparison | None = None
    notes: tuple[str, ...] = ()
    samples: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict, repr=False)
    conditions: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Everything but the raw samples and the readings, which have files of their own."""
        out = asdict(self)
        del out["samples"], out["conditions"]
        return out | {"graph_differences": list(self.graph.differences) if self.graph else []}
