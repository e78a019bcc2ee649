"""What an export engine is given, and what it has to offer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_export.choices import ModelKind, Optimize, Precision, Provider
from lora_export.contracts import Progress, TensorSource
from lora_export.errors import ExportError
from lora_export.onnx_export.engines import companions
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.quantize.settings import Blockwise


@dataclass(frozen=True)
class ExportJob:
    """One export. model: a Hugging Face folder; output: an empty folder; provider: cpu or cuda.

    adapter: a LoRA folder whose update stays beside the weights in the graph (the unmerged model); worker: the
    process that engines run in; calibration: texts, or the statistics of an earlier export, for quantizers that ask
    how inputs are distributed; calibrated_on: the numbers of the model that reads them, if not the exported one;
    ready: other exports of the same numbers, with the same statistics, to copy weights from.
    """

    model: Path
    config: Mapping[str, Any]
    output: Path
    precision: Precision
    provider: Provider
    adapter: Path | None
    progress: Progress
    worker: Worker
    optimize: Optimize = "full"
    quantized: Blockwise | None = None
    calibration: Path | None = None
    calibrated_on: TensorSource | None = None
    ready: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Made:
    """What an engine left in the folder of a job. task: Optimum's name; graphs: file names, an encoder's first.

    described: whether weights-map.json exists, and the data files are to be filled as it says.
    """

    kind: ModelKind
    task: str
    graphs: tuple[str, ...]
    described: bool


class Engine(ABC):
    """A way to export some architectures. All methods raise ExportError; the checks, before any work.

    name: as in --engine; architectures: class names of config.json, which `exports` takes by default; optimizes:
    whether `run` obeys `optimize`, so that plain graphs can be had to compare with; fp16_int4: whether its int4
    graphs for CUDA compute in fp16; comparable: whether its graphs have the inputs and outputs of transformers'
    model, so that they can be compared with it before they are kept.
    """

    name: ClassVar[str]
    architectures: ClassVar[frozenset[str]] = frozenset()
    optimizes: ClassVar[bool] = False
    fp16_int4: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def exports(self, config: Mapping[str, Any]) -> bool:
        """Whether this engine takes the model that a config.json describes."""
        return architecture_of(config) in self.architectures

    @abstractmethod
    def check(self, job: ExportJob) -> None:
        """Refuse a job that `run` would do wrong, or whose graph its provider could not run."""

    @abstractmethod
    def check_precision(self, precision: Precision, provider: str) -> None:
        """Refuse a precision, for a model that may not exist yet."""

    @abstractmethod
    def generates(self, config: Mapping[str, Any]) -> bool:
        """Whether the model generates text token by token."""

    @abstractmethod
    def run(self, job: ExportJob) -> Made:
        """Write graphs, a map of their weights, and data files into the folder of the job.

        The data files have their full size, and holes where the map has a recipe: `weights.fill` fills those.
        """

    def mixes_bits(self, config: Mapping[str, Any]) -> bool:
        """Whether single products of an int4 graph can be int8, by their measured damage."""
        return False

    def accompany(self, model: Path, output: Path) -> None:
        """Put the small files of `model` beside the graphs in `output`."""
        companions.copy(model, output)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a config.json names first, or that of diffusers which it belongs to."""
    own = config.get("_class_name")
    names = [own] if isinstance(own, str) else config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ExportError(
            f"config.json names no architecture (model_type {config.get('model_type')!r})",
            where="config.json",
            expected='"architectures": ["LlamaForCausalLM"] or another class of transformers',
        )
    return names[0]
