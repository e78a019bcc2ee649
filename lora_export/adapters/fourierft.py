"""FourierFT (arXiv:2405.03003, eq. 2-4): W' = W + s·Re(F⁻¹(E)), E zero but for n frequencies drawn by a seed."""

from dataclasses import dataclass

import torch

from lora_export.adapters.config import Number
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.sparse import first_permuted
from lora_export.adapters.updates import SizedTarget, never
from lora_export.contracts import TargetUpdate

NAME = "FourierFT"
FORMULA = "W + s·Re(F⁻¹(E)), F⁻¹ the inverse discrete Fourier transform in two dimensions"

_MARKER = "fourierft_spectrum"
COPIES = 12  # in fp32: weight, delta, its half spectrum and itself in float64, and the transform's work space


@dataclass(frozen=True)
class Settings:
    """Of the kinds that train numbers at places drawn by random_loc_seed."""

    scaling: Number


@dataclass(frozen=True)
class DenseUpdate:
    """weight + delta, of the same shape as the weight; delta: fp32."""

    delta: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight + self.delta[rows]


def real_inverse(places: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Re(F⁻¹(E)) of this shape, float64, for the real matrix E with values (n,) at the flat places (n,).

    The real part is the transform of E's even part, which half of the columns determine.
    """
    height, width = shape
    half = torch.zeros(height, width // 2 + 1, dtype=torch.complex128)
    row, column = places // width, places % width
    for r, c in ((row, column), (-row % height, -column % width)):
        kept = c <= width // 2
        half.index_put_((r[kept], c[kept]), (values[kept].double() / 2).to(half.dtype), accumulate=True)
    delta: torch.Tensor = torch.fft.irfft2(half, s=shape)
    return delta


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or GPT-2's Conv1D. How many frequencies it has, its tensor tells."""
    file.refuse_factor(NAME)
    scaling, seed = file.settings(Settings).scaling, seed_of(file)
    return [_update(module, scaling, seed) for module in complete(file, _MARKER)]


def seed_of(file: AdapterFile) -> int:
    """random_loc_seed, which places the trained numbers."""
    seed = file.config.get("random_loc_seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise file.refuse(
            f"random_loc_seed is {seed!r}", expected="the seed that the places of the trained numbers follow from"
        )
    return seed


def _update(module: AdaptedModule, scaling: float, seed: int) -> TargetUpdate:
    (count,) = module.file.shape(module.keys[_MARKER], 1)
    flips = module.is_conv1d

    def load(shape: tuple[int, ...]) -> DenseUpdate:
        values = module.read(_MARKER)
        height, width = reversed(shape) if flips else shape
        delta = scaling * real_inverse(first_permuted(seed, height * width, count), values, (height, width))
        return DenseUpdate((delta.T if flips else delta).to(values.dtype))

    # Each row of the delta needs all frequencies.
    return SizedTarget(
        module.weight, "fourierft", module.used, ((None, None),), load, adds=True, row_wise=never, copies=COPIES,
        least=count,
    )  # fmt: skip
