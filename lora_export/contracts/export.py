"""What an export is asked for, and what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_export.choices import Activations, ModelKind, Optimize, Precision, Provider
from lora_export.contracts.figures import Figure


@dataclass(frozen=True)
class QuantizationOptions:
    """How the weights of an int4, int8 or nf4 graph are quantized.

    block_size: numbers that share a scale (None: 32, and 64 for nf4); algorithm: how a scale is chosen;
    accuracy_level: in which type products are computed (None: int8 (4) on the CPU, as the inputs elsewhere (0));
    keep: nodes that stay as they are, by name or pattern, or `auto`: those that do the most damage;
    eight_bits: nodes of an int4 graph that are int8; embeddings: quantize those, too (not for nf4); activations: of
    an int8 graph that does not generate: as they are, or int8, by ranges that are found while it runs (dynamic) or
    on `calibration`, a file of one text a line (static; None: built-in texts).
    """

    block_size: int | None = None
    symmetric: bool = True
    algorithm: Literal["default", "rtn", "k_quant"] = "default"
    accuracy_level: int | None = None
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    embeddings: bool = False
    activations: Activations = "float"
    calibration: Path | None = None


@dataclass(frozen=True)
class ExportOptions:
    """precision: of the weights; provider: where the graph is to run; engine: None for the one that fits the
    architecture; optimize: what the dynamo engine fuses."""

    precision: Precision = "fp32"
    provider: Provider = "auto"
    engine: str | None = None
    optimize: Optimize = "full"
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """An exported folder. `files` maps a file name to its size in bytes; `nodes` counts the nodes of all graphs.

    task: Optimum's name of it; graphs: file names of the graphs, the encoder's first where there are several;
    activations: of an int8 graph, as in QuantizationOptions; fused_against_plain: the largest relative difference
    between a fused graph's outputs and those of one without optimizations, None where they were not compared.
    """

    output: Path
    engine: str
    precision: Precision
    nodes: int
    seconds: Figure
    files: Mapping[str, int]
    kind: ModelKind = "decoder"
    task: str = "text-generation"
    graphs: tuple[str, ...] = ("model.onnx",)
    activations: Activations = "float"
    fused_against_plain: Figure | None = None

    @property
    def model(self) -> Path:
        """The graph that reads the input: the only one, or the encoder's."""
        return self.output / self.graphs[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.output / name for name in self.graphs)
