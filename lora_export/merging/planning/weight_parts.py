"""Adapters that name a part of what the base stores as one weight: an expert, or q, k and v of a projection.

Experts: the base may also store each one under another name. Projections: Tinker trains q, k and v of Qwen's linear
attention apart. Qwen 3.5 stores in_proj_qkv, all of q, then k, then v; Qwen3-Next in_proj_qkvz and in_proj_ba, for
each head of the keys its q, k, v and z (transformers' qwen3_next, fix_query_key_value_ordering).
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TargetUpdate, Update
from lora_export.errors import AdapterError
from lora_export.merging.architecture.pieces import Shape
from lora_export.merging.planning.names import BaseNames

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(?P<owner>(?:.+\.)?linear_attn)\.in_proj_(?P<part>q|k|v|z|b|a)\.weight")
_WHOLES = ("qkv", "qkvz", "ba")
_BY_HEAD = ("qkvz", "ba")
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


@dataclass(frozen=True)
class RowsUpdate:
    """An update of some rows of a weight. rows: their indices, ascending."""

    inner: Update
    rows: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        first, last = torch.searchsorted(self.rows, torch.tensor([rows.start, rows.stop])).tolist()
        if first == last:
            return weight
        places = (self.rows[first:last] - rows.start).to(weight.device)
        weight[places] = self.inner.apply(weight[places], slice(first, last))
        return weight


def split_projection(update: TargetUpdate, names: BaseNames) -> list[TargetUpdate] | None:
    """The update as one of the weight that the base stores; None if it is for no part of such a projection.

    AdapterError where the sizes disagree.
    """
    name, weights, config = names.renamed(update.target), names.shapes, names.base.config
    match = _PART.fullmatch(name)
    if match is None:
        return None
    whole = next((w for w in _WHOLES if match["part"] in w and _projection(match["owner"], w) in weights), None)
    if whole is None:
        return None
    target = _projection(match["owner"], whole)
    shape, heads, sizes = weights[target], *_rows_of_parts(config)
    count = sum(sizes.get(p, 0) for p in whole) * heads
    height = sizes.get(match["part"], 0) * heads
    if len(shape) != 2 or count != shape[0] or not update.fits((height, shape[1])):
        raise AdapterError(
            f"the adapter's {update.kind} fits a weight of shape {list(update.shapes[0])}, "
            f"and that part of {target} has {[height, *shape[1:]]}",
            tensor=name,
            expected="the base that the adapter was trained on",
            next_step="give that base as -b; `lora-export inspect ADAPTER` shows its name",
        )
    before = sum(sizes[p] for p in whole[: whole.index(match["part"])])
    by_head = whole in _BY_HEAD

    def load(_: Shape) -> RowsUpdate:
        import torch

        rows = torch.arange(count)
        if by_head:
            rows = rows.view(heads, -1)[:, before : before + height // heads].flatten()
        else:
            rows = rows[before * heads : before * heads + height]
        return RowsUpdate(update.load((height, shape[1])), rows)

    def row_wise(_: Shape) -> bool:
        return update.row_wise((height, shape[1]))

    return [replace(update, target=target, shapes=(shape,), load=load, row_wise=row_wise, low_rank=False)]


def _projection(owner: str, whole: str) -> str:
    return f"{owner}.in_proj_{whole}.weight"


def _rows_of_parts(config: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """(heads of the keys, part → rows for each of them); no rows where the configuration does not say."""
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    numbers = [settings.get(n) for n in names]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        return 0, {}
    heads, values, width, height = (int(n or 0) for n in numbers)
    group = values // heads
    return heads, {"q": width, "k": width, "v": group * height, "z": group * height, "b": group, "a": group}
