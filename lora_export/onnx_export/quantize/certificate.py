"""quantization.json: how each quantized weight of an export was made, and how far it is from what it stands for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import QuantizationSummary
from lora_export.contracts.figures import Figure
from lora_export.onnx_export.quantize.settings import GPTQ, STATISTICS
from lora_export.onnx_export.weights.map import Weight, WeightsMap
from lora_export.storage import sealed
from lora_export.storage.documents import as_json, decode

if TYPE_CHECKING:
    from lora_export.onnx_export.quantize.errors import Errors
    from lora_export.onnx_export.quantize.statistics import Statistics

NAME = "quantization.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class QuantizedWeight:
    """name: of the packed numbers in the data file `file`; made_of: checkpoint tensors; quantizer: how scales and
    codes were chosen; calibrated: whether statistics of the weight's inputs were there.

    weight_error: ‖W − Ŵ‖ / ‖W‖ (Frobenius); output_error: the same of the outputs on the calibration texts, None
    where there were no statistics.
    """

    name: str
    file: str
    made_of: tuple[str, ...]
    method: str
    block_size: int
    quantizer: str
    calibrated: bool
    weight_error: Figure
    output_error: Figure | None


@dataclass(frozen=True)
class QuantizationCertificate:
    schema_version: int
    weights: tuple[QuantizedWeight, ...]


def write(
    folder: Path,
    described: WeightsMap,
    errors: "Mapping[tuple[str, str], Errors]",
    earlier: Sequence[Path] = (),
) -> None:
    """Write the certificate of an export, if it has quantized weights.

    errors: of the weights that were quantized, by data file and name; earlier: exports that the others were
    copied from.
    """
    methods = {(w.file, w.name): w.recipe.quantized.method for w in described.weights if w.recipe.quantized}
    stated = (w for folder in earlier for w in read(folder))
    known = {(w.file, w.name): w for w in stated if methods.get((w.file, w.name)) == w.method}
    new = {(w.file, w.name): w for w in judged(described, errors)}
    order = ((w.file, w.name) for w in described.weights)
    every = known | new
    weights = tuple(every[key] for key in order if key in every)
    if weights:
        sealed.write_json(folder / NAME, as_json(QuantizationCertificate(SCHEMA_VERSION, weights)))


def judged(described: WeightsMap, errors: "Mapping[tuple[str, str], Errors]") -> tuple[QuantizedWeight, ...]:
    """The entries of the weights whose errors are known, in the order of the map."""
    found = ((w, errors.get((w.file, w.name))) for w in described.weights)
    return tuple(_judged(w, e) for w, e in found if e is not None)


def read(folder: Path) -> tuple[QuantizedWeight, ...]:
    """The weights of an export's certificate; none where there is no certificate. InputError for a damaged one."""
    path = folder / NAME
    if not path.is_file():
        return ()
    return decode(sealed.read_json(path), QuantizationCertificate, "the certificate of quantization", path).weights


def summary(folder: Path) -> QuantizationSummary | None:
    """What a person wants to know of an export's certificate, if its quantizer read texts. InputError as `read`."""
    weights = [w for w in read(folder) if w.quantizer == GPTQ]
    if not weights:
        return None
    blind = [w for w in weights if not w.calibrated]
    known = [(w.output_error, w.made_of[0]) for w in weights if w.output_error is not None and w.made_of]
    error, worst = max(known, key=lambda one: math.inf if math.isnan(one[0]) else one[0], default=(None, None))
    first = next((w.made_of[0] for w in blind if w.made_of), None)
    return QuantizationSummary(GPTQ, len(weights) - len(blind), len(blind), first, worst, error)


def _judged(weight: Weight, errors: "Errors") -> QuantizedWeight:
    how = weight.recipe.quantized
    assert how is not None
    return QuantizedWeight(
        name=weight.name,
        file=weight.file,
        made_of=tuple(dict.fromkeys(p.tensor for p in weight.recipe.pieces)),
        method=how.method,
        block_size=how.block_size,
        quantizer=how.algorithm,
        calibrated=errors.outputs > 0,
        weight_error=_share(errors.lost, errors.weights),
        output_error=_share(errors.outputs_lost, errors.outputs) if errors.outputs > 0 else None,
    )


def _share(lost: float, whole: float) -> float:
    return float(f"{math.sqrt(lost / whole):.6g}") if whole > 0 else 0.0


def statistics_beside(folder: Path, described: WeightsMap) -> "Statistics | None":
    """The statistics that the weights of an export were quantized with; None if no quantizer asks for any."""
    if not any(w.recipe.quantized and w.recipe.quantized.algorithm == GPTQ for w in described.weights):
        return None
    from lora_export.onnx_export.quantize.statistics import Statistics

    return Statistics.open(folder / STATISTICS)
