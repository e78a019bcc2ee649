"""Operators of ONNX graphs that ONNX Runtime computes by itself.

Left out, and so refused: EPContext and Snpe, which hand a compiled program in the file to a driver, operators of
domains that only a library provides, and session options inside a model.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError

if TYPE_CHECKING:
    import onnx

STANDARD = frozenset({"", "ai.onnx"})
_OWN = frozenset({"ai.onnx.ml", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
# In the standard domain, where the genai builder puts it.
_MISPLACED = frozenset(
    {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"}
)
# com.microsoft, as ONNX Runtime 1.31 knows it (docs/ContribOperators.md).
CONTRIB = frozenset(
    """
    Attention AttnLSTM BeamSearch BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BifurcationDetector
    BitmaskBiasDropout BitmaskDropout BranchwiseRMSNorm CDist CausalConvWithState ComplexMul ComplexMulConj
    ConvTransposeWithDynamicPads CropAndResize DecoderAttention DecoderMaskedMultiHeadAttention
    DecoderMaskedSelfAttention DequantizeBFP DequantizeLinear DequantizeWithOrder DynamicQuantizeLSTM
    DynamicQuantizeMatMul DynamicSparseAttention DynamicTimeWarping EmbedLayerNormalization EngramGate
    ExpandDims FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation GatedAdd GatedDeltaNet
    GatedRMSNorm GatedRelativePositionBias GatherBlockQuantized GatherND Gelu GemmFastGelu GemmFloat8
    GemmaRotaryEmbedding GreedySearch GridSample GroupNorm GroupQueryAttention HyperConnectionPostMix
    HyperConnectionPreMix Inverse Irfft IsAllFinite LinearAttention LinearAttentionGate LongformerAttention
    MRotaryEmbedding MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4 MatMulFpQ4
    MatMulInteger16 MatMulIntegerToFloat MatMulNBits MatMulNBitsMlp MatMulNBitsQkv MaxpoolWithMask MoE
    MulInteger MultiHeadAttention MurmurHash3 NGramHashMapping NGramRepeatBlock NhwcConv NhwcFusedConv
    NhwcMaxPool PackedAttention PackedMultiHeadAttention PackedSparseAttentionIndexer Pad PagedAttention
    QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool QLinearConcat QLinearConv
    QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax
    QLinearWhere QMoE QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention
    QOrderedMatMul QuantizeBFP QuantizeLinear QuantizeWithOrder QuickGelu Range ReduceSumInteger
    RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding SampleOp Sampling ScaledSiLU
    SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
    SparseAttention SparseAttentionIndexer SparsePagedAttention SparseToDenseMatMul Tokenizer TorchEmbedding
    TransposeMatMul Trilu UnfoldTensor Unique VarlenCausalConvWithState VarlenNGramHashMapping WhisperBeamSearch
    WordConvEmbedding
""".split()  # noqa: SIM905 - 137 names in quotes are harder to read
)


def check_operators(path: Path, model: "onnx.ModelProto") -> None:
    """ExportError for an operator, at any depth, that is not on the list."""
    import onnx

    own = {(f.domain, f.name) for f in model.functions}
    for node in _nodes(model):
        domain, operator = node.domain, node.op_type
        if not (isinstance(domain, str) and isinstance(operator, str)):  # protobuf returns bytes then
            raise ExportError(f"the graph has the operator {operator!r}", where=path, expected="names in UTF-8")
        if domain in STANDARD:
            known = onnx.defs.has(operator, "") or operator in _MISPLACED
        else:
            known = domain in _OWN or (domain == "com.microsoft" and operator in CONTRIB)
        if not (known or (domain, operator) in own):
            raise ExportError(
                f"the graph has the operator {domain or 'ai.onnx'}.{operator}, which is not on the list of what "
                "ONNX Runtime computes by itself",
                where=path,
                expected="operators of ONNX, and those of ONNX Runtime that load nothing",
                next_step="do not run this graph; export the model again with lora-export export",
            )
    if any(entry.key == "ort_config" for entry in model.metadata_props):
        raise ExportError("the model contains session options (ort_config)", where=path, expected="only a graph")


def _nodes(model: "onnx.ModelProto") -> "Iterator[onnx.NodeProto]":
    """Every node: of the graph, of graphs inside nodes, of functions and of training."""
    waiting: list[Iterable[onnx.NodeProto]] = [model.graph.node, *(f.node for f in model.functions)]
    waiting += [g.node for info in model.training_info for g in (info.initialization, info.algorithm)]
    while waiting:
        for node in waiting.pop():
            yield node
            for attribute in node.attribute:
                waiting += [graph.node for graph in attribute.graphs]
                if attribute.HasField("g"):
                    waiting.append(attribute.g.node)
