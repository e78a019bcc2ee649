"""Updates of loaded weights that transformers cuts, joins, interleaves or permutes out of tensors on disk."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, Interleave, PermuteForRope, WeightConverter

from lora_export.adapters.updates import LowRank, LowRankUpdate
from lora_export.contracts import TargetUpdate, Update
from lora_export.errors import AdapterError
from lora_export.merging.architecture.pieces import Group, Shape, StoredPiece, spread

HEADS = 2
MODEL = SimpleNamespace(config=SimpleNamespace(num_attention_heads=HEADS))
CUT = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])
TURNED = WeightConverter(
    "qkv.weight", ["q.weight", "k.weight"], [Chunk(dim=0), PermuteForRope(permute_layer_names=["q"])]
)
JOINED = WeightConverter(["gate.weight", "up.weight"], "both.weight", [Concatenate(dim=0)])
ALTERNATING = WeightConverter("experts.w1", "experts.gate_up", [Interleave(dim=1)])


class Doubled:
    """An update that is no sum and takes every row for itself."""

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight * 2


def group(converter: Any, key: str, *sources: str) -> Group:
    patterns = {s: next(p for p in converter.source_patterns if p in s) for s in sources}
    return Group({f"l.{s}": p for s, p in patterns.items()}, f"l.{key}", converter, MODEL)


def update(target: str, shape: tuple[int, ...], whole: Update, adds: bool = True) -> TargetUpdate:
    return TargetUpdate(f"l.{target}", "lora", ("x",), (shape,), lambda _: whole, adds=adds)


def spread_of(given: TargetUpdate, of: Group, loaded: Shape, stored: dict[str, Shape]) -> list[TargetUpdate]:
    return spread(given, [StoredPiece(source, group=of, loaded=loaded) for source in of.sources], stored)


def low_rank(height: int, width: int) -> tuple[LowRankUpdate, torch.Tensor]:
    left, right = torch.randn(height, 3), torch.randn(3, width)
    return LowRankUpdate(LowRank(left, right, 1.5)), 1.5 * left @ right


def test_converted_part_of_fused_projection_is_updated() -> None:
    cut, stored = group(CUT, "q.weight", "qkv.weight"), {"l.qkv.weight": (12, 5)}
    assert cut.shapes(stored) == {f"l.{n}.weight": (4, 5) for n in "qkv"}
    whole, delta = low_rank(4, 5)
    (found,) = spread_of(update("k.weight", (4, 5), whole), cut, (4, 5), stored)
    weight = torch.randn(12, 5)
    expected = weight.clone()
    expected[4:8] += delta
    assert found.target == "l.qkv.weight" and not found.row_wise((12, 5)) and not found.low_rank
    changed = found.load((12, 5)).apply(weight.clone(), slice(0, 12))
    assert torch.allclose(changed, expected, atol=1e-6)
    assert torch.equal(changed[:4], weight[:4]) and torch.equal(changed[8:], weight[8:])


def test_converted_permuted_rows_are_updated_in_disk_order() -> None:
    turned, stored = group(TURNED, "q.weight", "qkv.weight"), {"l.qkv.weight": (16, 5)}
    whole, delta = low_rank(8, 5)
    (found,) = spread_of(update("q.weight", (8, 5), whole), turned, (8, 5), stored)
    weight = torch.randn(16, 5)
    changed = found.load((16, 5)).apply(weight.clone(), slice(0, 16))
    half = 8 // HEADS // 2
    on_disk = delta.view(HEADS, 2, half, 5).transpose(1, 2).reshape(8, 5)  # each head: real and imaginary in turn
    assert torch.allclose(changed[:8], weight[:8] + on_disk, atol=1e-6)
    assert torch.equal(changed[8:], weight[8:])


def test_converted_joined_tensors_get_their_rows() -> None:
    joined = group(JOINED, "both.weight", "gate.weight", "up.weight")
    stored = {"l.gate.weight": (4, 5), "l.up.weight": (6, 5)}
    whole, delta = low_rank(10, 5)
    found = spread_of(update("both.weight", (10, 5), whole), joined, (10, 5), stored)
    assert [u.target for u in found] == list(stored)
    for one, part in zip(found, (delta[:4], delta[4:]), strict=True):
        shape = stored[one.target]
        assert torch.allclose(one.load(shape).apply(torch.zeros(shape), slice(0, shape[0])), part, atol=1e-6)
    with pytest.raises(AdapterError, match="2 tensors on disk make this weight"):
        spread_of(update("both.weight", (10, 5), Doubled(), adds=False), joined, (10, 5), stored)


def test_converted_interleaved_experts_become_blocks() -> None:
    experts, shape = group(ALTERNATING, "experts.gate_up", "experts.w1"), (3, 8, 5)
    stored = {"l.experts.w1": shape}

    class Gate:
        """Doubles the first half of the loaded rows."""

        def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
            assert len(weight) == rows.stop - rows.start
            weight[:, :4] *= 2
            return weight

    (found,) = spread_of(update("experts.gate_up", shape, Gate(), adds=False), experts, shape, stored)
    weight = torch.randn(shape)
    expected = weight.clone()
    expected[:, 0::2] *= 2
    assert found.row_wise(shape)
    loaded = found.load(shape)
    blocks = [loaded.apply(weight[a:b].clone(), slice(a, b)) for a, b in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(blocks), expected)


def test_converted_wrong_shape_is_refused() -> None:
    cut, stored = group(CUT, "q.weight", "qkv.weight"), {"l.qkv.weight": (12, 5)}
    with pytest.raises(AdapterError, match=r"fits a weight of shape \[12, 5\], the loaded model has \[4, 5\]"):
        spread_of(update("k.weight", (12, 5), Doubled()), cut, (4, 5), stored)
