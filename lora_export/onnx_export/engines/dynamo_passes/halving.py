"""Converts a graph whose weights have no values yet to half precision: types change, and the writer rounds."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.onnx_export.engines.dynamo_passes.kept_wide import join, only_wide, wide_nodes

LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3e38}
_ANGLES = ("Cos", "Sin")


def halve(
    model: ir.Model,
    dtype: ir.DataType,
    kept: Callable[[str], bool] = lambda name: False,
    positions: Collection[str] = (),
) -> None:
    """Change fp32 to `dtype` everywhere except at the graph's inputs and outputs, as Optimum does.

    kept: whether the initializer of a name stays in fp32, and with it what is computed of it. The angles of rotary
    embeddings stay fp32 until their cos and sin are known: fp16 has no number between 2,048 and 2,050 for a
    position. So do distances between tokens until they are the number of a bucket, as T5 counts them. positions:
    floating-point inputs that such angles may be computed of, such as a step of 999.5.
    """
    graph = model.graph
    angles = _angles(graph, positions)
    _keep_constants(graph, angles)
    wide = wide_nodes(graph, kept) | angles
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and not only_wide(value, wide):
            value.const_value = _narrow(value.const_value, dtype)
            value.dtype = dtype
    for node in [n for n in graph if n not in wide]:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrTensor(name, _narrow(attribute.as_tensor(), dtype))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = dtype
    _cast_ends(graph, dtype, angles)
    join(graph, wide, dtype)


def _angles(graph: Any, positions: Collection[str]) -> set[ir.Node]:
    """Cos and Sin, and all that they are computed of, where that is positions and constants alone."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type not in _ANGLES and not _becomes_whole(node):
            continue
        before: set[ir.Node] = set()
        if _gather(node, before, positions) and (node.op_type in _ANGLES or not _reads_weights(before)):
            found |= before
    return found


def _becomes_whole(node: ir.Node) -> bool:
    """Whether a floating-point number becomes an integer here."""
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
        return False
    return bool(ir.DataType(node.attributes["to"].as_int()).is_integer())


def _reads_weights(nodes: Collection[ir.Node]) -> bool:
    """Whether numbers of the checkpoint, which have no values here, take part."""
    return any(isinstance(v.const_value, ir.ExternalTensor) for n in nodes for v in n.inputs if v is not None)


def _gather(node: ir.Node, into: set[ir.Node], positions: Collection[str]) -> bool:
    """Add the node and its floating-point ancestors; False if one of them reads another floating-point input."""
    if node in into:
        return True
    into.add(node)
    for value in node.inputs:
        if value is None or value.const_value is not None or value.dtype != ir.DataType.FLOAT:
            continue
        producer = value.producer()
        if producer is None and value.name in positions:
            continue
        if producer is None or not _gather(producer, into, positions):
            return False
    return True


def _keep_constants(graph: Any, wide: Collection[ir.Node]) -> None:
    """Give the nodes that stay in fp32 constants of their own, where others read them too."""
    for name, value in list(graph.initializers.items()):
        users = list(value.uses())
        own = [(user, index) for user, index in users if user in wide]
        if value.dtype != ir.DataType.FLOAT or not own or len(own) == len(users):
            continue
        copy = ir.Value(name=f"{name}_wide", const_value=value.const_value, shape=value.shape)
        copy.dtype = value.dtype
        graph.register_initializer(copy)
        for user, index in own:
            user.replace_input_with(index, copy)


def _narrow(tensor: Any, dtype: ir.DataType) -> Any:
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor("", 0, 0, dtype, shape=tensor.shape, name=str(tensor.name))
    values = np.clip(tensor.numpy(), -LARGEST[dtype], LARGEST[dtype])
    return ir.tensor(values.astype(dtype.numpy()), dtype=dtype, name=tensor.name)


def _cast_ends(graph: Any, dtype: ir.DataType, wide: Collection[ir.Node]) -> None:
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            uses = [(user, index) for user, index in value.uses() if user not in wide]
            if not uses:
                continue
            node = ir.node("Cast", [value], {"to": int(dtype)}, num_outputs=1)
            node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
            node.outputs[0].name = f"{value.name}_half"
            graph.insert_before(graph[0], node)
            for user, index in uses:
                user.replace_input_with(index, node.outputs[0])
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != dtype:
            continue
        name = value.name
        value.name = f"{name}_half"
        node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, num_outputs=1)
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.outputs[0].shape = value.shape
        graph.append(node)
        graph.outputs[index] = node.outputs[0]
