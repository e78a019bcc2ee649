"""Adapters that name parts of a projection that the base stores as one weight: updates of some of its rows.

Tinker trains q, k and v of Qwen's linear attention apart. Qwen 3.5 stores in_proj_qkv, all of q, then k, then v;
Qwen3-Next in_proj_qkvz and in_proj_ba, for each head of the keys its q, k, v and z (transformers'
qwen3_next, fix_query_key_value_ordering).
"""

import re
from collections.abc import Mapping
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
    whole = next((w for w in _WHOLES if match["part"] in w and _name(match["owner"], w) in weights), None)
    if whole is None:
        return None
    target = _name(match["owner"], whole)
    shape, heads, sizes = weights[target], *_sizes(config)
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


def _name(owner: str, whole: str) -> str:
    return f"{owner}.in_proj_{whole}.weight"


def _sizes(config: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
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
