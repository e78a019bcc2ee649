"""Graphs that are wrong on purpose: what a builder could get wrong and every shape, type and name would hide.

Each takes the right graph of one configuration. `spoil` rewrites the graph file of an export, whose weights stay
as they are; a proof that takes the result proves nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tests.export_matrix.builder import MODELS
from tests.export_matrix.configurations import CONFIGURATIONS
from tests.onnx_export.architectures import Architecture


@dataclass(frozen=True)
class Wrong:
    """configuration: a key of CONFIGURATIONS or MODELS; change: what is done to its graph."""

    configuration: str
    change: Callable[[ir.Graph], None]

    @property
    def architecture(self) -> Architecture:
        return {**CONFIGURATIONS, **MODELS}[self.configuration]


def spoil(name: str, graph: Path) -> None:
    """Rewrite the graph file with the change of that name; its data files stay."""
    model = ir.load(graph)
    WRONG[name].change(model.graph)
    ir.save(model, graph)


def _all(graph: ir.Graph, kind: str) -> list[ir.Node]:
    found = [n for n in graph if n.op_type == kind]
    assert found, f"no {kind} in this graph"
    return found


def _set(kind: str, name: str, value: float, last: bool = False) -> Callable[[ir.Graph], None]:
    """Give an attribute of all nodes of a kind, or of the last one, another value."""

    def change(graph: ir.Graph) -> None:
        for node in _all(graph, kind)[-1 if last else 0 :]:
            old = node.attributes[name]
            assert old.value != value, f"{name} is {value} already"
            make = ir.AttrFloat32 if old.type == ir.AttributeType.FLOAT else ir.AttrInt64
            node.attributes[name] = make(name, value)

    return change


def _constant(values: object, like: ir.Node) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.asarray(values))}, num_outputs=1)
    assert like.graph is not None
    like.graph.insert_before(like, node)
    return node.outputs[0]


def _between(value: ir.Value, before: ir.Node, kind: str, other: object, **attributes: int) -> ir.Value:
    """`value` through one more node, for `before` to read."""
    node = ir.node(kind, [value, _constant(other, before)], attributes, num_outputs=1)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]


def _other_rope_base(graph: ir.Graph) -> None:
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        value = graph.initializers[name]
        assert value.const_value is not None
        length, half = value.const_value.shape.numpy()
        angles = np.arange(length)[:, None] / 12000.0 ** (np.arange(half) / half)
        value.const_value = ir.tensor(function(angles).astype(np.float32), name=name)


def _shifted_positions(graph: ir.Graph) -> None:
    """From the second position on, each has the angles of the one before."""
    for name in ("cos_cache", "sin_cache"):
        value = graph.initializers[name]
        assert value.const_value is not None
        table = value.const_value.numpy()
        value.const_value = ir.tensor(np.concatenate([table[:1], table[:-1]]), name=name)


def _heads_swapped(graph: ir.Graph) -> None:
    for node in _all(graph, "GroupQueryAttention"):
        heads, size = node.attributes["num_heads"].as_int(), 16
        order = np.arange(heads * size).reshape(heads, size)[[1, 0, *range(2, heads)]].reshape(-1)
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, _between(node.outputs[0], reader, "Gather", order, axis=-1))


def _cache_dropped(graph: ir.Graph) -> None:
    node = _all(graph, "GroupQueryAttention")[-1]
    for index in (3, 4):
        past = node.inputs[index]
        assert past is not None
        node.replace_input_with(index, _between(past, node, "Mul", np.float32(0)))


def _state_dropped(graph: ir.Graph) -> None:
    node = _all(graph, "CausalConvWithState")[-1]
    index = next(i for i, v in enumerate(node.inputs) if v is not None and str(v.name).startswith("past"))
    past = node.inputs[index]
    assert past is not None
    node.replace_input_with(index, _between(past, node, "Mul", np.float32(0)))


def _norm_without_offset(graph: ir.Graph) -> None:
    node = _all(graph, "SkipSimplifiedLayerNormalization")[0]
    weight = node.inputs[2]
    assert weight is not None
    node.replace_input_with(2, _between(weight, node, "Sub", np.float32(1)))


def _rotated_everywhere(graph: ir.Graph) -> None:
    nodes = _all(graph, "GroupQueryAttention")
    rotated = next(n for n in nodes if n.attributes["do_rotary"].as_int())
    for node in nodes:
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        for index in (7, 8):
            node.replace_input_with(index, rotated.inputs[index])


def _experts_exchanged(graph: ir.Graph) -> None:
    for node in _all(graph, "MoE"):
        router, count = node.inputs[1], 8
        assert router is not None
        order = np.array([*range(count - 2), count - 1, count - 2])
        node.replace_input_with(1, _between(router, node, "Gather", order, axis=-1))


WRONG: Mapping[str, Wrong] = {
    "another rope base": Wrong("llama-default", _other_rope_base),
    "a position counted twice": Wrong("llama-default", _shifted_positions),
    "heads swapped": Wrong("llama-default", _heads_swapped),
    "attention not scaled": Wrong("llama-default", _set("GroupQueryAttention", "scale", 1.0)),
    "a layer forgets its cache": Wrong("llama-default", _cache_dropped),
    "window off by one": Wrong("mistral-window", _set("GroupQueryAttention", "local_window_size", 25)),
    "a layer without its window": Wrong(
        "mistral-window", _set("GroupQueryAttention", "local_window_size", -1, last=True)
    ),
    "another softcap": Wrong("gemma2-h72", _set("GroupQueryAttention", "softcap", 5.0)),
    "norm without its offset": Wrong("gemma3-default-rope", _norm_without_offset),
    "unrotated layer rotated": Wrong("smollm3-nope", _rotated_everywhere),
    "a layer forgets its state": Wrong("lfm2", _state_dropped),
    "one expert too few": Wrong("gpt-oss", _set("MoE", "k", 2)),
    "two experts exchanged": Wrong("gpt-oss", _experts_exchanged),
}  # fmt: skip
