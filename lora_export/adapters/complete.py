"""What kinds share whose layers have a fixed set of tensors: the set, checked, and the sizes of the weight."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SizedTarget(TargetUpdate):
    """A matrix whose rows and columns are multiples of `tiles`, of at least so many columns and elements."""

    tiles: tuple[int, int] = (1, 1)
    least_inputs: int = 0
    least: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        if not super().fits(shape) or shape[1] < self.least_inputs or math.prod(shape) < self.least:
            return False
        return all(n % tile == 0 for n, tile in zip(shape, self.tiles, strict=True))


def complete(file: AdapterFile, markers: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """module → {marker: key}, all of the markers in each module; AdapterError where one is missing."""
    modules = group(file.tensors, markers)
    for name, keys in modules.items():
        missing = [m for m in markers if m not in keys]
        if missing:
            raise file.refuse(
                f"{missing[0]} of this module is missing, {', '.join(sorted(keys))} is there",
                tensor=name,
                expected=" and ".join(markers),
                next_step="save the adapter again: model.save_pretrained(DIR)",
            )
    return modules


def refuse_factor(file: AdapterFile, kind: str) -> None:
    """For kinds whose delta PEFT gives no factor, so that no oracle says what a weight other than 1 makes."""
    if file.weight != 1.0:
        raise file.refuse(
            f"PEFT has no factor for the delta of {kind}, and the weight is {file.weight:g}",
            expected="weight 1",
            next_step="give the adapter without a weight, or merge it with --combine linear",
        )


def is_flipped(file: AdapterFile, module: str, shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape is stored (in, out), as GPT-2's Conv1D is. A square one fits both ways."""
    return file.is_conv1d(module) if outputs == inputs else shape == (inputs, outputs)


def integers(file: AdapterFile, key: str, below: int) -> "torch.Tensor":
    """Indices of any stored type, int64; AdapterError unless they are whole numbers from 0 to below − 1."""
    import torch

    stored = file.source.read(key)
    found = stored.to(torch.int64)
    if not bool(((found == stored) & (found >= 0) & (found < below)).all()):
        raise file.refuse("an index is out of range, or no whole number", tensor=key, expected=f"0 to {below - 1}")
    return found
