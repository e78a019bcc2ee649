"""DoRA (arXiv:2402.09353, eq. 5): V = W + s·B·A; W' = (m / ‖V‖)·V, the norm taken for each output."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters import lora
from lora_export.adapters.config import parse_lora
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, modules
from lora_export.adapters.updates import LowRank
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "DoRA"
FORMULA = "(m / ‖V‖)·V with V = W + s·B·A, ‖V‖ for each output; W is the base that training saw"


@dataclass(frozen=True)
class DoraUpdate:
    """magnitude: fp32, one for each output. Outputs are the rows of a linear layer's weight and of a
    convolution's, but the columns of a Conv1D's and of an embedding's: then the norm needs the whole weight.
    """

    low_rank: LowRank
    magnitude: "torch.Tensor"
    outputs_are_rows: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        changed = self.low_rank.added_to(weight, rows)
        return changed.mul_(self._factor(changed, rows)).reshape(weight.shape)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """(m / ‖V‖)·(terms + s·|B|·|A|): the numbers that the result is summed up from, without their signs."""
        changed = self.low_rank.added_to(weight.clone(), rows)
        positive = LowRank(self.low_rank.left.abs(), self.low_rank.right.abs(), abs(self.low_rank.scaling))
        added = positive.added_to(terms.clone(), rows)
        return added.mul_(self._factor(changed, rows).abs()).reshape(weight.shape)

    def _factor(self, changed: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """m / ‖V‖, to be multiplied with V."""
        import torch

        if self.outputs_are_rows:
            factor: torch.Tensor = (self.magnitude[rows] / torch.linalg.norm(changed, dim=1))[:, None]
        else:
            factor = (self.magnitude / torch.linalg.norm(changed, dim=0))[None, :]
        return factor


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each module that has a magnitude; with use_dora each module must have one."""
    magnitudes = {module.name: module.keys[lora.MAGNITUDE] for module in modules(file, lora.MAGNITUDE)}
    wanted = bool(file.config.get("use_dora"))
    if not magnitudes and not wanted:
        return []
    if not wanted:
        raise file.refuse(
            "the file holds DoRA magnitudes, but use_dora is not set",
            tensor=min(magnitudes.values()),
            expected="use_dora: true in adapter_config.json",
        )
    if file.config.get("lora_bias"):
        raise file.refuse("DoRA with lora_bias", expected="one of the two: PEFT does not train them together")
    file.refuse_weight(NAME)
    updates = []
    for module in lora.lora_modules(file, parse_lora(file.config, file.where)):
        if module.name not in magnitudes:
            raise file.refuse(
                "use_dora is set, but this module has no magnitude",
                tensor=module.name,
                expected=f"a tensor …{lora.MAGNITUDE}",
                next_step=SAVE_AGAIN,
            )
        updates.append(_update(module, magnitudes.pop(module.name)))
    if magnitudes:
        raise file.refuse("a DoRA magnitude without A and B", tensor=min(magnitudes), expected="both matrices")
    return updates


def _update(module: lora.LoraModule, key: str) -> TargetUpdate:
    _ = module.scaling  # refuses a rank that the configuration does not give
    file = module.file
    outputs = module.shapes[0][1 if module.layer_type == "embedding" else 0]
    size = math.prod(file.tensors[key].shape)
    if size != outputs:
        raise file.refuse(
            f"the magnitude has {size} values, the layer {outputs} outputs",
            tensor=key,
            expected="one magnitude for each output",
        )

    def outputs_are_rows(shape: tuple[int, ...]) -> bool:
        return not module.is_transposed(shape)

    def load(shape: tuple[int, ...]) -> DoraUpdate:
        return DoraUpdate(module.load(shape), file.read(key).reshape(-1), outputs_are_rows(shape))

    keys = (*module.used, key)
    return TargetUpdate(module.weight, "dora", keys, module.shapes, load, tied=file.tied, row_wise=outputs_are_rows)
