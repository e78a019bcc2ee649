"""DeLoRA (arXiv:2503.18225, eq. 8): W' = W + (λ/r)·Σᵢ bᵢ·aᵢᵀ/(‖bᵢ‖·‖aᵢ‖), columns times their norms in W."""

from lora_export.adapters.complete import complete, refuse_factor
from lora_export.adapters.config import match_pattern, pattern, whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "DeLoRA"
PEFT_TYPES = ("DELORA",)
FORMULA = "W + (λ/r)·B·diag(1/(‖aᵢ‖·‖bᵢ‖))·A·diag(‖columns of W as training began‖)"

# The norms are saved: the base may be stored in another type now.
_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAST = 1e-4  # below which PEFT takes no norm of a row of A or a column of B


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer."""
    modules = complete(file, _PARTS)
    if not modules:
        return []
    refuse_factor(file, NAME)
    ranks, rank = pattern(file.config, "rank_pattern", file.where, int), whole(file.config, "r", file.where)
    return [_update(file, name, keys, match_pattern(ranks, name, rank)) for name, keys in modules.items()]


def _update(file: AdapterFile, name: str, keys: dict[str, str], rank: int) -> TargetUpdate:
    used = tuple(keys[p] for p in _PARTS)
    a, b, size, norms = (file.tensors[k].shape for k in used)
    if len(a) != 2 or len(b) != 2 or (a[0], b[1], size, norms) != (rank, rank, (1,), a[1:]):
        raise file.refuse(
            f"A has the shape {list(a)}, B {list(b)}, lambda {list(size)}, w_norm {list(norms)}; r is {rank}",
            tensor=used[0],
            expected="A (r, in), B (out, r), lambda (1), w_norm (in), with the r of rank_pattern",
        )

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        down, up, limit, column_norms = (file.read(k) for k in used)
        lengths = down.norm(dim=1).clamp(min=_LEAST) * up.norm(dim=0).clamp(min=_LEAST)
        return LowRankUpdate(LowRank(up * (limit / rank / lengths), down * column_norms, 1.0))

    shapes = ((b[0], a[1]),)
    return TargetUpdate(f"{name}.weight", "delora", used, shapes, load, adds=True, low_rank=True)
