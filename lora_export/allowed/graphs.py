"""Operators of ONNX graphs that ONNX Runtime computes by itself.

Left out, and so refused: EPContext and Snpe, which hand a compiled program in the file to a driver, operators of
domains that only a library provides, and session options inside a model.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from lora_export.errors import ExportError

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


def check_operators(path: Path, operators: Iterable[tuple[str, str]], own: Collection[tuple[str, str]]) -> None:
    """ExportError for an operator (domain, name), at any depth, that is not on the list. own: functions of
    the model."""
    import onnx.defs

    for domain, operator in operators:
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
