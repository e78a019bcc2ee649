"""What a package is made from, and what a target runtime has to offer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lora_export.choices import Precision
from lora_export.contracts import ExportResult, MergeResult, Report, ValidationResult
from lora_export.errors import InputError
from lora_export.packages.tasks import Task

RUNS_OWN = "run"  # the variant that is the run's own export
Language = Literal["python", "javascript"]


@dataclass(frozen=True)
class Run:
    """What merge-and-export left.

    merged: the merged folder, None for a run without one; export: the run's own ONNX export; companions: the folder
    with config.json, tokenizer and licences; manifest, report: the run's documents; merge, validation: of
    the report; config: of the model.
    """

    folder: Path
    merged: Path | None
    export: ExportResult
    companions: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    report: Report
    merge: MergeResult
    validation: ValidationResult
    task: Task

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["unknown"])[0])


@dataclass(frozen=True)
class Sample:
    """A prompt and what the unmerged model says to it, or the validated graph computes of it.

    text: greedy, without special tokens; None for a model that does not generate text. numbers: the first of its
    first output otherwise.
    """

    prompt: str
    text: str | None = None
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Variant:
    """An export that goes into a package, by the name that its runtime has for it (fp32, q4, …)."""

    name: str
    precision: Precision
    provider: str = "cpu"


@dataclass(frozen=True)
class Job:
    """One package. stage: the empty folder to fill; exports: by the names of the variants; name: of the model;
    providers: what it is to run on, the usual one first; adapters: names of the .onnx_adapter files beside a graph
    with slots, the run's own first."""

    run: Run
    stage: Path
    name: str
    providers: tuple[str, ...]
    exports: Mapping[str, ExportResult]
    sample: Sample | None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snippet:
    """A program that runs a package and prints what it says to the sample, as one line of JSON.

    setup: the commands that install its runtime; code: the program.
    """

    language: Language
    setup: str
    code: str


@dataclass(frozen=True)
class Facts:
    """What running a package takes, as its manifest and config.json have it.

    name: of the model; variants: their names; providers: what it runs on, the usual one first; precision: of what
    the program runs; adapters: that are plugged in as it runs.
    """

    target: str
    name: str
    task: Task
    precision: str
    variants: tuple[str, ...]
    providers: tuple[str, ...]
    sample: Sample | None
    config: Mapping[str, Any]
    adapters: tuple[str, ...] = ()


class Target(ABC):
    """A runtime that packages are made for. All methods raise ExportError or InputError for what cannot be done."""

    name: ClassVar[str]

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        """The exports to put into a package: those with `names`, or the usual ones. Refuses what cannot be had."""
        if names:
            raise InputError(
                f"--variant {names[0]} with --for {self.name}",
                expected="no variants: this package holds one model, that of the run",
                next_step="merge-and-export --precision for another, or --for transformers-js for several",
            )
        return (Variant(RUNS_OWN, run.export.precision),)

    def providers(self, run: Run, asked: str | None) -> tuple[str, ...]:
        """What the package runs on, the usual one first. asked: which is to be the first; None: as the run."""
        if run.export.precision == "bf16":
            return ("cuda",)
        made_for = asked or run.manifest["options"].get("provider")
        return ("cuda", "cpu") if made_for in ("cuda", "tensorrt") else ("cpu", "cuda")

    @abstractmethod
    def lay(self, job: Job) -> None:
        """Fill the stage with everything that the runtime reads."""

    @abstractmethod
    def snippet(self, facts: Facts, folder: str) -> Snippet:
        """The program for a package that lies in `folder`."""

    def check(self, facts: Facts, folder: str) -> Snippet:
        """The program that `verify --run` runs: the same, or as near to it as a machine without a server comes."""
        return self.snippet(facts, folder)

    def notes(self, facts: Facts) -> str:
        """Markdown for the README, beyond the program; '' for none."""
        return ""
