"""What an export is asked for, and what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.choices import Activations, ModelKind, Precision
from lora_export.contracts.figures import Figure


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
