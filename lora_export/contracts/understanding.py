"""What the numbers of an adapter say: `inspect` of one adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_export.contracts.figures import Figure


@dataclass(frozen=True)
class ModuleFigures:
    """One weight that the adapter changes. norm: ‖ΔW‖ (Frobenius); relative: ‖ΔW‖/‖W‖, with a base alone.

    rank: that it was trained with (None: the kind has none); singular_values: falling, the first few hundred;
    energy: share of ‖ΔW‖² that the first 1, 2, … have; enough: least rank for 99 % of it; share: of ‖ΔW‖² of the
    adapter. note: what the figures are of, where that is not the whole change. name: as records of a merge have it;
    type: q_proj of model.layers.0.self_attn.q_proj.weight, net.2 of ff.net.2.weight, unless it is given.
    """

    name: str
    kind: str
    rank: int | None
    alpha: Figure | None
    scaling: Figure | None
    norm: Figure
    weight_norm: Figure | None
    relative: Figure | None
    singular_values: tuple[Figure, ...]
    effective_rank: Figure
    stable_rank: Figure
    energy: tuple[Figure, ...]
    enough: int
    share: Figure = 0.0
    finite: bool = True
    note: str = ""
    type: str = ""

    def __post_init__(self) -> None:
        rest, _, leaf = self.name.rpartition(".")[0].rpartition(".")
        own = f"{rest.rpartition('.')[2]}.{leaf}" if leaf.isdigit() and rest else leaf
        object.__setattr__(self, "type", self.type or own)


@dataclass(frozen=True)
class TypeFigures:
    """All weights of a type: how many, their share of ‖ΔW‖², and medians of the rest."""

    modules: int
    share: Figure
    norm: Figure
    relative: Figure | None
    effective_rank: Figure
    enough: Figure


@dataclass(frozen=True)
class Truncation:
    """All low-rank modules cut to a rank: the share of ‖ΔW‖² that is kept, and of the numbers that are left."""

    rank: int
    energy_kept: Figure
    parameters: Figure


@dataclass(frozen=True)
class Understanding:
    """sentences: what the figures say; warnings: signs of trouble; skipped: module → why it has no figures."""

    kind: Literal["adapter"] = field(default="adapter", init=False)
    adapter: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    truncation: tuple[Truncation, ...]
    by_type: Mapping[str, TypeFigures]
    modules: tuple[ModuleFigures, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
