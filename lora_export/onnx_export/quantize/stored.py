"""The matrices that the products of a quantized export multiply by, from what its data files hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.onnx_export.graphs.matmuls import Product
from lora_export.onnx_export.quantize.numbers import dequantize
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.dtypes import ONNX, Array
from lora_export.onnx_export.weights.map import Part, Piece, Weight

Made = tuple[tuple[Piece, ...], bool]  # the pieces of a matrix, and whether they are turned


@dataclass(frozen=True)
class StoredMatrices:
    """parts: of each quantized matrix, by what it is made of."""

    folder: Path
    parts: Mapping[Made, Mapping[Part, Weight]]

    @classmethod
    def of(cls, folder: Path) -> "StoredMatrices":
        parts: dict[Made, dict[Part, Weight]] = {}
        for weight in weights_map.read(folder).weights:
            if (how := weight.recipe.quantized) is not None:
                parts.setdefault((weight.recipe.pieces, weight.recipe.transposed), {})[how.part] = weight
        return cls(folder, parts)

    def matrix(self, product: Product) -> Array | None:
        """The factor of a product of the unquantized graph, (in, out) in fp32; None if it is not quantized here."""
        recipe = product.weight.recipe
        parts = self.parts.get((recipe.pieces, recipe.transposed != product.turned))
        if parts is None:
            return None
        how = parts["packed"].recipe.quantized
        assert how is not None
        arrays = {part: self._read(weight) for part, weight in parts.items()}
        return dequantize(arrays, product.rows, product.columns, how)

    def _read(self, weight: Weight) -> Array:
        count = int(np.prod(weight.shape))
        values = np.fromfile(self.folder / weight.file, ONNX[weight.dtype], count, offset=weight.offset)
        return values.reshape(weight.shape)
