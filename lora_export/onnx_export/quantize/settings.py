"""How the weights of a graph are quantized: settings, and whether a quantizer supports them."""

import fnmatch
import glob
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from lora_export.choices import Precision
from lora_export.contracts import QuantizationOptions
from lora_export.errors import ExportError
from lora_export.onnx_export.weights.map import Method, Quantization

AUTO = "auto"  # in place of names: choose by measured damage
TOUCHED = "touched"  # in place of names: what the adapters changed
WORDS = (AUTO, TOUCHED)
BLOCK_SIZES = (16, 32, 64, 128, 256)
BLOCKS: dict[Method, int] = {"int4": 32, "int8": 64, "nf4": 64, "fp4": 64}  # where nobody asks for another
# int4 of a model that generates. Beside blocks of 32 without zero points, SmolLM2 keeps more of an adapter (0.77
# for 0.71 of its effect) in fewer bytes; encoders keep less of their own outputs.
BLOCK_WITH_PAST = 64
ACCURACY_LEVELS = range(5)
STATISTICS = "calibration.safetensors"  # beside an export: what its products read
GPTQ = "gptq"  # rounds so that the outputs on calibration texts change least
ALGORITHMS = ("default", "rtn", "k_quant", GPTQ)


@dataclass(frozen=True)
class Blockwise:
    """method: int4 and int8 with ONNX Runtime's MatMulNBits, nf4 with its MatMulBnb4; accuracy_level: the type that
    the operator computes in (0: that of its inputs, 4: int8); keep: nodes to leave unquantized, by patterns of
    their names or of checkpoint tensors (see `chosen`); eight_bits: those of an int4 graph to make int8, where a
    byte buys more than in `keep`; embeddings: quantize those too, with GatherBlockQuantized; a head that is tied
    to them reads the same numbers."""

    method: Method
    block_size: int = 32
    symmetric: bool = True
    algorithm: str = "default"
    accuracy_level: int = 0
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    embeddings: bool = True

    @property
    def settings(self) -> Quantization:
        """As a recipe has them, for the packed numbers."""
        return Quantization(self.method, "packed", self.block_size, self.symmetric, self.algorithm)

    def of_table(self, width: int, shared: bool) -> "Blockwise":
        """The settings for a lookup table with rows of `width` numbers; shared: a head multiplies by it as well.

        GatherBlockQuantized reads int4 and int8 alone. A table that is only looked up in becomes int8: no product
        gets faster by int4, and MiniLM's sentences lose a thousandth of their cosine. Its CUDA kernel counts zero
        points of 4 bits without the half byte that ends a row with an odd number of blocks (ONNX Runtime 1.31):
        such a table gets smaller blocks.
        """
        if self.method in ("nf4", "fp4") or (self.method == "int4" and not shared):
            algorithm = GPTQ if self.algorithm == GPTQ else "default"
            return replace(self, method="int8", block_size=BLOCKS["int8"], symmetric=True, algorithm=algorithm)
        if self.method != "int4" or self.symmetric:
            return self
        size = next((s for s in reversed(BLOCK_SIZES) if s <= self.block_size and -(-width // s) % 2 == 0), None)
        if size is None:
            return replace(
                self, symmetric=True, algorithm="default" if self.algorithm == "k_quant" else self.algorithm
            )
        return replace(self, block_size=size)

    def check(self) -> None:
        """ExportError for settings that no quantizer supports."""
        if self.block_size not in BLOCK_SIZES:
            raise unsupported(f"blocks of {self.block_size}", ", ".join(map(str, BLOCK_SIZES)), "--block-size 32")
        if self.algorithm not in ALGORITHMS:
            raise unsupported(f"the quantizer {self.algorithm!r}", ", ".join(ALGORITHMS), "--quantizer default")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise unsupported(f"accuracy level {self.accuracy_level}", "0 to 4", "--accuracy-level 4")
        if self.method == "nf4" and (self.algorithm != "default" or not self.symmetric):
            what = "nf4 with zero points" if self.algorithm == "default" else f"nf4 with {self.algorithm}"
            raise unsupported(what, "the default quantizer, symmetric: nf4 has no other", "--precision int4")
        if self.algorithm == "k_quant" and self.symmetric:
            raise unsupported("k_quant without zero points", "zero points, which it optimizes", "--quantizer rtn")
        if self.eight_bits and self.method != "int4":
            raise unsupported(
                f"{self.method} with nodes of 8 bits", "int4 with some nodes in int8", "--precision int4"
            )


def blockwise(
    precision: Precision, provider: str, options: QuantizationOptions, generates: bool
) -> Blockwise | None:
    """The settings for a precision; None for one that only casts weights. ExportError for impossible ones.
    generates: whether the model generates text."""
    if precision not in get_args(Method):
        return None
    method: Method = precision  # type: ignore[assignment]
    size = options.block_size
    if size is None:
        size = BLOCK_WITH_PAST if method == "int4" and generates else BLOCKS[method]
    level = options.accuracy_level if options.accuracy_level is not None else 4 if provider == "cpu" else 0
    symmetric = options.symmetric if options.symmetric is not None else method != "int4"
    symmetric = symmetric and options.algorithm != "k_quant"  # it optimizes zero points too
    touched = escaped(options.touched) if TOUCHED in options.keep and method == "int4" else ()
    how = Blockwise(
        method,
        size,
        symmetric,
        options.algorithm,
        0 if method == "nf4" else level,
        unquantized(options) if method != "int4" else tuple(k for k in options.keep if k != TOUCHED),
        (*options.eight_bits, *touched),
        options.embeddings,
    )
    how.check()
    return how


# ONNX Runtime 1.31. On the CPU a product behind DequantizeLinear of E4M3 takes 20 times as long as one of fp32
# weights (2048², one row), and DequantizeLinear reads no E2M1. On CUDA the operators that multiply by such weights
# take fp16 or bf16 inputs.
_NO_KERNEL = {
    "fp8": (
        "fp8 weights (E4M3) are not exported: on the CPU ONNX Runtime converts them to fp32 at each run, and its "
        "CUDA operator (MatMulBlockQuantizedFp8Weight) has no CPU kernel to prove a graph with",
        "--precision int8, which is as small",
    ),
    "nvfp4": (
        "nvfp4 weights (E2M1, blocks of 16 with E4M3 scales) are not exported: ONNX Runtime does not read them on "
        "the CPU, and its CUDA operator (MatMulBlockQuantizedFp4Weight) has no CPU kernel to prove a graph with",
        "--precision int4, which is as small",
    ),
    "mxfp4": (
        "mxfp4 weights (E2M1, blocks of 32 with E8M0 scales) are not exported: ONNX Runtime multiplies by them in "
        "the experts of a mixture alone (QMoE), and only on CUDA",
        "--precision int4, which is as small",
    ),
}


def refuse_without_kernel(precision: str) -> None:
    """ExportError for a type of weights that is known by name, and that no exported graph could compute with."""
    if precision in _NO_KERNEL:
        found, next_step = _NO_KERNEL[precision]
        raise ExportError(found, expected=", ".join(get_args(Precision)), next_step=next_step)


def are_statistics(calibration: Path | None) -> bool:
    """Whether a calibration is the statistics of an earlier export, and no text."""
    return calibration is not None and calibration.suffix == Path(STATISTICS).suffix


def unsupported(what: str, expected: str, next_step: str) -> ExportError:
    return ExportError(f"{what} cannot be exported", expected=expected, next_step=next_step)


def unquantized(options: QuantizationOptions) -> tuple[str, ...]:
    """The patterns of what stays unquantized in graphs that do not mix bits."""
    touched = escaped(options.touched) if TOUCHED in options.keep else ()
    return (*(k for k in options.keep if k != TOUCHED), *touched)


def chosen(nodes: Mapping[str, Collection[str]], patterns: Collection[str]) -> set[str]:
    """The nodes that patterns mean. nodes: name → the checkpoint tensors that its weight is made of.

    A pattern that no node's name matches is one of tensors' names: those are the same in every graph of a model.
    """
    of_tensors: dict[str, list[str]] = {}
    for node, tensors in nodes.items():
        for tensor in tensors:
            of_tensors.setdefault(tensor, []).append(node)
    found: set[str] = set()
    for pattern in patterns:
        own = _matching(nodes, pattern)
        found.update(own or (node for tensor in _matching(of_tensors, pattern) for node in of_tensors[tensor]))
    return found


def _matching(names: Collection[str], pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [pattern] if pattern in names else []


def escaped(names: Collection[str]) -> tuple[str, ...]:
    """Patterns that match these names alone."""
    return tuple(sorted(map(glob.escape, names)))
