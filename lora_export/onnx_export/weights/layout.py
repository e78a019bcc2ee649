"""The layout of an export's weights: which bytes of its data files are made of which tensors, in blocks.

No weight is in memory as a whole, unless a quantizer needs it so, and torch is not needed at all. A first export
and the next adapter of the same graph go the same way, without and with an earlier export to copy from.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_export.checkpoint.tensor_files import TensorFiles
from lora_export.contracts import Progress, TensorInfo, TensorSource
from lora_export.errors import ExportError
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight, WeightsMap
from lora_export.onnx_export.weights.quantized import Matrices
from lora_export.onnx_export.weights.reading import as_stored, height_of, in_lines, lines_of, rows_of, view
from lora_export.storage.workers import BLOCK, Budget, ComparedFile, Job, OpenFile, carry_out, copies, reuse_memory

if TYPE_CHECKING:
    from lora_export.onnx_export.quantize.errors import Errors
    from lora_export.onnx_export.quantize.statistics import Statistics
    from lora_export.storage.workers import Bytes

TILE = 2**25  # bytes in fp32 that are turned at a time; a larger matrix is written in tiles, line by line
STRIP = 2**18  # bytes of rows that are turned in one go, so that they stay in the processor's cache
STRIPS = 2  # that are read together
SOLVING = 2**30  # bytes that weights with statistics may take together while they are quantized


class Differs(Protocol):
    def __call__(self, file: str, at: int, wanted: "Bytes", there: "Bytes") -> None:
        """A place of a data file with other bytes than belong there; `there` is shorter where the file ends."""


@dataclass
class DataFiles:
    """folder: holds the data files, or gets them; earlier: an export with the same graphs, of which constants are
    taken, and every weight whose tensors have the hash that they had then; compared: nothing is written, and this
    is called for each place where the folder differs; statistics: of the inputs that quantized weights multiply;
    errors: what quantizing changed, by data file and name of the packed numbers, filled by `write`; ready: other
    exports of the same numbers, from which a weight is copied that they made by the same recipe.
    """

    folder: Path
    described: WeightsMap
    source: TensorSource
    progress: Progress
    earlier: Path | None = None
    unchanged: frozenset[str] = frozenset()
    compared: Differs | None = None
    statistics: "Statistics | None" = None
    errors: "dict[tuple[str, str], Errors]" = field(default_factory=dict)
    ready: tuple[Path, ...] = ()

    def write(self) -> None:
        """Write every byte that a recipe or an earlier export gives. ExportError, CheckpointError, OSError."""
        check_sources(self.described, self.source)
        reuse_memory()
        total = sum(w.nbytes for w in self.described.weights)
        budget = Budget(SOLVING) if self.statistics else None
        with contextlib.ExitStack() as opened:
            if self.statistics:
                opened.enter_context(_one_thread_each())
            carry_out(self._jobs(opened), budget, look=lambda written: self.progress.advance(written, total))

    def _jobs(self, opened: contextlib.ExitStack) -> Iterator[Job]:
        files = {n: opened.enter_context(contextlib.closing(self._opened(n))) for n in self.described.sizes}
        earlier = TensorFiles({}, follow=False)
        matrices = Matrices(self.source, self.statistics, self.errors)
        made = _made_in(self.ready)
        for name, size in self.described.sizes.items() if self.compared is None else ():
            files[name].resize(size)
        for weight in self.described.weights:
            out = files[weight.file]
            if self.earlier is not None and all(p.tensor in self.unchanged for p in weight.recipe.pieces):
                yield from copies(weight.stored(self.earlier, earlier), out, weight.offset)
            elif weight.recipe.pieces and (place := made.get(_kind(weight))) is not None:
                folder, same = place
                yield from copies(same.stored(folder, earlier), out, weight.offset)
            elif weight.recipe.quantized is not None:
                matrices.add(weight, out)
            elif weight.recipe.transposed:
                yield from _tiles(weight, self.source, out)
            else:
                yield from _straight(weight, self.source, out)
        yield from matrices.jobs()

    def _opened(self, name: str) -> OpenFile:
        path = self.folder / name
        if self.compared is not None:
            return ComparedFile.compare(path, partial(self.compared, name), os.O_NOFOLLOW)
        flags = os.O_WRONLY | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if self.earlier else 0)
        return OpenFile(path, os.open(path, flags, 0o666))


def _kind(weight: Weight) -> tuple[Recipe, str, tuple[int, ...]]:
    """What the bytes of a weight follow from, numbers and statistics aside."""
    return weight.recipe, weight.dtype, weight.shape


def _made_in(exports: Sequence[Path]) -> dict[tuple[Recipe, str, tuple[int, ...]], tuple[Path, Weight]]:
    """The weights of exports, with the folder that each lies in."""
    return {_kind(w): (folder, w) for folder in exports for w in weights_map.read(folder).weights}


def _one_thread_each() -> contextlib.AbstractContextManager[object]:
    """Linear algebra in the thread that asks for it: every core has a thread of this machine already."""
    import scipy.linalg  # noqa: F401 (it brings a BLAS of its own, and only what is loaded can be limited)
    import threadpoolctl

    limited: contextlib.AbstractContextManager[object] = threadpoolctl.threadpool_limits(1, "blas")
    return limited


# --- weights that are not quantized ------------------------------------------------------------------------


def _straight(weight: Weight, source: TensorSource, out: OpenFile) -> Iterator[Job]:
    at = weight.offset
    for piece in weight.recipe.pieces:
        info = source.tensors[piece.tensor]
        width = prod(info.shape[1:])
        step, size = max(1, BLOCK // max(4, width * 4)), weight.nbytes // max(1, prod(weight.shape))
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            yield Job(partial(_write_rows, weight, info, start, stop, out, at))
            at += (stop - start) * width * size


def _write_rows(weight: Weight, info: TensorInfo, start: int, stop: int, out: OpenFile, at: int) -> int:
    """Rows [start, stop) of a tensor, cast, to `at`."""
    data = as_stored(rows_of(info, start, stop), weight)
    out.write(view(data), at)
    return int(data.nbytes)


def _tiles(weight: Weight, source: TensorSource, out: OpenFile) -> Iterator[Job]:
    """As wide as TILE allows, across pieces: a tile of the whole width is one write, a narrower one many."""
    most = max(1, TILE // max(4, weight.shape[0] * 4))
    parts: list[Piece] = []
    column = filled = 0
    for piece in (in_lines(p, source) for p in weight.recipe.pieces):
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + most - filled)
            parts.append(Piece(piece.tensor, start, stop))
            filled, start = filled + stop - start, stop
            if filled == most:
                yield Job(partial(_write_tile, weight, source, tuple(parts), out, column))
                parts, column, filled = [], column + filled, 0
    if parts:
        yield Job(partial(_write_tile, weight, source, tuple(parts), out, column))


def _write_tile(weight: Weight, source: TensorSource, pieces: tuple[Piece, ...], out: OpenFile, column: int) -> int:
    """Rows of matrices (out, in) below each other, turned, and so the columns [column, …) of the initializer
    (in, out)."""
    import numpy as np

    width, height = sum(p.stop - p.start for p in pieces), weight.shape[0]
    step = max(16, STRIP // (height * 4))  # rows that stay in the processor's cache while they are turned
    turned, at = None, 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, STRIPS * step):
            read = lines_of(source.tensors[piece.tensor], start, min(start + STRIPS * step, piece.stop))
            for first in range(0, len(read), step):
                rows = as_stored(read[first : first + step], weight)
                if turned is None:
                    turned = np.empty((height, width), rows.dtype)
                turned[:, at : at + len(rows)] = rows.T
                at += len(rows)
    assert turned is not None
    size = turned.itemsize
    out.write_lines(view(turned), width * size, weight.offset + column * size, weight.shape[1] * size)
    return int(turned.nbytes)


# --- what the source must have -----------------------------------------------------------------------------


def check_sources(described: WeightsMap, source: TensorSource) -> None:
    """ExportError unless the checkpoint has every tensor and row that weights are made of, in sizes that fit."""
    for weight in described.weights:
        elements = 0
        for piece in weight.recipe.pieces:
            info = source.tensors.get(piece.tensor)
            if info is None:
                raise _other_model(f"there is no {piece.tensor}", weight.name)
            if piece.stop > info.height:
                raise _other_model(f"{piece.tensor} has the shape {list(info.shape)}", weight.name)
            elements += (piece.stop - piece.start) * prod(info.shape[1:])
        if weight.recipe.quantized is not None:
            _check_quantized(weight, source)
        elif weight.recipe.pieces and elements != prod(weight.shape):
            raise _other_model(f"{elements} numbers for an initializer of {list(weight.shape)}", weight.name)


def _check_quantized(weight: Weight, source: TensorSource) -> None:
    """ExportError unless the array has the shape that a quantizer gives it."""
    from lora_export.onnx_export.quantize.numbers import shapes

    recipe = weight.recipe
    shapes_of = [source.tensors[p.tensor].shape for p in recipe.pieces]
    widths = {shape[-1] for shape in shapes_of if len(shape) in (2, 3)}
    if recipe.quantized is None or len(widths) != 1 or any(len(shape) < 2 for shape in shapes_of):
        raise _other_model(f"no matrix to quantize in {len(recipe.pieces)} pieces", weight.name)
    height, (width,) = height_of(recipe, source), widths
    rows, columns = (width, height) if recipe.transposed else (height, width)
    if shapes(rows, columns, recipe.quantized).get(recipe.quantized.part) != weight.shape:
        raise _other_model(f"a matrix [{height}, {width}] for an array of {list(weight.shape)}", weight.name)


def _other_model(found: str, initializer: str) -> ExportError:
    return ExportError(
        f"{found}, which the graph's {initializer} is made of",
        expected="a model of the same shape as the one that was exported",
        next_step="export it without --graph-from",
    )
