"""The frozen dataclasses that travel between rooms. No logic beyond what a reader of one value would compute."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lora_export.choices import (
    Activations,
    BaseWeights,
    Certify,
    Combine,
    ExpertLayout,
    ExpertPacking,
    MajoritySign,
    ModelKind,
    Outcome,
    Phase,
    Precision,
    Provider,
    Requantization,
    Verdict,
)

if TYPE_CHECKING:
    import torch


# --- tensors and files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, known from its header alone.

    dtype is the file's own name for it (F32, BF16, U8, …); start and end are byte offsets in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class TensorSource(Protocol):
    """Named tensors that are read when somebody asks, and not before."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> "torch.Tensor": ...

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) of the first dimension; a scalar has one."""
        ...

    def read_bytes(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Bytes [start, stop) of a tensor as they lie in the file, uint8."""
        ...


class Update(Protocol):
    """What an adapter does to one weight.

    `apply(weight, rows)`: weight is fp32, the rows [rows.start, rows.stop) of the whole; returns an fp32 tensor of
    the same shape, which may be the weight itself, changed in place. With its tensors in float64, all is float64.
    Not a delta: replaced rows and normalised weights are no deltas.
    """

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor": ...


@dataclass(frozen=True)
class TargetUpdate:
    """What an adapter does to one weight, known from headers: nothing is read before `load`.

    target: the weight's name in the model (`model.layers.0.self_attn.q_proj.weight`); shapes: the shapes of
    that weight that this fits, None for a size that the adapter does not tell; load(shape): reads the
    adapter's tensors for that shape; keys: the adapter's own names of them; replaces: the old weight does not
    matter (and may be absent); optional: a base without this weight (a bias) needs no update; tied: a weight
    that is tied to this one gets the same update, so the two stay tied; row_wise(shape): whether rows of the result
    depend on the same rows of the weight alone, so that blocks of rows may be given; copies: how often the block is
    in memory at once, counted in fp32, while it is read, changed, judged and rounded; adds: the change is the same
    for every weight; low_rank: `load` gives adapters.lora.LowRankUpdate; owner: which of the merged adapters it is
    of; wide: it takes float64, whatever is written; parts: of several adapters combined, the updates of each.
    """

    target: str
    kind: str
    keys: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    load: Callable[[tuple[int, ...]], Update]
    replaces: bool = False
    optional: bool = False
    tied: bool = False
    row_wise: Callable[[tuple[int, ...]], bool] = lambda shape: True
    copies: int = 6
    adds: bool = False
    low_rank: bool = False
    owner: int = 0
    wide: bool = False
    parts: tuple[tuple["TargetUpdate", ...], ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be meant."""
        return any(
            len(known) == len(shape) and all(k in (None, n) for k, n in zip(known, shape, strict=True))
            for known in self.shapes
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter understood: one update or more for each target weight, every tensor of the file accounted for.

    weight: the factor that it is combined with, where its updates do not have it already.
    """

    folder: Path
    kind: str
    config: Mapping[str, Any]
    updates: tuple[TargetUpdate, ...]
    tensors: Mapping[str, TensorInfo]
    weight: float = 1.0

    @property
    def tensor_count(self) -> int:
        return len(self.tensors)


# --- merge -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter folder and the factor its update is multiplied with."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """combine: how several adapters become one change; none: each is applied to what the one before it left.

    combine_on: their deltas, or their factors A and B apart (as PEFT's methods of these names do); density: the
    share of a delta that ties, dare and magnitude_prune keep; svd_rank: of the combined delta (None: as it is;
    for svd the largest of the adapters).
    """

    base_weights: BaseWeights = "dequantized"
    training_quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    training_double_quant: bool = False
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    max_shard_size: int | None = None  # bytes; None keeps the base's own shards
    max_memory: int = 2 * 2**30  # bytes for the arithmetic, besides what Python and its libraries take
    expert_packing: ExpertPacking = "auto"
    expert_layout: ExpertLayout = "auto"
    allow_nonfinite: bool = False
    device: Literal["cpu", "cuda"] = "cpu"  # where the arithmetic is done
    certify: Certify = "sampled"  # which rows are computed again in float64
    combine: Combine = "none"
    combine_on: Literal["deltas", "factors"] = "deltas"
    density: float | None = None
    seed: int = 0  # of dare's random choice
    majority_sign: MajoritySign = "total"
    svd_rank: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Interference:
    """What two adapters do to each other: in one weight, or in all.

    first, second: their names; cosine: of their deltas; sign_conflicts: share of the elements that both change in
    different directions (½: they have nothing to do with each other); norm_ratio: ‖first‖/‖second‖, weights and
    all.
    """

    tensor: str | None
    first: str
    second: str
    cosine: float
    sign_conflicts: float
    norm_ratio: float | None


@dataclass(frozen=True)
class BaseCheck:
    """One sign of whether the base is the one that an adapter was trained on; note says what was compared."""

    name: str
    outcome: Outcome
    note: str


@dataclass(frozen=True)
class TensorRecord:
    """What happened to one tensor of the output; `survival` is ⟨W'−W, Δ⟩/⟨Δ, Δ⟩ after rounding.

    Against float64, in units in the last place of the output type, over `checked` elements: max_ulps, mean_ulps.
    saturated: how many elements became the largest number or infinity. hash_in, hash_out: of the bytes of the
    base's tensor and of the output's (certificate.py says how).
    """

    name: str
    operation: Literal["copied", "updated", "replaced", "dequantized", "converted"]
    dtype: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...] = ()
    relative_delta: float | None = None
    survival: float | None = None
    max_ulps: float | None = None
    mean_ulps: float | None = None
    checked: int = 0
    saturated: int = 0
    hash_in: str | None = None
    hash_out: str | None = None


@dataclass(frozen=True)
class MergeResult:
    output: Path
    tensors: Mapping[str, int]
    adapter_tensors: Mapping[str, int]
    seconds: float
    peak_rss_bytes: int
    delta_survival: float | None
    certificate: Path
    base_weights: str
    dtype: str
    records: tuple[TensorRecord, ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    base_checks: tuple[BaseCheck, ...] = ()
    interference: tuple[Interference, ...] = field(default=(), repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "tensors": dict(self.tensors),
            "adapter_tensors": dict(self.adapter_tensors),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "delta_survival": self.delta_survival,
            "certificate": str(self.certificate),
            "base_weights": self.base_weights,
            "dtype": self.dtype,
            "warnings": list(self.warnings),
            "base_checks": [asdict(c) for c in self.base_checks],
            "interference": [asdict(i) for i in self.interference],
        }


# --- verification ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One check of what an earlier run left; where it failed, note says what, in which file and tensor."""

    name: str
    passed: bool
    note: str


@dataclass(frozen=True)
class Verification:
    """not_checked: what could not be looked at, in words, and what it would take."""

    checks: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "checks": [asdict(c) for c in self.checks],
            "not_checked": list(self.not_checked),
        }


@dataclass(frozen=True)
class PackageResult:
    """What `package` wrote. files: name → bytes; measured: of each variant, beside the run's own export."""

    output: Path
    target: str
    name: str
    files: Mapping[str, int]
    variants: tuple[str, ...]
    measured: Mapping[str, Mapping[str, Any]]
    archive: str | None
    signed: bool
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output), "bytes": sum(self.files.values())}


