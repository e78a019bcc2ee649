"""The data files of an export, filled from a checkpoint as weights-map.json says: in blocks, on all cores.

No weight is in memory as a whole, unless a quantizer needs it so, and torch is not needed at all. A first export
and the next adapter of the same graph go the same way, without and with an earlier export to copy from.
"""

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.onnx_export.weights.jobs import Job, copies, elements_of, quantize, straight
from lora_export.onnx_export.weights.map import Weight, WeightsMap
from lora_export.onnx_export.weights.source import WeightSource
from lora_export.storage.workers import ComparedFile, OpenFile, cores, reuse_memory, share_out

if TYPE_CHECKING:
    from lora_export.storage.workers import Bytes


@dataclass
class Writing:
    """folder: holds the data files, or gets them; earlier: an export with the same graphs, of which constants are
    taken, and every weight whose tensors have the hash that they had then. compared: nothing is written, and this
    is told of each place (data file, offset, bytes that belong there, bytes that are there) where the folder
    differs.
    """

    folder: Path
    found: WeightsMap
    source: WeightSource
    progress: Progress
    earlier: Path | None = None
    unchanged: frozenset[str] = frozenset()
    compared: "Callable[[str, int, Bytes, Bytes], None] | None" = None
    workers: int = field(default_factory=cores)
    _taking: threading.Lock = field(default_factory=threading.Lock)
    _written: int = 0

    def run(self) -> None:
        """Write every byte that a recipe or an earlier export gives. ExportError, CheckpointError, OSError."""
        check_sources(self.found, self.source)
        reuse_memory()
        total = sum(w.nbytes for w in self.found.weights)
        with contextlib.ExitStack() as opened:
            jobs = self._jobs(opened)

            def take() -> bool:
                with self._taking:
                    job = next(jobs, None)
                if job is None:
                    return False
                written = job.run()
                with self._taking:
                    self._written += written
                return True

            share_out(take, self.workers, lambda: self.progress.advance(self._written, total))

    def _jobs(self, opened: contextlib.ExitStack) -> Iterator["Job"]:
        files: dict[Path, OpenFile] = {}

        def file(path: Path, flags: int) -> OpenFile:
            if path not in files:
                files[path] = self._opened(path, flags | os.O_NOFOLLOW)
                opened.callback(os.close, files[path].fd)
            return files[path]

        quantized = defaultdict(list)
        for name, size in self.found.sizes.items() if self.compared is None else ():
            out = file(self.folder / name, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if self.earlier else 0))
            os.truncate(out.fd, size)
        for weight in self.found.weights:
            out = file(self.folder / weight.file, os.O_WRONLY)
            if self.earlier is not None and self._kept(weight):
                old = file(self.earlier / weight.file, os.O_RDONLY)
                yield from copies(old, weight.offset, weight.nbytes, out, weight.offset)
            elif weight.recipe.quantized is not None:
                whole = replace(weight.recipe, quantized=replace(weight.recipe.quantized, part="packed"))
                quantized[weight.file, whole].append(weight)
            elif weight.recipe.pieces:
                yield from straight(weight, self.source, out)
        for (name, _), parts in quantized.items():
            yield from quantize(parts, self.source, file(self.folder / name, os.O_WRONLY))

    def _opened(self, path: Path, flags: int) -> OpenFile:
        if self.compared is None:
            return OpenFile(path, os.open(path, flags, 0o666))
        return ComparedFile(
            path, os.open(path, os.O_RDONLY | os.O_NOFOLLOW), told=partial(self.compared, path.name)
        )

    def _kept(self, weight: Weight) -> bool:
        return all(p.tensor in self.unchanged for p in weight.recipe.pieces)


def check_sources(found: WeightsMap, source: WeightSource) -> None:
    """ExportError unless the checkpoint has every tensor and row that weights are made of, in sizes that fit."""
    for weight in found.weights:
        for piece in weight.recipe.pieces:
            info = source.tensors.get(piece.tensor)
            if info is None:
                raise _other_model(f"there is no {piece.tensor}", weight.name)
            if piece.stop > (info.shape or (1,))[0]:
                raise _other_model(f"{piece.tensor} has the shape {list(info.shape)}", weight.name)
        elements = sum(elements_of(source, p) for p in weight.recipe.pieces)
        wanted = 1
        for n in weight.shape:
            wanted *= n
        if weight.recipe.pieces and weight.recipe.quantized is None and elements != wanted:
            raise _other_model(f"{elements} numbers for an initializer of {list(weight.shape)}", weight.name)
        if weight.recipe.quantized is not None:
            _check_quantized(weight, source)


def _check_quantized(weight: Weight, source: WeightSource) -> None:
    """ExportError unless the array has the shape that a quantizer gives it."""
    from lora_export.onnx_export.quantize.numbers import shapes

    recipe = weight.recipe
    matrices = {source.tensors[p.tensor].shape[1:] for p in recipe.pieces}
    if recipe.quantized is None or len(matrices) != 1 or len(next(iter(matrices))) != 1:
        raise _other_model(f"no matrix to quantize in {len(recipe.pieces)} pieces", weight.name)
    height, ((width,),) = sum(p.stop - p.start for p in recipe.pieces), matrices
    rows, columns = (width, height) if recipe.transposed else (height, width)
    if shapes(rows, columns, recipe.quantized).get(recipe.quantized.part) != weight.shape:
        raise _other_model(f"a matrix [{height}, {width}] for an array of {list(weight.shape)}", weight.name)


def _other_model(found: str, initializer: str) -> ExportError:
    return ExportError(
        f"{found}, which the graph's {initializer} is made of",
        expected="a model of the same shape as the one that was exported",
        next_step="export it without --graph-from",
    )
