"""The data files of an export made again by the writer that made them, and compared as they would be written."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import Findings, Progress, TensorSource
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.map import Weight, WeightsMap
from lora_export.storage.workers import Regions

if TYPE_CHECKING:
    from lora_export.storage.workers import Bytes

_CHUNK = 2**22  # bytes of what is between the weights that are read at a time


def judge_data(
    findings: Findings, folder: Path, described: WeightsMap, source: TensorSource, progress: Progress
) -> None:
    """Every byte that a recipe gives, made again; between the weights there are zeros."""
    notes = [
        f"{n} has not the {s} bytes of its weights" for n, s in described.sizes.items() if _size(folder / n) != s
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

    DataFiles(folder, described, source, progress, compared=differs).write()
    notes = [f"{name}: {count} bytes are not what the merged model gives" for name, count in sorted(other.items())]
    notes += [f"{file}: bytes between the weights are not zero" for file in _unclean(folder, described)]
    made = sum(bool(w.recipe.pieces) for w in described.weights)
    findings.judge("onnx_weights", f"every byte of {made} weights is what the merged model gives", notes)


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
    """Data files that hold something where no weight lies."""
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
