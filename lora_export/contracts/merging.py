"""What a merge is asked for, and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_export.choices import Outcome
from lora_export.contracts.figures import NOT_IN_JSON, Figure
from lora_export.contracts.progress import Source


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter: its folder, the factor that its update is multiplied with, and how the user named it."""

    folder: Path
    weight: float = 1.0
    name: str = ""
    commit: str | None = None

    @property
    def source(self) -> Source:
        return Source(self.name or str(self.folder), self.folder, self.commit)


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
    base's tensor and of the output's (checkpoint/hashing.py says how).
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
class ComponentMerge:
    """What was merged of a component of a pipeline; dtype: of its weights; kinds: how many updates are of each."""

    tensors: Mapping[str, int]
    delta_survival: Figure | None
    dtype: str
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class MergeResult:
    """Of a pipeline: sums over the components that changed, the least delta_survival of theirs, and each of them in
    components, by name."""

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
    components: Mapping[str, ComponentMerge] = field(default_factory=dict)
