"""What validation is asked for, and what it found."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_export.choices import Activations, Precision
from lora_export.contracts.figures import Figure


@dataclass(frozen=True)
class Check:
    """One measured figure against its threshold; `note` says where the threshold comes from."""

    name: str
    value: Figure
    threshold: Figure | None  # None for a figure that is only reported
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens under `model`.

    model: base, unmerged, merged, "onnx int4", dequantized, original, …; tokens: how many were predicted.
    """

    model: str
    value: Figure
    tokens: int


@dataclass(frozen=True)
class Deviation:
    """Where the merged model first leaves the unmerged one, in the order of the forward pass.

    module: the first whose output differs by more than the floor although its inputs agree (`value` and `floor`:
    largest difference and noise floor of that output); where no output shows what a wrong tensor does, the first
    that holds one. tensors: its weights that differ, worst first.
    """

    module: str
    value: Figure
    floor: Figure
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSurvival:
    """What remains of the adapter's effect on the outputs of a model in lower precision.

    model: as in Perplexity; share: of the effect that is kept, 1 for all, 0 for none, None if the adapter has none;
    kl_base: mean KL(base‖merged) in nats, the effect; kl_lost: mean KL(merged‖model); both None for a model whose
    outputs are no probabilities of tokens. share_error, kl_lost_error: standard errors between texts, None for one.
    """

    model: str
    share: Figure | None
    kl_base: Figure | None
    kl_lost: Figure | None
    share_error: Figure | None = None
    kl_lost_error: Figure | None = None


@dataclass(frozen=True)
class BaseComparison:
    """An adapter merged into one of the bases that it could belong to, on a text.

    base: trained (the unmerged forward on the dequantized base, the yardstick), dequantized, original or
    requantized; kl_trained: mean KL from the model as it was trained, in nats.
    """

    base: str
    perplexity: Figure
    kl_trained: Figure


@dataclass(frozen=True)
class ExportedPair:
    """The ONNX folders of a merged model and of the base exported the same way.

    nbytes: size of the merged one's files; prefix: of the names of its checks; graphs: file names, alike in both;
    activations: as in QuantizationOptions.
    """

    merged: Path
    base: Path
    precision: Precision
    nbytes: int
    prefix: str = "onnx_"
    graphs: tuple[str, ...] = ("model.onnx",)
    activations: Activations = "float"

    @property
    def name(self) -> str:
        return f"onnx {self.precision}"

    @property
    def merged_graphs(self) -> tuple[Path, ...]:
        return tuple(self.merged / name for name in self.graphs)

    @property
    def base_graphs(self) -> tuple[Path, ...]:
        return tuple(self.base / name for name in self.graphs)


@dataclass(frozen=True)
class Continuation:
    """Greedy continuations of a prompt. first_difference: where merged parts from unmerged, in words."""

    prompt: str
    base: str | None = None
    unmerged: str | None = None
    merged: str | None = None
    first_difference: str | None = None


@dataclass(frozen=True)
class ExportedPipeline:
    """An ONNX folder of a merged pipeline, in Optimum's layout. prefix: of the names of its checks."""

    folder: Path
    precision: Precision
    prefix: str = "onnx_"


@dataclass(frozen=True)
class Picture:
    """A picture that a model made, or the difference of two.

    name: base, unmerged, merged, "onnx fp32", or "merged − unmerged"; file: name of its PNG in the folder that
    the caller chose; width, height: in pixels; psnr: of the two whose difference it is, or of this one against the
    unmerged, in dB, inf for equal ones, None for the unmerged itself; gain: by how much a difference was multiplied
    to be seen, None for a picture.
    """

    name: str
    file: str
    width: int
    height: int
    psnr: Figure | None = None
    gain: Figure | None = None


@dataclass(frozen=True)
class ValidationResult:
    """weight_errors: tensors that are not what the adapter makes of the base, worst first; deviation: looked for
    where a check failed; advice: sentences for a person, such as which base or precision to ship, and why; seed: of
    what was drawn; unused_updates: layers whose update PEFT's unmerged forward never uses, looked for where a check
    failed; merge_options: options of the merge that only its certificate states; pictures: of an image pipeline."""

    passed: bool = field(init=False)  # whether there are checks, and none of them failed
    checks: tuple[Check, ...]
    samples: tuple[Continuation, ...] = ()
    kl_by_position: tuple[Figure, ...] = ()
    weight_errors: tuple[str, ...] = ()
    perplexities: tuple[Perplexity, ...] = ()
    deviation: Deviation | None = None
    adapter_survival: tuple[AdapterSurvival, ...] = ()
    bases: tuple[BaseComparison, ...] = ()
    advice: tuple[str, ...] = ()
    seed: int | None = None
    unused_updates: tuple[str, ...] = ()
    merge_options: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", bool(self.checks) and all(c.passed for c in self.checks))
