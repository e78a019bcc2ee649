"""MatMul with a weight becomes MatMulNBits or MatMulBnb4, in a graph whose weights have no numbers yet."""

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from lora_export.contracts import Precision, QuantizationOptions
from lora_export.errors import ExportError
from lora_export.onnx_export.quantizing import shapes
from lora_export.onnx_export.weights_map import Method, Part, Quantization, Weight

if TYPE_CHECKING:
    import onnx

BLOCK_SIZES = (16, 32, 64, 128, 256)
ALGORITHMS = ("default", "rtn", "k_quant")


@dataclass(frozen=True)
class Blockwise:
    """method: int4 and int8 by ONNX Runtime's MatMulNBits, nf4 by its MatMulBnb4; accuracy_level: in which type the
    operator computes, 0: as its inputs are, 4: int8; keep: nodes that stay as they are, by name or pattern."""

    method: Method
    block_size: int = 32
    symmetric: bool = True
    algorithm: str = "default"
    accuracy_level: int = 0
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        """ExportError for settings that no quantizer has."""
        if self.block_size not in BLOCK_SIZES:
            raise _refusal(f"blocks of {self.block_size}", ", ".join(map(str, BLOCK_SIZES)), "--block-size 32")
        if self.algorithm not in ALGORITHMS:
            raise _refusal(f"the quantizer {self.algorithm!r}", ", ".join(ALGORITHMS), "--quantizer default")
        if self.method == "nf4" and (self.algorithm != "default" or not self.symmetric):
            raise _refusal("nf4 with another quantizer", "--quantizer default: nf4 has one way", "--precision nf4")


def blockwise(precision: Precision, provider: str, options: QuantizationOptions) -> Blockwise | None:
    """The settings for a precision; None for one in which weights are only cast. ExportError for what cannot be."""
    if precision not in get_args(Method):
        return None
    method: Method = precision  # type: ignore[assignment]
    size = options.block_size or (64 if method == "nf4" else 32)
    level = options.accuracy_level if options.accuracy_level is not None else 4 if provider == "cpu" else 0
    symmetric = options.symmetric and options.algorithm != "k_quant"  # it looks for a zero point, too
    how = Blockwise(method, size, symmetric, options.algorithm, 0 if method == "nf4" else level, options.keep)
    how.check()
    return how


def _refusal(found: str, expected: str, next_step: str) -> ExportError:
    return ExportError(f"{found} cannot be exported", expected=expected, next_step=next_step)


def quantize_graph(
    model: "onnx.ModelProto", weights: Sequence[Weight], how: Blockwise
) -> tuple["onnx.ModelProto", list[Weight]]:
    """The graph with quantized products, and its weights with their recipes. `model` is changed.

    Nodes and initializers have the names that ONNX Runtime's quantizers give. ExportError if there is no product.
    """
    how.check()
    known = {w.name: w for w in weights}
    done: dict[str, list[Weight]] = {}
    for node in model.graph.node:
        weight = known.get(node.input[1]) if node.op_type == "MatMul" and len(node.input) > 1 else None
        if weight is None or not _fits(weight) or kept(node.name, how.keep):
            continue
        parts = done.setdefault(weight.name, _parts(weight, how))
        _rewrite(node, weight, parts, how)
    if not done:
        raise ExportError(
            f"no product in this graph has a weight that {how.method} can be made of",
            expected="a model with linear layers that are not all kept in high precision",
            next_step="--precision fp16",
        )
    _replace_initializers(model, done)
    _import_domain(model)
    return model, _in_order(model, weights, done)


def candidates(model: "onnx.ModelProto", weights: Sequence[Weight]) -> dict[str, Weight]:
    """Node name → its weight, for each product that could be quantized."""
    known = {w.name: w for w in weights}
    return {
        n.name: known[n.input[1]]
        for n in model.graph.node
        if n.op_type == "MatMul" and n.input[1] in known and _fits(known[n.input[1]])
    }


def _fits(weight: Weight) -> bool:
    return (
        len(weight.shape) == 2 and bool(weight.recipe.pieces) and weight.dtype in ("float32", "float16", "bfloat16")
    )


def kept(name: str, patterns: Collection[str]) -> bool:
    """Whether a node of this name stays in high precision."""
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _parts(weight: Weight, how: Blockwise) -> list[Weight]:
    settings = Quantization(how.method, "packed", how.block_size, how.symmetric, how.algorithm)
    names = _names(weight.name, settings)
    found = []
    for part, shape in shapes(weight.shape[0], weight.shape[1], settings).items():
        recipe = replace(weight.recipe, quantized=replace(settings, part=part))
        dtype = weight.dtype if part == "scales" else "uint8"
        found.append(Weight(names[part], weight.file, dtype, shape, recipe))
    return found


def _names(name: str, how: Quantization) -> dict[Part, str]:
    if how.method in ("nf4", "fp4"):
        return {"packed": f"{name}_Bnb4", "scales": f"{name}_absmax"}
    bits = how.method.removeprefix("int")
    if how.algorithm == "default":
        return {"packed": f"{name}_Q{bits}", "scales": f"{name}_scales", "zero_points": f"{name}_zero_points"}
    return {"packed": f"{name}_Q{bits}G{how.block_size}", "scales": f"{name}_scale", "zero_points": f"{name}_zp"}


def _rewrite(node: "onnx.NodeProto", weight: Weight, parts: Sequence[Weight], how: Blockwise) -> None:
    import onnx

    attributes: dict[str, Any] = {"K": weight.shape[0], "N": weight.shape[1], "block_size": how.block_size}
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
    node.CopyFrom(new)


def _replace_initializers(model: "onnx.ModelProto", done: dict[str, list[Weight]]) -> None:
    from lora_export.onnx_export.graph_files import onnx_type

    used = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for parts in done.values():
        for part in parts:
            model.graph.initializer.add(name=part.name, data_type=onnx_type(part.dtype), dims=part.shape)


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
