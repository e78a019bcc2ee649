"""What quantizing changes in a matrix, and in the outputs that it makes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_export.onnx_export.weights.dtypes import Array


@dataclass(frozen=True)
class Errors:
    """Sums of squares over a matrix: of its weights, of what quantizing changed in them, and the same of the
    outputs on calibration texts (0 where there are none)."""

    weights: float = 0.0
    lost: float = 0.0
    outputs: float = 0.0
    outputs_lost: float = 0.0

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.weights + other.weights,
            self.lost + other.lost,
            self.outputs + other.outputs,
            self.outputs_lost + other.outputs_lost,
        )


def between(wanted: "Array", found: "Array") -> Errors:
    """Of a matrix, and of what its quantized form stands for."""
    import numpy as np

    wide = wanted.astype(np.float64)
    return Errors(_squares(wide), _squares(wide - found))


def _squares(matrix: "Array") -> float:
    """The sum of the squares, without a BLAS, whose threads would wait for each other and for the caller's."""
    import numpy as np

    flat = matrix.ravel(order="K")
    return float(np.einsum("i,i->", flat, flat))
