"""What a merge is asked for, and what it tells."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_export.choices import Outcome


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter folder and the factor its update is multiplied with."""

    folder: Path
    weight: float = 1.0


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
