"""What a package is made from, and what a target runtime has to offer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_export.choices import Precision, Provider
from lora_export.contracts import ExportResult, MergeResult, PackageOptions, Progress, Report, ValidationResult
from lora_export.errors import InputError
from lora_export.manifest import RunManifest
from lora_export.packages.interpreters import Interpreter
from lora_export.packages.tasks import PackageTask

RUNS_OWN = "run"  # the variant that is the run's own export
ADAPTER_SUFFIX = ".onnx_adapter"


@dataclass(frozen=True)
class Run:
    """What merge-and-export left.

    merged: the merged folder, None for a run without one; export: the run's own ONNX export; fp16_int4: whether its
    engine makes int4 graphs that compute in fp16; companions: the folder with config.json, tokenizer and licences;
    manifest, report: the run's documents; merge, validation: of the report; config: of the model, or the index of
    a pipeline.
    """

    folder: Path
    merged: Path | None
    export: ExportResult
    fp16_int4: bool
    companions: Path
    config: Mapping[str, Any]
    manifest: RunManifest
    report: Report
    merge: MergeResult
    validation: ValidationResult
    task: PackageTask

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.config.get("_class_name", "unknown")])[0])


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn, so that another runtime draws the same one.

    seed: of numpy's RandomState, which gives the noise to begin with; guidance: classifier-free, or what FLUX was
    distilled with; tokens: of a T5 encoder, None without one; width, height: in pixels; latents: shape of the
    noise; precision: of the graphs that drew it.
    """

    seed: int
    steps: int
    guidance: float
    tokens: int | None
    width: int
    height: int
    latents: tuple[int, ...]
    precision: str


@dataclass(frozen=True)
class Sample:
    """A prompt, and the unmerged model's answer to it or the validated graph's output.

    text: greedy, without special tokens; None for a model that does not generate text. numbers: the first of its
    first output otherwise. drawing: of a pipeline, whose answer is a picture.
    """

    prompt: str
    text: str | None = None
    numbers: tuple[float, ...] = ()
    drawing: Drawing | None = None


@dataclass(frozen=True)
class Variant:
    """An export that goes into a package, by the name that its runtime has for it (fp32, q4, …)."""

    name: str
    precision: Precision
    provider: Provider = "cpu"


@dataclass(frozen=True)
class PackageJob:
    """One package to write. stage: the empty folder to fill; exports: by the names of the variants."""

    run: Run
    stage: Path
    exports: Mapping[str, ExportResult]
    facts: "PackageFacts"
    options: PackageOptions
    progress: Progress


@dataclass(frozen=True)
class Snippet:
    """A program that runs a package and prints its answer to the sample, as one line of JSON.

    setup: the commands that install its runtime; code: the program.
    """

    interpreter: Interpreter
    setup: str
    code: str


@dataclass(frozen=True)
class PackageFacts:
    """What running a package takes, as its manifest and config.json have it.

    name: of the model; variants: their names; providers: what it runs on, the default first; precision: of what
    the program runs; adapters: names of the .onnx_adapter files beside a graph with slots, the run's own first;
    weights: variant in the names of a pipeline's weight files, such as fp16; backend: of Triton; lora: whether the
    run's adapter lies beside a GGUF model.
    """

    target: "PackageTarget"
    name: str
    task: PackageTask
    precision: str
    variants: tuple[str, ...]
    providers: tuple[str, ...]
    sample: Sample | None
    config: Mapping[str, Any]
    adapters: tuple[str, ...] = ()
    weights: str = ""
    backend: str = ""
    lora: bool = False

    @property
    def class_name(self) -> str:
        """Of a pipeline of diffusers."""
        return str(self.config.get("_class_name"))


class PackageTarget(ABC):
    """A runtime that packages are made for. All methods raise ExportError or InputError for what cannot be done.

    name: as in --for; title: of the README, "NAME for TITLE"; needs_merged: whether it is made of the merged
    folder; takes_adapters: whether a graph with slots can be packaged, with adapters beside it; for_hub: whether
    the README is a model card, and the package can be pushed to the Hub; file_names: patterns of the names of
    files that it has beyond those that any package may have; own_options: fields of PackageOptions that it takes
    and others refuse; relative: how far the numbers of a sample may be off, by the largest of them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_merged: ClassVar[bool] = False
    takes_adapters: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    for_hub: ClassVar[bool] = False
    file_names: ClassVar[tuple[str, ...]] = ()
    own_options: ClassVar[tuple[str, ...]] = ()
    relative: ClassVar[float] = 1e-3  # fp32 additions in another order

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        """The exports to put into a package: those of `names`, or the default ones. Refuses what cannot be made."""
        if names:
            raise InputError(
                f"--variant {names[0]} with --for {self.name}",
                expected="no variants: this package holds one model, that of the run",
                next_step="merge-and-export --precision for another, or --for transformers-js for several",
            )
        return (Variant(RUNS_OWN, run.export.precision),)

    def types(self, run: Run, names: Sequence[str]) -> tuple[str, ...]:
        """The types that the merged weights are converted to, the most exact first; none for a target of exports.

        names: as in --variant. Refuses what cannot be made.
        """
        return ()

    def providers(self, run: Run, wanted: str | None) -> tuple[str, ...]:
        """What the package runs on, the default first. wanted: which one that is to be; None: as the run."""
        if run.export.precision == "bf16":
            return ("cuda",)
        made_for = wanted or run.manifest.recorded_options.provider
        return ("cuda", "cpu") if made_for in ("cuda", "tensorrt") else ("cpu", "cuda")

    @abstractmethod
    def lay(self, job: PackageJob) -> None:
        """Fill the stage with everything that the runtime reads."""

    @abstractmethod
    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        """The program for a package that lies in `folder`."""

    def code(self, facts: PackageFacts) -> Mapping[str, str]:
        """The files of code that the package holds, by their names in it. They contain no names from a model.

        `verify` refuses a package whose code is another.
        """
        return {}

    def check_folder(self, folder: Path) -> None:  # noqa: B027
        """Refuse a package that this runtime must not be given."""

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        """The program that `verify --run` runs: the same, or the closest that needs no server."""
        return self.snippet(facts, folder)

    def notes(self, facts: PackageFacts) -> str:
        """Markdown for the README, beyond the program; '' for none."""
        return ""
