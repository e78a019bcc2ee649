"""The weights of an export as arrays, and those in which another export with the same graph differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import InputError
from lora_export.onnx_export.records import read_record
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Weight
from lora_export.onnx_export.weights.reuse import read_map
from lora_export.storage import sealed

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array


class LiveWeights:
    """InputError or ExportError for a folder that is no export with a map of its weights."""

    def __init__(self, folder: Path) -> None:
        if not (folder / weights_map.NAME).is_file():
            raise InputError(
                "this is no export with a map of its weights",
                where=folder,
                expected=f"a folder with {weights_map.NAME}",
                next_step="lora-export export -m MERGED -o OUT",
            )
        graphs = read_record(folder).graphs
        self.folder = folder
        self._found = read_map(folder, graphs)
        self._graphs = [sealed.sha256(folder / name) for name in graphs]

    def arrays(self) -> Iterator[tuple[str, "Array"]]:
        """Each initializer by its name, in the shape and type that the graph has."""
        for weight in self._found.weights:
            yield weight.name, self._array(weight)

    def of(self, folder: Path) -> "LiveWeights":
        """Another export. InputError unless it has this very graph."""
        other = LiveWeights(folder)
        if other._graphs != self._graphs or other._found.weights != self._found.weights:
            raise InputError(
                "the export has another graph than the one that serves",
                where=folder,
                expected="an export that was made with --graph-from, or switched",
                next_step=f"lora-export export -m MERGED -o OUT --graph-from {self.folder}",
            )
        return other

    def differing(self, other: "LiveWeights") -> Iterator[tuple[str, "Array"]]:
        """What `other` has in the place of weights that are made of different tensors."""
        for weight in other._found.weights:
            made_of = {p.tensor for p in weight.recipe.pieces}
            if any(other._found.hashes[name] != self._found.hashes[name] for name in made_of):
                yield weight.name, other._array(weight)

    def _array(self, weight: Weight) -> "Array":
        import numpy as np

        from lora_export.onnx_export.weights.dtypes import ONNX

        dtype = ONNX[weight.dtype]
        found = np.fromfile(self.folder / weight.file, dtype, weight.nbytes // dtype.itemsize, offset=weight.offset)
        return found.reshape(weight.shape)
