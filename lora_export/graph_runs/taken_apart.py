"""GroupNorm of ONNX Runtime's CUDA provider, taken apart into operators that every provider has.

The operator, by its documentation: X (rows, height, width, channels); channels are in groups; each group of a row
gets the mean 0 and the variance 1; then gamma (channels) and beta (channels) apply, and x · sigmoid(x) if
activation is 1. It computes in fp32, whatever type X has.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

NAME, _DOMAIN = "GroupNorm", "com.microsoft"


def take_apart(model: ir.Model) -> int:
    """Replace every GroupNorm in a graph, and count them."""
    nodes = [n for n in model.graph if n.op_type == NAME and n.domain == _DOMAIN]
    for node in nodes:
        _replace(model.graph, node)
    return len(nodes)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    source, gamma, beta = node.inputs
    assert source is not None and gamma is not None and beta is not None and gamma.shape is not None
    groups, channels = node.attributes["groups"].as_int(), int(gamma.shape[0])
    made = _Made(graph, node)
    shape = made("Shape", source)
    x = made("Cast", source, to=int(ir.DataType.FLOAT))
    grouped = made("Reshape", x, made.numbers([0, -1, groups, channels // groups]))
    axes = made.numbers([1, 3])
    centred = made("Sub", grouped, made("ReduceMean", grouped, axes))
    variance = made("ReduceMean", made("Mul", centred, centred), axes)
    epsilon = made.constant(np.array(node.attributes["epsilon"].as_float(), np.float32))
    scaled = made("Div", centred, made("Sqrt", made("Add", variance, epsilon)))
    whole = made("Reshape", scaled, shape)
    result = made("Add", made("Mul", whole, gamma), beta)
    if node.attributes.get_int("activation", 0):
        result = made("Mul", result, made("Sigmoid", result))
    last = made("CastLike", result, source)
    ir.convenience.replace_all_uses_with(node.outputs[0], last, replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Made:
    """Makes nodes in front of another one."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before, self._count = graph, before, 0

    def __call__(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes or None, num_outputs=1)
        self._count += 1
        node.name = node.outputs[0].name = f"{self._before.outputs[0].name}_apart_{self._count}"
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def numbers(self, values: Sequence[int]) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def constant(self, array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, num_outputs=1)
        self._count += 1
        node.name = node.outputs[0].name = f"{self._before.outputs[0].name}_apart_{self._count}"
        self._graph.insert_before(self._before, node)
        return node.outputs[0]
