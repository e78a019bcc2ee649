"""Adapters that name experts one by one: updates of a weight of that expert, or of one that holds all experts."""

import re
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_export.contracts import TargetUpdate, Update
from lora_export.errors import AdapterError
from lora_export.merging.architecture.pieces import Shape
from lora_export.merging.planning.names import BaseNames

if TYPE_CHECKING:
    import torch

# experts.3.gate_proj.weight; Unsloth's gpt-oss in 4 bits has experts.gate_up_projs.3.weight
_NAMES = (
    re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight"),
    re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<part>gate_up_proj|down_proj)s\.(?P<expert>\d{1,6})\.weight"),
)
_OTHER_NAME = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_OTHER_NAME |= {v: k for k, v in _OTHER_NAME.items()}
# Part → the fused weight that holds it, and which of its halves it is (None: all of it).
_FUSED: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None),
    "gate_up_proj": ("gate_up_proj", None),
}  # fmt: skip
_INTERLEAVED = frozenset({"gpt_oss"})  # gate and up alternate, where others have one after the other
_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text"})


def one_expert(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    """The update of an expert's weight as an update of what the base stores; None if it is for no expert's."""
    name, shapes = names.renamed(update.target), names.shapes
    match = next((m for pattern in _NAMES if (m := pattern.fullmatch(name))), None)
    if match is None or match["part"] not in _FUSED:
        return None
    expert, part = int(match["expert"]), match["part"]
    single = f"{match['owner']}.{expert}.{_OTHER_NAME.get(part)}.weight"
    if single in shapes:
        return [replace(update, target=single)]
    whole, half = _FUSED[part]
    fused = f"{match['owner']}.{whole}"
    if fused not in shapes:
        return None
    return [_of_fused(update, fused, shapes[fused], expert, half, names.base.model_types)]


def _of_fused(
    update: TargetUpdate, fused: str, shape: Shape, expert: int, half: int | None, model_types: Set[str]
) -> TargetUpdate:
    out, width = update.shapes[0]
    both = (out or 0) * (1 if half is None else 2)
    out_in, in_out = shape[1:] == (both, width), shape[1:] == (width, both)
    if len(shape) != 3 or expert >= shape[0] or not (out_in or in_out):
        raise AdapterError(
            f"the adapter's {update.kind} fits expert {expert} of shape {list(update.shapes[0])}, "
            f"the base's experts have {list(shape)}",
            tensor=fused,
            expected="the base that the adapter was trained on",
        )
    transposed = in_out and (not out_in or bool(model_types & _IN_OUT))
    interleaved = bool(model_types & _INTERLEAVED)

    def load(_: Shape) -> OneExpertUpdate:
        return OneExpertUpdate(update.load((out or 0, width or 0)), expert, half, transposed, interleaved)

    return replace(update, target=fused, shapes=(shape,), load=load, row_wise=lambda _: True, low_rank=False)


@dataclass(frozen=True)
class OneExpertUpdate:
    """An update of one expert's projection (out, in), inside a weight of all experts.

    half: which half of the outputs, None for all; transposed: the weight is (experts, in, out); interleaved: the
    halves alternate.
    """

    inner: Update
    expert: int
    half: int | None
    transposed: bool
    interleaved: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        if not rows.start <= self.expert < rows.stop:
            return weight
        changed = weight.clone()
        mine = changed[self.expert - rows.start]
        mine = mine.T if self.transposed else mine
        if self.half is not None:
            size = len(mine) // 2
            mine = mine[self.half :: 2] if self.interleaved else mine[self.half * size : (self.half + 1) * size]
        mine.copy_(self.inner.apply(mine.contiguous(), slice(0, len(mine))))
        return changed
