"""SHiRA (arXiv:2406.13175): W' = W + S, S sparse: the trained elements and where they lie are in the file."""

from dataclasses import dataclass

from lora_export.adapters.complete import complete, integers
from lora_export.adapters.config import whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.sparse import SparseUpdate
from lora_export.contracts import TargetUpdate

NAME = "SHiRA"
PEFT_TYPES = ("SHIRA",)
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
    return [_update(file, name, keys) for name, keys in complete(file, _PARTS).items()]


def _update(file: AdapterFile, name: str, keys: dict[str, str]) -> TargetUpdate:
    values_key, places_key = (keys[p] for p in _PARTS)
    (count,), places = file.shape(values_key, 1), file.shape(places_key, 2)
    rank = whole(file.config, "r", file.where)
    if places != (2, count) or count % rank:
        raise file.refuse(
            f"{count} values, indices of the shape {list(places)}, and r is {rank}",
            tensor=places_key,
            expected="r·(in + out) values, and (2, values): the row and the column of each",
        )

    def load(shape: tuple[int, ...]) -> SparseUpdate:
        found = integers(file, places_key, max(shape))
        rows, columns = found
        if int(rows.max()) >= shape[0] or int(columns.max()) >= shape[1]:
            raise file.refuse(
                f"an index lies outside of a weight of the shape {list(shape)}",
                tensor=places_key,
                expected="rows and columns of the weight: the base that the adapter was trained on",
            )
        return SparseUpdate(rows, columns, file.weight * file.read(values_key))

    used = (values_key, places_key)
    return CountedTarget(f"{name}.weight", "shira", used, ((None, None),), load, adds=True, sides=count // rank)
