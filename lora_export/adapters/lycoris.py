"""What LoHa and LoKr share: the parts of a module, its rank and scaling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import match_pattern, number, pattern, whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """The tensors of one module by their short names, and the factor of its delta."""

    file: AdapterFile
    module: str
    keys: Mapping[str, str]
    rank: int
    scaling: float

    def shape(self, part: str) -> tuple[int, ...]:
        """From the header."""
        return self.file.tensors[self.keys[part]].shape

    def check(self, part: str, dimension: int) -> None:
        """That a factor has the configured rank in one of its dimensions."""
        if self.shape(part)[dimension] != self.rank:
            raise self.file.refuse(
                f"{part} has the shape {list(self.shape(part))}, the configured rank is {self.rank}",
                tensor=self.keys[part],
                expected="r and rank_pattern that describe the file",
            )


def read_parts(file: AdapterFile, markers: tuple[str, ...], sets: tuple[frozenset[str], ...]) -> list[Parts]:
    """The parts of every module; each must be one of the complete `sets`."""
    found = []
    for module, keys in group(file.tensors, markers).items():
        if frozenset(keys) not in sets:
            raise file.refuse(
                f"this module has only {', '.join(sorted(keys))}",
                tensor=module,
                expected="one of: " + "; ".join(" ".join(sorted(s)) for s in sets),
                next_step="save the adapter again: model.save_pretrained(DIR)",
            )
        rank = match_pattern(
            pattern(file.config, "rank_pattern", file.where, int), module, whole(file.config, "r", file.where)
        )
        alpha = match_pattern(
            pattern(file.config, "alpha_pattern", file.where, float),
            module,
            number(file.config, "alpha", file.where),
        )
        parts = Parts(file, module, keys, rank, file.weight * float(alpha) / rank)
        for part in keys:
            _check_dimensions(parts, part)
        found.append(parts)
    return found


def product(equation: str, *factors: "torch.Tensor") -> "torch.Tensor":
    """An einsum in float64, rounded once to the type of the factors: its terms may cancel."""
    import torch

    exact: torch.Tensor = torch.einsum(equation, *(f.double() for f in factors))
    return exact.to(factors[0].dtype)


def _check_dimensions(parts: Parts, part: str) -> None:
    """Matrices have two; the core (r, r, kernel…) of a Tucker product and a factor that is whole may have more."""
    shape, core = parts.shape(part), "_t" in part
    whole_factor = part == "lokr_w2"
    good = len(shape) > 2 and shape[:2] == (parts.rank, parts.rank) if core else len(shape) == 2
    if not good and not (whole_factor and len(shape) > 2):
        raise parts.file.refuse(
            f"{part} has the shape {list(shape)}, the configured rank is {parts.rank}",
            tensor=parts.keys[part],
            expected="(r, r, kernel…)" if core else "a matrix",
        )
