"""What a benchmark is asked for, and what it measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.choices import Phase, Verdict
from lora_export.contracts.figures import NOT_IN_JSON, Figure

if TYPE_CHECKING:
    import torch

    Forward = Callable[[Mapping[str, torch.Tensor]], object]  # a graph's inputs, by name

Samples = Mapping[str, Mapping[str, tuple[Figure, ...]]]  # cell → arm → milliseconds


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
    that PyTorch runs unmerged, in place of graphs; forward: loads, on a device, what PyTorch runs in place of
    `graphs`: it takes their inputs by name.
    """

    name: str
    graphs: tuple[Path, ...] = ()
    adapter: Path | None = None
    pytorch: tuple[Path, Path] | None = None
    forward: "Callable[[str], Forward] | None" = None

    @property
    def in_pytorch(self) -> bool:
        return self.pytorch is not None or self.forward is not None


@dataclass(frozen=True)
class Percentile:
    """Of all calls of an arm in a cell, in milliseconds, with its 90 % interval over blocks."""

    ms: Figure
    low: Figure
    high: Figure


@dataclass(frozen=True)
class ArmTimes:
    """One arm of one cell. ratio: of its block medians over the base's, with its 90 % interval.

    tokens_per_second: new ones in a step, read ones in a prompt, and latents in a step of a denoiser;
    first_token_ms: of a decoder's prompt, the time to the logits of the first new token; memory_bytes: the most
    memory of the device that loading and running took.
    """

    p50: Percentile
    p95: Percentile
    p99: Percentile
    tokens_per_second: Figure
    first_token_ms: Figure | None
    memory_bytes: int | None
    ratio: Figure | None
    ci_low: Figure | None
    ci_high: Figure | None


@dataclass(frozen=True)
class Cell:
    """One batch × prompt length × phase. Times are medians in milliseconds; ratio is merged over base.

    prompt: tokens, or for a denoiser the side of the latent;
    sessions: how often its sessions were opened; kv_in_place: the cache is one buffer, which a step writes into;
    control: the arm that must be found slower, or else there is no verdict; verdict: `equivalent_by_structure`
    where base and merged are one optimized graph, not found slower, and no test of the interval is claimed; reason:
    for a verdict that does not follow from the interval alone.
    """

    batch: int
    prompt: int
    phase: Phase
    cuda_graph: bool
    base_ms: Figure | None
    merged_ms: float
    unmerged_ms: Figure | None
    ratio: Figure | None
    ci_low: Figure | None
    ci_high: Figure | None
    verdict: Verdict
    noise_floor: Figure | None = None  # half-width of the interval of base against base, around no difference
    unmerged_ratio: Figure | None = None
    unmerged_ci_low: Figure | None = None
    unmerged_ci_high: Figure | None = None
    pairs: int = 0
    sessions: int = 1
    kv_in_place: bool | None = None  # None: in a report from before this was recorded
    control: str | None = None
    reason: str = ""
    arms: Mapping[str, ArmTimes] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in samples.json and conditions.json."""
        return f"b{self.batch}/p{self.prompt}/{self.phase}" + ("/cuda_graph" if self.cuda_graph else "")


@dataclass(frozen=True)
class Gpu:
    """A card. cuda_driver: the newest CUDA that the driver knows; mig: whether it is divided."""

    name: str | None = None
    memory_bytes: int | None = None
    driver: str | None = None
    cuda_driver: str | None = None
    power_limit_w: float | None = None
    mig: bool = False


@dataclass(frozen=True)
class GpuReading:
    """Clocks in MHz, power in watts, temperature in °C, used memory in MB; throttled: why the clocks are lowered.
    None: the card does not say."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    used_mb: int | None = None
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What the machine did during one block. load: average of the last minute; steal, others: percent of the time
    of all cores that the host took, or that other processes were busy; cpu_mhz: the mean clock, None where the
    machine hides it."""

    seconds: float
    load: float
    steal: float
    others: float
    cpu_mhz: int | None
    gpus: tuple[GpuReading, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What does not change during a run, and nothing that names the machine: no host, user or path. cuda: the
    version of each CUDA library, and of the CUDA that ONNX Runtime was built for."""

    cpu: str | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    governor: str | None = None
    ram_bytes: int | None = None
    os: str | None = None
    python: str | None = None
    onnxruntime: str | None = None
    cuda: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Environment(Machine):
    """The machine, how it was used, and blocks: cell → reading → least, median and most over all blocks (of
    `throttled`: the reasons)."""

    intra_op_threads: int | None = None
    margin: Figure | None = None
    seed: int | None = None
    blocks: Mapping[str, Mapping[str, tuple[float | str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureTime:
    """How long a whole picture takes: prompt, steps and decoding. seconds: the median of several, without loading;
    size: its side in pixels."""

    arm: str
    seconds: Figure
    steps: int
    size: int


@dataclass(frozen=True)
class BenchmarkResult:
    """ended_early: base and merged are one graph, and the measurement was a check that ended once merged was not
    slower; graph_identical: of a pipeline, of all its components; graphs: those of each component; pictures: of a
    pipeline; graph_differences: those of `graph`; samples: every timing, for samples.json; conditions: cell → a
    reading for each block, for conditions.json."""

    provider: str
    provider_verified: bool
    cells: tuple[Cell, ...]
    noise_floor: Figure | None
    graph_identical: bool | None
    verdict: Verdict
    seconds: Figure
    environment: Environment = field(default_factory=Environment)
    graph: GraphComparison | None = None
    ended_early: bool = False
    notes: tuple[str, ...] = ()
    graph_differences: tuple[str, ...] = ()
    graphs: Mapping[str, GraphComparison] = field(default_factory=dict)
    pictures: tuple[PictureTime, ...] = ()
    samples: Samples = field(default_factory=dict, repr=False, metadata=NOT_IN_JSON)
    conditions: Mapping[str, tuple[Reading, ...]] = field(default_factory=dict, repr=False, metadata=NOT_IN_JSON)
