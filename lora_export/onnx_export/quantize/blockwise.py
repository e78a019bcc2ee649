"""Turns MatMul with a weight into MatMulNBits or MatMulBnb4, in a graph whose weights have no values yet."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.files import onnx_type, without_numbers
from lora_export.onnx_export.graphs.matmuls import Product, candidates
from lora_export.onnx_export.quantize.numbers import shapes
from lora_export.onnx_export.quantize.settings import GPTQ, Blockwise, chosen
from lora_export.onnx_export.weights.map import ITEM_SIZE, Part, Quantization, Weight

MICROSOFT = "com.microsoft"
SMALLER = 2 / 3  # a table is quantized if it then has at most this share of its bytes


def quantize_graph(
    model: ir.Model, weights: Sequence[Weight], how: Blockwise, looked_up: Collection[str] = ()
) -> list[Weight]:
    """Quantize the products of a graph in place; returns its weights with their recipes.

    Nodes and initializers get the names that ONNX Runtime's quantizers give. A weight that other nodes also read
    stays beside its parts. looked_up: weights of products in whose parts rows are looked up, here or elsewhere.
    ExportError if there is no product.
    """
    how.check()
    graph = model.graph
    done: dict[str, dict[Weight, ir.Value]] = {}
    products = _chosen(model, weights, how)
    wide = {products[node].weight.name for node in chosen(_names(products), how.eight_bits)}
    tables = {p.weight.name for p in products.values() if p.lookup} | {*looked_up}
    heads = {p.weight.name for p in products.values() if not p.lookup} | {*looked_up}
    for node in list(graph):
        product = products.get(str(node.name))
        if product is None:
            continue
        own = replace(how, method="int8") if product.weight.name in wide else how
        if product.weight.name in tables:
            own = own.of_table(product.rows, product.weight.name in heads)
        parts = done.setdefault(product.weight.name, {part: _value(part) for part in _parts(product, own)})
        rewrite = _lookup if product.lookup else _product
        _put(node, rewrite(node, product, list(parts.values()), own))
    if not done:
        raise ExportError(
            f"no product in this graph has a weight that can be quantized to {how.method}",
            expected="a model with linear layers, not all of them kept in high precision",
            next_step="--precision fp16",
        )
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]
    for value in (v for parts in done.values() for v in parts.values()):
        graph.register_initializer(value)
    graph.opset_imports.setdefault(MICROSOFT, 1)
    described = []
    for weight in weights:  # weights that are still read, and the parts of quantized ones in their place
        described += [weight] if weight.name in graph.initializers else []
        described += done.get(weight.name, ())
    return described


def _chosen(model: ir.Model, weights: Sequence[Weight], how: Blockwise) -> dict[str, Product]:
    """Node name → its factor, for what is quantized. Not tables that the graph would hold unquantized as well, or
    that would stay about as large as they are."""
    products = candidates(model, weights, how.embeddings)
    for node in chosen(_names(products), how.keep):
        del products[node]
    heads = {p.weight.name for p in products.values() if not p.lookup}

    def wanted(product: Product) -> bool:
        readers = [node.name for node, _ in model.graph.initializers[product.weight.name].uses()]
        alone = product.weight.name not in heads
        return all(name in products for name in readers) and not (alone and not _worthwhile(product, how))

    return {name: product for name, product in products.items() if not product.lookup or wanted(product)}


def _names(products: Mapping[str, Product]) -> dict[str, frozenset[str]]:
    return {node: product.tensors for node, product in products.items()}


def _worthwhile(table: Product, how: Blockwise) -> bool:
    settings = how.of_table(table.rows, shared=False).settings
    parts = shapes(table.rows, table.columns, settings)
    size = ITEM_SIZE[table.weight.dtype]
    return (
        sum(prod(s) * (size if part == "scales" else 1) for part, s in parts.items())
        <= SMALLER * table.weight.nbytes
    )


def _value(part: Weight) -> ir.Value:
    """An initializer without values."""
    tensor = without_numbers(part.name, onnx_type(part.dtype), part.shape)
    return ir.Value(name=part.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _put(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Replace a node by `new`, whose last node takes over its outputs."""
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)


