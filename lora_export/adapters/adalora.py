"""AdaLoRA (arXiv:2303.10512, eq. 3): W' = W + s·B·(E ⊙ A) with s = alpha/(init_r + 1e-5) and pruned E."""

from lora_export.adapters.config import number, refuse_unmergeable, whole
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile, FlatTarget
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "AdaLoRA"
PEFT_TYPES = ("ADALORA",)
FORMULA = "W + B·(E ⊙ A)·alpha/(init_r + 1e-5)"

_PARTS = ("lora_A", "lora_B", "lora_E")


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module. Pruned tensors may have any rank up to init_r, 0 too; `r` means nothing."""
    config = file.config
    refuse_unmergeable(config, file.where)
    alpha, init_r = number(config, "lora_alpha", file.where), whole(config, "init_r", file.where)
    scaling = file.weight * (alpha if alpha > 0 else init_r) / (init_r + 1e-5)
    ranks = _ranks(file)
    return [
        _update(file, name, keys, scaling, ranks.get(name, init_r))
        for name, keys in group(file.tensors, _PARTS).items()
    ]


def _ranks(file: AdapterFile) -> dict[str, int]:
    """Module → rank left by pruning: rank_pattern holds a mask for each `<module>.lora_E`."""
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


def _update(file: AdapterFile, name: str, keys: dict[str, str], scaling: float, rank: int) -> TargetUpdate:
    missing = [p for p in _PARTS if p not in keys]
    if missing:
        raise file.refuse(
            f"{missing[0]} of this module is missing", tensor=name, expected="lora_A, lora_B and lora_E"
        )
    a, b, e = (file.shape(keys[p], 2) for p in _PARTS)
    if not (a[0] == b[1] == rank and e == (rank, 1)):
        raise file.refuse(
            f"A {list(a)}, B {list(b)} and E {list(e)} do not have the configured rank {rank}",
            tensor=name,
            expected="A (rank, in), B (out, rank) and E (rank, 1)",
        )
    plain, transposed = (b[0], a[1]), (a[1], b[0])

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        right, left, sizes = (file.read(keys[p]) for p in _PARTS)
        right = right * sizes
        flip = file.is_conv1d(name) if plain == transposed else shape == transposed
        if flip:
            left, right = right.T, left.T
        return LowRankUpdate(LowRank(left, right, scaling))

    used = tuple(keys[p] for p in _PARTS)
    return FlatTarget(f"{name}.weight", "adalora", used, (plain, transposed), load, adds=True, low_rank=True)
