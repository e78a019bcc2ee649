"""Turns MatMul with a weight into MatMulNBits or MatMulBnb4, in a graph whose weights have no values yet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import onnx_ir as ir

from lora_export.choices import Precision
from lora_export.contracts import QuantizationOptions
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.files import onnx_type, without_numbers
from lora_export.onnx_export.graphs.matmuls import Product, candidates, kept
from lora_export.onnx_export.quantize.numbers import shapes
from lora_export.onnx_export.weights.map import Method, Part, Quantization, Weight

MICROSOFT = "com.microsoft"
AUTO = "auto"  # in place of node names: choose by measured damage
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = range(5)
ALGORITHMS = ("default", "rtn", "k_quant")


@dataclass(frozen=True)
class Blockwise:
    """method: int4 and int8 with ONNX Runtime's MatMulNBits, nf4 with its MatMulBnb4; accuracy_level: the type that
    the operator computes in (0: that of its inputs, 4: int8); keep: nodes to leave unquantized, by name or pattern;
    eight_bits: nodes of an int4 graph to make int8, where a byte buys more than in `keep`; embeddings: quantize
    those too, with GatherBlockQuantized."""

    method: Method
    block_size: int = 32
    symmetric: bool = True
    algorithm: str = "default"
    accuracy_level: int = 0
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    embeddings: bool = False

    def check(self) -> None:
        """ExportError for settings that no quantizer supports."""
        if self.block_size not in BLOCK_SIZES:
            raise _refusal(f"blocks of {self.block_size}", ", ".join(map(str, BLOCK_SIZES)), "--block-size 32")
        if self.algorithm not in ALGORITHMS:
            raise _refusal(f"the quantizer {self.algorithm!r}", ", ".join(ALGORITHMS), "--quantizer default")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise _refusal(f"accuracy level {self.accuracy_level}", "0 to 4", "--accuracy-level 4")
        if self.method == "nf4" and (self.algorithm != "default" or not self.symmetric):
            what = "nf4 with zero points" if self.algorithm == "default" else f"nf4 with {self.algorithm}"
            raise _refusal(what, "the default quantizer, symmetric: nf4 has no other", "--precision int4")
        if self.algorithm == "k_quant" and self.symmetric:
            raise _refusal("k_quant without zero points", "zero points, which it optimizes", "--quantizer rtn")
        if self.eight_bits and self.method != "int4":
            raise _refusal(
                f"{self.method} with nodes of 8 bits", "int4 with some nodes in int8", "--precision int4"
            )


def blockwise(precision: Precision, provider: str, options: QuantizationOptions) -> Blockwise | None:
    """The settings for a precision; None for one that only casts weights. ExportError for impossible ones."""
    if precision not in get_args(Method):
        return None
    method: Method = precision  # type: ignore[assignment]
    size = options.block_size if options.block_size is not None else 64 if method == "nf4" else 32
    level = options.accuracy_level if options.accuracy_level is not None else 4 if provider == "cpu" else 0
    symmetric = options.symmetric and options.algorithm != "k_quant"  # it optimizes zero points too
    how = Blockwise(
        method,
        size,
        symmetric,
        options.algorithm,
        0 if method == "nf4" else level,
        options.keep,
        options.eight_bits,
        options.embeddings,
    )
    how.check()
    return how


def _refusal(what: str, expected: str, next_step: str) -> ExportError:
    return ExportError(f"{what} cannot be exported", expected=expected, next_step=next_step)


def quantize_graph(model: ir.Model, weights: Sequence[Weight], how: Blockwise) -> list[Weight]:
    """Quantize the products of a graph in place; returns its weights with their recipes.

    Nodes and initializers get the names that ONNX Runtime's quantizers give. A weight that other nodes also read
    stays beside its parts. ExportError if there is no product.
    """
    how.check()
    graph = model.graph
    done: dict[str, dict[Weight, ir.Value]] = {}
    lookups = how.block_size if how.embeddings and how.method in ("int4", "int8") else None
    products = candidates(model, weights, lookups)
    wide = {p.weight.name for n, p in products.items() if kept(n, how.eight_bits)}
    for node in list(graph):
        product = products.get(str(node.name))
        if product is None or kept(str(node.name), how.keep):
            continue
        own = replace(how, method="int8") if product.weight.name in wide else how
        parts = done.setdefault(product.weight.name, {part: _value(part) for part in _parts(product, own)})
        rewrite = _lookup if node.op_type == "Gather" else _product
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


def _value(part: Weight) -> ir.Value:
    """An initializer without values."""
    tensor = without_numbers(part.name, onnx_type(part.dtype), part.shape)
    return ir.Value(name=part.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _put(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Replace a node by `new`, whose last node takes over its outputs."""
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)


def _parts(product: Product, how: Blockwise) -> list[Weight]:
    weight = product.weight
    settings = Quantization(how.method, "packed", how.block_size, how.symmetric, how.algorithm)
    names = part_names(weight.name, settings)
    turned = weight.recipe.transposed != product.turned
    parts = []
    for part, shape in shapes(product.rows, product.columns, settings).items():
        recipe = replace(weight.recipe, transposed=turned, quantized=replace(settings, part=part))
        dtype = weight.dtype if part == "scales" else "uint8"
        parts.append(Weight(names[part], weight.file, dtype, shape, recipe))
    return parts


def part_names(name: str, how: Quantization) -> dict[Part, str]:
    """The names that ONNX Runtime's quantizers give to the parts of the initializer `name`."""
    if how.method in ("nf4", "fp4"):
        return {"packed": f"{name}_Bnb4", "scales": f"{name}_absmax"}
    bits = how.method.removeprefix("int")
    if how.algorithm == "default":
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
    return [ir.node(kind, inputs, dict(sorted(attributes.items())), domain=MICROSOFT, name=name)]


def _lookup(node: ir.Node, product: Product, parts: Sequence[ir.Value], how: Blockwise) -> list[ir.Node]:
    """Rows of embeddings, dequantized as they are read.

    The packed numbers have the shape of a head, which may share them: the builder does the same for tied
    embeddings.
    """
    packed, *others = parts
    bits, name = int(how.method.removeprefix("int")), f"{node.name}_rows"
    size = ir.tensor(np.array([product.columns, product.rows * bits // 8], np.int64))
    shape = ir.node("Constant", [], {"value": size}, name=f"{name}_shape", outputs=[ir.val(f"{name}_shape")])
    rows = ir.node("Reshape", [packed, shape.outputs[0]], name=name, outputs=[ir.val(name)])
    attributes = {"bits": bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [rows.outputs[0], node.inputs[1], *others]
    gathered = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=f"{node.name}_Q{bits}")
    return [shape, rows, gathered]
