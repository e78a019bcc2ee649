"""What an export engine is given, and what it has to offer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_export.choices import ModelKind, Optimize, Precision, Provider
from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.onnx_export.quantize.blockwise import Blockwise


@dataclass(frozen=True)
class Job:
    """One export. model: a Hugging Face folder; output: an empty folder; provider: cpu or cuda.

    adapter: a LoRA folder whose update stays beside the weights in the graph (the unmerged model).
    """

    model: Path
    config: Mapping[str, Any]
    output: Path
    precision: Precision
    provider: Provider
    adapter: Path | None
    progress: Progress
    optimize: Optimize = "full"
    quantized: Blockwise | None = None


@dataclass(frozen=True)
class Made:
    """What an engine left in the folder of a job. task: Optimum's name; graphs: file names, an encoder's first.

    described: whether weights-map.json is there and the data files wait for writing.fill.
    """

    kind: ModelKind
    task: str
    graphs: tuple[str, ...]
    described: bool


class Engine(Protocol):
    """A way to export some architectures. All methods raise ExportError; the checks before any work."""

    @property
    def name(self) -> str: ...

    @property
    def architectures(self) -> frozenset[str]: ...

    def check(self, job: Job) -> None: ...

    def check_precision(self, precision: Precision, provider: str) -> None: ...

    def generates(self, config: Mapping[str, Any]) -> bool:
        """Whether the model makes a text token by token."""
        ...

    def run(self, job: Job) -> Made: ...

    def accompany(self, model: Path, output: Path) -> None:
        """Put the small files of `model` beside the graphs in `output`."""
        ...


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a config.json names first."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ExportError(
            f"config.json names no architecture (model_type {config.get('model_type')!r})",
            where="config.json",
            expected='"architectures": ["LlamaForCausalLM"] or another class of transformers',
        )
    return names[0]
