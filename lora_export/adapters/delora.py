"""DeLoRA (arXiv:2503.18225, eq. 8): W' = W + (λ/r)·Σᵢ bᵢ·aᵢᵀ/(‖bᵢ‖·‖aᵢ‖), columns times their norms in W."""

from lora_export.adapters.config import PatternedRank
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "DeLoRA"
FORMULA = "W + (λ/r)·B·diag(1/(‖aᵢ‖·‖bᵢ‖))·A·diag(‖columns of W as training began‖)"

# The norms are saved: the base may be stored in another type now.
_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAST = 1e-4  # below which PEFT takes no norm of a row of A or a column of B


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer."""
    file.refuse_factor(NAME)
    ranks = file.settings(PatternedRank)
    return [_update(module, ranks.rank(module.name)) for module in complete(file, *_PARTS)]


def _update(module: AdaptedModule, rank: int) -> TargetUpdate:
    a, b, size, norms = (module.shape(p) for p in _PARTS)
    if len(a) != 2 or len(b) != 2 or (a[0], b[1], size, norms) != (rank, rank, (1,), a[1:]):
        raise module.disagree(f"A ({rank}, in), B (out, {rank}), lambda (1), w_norm (in), with r of rank_pattern")

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        down, up, limit, column_norms = (module.read(p) for p in _PARTS)
        lengths = down.norm(dim=1).clamp(min=_LEAST) * up.norm(dim=0).clamp(min=_LEAST)
        return LowRankUpdate.of(up * (limit / rank / lengths), down * column_norms)

    return TargetUpdate(module.weight, "delora", module.used, ((b[0], a[1]),), load, adds=True, low_rank=True)
