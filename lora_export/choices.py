"""The words that a caller chooses among, and a default. Light, as the command line imports it for --help."""

from typing import Literal, get_args

BaseWeights = Literal["dequantized", "original"]
ExpertPacking = Literal["auto", "rank", "expert"]
ExpertLayout = Literal["auto", "out-in", "in-out"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "nf4"]
PRECISIONS = (*get_args(Precision), "fp8", "nvfp4", "mxfp4")  # the last three are refused in words
Requantization = Literal["nf4", "fp4", "int8"]
TrainingQuantization = Literal["none", "nf4", "fp4", "int8"]
Device = Literal["cpu", "cuda"]
Quantizer = Literal["default", "rtn", "k_quant", "gptq"]
Grid = Literal["quick", "standard", "paper"]
# encoder: whatever does not generate; component: a model of a pipeline of diffusers; pipeline: several of them
ModelKind = Literal["decoder", "encoder", "seq2seq", "vision-language", "component", "pipeline"]
Optimize = Literal["none", "basic", "full"]
ProofLevel = Literal["quick", "full"]
Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
ExtraArm = Literal["plugged", "pytorch"]
# equivalent_by_structure: base and merged are one optimized graph, and no test of the timings is claimed
Verdict = Literal["equivalent", "equivalent_by_structure", "slower", "inconclusive"]
Phase = Literal["prefill", "decode", "denoise"]  # denoise: one step of a pipeline of images
Outcome = Literal["agrees", "differs", "unknown"]
Certify = Literal["sampled", "full"]
Combine = Literal["none", "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySign = Literal["total", "frequency"]
SplitQkvAlpha = Literal["file", "trained"]
Activations = Literal["float", "dynamic", "static"]

Shapes = tuple[tuple[int, int], ...]  # (batch, prompt tokens) of each cell of a benchmark
GRIDS: dict[Grid, Shapes] = {
    "quick": ((1, 128),),
    "standard": ((1, 128), (1, 1024), (8, 128), (8, 1024)),
    "paper": ((1, 128), (16, 256), (32, 512)),
}
MIN_SURVIVAL = 0.9  # of an adapter's effect on the outputs, where nobody asks for another share
ARCHIVES = ("tar.zst", "zip")
