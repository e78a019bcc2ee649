"""MatMul with a weight becomes MatMulNBits or MatMulBnb4, in a graph whose weights have no numbers yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from lora_export.choices import Precision
from lora_export.contracts import QuantizationOptions
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.matmuls import SOURCES, Product, candidates, kept
from lora_export.onnx_export.quantize.numbers import shapes
from lora_export.onnx_export.weights.map import Method, Part, Quantization, Weight

if TYPE_CHECKING:
    import onnx

AUTO = "auto"  # in place of names of nodes: those that damage is measured for
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = range(5)
ALGORITHMS = ("default", "rtn", "k_quant")


@dataclass(frozen=True)
class Blockwise:
    """method: int4 and int8 by ONNX Runtime's MatMulNBits, nf4 by its MatMulBnb4; accuracy_level: in which type the
    operator computes, 0: as its inputs are, 4: int8; keep: nodes that stay as they are, by name or pattern;
    eight_bits: nodes of an int4 graph that are int8, as many bytes buy more there than in `keep`; embeddings:
    quantize those, too, by GatherBlockQuantized."""

    method: Method
    block_size: int = 32
    symmetric: bool = True
    algorithm: str = "default"
    accuracy_level: int = 0
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    embeddings: bool = False

    def check(self) -> None:
        """ExportError for settings that no quantizer has."""
        if self.block_size not in BLOCK_SIZES:
            raise _refusal(f"blocks of {self.block_size}", ", ".join(map(str, BLOCK_SIZES)), "--block-size 32")
        if self.algorithm not in ALGORITHMS:
            raise _refusal(f"the quantizer {self.algorithm!r}", ", ".join(ALGORITHMS), "--quantizer default")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise _refusal(f"accuracy level {self.accuracy_level}", "0 to 4", "--accuracy-level 4")
        if self.method == "nf4" and (self.algorithm != "default" or not self.symmetric):
            found = "nf4 with zero points" if self.algorithm == "default" else f"nf4 with {self.algorithm}"
            raise _refusal(found, "the default quantizer, symmetric: nf4 has one way", "--precision int4")
        if self.algorithm == "k_quant" and self.symmetric:
            raise _refusal("k_quant without zero points", "zero points, which it looks for", "--quantizer rtn")
        if self.eight_bits and self.method != "int4":
            raise _refusal(
                f"{self.method} with nodes of 8 bits", "int4, of which some nodes are int8", "--precision int4"
            )


def blockwise(precision: Precision, provider: str, options: QuantizationOptions) -> Blockwise | None:
    """The settings for a precision; None for one in which weights are only cast. ExportError for what cannot be."""
    if precision not in get_args(Method):
        return None
    method: Method = precision  # type: ignore[assignment]
    size = options.block_size if options.block_size is not None else 64 if method == "nf4" else 32
    level = options.accuracy_level if options.accuracy_level is not None else 4 if provider == "cpu" else 0
    symmetric = options.symmetric and options.algorithm != "k_quant"  # it looks for a zero point, too
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


def _refusal(found: str, expected: str, next_step: str) -> ExportError:
    return ExportError(f"{found} cannot be exported", expected=expected, next_step=next_step)


def quantize_graph(
    model: "onnx.ModelProto", weights: Sequence[Weight], how: Blockwise
) -> tuple["onnx.ModelProto", list[Weight]]:
    """The graph with quantized products, and its weights with their recipes. `model` is changed.

    Nodes and initializers have the names that ONNX Runtime's quantizers give. A weight that other nodes read as
    well stays beside its parts. ExportError if there is no product.
    """
    how.check()
    done: dict[str, list[Weight]] = {}
    lookups = how.block_size if how.embeddings and how.method in ("int4", "int8") else None
    found = candidates(model, weights, lookups)
    wide = {p.weight.name for n, p in found.items() if kept(n, how.eight_bits)}
    nodes = []
    for node in model.graph.node:
        product = found.get(node.name)
        if product is None or node.op_type not in SOURCES or kept(node.name, how.keep):
            nodes.append(node)
            continue
        own = replace(how, method="int8") if product.weight.name in wide else how
        parts = done.setdefault(product.weight.name, _parts(product, own))
        rewrite = _lookup if node.op_type == "Gather" else _rewritten
        nodes += rewrite(node, product, parts, own)
    if not done:
        raise ExportError(
            f"no product in this graph has a weight that {how.method} can be made of",
            expected="a model with linear layers that are not all kept in high precision",
            next_step="--precision fp16",
        )
    nodes = [_copy(n) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _replace_initializers(model, done)
    _import_domain(model)
    return model, _in_order(model, weights, done)


def _parts(product: Product, how: Blockwise) -> list[Weight]:
    weight = product.weight
    settings = Quantization(how.method, "packed", how.block_size, how.symmetric, how.algorithm)
    names = part_names(weight.name, settings)
    turned = weight.recipe.transposed != product.turned
    found = []
    for part, shape in shapes(product.rows, product.columns, settings).items():
        recipe = replace(weight.recipe, transposed=turned, quantized=replace(settings, part=part))
        dtype = weight.dtype if part == "scales" else "uint8"
        found.append(Weight(names[part], weight.file, dtype, shape, recipe))
    return found


def part_names(name: str, how: Quantization) -> dict[Part, str]:
    """The names that ONNX Runtime's quantizers give to the parts of the initializer `name`."""
    if how.method in ("nf4", "fp4"):
        return {"packed": f"{name}_Bnb4", "scales": f"{name}_absmax"}
    bits = how.method.removeprefix("int")
    if how.algorithm == "default":
        return {"packed": f"{name}_Q{bits}", "scales": f"{name}_scales", "zero_points": f"{name}_zero_points"}
    return {"packed": f"{name}_Q{bits}G{how.block_size}", "scales": f"{name}_scale", "zero_points": f"{name}_zp"}


