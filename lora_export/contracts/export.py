"""What an export is asked for, and what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.choices import Activations, ModelKind, Precision, ProofLevel
from lora_export.contracts.figures import Figure


@dataclass(frozen=True)
class Proof:
    """How the graphs of an export were held against the model in PyTorch before the export was kept.

    cases: runs that were compared, in sizes that were not traced; difference: the largest one of any output,
    relative to the output's largest value; allowed: at that place; case, output: where it was; reference: what the
    graphs were held against; level: quick or full; experts: how many of a mixture were visited, empty for other
    models; limits: what the graphs compute otherwise than PyTorch because their operators cannot do it, measured;
    not_reached: what could not be compared, and why; inherited: whether this is the proof of an earlier export,
    whose graphs this one took; seconds: what it cost.
    """

    cases: int
    difference: Figure
    allowed: Figure
    case: str
    output: str
    reference: str
    level: ProofLevel = "quick"
    experts: str = ""
    limits: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()
    inherited: bool = False
    seconds: Figure = 0.0


@dataclass(frozen=True)
class Attempt:
    """An engine whose graph was not taken, and why: it refused, failed, or its graph differs from PyTorch."""

    engine: str
    reason: str


@dataclass(frozen=True)
class CalibrationRecord:
    """The text on which numbers of an export were chosen. text_sha256: of the file's bytes; tokens, windows: how
    many tokens of it were run, in how many pieces (a line each for static activations)."""

    text_sha256: str
    tokens: int
    windows: int


@dataclass(frozen=True)
class QuantizationSummary:
    """What an export's certificate says of a quantizer that reads texts.

    calibrated: how many weights were rounded by what they do to outputs on the texts; data_free: how many without,
    because the texts have no statistics of them; first_data_free: the first checkpoint tensor of those; worst: the
    tensor whose outputs change most, and output_error by how much: ‖outputs − exact‖ / ‖exact‖ on the texts.
    """

    quantizer: str
    calibrated: int
    data_free: int
    first_data_free: str | None = None
    worst: str | None = None
    output_error: Figure | None = None


@dataclass(frozen=True)
class ExportResult:
    """An exported folder. `files` maps a file name to its size in bytes; `nodes` counts the nodes of all graphs.

    task: Optimum's name of it; graphs: file names of the graphs, the encoder's first where there are several;
    activations: of an int8 graph, as in QuantizationOptions; proof: None for an export of an older version; tried:
    engines before the one that made the graphs; calibration: None where no text was read; quantized: None for
    a quantizer that reads none.
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
    proof: Proof | None = None
    tried: tuple[Attempt, ...] = ()
    calibration: CalibrationRecord | None = None
    quantized: QuantizationSummary | None = None

    @property
    def model(self) -> Path:
        """The graph that reads the input: the only one, or the encoder's."""
        return self.output / self.graphs[0]

    @property
    def nbytes(self) -> int:
        """Of what a runtime reads of the model: its graphs and data files."""
        data = (".onnx", ".data", "_data", ".bin")
        return sum(size for name, size in self.files.items() if name.endswith(data))

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.output / name for name in self.graphs)
