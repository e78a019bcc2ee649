"""AdaLoRA (arXiv:2303.10512, eq. 3): W' = W + s·B·(E ⊙ A) with s = alpha/(init_r + 1e-5) and pruned E."""

from dataclasses import dataclass

from lora_export.adapters.config import Number, Positive, refuse_unmergeable
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.updates import FlatTarget, LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "AdaLoRA"
FORMULA = "W + B·(E ⊙ A)·alpha/(init_r + 1e-5)"

_PARTS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True)
class Settings:
    """rank_pattern: a mask for each `<module>.lora_E`, true for what pruning left; `r` means nothing."""

    lora_alpha: Number
    init_r: Positive


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module. Pruned tensors may have any rank up to init_r, 0 too."""
    refuse_unmergeable(file.config, file.where)
    settings, ranks = file.settings(Settings), _ranks(file)
    alpha, init_r = settings.lora_alpha, settings.init_r
    scaling = file.weight * (alpha if alpha > 0 else init_r) / (init_r + 1e-5)
    return [_update(module, scaling, ranks.get(module.name, init_r)) for module in complete(file, *_PARTS)]


def _ranks(file: AdapterFile) -> dict[str, int]:
    """Module → rank left by pruning."""
    masks = file.config.get("rank_pattern") or {}
    ranks = {}
    for name, mask in masks.items() if isinstance(masks, dict) else ():
        if not isinstance(mask, list):
            raise file.refuse(
                f"rank_pattern gives {name!r} the value {mask!r}",
                expected="a list of true and false, as AdaLoRA saves it",
            )
        ranks[name.replace(".default", "").removesuffix(".lora_E")] = sum(map(bool, mask))
    return ranks


def _update(module: AdaptedModule, scaling: float, rank: int) -> TargetUpdate:
    a, b, e = (module.file.shape(module.keys[p], 2) for p in _PARTS)
    if not (a[0] == b[1] == rank and e == (rank, 1)):
        raise module.disagree("A (rank, in), B (out, rank) and E (rank, 1)", also=f"the configured rank is {rank}")
    outputs, inputs = b[0], a[1]

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        right, left, sizes = (module.read(p) for p in _PARTS)
        return LowRankUpdate.of(left, right * sizes, scaling, module.is_flipped(shape, outputs, inputs))

    shapes = ((outputs, inputs), (inputs, outputs))
    return FlatTarget(module.weight, "adalora", module.used, shapes, load, adds=True, low_rank=True)
