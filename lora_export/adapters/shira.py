"""SHiRA (arXiv:2406.13175): W' = W + S, S sparse: the trained elements and where they lie are in the file."""

from dataclasses import dataclass

from lora_export.adapters.config import Ranked
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.sparse import SparseUpdate
from lora_export.contracts import TargetUpdate

NAME = "SHiRA"
FORMULA = "W + S, S zero but for the trained elements"

_PARTS = ("shira_weight", "shira_indices")


@dataclass(frozen=True)
class CountedTarget(TargetUpdate):
    """A matrix whose rows and columns are `sides` together: as many numbers are trained as LoRA of rank r has."""

    sides: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) and sum(shape) == self.sides


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer."""
    rank = file.settings(Ranked).r
    return [_update(module, rank) for module in complete(file, *_PARTS)]


def _update(module: AdaptedModule, rank: int) -> TargetUpdate:
    file, (values_key, places_key) = module.file, module.used
    (count,), places = file.shape(values_key, 1), file.shape(places_key, 2)
    if places != (2, count) or count % rank:
        raise module.disagree(
            "r·(in + out) values, and (2, values): the row and the column of each", also=f"r is {rank}"
        )

    def load(shape: tuple[int, ...]) -> SparseUpdate:
        rows, columns = file.indices(places_key, max(shape))
        if int(rows.max()) >= shape[0] or int(columns.max()) >= shape[1]:
            raise file.refuse(
                f"an index lies outside of a weight of the shape {list(shape)}",
                tensor=places_key,
                expected="rows and columns of the weight: the base that the adapter was trained on",
            )
        return SparseUpdate(rows, columns, file.weight * file.read(values_key))

    shapes = ((None, None),)
    return CountedTarget(module.weight, "shira", module.used, shapes, load, adds=True, sides=count // rank)