# --- validation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One measured figure against its threshold; `note` says where the threshold comes from."""

    name: str
    value: float
    threshold: float | None  # None for a figure that is only reported
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens under `model`.

    model: base, unmerged, merged, "onnx int4", dequantized, original, …; tokens: how many were predicted.
    """

    model: str
    value: float
    tokens: int


@dataclass(frozen=True)
class Deviation:
    """Where the merged model first leaves the unmerged one, in the order of the forward pass.

    module: the first whose output differs by more than the floor although its inputs agree (`value` and `floor`:
    largest difference and noise floor of that output); where no output shows what a wrong tensor does, the first
    that holds one. tensors: its weights that differ, worst first.
    """

    module: str
    value: float
    floor: float
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSurvival:
    """What remains of the adapter's effect on the outputs of a model in lower precision.

    model: as in Perplexity; share: of the effect that is kept, 1 for all, 0 for none, None if the adapter has none;
    kl_base: mean KL(base‖merged) in nats, the effect; kl_lost: mean KL(merged‖model).
    """

    model: str
    share: float | None
    kl_base: float
    kl_lost: float


@dataclass(frozen=True)
class BaseComparison:
    """An adapter merged into one of the bases that it could belong to, on a text.

    base: trained (the unmerged forward on the dequantized base, the yardstick), dequantized, original or
    requantized; kl_trained: mean KL from the model as it was trained, in nats.
    """

    base: str
    perplexity: float
    kl_trained: float


@dataclass(frozen=True)
class CompareBases:
    """requantize: also measure what putting the merged weights back into this format does.

    original: the 16-bit base of which a stored 4- or 8-bit base was made.
    """

    requantize: Requantization | None = None
    original: Path | None = None


@dataclass(frozen=True)
class ExportedPair:
    """The ONNX folders of a merged model and of the base exported the same way.

    nbytes: size of the merged one's files; prefix: of the names of its checks; graphs: file names, alike in both.
    """

    merged: Path
    base: Path
    precision: Precision
    nbytes: int
    prefix: str = "onnx_"
    graphs: tuple[str, ...] = ("model.onnx",)

    @property
    def name(self) -> str:
        return f"onnx {self.precision}"

    @property
    def merged_graphs(self) -> tuple[Path, ...]:
        return tuple(self.merged / name for name in self.graphs)

    @property
    def base_graphs(self) -> tuple[Path, ...]:
        return tuple(self.base / name for name in self.graphs)


@dataclass(frozen=True)
class ValidationResult:
    """advice: sentences for a person, such as which base or precision to ship, and why."""

    checks: tuple[Check, ...]
    samples: tuple[Mapping[str, str], ...] = ()  # prompt, base, unmerged, merged: greedy continuations
    kl_by_position: tuple[float, ...] = ()
    weight_errors: tuple[str, ...] = ()  # tensors that are not what the adapter makes of the base, worst first
    perplexities: tuple[Perplexity, ...] = ()
    deviation: Deviation | None = None  # looked for where a check failed
    adapter_survival: tuple[AdapterSurvival, ...] = ()
    bases: tuple[BaseComparison, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [asdict(c) for c in self.checks],
            "samples": [dict(s) for s in self.samples],
            "kl_by_position": list(self.kl_by_position),
            "weight_errors": list(self.weight_errors),
            "perplexities": [asdict(p) for p in self.perplexities],
            "deviation": asdict(self.deviation) if self.deviation else None,
            "adapter_survival": [asdict(s) for s in self.adapter_survival],
            "bases": [asdict(b) for b in self.bases],
            "advice": list(self.advice),
        }


# --- export ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizationOptions:
    """How the weights of an int4, int8 or nf4 graph are quantized.

    block_size: numbers that share a scale (None: 32, and 64 for nf4); algorithm: how a scale is chosen;
    accuracy_level: in which type products are computed (None: int8 (4) on the CPU, as the inputs elsewhere (0));
    keep: nodes that stay as they are, by name or pattern, or `auto`: those that do the most damage;
    eight_bits: nodes of an int4 graph that are int8; embeddings: quantize those, too (not for nf4); activations: of
    an int8 graph that does not generate: as they are, or int8, by ranges that are found while it runs (dynamic) or
    on `calibration`, a file of one text a line (static; None: built-in texts).
    """

    block_size: int | None = None
    symmetric: bool = True
    algorithm: Literal["default", "rtn", "k_quant"] = "default"
    accuracy_level: int | None = None
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    embeddings: bool = False
    activations: Activations = "float"
    calibration: Path | None = None


@dataclass(frozen=True)
class ExportResult:
    """An exported folder. `files` maps a file name to its size in bytes; `nodes` counts the nodes of all graphs.

    task: Optimum's name of it; graphs: file names of the graphs, the encoder's first where there are several;
    activations: of an int8 graph, as in QuantizationOptions; fused_against_plain: the largest relative difference
    between a fused graph's outputs and those of one without optimizations, None where they were not compared.
    """

    output: Path
    engine: str
    precision: Precision
    nodes: int
    seconds: float
    files: Mapping[str, int]
    kind: ModelKind = "decoder"
    task: str = "text-generation"
    graphs: tuple[str, ...] = ("model.onnx",)
    activations: Activations = "float"
    fused_against_plain: float | None = None

    @property
    def model(self) -> Path:
        """The graph that reads the input: the only one, or the encoder's."""
        return self.output / self.graphs[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.output / name for name in self.graphs)

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "engine": self.engine,
            "precision": self.precision,
            "nodes": self.nodes,
            "seconds": round(self.seconds, 3),
            "files": dict(self.files),
            "kind": self.kind,
            "task": self.task,
            "graphs": list(self.graphs),
            "fused_against_plain": self.fused_against_plain,
        }


# --- benchmark ---------------------------------------------------------------------------------------------


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
class BenchmarkOptions:
    """shapes: (batch, prompt tokens) of each cell; margin: the largest relative difference that still counts as
    none, set before anything is measured; max_seconds: for all cells together, None: a minute for each shape, or
    20 s for each shape and set of sessions; sessions: how often all sessions are opened, each time in another
    order.
    """

    provider: Provider = "auto"
    shapes: tuple[tuple[int, int], ...] = ((1, 128),)
    margin: float = 0.01
    max_seconds: float | None = None
    sessions: int = 1
    seed: int = 0

    @property
    def seconds(self) -> float:
        each = 60.0 if self.sessions == 1 else 20.0 * self.sessions
        return each * len(self.shapes) if self.max_seconds is None else self.max_seconds


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


# --- the whole story ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A base or adapter as named by the user, the folder it was found in, and the commit it was pinned to."""

    name: str
    folder: Path
    commit: str | None = None


class Progress(Protocol):
    """Talk for a person; stages report to it and never print."""

    def stage(self, title: str) -> None: ...

    def detail(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...
