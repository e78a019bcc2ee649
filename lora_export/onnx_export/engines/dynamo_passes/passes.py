"""Passes over a traced graph: generic simplification, ONNX Runtime's fusions, and our own.

Large weights have no values here. Transposing or joining one changes its recipe; nothing is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from lora_export.choices import Optimize
from lora_export.onnx_export.engines.dynamo_passes import mending
from lora_export.onnx_export.engines.dynamo_passes.reshaping import tidy_shapes
from lora_export.onnx_export.engines.dynamo_passes.rotary import fuse_rotary
from lora_export.onnx_export.engines.dynamo_passes.traced_graph import (
    MICROSOFT,
    TracedGraph,
    add_weight,
    producer,
    put,
    replace_uses,
)
from lora_export.onnx_export.weights.map import Recipe


def run(graph: TracedGraph, optimize: Optimize, pack: bool = True) -> None:
    """Apply the passes that `optimize` asks for; `none` leaves what the exporter wrote.

    pack: whether three projections may become one Attention, whose weights no quantizer supports.
    """
    from onnx_ir.passes import common

    if optimize != "none":
        _simplify(graph)
        turn_weights(graph)
        _simplify(graph)
    if optimize == "full":
        fuse(graph, pack)
    common.RemoveUnusedNodesPass()(graph.model)
    common.RemoveUnusedOpsetsPass()(graph.model)
    common.ClearMetadataAndDocStringPass()(graph.model)
    graph.model.graph.sort()
    settle(graph)


def settle(graph: TracedGraph) -> None:
    """Turn inputs that stand for weights into initializers with a type and a shape, but no values."""
    inner = graph.model.graph
    for value in list(inner.inputs):
        if value.name not in graph.recipes:
            continue
        inner.inputs.remove(value)
        if not value.uses():
            del graph.recipes[value.name]
            continue
        value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=value.name)
        inner.initializers[value.name] = value


def _simplify(graph: TracedGraph) -> None:
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule

    common.ShapeInferencePass()(graph.model)
    rewriter.rewrite(graph.model, [gemm_to_matmul_add_rule])
    optimizer.optimize(graph.model)
    drop_round_trips(graph)


def fuse(graph: TracedGraph, pack: bool) -> None:
    """onnxscript's fusions for ONNX Runtime. Attention is already one operator (attention.py)."""
    from onnx_ir.passes import common
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    optimize_for_ort(graph.model)
    fuse_rotary(graph)
    fuse_silu(graph)
    mending.split_batch_transposes(graph)
    tidy_shapes(graph)
    drop_round_trips(graph)
    if pack:
        pack_projections(graph)
    common.CommonSubexpressionEliminationPass()(graph.model)
    turn_weights(graph, fused=True)