def _rewritten(
    node: "onnx.NodeProto", product: Product, parts: Sequence[Weight], how: Blockwise
) -> list["onnx.NodeProto"]:
    import onnx

    attributes: dict[str, Any] = {"K": product.rows, "N": product.columns, "block_size": how.block_size}
    if how.method in ("nf4", "fp4"):
        kind, suffix = "MatMulBnb4", "_Bnb4"
        attributes["quant_type"] = int(how.method == "nf4")
    else:
        bits = int(how.method.removeprefix("int"))
        kind, suffix = "MatMulNBits", f"_Q{bits}"
        attributes["bits"] = bits
        if how.accuracy_level:
            attributes["accuracy_level"] = how.accuracy_level
    new = onnx.helper.make_node(
        kind,
        [node.input[0], *(p.name for p in parts)],
        list(node.output),
        name=node.name + suffix,
        domain="com.microsoft",
        **attributes,
    )
    return [new]


def _lookup(
    node: "onnx.NodeProto", product: Product, parts: Sequence[Weight], how: Blockwise
) -> list["onnx.NodeProto"]:
    """Rows of embeddings, dequantized as they are read.

    The packed numbers have the shape for a head, which may share them: the builder does the same with tied ones.
    """
    import onnx

    packed, *others = (p.name for p in parts)
    bits, rows = int(how.method.removeprefix("int")), f"{node.name}_rows"
    size = onnx.numpy_helper.from_array(np.array([product.columns, product.rows * bits // 8], np.int64))
    return [
        onnx.helper.make_node("Constant", [], [f"{rows}_shape"], name=f"{rows}_shape", value=size),
        onnx.helper.make_node("Reshape", [packed, f"{rows}_shape"], [rows], name=rows),
        onnx.helper.make_node(
            "GatherBlockQuantized",
            [rows, node.input[1], *others],
            list(node.output),
            name=f"{node.name}_Q{bits}",
            domain="com.microsoft",
            bits=bits,
            block_size=how.block_size,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]


def _copy(node: "onnx.NodeProto") -> "onnx.NodeProto":
    """Apart from the graph that it lies in, which is about to be emptied."""
    copied = type(node)()
    copied.CopyFrom(node)
    return copied


def _replace_initializers(model: "onnx.ModelProto", done: dict[str, list[Weight]]) -> None:
    from lora_export.onnx_export.graphs.files import onnx_type

    used = set(_inputs(model.graph))
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for parts in done.values():
        for part in parts:
            model.graph.initializer.add(name=part.name, data_type=onnx_type(part.dtype), dims=part.shape)


def _inputs(graph: "onnx.GraphProto") -> Iterator[str]:
    """Names that nodes read, those in branches and loops too, and outputs of the graph."""
    yield from (o.name for o in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _inputs(inner)


def _import_domain(model: "onnx.ModelProto") -> None:
    if all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)


def _in_order(model: "onnx.ModelProto", weights: Sequence[Weight], done: dict[str, list[Weight]]) -> list[Weight]:
    """What was, where a graph still uses it, with the parts of a weight in its place."""
    used = {t.name for t in model.graph.initializer}
    found: list[Weight] = []
    for weight in weights:
        if weight.name in used:
            found.append(weight)
        found += done.get(weight.name, [])
    return found
