"""calibration.safetensors: what the products of a model multiply, gathered once and read matrix by matrix.

For each matrix H (in, in), the mean over tokens of x xᵀ, the file has `NAME.diagonal` (fp32) and `NAME.triangle`:
the upper triangle of H_ij / sqrt(H_ii H_jj), row by row, in fp16. NAME is the first of the pieces of checkpoint
tensors that H belongs to. So the file does not depend on graphs, nor on how an engine names and joins weights.
"""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.checkpoint.header import build_header, read_header
from lora_export.contracts import CalibrationRecord, Progress, TensorInfo
from lora_export.errors import InputError
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize import calibration as calibration_texts
from lora_export.onnx_export.quantize import speech
from lora_export.onnx_export.quantize.calibration import CalibrationText
from lora_export.onnx_export.quantize.feeding import Stage, stages
from lora_export.onnx_export.quantize.moments import Moment, inputs_of, moments, too_few
from lora_export.onnx_export.quantize.segments import SEGMENT
from lora_export.onnx_export.quantize.settings import STATISTICS
from lora_export.onnx_export.quantize.speech import Clips
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.dtypes import Array, rounded, to_float32
from lora_export.onnx_export.weights.map import Recipe, Weight
from lora_export.storage import sealed
from lora_export.storage.documents import as_json, decode, parse_json

NAME = STATISTICS
TOKENS = 8192
SCHEMA_VERSION = "1"
_DIAGONAL, _TRIANGLE = ".diagonal", ".triangle"
_ROWS = 256  # of a matrix that are packed at once


def piece_key(recipe: Recipe) -> str | None:
    """The first piece of a weight, as the file names it."""
    return _keys(recipe)[0] if recipe.pieces else None


def _keys(recipe: Recipe) -> list[str]:
    return [f"{p.tensor}[{p.start}:{p.stop}]" for p in recipe.pieces]


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """A file of statistics, distrusted: its matrices are read when they are asked for."""

    path: Path
    calibration: CalibrationRecord
    names: Mapping[str, str]  # piece → name of its matrix
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "Statistics":
        """CheckpointError for a damaged safetensors file, InputError for one that is anything else."""
        if path.is_symlink() or not path.is_file():
            raise InputError(
                "the statistics are missing or a link",
                where=path,
                expected=f"{NAME}, as an export with gptq left it",
            )
        header = read_header(path)
        text = header.metadata
        if text.get("schema_version") != SCHEMA_VERSION:
            raise _odd(path, f"schema_version {text.get('schema_version')!r}", SCHEMA_VERSION)
        try:
            values = {
                key: parse_json(text[key].encode(), len(text[key])) for key in ("tokens", "windows", "pieces")
            }
        except (KeyError, ValueError) as error:
            raise _odd(path, f"no numbers or names ({error})", "tokens, windows and pieces") from None
        read = decode({**values, "text_sha256": text.get("text_sha256")}, _Metadata, "the statistics", path)
        if not re.fullmatch("[0-9a-f]{64}", read.text_sha256) or min(read.tokens, read.windows) < 1:
            raise _odd(path, "no hash, or no tokens", "the SHA-256 of a text, and its tokens")
        for name in set(read.pieces.values()):
            _check_shapes(path, name, header.tensors)
        calibration = CalibrationRecord(read.text_sha256, read.tokens, read.windows)
        return cls(path, calibration, read.pieces, header.tensors)

    def key(self, recipe: Recipe) -> str | None:
        """The name of the matrix of a weight, which others may share. None where there is none."""
        piece = piece_key(recipe)
        return self.names.get(piece) if piece is not None else None

    def moment(self, weight_recipe: Recipe) -> Array | None:
        """The mean of x xᵀ, (in, in) in float64, symmetric. None where there is none. InputError for values that no
        such mean can have."""
        name = self.key(weight_recipe)
        if name is None:
            return None
        diagonal = self._read(name + _DIAGONAL, np.dtype(np.float32)).astype(np.float64)
        triangle = to_float32(self._read(name + _TRIANGLE, np.dtype(np.float16)))
        if not (np.isfinite(diagonal).all() and (diagonal >= 0).all() and (np.abs(triangle) <= 1).all()):
            raise _odd(self.path, "numbers that no mean of squares has", "finite ones, and correlations", name)
        root, size, at = np.sqrt(diagonal), len(diagonal), 0
        matrix = np.empty((size, size), np.float64)
        for row in range(size):
            matrix[row, row:] = matrix[row:, row] = triangle[at : at + size - row] * root[row:] * root[row]
            at += size - row
        np.fill_diagonal(matrix, diagonal)
        return matrix

    def _read(self, tensor: str, dtype: "np.dtype[np.float32] | np.dtype[np.float16]") -> Array:
        info = self.tensors[tensor]
        with sealed.opened(self.path) as file:
            file.seek(info.start)
            raw = file.read(info.nbytes)
        if len(raw) != info.nbytes:
            raise _odd(self.path, f"{len(raw)} bytes", f"{info.nbytes}", tensor)
        return np.frombuffer(raw, dtype)


@dataclass(frozen=True)
class _Metadata:
    text_sha256: str
    tokens: int
    windows: int
    pieces: Mapping[str, str]