def _parts(product: Product, how: Blockwise) -> list[Weight]:
    weight = product.weight
    settings = how.settings
    names = part_names(weight.name, settings)
    turned = weight.recipe.transposed != product.turned
    parts = []
    for part, shape in shapes(product.rows, product.columns, settings).items():
        recipe = replace(weight.recipe, transposed=turned, quantized=replace(settings, part=part))
        dtype = weight.dtype if part == "scales" else "uint8"
        parts.append(Weight(names[part], weight.file, dtype, shape, recipe))
    return parts


def part_names(name: str, how: Quantization) -> dict[Part, str]:
    """The names that ONNX Runtime's quantizers give to the parts of the initializer `name`. gptq fills the graph of
    the default one."""
    if how.method in ("nf4", "fp4"):
        return {"packed": f"{name}_Bnb4", "scales": f"{name}_absmax"}
    bits = how.method.removeprefix("int")
    if how.algorithm in ("default", GPTQ):
        return {"packed": f"{name}_Q{bits}", "scales": f"{name}_scales", "zero_points": f"{name}_zero_points"}
    return {"packed": f"{name}_Q{bits}G{how.block_size}", "scales": f"{name}_scale", "zero_points": f"{name}_zp"}


def _product(node: ir.Node, product: Product, parts: Sequence[ir.Value], how: Blockwise) -> list[ir.Node]:
    attributes = {"K": product.rows, "N": product.columns, "block_size": how.block_size}
    if how.method in ("nf4", "fp4"):
        kind, suffix = "MatMulBnb4", "_Bnb4"
        attributes["quant_type"] = int(how.method == "nf4")
    else:
        bits = int(how.method.removeprefix("int"))
        kind, suffix = "MatMulNBits", f"_Q{bits}"
        attributes["bits"] = bits
        if how.accuracy_level:
            attributes["accuracy_level"] = how.accuracy_level
    inputs, name = [node.inputs[0], *parts], f"{node.name}{suffix}"
    multiplied = ir.node(kind, inputs, dict(sorted(attributes.items())), domain=MICROSOFT, name=name)
    if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:  # a bias
        return [multiplied]
    multiplied.outputs[0].name = f"{name}_product"
    return [multiplied, ir.node("Add", [multiplied.outputs[0], node.inputs[2]], name=f"{name}_bias")]


def _lookup(node: ir.Node, product: Product, parts: Sequence[ir.Value], how: Blockwise) -> list[ir.Node]:
    """Rows of embeddings, dequantized as they are read, without the numbers that fill their last block.

    The packed numbers have the shape of a head, which may share them: the builder does the same for tied
    embeddings.
    """
    packed, *others = parts
    bits, name = int(how.method.removeprefix("int")), f"{node.name}_rows"
    padded = -(-product.rows // how.block_size) * how.block_size
    size = ir.tensor(np.array([product.columns, padded * bits // 8], np.int64))
    shape = ir.node("Constant", [], {"value": size}, name=f"{name}_shape", outputs=[ir.val(f"{name}_shape")])
    rows = ir.node("Reshape", [packed, shape.outputs[0]], name=name, outputs=[ir.val(name)])
    attributes = {"bits": bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs, name = [rows.outputs[0], node.inputs[1], *others], f"{node.name}_Q{bits}"
    gathered = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=name)
    if padded == product.rows:
        return [shape, rows, gathered]
    gathered.outputs[0].name = f"{name}_padded"
    bounds = {"starts": [0], "ends": [product.rows], "axes": [-1]}
    constants = [
        ir.node("Constant", [], {"value": ir.tensor(np.array(at, np.int64))}, outputs=[ir.val(f"{name}_{part}")])
        for part, at in bounds.items()
    ]
    cut = ir.node("Slice", [gathered.outputs[0], *(c.outputs[0] for c in constants)], name=f"{name}_unpadded")
    return [shape, rows, gathered, *constants, cut]
