"""A graph while passes change it, and what several passes do to it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.onnx_export.weights.map import Recipe

MICROSOFT = "com.microsoft"


@dataclass
class TracedGraph:
    """model: one graph of an export; recipes: of the inputs that stand for weights, until they are settled; shared:
    weights that another graph with the same data file reads as they are."""

    model: ir.Model
    recipes: dict[str, Recipe]
    shared: frozenset[str] = frozenset()

    def nodes(self, *kinds: str) -> Iterator[ir.Node]:
        return (n for n in list(self.model.graph) if n.op_type in kinds)


def add_weight(
    graph: TracedGraph, name: str, dtype: ir.DataType, shape: tuple[int, ...], recipe: Recipe
) -> ir.Value:
    """Another input that stands for a weight, or the existing one of that name."""
    if name in graph.recipes:
        return next(v for v in graph.model.graph.inputs if v.name == name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.model.graph.inputs.append(value)
    graph.recipes[name] = recipe
    return value


def put(old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, with its output names, types and shapes."""
    new.name = old.name
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], [new], old.outputs, new.outputs)


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    if old.is_graph_output():
        return
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes the value, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def constant(graph: TracedGraph, numbers: list[int] | int) -> ir.Value:
    """An initializer with these int64 numbers: a new one, or the one that was made before."""
    array = np.array(numbers, np.int64)
    name = f"shape_{'_'.join(str(n) for n in array.reshape(-1))}_{array.ndim}"
    known = graph.model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.model.graph.register_initializer(value)
    return value


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant; None for anything else."""
    tensor = value.const_value if value is not None else None
    return None if tensor is None or not tensor.dtype.is_integer() else [int(n) for n in tensor.numpy().reshape(-1)]