def fuse_silu(graph: TracedGraph) -> None:
    """x · sigmoid(x) as one operator."""
    for node in graph.nodes("Mul"):
        for value, other in (node.inputs, node.inputs[::-1]):
            sigmoid = producer(value, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is other and len(list(sigmoid.outputs[0].uses())) == 1:
                put(node, ir.node("QuickGelu", [other], {"alpha": 1.0}, domain=MICROSOFT, num_outputs=1))
                break


# --- layouts -----------------------------------------------------------------------------------------------


def drop_round_trips(graph: TracedGraph) -> None:
    """Remove chains of Reshape and Transpose that end as they began, such as heads that are split and rejoined."""
    for node in graph.nodes("Reshape", "Transpose"):
        value, perm = node.inputs[0], _permutation(node)
        while value is not None:
            settled = perm is not None and perm == sorted(perm)
            if settled and value.shape is not None and _same(value.shape, node.outputs[0].shape):
                replace_uses(node.outputs[0], value)
                break
            before = value.producer()
            if before is None or before.op_type not in ("Reshape", "Transpose"):
                break
            perm = _compose(before, perm)
            value = before.inputs[0]


def _permutation(node: ir.Node) -> list[int] | None:
    """Of a Transpose; empty for a Reshape, which does not matter as long as both ends agree."""
    if node.op_type == "Reshape":
        return []
    return list(node.attributes["perm"].as_ints())


def _compose(before: ir.Node, perm: list[int] | None) -> list[int] | None:
    if perm is None or before.op_type == "Reshape":
        return perm
    own = list(before.attributes["perm"].as_ints())
    if not perm:
        return own
    return [own[i] for i in perm] if len(own) == len(perm) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two shapes are known to be equal: by number, or by name of axis."""
    if b is None or len(a) != len(b):
        return False
    pairs = [(getattr(x, "value", x), getattr(y, "value", y)) for x, y in zip(a, b, strict=True)]
    return all(x is not None and x == y for x, y in pairs)


# --- weights -----------------------------------------------------------------------------------------------


def turn_weights(graph: TracedGraph, fused: bool = False) -> None:
    """Replace Transpose(weight) by a weight that is written transposed.

    A weight that is also used as it is (tied embeddings), here or in another graph, is not duplicated: FusedMatMul
    transposes it, if `fused`.
    """
    for node in graph.nodes("Transpose"):
        weight, perm = node.inputs[0], list(node.attributes["perm"].as_ints())
        recipe = graph.recipes.get(weight.name) if weight is not None else None
        if recipe is None or perm != [1, 0] or recipe.transposed:
            continue
        if weight.name not in graph.shared and all(user.op_type == "Transpose" for user, _ in weight.uses()):
            new = _turned(graph, f"{weight.name}_transposed", weight, recipe)
            replace_uses(node.outputs[0], new)
        elif fused:
            for user, index in list(node.outputs[0].uses()):
                if user.op_type == "MatMul" and index == 1:
                    _turn_in_matmul(user, weight)


def _turn_in_matmul(node: ir.Node, weight: ir.Value) -> None:
    new = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=MICROSOFT, num_outputs=1)
    put(node, new)


def _turned(graph: TracedGraph, name: str, like: ir.Value, recipe: Recipe) -> ir.Value:
    assert like.shape is not None and like.dtype is not None
    shape = tuple(int(n) for n in like.shape.numpy())
    turned = replace(recipe, transposed=not recipe.transposed)
    return add_weight(graph, name, like.dtype, shape[::-1], turned)


# --- attention ---------------------------------------------------------------------------------------------


def pack_projections(graph: TracedGraph) -> None:
    """Join three projections of one input and the attention behind them into one Attention.

    Only if Attention supports everything that MultiHeadAttention was given: no cache, no keys from elsewhere, and
    an integer mask or none.
    """
    for node in graph.nodes("MultiHeadAttention"):
        projections = [_projection(graph, v) for v in node.inputs[:3]]
        if len(projections) != 3 or any(p is None for p in projections):
            continue
        joined = [p for p in projections if p is not None]
        mask, bias = _input(node, 4), _input(node, 5)
        if len({id(p.source) for p in joined}) != 1 or _input(node, 6) is not None:
            continue
        weight, offset = _joined(graph, [p.weight for p in joined]), _joined(graph, [p.bias for p in joined])
        if weight is None or offset is None:
            continue
        inputs: list[ir.Value | None] = [joined[0].source, weight, offset, mask, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"num_heads": node.attributes["num_heads"].as_int()}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"].as_float()
        put(node, ir.node("Attention", inputs, attributes, domain=MICROSOFT, num_outputs=1))


@dataclass(frozen=True)
class _Projection:
    source: ir.Value
    weight: ir.Value
    bias: ir.Value


def _projection(graph: TracedGraph, value: ir.Value | None) -> _Projection | None:
    """x · weight + bias, if that is how the value is computed."""
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add" or len(list(add.outputs[0].uses())) != 1:
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        matmul = product.producer() if product is not None else None
        if matmul is None or matmul.op_type != "MatMul" or bias is None:
            continue
        source, weight = matmul.inputs
        if (
            weight is not None
            and weight.name in graph.recipes
            and bias.name in graph.recipes
            and source is not None
        ):
            return _Projection(source, weight, bias)
    return None


def _joined(graph: TracedGraph, values: Sequence[ir.Value]) -> ir.Value | None:
    """One initializer for several: matrices side by side (in, out₁ + out₂ + …), or biases one after another."""
    recipes = [graph.recipes[str(v.name)] for v in values]
    shapes = [tuple(int(n) for n in v.shape.numpy()) for v in values if v.shape is not None]
    matrices = len(shapes[0]) == 2
    if len({r.plus for r in recipes}) > 1 or any(r.transposed != matrices for r in recipes):
        return None
    shape = (shapes[0][0], sum(s[1] for s in shapes)) if matrices else (sum(s[0] for s in shapes),)
    recipe = replace(recipes[0], pieces=tuple(p for r in recipes for p in r.pieces))
    dtype = values[0].dtype
    assert dtype is not None
    return add_weight(graph, _common_name([str(v.name) for v in values]), dtype, shape, recipe)


def _common_name(names: Sequence[str]) -> str:
    parts = [n.split(".") for n in names]
    differing = next((i for i, p in enumerate(zip(*parts, strict=False)) if len(set(p)) > 1), len(parts[0]))
    middle = "_".join(p[differing] for p in parts)
    return ".".join([*parts[0][:differing], middle, *parts[0][differing + 1 :]])


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