def _check_shapes(path: Path, name: str, tensors: Mapping[str, TensorInfo]) -> None:
    diagonal, triangle = tensors.get(name + _DIAGONAL), tensors.get(name + _TRIANGLE)
    if diagonal is None or triangle is None:
        raise _odd(path, "a matrix that is not there", "its diagonal and its triangle", name)
    size = diagonal.shape[0] if len(diagonal.shape) == 1 else 0
    if size < 1 or triangle.shape != (size * (size + 1) // 2,):
        shapes = f"{list(diagonal.shape)} and {list(triangle.shape)}"
        raise _odd(path, f"a diagonal and a triangle of {shapes}", "[n] and [n (n + 1) / 2]", name)
    if (diagonal.dtype, triangle.dtype) != ("F32", "F16"):
        raise _odd(path, f"{diagonal.dtype} and {triangle.dtype}", "F32 and F16", name)


def _odd(path: Path, found: str, expected: str, tensor: str | None = None) -> InputError:
    return InputError(
        f"the statistics have {found}",
        where=path,
        tensor=tensor,
        expected=expected,
        next_step="export the model again without --graph-from, which gathers them again",
    )


# --- gathering ---------------------------------------------------------------------------------------------


def collect(
    graphs: Sequence[Path],
    model: Path,
    calibration: Path | None,
    output: Path,
    *,
    skip: Collection[str] = (),
    tokens: int = TOKENS,
    limit: int = SEGMENT,
    progress: Progress,
) -> CalibrationRecord:
    """Run calibration texts through an export, and write the statistics of its products to the new file `output`.

    graphs: fp32, of one folder with its weights-map.json, an encoder's first; model: its Hugging Face folder, with
    the tokenizer; calibration: a text file, by default the built-in page, or a folder of clips (see
    `feeding.stages` for what is read of it); skip: names of weights that need no statistics; tokens: at most so
    many; limit: bytes of weights and matrices in memory.

    A weight that two graphs share gets the statistics of the first. An expert that too few tokens reached has none,
    which is said. InputError for a text that cannot be used, ExportError for graphs that cannot be run on texts.
    """
    text: CalibrationText | Clips
    if calibration is not None and calibration.is_dir():
        text = speech.read(calibration)
    else:
        text = calibration_texts.read(calibration)
    weights = weights_map.read(graphs[0].parent).weights
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=output.parent) as scratch:
        folders = [Path(scratch, name) for name in ("between", "values", "packed")]
        for folder in folders:
            folder.mkdir()
        between, values, packed = folders
        run, total, windows = stages(graphs, model, text, tokens, between)
        file = _Packed(packed)
        for stage in run:
            _gather(stage, weights, skip, file, values, limit, progress)
        made = CalibrationRecord(text.sha256, total, windows)
        file.write(output, made)
    return made


def _gather(
    stage: Stage,
    weights: Sequence[Weight],
    skip: Collection[str],
    file: "_Packed",
    scratch: Path,
    limit: int,
    progress: Progress,
) -> None:
    graph = open_model(stage.graph)
    stored = (value.const_value for value in graph.graph.initializers.values())
    files = {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}
    wanted = inputs_of(graph, [w for w in weights if w.file in files], skip)
    missing = {w.name for inputs in wanted for w in inputs.weights}
    for moment in moments(
        stage.graph,
        stage.feeds,
        wanted,
        scratch=scratch,
        longest=stage.longest,
        limit=limit,
        outputs=stage.kept,
        progress=progress,
    ):
        if not too_few(moment, stage.tokens):
            file.add(moment)
            missing -= {w.name for w in moment.inputs.weights}
    for name in sorted(missing):
        progress.detail(f"{name}: too few tokens of the calibration text reach it; it has no statistics")


class _Packed:
    """Matrices in the form of the file, each on disk until all are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._diagonals: dict[str, Array] = {}
        self._pieces: dict[str, str] = {}

    def add(self, moment: Moment) -> None:
        """Pieces that have a matrix keep it."""
        pieces = [key for w in moment.inputs.weights for key in _keys(w.recipe) if key not in self._pieces]
        if not pieces:
            return
        name = min(pieces)
        self._pieces |= dict.fromkeys(pieces, name)
        diagonal = np.array(moment.matrix.diagonal(), np.float32)
        with (self._folder / str(len(self._diagonals))).open("xb") as out:
            for rows in _triangle(moment.matrix, diagonal):
                out.write(rows.tobytes())
        self._diagonals[name] = diagonal

    def write(self, output: Path, made: CalibrationRecord) -> None:
        """The whole file, matrices in the order of their names."""
        places = {name: self._folder / str(at) for at, name in enumerate(self._diagonals)}
        names = sorted(places)
        tensors = [(n + _DIAGONAL, "F32", self._diagonals[n].shape) for n in names]
        for name in names:
            size = len(self._diagonals[name])
            tensors.append((name + _TRIANGLE, "F16", (size * (size + 1) // 2,)))
        metadata = {
            "schema_version": SCHEMA_VERSION,
            **{key: str(value) for key, value in as_json(made).items()},
            "pieces": sealed.json_text(dict(sorted(self._pieces.items()))),
        }
        with output.open("xb") as out:
            out.write(build_header(tensors, metadata))
            for name in names:
                out.write(self._diagonals[name].tobytes())
            for name in names:
                with places[name].open("rb") as part:
                    while block := part.read(2**24):
                        out.write(block)


def _triangle(matrix: Array, diagonal: Array) -> Iterator[Array]:
    """Rows of the upper triangle of H_ij / sqrt(H_ii H_jj), in fp16; zeros where a diagonal entry is zero."""
    seen = diagonal > 0
    scale = np.zeros_like(diagonal)
    scale[seen] = 1 / np.sqrt(diagonal[seen])
    for start in range(0, len(matrix), _ROWS):
        block = matrix[start : start + _ROWS, start:] * scale[start : start + _ROWS, None] * scale[start:]
        halves = rounded(np.clip(block, -1, 1), np.dtype(np.float16))
        for row in range(len(block)):
            yield halves[row, row:]
