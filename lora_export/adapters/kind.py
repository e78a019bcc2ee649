"""What an adapter kind is: one module that claims tensors of an adapter file and turns them into updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_export.contracts import ExpertLayout, ExpertPacking, TargetUpdate, TensorInfo, TensorSource
from lora_export.errors import AdapterError


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it lies on disk, known from its headers.

    where: its adapter_config.json; weight: the factor that the user gave it (`-a ADAPTER:0.7`). The rest is about
    fused experts, and matters where the file cannot tell: packing of B (all experts of a rank together, or all
    ranks of an expert), layout of a square weight, and whether the architecture stores experts as (in, out).
    """

    source: TensorSource
    config: Mapping[str, Any]
    where: Path
    weight: float = 1.0
    expert_packing: ExpertPacking = "rank"
    expert_layout: ExpertLayout = "auto"
    experts_stored_in_out: bool = False

    @property
    def folder(self) -> Path:
        return self.where.parent

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def refuse(self, found: str, *, tensor: str | None = None, expected: str, next_step: str = "") -> AdapterError:
        """The error for something in this adapter; it is for the caller to raise."""
        return AdapterError(found, where=self.folder, tensor=tensor, expected=expected, next_step=next_step or None)

    def refuse_weight(self, kind: str) -> None:
        """For kinds whose update is no sum: a factor other than 1 has no meaning that PEFT shares."""
        if self.weight != 1.0:
            raise self.refuse(
                f"{kind} is no delta that a factor could scale, and the weight is {self.weight:g}",
                expected="weight 1",
                next_step="give the adapter without a weight",
            )


class Kind(Protocol):
    """A module of this package. One file a kind: its keys, its formula, its refusals.

    NAME: for people; PEFT_TYPES: the values of `peft_type` under which it is looked for; FORMULA: the merged
    weight in one line, with its source.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def PEFT_TYPES(self) -> tuple[str, ...]: ...
    @property
    def FORMULA(self) -> str: ...

    def read(self, file: AdapterFile) -> list[TargetUpdate]:
        """One update for each weight that this kind changes. It claims its tensors by `TargetUpdate.keys`, and
        leaves what is another kind's alone; AdapterError for what it knows and cannot merge."""
        ...
