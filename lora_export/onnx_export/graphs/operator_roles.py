"""Which inputs of an operator steer it, because they decide a shape, an index or a branch. All others are operands.

Most of this follows from ONNX's schemas: an input that accepts 32- or 64-bit integers, booleans or strings, and no
floats, is a shape, an axis, an index, a length or a condition. For operators without a schema there (ONNX Runtime's
own, and unknown ones), the element type in the graph decides in the same way, and an input of unknown type steers.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx.defs
    import onnx_ir as ir

# work: decides how much is computed; choice: decides which elements, not how many; operand: neither
Role = Literal["work", "choice", "operand"]

# Their outputs depend on the shape of the input, not on its values.
SHAPES = frozenset({"Shape", "Size"})
# Their outputs are activations: made of weights and data.
PRODUCTS = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "RNN", "LSTM", "GRU", "MatMulInteger", "ConvInteger",
    "QLinearMatMul", "QLinearConv", "MatMulNBits", "MatMulBnb4", "MatMulNBitsMlp", "MatMulNBitsQkv", "FusedMatMul",
    "FusedGemm", "FusedConv", "NhwcFusedConv", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    "TransposeMatMul", "FusedMatMulActivation", "Attention", "QAttention", "MultiHeadAttention",
    "GroupQueryAttention", "MoE", "QMoE", "DynamicQuantizeLSTM",
})  # fmt: skip
# Quantization: scales, zero points and biases change with an adapter's weights or activations.
_QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention", "QEmbedLayerNormalization", "QLinearAdd",
    "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearConcat", "QLinearWhere",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "MatMulNBits", "MatMulBnb4", "QMoE",
    "GatherBlockQuantized", "DynamicQuantizeLSTM", "MatMulNBitsMlp", "MatMulNBitsQkv",
})  # fmt: skip
_LOGIC = frozenset({"And", "Or", "Xor", "Not", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"})
# What types do not tell. Kernels of Pow have shortcuts for some exponents; an expert's share of the tokens is its
# share of the work.
_ROLES: Mapping[str, Mapping[int, Role]] = {
    "Range": {0: "work", 1: "work", 2: "work"},
    "OneHot": {0: "choice", 1: "work"},
    "Resize": {1: "work", 2: "work", 3: "work"},
    "Upsample": {1: "work"},
    "NonZero": {0: "work"},
    "Unique": {0: "work"},
    "NonMaxSuppression": dict.fromkeys(range(5), "work"),
    "DynamicTimeWarping": {0: "work"},
    "Where": {0: "operand"},
    "QLinearWhere": {0: "operand"},
    "Pow": {1: "choice"},
    "MoE": {1: "choice"},
    "QMoE": {1: "choice"},
    "QLinearConv": {8: "operand"},
    "QGemm": {6: "operand"},
    "DequantizeLinear": {0: "operand", 2: "operand"},
    "Gather": {1: "choice"},
    "GatherElements": {1: "choice"},
    "GatherND": {1: "choice"},
    "GatherBlockQuantized": {1: "choice"},
    "Scatter": {1: "choice"},
    "ScatterElements": {1: "choice"},
    "ScatterND": {1: "choice"},
    "TensorScatter": {2: "choice"},
    "ArrayFeatureExtractor": {1: "choice"},
    "TorchEmbedding": {1: "choice"},
    "EmbedLayerNormalization": {0: "choice", 1: "choice", 8: "choice"},
    "QEmbedLayerNormalization": {0: "choice", 1: "choice"},
    "RotaryEmbedding": {1: "choice", 3: "choice"},
    "MRotaryEmbedding": {1: "choice"},
}
_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_BLOCKED = "com.microsoft.nchwc"  # floats in another layout, without a type in the graph
_KNOWN = _STANDARD | {"com.microsoft", "com.ms.internal.nhwc", _BLOCKED}
_STEERING = ("int32", "int64", "uint32", "uint64", "bool", "string")
_LATEST = 2**31 - 1


def role(node: "ir.Node", position: int, element: "ir.DataType | None", versions: Mapping[str, int]) -> Role:
    """What the input at `position` is to the operator.

    element: the input's type, None if unknown; versions: domain → version of its operator set.
    """
    if node.domain == _BLOCKED:
        return "operand"
    if not is_foreign(node):
        known = _ROLES.get(node.op_type, {}).get(position)
        if known is not None:
            return known
        if node.op_type in _LOGIC:
            return "operand"
    allowed = _allowed(node, position, versions)
    if allowed is None:
        return "operand" if element is not None and not is_steering(element) else "work"
    if any("float" in kind or "double" in kind for kind in allowed):
        return "operand"
    return "work" if any(f"({kind})" in text for text in allowed for kind in _STEERING) else "operand"


def is_steering(element: "ir.DataType") -> bool:
    """Whether shapes, indices and conditions have this element type: 32- and 64-bit integers, booleans, strings.

    Smaller integers are quantized numbers, which must be cast before they can steer anything.
    """
    return element.name.lower() in _STEERING


def is_quantized(node: "ir.Node") -> bool:
    return node.op_type in _QUANTIZED and node.domain in _KNOWN


def is_foreign(node: "ir.Node") -> bool:
    """Whether neither ONNX nor ONNX Runtime defines the operator."""
    return node.domain not in _KNOWN


def keeps_type(node: "ir.Node", versions: Mapping[str, int]) -> bool:
    """Whether the output has the element type of the first input, by ONNX's schema or because it is a product."""
    schema = _schema(node.op_type, node.domain, versions.get(node.domain, _LATEST))
    if schema is None:
        return node.op_type in PRODUCTS or "LayerNormalization" in node.op_type
    return bool(schema.inputs and schema.outputs) and schema.outputs[0].type_str == schema.inputs[0].type_str


def since(node: "ir.Node", versions: Mapping[str, int]) -> int:
    """The operator set version that gave the operator its present meaning; 0 if ONNX does not define it."""
    schema = _schema(node.op_type, node.domain, versions.get(node.domain, _LATEST))
    return int(schema.since_version) if schema else 0


def _allowed(node: "ir.Node", position: int, versions: Mapping[str, int]) -> frozenset[str] | None:
    schema = _schema(node.op_type, node.domain, versions.get(node.domain, _LATEST))
    if schema is None or not schema.inputs:
        return None
    return frozenset(schema.inputs[min(position, len(schema.inputs) - 1)].types)


@lru_cache(maxsize=1024)
def _schema(name: str, domain: str, version: int) -> "onnx.defs.OpSchema | None":
    import onnx.defs

    if domain not in _STANDARD:
        return None
    domain = "" if domain == "ai.onnx" else domain
    try:
        return onnx.defs.get_schema(name, version, domain)
    except onnx.defs.SchemaError:
        return None
