"""What a merge is asked for, and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_export.choices import BaseWeights, Certify, Combine, ExpertLayout, ExpertPacking, MajoritySign, Outcome
from lora_export.contracts.figures import NOT_IN_JSON, Figure


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
    task: str | None = None  # of the merged model, where the adapter brings a head and does not say of which task
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
    cosine: Figure
    sign_conflicts: Figure
    norm_ratio: Figure | None


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
    relative_delta: Figure | None = None
    survival: Figure | None = None
    max_ulps: Figure | None = None
    mean_ulps: Figure | None = None
    checked: int = 0
    saturated: int = 0
    hash_in: str | None = None
    hash_out: str | None = None


@dataclass(frozen=True)
class MergeResult:
    output: Path
    tensors: Mapping[str, int]
    adapter_tensors: Mapping[str, int]
    seconds: Figure
    peak_rss_bytes: int
    delta_survival: Figure | None
    certificate: Path
    base_weights: str
    dtype: str
    records: tuple[TensorRecord, ...] = field(default=(), repr=False, metadata=NOT_IN_JSON)
    warnings: tuple[str, ...] = ()
    base_checks: tuple[BaseCheck, ...] = ()
    interference: tuple[Interference, ...] = field(default=(), repr=False)
