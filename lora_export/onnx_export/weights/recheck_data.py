"""The data files of an export made again by the writer that made them, and compared as they would be written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import Findings, Progress, TensorSource
from lora_export.onnx_export.quantize import certificate
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.map import Weight, WeightsMap
from lora_export.storage.workers import Regions

if TYPE_CHECKING:
    from lora_export.onnx_export.quantize.errors import Errors
    from lora_export.storage.workers import Bytes

_CHUNK = 2**22  # bytes of what is between the weights that are read at a time


def judge_data(
    findings: Findings, folder: Path, described: WeightsMap, source: TensorSource, progress: Progress
) -> None:
    """Every byte that a recipe gives, made again; between the weights there are zeros."""
    notes = [
        f"{n} does not have the {s} bytes of its weights"
        for n, s in described.sizes.items()
        if _size(folder / n) != s
    ]
    if notes:
        findings.judge("onnx_weights", "", notes)
        return
    progress.stage("verify: the weights of the ONNX export, made again")
    regions = Regions((w.file, w.offset, w.name) for w in described.weights if w.nbytes)
    other: dict[str, int] = {}

    def differs(file: str, at: int, wanted: "Bytes", there: "Bytes") -> None:
        name = regions.at(file, at) or file
        count = int((wanted[: len(there)] != there).sum()) + len(wanted) - len(there)
        other[name] = other.get(name, 0) + count

    statistics = certificate.statistics_beside(folder, described)
    again = DataFiles(folder, described, source, progress, compared=differs, statistics=statistics)
    again.write()
    notes = [f"{name}: {count} bytes are not what the merged model gives" for name, count in sorted(other.items())]
    notes += [f"{file}: bytes between the weights are not zero" for file in _unclean(folder, described)]
    made = sum(bool(w.recipe.pieces) for w in described.weights)
    findings.judge("onnx_weights", f"every byte of {made} weights is what the merged model gives", notes)
    _judge_certificate(findings, folder, described, again.errors)
    if statistics is not None:
        findings.not_checked.append(
            f"what the calibration text gave: {statistics.path.name} is taken as it is, and the weights follow"
        )


def _judge_certificate(
    findings: Findings, folder: Path, described: WeightsMap, errors: "Mapping[tuple[str, str], Errors]"
) -> None:
    """quantization.json, if there is one, says of each quantized weight what is computed of it here."""
    stated = certificate.read(folder)
    if not stated:
        return
    wanted = certificate.judged(described, errors)
    notes = [f"{s.name}: {s} is stated, and {w} computed" for s, w in zip(stated, wanted, strict=False) if s != w]
    notes += [f"{len(stated)} weights are stated, and {len(wanted)} are quantized"] * (len(stated) != len(wanted))
    what = f"errors of {len(wanted)} quantized weights are those that {certificate.NAME} states"
    findings.judge("onnx_quantization", what, notes)


def judge_constants(findings: Findings, folder: Path, stage: Path, described: WeightsMap) -> None:
    """What no weight is made of, beside the files of a new export in `stage`."""
    constants = [w for w in described.weights if not w.recipe.pieces]
    notes = [
        f"{w.name}: not the constant of a new export"
        for w in constants
        if _size(folder / w.file) >= w.offset + w.nbytes and _part(folder, w) != _part(stage, w)
    ]
    findings.judge("onnx_constants", f"{len(constants)} constants in data files are those of a new export", notes)


def _unclean(folder: Path, described: WeightsMap) -> Iterator[str]:
    """Data files with nonzero bytes between their weights."""
    for file in described.sizes:
        end = 0
        with (folder / file).open("rb") as data:
            for weight in sorted((w for w in described.weights if w.file == file), key=lambda w: w.offset):
                data.seek(end)
                while end < weight.offset and not any(piece := data.read(min(_CHUNK, weight.offset - end))):
                    end += len(piece)
                if end < weight.offset:
                    yield file
                    break
                end = max(end, weight.offset + weight.nbytes)


def _part(folder: Path, weight: Weight) -> bytes:
    with (folder / weight.file).open("rb") as data:
        data.seek(weight.offset)
        return data.read(weight.nbytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
