"""What LoHa and LoKr share: the parts of a module, its rank and scaling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import Number, PatternedRank, PositiveNumber, match_pattern
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, AdaptedModule, modules

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Settings(PatternedRank):
    """s = alpha/r, both with patterns of their own."""

    alpha: Number
    alpha_pattern: Mapping[str, PositiveNumber] | None = None


@dataclass(frozen=True)
class LycorisModule(AdaptedModule):
    """The tensors of one module, and the factor of its delta."""

    rank: int
    scaling: float

    def check(self, part: str, dimension: int) -> None:
        """That a factor has the configured rank in one of its dimensions."""
        if self.shape(part)[dimension] != self.rank:
            raise self.disagree(
                "r and rank_pattern that describe the file", part, also=f"the configured rank is {self.rank}"
            )


def read_modules(
    file: AdapterFile, markers: tuple[str, ...], sets: tuple[frozenset[str], ...]
) -> list[LycorisModule]:
    """Every module with its parts, which must be one of the complete `sets`."""
    settings, complete = file.settings(Settings), []
    for plain in modules(file, *markers):
        name, keys = plain.name, plain.keys
        if frozenset(keys) not in sets:
            raise file.refuse(
                f"this module has only {', '.join(sorted(keys))}",
                tensor=name,
                expected="one of: " + "; ".join(" ".join(sorted(s)) for s in sets),
                next_step=SAVE_AGAIN,
            )
        rank, alpha = settings.rank(name), match_pattern(settings.alpha_pattern, name, settings.alpha)
        module = LycorisModule(file, name, keys, rank, file.weight * alpha / rank)
        for part in module.keys:
            _check_dimensions(module, part)
        complete.append(module)
    return complete


def product(equation: str, *factors: "torch.Tensor") -> "torch.Tensor":
    """An einsum in float64, rounded once to the type of the factors: its terms may cancel."""
    import torch

    exact: torch.Tensor = torch.einsum(equation, *(f.double() for f in factors))
    return exact.to(factors[0].dtype)


def _check_dimensions(module: LycorisModule, part: str) -> None:
    """Matrices have two; the core (r, r, kernel…) of a Tucker product and a factor that is whole may have more."""
    shape, core = module.shape(part), "_t" in part
    whole_factor = part == "lokr_w2"
    good = len(shape) > 2 and shape[:2] == (module.rank, module.rank) if core else len(shape) == 2
    if not good and not (whole_factor and len(shape) > 2):
        raise module.disagree(
            "(r, r, kernel…)" if core else "a matrix", part, also=f"the configured rank is {module.rank}"
        )
